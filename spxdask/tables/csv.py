"""Tables as CSV.

Numbers are written with the fewest digits that read back to the same double, missing
values are empty, text is quoted where CSV needs it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from spxdask.tables.schema import PER_IMAGE, SCHEMA, TEXT

__all__ = [
    "Columns",
    "nan_as_null",
    "read_csv",
    "read_text",
    "render_header",
    "render_lines",
    "slice_lines",
]

# Rows by column: arrays of one length, or one value for all rows.
Columns = Mapping[str, "pa.Array | np.ndarray | str | float"]

# Bytes that are parsed at once. One block is a whole table: with line feeds in quoted ids,
# blocks cannot be separated before they are parsed.
BLOCK_BYTES = 1 << 26


def render_lines(columns: Columns) -> pa.Array:
    """Render rows as CSV, each with its line feed.

    Parameters
    ----------
    columns : mapping of str to (n,) array or to one value for all rows
        Text, integers or floats; NaN and null are missing. A number may be given as the
        text that it is to be written as. At least one column is an array.

    Returns
    -------
    (n,) pyarrow large_string array
        One line a row, so that any run of rows can be cut out as bytes.
    """
    pieces: list[pa.Array | str] = []
    reals = _render_reals(columns)
    for name, column in columns.items():
        is_one = isinstance(column, str | float)
        if name in reals:
            text = reals[name]
        else:
            text = _render_column(pa.array([column] if is_one else column), name in TEXT)
        text = text[0].as_py() if is_one else text
        # Neighbours that are the same in all rows are joined once.
        if is_one and pieces and isinstance(pieces[-1], str):
            pieces[-1] += f",{text}"
        else:
            pieces.append(text)
    last = pieces.pop()
    last = f"{last}\n" if isinstance(last, str) else _join(last, _scalar("\n"), separator="")
    texts = [_scalar(p) if isinstance(p, str) else p for p in (*pieces, last)]
    return _join(*texts, separator=",")


def render_header(names: Iterable[str]) -> bytes:
    """Return the header line of a table.

    Parameters
    ----------
    names : iterable of str
        Of its columns.

    Returns
    -------
    bytes
        With a line feed.
    """
    return (",".join(names) + "\n").encode()


def slice_lines(lines: pa.Array, start: int = 0, stop: int | None = None) -> memoryview:
    """Return the bytes of a run of lines without a copy.

    Parameters
    ----------
    lines : (n,) pyarrow large_string array
        As `render_lines` makes them.
    start, stop : int, optional
        First line, and the one behind the last; default: all.

    Returns
    -------
    memoryview
        One line after the other.
    """
    stop = len(lines) if stop is None else stop
    offsets = np.frombuffer(lines.buffers()[1], np.int64)[lines.offset :]
    return memoryview(lines.buffers()[2] or b"")[offsets[start] : offsets[stop]]


def read_csv(source: Any, columns: Sequence[str] = PER_IMAGE) -> pa.Table:
    """Read columns of a table with the types of the schema.

    Parameters
    ----------
    source : path or file
        The table; a path is local.
    columns : sequence of str, optional
        Names of the columns; default: all of a per-image table.

    Returns
    -------
    pyarrow.Table
        These columns in this order; ids are text, missing numbers are null.
    """
    return _read(source, pa.schema([SCHEMA.field(name) for name in columns]))


def read_text(source: Any, columns: Sequence[str]) -> pa.Table:
    """Read columns of a table as text, to the letter.

    Parameters
    ----------
    source : path or file
        The table; a path is local.
    columns : sequence of str
        Names of the columns.

    Returns
    -------
    pyarrow.Table
        These columns in this order, as large strings without nulls.
    """
    return _read(source, pa.schema([(name, pa.large_string()) for name in columns]))


def nan_as_null(column: pa.Array) -> pa.Array:
    """Replace NaN by null.

    Parameters
    ----------
    column : pyarrow array
        Of any type.

    Returns
    -------
    pyarrow array
        The same array where there is no NaN.
    """
    if not pa.types.is_floating(column.type):
        return column
    values = column.to_numpy(zero_copy_only=False)
    missing = np.isnan(values)
    return pa.array(values, mask=missing) if missing.any() else column


def _render_reals(columns: Columns) -> dict[str, pa.Array]:
    """Render numpy's columns of floats together: each call costs as much as some hundred values."""
    found = {
        name: column
        for name, column in columns.items()
        if isinstance(column, np.ndarray) and column.dtype == np.float64
    }
    if not found:
        return {}
    text = _render_column(pa.array(np.concatenate(list(found.values()))), False)
    n = len(text) // len(found)
    return {name: text.slice(k * n, n) for k, name in enumerate(found)}


def _render_column(column: pa.Array, may_need_quotes: bool) -> pa.Array:
    # Each pass over a column costs as much as some rows.
    column = pc.cast(nan_as_null(column), pa.large_string())
    if column.null_count:
        column = pc.fill_null(column, "")
    if may_need_quotes:
        # Hardly any text must be quoted, and one search through all of it is quick.
        content = bytes(column.buffers()[2] or b"")
        if any(mark in content for mark in (b'"', b",", b"\r", b"\n")):
            special = pc.match_substring_regex(column, '[",\r\n]')
            doubled = pc.replace_substring(column, '"', '""')
            quoted = _join(_scalar('"'), doubled, _scalar('"'), separator="")
            column = pc.if_else(special, quoted, column)
    return column


def _scalar(text: str) -> pa.Scalar:
    return pa.scalar(text, pa.large_string())


def _join(*texts: pa.Array | pa.Scalar, separator: str) -> pa.Array:
    return pc.binary_join_element_wise(*texts, _scalar(separator))


def _read(source: Any, schema: pa.Schema) -> pa.Table:
    text_only = all(pa.types.is_large_string(field.type) for field in schema)
    return pa_csv.read_csv(
        os.fspath(source) if isinstance(source, str | os.PathLike) else source,
        read_options=pa_csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            column_types=schema,
            include_columns=schema.names,
            null_values=[] if text_only else [""],
            strings_can_be_null=False,
        ),
    )
