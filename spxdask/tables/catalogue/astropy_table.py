"""A table of astropy's, imported only where there is one."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
from astropy import units
from astropy.coordinates import SkyCoord
from astropy.table import Table
from astropy.time import Time
from astropy.units import Unit

from spxdask.errors import CatalogueError
from spxdask.tables.catalogue.choices import CatalogueColumns
from spxdask.tables.catalogue.raw import ArrowTable, RawTable, to_arrow_list
from spxdask.tables.catalogue.units import is_angle_unit

__all__ = ["AstropyTable", "open_coordinates", "take_units"]

# How the tables of the CDS and the AAS journals split a position.
RA_PARTS, DEC_PARTS = ("rah", "ram", "ras"), ("ded", "dem", "des")


class AstropyTable(RawTable):
    """A table of astropy's.

    Parameters
    ----------
    table : astropy.table.Table
        With columns of numbers, texts, Quantity, or SkyCoord.
    choice : CatalogueColumns
        If the table does not fit it, positions in parts or as SkyCoord are taken.
    """

    def __init__(self, table: Table, choice: CatalogueColumns) -> None:
        table = Table(table, copy=False)
        if not choice.fit(table.colnames):
            table = _with_position(table)
        stated = (getattr(table[name], "unit", None) for name in table.colnames)
        super().__init__(
            table.colnames, {i: str(unit) for i, unit in enumerate(stated) if unit is not None}
        )
        self._table = table

    def read(
        self, columns: Collection[int], numbers: Collection[int], *, skip_malformed: bool = False
    ) -> dict[int, pa.Array]:
        """See `RawTable.read`."""
        return {i: _to_arrow(self._table[self.names[i]], self.names[i]) for i in columns}


def open_coordinates(coordinates: SkyCoord) -> RawTable:
    """Make a table of coordinates, whose ids are their positions in the array, from 0.

    Parameters
    ----------
    coordinates : SkyCoord or frame with data
        In any frame, of any shape. Proper motions, distances and the time of observation are
        taken over where they are there.

    Returns
    -------
    RawTable

    Raises
    ------
    CatalogueError
        If they cannot be transformed to ICRS.
    """
    try:
        icrs = SkyCoord(coordinates).reshape(-1).transform_to("icrs")
        icrs.frame.set_representation_cls("spherical", s="sphericalcoslat")
    # What cannot be transformed raises errors of several kinds.
    except Exception as error:
        raise CatalogueError(f"the coordinates cannot be transformed to ICRS: {error}") from error
    columns: dict[str, Any] = {
        "targetid": [str(i) for i in range(len(icrs))],
        "ra": icrs.ra.deg,
        "dec": icrs.dec.deg,
    }
    if "s" in icrs.data.differentials:
        columns["pmra"] = icrs.pm_ra_cosdec.to_value("mas/yr")
        columns["pmdec"] = icrs.pm_dec.to_value("mas/yr")
    if icrs.distance.unit.is_equivalent("pc"):
        columns["parallax"] = icrs.distance.to_value("mas", units.parallax())
    obstime = getattr(coordinates, "obstime", None)
    if obstime is not None and "pmra" in columns:
        epoch = np.ravel(obstime.jyear)
        columns["ref_epoch"] = np.broadcast_to(epoch, len(icrs)).copy()
    return ArrowTable(pa.table({name: pa.array(values) for name, values in columns.items()}))


def take_units(table: Table, choice: CatalogueColumns) -> Table:
    """Return a table of texts without a first row of units, which its columns get.

    Parameters
    ----------
    table : astropy.table.Table
        A table of texts.
    choice : CatalogueColumns
        Says which columns have units.

    Returns
    -------
    astropy.table.Table
    """
    if not len(table) or not choice.fit(table.colnames):
        return table
    where = choice.find(table.colnames)
    stated = {table.colnames[where[name]]: "" for name in ("ra", "dec")}
    for name in stated:
        # As astropy writes a unit in LaTeX.
        text = re.sub(r"[${}\\]|mathrm", "", str(table[name][0]))
        stated[name] = text.replace("^circ", "deg").strip()
    if not all(map(is_angle_unit, stated.values())):
        return table
    table = table[1:]
    for name, unit in stated.items():
        table[name].unit = Unit(unit, parse_strict="silent")
    return table


def _with_position(table: Table) -> Table:
    """Return a table with columns ra and dec, if it has them in another form."""
    table = table.copy(copy_data=False)
    coordinates = [n for n in table.colnames if isinstance(table[n], SkyCoord)]
    names = {name.lower(): name for name in table.colnames}
    if len(coordinates) == 1:
        parts = open_coordinates(table[coordinates[0]])
        wanted = [i for i, name in enumerate(parts.names) if name != "targetid"]
        for i, column in parts.read(wanted, wanted).items():
            name = parts.names[i]
            if name in ("ra", "dec") or name not in names:
                table[names.get(name, name)] = column.to_numpy(zero_copy_only=False)
    elif {*RA_PARTS[:2], *DEC_PARTS[:2]} <= names.keys() and not {"ra", "dec"} & names.keys():
        ra = _add_parts([table[names[part]] for part in RA_PARTS if part in names])
        dec = _add_parts([table[names[part]] for part in DEC_PARTS if part in names])
        if "de-" in names:
            sign = np.ma.filled(np.ma.asarray(table[names["de-"]]).astype(str), "+")
            dec = dec * np.where(np.char.strip(sign) == "-", -1.0, 1.0)
        table["ra"], table["dec"] = ra * 15.0, dec
    return table


def _add_parts(parts: list[Any]) -> np.ndarray:
    """Return the sum of hours or degrees, minutes and seconds; NaN where one is missing."""
    total = np.zeros(len(parts[0]))
    for power, part in enumerate(parts):
        total += np.ma.filled(np.ma.asarray(part).astype(float), np.nan) / 60.0**power
    return total


def _to_arrow(column: Any, name: str) -> pa.Array:
    """Return a column as Arrow, with nulls for what is masked."""
    if isinstance(column, Time):
        column = column.jyear
    if isinstance(column, units.Quantity):
        column = getattr(column, "unmasked", column).value
    mask = np.ma.getmaskarray(column) if hasattr(column, "mask") else None
    values = np.ma.getdata(np.ma.asarray(column)) if mask is not None else np.asarray(column)
    if values.ndim != 1:
        raise CatalogueError(f"the column {name} holds arrays, not one value for each source")
    kind = values.dtype.kind
    if kind in "iufb":
        if values.dtype.itemsize > 8 or values.dtype == np.float16:
            values = values.astype(float)
        native = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
        return pa.array(native, mask=mask)
    items = values.tolist()
    if mask is not None:
        items = [None if m else v for v, m in zip(items, mask.tolist(), strict=True)]
    return to_arrow_list(items)
