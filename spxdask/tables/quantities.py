"""Tables with units, descriptions and UCDs for astropy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from spxdask.tables.schema import COLUMNS

if TYPE_CHECKING:
    from astropy.table import QTable

__all__ = ["ROW_MEANINGS", "Meaning", "make_qtable"]


class Meaning(NamedTuple):
    """What a column is.

    Attributes
    ----------
    unit : str
        As `astropy.units` reads it; empty for none.
    description : str
        For people.
    ucd : str
        In the words of the IVOA; empty if there is none.
    """

    unit: str
    description: str
    ucd: str = ""


# Of the columns that a run writes, by name.
ROW_MEANINGS = {c.name: Meaning(c.unit, c.description, c.ucd) for c in COLUMNS}


def make_qtable(
    columns: pa.Table | Mapping[str, Any],
    meanings: Mapping[str, Meaning],
    meta: Mapping[str, Any] | None = None,
) -> QTable:
    """Return a table whose columns know their units.

    Parameters
    ----------
    columns : pyarrow.Table or mapping of str to (n,) array
        Numbers and text. A missing float is NaN; other missing values are masked.
    meanings : mapping of str to Meaning
        Of the columns that have one.
    meta : mapping, optional
        Of the table.

    Returns
    -------
    astropy.table.QTable
        Floats with a unit are quantities. The UCD of a column is in its ``info.meta["ucd"]``.
    """
    from astropy.table import QTable

    names = columns.column_names if isinstance(columns, pa.Table) else list(columns)
    table = QTable({name: _read(columns[name]) for name in names}, meta=dict(meta or {}))
    for name in names:
        meaning = meanings.get(name)
        if meaning is None:
            continue
        if meaning.unit:
            # A column of floats becomes a quantity by this.
            table[name] = table[name] * _parse_unit(meaning.unit)
        table[name].info.description = meaning.description
        if meaning.ucd:
            table[name].info.meta = {"ucd": meaning.ucd}
    return table


def _parse_unit(text: str) -> Any:
    from astropy import units

    return units.Unit(text)


def _read(column: Any) -> Any:
    """Return a column as an array; masked where something other than a float is missing."""
    if not isinstance(column, pa.Array | pa.ChunkedArray):
        return column
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        values = np.array([text or "" for text in column.to_pylist()], str)
    elif pa.types.is_floating(kind):
        return column.to_numpy(zero_copy_only=False) if _is_array(column) else column.to_numpy()
    else:
        values = column.fill_null(False if pa.types.is_boolean(kind) else 0)
        values = np.array(values.to_numpy(zero_copy_only=False) if _is_array(values) else values)
    if not column.null_count:
        return values
    missing = column.is_null()
    return np.ma.array(values, mask=np.asarray(missing))


def _is_array(column: Any) -> bool:
    return isinstance(column, pa.Array)
