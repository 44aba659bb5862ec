"""What tables say of their columns and of how they were made: Parquet metadata and VOTables."""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from spxdask.tables.provenance import Provenance
from spxdask.tables.schema import COLUMNS, Column

__all__ = ["describe_columns", "make_votable", "make_votable_field", "parquet_metadata"]

ASTROPY_KEY = "table_meta_yaml"
# https://www.ivoa.net/documents/Notes/VOParquet
VOPARQUET_KEY, VOPARQUET_VERSION = "IVOA.VOTable-Parquet", "1.0"
VOTABLE_VERSION = "1.4"
# Astropy's reader of VOParquet cannot join columns of text without a bound; rows may exceed it.
VOPARQUET_TEXT = "64"
_WRAPPED = re.compile(r"\s*\n\s*")
_BY_NAME = {column.name: column for column in COLUMNS}
# Datatypes of astropy and of VOTables.
_DATATYPES = {
    pa.string(): ("string", {"datatype": "char", "arraysize": "*"}),
    pa.float64(): ("float64", {"datatype": "double"}),
    pa.int64(): ("int64", {"datatype": "long"}),
    pa.int32(): ("int32", {"datatype": "int"}),
}
# Frames of reference by column. The telescope is where `mjd` is measured.
_SYSTEMS = {"ra": "icrs", "dec": "icrs", "mjd": "utc", "bjd_tdb": "tdb"}


@functools.lru_cache(maxsize=64)
def parquet_metadata(
    names: tuple[str, ...], provenance: Provenance, title: str = ""
) -> Mapping[str, str]:
    """Return the metadata of a Parquet file; made once in a process.

    Parameters
    ----------
    names : tuple of str
        Its columns.
    provenance : Provenance
        How it was made.
    title : str, optional
        What its rows are.

    Returns
    -------
    mapping of str to str
        The key from which astropy reads units and descriptions, those of the VOParquet
        convention, and ``spxdask``, the provenance as JSON.
    """
    columns = [_BY_NAME[name] for name in names]
    about = provenance.to_dict()
    votable = make_votable(columns, provenance, title)
    for field in votable.get_first_table().fields:
        if field.arraysize == "*":
            field.arraysize = VOPARQUET_TEXT
    # JSON is YAML.
    described = {"datatype": [_describe(column) for column in columns], "meta": about}
    return {
        ASTROPY_KEY: json.dumps(described),
        f"{VOPARQUET_KEY}.version": VOPARQUET_VERSION,
        f"{VOPARQUET_KEY}.content": _render(votable),
        "spxdask": json.dumps(about),
    }


def _describe(column: Column) -> dict[str, Any]:
    """Describe a column as astropy's tables in text files do."""
    unit = {"unit": column.unit} if column.unit else {}
    return {
        "name": column.name,
        **unit,
        "datatype": _DATATYPES[column.type][0],
        "description": column.description,
        "meta": {"ucd": column.ucd},
    }


def make_votable(columns: Sequence[Column], provenance: Provenance, title: str = "") -> Any:
    """Make a VOTable of one table without rows.

    Parameters
    ----------
    columns : sequence of Column
        Its columns.
    provenance : Provenance
        How its rows were made.
    title : str, optional
        What its rows are.

    Returns
    -------
    astropy.io.votable.tree.VOTableFile
        With units, UCDs, the systems of coordinates and times, and the provenance.
    """
    from astropy.io.votable.tree import CooSys, Info, Resource, TableElement, TimeSys, VOTableFile

    file = VOTableFile(version=VOTABLE_VERSION)
    # Astropy before 7 knows only when it writes a file what its version allows.
    file._config |= {f"version_1_{minor}_or_later": True for minor in (1, 2, 3, 4)}
    resource = Resource(type="results")
    file.resources.append(resource)
    systems = {_SYSTEMS.get(column.name) for column in columns}
    if "icrs" in systems:
        resource.coordinate_systems.append(CooSys(ID="icrs", system="ICRS", config=file._config))
    for name, scale, origin, place in (
        ("utc", "UTC", "MJD-origin", "TOPOCENTER"),
        ("tdb", "TDB", "JD-origin", "BARYCENTER"),
    ):
        if name in systems:
            resource.time_systems.append(
                TimeSys(
                    ID=name,
                    timescale=scale,
                    timeorigin=origin,
                    refposition=place,
                    config=file._config,
                )
            )
    for name, value in provenance.to_dict().items():
        text = _join(value)
        if text and name != "configuration":
            resource.infos.append(Info(name=name, value=text, config=file._config))
    if provenance.configuration:
        info = Info(name="configuration", value=provenance.digest, config=file._config)
        info.content = provenance.configuration
        resource.infos.append(info)
    table = TableElement(file)
    table.description = title or None
    resource.tables.append(table)
    table.fields.extend(make_votable_field(file, column) for column in columns)
    return file


def make_votable_field(file: Any, column: Column, **others: Any) -> Any:
    """Make a field of a VOTable.

    Parameters
    ----------
    file : astropy.io.votable.tree.VOTableFile
        The file that it is for.
    column : Column
        What it holds.
    **others : object
        Attributes that replace those of the column.

    Returns
    -------
    astropy.io.votable.tree.Field
    """
    from astropy.io.votable.tree import Field

    attributes: dict[str, Any] = {"name": column.name, "ucd": column.ucd}
    attributes |= _DATATYPES[column.type][1]
    if column.name == "target_id":
        # Ids may be of any script.
        attributes["datatype"] = "unicodeChar"
    if column.unit:
        # The AB system, which units of the IVOA do not know, is in the description.
        attributes["unit"] = column.unit.removesuffix("(AB)")
    if column.name in _SYSTEMS:
        attributes["ref"] = _SYSTEMS[column.name]
    # UCDs are not looked up, as a test does it: astropy finds the list of their words by the frame
    # of its caller, which fails while another thread looks for a module by its frame, and then asks
    # for the list on the internet.
    config = file._config | {"version_1_1_or_later": False}
    field = Field(file, config=config, **attributes | others)
    field.description = column.description
    return field


def _join(value: Any) -> str:
    """Return texts as one."""
    if isinstance(value, dict):
        value = [f"{key}: {text}" for key, text in value.items()]
    return value if isinstance(value, str) else "; ".join(value)


def _render(file: Any) -> str:
    """Return a VOTable as text, without the comment that names the version of astropy.

    Descriptions are on one line: as they are read, they have to equal those of other readers.
    """
    out = io.BytesIO()
    file.to_xml(out)
    text = re.sub("<!--.*?-->\n?", "", out.getvalue().decode(), count=1, flags=re.DOTALL)
    description = re.compile("<DESCRIPTION>.*?</DESCRIPTION>", re.DOTALL)
    return description.sub(lambda found: _WRAPPED.sub(" ", found[0]), text)


def describe_columns(names: Iterable[str]) -> list[dict[str, str]]:
    """Describe columns for people and programs.

    Parameters
    ----------
    names : iterable of str
        Their names.

    Returns
    -------
    list of dict
        Name, type, unit, UCD and description of each.
    """
    return [
        {
            "name": name,
            "type": _DATATYPES[column.type][0],
            "unit": column.unit,
            "ucd": column.ucd,
            "description": column.description,
        }
        for name in names
        for column in [_BY_NAME[name]]
    ]
