"""Transfers from a file server by HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import fsspec

from spxdask.archive.network import get_ssl_context
from spxdask.archive.received import FileVersion, ReceivedFile
from spxdask.archive.redirects import get_following_redirects
from spxdask.errors import ArchiveError, FrameError


async def receive_from_http(url: str, received: ReceivedFile, stall_timeout_s: float) -> None:
    """Receive a file, or the rest of it where a transfer was interrupted.

    Bytes of two versions are never joined: with If-Range, the server sends the rest only
    if the file is still of the version that the ETag names, and the whole file otherwise.

    Parameters
    ----------
    url : str
        Where the file is.
    received : ReceivedFile
        What has been received before; the rest is appended.
    stall_timeout_s : float
        Longest time without a byte, in seconds.

    Raises
    ------
    ArchiveError, FrameError, aiohttp.ClientError, OSError
        If the file is not received; see `spxdask.archive.transfer.classify_failure`.
    """
    headers = {"Accept-Encoding": "identity"}
    if received.can_resume:
        headers |= {"Range": f"bytes={received.size}-", "If-Range": received.etag or ""}
    async with _open_request(url, stall_timeout_s, headers=headers) as response:
        response.raise_for_status()
        if response.content_type == "text/html":
            raise ArchiveError("the server sent an HTML page instead of the file", blame="archive")
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        is_encoded = encoding not in ("", "identity")
        etag = response.headers.get("ETag")
        received.version = received.version.of_headers(response.headers)
        if response.status == 206:
            if (
                not received.can_resume
                or is_encoded
                or etag != received.etag
                or not _starts_at(response.headers.get("Content-Range"), received.size)
            ):
                raise FrameError("the server sent a range that was not requested")
        else:
            received.discard()
        # The announced length is that of the encoded bytes.
        if response.content_length is not None and not is_encoded:
            received.check_size(received.size + response.content_length)
        # A weak ETag does not promise that the bytes are the same, and a range of encoded bytes
        # cannot be appended to decoded ones.
        has_version = etag and not etag.startswith("W/") and not is_encoded
        received.etag = etag if has_version else None
        start = received.size
        try:
            async for chunk in response.content.iter_any():
                received.append(chunk)
        finally:
            # A server that sends nothing of the range might do so for ever.
            if received.size == start:
                received.discard()


def _starts_at(content_range: str | None, start: int) -> bool:
    """Return whether a Content-Range header names a range that starts at a byte."""
    return (content_range or "").startswith(f"bytes {start}-")


async def ask_http_version(url: str, stall_timeout_s: float) -> FileVersion:
    """Ask a file server for the version of a file, by a HEAD request.

    Parameters
    ----------
    url : str
        Where the file is.
    stall_timeout_s : float
        Longest time without a byte, in seconds.

    Returns
    -------
    FileVersion
        Empty where the server states none.

    Raises
    ------
    ArchiveError, aiohttp.ClientError, OSError
        If it does not answer; see `spxdask.archive.transfer.classify_failure`.
    """
    headers = {"Accept-Encoding": "identity"}
    async with _open_request(url, stall_timeout_s, method="HEAD", headers=headers) as response:
        response.raise_for_status()
        return FileVersion.of_headers(response.headers)


@asynccontextmanager
async def _open_request(
    url: str, stall_timeout_s: float, **options: Any
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Send a request through the proxy and with the certificates that queries use, too."""
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=stall_timeout_s, sock_read=stall_timeout_s
    )
    # Without trust_env, with which aiohttp would send the logins of ~/.netrc. Proxies are found
    # by the rules that queries follow, which are not those of aiohttp.
    filesystem = fsspec.filesystem(url.partition(":")[0], client_kwargs={"trust_env": False})
    # The file of `open_async` would ignore headers and timeout (fsspec 2026.9).
    session = await filesystem.set_session()
    async with get_following_redirects(
        session,
        filesystem.encode_url(url),
        timeout=timeout,
        ssl=await asyncio.to_thread(get_ssl_context),
        **options,
    ) as response:
        yield response
