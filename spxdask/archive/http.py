"""Transfers from a file server by HTTP."""

from __future__ import annotations

import aiohttp
import fsspec

from spxdask.archive.received import FileVersion, ReceivedFile
from spxdask.archive.redirects import get_following_redirects
from spxdask.errors import FrameError


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
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=stall_timeout_s, sock_read=stall_timeout_s
    )
    # trust_env: compute nodes may need the proxies of the environment, which TAP uses, too.
    filesystem = fsspec.filesystem(url.partition(":")[0], client_kwargs={"trust_env": True})
    # The file of `open_async` would ignore headers and timeout (fsspec 2026.9).
    session = await filesystem.set_session()
    async with get_following_redirects(
        session, filesystem.encode_url(url), headers=headers, timeout=timeout
    ) as response:
        response.raise_for_status()
        if response.content_type == "text/html":
            raise FrameError("the server sent an HTML page instead of the file")
        etag = response.headers.get("ETag")
        received.version = received.version.of_headers(response.headers)
        if response.status == 206:
            if (
                not received.can_resume
                or etag != received.etag
                or not _starts_at(response.headers.get("Content-Range"), received.size)
            ):
                raise FrameError("the server sent a range that was not requested")
        else:
            received.discard()
        if response.content_length is not None:
            received.check_size(received.size + response.content_length)
        # A weak ETag does not promise that the bytes are the same.
        received.etag = etag if etag and not etag.startswith("W/") else None
        async for chunk in response.content.iter_any():
            received.append(chunk)


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
    timeout = aiohttp.ClientTimeout(sock_connect=stall_timeout_s, sock_read=stall_timeout_s)
    filesystem = fsspec.filesystem(url.partition(":")[0], client_kwargs={"trust_env": True})
    session = await filesystem.set_session()
    async with get_following_redirects(
        session,
        filesystem.encode_url(url),
        method="HEAD",
        headers={"Accept-Encoding": "identity"},
        timeout=timeout,
    ) as response:
        response.raise_for_status()
        return FileVersion.of_headers(response.headers)
