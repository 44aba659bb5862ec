"""What became of every frame: one line a result, kept with the output."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
import tempfile
import time
import weakref
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from spxdask.storage.files import (
    as_path,
    is_local,
    raise_disk_full,
    read_each,
    sizes,
    translate_store_errors,
)

# In a store, lines are sent together, and this much of them makes a file.
FLUSH_S = 5.0
SEGMENT_BYTES = 1_000_000
# Of most lines; longer ones are read in some pieces.
LINE_BYTES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
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


_NAMES = frozenset(option.name for option in dataclasses.fields(Outcome))
_SEGMENT = re.compile(r"\d+\.jsonl")


class Ledger:
    """The outcomes of a run in JSON lines, the last word on each frame and stage.

    Lines are only ever appended. A line that a crash cut short is ignored, which means
    that its frame is done again. In memory is only where each last word stands.

    Parameters
    ----------
    path : path
        On disk, a file. In a store, whose files cannot be appended to, a folder of them:
        one is written anew until it is full or flushed. What came in the last `FLUSH_S` may
        be lost in a crash.

    Attributes
    ----------
    last_time : str or None
        When the last outcome was written, ISO 8601.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = as_path(path)
        self.last_time: str | None = None
        self._where: dict[str, dict[str, int]] = {}
        self._file: int | None = None
        self._read_to = 0
        # In a store: how much of each file was read, and the file that we write.
        self._seen: dict[str, int] = {}
        self._segment, self._name, self._sent = bytearray(), "", -math.inf
        if not is_local(self.path):
            self._file, name = tempfile.mkstemp(prefix="spxdask-ledger-")
            os.unlink(name)
            weakref.finalize(self, os.close, self._file)
        self.refresh()

    def refresh(self) -> None:
        """Read what was written since, by another process perhaps."""
        if not is_local(self.path):
            self._fetch()
        self._read_on()

    def _read_on(self) -> None:
        if is_local(self.path) and self._file is not None and self._is_another():
            # The user has removed the folder, or put another in its place.
            self._where, self._file, self._read_to, self.last_time = {}, None, 0, None
        if self._file is None and self.path.exists():
            self._file = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
        if self._file is None:
            return
        os.lseek(self._file, self._read_to, os.SEEK_SET)
        with open(self._file, "rb", closefd=False) as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._note(line, self._read_to)
                self._read_to += len(line)

    def _is_another(self) -> bool:
        """Tell whether the file that is open is not that of the ledger's name any more."""
        ours = os.fstat(self._file)
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return True
        return not os.path.samestat(ours, there) or there.st_size < self._read_to

    def get(self, stage: str, filename: str) -> Outcome | None:
        """Return the last outcome of a stage for a frame, None when there is none."""
        where = self._where.get(stage, {}).get(filename)
        if where is None:
            return None
        line, more = b"", b" "
        # Nothing more comes of a file that somebody has cut.
        while more and not line.endswith(b"\n"):
            more = os.pread(self._file, LINE_BYTES, where + len(line))
            line += more[: more.find(b"\n") + 1] or more
        found = _parse(line)
        return found[1] if found is not None else None

    def has_failed(self, filename: str) -> bool:
        """Tell whether the last outcome of any stage for a frame is a failure."""
        outcomes = (self.get(stage, filename) for stage in ("download", "extract"))
        return any(outcome is not None and outcome.status == "failed" for outcome in outcomes)

    def add(self, outcome: Outcome) -> None:
        """Append an outcome; on disk, it is there to stay when this returns."""
        record = {"time": datetime.now(UTC).isoformat(timespec="seconds")}
        for option in dataclasses.fields(outcome):
            value = getattr(outcome, option.name)
            if value not in (None, 0, (), {}):
                record[option.name] = round(value, 4) if option.name == "seconds" else value
        line = json.dumps(record).encode() + b"\n"
        if is_local(self.path):
            with raise_disk_full(self.path.parent), open(self.path, "ab+") as file:
                if file.tell() and not _ends_in_line_feed(self.path):
                    file.write(b"\n")
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self._read_on()
            return
        if not self._segment:
            # Behind what others wrote, which ours is a later word than.
            self.refresh()
        self._keep(line)
        self._read_on()
        self._segment += line
        if time.monotonic() - self._sent >= FLUSH_S:
            self._send()
        if len(self._segment) >= SEGMENT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send what is not yet in the store, and begin another file with what comes next."""
        if self._segment:
            self._send()
            self._segment, self._name = bytearray(), ""

    def _send(self) -> None:
        if not self._name:
            last = max((int(name.partition(".")[0]) for name in self._seen), default=0)
            self._name = f"{last + 1:08d}.jsonl"
        if len(self._segment) > self._seen.get(self._name, 0):
            with translate_store_errors(self.path):
                self.path.fs.pipe_file(f"{self.path.path}/{self._name}", bytes(self._segment))
            self._seen[self._name] = len(self._segment)
        self._sent = time.monotonic()

    def _fetch(self) -> None:
        """Bring what others wrote to the store since to our own disk."""
        found = {name: size for name, size in sizes(self.path).items() if _SEGMENT.fullmatch(name)}
        grown = sorted(name for name, size in found.items() if size > self._seen.get(name, 0))
        for name, text in zip(grown, read_each(self.path, grown), strict=True):
            self._keep(text[self._seen.get(name, 0) :])
            self._seen[name] = len(text)

    def _keep(self, text: bytes) -> None:
        where = os.lseek(self._file, 0, os.SEEK_END)
        while text:
            where += (written := os.pwrite(self._file, text, where))
            text = text[written:]

    def _note(self, line: bytes, where: int) -> None:
        """Remember where the last word on a frame stands."""
        if (found := _parse(line)) is not None:
            self.last_time, outcome = found
            # Each name is there once, however many stages there are.
            self._where.setdefault(outcome.stage, {})[sys.intern(outcome.filename)] = where


def _ends_in_line_feed(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _parse(line: bytes) -> tuple[str, Outcome] | None:
    """Return when an outcome was written, and the outcome; None when the line is none."""
    try:
        record = json.loads(line)
        values = {k: v for k, v in record.items() if k in _NAMES}
        values["warnings"] = tuple(values.get("warnings", ()))
        values["cap"] = tuple(values["cap"]) if values.get("cap") else None
        outcome = Outcome(**values)
    except (ValueError, TypeError, AttributeError):
        # Cut short by a crash: as if it had not been written.
        return None
    if isinstance(outcome.stage, str) and isinstance(outcome.filename, str):
        return str(record.get("time")), outcome
    return None
