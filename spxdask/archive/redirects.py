"""HTTP redirects, followed unless they lead from a public archive into a private network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import aiohttp
from yarl import URL

from spxdask.archive.network import find_download_proxy
from spxdask.errors import ArchiveError

REDIRECT_STATUS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 10
# IPv6 addresses that end in the IPv4 address they lead to: compatible, mapped, NAT64.
_NETWORKS_WITH_IPV4 = tuple(map(ip_network, ("::/96", "::ffff:0:0/96", "64:ff9b::/96")))
# NAT64 with a prefix that is local to a network (RFC 8215).
_LOCAL_NAT64 = ip_network("64:ff9b:1::/48")


@asynccontextmanager
async def get_following_redirects(
    session: aiohttp.ClientSession,
    url: str,
    *,
    method: str = "GET",
    max_redirects: int = MAX_REDIRECTS,
    **options: Any,
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Send a request and follow redirects to where they are allowed to lead.

    Each request goes through the proxy that the environment names for its host. An archive with a
    public address cannot have a worker send requests to a private one, such as a service of the
    machine or of the network that the worker is in.

    Parameters
    ----------
    session : aiohttp.ClientSession
        Session that sends the requests.
    url : str
        The URL, percent-encoded.
    method : str
        GET or HEAD.
    max_redirects : int
        Largest number of redirects.
    **options
        Arguments of ``session.request``, such as headers.

    Yields
    ------
    aiohttp.ClientResponse
        The first response that is not a redirect, whatever its status.

    Raises
    ------
    ArchiveError
        If a redirect is not followed, or there are too many.
    ConfigError
        If the proxy cannot be used.
    """
    try:
        archive = current = URL(url, encoded=True)
    except ValueError as error:
        raise ArchiveError(f"not a URL: {error}", blame="access") from error
    for _ in range(max_redirects + 1):
        proxy = await asyncio.to_thread(find_download_proxy, str(current))
        async with session.request(
            method, current, allow_redirects=False, proxy=proxy, **options
        ) as response:
            if response.status not in REDIRECT_STATUS:
                yield response
                return
            location = response.headers.get("Location", "")
        current = await resolve_redirect(archive, current, location)
    raise ArchiveError(f"redirected more than {max_redirects} times")


async def resolve_redirect(archive: URL, current: URL, location: str) -> URL:
    """Return the target of a redirect.

    Parameters
    ----------
    archive, current : URL
        What the first request asked for, and the one that was redirected.
    location : str
        The Location header.

    Returns
    -------
    URL
        Where the next request goes.

    Raises
    ------
    ArchiveError
        If the redirect must not be followed.
    """
    try:
        reference = URL(location, encoded=True)
        target = current.join(reference)
        if not location or (reference.scheme in ("http", "https") and not reference.host):
            raise ValueError("it has no host")
        # User name and password are removed, because the message is saved in the ledger.
        shown = target.with_user(None) if target.host else f"{target.scheme}:{target.path}"
        if target.scheme not in ("http", "https"):
            raise ArchiveError(f"redirected to {shown}, which is not followed")
        leads_inwards = target.host != archive.host and await _is_private(target)
    except ValueError as error:
        raise ArchiveError(f"redirected to {location!r}, which is not a URL: {error}") from error
    if leads_inwards and not await _is_private(archive):
        raise ArchiveError(f"redirected to {shown}, a private address, which is not followed")
    return target


async def _is_private(url: URL) -> bool:
    """Return whether any address of a host is not public."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(url.host, url.port)
    except OSError:
        # The name does not resolve here. Behind a proxy only the proxy needs to resolve it.
        return False
    addresses = (str(socket_address[0]) for *_, socket_address in found)
    # A link-local IPv6 address ends in a percent sign and the name of an interface.
    return not all(_is_global(ip_address(a.partition("%")[0])) for a in addresses)


def _is_global(address: IPv4Address | IPv6Address) -> bool:
    """Return whether an address is public, judged by the IPv4 address it leads to, if any."""
    if isinstance(address, IPv6Address):
        if any(address in network for network in _NETWORKS_WITH_IPV4):
            return IPv4Address(int(address) & 0xFFFFFFFF).is_global
        if address.sixtofour is not None:
            return address.sixtofour.is_global
    return address.is_global and address not in _LOCAL_NAT64
