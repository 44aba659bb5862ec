"""Tables as Parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spxdask.tables.schema import SCHEMA

__all__ = ["PARQUET_MARK", "encode_parquet", "read_parquet"]

# Rows that a reader of a light-curve dataset gets at least: those of some thousand sources.
ROW_GROUP = 100_000
# The first bytes of a Parquet file.
PARQUET_MARK = b"PAR1"


def encode_parquet(table: pa.Table, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a table as a Parquet file.

    Parameters
    ----------
    table : pyarrow.Table
        Any table.
    metadata : mapping of str to str, optional
        What the file says of itself. The schema of the table is then not stored a second time,
        with which Arrow would repeat all of it: texts and numbers need none.

    Returns
    -------
    bytes
        With checksums of its pages.
    """
    out = pa.BufferOutputStream()
    with pq.ParquetWriter(
        out,
        table.schema,
        compression="zstd",
        write_page_checksum=True,
        store_schema=metadata is None,
    ) as writer:
        writer.write_table(table, row_group_size=ROW_GROUP)
        if metadata is not None:
            writer.add_key_value_metadata({**metadata, **_measure_texts(table)})
    return out.getvalue().to_pybytes()


def _measure_texts(table: pa.Table) -> dict[str, str]:
    """Return the lengths of the longest texts, without which astropy warns."""
    texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
    longest = {name: pc.max(pc.utf8_length(table[name])).as_py() for name in texts}
    return {f"table::len::{name}": str(length or 1) for name, length in longest.items()}


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
