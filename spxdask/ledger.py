"""What became of every frame: one line a result, kept with the output."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a stage made of one frame.

    Attributes
    ----------
    stage : str
        ``download`` or ``extract``.
    filename : str
        The frame.
    status : str
        ``done`` or ``failed``.
    reason : str or None
        Why it failed.
    seconds : float
        Time in the task.
    bytes : int
        Bytes fetched, or written as a table.
    attempts : int
        Requests a download took.
    rows : int
        Rows measured.
    skipped : dict of str to int
        Sources on the frame without a row, by reason.
    warnings : tuple of str
        Repairs and fallbacks.
    fingerprint : str or None
        Of the catalogue, options and code that the rows come from.
    sources : str or None
        Of the sources near the frame, options and code.
    cap : tuple of float or None
        Circle on the sky that holds the frame: ra, dec and radius, deg.
    checksum : str or None
        Of a fetched file: ones' complement sum of its 32-bit words, as FITS has them.
    """

    stage: str
    filename: str
    status: str
    reason: str | None = None
    seconds: float = 0.0
    bytes: int = 0
    attempts: int = 0
    rows: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    fingerprint: str | None = None
    sources: str | None = None
    cap: tuple[float, float, float] | None = None
    checksum: str | None = None


class Ledger:
    """The outcomes of a run in a file of JSON lines, the last word on each frame and stage.

    `last_time` is when the last of them was written, ISO 8601.

    Lines are only ever appended. A line that a crash cut short is ignored, which means
    that its frame is done again.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._latest: dict[tuple[str, str], Outcome] = {}
        self.last_time: str | None = None
        if self.path.exists():
            for time, outcome in _read(self.path):
                self._latest[outcome.stage, outcome.filename] = outcome
                self.last_time = time

    def get(self, stage: str, filename: str) -> Outcome | None:
        """Return the last outcome of a stage for a frame, None when there is none."""
        return self._latest.get((stage, filename))

    def has_failed(self, filename: str) -> bool:
        """Tell whether the last outcome of any stage for a frame is a failure."""
        outcomes = (self.get(stage, filename) for stage in ("download", "extract"))
        return any(outcome is not None and outcome.status == "failed" for outcome in outcomes)

    def add(self, outcome: Outcome) -> None:
        """Append an outcome; it is on disk when this returns."""
        record = {"time": datetime.now(UTC).isoformat(timespec="seconds")}
        for option in dataclasses.fields(outcome):
            value = getattr(outcome, option.name)
            if value not in (None, 0, (), {}):
                record[option.name] = round(value, 4) if option.name == "seconds" else value
        with open(self.path, "ab+") as file:
            if file.tell() and not _ends_in_line_feed(self.path):
                file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._latest[outcome.stage, outcome.filename] = outcome
        self.last_time = record["time"]


def _ends_in_line_feed(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _read(path: Path) -> Iterator[tuple[str, Outcome]]:
    names = {option.name for option in dataclasses.fields(Outcome)}
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
                values = {k: v for k, v in record.items() if k in names}
                values["warnings"] = tuple(values.get("warnings", ()))
                values["cap"] = tuple(values["cap"]) if values.get("cap") else None
                outcome = Outcome(**values)
            except (ValueError, TypeError, AttributeError):
                # Cut short by a crash: as if it had not been written.
                continue
            if isinstance(outcome.stage, str) and isinstance(outcome.filename, str):
                yield str(record.get("time")), outcome
