"""Where the light curves of a run are, and how they are read: a file a source, or Parquet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spxdask.errors import RunFolderError
from spxdask.storage import Store, file_stem
from spxdask.tables.csv import read_csv
from spxdask.tables.schema import LIGHT_CURVE, LIGHT_CURVE_START, SCHEMA

__all__ = ["CsvCurves", "Curves", "ParquetCurves", "find_curves"]

# CSV files that are read and parsed together.
FILES_AT_ONCE = 2000
# Parquet files read at the same time, and kept in memory once they are read.
FILES_IN_PARALLEL, FILES_KEPT = 8, 2


class Curves(ABC):
    """The light curves of a run. Nothing is read until it is asked for."""

    @property
    @abstractmethod
    def ids(self) -> pa.Array:
        """Ids of the sources with a light curve, (n,) large_string, in the order of the files."""

    @abstractmethod
    def has(self, target_id: str) -> bool:
        """Return whether a source has a light curve.

        Parameters
        ----------
        target_id : str
            Its id.

        Returns
        -------
        bool
        """

    @abstractmethod
    def read(self, target_id: str) -> pa.Table:
        """Return the light curve of a source that has one.

        Parameters
        ----------
        target_id : str
            Its id.

        Returns
        -------
        pyarrow.Table
            The columns of its file, without ``target_id``.
        """

    @property
    @abstractmethod
    def parts(self) -> Sequence[Any]:
        """What `read_part` takes: shares of the sources, each with all of its rows."""

    @abstractmethod
    def read_part(self, part: Any, columns: Collection[str] | None = None) -> pa.Table:
        """Return the rows of some sources, all of a source one after the other.

        Parameters
        ----------
        part : object
            One of `parts`.
        columns : collection of str, optional
            Names of the columns; default: all. One that a file lacks is null.

        Returns
        -------
        pyarrow.Table
            With ``target_id`` first.
        """


class ParquetCurves(Curves):
    """Light curves in Parquet files, each of which has the rows of many sources.

    Parameters
    ----------
    folder : Store
        Where the files are.
    names : collection of str
        Names of the files.
    """

    def __init__(self, folder: Store, names: Collection[str]) -> None:
        self._folder, self._names = folder, sorted(names)
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_names": self._names, "_tables": OrderedDict()}

    @property
    def parts(self) -> Sequence[str]:
        """See `Curves.parts`."""
        return self._names

    @cached_property
    def _index(self) -> tuple[pa.Array, np.ndarray, np.ndarray]:
        """Id, file and first row of each source; of the ids alone, which is quick."""
        with ThreadPoolExecutor(FILES_IN_PARALLEL) as threads:
            found = list(threads.map(self._read_ids, self.parts))
        counts = [len(ids) for ids, _ in found]
        ids = pa.concat_arrays([ids for ids, _ in found]) if found else pa.array([], _TEXT)
        starts = np.concatenate([starts for _, starts in found]) if found else np.zeros(0, int)
        return ids, np.repeat(np.arange(len(found)), counts), starts

    def _read_ids(self, name: str) -> tuple[pa.Array, np.ndarray]:
        with self._folder.open_seekable(name) as source:
            file = pq.ParquetFile(source, read_dictionary=["target_id"])
            column = file.read(["target_id"], use_threads=False).column(0)
        encoded = column.unify_dictionaries().combine_chunks()
        # Of a file of several row groups, combined chunks are one.
        encoded = encoded.chunk(0) if isinstance(encoded, pa.ChunkedArray) else encoded
        codes = encoded.indices.to_numpy(zero_copy_only=False)
        starts = np.flatnonzero(np.diff(codes, prepend=-1))
        return encoded.dictionary.take(pa.array(codes[starts])).cast(_TEXT), starts

    @property
    def ids(self) -> pa.Array:
        """See `Curves.ids`."""
        return self._index[0]

    def has(self, target_id: str) -> bool:
        """See `Curves.has`."""
        return bool(pc.index(self.ids, pa.scalar(target_id, _TEXT)).as_py() >= 0)

    def read(self, target_id: str) -> pa.Table:
        """See `Curves.read`."""
        ids, files, starts = self._index
        place = pc.index(ids, pa.scalar(target_id, _TEXT)).as_py()
        if place < 0:
            raise KeyError(target_id)
        number, start = int(files[place]), int(starts[place])
        table = self._tables.pop(number, None)
        if table is None:
            table = self._read_file(self.parts[number])
        self._tables[number] = table
        while len(self._tables) > FILES_KEPT:
            self._tables.popitem(last=False)
        is_last = place + 1 == len(ids) or files[place + 1] != number
        stop = len(table) if is_last else int(starts[place + 1])
        return table.slice(start, stop - start).drop_columns(["target_id"])

    def read_part(self, part: str, columns: Collection[str] | None = None) -> pa.Table:
        """See `Curves.read_part`."""
        return self._read_file(part, columns)

    def _read_file(self, name: str, columns: Collection[str] | None = None) -> pa.Table:
        with self._folder.open_seekable(name) as source:
            file = pq.ParquetFile(source)
            names = file.schema_arrow.names
            wanted = None
            if columns is not None:
                wanted = [n for n in ("target_id", *columns) if n in names]
            table = file.read(wanted, use_threads=False)
        if columns is None:
            # Other columns are not of this version.
            columns = [n for n in LIGHT_CURVE if n in names]
        return _complete(table, table.column("target_id"), columns)


class CsvCurves(Curves):
    """Light curves in CSV files, one a source, whose name comes from the id.

    Parameters
    ----------
    folder : Store
        Where the files are.
    ids : pyarrow large_string array or None
        Ids of the catalogue, in its order; None where it is not known: then ids are those that
        the names stand for.
    refused_characters : str
        What names of files cannot have there.
    """

    def __init__(self, folder: Store, ids: pa.Array | None, refused_characters: str = "") -> None:
        self._folder, self._catalogue_ids = folder, ids
        self._refused_characters = refused_characters

    @cached_property
    def _names(self) -> dict[str, str]:
        """Names of the files by id."""
        found = {n for n in self._folder.list_names() if is_csv_name(n)}
        if self._catalogue_ids is None:
            return {_guess_id(name): name for name in sorted(found)}
        named = ((one, self._make_name(one)) for one in self._catalogue_ids.to_pylist())
        return {one: name for one, name in named if name in found}

    def _make_name(self, target_id: str) -> str:
        return f"{file_stem(target_id, self._refused_characters)}.csv"

    @property
    def ids(self) -> pa.Array:
        """See `Curves.ids`."""
        return pa.array(self._names, _TEXT)

    def has(self, target_id: str) -> bool:
        """See `Curves.has`."""
        if self._catalogue_ids is None or "_names" in vars(self):
            return target_id in self._names
        # One look instead of a list of a million files.
        is_known = pc.index(self._catalogue_ids, pa.scalar(target_id, _TEXT)).as_py() >= 0
        return is_known and self._folder.exists(self._make_name(target_id))

    def read(self, target_id: str) -> pa.Table:
        """See `Curves.read`."""
        is_named = self._catalogue_ids is None or "_names" in vars(self)
        name = self._names.get(target_id) if is_named else self._make_name(target_id)
        if name is None:
            raise KeyError(target_id)
        try:
            content = self._folder.get(name)
        except FileNotFoundError:
            raise KeyError(target_id) from None
        return _parse(content, self._folder.path_to(name))

    @cached_property
    def parts(self) -> Sequence[Sequence[tuple[str, str]]]:
        """See `Curves.parts`."""
        named = list(self._names.items())
        return [named[i : i + FILES_AT_ONCE] for i in range(0, len(named), FILES_AT_ONCE)]

    def read_part(
        self, part: Sequence[tuple[str, str]], columns: Collection[str] | None = None
    ) -> pa.Table:
        """See `Curves.read_part`."""
        # Files with the same header are parsed as one, which is far quicker.
        bodies: dict[bytes, list[tuple[str, bytes, int]]] = {}
        contents = self._folder.get_many([name for _, name in part])
        for (target_id, name), content in zip(part, contents, strict=True):
            header, _, body = bytes(content).partition(b"\n")
            if not header.startswith(_HEADER_START):
                raise _make_error(self._folder.path_to(name))
            bodies.setdefault(header, []).append((target_id, body, body.count(b"\n")))
        tables = []
        for header, files in bodies.items():
            text = b"".join((header, b"\n", *(body for _, body, _ in files)))
            table = _parse(text, str(self._folder), columns)
            counts = np.array([count for *_, count in files])
            if counts.sum() != len(table):
                # A line feed in a value; then each file by itself.
                pieces = [_parse(header + b"\n" + body, "", columns) for _, body, _ in files]
                table, counts = pa.concat_tables(pieces), np.array([len(p) for p in pieces])
            ids = pa.array([target_id for target_id, *_ in files], _TEXT)
            ids = ids.take(pa.array(np.repeat(np.arange(len(files)), counts)))
            names = columns if columns is not None else table.column_names
            tables.append(_complete(table, ids, names))
        if not tables:
            names = LIGHT_CURVE if columns is None else columns
            schema = pa.schema([("target_id", _TEXT), *(SCHEMA.field(n) for n in names)])
            return schema.empty_table()
        return pa.concat_tables(tables, promote_options="default")


def find_curves(folder: Store, ids: pa.Array | None, refused_characters: str = "") -> Curves | None:
    """Return the light curves of a folder.

    Parameters
    ----------
    folder : Store
        The folder ``lightcurves`` of a run.
    ids : pyarrow large_string array or None
        Ids of the catalogue, None where it is not known.
    refused_characters : str
        What names of files cannot have there.

    Returns
    -------
    Curves or None
        None when there are none.
    """
    names = folder.list_names()
    buckets = {n for n in names if n.startswith("bucket-") and n.endswith(".parquet")}
    if buckets:
        return ParquetCurves(folder, buckets)
    if any(map(is_csv_name, names)):
        return CsvCurves(folder, ids, refused_characters)
    return None


def is_csv_name(name: str) -> bool:
    """Return whether a name can be that of a light curve as CSV.

    Parameters
    ----------
    name : str
        Name of a file.

    Returns
    -------
    bool
        False for hidden files, which are not yet whole.
    """
    return name.endswith(".csv") and not name.startswith(".")


_TEXT = pa.large_string()
_HEADER_START = ",".join(LIGHT_CURVE_START).encode()


def _guess_id(name: str) -> str:
    """Return the id that the name of a file stands for; of one cut short, the name itself."""
    stem = name.removesuffix(".csv")
    if "%~" in stem:
        return stem
    return "" if stem == "%" else unquote(stem, errors="surrogateescape")


def _parse(content: bytes, path: str, columns: Collection[str] | None = None) -> pa.Table:
    """Return the columns that a CSV file has of those that are asked for."""
    header = content.partition(b"\n")[0].decode("utf-8", "replace").split(",")
    if tuple(header[: len(LIGHT_CURVE_START)]) != LIGHT_CURVE_START:
        raise _make_error(path)
    wanted = LIGHT_CURVE if columns is None else columns
    try:
        return read_csv(pa.BufferReader(content), [name for name in wanted if name in header])
    except pa.ArrowException as error:
        raise RunFolderError(f"is not a light curve: {error}", path=path) from error


def _make_error(path: str) -> RunFolderError:
    return RunFolderError("is not a light curve: move it out of the folder", path=path)


def _complete(table: pa.Table, ids: Any, columns: Collection[str]) -> pa.Table:
    """Return columns with the types of the schema behind the ids; null where there are none."""
    arrays = {"target_id": pc.cast(ids, _TEXT)}
    for name in columns:
        kind = SCHEMA.field(name).type
        has = name in table.column_names
        arrays[name] = table.column(name).cast(kind) if has else pa.nulls(len(table), kind)
    return pa.table(arrays)
