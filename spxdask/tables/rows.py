"""The tables a run writes: their columns, and the way to and from CSV.

Numbers are written with the fewest digits that read back to the same double, missing
values are empty, text is quoted where CSV needs it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from spxdask.science.compiled import compiled
from spxdask.science.photometry import MEASURED

TEXT = ("target_id", "obs_id", "band", "filename")
PER_IMAGE = ("target_id", "ra", "dec", "obs_id", "band", "mjd", *MEASURED, "filename")
LIGHT_CURVE = tuple(c for c in PER_IMAGE if c not in ("target_id", "ra", "dec", "filename"))
# Total order of the rows of a light curve.
SORT_KEYS = ("target_id", "mjd", "obs_id", "band")

# One block a table: with line feeds in quoted ids, blocks cannot be cut apart anyway.
BLOCK_BYTES = 1 << 26
# Rows that a reader of a light-curve dataset gets at least: some thousand sources.
ROW_GROUP = 100_000
PARQUET_MARK = b"PAR1"

SCHEMA = pa.schema(
    [
        (c, pa.string() if c in TEXT else pa.int64() if c == "flag" else pa.float64())
        for c in PER_IMAGE
    ]
)


def csv_lines(columns: Mapping[str, pa.Array | np.ndarray | str | float]) -> pa.Array:
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
    for name, column in columns.items():
        one = isinstance(column, str | float)
        text = _as_text(pa.array([column] if one else column), name in TEXT)
        text = text[0].as_py() if one else text
        # Neighbours that are the same in all rows are joined once.
        if one and pieces and isinstance(pieces[-1], str):
            pieces[-1] += f",{text}"
        else:
            pieces.append(text)
    last = pieces.pop()
    last = f"{last}\n" if isinstance(last, str) else _joined(last, _scalar("\n"), separator="")
    texts = [_scalar(p) if isinstance(p, str) else p for p in (*pieces, last)]
    return _joined(*texts, separator=",")


def to_bytes(columns: Mapping[str, pa.Array | np.ndarray | str | float], format: str) -> bytes:
    """Return rows as a whole CSV or Parquet file; see `csv_lines` for what they may be."""
    if format == "csv":
        return csv_header(PER_IMAGE) + lines_to_bytes(csv_lines(columns))
    n = max(len(c) for c in columns.values() if not isinstance(c, str | float))
    arrays = {}
    for name, column in columns.items():
        array = pa.repeat(column, n) if isinstance(column, str | float) else pa.array(column)
        arrays[name] = pc.cast(_nan_as_null(array), SCHEMA.field(name).type)
    return parquet_bytes(pa.table(arrays, schema=SCHEMA))


def parquet_bytes(table: pa.Table) -> bytes:
    """Return a table as a Parquet file."""
    out = pa.BufferOutputStream()
    pq.write_table(
        table, out, row_group_size=ROW_GROUP, compression="zstd", write_page_checksum=True
    )
    return out.getvalue().to_pybytes()


def csv_header(names) -> bytes:
    """Return the header line of a table."""
    return (",".join(names) + "\n").encode()


def lines_to_bytes(lines: pa.Array, start: int = 0, stop: int | None = None) -> memoryview:
    """Return the bytes of lines `start` to `stop` without a copy."""
    stop = len(lines) if stop is None else stop
    offsets = np.frombuffer(lines.buffers()[1], np.int64)[lines.offset :]
    return memoryview(lines.buffers()[2] or b"")[offsets[start] : offsets[stop]]


def _scalar(text: str) -> pa.Scalar:
    return pa.scalar(text, pa.large_string())


def _joined(*texts: pa.Array | pa.Scalar, separator: str) -> pa.Array:
    return pc.binary_join_element_wise(*texts, _scalar(separator))


def _as_text(column: pa.Array, may_need_quotes: bool) -> pa.Array:
    # Each look at a column costs as much as some rows.
    column = pc.cast(_nan_as_null(column), pa.large_string())
    if column.null_count:
        column = pc.fill_null(column, "")
    if may_need_quotes:
        # Hardly any text has to be quoted, and to look through all of it at once is quick.
        content = bytes(column.buffers()[2] or b"")
        if any(mark in content for mark in (b'"', b",", b"\r", b"\n")):
            special = pc.match_substring_regex(column, '[",\r\n]')
            doubled = pc.replace_substring(column, '"', '""')
            quoted = _joined(_scalar('"'), doubled, _scalar('"'), separator="")
            column = pc.if_else(special, quoted, column)
    return column


def _nan_as_null(column: pa.Array) -> pa.Array:
    if not pa.types.is_floating(column.type):
        return column
    values = column.to_numpy(zero_copy_only=False)
    missing = np.isnan(values)
    return pa.array(values, mask=missing) if missing.any() else column


def read_csv(source, columns=PER_IMAGE) -> pa.Table:
    """Read columns of a table, from a path or a file, with their types; ids stay text."""
    return _read(source, pa.schema([SCHEMA.field(name) for name in columns]))


def read_lines(text: bytearray) -> pa.Table:
    """Read a per-image table for regrouping: what orders its rows, and their text.

    Parameters
    ----------
    text : bytearray
        The file, CSV or Parquet; written over.

    Returns
    -------
    pyarrow.Table
        The columns `SORT_KEYS`, and ``line``: the row's line in a light curve with its line
        feed, to the letter as it stands, or would stand, in a CSV table.
    """
    if text.startswith(PARQUET_MARK):
        schema = pa.schema([SCHEMA.field(name) for name in ("target_id", *LIGHT_CURVE)])
        rows = pq.read_table(pa.BufferReader(text), page_checksum_verification=True)
        rows = rows.select(schema.names).cast(schema)
        columns = {name: rows.column(name).combine_chunks() for name in schema.names}
        if any(columns[name].null_count for name in SORT_KEYS):
            raise pa.ArrowInvalid(f"each row needs {', '.join(SORT_KEYS)}")
        lines = csv_lines({name: columns[name] for name in LIGHT_CURVE})
        found = {name: columns[name] for name in SORT_KEYS}
        return pa.table(found | {"line": pc.cast(lines, pa.string())})
    header = csv_header(PER_IMAGE)
    body = np.frombuffer(text, np.uint8)[len(header) :]
    columns = None
    # Without quotes, a comma is a comma and a line feed the end of a row.
    if text.startswith(header) and text.endswith(b"\n") and b'"' not in text:
        columns = _cut_lines(body)
    if columns is None:
        columns = _parse_lines(pa.BufferReader(text), PER_IMAGE)
    columns["mjd"] = pc.cast(columns["mjd"], pa.float64())
    return pa.table(columns)


def sort_lines(text: bytes | memoryview) -> bytes:
    """Put the lines of a light curve, without its header, in order."""
    source = pa.BufferReader(csv_header(LIGHT_CURVE) + bytes(text))
    found = pa.table(_parse_lines(source, LIGHT_CURVE))
    found = found.set_column(0, "mjd", pc.cast(found["mjd"], pa.float64()))
    # By the line itself where an exposure is there in two releases.
    order = pc.sort_indices(found, [(name, "ascending") for name in (*SORT_KEYS[1:], "line")])
    return "".join(found["line"].take(order).to_pylist()).encode()


def _parse_lines(source, columns: Sequence[str]) -> dict[str, pa.Array]:
    """Find the sort keys, and the lines of a light curve, in any CSV with such columns."""
    texts = _read(source, pa.schema([(name, pa.large_string()) for name in columns]))
    texts = {name: texts.column(name).combine_chunks() for name in columns}
    lines = csv_lines({name: texts[name] for name in LIGHT_CURVE})
    found = {name: texts[name] for name in SORT_KEYS if name in columns} | {"line": lines}
    return {name: pc.cast(column, pa.string()) for name, column in found.items()}


def _cut_lines(body: np.ndarray) -> dict[str, pa.Array] | None:
    """Cut the columns of `read_lines` out of rows as we write them; None if they are not so."""
    marks = np.empty((np.count_nonzero(body == ord("\n")), len(PER_IMAGE) + 1), np.int64)
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
    # A light curve's columns stand side by side; the comma behind them becomes the line feed.
    body[marks[:, PER_IMAGE.index(LIGHT_CURVE[-1]) + 1]] = ord("\n")
    found["line"] = between(LIGHT_CURVE[0], LIGHT_CURVE[-1], beyond=1)
    return found


@compiled
def _find_commas(body, marks):
    """Fill in, for each row, what stands before each field and after the last.

    Returns whether every row has as many fields as `marks` has room for.
    """
    last = marks.shape[1] - 1
    row = field = 0
    before = -1
    for i in range(len(body)):
        if body[i] == 44 or body[i] == 10:
            if field == 0:
                marks[row, 0] = before
            field += 1
            if field > last:
                return False
            marks[row, field] = i
            if body[i] == 10:
                if field != last:
                    return False
                row += 1
                field = 0
                before = i
    return True


@compiled
def _copy_pieces(body, starts, offsets, out):
    """Copy pieces of `body`, from `starts` on, one behind the other."""
    for row in range(len(starts)):
        shift = starts[row] - offsets[row]
        for i in range(offsets[row], offsets[row + 1]):
            out[i] = body[i + shift]


def _read(source, schema: pa.Schema) -> pa.Table:
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
