"""The rows of a catalogue: checked, and left out or refused where they cannot be used."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spxdask.errors import CatalogueError
from spxdask.tables.catalogue.angles import Numbers, as_text, to_mask

__all__ = ["Rows", "SkippedRow", "encode_skipped_rows", "ids_as_text"]

logger = logging.getLogger(__name__)

# Limits of the coordinates, deg, both included.
RANGES_DEG = {"ra": (-180.0, 360.0), "dec": (-90.0, 90.0)}
# A message quotes so many bad rows, and so many characters of each value.
MAX_ROWS_QUOTED = 5
MAX_VALUE_LENGTH = 60
# How programs write large floating-point numbers, and integers that are floating-point numbers.
FLOAT_TEXT = r"^-?(\d(\.\d+)?[eE]\+?\d\d|\d+\.0)$"
FLOAT_CAUSE = (
    "went through a floating-point number, which holds 15 digits, as pandas makes of integers "
    "beside missing values: write them as integers or text"
)
SKIP_HINT = "on_bad_row: skip (--on-bad-row skip) leaves such rows out"


@dataclass(frozen=True, kw_only=True)
class SkippedRow:
    """A row of the user's catalogue that is not used.

    Attributes
    ----------
    row : int or None
        1 for the first below the header; None for a line that is no row.
    line : int or None
        1 for the first line of the file, None for a file that is no text.
    reason : str
        Why.
    values : tuple of str
        Its id, ra and dec, as they were given.
    """

    row: int | None
    line: int | None
    reason: str
    values: tuple[str, ...]


def encode_skipped_rows(skipped: Iterable[SkippedRow]) -> bytes:
    """Return a table of rows that were skipped, for the user.

    Parameters
    ----------
    skipped : iterable of SkippedRow
        The rows.

    Returns
    -------
    bytes
        CSV in UTF-8.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["row", "line", "reason", "target_id", "ra", "dec"])
    for item in skipped:
        writer.writerow([item.row, item.line, item.reason, *item.values])
    return text.getvalue().encode()


def ids_as_text(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Return ids as text to their last digit.

    Parameters
    ----------
    column : (n,) pyarrow array
        Texts, bytes or numbers.

    Returns
    -------
    ids : (n,) pyarrow large_string array
        Empty where there is none. Floating-point numbers are written as Python writes them.
    is_float : (n,) bool array
        Which were floating-point numbers, or have the form of such.

    Raises
    ------
    CatalogueError
        If they are something else.
    """
    kind = column.type
    if pa.types.is_floating(kind):
        is_there = ~np.isnan(pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False))
        values = column.to_numpy(zero_copy_only=False)
        texts = [str(v) if ok else "" for v, ok in zip(values, is_there, strict=True)]
        return pa.array(texts, pa.large_string()), is_there
    if pa.types.is_integer(kind) or pa.types.is_decimal(kind):
        ids = pc.cast(column, pa.large_string())
    else:
        ids = as_text(column)
    if ids.null_count:
        ids = pc.fill_null(ids, "")
    if pa.types.is_integer(kind) or _as_integers(ids) is not None:
        return ids, np.zeros(len(ids), bool)
    return ids, _find_float_texts(ids)


def _find_float_texts(ids: pa.Array) -> np.ndarray:
    """Return which ids have the form of floating-point numbers."""
    found = np.zeros(len(ids), bool)
    characters, ends = _characters(ids)
    if not len(characters):
        return found
    # A regular expression for each of a million ids takes a second, the last bytes nearly nothing.
    last, before, third, fourth = (characters[np.maximum(ends - k, 0)] for k in (1, 2, 3, 4))
    exponents = np.frombuffer(b"eE", np.uint8)
    may_be = (last == ord("0")) & (before == ord("."))
    may_be |= np.isin(third, exponents) | np.isin(fourth, exponents)
    some = np.flatnonzero(may_be)
    found[some] = to_mask(pc.match_substring_regex(ids.take(pa.array(some)), FLOAT_TEXT))
    return found


def _as_integers(ids: pa.Array) -> np.ndarray | None:
    """Return ids that are integers without a sign as such, None if any is not."""
    characters, _ = _characters(ids)
    # A cast that fails makes a message for every row, which takes long.
    if not len(characters) or ((characters - np.uint8(ord("0"))) > 9).any():
        return None
    try:
        return pc.cast(ids, pa.int64()).to_numpy()
    except pa.ArrowInvalid:
        return None


def _characters(ids: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of texts up to the end of the last, and where each text ends."""
    _, offsets, text = ids.buffers()
    if not len(ids) or text is None:
        return np.zeros(0, np.uint8), np.zeros(len(ids), np.int64)
    ends = np.frombuffer(offsets, np.int64)[ids.offset + 1 :][: len(ids)]
    return np.frombuffer(text, np.uint8)[: ends[-1]], ends


class Rows:
    """The rows of a catalogue, from which bad ones are taken.

    Parameters
    ----------
    ids : (n,) pyarrow large_string array
        Ids; empty where there is none.
    columns : dict of str to pyarrow array
        ``target_id``, ``ra`` and ``dec`` as they were given, for messages.
    find_lines : callable
        Returns the line in the file by row, for some rows; 0 is the first row.
    skip : bool
        Whether bad rows are left out, rather than refused.
    """

    def __init__(
        self,
        ids: pa.Array,
        columns: dict[str, pa.Array],
        find_lines: Callable[[Sequence[int]], dict[int, int]],
        *,
        skip: bool,
    ) -> None:
        self._ids = ids
        self._columns = columns
        self._find_lines = find_lines
        self._skip = skip
        self._is_bad = np.zeros(len(ids), bool)
        self._reasons: dict[int, str] = {}

    def check(self, ra: Numbers, dec: Numbers) -> None:
        """Find the rows without an id or a position on the sky.

        Parameters
        ----------
        ra, dec : Numbers
            The coordinates, deg.

        Raises
        ------
        CatalogueError
            If there are any, unless they are skipped.
        """
        is_empty = to_mask(pc.equal(pc.utf8_trim_whitespace(self._ids), ""))
        self._take_bad(is_empty, "targetid is empty", "target_id")
        for name, numbers in (("ra", ra), ("dec", dec)):
            self._take_bad(numbers.is_missing, f"{name} is missing", name)
        for name, numbers in (("ra", ra), ("dec", dec)):
            self._take_bad(numbers.is_wrong, f"{name} is not a number", name)
        for name, numbers in (("ra", ra), ("dec", dec)):
            low, high = RANGES_DEG[name]
            # NaN has been found above.
            is_off = (numbers.values < low) | (numbers.values > high)
            self._take_bad(is_off, f"{name} is not within {low:g} to {high:g} deg", name)
        is_mixed = ra.is_mixed & ~self._is_bad
        self._refuse(is_mixed, "ra is decimal where other rows are sexagesimal", "ra")

    def _take_bad(self, is_bad: np.ndarray, problem: str, column: str) -> None:
        """Note rows as bad, or raise an error for them."""
        if not is_bad.any():
            return
        if not self._skip:
            self._refuse(is_bad, problem, column, SKIP_HINT)
        for row in np.flatnonzero(is_bad & ~self._is_bad).tolist():
            self._reasons[row] = problem
        self._is_bad |= is_bad

    def check_unique(self, is_float: np.ndarray) -> None:
        """Refuse ids that occur more than once, and warn of those that may have lost digits.

        Parameters
        ----------
        is_float : (n,) bool array
            Which ids went through a floating-point number.

        Raises
        ------
        CatalogueError
            If an id occurs again in a row that is not bad.
        """
        good = np.flatnonzero(~self._is_bad)
        ids = self._ids if len(good) == len(self._ids) else self._ids.take(pa.array(good))
        numbers = _as_integers(ids)
        if numbers is not None and (np.diff(np.sort(numbers)) != 0).all():
            # Sorting numbers is much faster than hashing texts.
            return
        if pc.count_distinct(ids).as_py() < len(ids):
            codes = ids.dictionary_encode().indices.to_numpy()
            is_again = np.ones(len(ids), bool)
            is_again[np.unique(codes, return_index=True)[1]] = False
            is_repeated = np.zeros(len(self._ids), bool)
            is_repeated[good[is_again]] = True
            hint = f"such ids {FLOAT_CAUSE}" if (is_repeated & is_float).any() else ""
            self._refuse(is_repeated, "targetid occurs more than once", "target_id", hint)

    def count_floats(self, is_float: np.ndarray) -> tuple[int, str]:
        """Count the ids that went through a floating-point number.

        Parameters
        ----------
        is_float : (n,) bool array
            As `ids_as_text` returns it.

        Returns
        -------
        count : int
            Those in rows that are not bad.
        first : str
            The first of them.
        """
        found = np.flatnonzero(is_float & ~self._is_bad)
        return len(found), self._ids[int(found[0])].as_py() if len(found) else ""

    @property
    def is_good(self) -> np.ndarray | None:
        """Which rows are used, None for all."""
        return ~self._is_bad if self._reasons else None

    def list_skipped(self) -> list[SkippedRow]:
        """List the rows that are left out.

        Returns
        -------
        list of SkippedRow
            In their order.
        """
        rows = sorted(self._reasons)
        lines = self._find_lines(rows) if rows else {}
        return [
            SkippedRow(
                row=row + 1,
                line=lines.get(row),
                reason=self._reasons[row],
                values=tuple(self._quote(name, row) for name in self._columns),
            )
            for row in rows
        ]

    def _quote(self, column: str, row: int) -> str:
        value = self._columns[column][row].as_py()
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        return "" if value is None else str(value)

    def _refuse(self, is_bad: np.ndarray, problem: str, column: str, hint: str = "") -> None:
        """Raise CatalogueError if any row is bad, with the values of the first few."""
        bad = np.flatnonzero(is_bad).tolist()
        if not bad:
            return
        first = bad[:MAX_ROWS_QUOTED]
        # What is missing says less than the id of its row.
        shown = "target_id" if problem.endswith("is missing") else column
        quoted = [f"{i + 1} ({self._quote(shown, i)[:MAX_VALUE_LENGTH]!r})" for i in first]
        lines = self._find_lines(first)
        where = f"data row {quoted[0]}"
        if len(bad) > 1:
            more = f" and {len(bad) - len(first):,} more" if len(bad) > len(first) else ""
            where = f"data rows {', '.join(quoted)}{more}, {len(bad):,} in all"
        if lines:
            listed = ", ".join(str(lines[i]) for i in first)
            where += f"; line {listed}" if len(first) == 1 else f"; lines {listed}"
        raise CatalogueError(
            f"{problem} in {where}{'; ' * bool(hint)}{hint}", rows=tuple(i + 1 for i in bad)
        )
