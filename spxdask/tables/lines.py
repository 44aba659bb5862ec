"""Rows of per-image tables as lines of light curves: read, and put in order.

Rows are regrouped as the text of their lines, so that no number is parsed and rendered
again, and a light curve has the digits of the tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spxdask.science.compiled import compiled
from spxdask.tables.csv import read_text, render_header, render_lines
from spxdask.tables.parquet import PARQUET_MARK, read_parquet
from spxdask.tables.schema import PER_IMAGE, SORT_KEYS, Layout

__all__ = ["read_lines", "sort_lines"]

COMMA = ord(",")
LINE_FEED = ord("\n")


def read_lines(text: bytearray, layout: Layout, release: str = "") -> pa.Table:
    """Read a per-image table for regrouping: the sort keys of its rows, and their text.

    Parameters
    ----------
    text : bytearray
        The file, CSV or Parquet; it is overwritten.
    layout : Layout
        Its columns.
    release : str, optional
        That of its frame, which no table has.

    Returns
    -------
    pyarrow.Table
        The columns `SORT_KEYS`, and ``line``: the row's line in a light curve with its line
        feed, each value exactly as it stands, or would stand, in a CSV table.

    Raises
    ------
    pyarrow.ArrowException
        If it is no such table, or a row has no sort key.
    KeyError
        If a Parquet file lacks a column.
    """
    if text.startswith(PARQUET_MARK):
        return _read_parquet_lines(text, layout, release)
    header = render_header(layout.per_image)
    names = bytes(text[: max(text.find(b"\n"), 0)]).decode("utf-8", "replace").split(",")
    _require_no_others(names, layout)
    body = np.frombuffer(text, np.uint8)[len(header) :]
    columns: dict[str, pa.Array] | None = None
    # Without quotes, each comma separates fields and each line feed ends a row.
    if text.startswith(header) and text.endswith(b"\n") and b'"' not in text:
        columns = _cut_lines(body, layout, release)
    if columns is None:
        columns = _parse_lines(pa.BufferReader(text), layout.per_image, layout, release)
    columns["mjd"] = pc.cast(columns["mjd"], pa.float64())
    return pa.table(columns)


def _require_no_others(names: Iterable[str], layout: Layout) -> None:
    """Raise an error if a table has columns that the light curves would lack."""
    others = [name for name in names if name in PER_IMAGE and name not in layout.per_image]
    if others:
        raise pa.ArrowInvalid(f"it has the column {others[0]}, other tables do not")


def _read_parquet_lines(content: bytearray, layout: Layout, release: str) -> pa.Table:
    _require_no_others(pq.read_schema(pa.BufferReader(content)).names, layout)
    rows = read_parquet(content, layout.per_image)
    columns = {name: rows.column(name).combine_chunks() for name in rows.column_names}
    columns["release"] = release
    if any(columns[name].null_count for name in SORT_KEYS):
        raise pa.ArrowInvalid(f"each row needs {', '.join(SORT_KEYS)}")
    lines = render_lines({name: columns[name] for name in layout.light_curve})
    found = {name: columns[name] for name in SORT_KEYS}
    return pa.table(found | {"line": pc.cast(lines, pa.string())})


def sort_lines(text: bytes | memoryview, layout: Layout) -> bytes:
    """Put the lines of a light curve in order.

    Parameters
    ----------
    text : bytes-like
        The lines, without the header.
    layout : Layout
        Their columns.

    Returns
    -------
    bytes
        The same lines, sorted by `SORT_KEYS`.
    """
    source = pa.BufferReader(render_header(layout.light_curve) + bytes(text))
    found = pa.table(_parse_lines(source, layout.light_curve, layout))
    found = found.set_column(0, "mjd", pc.cast(found["mjd"], pa.float64()))
    # The line itself decides where an exposure appears in two releases.
    order = pc.sort_indices(found, [(name, "ascending") for name in (*SORT_KEYS[1:], "line")])
    return "".join(found["line"].take(order).to_pylist()).encode()


def _parse_lines(
    source: Any, columns: Sequence[str], layout: Layout, release: str = ""
) -> dict[str, pa.Array]:
    """Return the sort keys, and the lines of a light curve, of any CSV with such columns."""
    table = read_text(source, columns)
    texts: dict[str, Any] = {"release": release}
    texts |= {name: table.column(name).combine_chunks() for name in columns}
    lines = render_lines({name: texts[name] for name in layout.light_curve})
    found = {name: texts[name] for name in SORT_KEYS if name in columns} | {"line": lines}
    return {name: pc.cast(column, pa.string()) for name, column in found.items()}


def _cut_lines(body: np.ndarray, layout: Layout, release: str) -> dict[str, pa.Array] | None:
    """Cut the columns of `read_lines` out of rows as `render_lines` makes them, else None."""
    names = layout.per_image
    marks = np.empty((np.count_nonzero(body == LINE_FEED), len(names) + 1), np.int64)
    if not _find_commas(body, marks):
        return None

    def cut(spans: Sequence[tuple[int, int]], beyond: int = 0, end: bytes = b"") -> pa.Array:
        """Join, for each row, the fields of each span, with so many characters behind them."""
        starts = np.stack([marks[:, first] + 1 for first, _ in spans], axis=1)
        stops = np.stack([marks[:, last + 1] + beyond for _, last in spans], axis=1)
        offsets = np.zeros(len(marks) + 1, np.int32)
        np.cumsum((stops - starts).sum(axis=1) + len(end), out=offsets[1:])
        out = np.empty(offsets[-1], np.uint8)
        _copy_pieces(body, starts, stops, np.frombuffer(end, np.uint8), out)
        return pa.StringArray.from_buffers(len(marks), pa.py_buffer(offsets), pa.py_buffer(out))

    found = {name: cut([(names.index(name),) * 2]) for name in SORT_KEYS}
    found["target_id"].validate(full=True)
    *fields, last = layout.light_curve
    assert last == "release", "it is in no table"
    # Each span is copied with the comma behind it.
    body[marks[:, -1]] = COMMA
    end = render_lines({last: pa.array([release])})[0].as_py().encode()
    found["line"] = cut(_find_spans(names, fields), beyond=1, end=end)
    return found


def _find_spans(names: Sequence[str], some: Sequence[str]) -> list[tuple[int, int]]:
    """Return the first and the last index of each run of neighbours among some of the names."""
    spans: list[tuple[int, int]] = []
    for index in map(names.index, some):
        if spans and spans[-1][1] == index - 1:
            spans[-1] = spans[-1][0], index
        else:
            spans.append((index, index))
    return spans


@compiled
def _find_commas(body: np.ndarray, marks: np.ndarray) -> bool:
    """Fill in, for each row, the position before each field and after the last one.

    Returns whether every row has as many fields as `marks` has columns for.
    """
    last = marks.shape[1] - 1
    row = field = 0
    before = -1
    for i in range(len(body)):
        if body[i] == COMMA or body[i] == LINE_FEED:
            if field == 0:
                marks[row, 0] = before
            field += 1
            if field > last:
                return False
            marks[row, field] = i
            if body[i] == LINE_FEED:
                if field != last:
                    return False
                row += 1
                field = 0
                before = i
    return True


@compiled
def _copy_pieces(
    body: np.ndarray, starts: np.ndarray, stops: np.ndarray, last: np.ndarray, out: np.ndarray
) -> None:
    """Copy pieces of `body`, several a row and behind them always `last`, one after the other."""
    end = 0
    for row in range(starts.shape[0]):
        for piece in range(starts.shape[1]):
            shift = starts[row, piece] - end
            stop = stops[row, piece] - shift
            for i in range(end, stop):
                out[i] = body[i + shift]
            end = stop
        for i in range(len(last)):
            out[end + i] = last[i]
        end += len(last)
