"""Where a run stands, from the files in its output folder: `spxdask status`."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import pyarrow.parquet as pq

from spxdask.progress import RATE_WINDOW_S
from spxdask.run.aggregation import load_aggregation
from spxdask.run.calibration import load_calibration
from spxdask.run.folder import RunFolder
from spxdask.run.plan import NO_SOURCE, FrameState, MeasurementInputs, plan_frames
from spxdask.run.summary import describe_calibration, describe_reading
from spxdask.storage import Store
from spxdask.text import format_count, format_duration

MAX_LINES_SHOWN = 10


@dataclass(kw_only=True)
class RunStatus:
    """Where a run stands.

    Attributes
    ----------
    output : str
        The output folder.
    running : str or None
        The process that works in it, if any does.
    queried : str
        When the archive was asked, ISO 8601.
    n_frames : int
        Frames of the last query.
    frame_bytes : int
        Length of those that are not excluded.
    fetched : int
        Frames in images/.
    came_bytes, came_file_bytes : int
        Bytes that came of the frames that were fetched, kept or not, and their length.
    came, by_rows : int
        Number of these frames, and of those of which only some rows of pixels came.
    measured : int
        Frames with a table that is up to date.
    pending : int
        Frames that have no such table, have not failed and are not excluded.
    excluded : Counter
        Frames that are neither fetched nor measured, by reason.
    rows : int
        Rows in the tables that are up to date.
    lightcurves : int
        Light curves in lightcurves/.
    is_aggregated : bool
        Whether nothing that they are made of has changed since.
    failed : dict of str to str
        Stage and reason by file name.
    skipped_sources : int
        Rows of the user's catalogue that are not used.
    skipped : Counter
        Sources on a frame without a row, by reason.
    warnings : Counter
        Frames by warning.
    last : str or None
        When the last frame ended, ISO 8601.
    calibration : list of str
        Which calibration products are used, and which are not, as lines.
    waiting : str or None
        What the process waits for, if it does.
    per_second : float or None
        Frames that ended a second, when the folder was read more than once.
    """

    output: str
    running: str | None
    queried: str
    n_frames: int
    frame_bytes: int = 0
    fetched: int = 0
    came_bytes: int = 0
    came_file_bytes: int = 0
    came: int = 0
    by_rows: int = 0
    measured: int = 0
    pending: int = 0
    rows: int = 0
    lightcurves: int = 0
    is_aggregated: bool = True
    excluded: Counter[str] = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)
    skipped_sources: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    last: str | None = None
    calibration: list[str] = field(default_factory=list)
    waiting: str | None = None
    per_second: float | None = None

    @property
    def ended(self) -> int:
        """Frames that are measured, failed or excluded."""
        return self.n_frames - self.pending

    def __str__(self) -> str:
        size = f"{self.frame_bytes / 1e9:.3g} GB ({self.queried})"
        rows = format_count(self.rows, "row")
        stale = "" if self.is_aggregated or not self.lightcurves else " (not up to date)"
        lines = [
            ("query", f"{format_count(self.n_frames, 'frame')}, {size}"),
            ("download", f"{format_count(self.fetched, 'frame')} in images/"),
            ("extract", f"{format_count(self.measured, 'frame')} measured, {rows}"),
            ("aggregate", format_count(self.lightcurves, "light curve") + stale),
            ("pending", format_count(self.pending, "frame")),
            ("failed", format_count(len(self.failed), "frame") if self.failed else "none"),
        ]
        lines[1:1] = [
            ("", f"{format_count(n, 'frame')} not fetched: {text}")
            for text, n in self.excluded.items()
        ]
        lines[1:1] = [("", text) for text in self.calibration]
        reading = (self.came_bytes, self.came_file_bytes, self.by_rows, self.came)
        at = next(i for i, (name, _) in enumerate(lines) if name == "extract")
        lines[at:at] = [("", text) for text in describe_reading(*reading)]
        reasons = list(self.failed.items())
        lines += [("", f"{name}: {reason}") for name, reason in reasons[:MAX_LINES_SHOWN]]
        if len(reasons) > MAX_LINES_SHOWN:
            more = len(reasons) - MAX_LINES_SHOWN
            lines.append(("", f"and {more:,} more, see the ledger in state/"))
        if self.skipped_sources:
            rows_left = format_count(self.skipped_sources, "row")
            lines.append(("left out", f"{rows_left} of the catalogue, see skipped_rows.csv"))
        lines += [
            ("left out", f"{format_count(n, 'measurement')}: {text}")
            for text, n in self.skipped.items()
        ]
        lines += [
            ("warning", f"{format_count(n, 'frame')}: {text}")
            for text, n in self.warnings.most_common(MAX_LINES_SHOWN)
        ]
        if self.per_second is not None:
            left = ""
            if self.per_second and self.pending:
                left = f", {format_duration(self.pending / self.per_second)} left"
            lines.append(("rate", f"{self.per_second:.2f} frames/s{left}"))
        lines.append(("last", self.last or "no frame has ended yet"))
        lines.append(("running", self.running or "no"))
        if self.waiting is not None:
            lines.append(("waiting", self.waiting))
        lines.append(("output", self.output))
        return "\n".join(f"{name:<11} {text}" for name, text in lines)


def read_status(path: str | os.PathLike[str]) -> RunStatus:
    """Return where the run in an output folder stands; nothing in it is changed.

    Parameters
    ----------
    path : path
        The output folder.

    Returns
    -------
    RunStatus
        Its text is what the command line prints.

    Raises
    ------
    RunFolderError
        If it is none, or no query was made in it.
    """
    return _read(RunFolder(path))


def watch_status(
    path: str | os.PathLike[str],
    *,
    interval_s: float = 2.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[RunStatus]:
    """Read the status again and again, with rate and time left, until the run ends.

    When no run is at work, it waits for one, unless no frame is pending.

    Parameters
    ----------
    path : path
        The output folder.
    interval_s : float
        Seconds between two readings, at least; reading takes a tenth of the time at most.
    clock, sleep : callable
        Return the time, and pass some, in seconds.

    Yields
    ------
    RunStatus
        The status, its rate included.
    """
    folder = RunFolder(path)
    history: deque[tuple[float, int]] = deque()
    was_running = False
    while True:
        started = clock()
        found = _read(folder)
        if history and found.ended < history[-1][1]:
            # A run with other options or a new query has begun.
            history.clear()
        history.append((started, found.ended))
        while started - history[0][0] > RATE_WINDOW_S:
            history.popleft()
        seconds, frames = started - history[0][0], found.ended - history[0][1]
        found.per_second = frames / seconds if seconds else 0.0
        yield found
        if found.running is None and (was_running or not found.pending):
            return
        was_running = found.running is not None
        sleep(max(interval_s, 9 * (clock() - started)))


def _read(folder: RunFolder) -> RunStatus:
    config = folder.saved_config()
    observations = folder.require_observations(config)
    folder.ledger.refresh()
    image_sizes = folder.images.list_sizes()
    calibration = load_calibration(folder.state, config)
    found = RunStatus(
        output=folder.path,
        running=folder.find_lock_holder(),
        queried=observations.query_time,
        n_frames=len(observations),
        lightcurves=_count_light_curves(folder.lightcurves, config.lightcurve_format),
        is_aggregated=load_aggregation(folder.state) is not None,
        skipped_sources=folder.count_skipped_rows(),
    )
    if calibration is not None:
        found.calibration = describe_calibration(calibration.tokens, calibration.missing)
    planned = plan_frames(
        observations,
        folder.ledger,
        MeasurementInputs(
            photometry=config.photometry,
            catalogue=folder.saved_catalogue(),
            calibration=calibration,
            contaminants=folder.saved_contaminants(),
        ),
        image_sizes=image_sizes,
        table_sizes=folder.per_image.list_sizes(),
        keep_images=config.keep_images,
        table_format=config.per_image_format,
        retry_failed=False,
        fetch_empty=config.fetches_empty_frames,
    )
    for observation, state, measured in planned:
        is_fetched = observation.is_complete(image_sizes)
        found.fetched += is_fetched
        if state == FrameState.EMPTY:
            found.excluded[NO_SOURCE] += 1
            continue
        found.frame_bytes += observation.size_bytes or 0
        fetched = folder.ledger.get_done("download", observation.filename)
        if fetched is not None:
            found.came += 1
            found.came_bytes += fetched.bytes
            found.came_file_bytes += fetched.file_bytes
            found.by_rows += fetched.read == "rows"
        if measured is not None:
            found.measured += 1
            found.rows += measured.rows
            found.skipped.update(measured.skipped)
            found.warnings.update(measured.warnings)
        elif state != FrameState.FAILED:
            found.pending += 1
        if state == FrameState.FAILED:
            stages = ("extract",) if is_fetched else ("download", "extract")
            outcomes = (folder.ledger.get(stage, observation.filename) for stage in stages)
            outcome = next(o for o in outcomes if o is not None and o.status == "failed")
            found.failed[observation.filename] = f"{outcome.stage}: {outcome.reason}"
    found.last = folder.ledger.last_time
    if found.running is not None:
        # A run that was killed may have left it behind.
        found.waiting = folder.find_waiting()
    return found


def _count_light_curves(folder: Store, table_format: str) -> int:
    names = folder.list_names()
    if table_format == "csv":
        return sum(name.endswith(".csv") and not name.startswith(".") for name in names)
    count = 0
    for name in names:
        # Other Parquet files are the user's.
        if not (name.startswith("bucket-") and name.endswith(".parquet")):
            continue
        # A run in progress may remove one.
        with suppress(FileNotFoundError), folder.open_seekable(name) as file:
            metadata = pq.read_metadata(file).metadata or {}
            count += int(metadata.get(b"sources", 0))
    return count
