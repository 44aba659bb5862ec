"""The tables a run writes: their columns, and the way to and from CSV.

Numbers are written with the fewest digits that read back to the same double, missing
values are empty, text is quoted where CSV needs it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

TEXT = ("target_id", "obs_id", "band", "filename")
PER_IMAGE = (
    "target_id",
    "ra",
    "dec",
    "obs_id",
    "band",
    "mjd",
    "x",
    "y",
    "flux",
    "flux_error",
    "mag_ab",
    "mag_ab_error",
    "wavelength",
    "bandwidth",
    "flag",
    "bg_level",
    "bg_error",
    "aperture_radius",
    "filename",
)
LIGHT_CURVE = tuple(c for c in PER_IMAGE if c not in ("target_id", "ra", "dec", "filename"))
# Total order of the rows of a light curve.
SORT_KEYS = ("target_id", "mjd", "obs_id", "band")

# One block a table: with line feeds in quoted ids, blocks cannot be cut apart anyway.
BLOCK_BYTES = 1 << 26

SCHEMA = pa.schema(
    [
        (c, pa.string() if c in TEXT else pa.int64() if c == "flag" else pa.float64())
        for c in PER_IMAGE
    ]
)


def csv_lines(columns: Mapping[str, pa.Array | np.ndarray]) -> pa.Array:
    """Render rows as CSV, each with its line feed.

    Parameters
    ----------
    columns : mapping of str to (n,) array
        Text, integers or floats; NaN and null are missing. A number may be given as the
        text that it is to be written as.

    Returns
    -------
    (n,) pyarrow large_string array
        One line a row, so that any run of rows can be cut out as bytes.
    """
    texts = [_as_text(pa.array(column), name in TEXT) for name, column in columns.items()]
    texts[-1] = _joined(texts[-1], _scalar("\n"), separator="")
    return _joined(*texts, separator=",")


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
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    column = pc.fill_null(pc.cast(column, pa.large_string()), "")
    if may_need_quotes:
        special = pc.match_substring_regex(column, '[",\r\n]')
        if pc.any(special).as_py():
            doubled = pc.replace_substring(column, '"', '""')
            quoted = _joined(_scalar('"'), doubled, _scalar('"'), separator="")
            column = pc.if_else(special, quoted, column)
    return column


def read_csv(source, columns=PER_IMAGE) -> pa.Table:
    """Read columns of a table, from a path or a file, with their types; ids stay text."""
    return _read(source, pa.schema([SCHEMA.field(name) for name in columns]))


def read_lines(path: str | os.PathLike) -> pa.Table:
    """Read a per-image table for regrouping: what orders its rows, and their text.

    Returns
    -------
    pyarrow.Table
        The columns `SORT_KEYS`, and ``line``: the row's line in a light curve, to the
        letter as it stands in the table, with its line feed.
    """
    texts = _read(path, pa.schema([(name, pa.large_string()) for name in PER_IMAGE]))
    columns = {name: texts.column(name).combine_chunks() for name in PER_IMAGE}
    return pa.table(
        {
            "target_id": pc.cast(columns["target_id"], pa.string()),
            "mjd": pc.cast(columns["mjd"], pa.float64()),
            "obs_id": pc.cast(columns["obs_id"], pa.string()),
            "band": pc.cast(columns["band"], pa.string()),
            "line": pc.cast(csv_lines({name: columns[name] for name in LIGHT_CURVE}), pa.string()),
        }
    )


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
