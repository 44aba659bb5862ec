"""The ledger of a run: one line for each outcome of a frame, kept with the output."""

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
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spxdask.storage import LocalStore, Store, describe_temporary_folder, raise_disk_full

# Longer than most lines, in bytes; a longer line is read in some pieces.
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
        Bytes that came of a frame, or were written as a table.
    attempts : int
        Requests that a download needed.
    rows : int
        Rows measured.
    skipped : dict of str to int
        Number of sources on the frame without a row, by reason.
    warnings : tuple of str
        Repairs and fallbacks.
    psf_empty : dict of str to int
        Number of rows without a PSF flux, by reason.
    properties : dict of str to number or text
        What was found of the frame as a whole; see `spxdask.run.frame_table`.
    sources_fingerprint : str or None
        Of the sources near the frame.
    bounding_circle : tuple of float or None
        Circle on the sky that holds the frame: ra, dec and radius, deg.
    checksum : str or None
        Of a fetched file, the XXH64 of its content; of a table, the hash of its content that
        `hash_table` gives. Earlier versions have sums of eight digits for fetched files, which
        do not tell one from another; see `content_hash`.
    etag, modified : str or None
        What the archive sent with a file that was fetched, to tell it from a later version.
    frame_checksum : str or None
        The XXH64 of the frame that was measured, None where that is not known.
    time : str or None
        When it was recorded, ISO 8601; the ledger sets it.
    frame_bytes : int
        Length of the frame that was fetched or measured, 0 where that is not known.
    recipe : str or None
        Digest of the recipe that the frame was measured with; see `Ledger.recipes`.
    catalogue : str or None
        Fingerprint of the whole catalogue.
    blame : str or None
        ``archive`` or ``access`` if it failed for a reason that lies not in the frame, but in the
        archive or in the way to it.
    read : str or None
        How the frame came: ``whole``, or ``rows`` where only some of its rows did. None where
        that was not recorded: whole.
    requests : int
        Requests that its bytes took.
    refusal : str or None
        What the archive answered when it was asked for a part of the file, and did not send it.
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
    psf_empty: dict[str, int] = field(default_factory=dict)
    properties: dict[str, Any] = field(default_factory=dict)
    sources_fingerprint: str | None = None
    bounding_circle: tuple[float, float, float] | None = None
    checksum: str | None = None
    frame_bytes: int = 0
    recipe: str | None = None
    catalogue: str | None = None
    etag: str | None = None
    modified: str | None = None
    frame_checksum: str | None = None
    blame: str | None = None
    read: str | None = None
    requests: int = 0
    refusal: str | None = None
    time: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        results = [self.status if self.reason is None else f"{self.status}: {self.reason}"]
        results += [f"{self.rows:,} rows"] if self.stage == "extract" else []
        results += [f"{self.bytes:,} bytes", f"{self.seconds:.2f} s"]
        return f"{self.stage} {self.filename}: {', '.join(results)}"

    @property
    def content_hash(self) -> str | None:
        """The hash of a file that was fetched, None where it is not known.

        Returns
        -------
        str or None
            As `hash_content` returns it.
        """
        is_hash = self.checksum is not None and ":" in self.checksum
        return self.checksum if is_hash else None

    @property
    def file_bytes(self) -> int:
        """Length of the frame's file, 0 where it is not known.

        Returns
        -------
        int
            Earlier versions recorded it for a download as the bytes that came.
        """
        return self.frame_bytes or (self.bytes if self.stage == "download" else 0)


_FIELDS = frozenset(option.name for option in dataclasses.fields(Outcome))
# Names of fields in the ledgers of earlier versions.
_FORMER_FIELDS = {"sources": "sources_fingerprint", "cap": "bounding_circle"}
_SEGMENT_NAME = re.compile(r"\d+\.jsonl")


class Ledger(ABC):
    """The outcomes of a run as lines of JSON, of which the last for a frame and stage counts.

    Lines are only ever appended. A line that a crash cut short is ignored, so that its frame
    is done again. Memory holds only where the last line of each frame and stage begins, and
    the recipes.

    Attributes
    ----------
    last_time : str or None
        When the last outcome was written, ISO 8601.
    recipes : dict of str to dict
        The steps of each recipe, by digest.
    """

    last_time: str | None
    recipes: dict[str, dict[str, Any]]

    def __init__(self) -> None:
        # A local file that holds the lines, None while there is none.
        self._file: int | None = None
        self._forget()

    def _forget(self) -> None:
        """Start again with an empty ledger."""
        self.last_time = None
        self.recipes = {}
        self._offsets: dict[str, dict[str, int]] = {}
        # Where the last success begins of frames whose last outcome is a failure.
        self._done_offsets: dict[str, dict[str, int]] = {}
        self._end = 0

    @property
    def position(self) -> str:
        """A text that changes with each line that is added.

        Returns
        -------
        str
        """
        return f"{self._end} {self.last_time}"

    @abstractmethod
    def refresh(self) -> None:
        """Read the lines written since, which may be those of another process."""

    @abstractmethod
    def _append(self, line: bytes) -> None:
        """Append a line, and read it."""

    @abstractmethod
    def flush(self) -> None:
        """Store what is not yet stored."""

    def get(self, stage: str, filename: str) -> Outcome | None:
        """Return the last outcome of a stage for a frame.

        Parameters
        ----------
        stage : str
            ``download`` or ``extract``.
        filename : str
            The frame.

        Returns
        -------
        Outcome or None
            None when there is none.
        """
        offset = self._offsets.get(stage, {}).get(filename)
        return self._read_outcome(offset)

    def get_done(self, stage: str, filename: str) -> Outcome | None:
        """Return the last success of a stage for a frame, which a failure may have followed.

        Parameters
        ----------
        stage : str
            ``download`` or ``extract``.
        filename : str
            The frame.

        Returns
        -------
        Outcome or None
            None when there is none.
        """
        offset = self._done_offsets.get(stage, {}).get(filename)
        if offset is not None:
            return self._read_outcome(offset)
        outcome = self.get(stage, filename)
        return outcome if outcome is not None and outcome.status == "done" else None

    def _is_done(self, offset: int) -> bool:
        outcome = self._read_outcome(offset)
        return outcome is not None and outcome.status == "done"

    def _read_outcome(self, offset: int | None) -> Outcome | None:
        """Return the outcome whose line begins at an offset of the file."""
        if offset is None or self._file is None:
            return None
        line, piece = b"", b" "
        # An empty piece means that the file was cut.
        while piece and not line.endswith(b"\n"):
            piece = os.pread(self._file, LINE_BYTES, offset + len(line))
            line += piece[: piece.find(b"\n") + 1] or piece
        found = _parse_outcome(_parse_line(line))
        return found[1] if found is not None else None

    def add(self, outcome: Outcome) -> None:
        """Append an outcome.

        Parameters
        ----------
        outcome : Outcome
            Replaces the last one of its stage and frame.

        Raises
        ------
        DiskFullError, StoreError
            If it cannot be written.
        """
        record: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="seconds")}
        for option in dataclasses.fields(outcome):
            value = getattr(outcome, option.name)
            if option.name != "time" and value not in (None, 0, (), {}):
                record[option.name] = round(value, 4) if option.name == "seconds" else value
        self._append(json.dumps(record).encode() + b"\n")

    def add_recipe(self, digest: str, recipe: dict[str, Any]) -> None:
        """Append a recipe that outcomes name by its digest, unless the ledger has it.

        Parameters
        ----------
        digest : str
            Names the recipe.
        recipe : dict
            Its steps; must survive JSON.

        Raises
        ------
        DiskFullError, StoreError
            If it cannot be written.
        """
        if digest not in self.recipes:
            record = {"recipe": digest, "steps": recipe}
            self._append(json.dumps(record).encode() + b"\n")

    def _read_lines(self) -> None:
        """Read the whole lines of the local file that were not read before."""
        if self._file is None:
            return
        os.lseek(self._file, self._end, os.SEEK_SET)
        with open(self._file, "rb", closefd=False) as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._index(line)
                self._end += len(line)

    def _index(self, line: bytes) -> None:
        """Remember where the last line of a frame begins, or what a recipe is."""
        record = _parse_line(line)
        found = _parse_outcome(record)
        if found is not None:
            self.last_time, outcome = found
            # Interned, so that each name is in memory once for all stages.
            filename = sys.intern(outcome.filename)
            last = self._offsets.setdefault(outcome.stage, {})
            done = self._done_offsets.setdefault(outcome.stage, {})
            if outcome.status == "done":
                done.pop(filename, None)
            elif filename in last and filename not in done and self._is_done(last[filename]):
                done[filename] = last[filename]
            last[filename] = self._end
        elif isinstance(record.get("recipe"), str) and isinstance(record.get("steps"), dict):
            self.recipes[record["recipe"]] = record["steps"]


def open_ledger(state: Store) -> Ledger:
    """Open the ledger of an output folder; nothing is written before the first outcome.

    Parameters
    ----------
    state : Store
        Where the ledger is.

    Returns
    -------
    Ledger
        `LocalLedger` on disk, `StoreLedger` in an object store.
    """
    if isinstance(state, LocalStore):
        return LocalLedger(state.local_path / "ledger.jsonl")
    return StoreLedger(state / "ledger")


class LocalLedger(Ledger):
    """A ledger in a file on disk; an outcome is durable once `add` returns.

    Parameters
    ----------
    path : path
        The file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self._path = Path(path)
        self.refresh()

    def refresh(self) -> None:
        """See `Ledger.refresh`."""
        if self._file is not None and self._is_replaced(self._file):
            self._file = None
            self._forget()
        if self._file is None and self._path.exists():
            self._file = os.open(self._path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
        self._read_lines()

    def flush(self) -> None:
        """Do nothing, as each line is stored at once."""

    def _is_replaced(self, file: int) -> bool:
        """Return whether the user has removed the file, or put another in its place."""
        opened = os.fstat(file)
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return True
        return not os.path.samestat(opened, found) or found.st_size < self._end

    def _append(self, line: bytes) -> None:
        with raise_disk_full(self._path.parent), open(self._path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    # A crash cut the last line short.
                    file.write(b"\n")
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.refresh()


class StoreLedger(Ledger):
    """A ledger in an object store, whose files cannot be appended to.

    It is a folder of files, the segments; the last one is written anew with more lines until
    it is long enough. A crash costs the outcomes of the last seconds.

    Parameters
    ----------
    store : Store
        The folder.
    flush_interval_s : float
        Least time between two writes of a segment, s.
    segment_bytes : int
        Length at which a segment is complete.
    clock : callable
        Returns the time, s.
    """

    def __init__(
        self,
        store: Store,
        *,
        flush_interval_s: float = 5.0,
        segment_bytes: int = 1_000_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._store = store
        self._flush_interval_s = flush_interval_s
        self._segment_bytes = segment_bytes
        self._clock = clock
        # How much of each segment is known here, and the segment that this object writes.
        self._known: dict[str, int] = {}
        self._segment, self._segment_name, self._sent = bytearray(), "", -math.inf
        # A copy of all lines on the local disk, in a file without a name.
        with raise_disk_full(describe_temporary_folder()):
            self._copy, name = tempfile.mkstemp(prefix="spxdask-ledger-")
        self._file = self._copy
        os.unlink(name)
        weakref.finalize(self, os.close, self._copy)
        self.refresh()

    def refresh(self) -> None:
        """See `Ledger.refresh`."""
        sizes = self._store.list_sizes()
        grown = sorted(
            name
            for name, size in sizes.items()
            if _SEGMENT_NAME.fullmatch(name) and size > self._known.get(name, 0)
        )
        for name, text in zip(grown, self._store.get_many(grown), strict=True):
            self._write_copy(text[self._known.get(name, 0) :])
            self._known[name] = len(text)
        self._read_lines()

    def flush(self) -> None:
        """Send the lines that are not yet in the store, and begin a new segment."""
        if self._segment:
            self._send()
            self._segment, self._segment_name = bytearray(), ""

    def _append(self, line: bytes) -> None:
        if not self._segment:
            # The lines of others come first, as this one is later.
            self.refresh()
        self._write_copy(line)
        self._read_lines()
        self._segment += line
        if self._clock() - self._sent >= self._flush_interval_s:
            self._send()
        if len(self._segment) >= self._segment_bytes:
            self.flush()

    def _send(self) -> None:
        """Write the segment to the store if it has grown."""
        if not self._segment_name:
            last = max((int(name.partition(".")[0]) for name in self._known), default=0)
            self._segment_name = f"{last + 1:08d}.jsonl"
        if len(self._segment) > self._known.get(self._segment_name, 0):
            self._store.put(self._segment_name, self._segment)
            self._known[self._segment_name] = len(self._segment)
        self._sent = self._clock()

    def _write_copy(self, text: bytes | bytearray) -> None:
        """Append to the local copy."""
        offset = os.lseek(self._copy, 0, os.SEEK_END)
        while text:
            with raise_disk_full(describe_temporary_folder()):
                written = os.pwrite(self._copy, text, offset)
            offset += written
            text = text[written:]


def _parse_line(line: bytes) -> dict[str, Any]:
    """Return the record of a line, an empty one for a line that a crash cut short."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _parse_outcome(record: dict[str, Any]) -> tuple[str, Outcome] | None:
    """Return when an outcome was written, and the outcome; None for a record of another kind."""
    values = {
        name: value
        for key, value in record.items()
        if (name := _FORMER_FIELDS.get(key, key)) in _FIELDS
    }
    try:
        values["warnings"] = tuple(values.get("warnings", ()))
        circle = values.get("bounding_circle")
        values["bounding_circle"] = tuple(circle) if circle else None
        outcome = Outcome(**values)
    except TypeError:
        return None
    if isinstance(outcome.stage, str) and isinstance(outcome.filename, str):
        return str(record.get("time")), outcome
    return None
