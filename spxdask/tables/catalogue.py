"""Reading the user's catalogue: columns are found, then checked, then sorted for lookup."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from spxdask.errors import CatalogueError, StoreError
from spxdask.science.catalogue import Catalogue
from spxdask.storage import locate_file

__all__ = ["CatalogueFile", "read_catalogue"]

# The names that a column may have in a file, in any case; the first that is there is used.
COLUMN_NAMES = {
    "target_id": ("targetid", "target_id"),
    "ra": ("ra",),
    "dec": ("dec",),
}
# Limits of the coordinates, deg, both included.
RANGES_DEG = {"ra": (0.0, 360.0), "dec": (-90.0, 90.0)}
# A message quotes so many bad rows, so many characters of each value and of a header.
MAX_ROWS_QUOTED = 5
MAX_VALUE_LENGTH = 60
MAX_HEADER_LENGTH = 200

NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


def read_catalogue(path: str | os.PathLike) -> Catalogue:
    """Read and check a catalogue with the columns targetid (or target_id), ra and dec.

    The file is CSV. Names may be in any case, other columns are ignored, a byte-order mark
    and quotes are understood. Ids are text.

    Parameters
    ----------
    path : path
        A file on disk or in a store.

    Returns
    -------
    Catalogue
        Its sources, sorted for lookup.

    Raises
    ------
    CatalogueError
        If the file cannot be read, a column is missing, there are no rows, an id is empty
        or occurs twice, or a coordinate is not a number on the sky. It names the file and
        the column or the bad rows.
    """
    try:
        store, name = locate_file(path)
        content = store.get(name)
        columns = _read_csv(content, path)
    except (pa.ArrowInvalid, pa.ArrowKeyError, csv.Error, UnicodeDecodeError) as error:
        raise CatalogueError(f"not readable as CSV: {error}", path=path) from error
    except OSError as error:
        raise CatalogueError(f"{error.strerror or error}", path=path) from error
    except StoreError as error:
        raise CatalogueError(error.reason, path=error.path) from error
    return _check_columns(columns, path)


class CatalogueFile:
    """The user's catalogue, read when it is first needed, and again when its file has changed.

    Parameters
    ----------
    path : path
        A file on disk or in a store.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._store, self._name = locate_file(path)
        self._version: str | None = None
        self._catalogue: Catalogue | None = None

    def read(self) -> Catalogue:
        """Return the catalogue.

        Returns
        -------
        Catalogue
            The same object for as long as the file is the same. A store that knows no versions
            is read once.

        Raises
        ------
        CatalogueError
            As `read_catalogue`.
        """
        try:
            version = self._store.get_version(self._name)
        except (OSError, StoreError):
            # Reading it, below, reports what is wrong.
            version = None
        if self._catalogue is None or version != self._version:
            self._catalogue, self._version = read_catalogue(self._path), version
        return self._catalogue


def _read_csv(content: bytes, path: str | os.PathLike) -> dict[str, pa.Array]:
    """Return the columns of `COLUMN_NAMES` in a CSV file, as text."""
    with io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file), [])
    found = _find_columns(header, path)
    table = pa_csv.read_csv(
        pa.BufferReader(content),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            include_columns=list(found.values()),
            column_types=dict.fromkeys(found.values(), pa.large_string()),
            strings_can_be_null=False,
        ),
    )
    return {name: table.column(called).combine_chunks() for name, called in found.items()}


def _find_columns(header: Sequence[str], path: str | os.PathLike) -> dict[str, str]:
    """Return what each column of `COLUMN_NAMES` is called in a file with this header."""
    found = {}
    for column, names in COLUMN_NAMES.items():
        matches = next(filter(None, (_match_name(header, name) for name in names)), [])
        if len(matches) == 1:
            found[column] = matches[0]
            continue
        for separator, what in ((";", "';'"), ("\t", "a tab")):
            if not matches and any(separator in name for name in header):
                raise CatalogueError(
                    f"the file must be comma-separated, but its header contains {what}", path=path
                )
        what = f"{len(matches)} columns" if matches else "no column"
        needed = ", ".join(names[0] for names in COLUMN_NAMES.values())
        raise CatalogueError(
            f"{what} {' or '.join(names)}; the header must name each of {needed} once, "
            f"got: {', '.join(header)[:MAX_HEADER_LENGTH] or 'nothing'}",
            path=path,
        )
    return found


def _match_name(header: Sequence[str], name: str) -> list[str]:
    return [column for column in header if column.strip().lower() == name]


def _check_columns(columns: dict[str, pa.Array], path: str | os.PathLike) -> Catalogue:
    """Check the columns that were found, and make a catalogue of them."""
    ids = columns["target_id"]
    if not len(ids):
        raise CatalogueError("no rows below the header", path=path)
    empty = pc.equal(pc.utf8_trim_whitespace(ids), "")
    _refuse_rows(empty.to_numpy(zero_copy_only=False), "targetid is empty", ids, path)
    ra = _parse_coordinate("ra", columns["ra"], path)
    dec = _parse_coordinate("dec", columns["dec"], path)
    if pc.count_distinct(ids).as_py() < len(ids):
        codes = ids.dictionary_encode().indices.to_numpy()
        is_repeated = np.ones(len(ids), bool)
        is_repeated[np.unique(codes, return_index=True)[1]] = False
        _refuse_rows(is_repeated, "targetid occurs more than once", ids, path)
    return Catalogue.from_arrays(ids, ra, dec)


def _parse_coordinate(name: str, text: pa.Array, path: str | os.PathLike) -> np.ndarray:
    low, high = RANGES_DEG[name]
    trimmed = pc.utf8_trim_whitespace(text)
    try:
        values = pc.cast(trimmed, pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        is_wrong = pc.invert(pc.match_substring_regex(trimmed, NUMBER))
        is_wrong = is_wrong.to_numpy(zero_copy_only=False)
        _refuse_rows(is_wrong, f"{name} is not a number", text, path)
        raise
    is_off = ~((values >= low) & (values <= high))
    _refuse_rows(is_off, f"{name} is not within {low:g} to {high:g} deg", text, path)
    return values


def _refuse_rows(
    is_bad: np.ndarray, problem: str, column: pa.Array, path: str | os.PathLike
) -> None:
    """Raise CatalogueError if any row is bad, with the values of the first few."""
    bad = np.flatnonzero(is_bad).tolist()
    if not bad:
        return
    quoted = ", ".join(
        f"{i + 1} ({column[i].as_py()[:MAX_VALUE_LENGTH]!r})" for i in bad[:MAX_ROWS_QUOTED]
    )
    more = f" and {len(bad) - MAX_ROWS_QUOTED} more" if len(bad) > MAX_ROWS_QUOTED else ""
    rows = "row" if len(bad) == 1 else "rows"
    raise CatalogueError(
        f"{problem} in data {rows} {quoted}{more}", path=path, rows=tuple(i + 1 for i in bad)
    )
