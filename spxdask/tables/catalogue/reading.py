"""Reading the user's catalogue: opened, its columns found, its rows checked, then sorted."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spxdask.errors import CatalogueError, StoreError
from spxdask.science.catalogue import Catalogue
from spxdask.storage import Store, local_path, locate_file
from spxdask.tables.catalogue.angles import parse_numbers
from spxdask.tables.catalogue.choices import CatalogueColumns, find_motions
from spxdask.tables.catalogue.formats import ParquetTable, open_content, sort_names
from spxdask.tables.catalogue.given import GivenCatalogue
from spxdask.tables.catalogue.raw import RawTable
from spxdask.tables.catalogue.rows import FLOAT_CAUSE, Rows, SkippedRow, ids_as_text
from spxdask.tables.catalogue.units import find_factor, parse_angle_unit
from spxdask.tables.parquet import PARQUET_MARK, encode_parquet

__all__ = ["CatalogueReader", "encode_catalogue", "read_catalogue"]

logger = logging.getLogger(__name__)

Path = str | os.PathLike[str]
# Units of the motions in a Catalogue.
MOTION_UNITS = {"pmra": "mas/yr", "pmdec": "mas/yr", "parallax": "mas", "ref_epoch": "yr"}
# Those of all stars are within these: the fastest is Barnard's star, with 10,393 mas/yr, and the
# nearest Proxima Centauri, with 769 mas.
MOTIONS_OF_STARS = {
    "pmra": (-10_500, 10_500),
    "pmdec": (-10_500, 10_500),
    "parallax": (-800, 800),
    "ref_epoch": (1800, 2100),
}


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """What was read: the catalogue, and what the user should know of it."""

    catalogue: Catalogue
    skipped: list[SkippedRow]
    warnings: list[str]


def read_catalogue(
    source: Path | GivenCatalogue,
    columns: CatalogueColumns | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
) -> Catalogue:
    """Read and check a catalogue.

    Parameters
    ----------
    source : path or GivenCatalogue
        A file on disk or in a store, a folder of Parquet files, or an object. The format of a
        file is found by its content: CSV and its kind, Parquet, Arrow, and what astropy reads.
    columns : CatalogueColumns, optional
        The columns of id and position, if not those of the usual names.
    on_bad_row : {'error', 'skip'}
        What becomes of rows without id or position.

    Returns
    -------
    Catalogue
        Its sources, sorted for lookup. Ids are text.

    Raises
    ------
    CatalogueError
        If the file cannot be read, a column is missing or ambiguous, there are no rows, an id
        is empty or occurs twice, or a coordinate is not a number on the sky. It names the file
        and the column or the bad rows.
    """
    return CatalogueReader(source, columns, on_bad_row).read()


class CatalogueReader:
    """The user's catalogue, read when it is first needed, and again when its file has changed.

    Parameters
    ----------
    source : path or GivenCatalogue
        As for `read_catalogue`.
    columns : CatalogueColumns, optional
        As for `read_catalogue`.
    on_bad_row : {'error', 'skip'}
        As for `read_catalogue`.

    Attributes
    ----------
    can_be_read_again : bool
        False for objects, pipes and standard input.
    skipped : list of SkippedRow
        The rows that `read` left out.
    """

    def __init__(
        self,
        source: Path | GivenCatalogue,
        columns: CatalogueColumns | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
    ) -> None:
        self._source = source
        self._columns = columns or CatalogueColumns()
        self._on_bad_row = on_bad_row
        self._version: str | None = None
        self._catalogue: Catalogue | None = None
        self.skipped: list[SkippedRow] = []
        self.can_be_read_again = not isinstance(source, GivenCatalogue) and not _is_stream(source)

    def read(self) -> Catalogue:
        """Return the catalogue.

        Returns
        -------
        Catalogue
            The same object for as long as the file is the same. A store that knows no versions
            is read once, as is all that cannot be read again.

        Raises
        ------
        CatalogueError
            As `read_catalogue`.
        """
        source = self._source
        is_file = self.can_be_read_again and not isinstance(source, GivenCatalogue)
        version = _find_version(source) if is_file else None  # type: ignore[arg-type]
        if self._catalogue is None or version != self._version:
            self._catalogue, self._version = self._read(), version
        return self._catalogue

    def _read(self) -> Catalogue:
        label = repr(self._source) if isinstance(self._source, GivenCatalogue) else self._source
        with _name(label), ExitStack() as stack:
            table = _open(self._source, self._columns, stack)
            contents = _check(table, self._columns, skip=self._on_bad_row == "skip")
        self.skipped = contents.skipped
        for warning in contents.warnings:
            logger.warning("%s: %s", os.fspath(label), warning)
        return contents.catalogue


def encode_catalogue(catalogue: Catalogue) -> bytes:
    """Return a catalogue as a file that `read_catalogue` makes the same catalogue of.

    Parameters
    ----------
    catalogue : Catalogue
        Its sources.

    Returns
    -------
    bytes
        Parquet, with the rows in the order in which they were given.
    """
    order = np.argsort(catalogue.row)
    columns = {"target_id": catalogue.target_id.take(pa.array(order))}
    arrays = {"ra": catalogue.ra, "dec": catalogue.dec, **catalogue.motions}
    columns |= {name: pa.array(values[order]) for name, values in arrays.items()}
    return encode_parquet(pa.table(columns))


@contextmanager
def _name(path: Path) -> Iterator[None]:
    """Raise what can be wrong with a catalogue as a CatalogueError that names it."""
    try:
        yield
    except CatalogueError as error:
        if error.path is None:
            error.path = os.fspath(path)
        raise
    except StoreError as error:
        raise CatalogueError(f"the store cannot be read: {error.reason}", path=path) from error
    except OSError as error:
        raise CatalogueError(error.strerror or str(error), path=path) from error
    except MemoryError as error:
        raise CatalogueError("the memory is not enough to read it", path=path) from error


@contextmanager
def _name_column(name: str) -> Iterator[None]:
    """Name the column in an error about what it holds."""
    try:
        yield
    except CatalogueError as error:
        raise CatalogueError(f"{name}: {error.reason}") from error


def _is_stream(path: Path) -> bool:
    """Return whether a path is a pipe, or stands for one, which can be read once."""
    on_disk = local_path(path)
    if on_disk is None:
        return False
    # Standard input may be a file, but not for the processes and stages that come later.
    if str(on_disk.absolute()).startswith(("/dev/", "/proc/")):
        return True
    try:
        mode = os.stat(on_disk).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)


def _open(source: Path | GivenCatalogue, columns: CatalogueColumns, stack: ExitStack) -> RawTable:
    if isinstance(source, GivenCatalogue):
        return source.open(columns)
    if _is_stream(source):
        with open(source, "rb") as stream:
            return open_content(stream.read(), "", columns)
    store, name = locate_file(source)
    parts = _list_parts(source)
    if parts is not None:
        if not parts:
            raise CatalogueError("a folder without Parquet files")
        return ParquetTable([_open_part(part, stack) for part in parts])
    # Columns of Parquet that are not needed are not read.
    file = _open_part(source, stack)
    if file.read(len(PARQUET_MARK)) == PARQUET_MARK:
        file.seek(0)
        return ParquetTable([file])
    return open_content(store.get(name), name, columns)


def _open_part(path: Path, stack: ExitStack) -> BinaryIO:
    store, name = locate_file(path)
    file = store.open_seekable(name)
    stack.callback(file.close)
    return file


def _list_parts(path: Path) -> list[str] | None:
    """Return the files of a dataset, None for what is no folder."""
    on_disk = local_path(path)
    if on_disk is not None:
        if not on_disk.is_dir():
            return None
        found = [str(p.relative_to(on_disk)) for p in on_disk.rglob("*") if p.is_file()]
        return [str(on_disk / name) for name in sort_names(found)]
    store, name = locate_file(path)
    if store.exists(name):
        return None
    folder: Store = store / name
    # Without any file, it is reported as a file that is not there.
    return [folder.path_to(part) for part in sort_names(folder.list_names())] or None


def _find_version(path: Path) -> str | None:
    """Return a text that changes whenever the catalogue is replaced, None if there is none."""
    try:
        on_disk = local_path(path)
        # The folder of a dataset does not change with its files.
        parts = _list_parts(path) if on_disk is not None and on_disk.is_dir() else None
        versions = []
        for part in [path] if parts is None else parts:
            store, name = locate_file(part)
            versions.append(store.get_version(name))
    except (OSError, StoreError):
        # Reading it reports what is wrong.
        return None
    return None if None in versions else " ".join(map(str, versions))


def _check(table: RawTable, choice: CatalogueColumns, *, skip: bool) -> _Contents:
    """Make a catalogue of a table."""
    where = choice.find(table.names)
    motions = {n: i for n, i in find_motions(table.names).items() if i not in where.values()}
    angle_units = {
        name: parse_angle_unit(table.units.get(where[name]), name) for name in ("ra", "dec")
    }
    numbers = {where["ra"], where["dec"], *motions.values()}
    columns = table.read({*where.values(), *motions.values()}, numbers, skip_malformed=skip)
    given = {name: columns[i] for name, i in where.items()}
    if not len(given["target_id"]) and not table.malformed:
        raise CatalogueError("no rows below the header")
    with _name_column("targetid"):
        ids, is_float = ids_as_text(given["target_id"])
    coordinates = {}
    for name in ("ra", "dec"):
        with _name_column(name):
            coordinates[name] = parse_numbers(given[name], angle_units[name])
    ra, dec = coordinates["ra"], coordinates["dec"]
    rows = Rows(ids, given, table.find_lines, skip=skip)
    rows.check(ra, dec)
    rows.check_unique(is_float)
    warnings = list(table.warnings)
    n_floats, first = rows.count_floats(is_float)
    if n_floats:
        ids_are = "id, " if n_floats == 1 else "ids, such as "
        warnings.append(f"{n_floats:,} {ids_are}{first!r}, {FLOAT_CAUSE}; kept as they are")
    kept, skipped = rows.is_good, rows.list_skipped()
    values = {"ra": ra.values, "dec": dec.values}
    for name, i in motions.items():
        found = _read_motion(name, columns[i], table.units.get(i), warnings)
        if found is not None:
            values[name] = found
    if kept is not None:
        ids = ids.filter(pa.array(kept))
        values = {name: array[kept] for name, array in values.items()}
    skipped += [
        SkippedRow(row=None, line=line, reason=reason, values=())
        for line, reason in table.malformed.items()
    ]
    if not len(ids):
        raise CatalogueError(f"none of {len(skipped):,} rows can be used; {skipped[0].reason}")
    if skipped:
        rows_are = "row is" if len(skipped) == 1 else "rows are"
        warnings.append(f"{len(skipped):,} {rows_are} skipped (on_bad_row): {skipped[0].reason}")
    right_ascension, declination = _wrap(values.pop("ra")), values.pop("dec")
    catalogue = Catalogue.from_arrays(_own(ids), right_ascension, declination, values)
    return _Contents(catalogue=catalogue, skipped=skipped, warnings=warnings)


def _read_motion(
    name: str, column: pa.Array, unit: str | None, warnings: list[str]
) -> np.ndarray | None:
    """Return a column of motions in the unit of a Catalogue, None if that cannot be done."""
    factor = find_factor(unit, MOTION_UNITS[name])
    if factor is None:
        warnings.append(f"{name} is not used: its unit must be {MOTION_UNITS[name]}, got {unit}")
        return None
    is_text = pa.types.is_large_string(column.type) or pa.types.is_string(column.type)
    if name == "ref_epoch" and is_text:
        # Epochs such as J2016.0
        column = pc.replace_substring_regex(column, "^\\s*J", "")
    try:
        found = parse_numbers(column)
    except CatalogueError:
        warnings.append(f"{name} is not used: it holds no numbers")
        return None
    n_wrong = int(found.is_wrong.sum())
    if n_wrong:
        warnings.append(f"{name} is no number in {n_wrong:,} of the rows, and taken as missing")
    values = found.values if factor == 1.0 else found.values * factor
    low, high = MOTIONS_OF_STARS[name]
    n_odd = int(((values < low) | (values > high)).sum())
    if n_odd:
        warnings.append(
            f"{name} is not within {low:g} to {high:g} {MOTION_UNITS[name]} in {n_odd:,} of the "
            "rows: is its unit another?"
        )
    return None if np.isnan(values).all() else values


def _wrap(ra: np.ndarray) -> np.ndarray:
    """Return right ascensions from 0 to 360 deg; those that are so are not changed."""
    return np.where(ra < 0.0, ra + 360.0, ra) if (ra < 0.0).any() else ra


def _own(ids: pa.Array) -> pa.Array:
    """Return texts whose buffers hold them and nothing else, without nulls."""
    begins = ids.offset == 0 and (not len(ids) or ids.buffers()[1][:8].to_pybytes() == bytes(8))
    if begins and ids.null_count == 0:
        return ids
    return pa.concat_arrays([ids, ids.slice(0, 0)])
