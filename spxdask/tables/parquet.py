"""Tables as Parquet."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from spxdask.tables.schema import SCHEMA

__all__ = ["PARQUET_MARK", "encode_parquet", "read_parquet"]

# Rows that a reader of a light-curve dataset gets at least: those of some thousand sources.
ROW_GROUP = 100_000
# The first bytes of a Parquet file.
PARQUET_MARK = b"PAR1"


def encode_parquet(table: pa.Table) -> bytes:
    """Return a table as a Parquet file.

    Parameters
    ----------
    table : pyarrow.Table
        Any table.

    Returns
    -------
    bytes
        With checksums of its pages.
    """
    out = pa.BufferOutputStream()
    pq.write_table(
        table, out, row_group_size=ROW_GROUP, compression="zstd", write_page_checksum=True
    )
    return out.getvalue().to_pybytes()


def read_parquet(content: bytes | bytearray, columns: Sequence[str]) -> pa.Table:
    """Read columns of a Parquet file with the types of the schema.

    Parameters
    ----------
    content : bytes or bytearray
        The file.
    columns : sequence of str
        Names of the columns.

    Returns
    -------
    pyarrow.Table
        These columns in this order.

    Raises
    ------
    KeyError
        If there is no such column.
    pyarrow.ArrowException
        If the file is damaged.
    """
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    rows = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    return rows.select(schema.names).cast(schema)
