"""One file from the archive into memory: the attempts, and which failures are worth another."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar
from urllib.parse import urlsplit

import aiohttp
from fsspec.asyn import get_loop, sync

from spxdask.archive.http import receive_from_http
from spxdask.archive.mirror import receive_from_mirror
from spxdask.archive.network import explain_certificate_error, find_proxy
from spxdask.archive.received import ReceivedFile
from spxdask.archive.retry import TRANSIENT_STATUS, RetryPolicy
from spxdask.archive.s3 import receive_from_bucket
from spxdask.archive.throttle import Throttle
from spxdask.archive.urls import strip_credentials
from spxdask.errors import ArchiveError, FrameError, StoreError

logger = logging.getLogger(__name__)
# A thousand frames meet the same obstacle.
logger.addFilter(Throttle())

Content = TypeVar("Content")
Blame = Literal["frame", "archive", "access"]
# Appends to what was received before; takes the URL and the stall timeout in seconds.
Transfer = Callable[[str, ReceivedFile, float], Awaitable[None]]

_TRANSFERS: dict[str, Transfer] = {
    "http": receive_from_http,
    "https": receive_from_http,
    "s3": receive_from_bucket,
    "file": receive_from_mirror,
}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why an attempt failed, and what follows from it.

    Attributes
    ----------
    reason : str
        What is wrong, in words.
    is_transient : bool
        Whether another attempt may succeed.
    blame : {"frame", "archive", "access"}
        What it lies in; see `ArchiveError`.
    is_content_wrong : bool
        Whether the bytes received so far are of no use, so that the next attempt starts
        from the beginning of the file.
    retry_after : str or None
        The server's Retry-After header.
    """

    reason: str
    is_transient: bool = True
    blame: Blame = "archive"
    is_content_wrong: bool = False
    retry_after: str | None = None


def fetch_file(
    url: str,
    received: ReceivedFile,
    check: Callable[[ReceivedFile], Content],
    *,
    retry: RetryPolicy,
    stall_timeout_s: float,
    endpoint: str | None = None,
) -> Content:
    """Transfer a file until it is there and passes a check.

    Parameters
    ----------
    url : str
        Where the file is, with the scheme http, https, s3 or file.
    received : ReceivedFile
        Takes the file; also counts the attempts, those of a failure included.
    check : callable
        Called in a thread with the received file; returns what it makes of it. It raises
        FrameError if the content is wrong, and the transfer starts over.
    retry : RetryPolicy
        Number of attempts and the delays between them.
    stall_timeout_s : float
        Longest time without a byte, in seconds.
    endpoint : str, optional
        URL of the S3 server, where that is not the usual one.

    Returns
    -------
    object
        What `check` returned.

    Raises
    ------
    ArchiveError
        If the file could not be had; its `blame` tells what that lies in.
    ConfigError
        If the proxy that the environment names cannot be used.
    """
    # On the thread of fsspec's event loop. A coroutine on the loop of a Dask worker would
    # delay its heartbeats, and would occupy one of its threads all the same.
    return sync(get_loop(), _fetch_file, url, received, check, retry, stall_timeout_s, endpoint)


async def _fetch_file(
    url: str,
    received: ReceivedFile,
    check: Callable[[ReceivedFile], Content],
    retry: RetryPolicy,
    stall_timeout_s: float,
    endpoint: str | None,
) -> Content:
    """Make attempts until one succeeds, fails for good, or was the last."""
    transfer = _TRANSFERS[url.partition(":")[0]]
    if transfer is receive_from_bucket:
        transfer = functools.partial(receive_from_bucket, endpoint=endpoint)
    shown_url = strip_credentials(url)
    while True:
        received.attempts += 1
        try:
            await transfer(url, received, stall_timeout_s)
            return await asyncio.to_thread(check, received)
        except (ArchiveError, FrameError, StoreError, aiohttp.ClientError, OSError) as error:
            failure = classify_failure(error, received.size, stall_timeout_s, url)
            if not failure.is_transient:
                raise ArchiveError(failure.reason, path=shown_url, blame=failure.blame) from error
            if received.attempts > retry.max_retries:
                raise ArchiveError(
                    failure.reason,
                    path=shown_url,
                    attempts=received.attempts,
                    blame=failure.blame,
                ) from error
        if failure.is_content_wrong:
            received.discard()
        delay_s = retry.delay(received.attempts, failure.retry_after)
        reason = strip_credentials(failure.reason)
        logger.info(
            "%s: %s; trying again in %.1f s",
            *(shown_url, reason, delay_s),
            extra={"kind": f"{urlsplit(shown_url).netloc} {re.sub(r'[0-9]{4,}', '', reason)}"},
        )
        await asyncio.sleep(delay_s)


def classify_failure(
    error: Exception, received_bytes: int, stall_timeout_s: float, url: str
) -> Failure:
    """Say why an attempt failed, and whether another may succeed.

    Parameters
    ----------
    error : Exception
        What a transfer, or the check of its file, raised.
    received_bytes : int
        Number of bytes received so far.
    stall_timeout_s : float
        Longest time without a byte that was allowed, in seconds.
    url : str
        Where the file is.

    Returns
    -------
    Failure
        The reason and what follows from it.
    """
    if isinstance(error, ArchiveError):
        is_transient = error.blame == "archive"
        return Failure(
            reason=error.reason,
            is_transient=is_transient,
            blame=error.blame,
            is_content_wrong=is_transient,
        )
    certificate = explain_certificate_error(url, error)
    if certificate is not None:
        return Failure(reason=certificate, is_transient=False, blame="access")
    if isinstance(error, aiohttp.ClientResponseError):
        return _classify_status(error, url)
    # Before ClientError, as a timeout of aiohttp is both.
    if isinstance(error, TimeoutError):
        return Failure(reason=f"no data received for {stall_timeout_s:g} s")
    if isinstance(error, aiohttp.ClientPayloadError):
        return Failure(reason=f"the transfer broke off after {received_bytes} bytes")
    if isinstance(error, aiohttp.InvalidURL):
        return Failure(reason=f"not a URL: {error}", is_transient=False, blame="access")
    if isinstance(error, aiohttp.ClientConnectorError):
        # Its text has the address of an object in memory.
        number = error.os_error.errno or 0
        cause = os.strerror(number) if number > 0 else error.os_error.strerror or error.os_error
        if isinstance(error, aiohttp.ClientProxyConnectionError):
            proxy = strip_credentials(find_proxy(url) or "")
            return Failure(reason=f"the proxy {proxy} cannot be reached: {cause}")
        return Failure(reason=f"Cannot connect to host {error.host}:{error.port}: {cause}")
    if isinstance(error, aiohttp.ClientError | ConnectionError):
        return Failure(reason=f"{type(error).__name__}: {error}")
    if isinstance(error, FileNotFoundError | PermissionError):
        reason = error.strerror or str(error)
        return Failure(reason=reason, is_transient=False, blame="frame")
    if isinstance(error, FrameError):
        return Failure(reason=str(error), blame="frame", is_content_wrong=True)
    return Failure(reason=str(error))


def _classify_status(error: aiohttp.ClientResponseError, url: str) -> Failure:
    """Say what follows from an HTTP status, or from an answer that is not HTTP."""
    reason = f"HTTP {error.status} {error.message}"
    is_of_proxy = isinstance(error, aiohttp.ClientHttpProxyError) or error.status == 407
    if is_of_proxy:
        proxy = strip_credentials(find_proxy(url) or "")
        reason = f"the proxy {proxy} answered {reason}"
        if error.status == 407:
            reason += ": it needs a valid login, as in http://user:password@host:port"
    # 416: the server has nothing after the bytes received so far.
    is_range_wrong = error.status == 416
    is_transient = is_range_wrong or error.status in TRANSIENT_STATUS
    headers = error.headers
    return Failure(
        reason=reason,
        is_transient=is_transient,
        blame="archive" if is_transient else "access" if is_of_proxy else "frame",
        is_content_wrong=is_range_wrong,
        retry_after=headers.get("Retry-After") if isinstance(headers, Mapping) else None,
    )
