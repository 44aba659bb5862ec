"""Download stage: frames are fetched whole, opened and verified before they count as fetched."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from spxdask.archive.buffer_pool import BufferPool
from spxdask.archive.observation import Observation
from spxdask.archive.received import ReceivedFile
from spxdask.archive.retry import RetryPolicy
from spxdask.archive.transfer import fetch_file
from spxdask.archive.urls import strip_credentials
from spxdask.cluster.workers import worker_memory_limit
from spxdask.errors import ArchiveError, FrameError, StoreError
from spxdask.run.ledger import Outcome
from spxdask.science.content_hash import hash_content
from spxdask.science.level2.fits import has_fits_start, verify
from spxdask.science.level2.frame import Frame, open_frame
from spxdask.stages.reading import ReadOption
from spxdask.storage import open_store

# Level 2 files have at most 71.6 MB (QR2); a longer file is not one.
MAX_FRAME_BYTES = 256 << 20

FRAME_BUFFERS = BufferPool()

Measured = TypeVar("Measured")


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """How patient a download is, and how much memory a worker spends on it.

    Attributes
    ----------
    retry : RetryPolicy
        Number of attempts and the delays between them.
    stall_timeout_s : float
        Longest time without a byte, in seconds.
    scratch_bytes : float
        Most bytes of frames that a worker holds at the same time.
    max_frame_bytes : int
        Length of the longest file that is accepted as a frame.
    endpoint : str or None
        URL of the S3 server, where that is not the usual one.
    read : {"auto", "whole", "rows"}
        Whether frames that are not kept come whole, or only the rows that their sources need.
    requests_at_once : float
        Most requests at once of a worker.
    run : str
        Names the run; a worker that serves another one forgets what servers refused before.
    """

    retry: RetryPolicy
    stall_timeout_s: float
    scratch_bytes: float = math.inf
    max_frame_bytes: int = MAX_FRAME_BYTES
    endpoint: str | None = None
    read: ReadOption = "whole"
    requests_at_once: float = math.inf
    run: str = ""


def download(observation: Observation, images: str, options: FetchOptions) -> Outcome:
    """Fetch one frame into the images folder; the task of the download stage.

    Parameters
    ----------
    observation : Observation
        The frame.
    images : str
        Folder; the frame gets the archive's file name in it.
    options : FetchOptions
        Patience and limits.

    Returns
    -------
    Outcome
        ``done`` when the whole frame is in the folder, ``failed`` with the reason when it
        could not be fetched or written.
    """
    outcome, _ = fetch_frame(observation, images, options, lambda frame: None)
    return outcome


def probe(observation: Observation, options: FetchOptions) -> Outcome:
    """Fetch one frame and keep nothing of it, to see whether the archive serves it.

    Parameters
    ----------
    observation : Observation
        The frame.
    options : FetchOptions
        Patience and limits.

    Returns
    -------
    Outcome
        As of `download`.
    """
    outcome, _ = fetch_frame(observation, None, options, lambda frame: None)
    return outcome


def fetch_frame(
    observation: Observation,
    images: str | None,
    options: FetchOptions,
    measure: Callable[[Frame], Measured],
    *,
    buffers: BufferPool = FRAME_BUFFERS,
) -> tuple[Outcome, Measured | None]:
    """Fetch one frame into memory and measure it, while it is written to the images folder.

    The frame is measured where it was received, as disk and page cache are much slower
    than memory.

    Parameters
    ----------
    observation : Observation
        The frame.
    images : str or None
        Folder to write the frame to, None if it is not to be kept.
    options : FetchOptions
        Patience and limits.
    measure : callable
        Called with the open frame, which is closed when it returns.
    buffers : BufferPool
        Where the memory comes from.

    Returns
    -------
    outcome : Outcome
        What became of the download.
    measured : object or None
        What `measure` returned, None if there is no frame.

    Raises
    ------
    DiskFullError
        If there is no room for the frame.
    """
    size = observation.size_bytes or options.max_frame_bytes
    limit = frame_memory_limit(options.scratch_bytes, worker_memory_limit())
    with buffers.lease(min(size, options.max_frame_bytes), limit) as memory:
        received = ReceivedFile(memory, expected_size=observation.size_bytes)
        return receive_and_measure(observation, images, options, measure, received)


def receive_and_measure(
    observation: Observation,
    images: str | None,
    options: FetchOptions,
    measure: Callable[[Frame], Measured],
    received: ReceivedFile,
) -> tuple[Outcome, Measured | None]:
    """Do what `fetch_frame` does in memory that is there, which may hold the beginning of the file.

    Parameters
    ----------
    observation : Observation
        The frame.
    images : str or None
        As that of `fetch_frame`.
    options : FetchOptions
        Patience and limits.
    measure : callable
        As that of `fetch_frame`.
    received : ReceivedFile
        Takes the file.

    Returns
    -------
    outcome : Outcome
        What became of the download.
    measured : object or None
        What `measure` returned, None if there is no frame.

    Raises
    ------
    DiskFullError
        If there is no room for the frame.
    """
    started = time.monotonic()
    size = observation.size_bytes or options.max_frame_bytes
    reason = blame = frame = measured = written = None
    warnings: tuple[str, ...] = ()
    with ThreadPoolExecutor(1, thread_name_prefix="write-image") as writer:
        try:
            if size > options.max_frame_bytes:
                url = strip_credentials(observation.download_url)
                raise ArchiveError(f"{size} bytes is too long for a frame", path=url)
            frame, warnings = fetch_file(
                observation.download_url,
                received,
                _FrameCheck(observation, options.retry.max_retries),
                retry=options.retry,
                stall_timeout_s=options.stall_timeout_s,
                endpoint=options.endpoint,
            )
        except (ArchiveError, OSError) as error:
            reason = format_reason(error)
            blame = getattr(error, "blame", None)
        seconds = time.monotonic() - started
        if frame is not None:
            if images is not None:
                store = open_store(images)
                written = writer.submit(store.direct_write, observation.filename, received.content)
            measured = measure(frame)
        if written is not None:
            try:
                written.result()
            except (OSError, StoreError) as error:
                reason = format_reason(error)
        outcome = Outcome(
            stage="download",
            filename=observation.filename,
            status="failed" if reason else "done",
            reason=reason,
            seconds=seconds,
            bytes=0 if reason else received.size,
            frame_bytes=0 if reason else received.size,
            read="whole",
            requests=received.n_requests,
            attempts=received.attempts,
            warnings=() if reason else warnings,
            checksum=None if reason or frame is None else frame.checksum,
            etag=None if reason else received.version.etag,
            modified=None if reason else received.version.modified,
            blame=blame if blame in ("archive", "access") else None,
        )
    return outcome, measured


def frame_memory_limit(scratch_bytes: float, worker_bytes: float) -> float:
    """Return how many bytes of frames a worker may hold at the same time.

    Parameters
    ----------
    scratch_bytes : float
        Limit that the user set, in bytes.
    worker_bytes : float
        Memory limit of the worker, in bytes.

    Returns
    -------
    float
        The user's limit, but at most a quarter of the worker's memory, as measuring the
        frames needs memory, too.
    """
    return min(scratch_bytes, worker_bytes / 4)


def check_band(frame: Frame, observation: Observation) -> None:
    """Raise an error if a frame is of another detector than the archive says.

    Parameters
    ----------
    frame : Frame
        The frame, or its head.
    observation : Observation
        What the archive says of it.

    Raises
    ------
    FrameError
        If it is.
    """
    if frame.band != observation.band:
        raise FrameError(f"the file is of band {frame.band}, not {observation.band}")


class _FrameCheck:
    """Opens a received frame if it is whole and the right one.

    What is wrong with it is damage on the way, or the archive serves it so. The same bytes a
    second time settle it: no further transfer would bring others.
    """

    def __init__(self, observation: Observation, max_retries: int) -> None:
        self._observation, self._max_retries = observation, max_retries
        self._doubtful: str | None = None

    def __call__(self, received: ReceivedFile) -> tuple[Frame, tuple[str, ...]]:
        """Return the frame, and what is wrong with its sums although the data are right."""
        received.check_size(received.size)
        checksum = hash_content(received.content)
        is_settled = checksum == self._doubtful
        try:
            frame = open_frame(received.content, self._observation.filename)
            warnings = verify(received.content)
        except FrameError as error:
            self._doubtful = checksum
            # A file of unknown length may be short, and what is no FITS file is no frame.
            is_frame = received.expected_size is not None and has_fits_start(received.content)
            if is_settled and is_frame:
                raise ArchiveError(f"{error}; a second transfer brought the same bytes") from error
            raise
        check_band(frame, self._observation)
        # With the last attempt, a header that may be damaged is better than no frame.
        if warnings and not is_settled and received.attempts <= self._max_retries:
            self._doubtful = checksum
            raise FrameError(warnings[0])
        warned = frame.warnings + warnings
        return dataclasses.replace(frame, warnings=warned, checksum=checksum), warnings


def format_reason(error: Exception) -> str:
    """Return an error as one line without passwords and without control characters.

    The text may come from a server, and is shown on terminals.

    Parameters
    ----------
    error : Exception
        The error.

    Returns
    -------
    str
    """
    text = strip_credentials(str(error))
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
