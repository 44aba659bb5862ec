"""The per-image table: what was measured in one frame, as a file."""

from __future__ import annotations

import zlib

import pyarrow as pa
import pyarrow.compute as pc

from spxdask.tables.csv import Columns, nan_as_null, render_header, render_lines, slice_lines
from spxdask.tables.metadata import parquet_metadata
from spxdask.tables.parquet import encode_parquet
from spxdask.tables.provenance import Provenance
from spxdask.tables.schema import SCHEMA

__all__ = ["encode_rows", "hash_table"]

TITLE = "photometry of the sources on one SPHEREx frame"


def encode_rows(columns: Columns, format: str, provenance: Provenance | None = None) -> bytes:
    """Return rows as a whole file.

    Parameters
    ----------
    columns : mapping of str to (n,) array or to one value for all rows
        The columns of a `Layout`, in their order; see `spxdask.tables.csv.render_lines`.
    format : str
        ``csv`` or ``parquet``.
    provenance : Provenance, optional
        How they were made, which Parquet files say beside units and meanings.

    Returns
    -------
    bytes
        The file.
    """
    if format == "csv":
        return render_header(columns) + slice_lines(render_lines(columns))
    n = max(len(column) for column in columns.values() if not isinstance(column, str | float))
    arrays = {}
    for name, column in columns.items():
        array = pa.repeat(column, n) if isinstance(column, str | float) else pa.array(column)
        arrays[name] = pc.cast(nan_as_null(array), SCHEMA.field(name).type)
    schema = pa.schema([field for field in SCHEMA if field.name in arrays])
    metadata = parquet_metadata(tuple(schema.names), provenance or Provenance(), TITLE)
    return encode_parquet(pa.table(arrays, schema=schema), metadata)


def hash_table(content: bytes | bytearray | memoryview) -> str:
    """Return a checksum of a table, which tells it from another of the same length.

    Parameters
    ----------
    content : bytes
        The file.

    Returns
    -------
    str
        Its CRC-32 as eight hexadecimal digits.
    """
    return f"{zlib.crc32(content):08x}"
