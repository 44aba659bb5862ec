"""Pieces of one file from the archive, all of one version of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit

from fsspec.asyn import get_loop, sync

from spxdask.archive.limiter import REQUESTS, RequestLimiter
from spxdask.archive.link import LARGEST_GAP_SHARE, LINK, Link
from spxdask.archive.received import (
    WRONG_RANGE,
    Answer,
    FileVersion,
    ReceivedFile,
    Reception,
    check_size,
)
from spxdask.archive.retry import TRANSIENT_STATUS, RetryPolicy
from spxdask.archive.s3 import find_status
from spxdask.archive.transfer import TRANSFER_ERRORS, Requester
from spxdask.errors import ArchiveError, FileChangedError, FrameError, RangesRefusedError
from spxdask.science.level2.spans import Spans, merge_cheaply

CHANGED = "the file changed during the transfer"
IGNORED = "the server sends whole files instead of the parts of them that are asked for"
# Answers to a request for a range that say nothing of ranges in general.
_STATUS_OF_FILE = TRANSIENT_STATUS | {401, 404, 407, 410, 416}


@dataclass
class ReceivedPieces:
    """What has been received of a file of which only pieces are wanted.

    Attributes
    ----------
    memory : memoryview
        Room for the whole file, or for the longest that is acceptable. Each byte has its place.
    held : Spans
        Which bytes are there. Another object replaces it when they are dropped.
    expected_size : int or None
        Length of the whole file that the archive lists, None if it is not known.
    total : int or None
        Length of the whole file that the server states, None before the first answer.
    version : FileVersion
        What the server said of the file in the first answer; all pieces are of this version.
    attempts : int
        One more than the number of failures after which something was tried again, 0 before the
        first request.
    n_requests, n_bytes : int
        Number of requests, and of bytes of pieces that they brought, those that were dropped
        included.
    whole : ReceivedFile or None
        The file as far as it came, where a server sent all of it instead of a piece. Its bytes are
        counted there.
    """

    memory: memoryview
    held: Spans = field(default_factory=Spans)
    expected_size: int | None = None
    total: int | None = None
    version: FileVersion = FileVersion()
    attempts: int = 0
    n_requests: int = 0
    n_bytes: int = 0
    whole: ReceivedFile | None = None
    # Pieces of a mirror are received by several threads.
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def discard(self) -> None:
        """Drop all pieces, so that those of another version may follow."""
        self.held = Spans()
        self.total = None
        self.version = FileVersion()

    def take_whole(self) -> ReceivedFile:
        """Return what `spxdask.archive.transfer.fetch_file` goes on with, in the same memory.

        The pieces are dropped.

        Returns
        -------
        ReceivedFile
            With the file, or its beginning, if a server has sent that, and with the attempts.
        """
        self.discard()
        if self.whole is None:
            self.whole = ReceivedFile(self.memory, self.expected_size)
        self.whole.attempts = self.attempts
        return self.whole


class RangeRefusals:
    """The servers that were found not to serve ranges; safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reasons: dict[str, str] = {}
        self._run = ""

    def note(self, url: str, reason: str) -> None:
        """Remember a server.

        Parameters
        ----------
        url : str
            Of a file there.
        reason : str
            What it does instead.
        """
        with self._lock:
            self._reasons[urlsplit(url).netloc] = reason

    def find(self, url: str) -> str | None:
        """Return what a server does instead of serving ranges.

        Parameters
        ----------
        url : str
            Of a file there.

        Returns
        -------
        str or None
            None if nothing is known against it.
        """
        with self._lock:
            return self._reasons.get(urlsplit(url).netloc)

    def begin(self, run: str) -> None:
        """Forget all servers if this is another run than the last one.

        Parameters
        ----------
        run : str
            Any name of the run.
        """
        with self._lock:
            if run != self._run:
                self._reasons.clear()
            self._run = run


# Found by this process.
REFUSALS = RangeRefusals()


def fetch_pieces(
    url: str,
    received: ReceivedPieces,
    spans: Iterable[tuple[int, int]],
    *,
    retry: RetryPolicy,
    stall_timeout_s: float,
    endpoint: str | None = None,
    limiter: RequestLimiter = REQUESTS,
    link: Link = LINK,
    refusals: RangeRefusals = REFUSALS,
) -> None:
    """Transfer what is missing of some spans of a file, in requests at the same time.

    Spans between which there are few bytes are asked for together with these, where that costs
    less than one more request, and adds little to the bytes of all. What lies past the end of the
    file is left out; it is an error only if a whole span does.

    Parameters
    ----------
    url : str
        Where the file is, with the scheme http, https, s3 or file.
    received : ReceivedPieces
        Takes the pieces, and counts attempts, requests and bytes over all calls.
    spans : iterable of (int, int)
        First byte and the one after the last, in any order.
    retry : RetryPolicy
        Number of attempts, over all calls, and the delays between them.
    stall_timeout_s : float
        Longest time without a byte, in seconds.
    endpoint : str, optional
        URL of the S3 server, where that is not the usual one.
    limiter : RequestLimiter
        Bounds the requests at once of this process.
    link : Link
        Knows what a request and a byte cost, and learns it.
    refusals : RangeRefusals
        Remembers the servers that do not serve ranges.

    Raises
    ------
    FileChangedError
        If the archive has replaced the file since the first piece came. All pieces are dropped, and
        whoever asks for them starts over: the attempt is counted, and the delay after it is over.
    RangesRefusedError
        If the server does not serve ranges, or not rightly. Its files are to be fetched whole,
        this one with `ReceivedPieces.take_whole`, which has what the server sent in its place.
    ArchiveError
        If the pieces could not be had; its `blame` tells what that lies in.
    ConfigError
        If the proxy that the environment names cannot be used.
    """
    requester = Requester(url, stall_timeout_s, endpoint, limiter, link)
    sync(get_loop(), _Fetch(received, requester, retry, refusals).run, list(spans), link)


class _Piece(Reception):
    """A span of the file, or all of it, where `wanted` is None."""

    def __init__(
        self,
        received: ReceivedPieces,
        wanted: tuple[int, int] | None,
        when_whole: Callable[[], None],
    ) -> None:
        self._received, self._when_whole = received, when_whole
        self._is_whole = wanted is None
        self.start, self._stop = wanted or (0, 0)
        self.position = self.start
        # The end of what the server says that it sends.
        self._answered_stop = self.start
        self.whole: ReceivedFile | None = None

    @property
    def span(self) -> tuple[int, int | None] | None:
        return None if self._is_whole else (self.position, self._stop)

    @property
    def condition(self) -> FileVersion:
        return self._received.version

    @property
    def room(self) -> memoryview:
        return self._received.memory[self.position : self._answered_stop]

    def _accept(self, answer: Answer) -> Reception:
        with self._received.lock:
            if self._is_whole:
                return self._take_whole(answer)
            self._check_version(answer.version)
            if answer.span is not None:
                span = answer.span
            elif self.start == 0 and answer.total is not None and answer.total <= self._stop:
                # All of a short file is what was asked for.
                span = (0, answer.total)
            else:
                return self._take_whole(answer)
            if answer.is_encoded or span[0] != self.position or span[1] > self._stop:
                raise FrameError(WRONG_RANGE)
            self._check_total(answer.total)
            if self._received.version == FileVersion():
                is_all = self._received.total == span[1] - span[0]
                if not (is_all or answer.version.strong_etag or answer.version.modified):
                    raise _VersionlessError("the server states no version of the file")
                self._received.version = answer.version
            self._answered_stop = span[1]
            return self

    def _take_whole(self, answer: Answer) -> Reception:
        """Let the whole file, which the server is about to send, take the place of all pieces."""
        if answer.span is not None:
            raise FrameError(WRONG_RANGE)
        whole = ReceivedFile(self._received.memory, self._received.expected_size)
        whole.begin(answer)
        whole.timing = self.timing
        self.whole = self._received.whole = whole
        self._received.take_whole()
        self._when_whole()
        return whole

    def _check_version(self, version: FileVersion) -> None:
        """Raise an error if an answer is of another version than the first one."""
        first = self._received.version
        if first == FileVersion():
            return
        is_same = version.etag == first.etag
        if not first.strong_etag:
            # A server need not repeat the time that it was asked to compare with.
            is_same = is_same and version.modified in (None, first.modified)
        if not is_same:
            raise FileChangedError(CHANGED)

    def _check_total(self, total: int | None) -> None:
        """Take note of the length of the whole file."""
        if total is None:
            return
        check_size(total, self._received.expected_size, self._received.memory)
        if self._received.total not in (None, total):
            raise FileChangedError(CHANGED)
        self._received.total = total

    def check_end(self) -> None:
        """Raise an error unless all has come that there is."""
        total = self._received.total
        wanted = self._stop - self.start
        if self.position < (self._stop if total is None else min(self._stop, total)):
            n_bytes = self.position - self.start
            raise FrameError(f"the server sent {n_bytes} of {wanted} bytes that were requested")

    def _complain_of_length(self) -> str:
        return "the server sent more bytes than were requested"

    def _move(self, count: int) -> None:
        self.position += count


class _VersionlessError(FrameError):
    """A server does not say which version of a file it sends a piece of."""


class _Fault(NamedTuple):
    """What was wrong with a request, and how many bytes it has brought."""

    error: Exception
    n_bytes: int


class _Fetch:
    """One call of `fetch_pieces`."""

    def __init__(
        self,
        received: ReceivedPieces,
        requester: Requester,
        retry: RetryPolicy,
        refusals: RangeRefusals,
    ) -> None:
        self._received, self._requester = received, requester
        self._retry, self._refusals = retry, refusals
        self._tasks: list[asyncio.Task[_Fault | None]] = []
        self._asking_for_whole = asyncio.Lock()
        self._whole_fault: _Fault | None = None

    async def run(self, spans: list[tuple[int, int]], link: Link) -> None:
        """Make requests until nothing is missing."""
        received, requester = self._received, self._requester
        refusal = self._refusals.find(requester.url)
        if refusal is not None:
            raise RangesRefusedError(refusal, path=requester.shown_url)
        received.attempts = max(received.attempts, 1)
        while missing := self._find_missing(spans):
            faults = await self._make_requests(
                merge_cheaply(missing, link.cheap_gap_bytes, LARGEST_GAP_SHARE)
            )
            if not faults:
                continue
            plans = [
                requester.plan_retry(fault.error, fault.n_bytes, received.attempts, self._retry)
                for fault in faults
            ]
            has_changed = any(isinstance(fault.error, FileChangedError) for fault in faults)
            if has_changed:
                received.discard()
            received.attempts += 1
            # The longest delay that any of the answers asks for.
            await requester.wait(*max(plans, key=lambda plan: plan[1]))
            if has_changed:
                raise FileChangedError(CHANGED, path=requester.shown_url)

    def _find_missing(self, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return what is not there of some spans, up to the end of the file."""
        received = self._received
        end = len(received.memory) if received.total is None else received.total
        for start, stop in spans:
            if end <= start < stop:
                reason = f"the file has {end} bytes, and is needed from byte {start} on"
                raise ArchiveError(reason, path=self._requester.shown_url)
        return received.held.find_missing((start, min(stop, end)) for start, stop in spans)

    async def _make_requests(self, spans: list[tuple[int, int]]) -> list[_Fault]:
        """Ask for some spans at the same time, and return what was wrong with the answers."""
        self._whole_fault = None
        self._tasks = [asyncio.ensure_future(self._fetch_span(span)) for span in spans]
        try:
            # Until the first of them raises what ends all of them.
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in self._tasks:
                task.cancel()
            results = await asyncio.gather(*self._tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, FileChangedError):
                raise result
        changes = [_Fault(result, 0) for result in results if isinstance(result, FileChangedError)]
        return changes[:1] or [result for result in results if isinstance(result, _Fault)]

    async def _fetch_span(self, span: tuple[int, int]) -> _Fault | None:
        """Ask for a span, and for the whole file if the server does not serve spans of it."""
        received = self._received
        piece = _Piece(received, span, self._cancel_others)
        try:
            await self._ask(piece)
            piece.check_end()
            return None
        except TRANSFER_ERRORS as error:
            fault = _Fault(error, piece.position - piece.start)
            refusal = self._explain_refusal(error)
            if refusal is None:
                if isinstance(error, FileChangedError):
                    raise
                return fault
        # Once for all spans; if it is served, that ends the others.
        async with self._asking_for_whole:
            if self._whole_fault is None:
                try:
                    await self._ask(_Piece(received, None, self._cancel_others), refusal)
                except TRANSFER_ERRORS as error:
                    self._whole_fault = _Fault(error, 0)
            return self._whole_fault

    async def _ask(self, piece: _Piece, refusal: str = IGNORED) -> None:
        """Make a request, and raise an error if all of the file came for it."""
        received, held = self._received, self._received.held
        try:
            await self._requester.request(piece)
            if piece.whole is not None:
                piece.whole.is_complete = True
        except TRANSFER_ERRORS:
            # What has come of the whole file is gone on with.
            if piece.whole is None:
                raise
        finally:
            # Another thread may have received them.
            held.add(piece.start, piece.position)
            received.n_requests += piece.n_requests
            received.n_bytes += piece.n_bytes
        if piece.whole is not None:
            self._refusals.note(self._requester.url, refusal)
            raise RangesRefusedError(refusal, path=self._requester.shown_url)

    def _cancel_others(self) -> None:
        """End all requests but the one that this is called in."""
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    def _explain_refusal(self, error: Exception) -> str | None:
        """Return why the server seems not to serve ranges, None if it is another failure."""
        status = find_status(error)
        if urlsplit(self._requester.url).scheme == "file":
            return None
        if isinstance(error, _VersionlessError):
            return str(error)
        may_forbid = status is not None and status not in _STATUS_OF_FILE
        if may_forbid and not isinstance(error, FrameError):
            return f"the server answers HTTP {status} to a request for a part of a file"
        # What is wrong with ranges alone is no reason to do without the file.
        is_last = 0 < self._retry.max_retries <= self._received.attempts
        if is_last and (status == 416 or isinstance(error, FrameError)):
            return f"the server does not serve parts of files as it should ({error})"
        return None
