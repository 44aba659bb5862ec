"""Catalogues that are given as objects of Python rather than as files."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pyarrow as pa

from spxdask.errors import CatalogueError
from spxdask.tables.catalogue.choices import CatalogueColumns
from spxdask.tables.catalogue.raw import ArrowTable, RawTable, flatten, to_arrow_list

__all__ = ["GivenCatalogue", "is_catalogue"]


def is_catalogue(value: Any) -> bool:
    """Return whether an object can be given as a catalogue.

    Parameters
    ----------
    value : object
        Anything.

    Returns
    -------
    bool
        True for tables of astropy, pandas, Arrow, polars, Dask and pyvo, for structured arrays
        of numpy, and for SkyCoord. No library is imported.
    """
    return isinstance(value, GivenCatalogue) or any(
        test(value) for test in (_is_coordinates, _is_astropy, _is_pandas, _is_array, _is_others)
    )


class GivenCatalogue:
    """A catalogue that was given as an object.

    Parameters
    ----------
    value : object
        Something that `is_catalogue`. It is not copied.
    """

    def __init__(self, value: Any) -> None:
        self._value = value

    def __repr__(self) -> str:
        return f"<{type(self._value).__name__}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GivenCatalogue) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)

    def open(self, choice: CatalogueColumns) -> RawTable:
        """Open it as a table.

        Parameters
        ----------
        choice : CatalogueColumns
            Decides how positions are to be found.

        Returns
        -------
        RawTable

        Raises
        ------
        CatalogueError
            If it cannot be opened.
        """
        value = self._value
        if _is_pandas(value):
            return _PandasTable(value)
        if _is_coordinates(value) or _is_astropy(value) or _is_array(value):
            from astropy.table import Table

            from spxdask.tables.catalogue.astropy_table import AstropyTable, open_coordinates

            if _is_coordinates(value):
                return open_coordinates(value)
            return AstropyTable(Table(value, copy=False), choice)
        if hasattr(value, "__arrow_c_stream__"):
            return ArrowTable(pa.table(value))
        if hasattr(value, "to_table"):
            # The answers of pyvo, and datasets of Arrow.
            return GivenCatalogue(value.to_table()).open(choice)
        return GivenCatalogue(value.compute()).open(choice)


class _PandasTable(RawTable):
    """A DataFrame; an index with a name is a column as well."""

    def __init__(self, frame: Any) -> None:
        named = [name for name in frame.index.names if name is not None]
        fresh = [name for name in named if name not in frame.columns]
        self._columns = [frame.index.get_level_values(name) for name in fresh]
        self._columns += [frame.iloc[:, i] for i in range(frame.shape[1])]
        super().__init__([str(name) for name in (*fresh, *frame.columns)])

    def read(
        self, columns: Collection[int], numbers: Collection[int], *, skip_malformed: bool = False
    ) -> dict[int, pa.Array]:
        """See `RawTable.read`."""
        return {i: self._to_arrow(i) for i in columns}

    def _to_arrow(self, i: int) -> pa.Array:
        column = self._columns[i]
        if column.dtype.kind == "O":
            return to_arrow_list([None if _is_null(v) else v for v in column])
        try:
            found = pa.array(column, from_pandas=True)
        except (pa.ArrowException, TypeError) as error:
            raise CatalogueError(f"the column {self.names[i]} cannot be read: {error}") from error
        return flatten(found if isinstance(found, pa.ChunkedArray) else pa.chunked_array([found]))


def _is_null(value: Any) -> bool:
    # NaN and NaT differ from themselves; the comparison of pandas.NA has no truth.
    return value is None or type(value).__name__ == "NAType" or bool(value != value)


def _library(value: Any) -> set[str]:
    return {base.__module__.partition(".")[0] for base in type(value).__mro__}


def _is_coordinates(value: Any) -> bool:
    names = {base.__name__ for base in type(value).__mro__}
    return "astropy" in _library(value) and bool(names & {"SkyCoord", "BaseCoordinateFrame"})


def _is_astropy(value: Any) -> bool:
    return "astropy" in _library(value) and hasattr(value, "colnames") and hasattr(value, "columns")


def _is_pandas(value: Any) -> bool:
    return "pandas" in _library(value) and hasattr(value, "columns")


def _is_array(value: Any) -> bool:
    return bool(getattr(getattr(value, "dtype", None), "names", None)) and hasattr(value, "tolist")


def _is_others(value: Any) -> bool:
    if isinstance(value, type):
        return False
    if hasattr(value, "__arrow_c_stream__"):
        return any(hasattr(value, name) for name in ("columns", "column_names", "schema"))
    is_frame = hasattr(value, "compute") and hasattr(value, "columns")
    return is_frame or callable(getattr(value, "to_table", None))
