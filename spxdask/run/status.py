"""Where a run stands, from what it keeps on disk: `spxdask status`."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import pyarrow.parquet as pq

from spxdask.errors import RunFolderError
from spxdask.progress import RATE_WINDOW_S, format_duration
from spxdask.run.folder import RunFolder
from spxdask.stages import aggregate, extract
from spxdask.storage import Store

SHOWN = 10


@dataclass(kw_only=True)
class RunStatus:
    """Where a run stands.

    Attributes
    ----------
    output : str
        The output folder.
    at_work : str or None
        The process that works in it, if any does.
    queried : str
        When the archive was asked, ISO 8601.
    n_frames : int
        Frames of the last query.
    frame_bytes : int
        Their length.
    fetched, measured, pending : int
        Frames in images/, frames with a table, and frames that neither have one nor failed.
    rows : int
        Rows in these tables.
    lightcurves : int
        Files in lightcurves/.
    failed : dict of str to str
        Stage and reason by file name.
    skipped : Counter
        Sources on a frame without a row, by reason.
    warnings : Counter
        Frames by what was to be known of them.
    last : str or None
        When the last frame ended, ISO 8601.
    per_second : float or None
        Frames that ended a second, when it was looked at more than once.
    """

    output: str
    at_work: str | None
    queried: str
    n_frames: int
    frame_bytes: int = 0
    fetched: int = 0
    measured: int = 0
    pending: int = 0
    rows: int = 0
    lightcurves: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    skipped: Counter = field(default_factory=Counter)
    warnings: Counter = field(default_factory=Counter)
    last: str | None = None
    per_second: float | None = None

    @property
    def ended(self) -> int:
        """Frames that are measured or failed."""
        return self.n_frames - self.pending

    def __str__(self) -> str:
        lines = [
            (
                "query",
                f"{self.n_frames:,} frames, {self.frame_bytes / 1e9:.3g} GB ({self.queried})",
            ),
            ("download", f"{self.fetched:,} frames in images/"),
            ("extract", f"{self.measured:,} frames measured, {self.rows:,} rows"),
            ("aggregate", f"{self.lightcurves:,} light curves"),
            ("pending", f"{self.pending:,} frames"),
            ("failed", f"{len(self.failed):,} frames" if self.failed else "none"),
        ]
        reasons = list(self.failed.items())
        lines += [("", f"{name}: {reason}") for name, reason in reasons[:SHOWN]]
        if len(reasons) > SHOWN:
            lines.append(("", f"and {len(reasons) - SHOWN:,} more, see state/ledger.jsonl"))
        lines += [("left out", f"{n:,} measurements: {text}") for text, n in self.skipped.items()]
        warned = self.warnings.most_common(SHOWN)
        lines += [("warning", f"{n:,} frames: {text}") for text, n in warned]
        if self.per_second is not None:
            going = self.per_second and self.pending
            left = f", {format_duration(self.pending / self.per_second)} left" if going else ""
            lines.append(("rate", f"{self.per_second:.2f} frames/s{left}"))
        lines.append(("last", f"{self.last or 'no frame ended yet'}"))
        lines.append(("at work", self.at_work or "nobody"))
        lines.append(("output", self.output))
        return "\n".join(f"{name:<11} {text}" for name, text in lines)


def status(path: str | os.PathLike) -> RunStatus:
    """Tell where the run in an output folder stands; nothing in it is changed.

    Parameters
    ----------
    path : path
        The output folder.

    Raises
    ------
    RunFolderError
        If it is none, or no query was made in it.
    """
    return _look(RunFolder(path))


def watch(path: str | os.PathLike, every: float = 2.0) -> Iterator[RunStatus]:
    """Tell it again and again, with rate and time left, until the run that is at work ends.

    When none is, it waits for one, unless no frame is pending.

    Parameters
    ----------
    path : path
        The output folder.
    every : float
        Seconds between two looks, at the least: looking takes a tenth of the time at most.
    """
    folder = RunFolder(path)
    past: deque[tuple[float, int]] = deque()
    was_at_work = False
    while True:
        started = time.monotonic()
        found = _look(folder)
        past.append((started, found.ended))
        while started - past[0][0] > RATE_WINDOW_S:
            past.popleft()
        seconds, frames = started - past[0][0], found.ended - past[0][1]
        found.per_second = frames / seconds if seconds else 0.0
        yield found
        if found.at_work is None and (was_at_work or not found.pending):
            return
        was_at_work = found.at_work is not None
        time.sleep(max(every, 9 * (time.monotonic() - started)))


def _look(folder: RunFolder) -> RunStatus:
    config = folder.saved_config()
    observations = folder.load_observations(config)
    if observations is None:
        raise RunFolderError(f"no query was made in {folder.path}: run query first")
    folder.ledger.refresh()
    images, tables = folder.images.list_sizes(), folder.per_image.list_sizes()
    found = RunStatus(
        output=folder.path,
        at_work=folder.find_lock_holder(),
        queried=observations.query_time,
        n_frames=len(observations),
        lightcurves=_curves(folder.lightcurves, config.lightcurve_format),
    )
    for o in observations:
        found.frame_bytes += o.size_bytes or 0
        fetched = o.is_complete(images)
        found.fetched += fetched
        outcome = {stage: folder.ledger.get(stage, o.filename) for stage in ("download", "extract")}
        extracted = outcome["extract"]
        table = extract.table_name(o.filename, config.per_image_format)
        measured = (
            extracted is not None
            and extracted.status == "done"
            and tables.get(table) == extracted.bytes
        )
        # A download that failed is over when the frame came otherwise, or is not wanted any
        # more.
        if fetched or (measured and not config.keep_images):
            outcome["download"] = None
        failed = next((x for x in outcome.values() if x and x.status == "failed"), None)
        if failed is not None:
            found.failed[o.filename] = f"{failed.stage}: {failed.reason}"
        if measured:
            found.measured += 1
            found.rows += extracted.rows
            found.skipped.update(extracted.skipped)
            found.warnings.update(extracted.warnings)
        elif failed is None:
            found.pending += 1
    found.last = folder.ledger.last_time
    return found


def _curves(folder: Store, format: str) -> int:
    names = folder.list_names()
    if format == "csv":
        return sum(n.endswith(".csv") and not n.startswith(".") for n in names)
    count = 0
    for name in names:
        # A run at work may remove one.
        if aggregate.is_bucket_name(name):
            with suppress(FileNotFoundError), folder.open_seekable(name) as file:
                metadata = pq.read_metadata(file).metadata or {}
                count += int(metadata.get(b"sources", 0))
    return count
