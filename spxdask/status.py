"""Where a run stands, from what it keeps on disk: `spxdask status`."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from spxdask.runfolder import RunFolder, load_query_summary
from spxdask.stages import download, extract

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
    folder = RunFolder(path)
    config = folder.saved_config()
    observations = folder.load_observations(config) or []
    queried = str(load_query_summary(folder.path).get("query_time"))
    found = RunStatus(
        output=str(folder.path),
        at_work=folder.busy(),
        queried=queried,
        n_frames=len(observations),
        frame_bytes=sum(o.size_bytes or 0 for o in observations),
        lightcurves=_count(folder.lightcurves, ".csv"),
    )
    for o in observations:
        found.fetched += download.is_complete(o, str(folder.images))
        outcomes = [folder.ledger.get(stage, o.filename) for stage in ("download", "extract")]
        failed = next((x for x in outcomes if x is not None and x.status == "failed"), None)
        if failed is not None:
            found.failed[o.filename] = f"{failed.stage}: {failed.reason}"
        measured = outcomes[1]
        if measured is not None and extract.has_table(measured, folder.per_image):
            found.measured += 1
            found.rows += measured.rows
            found.skipped.update(measured.skipped)
            found.warnings.update(measured.warnings)
        elif failed is None:
            found.pending += 1
    found.last = folder.ledger.last_time
    return found


def _count(folder: Path, suffix: str) -> int:
    if not folder.exists():
        return 0
    with os.scandir(folder) as entries:
        return sum(e.name.endswith(suffix) and not e.name.startswith(".") for e in entries)
