"""A table as it was given, before its columns are found and its rows are checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

__all__ = ["ArrowTable", "RawTable", "flatten", "to_arrow_list"]


class RawTable(ABC):
    """Columns by their position, because names can occur twice.

    Parameters
    ----------
    names : sequence of str
        Names of the columns.
    units : mapping of int to str, optional
        Units of columns, where the table states them.

    Attributes
    ----------
    names : tuple of str
        As given.
    units : dict of int to str
        As given.
    malformed : dict of int to str
        Lines of a text that are no rows, with the reason, after `read` was told to skip them.
    warnings : list of str
        What the user should know of the table, after `read`.
    """

    def __init__(self, names: Sequence[str], units: Mapping[int, str] | None = None) -> None:
        self.names = tuple(names)
        self.units = dict(units or {})
        self.malformed: dict[int, str] = {}
        self.warnings: list[str] = []

    @abstractmethod
    def read(
        self, columns: Collection[int], numbers: Collection[int], *, skip_malformed: bool = False
    ) -> dict[int, pa.Array]:
        """Read columns.

        Parameters
        ----------
        columns : collection of int
            Positions of the columns.
        numbers : collection of int
            Those of them that are numbers rather than text, if they can be read so.
        skip_malformed : bool
            Leave out lines of a text that are no rows, rather than refuse the file.

        Returns
        -------
        dict of int to pyarrow array
            Of any type, with nulls for missing values.

        Raises
        ------
        CatalogueError
            If a column cannot be read.
        """

    def find_lines(self, rows: Collection[int]) -> dict[int, int]:
        """Find where rows are in a text.

        Parameters
        ----------
        rows : collection of int
            0 for the first.

        Returns
        -------
        dict of int to int
            Line by row, 1 for the first line; empty for what is no text.
        """
        return {}


class ArrowTable(RawTable):
    """A table of Arrow.

    Parameters
    ----------
    table : pyarrow.Table
        The table.
    units : mapping of int to str, optional
        Units of columns.
    """

    def __init__(self, table: pa.Table, units: Mapping[int, str] | None = None) -> None:
        super().__init__(table.column_names, units)
        self._table = table

    def read(
        self, columns: Collection[int], numbers: Collection[int], *, skip_malformed: bool = False
    ) -> dict[int, pa.Array]:
        """See `RawTable.read`."""
        return {i: flatten(self._table.column(i)) for i in columns}


def flatten(column: pa.ChunkedArray) -> pa.Array:
    """Return a column in one piece.

    Parameters
    ----------
    column : pyarrow.ChunkedArray
        Of any type.

    Returns
    -------
    pyarrow.Array
        Its values, without a dictionary.
    """
    array = column.combine_chunks()
    # A column without chunks, and one of several, may come back as one of chunks.
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def to_arrow_list(items: list[Any]) -> pa.Array:
    """Return values of any kind as Arrow.

    Parameters
    ----------
    items : list
        None and numpy's masked value stand for missing ones.

    Returns
    -------
    pyarrow array
        Of texts, if the values are of several kinds.
    """
    items = [None if v is np.ma.masked else v for v in items]
    try:
        found = pa.array(items, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        found = None
    is_plain = found is not None and not pa.types.is_nested(found.type)
    # Integers beside floating-point numbers, and the like, would be converted.
    kinds = {type(v) for v in items if v is not None}
    if is_plain and len(kinds) <= 1:
        return found
    return pa.array([_as_str(v) for v in items], pa.large_string())


def _as_str(value: Any) -> str | None:
    if value is None or value != value:
        return None
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
