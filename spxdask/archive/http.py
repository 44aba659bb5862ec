"""Transfers from a file server by HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import fsspec

from spxdask.archive.network import get_ssl_context
from spxdask.archive.received import (
    WRONG_RANGE,
    Answer,
    FileVersion,
    Reception,
    read_content_range,
)
from spxdask.archive.redirects import get_following_redirects
from spxdask.errors import ArchiveError, FrameError


async def receive_from_http(url: str, received: Reception, stall_timeout_s: float) -> None:
    """Receive a file, or a range of it, such as the rest where a transfer was interrupted.

    Bytes of two versions are never joined: with If-Range, the server sends the range only
    if the file is still of the version that the header names, and the whole file otherwise.

    Parameters
    ----------
    url : str
        Where the file is.
    received : Reception
        Names the bytes, and takes them.
    stall_timeout_s : float
        Longest time without a byte, in seconds.

    Raises
    ------
    ArchiveError, FrameError, aiohttp.ClientError, OSError
        If the file is not received; see `spxdask.archive.transfer.classify_failure`.
    """
    headers = {"Accept-Encoding": "identity"}
    if received.span is not None:
        start, stop = received.span
        headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        condition = received.condition.strong_etag or received.condition.modified
        if condition:
            headers["If-Range"] = condition
    async with _open_request(url, stall_timeout_s, headers=headers) as response:
        response.raise_for_status()
        if response.content_type == "text/html":
            raise ArchiveError("the server sent an HTML page instead of the file", blame="archive")
        taking = received.begin(_read_answer(response))
        try:
            async for chunk in response.content.iter_any():
                taking.append(chunk)
        finally:
            taking.end()


def _read_answer(response: aiohttp.ClientResponse) -> Answer:
    """Return what the headers of a response say of its body."""
    version = FileVersion.of_headers(response.headers)
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    is_encoded = encoding not in ("", "identity")
    # The announced length is that of the encoded bytes.
    length = None if is_encoded else response.content_length
    if response.status != 206:
        return Answer(version=version, total=length, is_encoded=is_encoded)
    span, total = read_content_range(response.headers.get("Content-Range"))
    if length not in (None, span[1] - span[0]):
        raise FrameError(WRONG_RANGE)
    return Answer(version=version, span=span, total=total, is_encoded=is_encoded)


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
