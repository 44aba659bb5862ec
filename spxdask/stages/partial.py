"""One frame from the archive of which only the rows come that its sources need."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator
from typing import TypeVar

import numpy as np

from spxdask.archive.buffer_pool import BufferPool, SparseMemory
from spxdask.archive.link import LINK, Link
from spxdask.archive.observation import Observation
from spxdask.archive.pieces import REFUSALS, RangeRefusals, ReceivedPieces, fetch_pieces
from spxdask.archive.urls import strip_credentials
from spxdask.cluster.workers import worker_memory_limit
from spxdask.errors import (
    ArchiveError,
    FileChangedError,
    FrameError,
    RangesRefusedError,
)
from spxdask.run.ledger import Outcome
from spxdask.science.content_hash import hash_content
from spxdask.science.level2.fits import has_fits_start
from spxdask.science.level2.frame import Frame
from spxdask.science.level2.partial import Layouts, measure_partly, read_partly
from spxdask.science.level2.spans import Span
from spxdask.stages.download import (
    FRAME_BUFFERS,
    FetchOptions,
    check_band,
    fetch_frame,
    format_reason,
    frame_memory_limit,
    receive_and_measure,
)
from spxdask.stages.extract import (
    ExtractOptions,
    extract_frame,
    find_rows,
    list_outcomes,
    record_failure,
)
from spxdask.stages.reading import choose_way, count_requests

T = TypeVar("T")

# Of all frames of this process.
LAYOUTS = Layouts()


class _WholeWantedError(Exception):
    """All rows of the frame are needed, or come faster with the whole file."""


def may_be_read_by_rows(
    observation: Observation, images: str | None, fetch: FetchOptions, extract: ExtractOptions
) -> bool:
    """Return whether it is worth while to look at the head of a frame first.

    Parameters
    ----------
    observation : Observation
        The frame.
    images : str or None
        Where it is kept, whole; None if it is not.
    fetch : FetchOptions
        Options of the download.
    extract : ExtractOptions
        Options of the extraction.

    Returns
    -------
    bool
        False where the length is not known, too.
    """
    size, rule = observation.size_bytes, extract.row_rule
    if images is not None or fetch.read == "whole" or rule is None or size is None:
        return False
    return rule.least_file_bytes <= size <= fetch.max_frame_bytes


def stream_rows(
    observation: Observation,
    per_image: str,
    fetch: FetchOptions,
    extract: ExtractOptions,
    *,
    buffers: BufferPool = FRAME_BUFFERS,
    layouts: Layouts = LAYOUTS,
    link: Link = LINK,
    refusals: RangeRefusals = REFUSALS,
) -> list[Outcome]:
    """Fetch the rows of one frame that its sources need, and measure it.

    The whole file is fetched where the archive does not serve parts of files, and where that is
    faster; the rows of the table are the same.

    Parameters
    ----------
    observation : Observation
        The frame; its length is known.
    per_image : str
        Folder of the tables.
    fetch : FetchOptions
        Options of the download.
    extract : ExtractOptions
        Options of the extraction; they have a rule of rows.
    buffers : BufferPool
        Where the memory comes from.
    layouts : Layouts
        What is known of other frames.
    link : Link
        How fast the archive is.
    refusals : RangeRefusals
        Servers that do not serve parts of files.

    Returns
    -------
    list of Outcome
        As of `spxdask.stages.stream.stream`.

    Raises
    ------
    DiskFullError
        If there is no room for the table.
    """
    task = _RowsTask(observation, per_image, fetch, extract, layouts, link, refusals)
    refusals.begin(fetch.run)
    refusal = refusals.find(observation.download_url)
    if refusal is not None:
        return task.stream_whole(refusal=refusal)
    limit = frame_memory_limit(fetch.scratch_bytes, worker_memory_limit())
    assert observation.size_bytes is not None, "the length of the file is known"
    with buffers.lease_sparse(observation.size_bytes, limit) as leased:
        outcomes = task.stream(leased)
    # The head alone was fetched so far, and its memory is free again.
    return task.stream_whole() if outcomes is None else outcomes


class _InputsError(Exception):
    """It cannot be said which rows sources need."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _RowsTask:
    """The task of one frame."""

    def __init__(
        self,
        observation: Observation,
        per_image: str,
        fetch: FetchOptions,
        extract: ExtractOptions,
        layouts: Layouts,
        link: Link,
        refusals: RangeRefusals,
    ) -> None:
        self._observation, self._per_image = observation, per_image
        self._fetch_options, self._extract_options = fetch, extract
        self._layouts, self._link, self._refusals = layouts, link, refusals
        self._seconds = 0.0
        # What the head took of a frame that is then fetched whole.
        self._n_bytes = self._n_requests = 0
        self._doubtful: str | None = None
        # The head of a frame on which no source is.
        self._head: Frame | None = None
        self._are_rows_chosen = False

    def stream(self, leased: SparseMemory) -> list[Outcome] | None:
        """Read and measure the frame; None if it is to be fetched whole."""
        self._leased = leased
        size = self._observation.size_bytes
        self._received = received = ReceivedPieces(leased.memory, expected_size=size)
        while True:
            try:
                measured = self._read_and_measure()
                break
            except _WholeWantedError:
                self._n_bytes, self._n_requests = received.n_bytes, received.n_requests
                return None
            except _InputsError as error:
                name, options = self._observation.filename, self._extract_options
                measured = record_failure(name, error.error, self._per_image, options)
                break
            except FileChangedError:
                # The pieces are dropped; which attempt it is was counted and waited for.
                continue
            except RangesRefusedError as error:
                leased.reserve(len(leased.memory))
                downloaded, extracted = receive_and_measure(
                    self._observation,
                    None,
                    self._fetch_options,
                    self._measure_frame,
                    received.take_whole(),
                )
                refused = dataclasses.replace(downloaded, refusal=error.reason)
                return list_outcomes(refused, extracted)
            except (ArchiveError, FrameError, OSError) as error:
                failure = self._judge(error)
                if failure is not None:
                    return [self._make_outcome(failure)]
        return list_outcomes(self._make_outcome(None), measured)

    def stream_whole(self, *, refusal: str | None = None) -> list[Outcome]:
        """Fetch the whole file, and measure the rows that its sources need."""
        downloaded, extracted = fetch_frame(
            self._observation, None, self._fetch_options, self._measure_frame
        )
        downloaded = dataclasses.replace(
            downloaded,
            refusal=refusal,
            seconds=downloaded.seconds + self._seconds,
            bytes=downloaded.bytes + (self._n_bytes if downloaded.status == "done" else 0),
            requests=downloaded.requests + self._n_requests,
        )
        return list_outcomes(downloaded, extracted)

    def _measure_frame(self, frame: Frame) -> Outcome:
        return extract_frame(frame, self._per_image, self._extract_options)

    def _read_and_measure(self) -> Outcome:
        """Return the outcome of the extraction."""
        received = self._received
        self._head, self._are_rows_chosen = None, False
        content = received.memory
        reading = read_partly(
            content,
            received.held,
            self._observation.filename,
            self._choose_rows,
            self._layouts,
            may_be_small=True,
        )
        frame = self._drive(reading)
        if frame is None:
            assert self._head is not None, "no rows were chosen"
            return self._measure_frame(self._head)
        return self._drive(measure_partly(content, received.held, frame, self._measure_frame))

    def _choose_rows(self, head: Frame) -> np.ndarray | None:
        """Return the rows that sources need, None if there is none; or ask for the whole frame."""
        check_band(head, self._observation)
        try:
            rows = find_rows(head, self._extract_options)
        except Exception as error:
            # It is none of the download, and is recorded like that of a measurement.
            raise _InputsError(error) from error
        if not rows.any():
            self._head = head
            return None
        rule = self._extract_options.row_rule
        assert rule is not None, "frames are read by rows by a rule"
        if not rule.applies(rows, head.file_bytes):
            raise _WholeWantedError
        row_bytes = head.image.shape[1] * head.image.itemsize
        n_requests, n_bytes = count_requests(rows, row_bytes, self._link.cheap_gap_bytes)
        if self._fetch_options.read == "auto":
            way = choose_way(
                file_bytes=head.file_bytes,
                wanted_bytes=n_bytes,
                n_requests=n_requests,
                latency_s=self._link.latency_s,
                bandwidth=self._link.bandwidth,
            )
            if way == "whole":
                raise _WholeWantedError
        self._are_rows_chosen = True
        # This may wait; the head, which is short, does not count before.
        self._leased.reserve(self._received.held.total + n_bytes)
        return rows

    def _drive(self, reading: Generator[list[Span], None, T]) -> T:
        """Fetch what a reader asks for until it returns."""
        try:
            spans = next(reading)
            while True:
                self._fetch(spans)
                spans = next(reading)
        except StopIteration as end:
            found: T = end.value
            return found

    def _fetch(self, spans: list[Span]) -> None:
        received, options = self._received, self._fetch_options
        began = time.monotonic()
        try:
            fetch_pieces(
                self._observation.download_url,
                received,
                spans,
                retry=options.retry,
                stall_timeout_s=options.stall_timeout_s,
                endpoint=options.endpoint,
                link=self._link,
                refusals=self._refusals,
            )
        finally:
            self._seconds += time.monotonic() - began
        if self._are_rows_chosen:
            # Gaps were read along.
            self._leased.reserve(received.held.total)

    def _judge(self, error: ArchiveError | FrameError | OSError) -> Exception | None:
        """Return an error that is final, None if the frame is to be read anew, after a pause.

        A frame that cannot be opened was damaged on the way, or is served so. The same bytes a
        second time settle it.
        """
        received, retry = self._received, self._fetch_options.retry
        if not isinstance(error, FrameError):
            return error
        url = strip_credentials(self._observation.download_url)
        pieces = b"".join(received.memory[start:stop] for start, stop in received.held)
        checksum = hash_content(memoryview(pieces))
        if checksum == self._doubtful and has_fits_start(memoryview(pieces)):
            reason = f"{error}; a second transfer brought the same bytes"
            return ArchiveError(reason, path=url, blame="frame")
        if received.attempts > retry.max_retries:
            return ArchiveError(str(error), path=url, attempts=received.attempts, blame="frame")
        self._doubtful = checksum
        time.sleep(retry.delay(received.attempts))
        received.attempts += 1
        received.discard()
        return None

    def _make_outcome(self, failure: Exception | None) -> Outcome:
        """Return the outcome of the download."""
        received = self._received
        blame = getattr(failure, "blame", None)
        return Outcome(
            stage="download",
            filename=self._observation.filename,
            status="done" if failure is None else "failed",
            reason=None if failure is None else format_reason(failure),
            seconds=self._seconds,
            bytes=0 if failure is not None else received.n_bytes,
            frame_bytes=0 if failure is not None else len(received.memory),
            attempts=received.attempts,
            etag=None if failure is not None else received.version.etag,
            modified=None if failure is not None else received.version.modified,
            blame=blame if blame in ("archive", "access") else None,
            read="rows",
            requests=received.n_requests,
        )
