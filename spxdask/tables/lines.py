"""Rows of per-image tables as lines of light curves: read, and put in order.

Rows are regrouped as the text of their lines, so that no number is parsed and rendered
again, and a light curve has the digits of the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spxdask.science.compiled import compiled
from spxdask.tables.csv import read_text, render_header, render_lines
from spxdask.tables.parquet import PARQUET_MARK, read_parquet
from spxdask.tables.schema import LIGHT_CURVE, PER_IMAGE, SORT_KEYS

__all__ = ["read_lines", "sort_lines"]

COMMA = ord(",")
LINE_FEED = ord("\n")


def read_lines(text: bytearray) -> pa.Table:
    """Read a per-image table for regrouping: the sort keys of its rows, and their text.

    Parameters
    ----------
    text : bytearray
        The file, CSV or Parquet; it is overwritten.

    Returns
    -------
    pyarrow.Table
        The columns `SORT_KEYS`, and ``line``: the row's line in a light curve with its line
        feed, exactly as it stands, or would stand, in a CSV table.

    Raises
    ------
    pyarrow.ArrowException
        If it is no such table, or a row has no sort key.
    KeyError
        If a Parquet file lacks a column.
    """
    if text.startswith(PARQUET_MARK):
        return _read_parquet_lines(text)
    header = render_header(PER_IMAGE)
    body = np.frombuffer(text, np.uint8)[len(header) :]
    columns: dict[str, pa.Array] | None = None
    # Without quotes, each comma separates fields and each line feed ends a row.
    if text.startswith(header) and text.endswith(b"\n") and b'"' not in text:
        columns = _cut_lines(body)
    if columns is None:
        columns = _parse_lines(pa.BufferReader(text), PER_IMAGE)
    columns["mjd"] = pc.cast(columns["mjd"], pa.float64())
    return pa.table(columns)


def _read_parquet_lines(content: bytearray) -> pa.Table:
    rows = read_parquet(content, ("target_id", *LIGHT_CURVE))
    columns = {name: rows.column(name).combine_chunks() for name in rows.column_names}
    if any(columns[name].null_count for name in SORT_KEYS):
        raise pa.ArrowInvalid(f"each row needs {', '.join(SORT_KEYS)}")
    lines = render_lines({name: columns[name] for name in LIGHT_CURVE})
    found = {name: columns[name] for name in SORT_KEYS}
    return pa.table(found | {"line": pc.cast(lines, pa.string())})


def sort_lines(text: bytes | memoryview) -> bytes:
    """Put the lines of a light curve in order.

    Parameters
    ----------
    text : bytes-like
        The lines, without the header.

    Returns
    -------
    bytes
        The same lines, sorted by `SORT_KEYS`.
    """
    source = pa.BufferReader(render_header(LIGHT_CURVE) + bytes(text))
    found = pa.table(_parse_lines(source, LIGHT_CURVE))
    found = found.set_column(0, "mjd", pc.cast(found["mjd"], pa.float64()))
    # The line itself decides where an exposure appears in two releases.
    order = pc.sort_indices(found, [(name, "ascending") for name in (*SORT_KEYS[1:], "line")])
    return "".join(found["line"].take(order).to_pylist()).encode()


def _parse_lines(source: Any, columns: Sequence[str]) -> dict[str, pa.Array]:
    """Return the sort keys, and the lines of a light curve, of any CSV with such columns."""
    table = read_text(source, columns)
    texts = {name: table.column(name).combine_chunks() for name in columns}
    lines = render_lines({name: texts[name] for name in LIGHT_CURVE})
    found = {name: texts[name] for name in SORT_KEYS if name in columns} | {"line": lines}
    return {name: pc.cast(column, pa.string()) for name, column in found.items()}


def _cut_lines(body: np.ndarray) -> dict[str, pa.Array] | None:
    """Cut the columns of `read_lines` out of rows as `render_lines` makes them, else None."""
    marks = np.empty((np.count_nonzero(body == LINE_FEED), len(PER_IMAGE) + 1), np.int64)
    if not _find_commas(body, marks):
        return None

    def between(first: str, last: str, beyond: int = 0) -> pa.Array:
        starts, stops = marks[:, PER_IMAGE.index(first)], marks[:, PER_IMAGE.index(last) + 1]
        offsets = np.zeros(len(marks) + 1, np.int32)
        np.cumsum(stops - starts - 1 + beyond, out=offsets[1:])
        out = np.empty(offsets[-1], np.uint8)
        _copy_pieces(body, starts + 1, offsets, out)
        return pa.StringArray.from_buffers(len(marks), pa.py_buffer(offsets), pa.py_buffer(out))

    found = {name: between(name, name) for name in SORT_KEYS}
    found["target_id"].validate(full=True)
    # The columns of a light curve are adjacent; the comma behind them becomes the line feed.
    body[marks[:, PER_IMAGE.index(LIGHT_CURVE[-1]) + 1]] = LINE_FEED
    found["line"] = between(LIGHT_CURVE[0], LIGHT_CURVE[-1], beyond=1)
    return found


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
    body: np.ndarray, starts: np.ndarray, offsets: np.ndarray, out: np.ndarray
) -> None:
    """Copy pieces of `body`, which begin at `starts`, one after the other."""
    for row in range(len(starts)):
        shift = starts[row] - offsets[row]
        for i in range(offsets[row], offsets[row + 1]):
            out[i] = body[i + shift]
