"""Rows of a run as a VOTable, for TOPCAT, Aladin and other programs of the Virtual Observatory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spxdask.errors import ConfigError, NoSuchSourceError, RunFolderError
from spxdask.results.run import Run
from spxdask.storage import locate_file
from spxdask.tables.metadata import make_votable
from spxdask.tables.provenance import Provenance
from spxdask.tables.schema import COLUMNS, SCHEMA
from spxdask.text import format_count

__all__ = ["write_votable"]

# A VOTable is held in memory, some 500 bytes a row.
MAX_ROWS = 5_000_000
TITLE = "light curves of SPHEREx sources: a row is a source on a frame"
_BY_NAME = {column.name: column for column in COLUMNS}
_POSITION = {
    "ra": "right ascension of the source in the catalogue, ICRS",
    "dec": "declination of the source in the catalogue, ICRS",
}


def write_votable(
    folder: str | os.PathLike[str] | Run,
    path: str | os.PathLike[str],
    ids: Iterable[str | int] | str | int | None = None,
    *,
    max_rows: int = MAX_ROWS,
) -> None:
    """Write light curves of a run as one VOTable, in order of the source, then of time.

    Parameters
    ----------
    folder : path or Run
        The output folder of a run.
    path : path
        The file, on disk or in an object store; it appears whole, and replaces one of its name.
    ids : iterable of str, or str, optional
        Ids of sources; default: all.
    max_rows : int
        More rows than this are an error, as a VOTable is held in memory.

    Raises
    ------
    NoSuchSourceError
        If a source has no light curve.
    RunFolderError
        If there are no light curves.
    ConfigError
        If there are more than `max_rows` rows.
    """
    run = folder if isinstance(folder, Run) else Run(folder)
    if isinstance(ids, str | int):
        ids = [ids]
    rows = _read_rows(run, None if ids is None else list(ids), max_rows)
    names = [n for n in ("target_id", "ra", "dec", *rows.column_names[1:]) if n in SCHEMA.names]
    rows = _add_positions(run, rows)
    columns = [
        # Ids and positions are described for tables that have others.
        dataclasses.replace(
            _BY_NAME[name],
            description=_POSITION.get(name, _BY_NAME[name].description.partition(" (")[0]),
        )
        for name in names
    ]
    file = make_votable(columns, _find_provenance(run), TITLE)
    table = file.get_first_table()
    table.create_arrays(len(rows))
    for name in names:
        values, mask = _as_array(rows[name])
        table.array[name] = values
        table.array.mask[name] = mask
    store, file_name = locate_file(path)
    with store.atomic_path(file_name) as part:
        file.to_xml(str(part), tabledata_format="binary2")


def _read_rows(run: Run, ids: Sequence[str | int] | None, max_rows: int) -> pa.Table:
    """Return the rows of sources, with their ids as the first column."""
    tables, n_rows = [], 0
    if ids is None:
        found = (run.curves.read_part(part) for part in run.curves.parts)
    else:
        found = (_read_one(run, str(one)) for one in dict.fromkeys(map(str, ids)))
    for table in found:
        n_rows += len(table)
        if n_rows > max_rows:
            raise ConfigError(
                f"more than {format_count(max_rows, 'row')}, which a VOTable is too small for: "
                "name ids of sources, or write a HATS catalogue",
                option="ids",
            )
        tables.append(table)
    if not tables:
        raise RunFolderError("there is no light curve to write: name ids of sources", path=run.path)
    rows = pa.concat_tables(tables, promote_options="default")
    keys = [(name, "ascending") for name in ("target_id", "mjd", "obs_id", "band")]
    return rows.sort_by(keys) if ids is None else rows


def _read_one(run: Run, target_id: str) -> pa.Table:
    try:
        rows = run.curves.read(target_id)
    except KeyError:
        raise NoSuchSourceError(
            f"{run.path} has no light curve of source {target_id!r}", source=target_id
        ) from None
    return rows.add_column(0, "target_id", pa.repeat(pa.scalar(target_id), len(rows)).cast(_TEXT))


_TEXT = pa.large_string()


def _add_positions(run: Run, rows: pa.Table) -> pa.Table:
    """Add the position of each row's source in the catalogue; NaN where it is not known."""
    sources = run.folder.saved_catalogue()
    if sources is None:
        nothing = pa.nulls(len(rows), pa.float64())
        return rows.append_column("ra", nothing).append_column("dec", nothing)
    index = pc.index_in(rows["target_id"].cast(_TEXT), value_set=sources.target_id)
    for name in ("ra", "dec"):
        values = pa.array(getattr(sources, name))
        rows = rows.append_column(name, values.take(index.combine_chunks()))
    return rows


def _find_provenance(run: Run) -> Provenance:
    about = run.provenance
    return Provenance(
        version=about["software"].removeprefix("spxdask "),
        digest=about["configuration_digest"],
        configuration=about["configuration"],
        calibration=tuple(about["calibration"].items()),
        releases=tuple(about["releases"]),
    )


def _as_array(column: pa.ChunkedArray) -> tuple[Any, Any]:
    """Return the values of a column, and which are missing; a missing float is NaN."""
    missing = column.is_null().to_numpy()
    if pa.types.is_floating(column.type):
        return column.to_numpy(), np.zeros(len(column), bool)
    if pa.types.is_integer(column.type):
        return column.fill_null(0).to_numpy(), missing
    return np.array(column.fill_null("").to_pylist(), object), np.zeros(len(column), bool)
