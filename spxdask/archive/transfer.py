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
from spxdask.archive.limiter import REQUESTS, RequestLimiter
from spxdask.archive.link import LINK, Link
from spxdask.archive.mirror import receive_from_mirror
from spxdask.archive.network import explain_certificate_error, find_proxy
from spxdask.archive.received import ReceivedFile, Reception
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
# Takes the URL, what takes the bytes, and the stall timeout in seconds.
Transfer = Callable[[str, Reception, float], Awaitable[None]]

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
    limiter: RequestLimiter = REQUESTS,
    link: Link = LINK,
) -> Content:
    """Transfer a file until it is there and passes a check.

    Parameters
    ----------
    url : str
        Where the file is, with the scheme http, https, s3 or file.
    received : ReceivedFile
        Takes the file; also counts the attempts, those of a failure included. If it is complete,
        it is checked first.
    check : callable
        Called in a thread with the received file; returns what it makes of it. It raises
        FrameError if the content is wrong, and the transfer starts over.
    retry : RetryPolicy
        Number of attempts and the delays between them.
    stall_timeout_s : float
        Longest time without a byte, in seconds.
    endpoint : str, optional
        URL of the S3 server, where that is not the usual one.
    limiter : RequestLimiter
        Bounds the requests at once of this process.
    link : Link
        Learns how fast the archive is.

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
    return sync(
        get_loop(),
        _fetch_file,
        *(received, check, retry),
        Requester(url, stall_timeout_s, endpoint, limiter, link),
    )


class Requester:
    """Makes the requests for one file.

    Parameters
    ----------
    url : str
        Where the file is.
    stall_timeout_s : float
        Longest time without a byte, in seconds.
    endpoint : str or None
        URL of the S3 server, where that is not the usual one.
    limiter : RequestLimiter
        Bounds the requests at once of this process.
    link : Link
        Learns how fast the archive is.
    """

    def __init__(
        self,
        url: str,
        stall_timeout_s: float,
        endpoint: str | None,
        limiter: RequestLimiter,
        link: Link,
    ) -> None:
        self.url, self.stall_timeout_s = url, stall_timeout_s
        self.shown_url = strip_credentials(url)
        self._limiter, self._link = limiter, link
        self._transfer = _TRANSFERS[url.partition(":")[0]]
        if self._transfer is receive_from_bucket:
            self._transfer = functools.partial(receive_from_bucket, endpoint=endpoint)

    async def request(self, received: Reception) -> None:
        """Make one request, as soon as there may be one more.

        Parameters
        ----------
        received : Reception
            Names the bytes, and takes them.

        Raises
        ------
        ArchiveError, FrameError, StoreError, aiohttp.ClientError, OSError
            If they do not come; see `classify_failure`.
        """
        async with self._limiter.take_turn():
            received.n_requests += 1
            received.timing = self._link.start()
            await self._transfer(self.url, received, self.stall_timeout_s)

    def plan_retry(
        self, error: Exception, n_bytes: int, attempts: int, retry: RetryPolicy
    ) -> tuple[Failure, float]:
        """Return what follows from a failure after which there is another attempt.

        Parameters
        ----------
        error : Exception
            What the attempt raised.
        n_bytes : int
            Number of bytes that it has brought.
        attempts : int
            Number of attempts so far.
        retry : RetryPolicy
            Number of attempts and the delays between them.

        Returns
        -------
        failure : Failure
            What was wrong.
        delay_s : float
            How long to wait, in seconds.

        Raises
        ------
        ArchiveError
            If there is none.
        """
        failure = classify_failure(error, n_bytes, self.stall_timeout_s, self.url)
        if not failure.is_transient:
            raise ArchiveError(failure.reason, path=self.shown_url, blame=failure.blame) from error
        if attempts > retry.max_retries:
            raise ArchiveError(
                failure.reason, path=self.shown_url, attempts=attempts, blame=failure.blame
            ) from error
        return failure, retry.delay(attempts, failure.retry_after)

    async def wait(self, failure: Failure, delay_s: float) -> None:
        """Wait before the next attempt, and say so.

        Parameters
        ----------
        failure : Failure
            What was wrong with the last.
        delay_s : float
            How long, in seconds.
        """
        reason = strip_credentials(failure.reason)
        logger.info(
            "%s: %s; trying again in %.1f s",
            *(self.shown_url, reason, delay_s),
            extra={"kind": f"{urlsplit(self.shown_url).netloc} {re.sub(r'[0-9]{4,}', '', reason)}"},
        )
        with self._limiter.announce():
            await asyncio.sleep(delay_s)


# What a request may raise that is no mistake in the program.
TRANSFER_ERRORS = (ArchiveError, FrameError, StoreError, aiohttp.ClientError, OSError)


async def _fetch_file(
    received: ReceivedFile,
    check: Callable[[ReceivedFile], Content],
    retry: RetryPolicy,
    requester: Requester,
) -> Content:
    """Make attempts until one succeeds, fails for good, or was the last."""
    is_there = received.is_complete
    while True:
        received.attempts += not is_there
        try:
            if not is_there:
                await requester.request(received)
            is_there = False
            return await asyncio.to_thread(check, received)
        except TRANSFER_ERRORS as error:
            failure, delay_s = requester.plan_retry(error, received.size, received.attempts, retry)
        if failure.is_content_wrong:
            received.discard()
        await requester.wait(failure, delay_s)


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
