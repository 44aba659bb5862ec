"""The versions of files in the archive, asked for without their content."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Sequence

import aiohttp
from fsspec.asyn import get_loop, sync

from spxdask.archive.http import ask_http_version
from spxdask.archive.mirror import ask_mirror_version
from spxdask.archive.received import FileVersion
from spxdask.archive.retry import RetryPolicy
from spxdask.archive.s3 import ask_bucket_version
from spxdask.archive.transfer import classify_failure
from spxdask.errors import ArchiveError, FrameError, StoreError

# Servers refuse more than a few requests at once.
MAX_CONCURRENT_REQUESTS = 4

_QUESTIONS: dict[str, Callable[[str, float], Awaitable[FileVersion]]] = {
    "http": ask_http_version,
    "https": ask_http_version,
    "s3": ask_bucket_version,
    "file": ask_mirror_version,
}


def ask_versions(
    urls: Sequence[str],
    retry: RetryPolicy,
    stall_timeout_s: float,
    max_concurrent_requests: int = MAX_CONCURRENT_REQUESTS,
    endpoint: str | None = None,
) -> list[FileVersion | str]:
    """Ask the archive which version of each of some files it has.

    Parameters
    ----------
    urls : sequence of str
        Where the files are, with the scheme http, https, s3 or file.
    retry : RetryPolicy
        Number of attempts for each and the delays between them.
    stall_timeout_s : float
        Longest time without a byte, in seconds.
    max_concurrent_requests : int
        Requests at once, at most.
    endpoint : str, optional
        URL of the server of a bucket; see `spxdask.archive.s3.open_bucket`.

    Returns
    -------
    list of FileVersion or str
        For each file its version, or the reason why it is not known.
    """
    questions = _QUESTIONS | {"s3": functools.partial(ask_bucket_version, endpoint=endpoint)}
    free = asyncio.Semaphore(max_concurrent_requests)

    async def ask(url: str) -> FileVersion | str:
        question = questions[url.partition(":")[0]]
        async with free:
            return await _ask(question, url, retry, stall_timeout_s)

    async def ask_all() -> list[FileVersion | str]:
        return await asyncio.gather(*map(ask, urls))

    return sync(get_loop(), ask_all)


async def _ask(
    question: Callable[[str, float], Awaitable[FileVersion]],
    url: str,
    retry: RetryPolicy,
    stall_timeout_s: float,
) -> FileVersion | str:
    """Return the version of one file, or the reason why it is not known."""
    attempts = 0
    while True:
        attempts += 1
        try:
            return await question(url, stall_timeout_s)
        except (ArchiveError, FrameError, StoreError, aiohttp.ClientError, OSError) as error:
            failure = classify_failure(error, 0, stall_timeout_s, url)
        if not failure.is_transient or attempts > retry.max_retries:
            return failure.reason
        await asyncio.sleep(retry.delay(attempts, failure.retry_after))
