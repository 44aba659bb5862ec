"""Turn tables into light curves: the graph of the aggregation and the work of its tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spxdask.errors import DiskFullError, FrameError, StoreError
from spxdask.storage import Store, file_stem, locate_file, open_store
from spxdask.tables.csv import read_csv, render_header, slice_lines
from spxdask.tables.lines import read_lines, sort_lines
from spxdask.tables.metadata import parquet_metadata
from spxdask.tables.parquet import encode_parquet
from spxdask.tables.per_image import hash_table
from spxdask.tables.provenance import Provenance
from spxdask.tables.schema import LAYOUTS, LIGHT_CURVE_START, SORT_KEYS, WITH_PSF, Layout
from spxdask.text import format_count

TITLE = "light curves of SPHEREx sources: a row is a source on a frame"
TEXT_DTYPE = pd.ArrowDtype(pa.string())
# A shuffle costs about 30 ms for each input partition, so small tables are read in groups.
# A group must fit into the memory of a worker many times over.
GROUP_BYTES = 32_000_000
GROUP_FILES = 500
# Length of a row as CSV, bytes, and the length of CSV divided by that of Parquet.
ROW_BYTES = 540
PARQUET_SHRINKS = 3
# Each thread sorts and writes one output partition at a time, and needs a few copies of it.
BUCKET_BYTES = 32_000_000
# The first line of a table is shorter.
HEADER_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Table:
    """A per-image table.

    Attributes
    ----------
    name : str
        Name of the file.
    bytes : int
        Its length as CSV; of a Parquet file, an estimate. See `describe_table`.
    rows : int or None
        The number of rows that it must have, None if that is not known.
    checksum : str or None
        That of its content, None if that is not known.
    release : str
        That of its frame, empty if it is not known.
    """

    name: str
    bytes: int
    rows: int | None
    checksum: str | None = None
    release: str = ""


@dataclass(frozen=True, kw_only=True)
class CurveOptions:
    """Options that all tasks of the stage share.

    Attributes
    ----------
    per_image : str
        Folder of the tables.
    table_groups : str
        File that lists which tables are read together.
    lightcurves : str
        Folder of the light curves.
    format : str
        Format of the light curves: ``csv``, a file for each source, or ``parquet``, a file
        for each partition.
    buckets : str or None
        Folder in which partitions are also stored as Parquet, None to store none.
    layout : Layout
        Columns of the tables.
    refused_characters : str
        What file names cannot have where the light curves are written.
    provenance : Provenance
        What files say of how they were made.
    run : str
        Differs between attempts, so that Dask does not reuse the tasks of a failed one.
    """

    per_image: str
    table_groups: str
    lightcurves: str
    format: str
    buckets: str | None
    layout: Layout = WITH_PSF
    refused_characters: str = ""
    provenance: Provenance = Provenance()
    run: str = ""


def build_light_curves(n_groups: int, num_buckets: int, options: CurveOptions) -> dd.DataFrame:
    """Build the graph that turns per-image tables into light curves.

    Parameters
    ----------
    n_groups : int
        Number of groups of tables; see `save_table_groups`.
    num_buckets : int
        Number of output partitions of the shuffle.
    options : CurveOptions
        The options of all tasks.

    Returns
    -------
    dask.dataframe.DataFrame
        Not computed yet. It has a row for each source, with its `target_id` and the number
        of `rows` of its light curve.
    """
    read = functools.partial(read_tables, options=options)
    rows = dd.from_map(read, range(n_groups), meta=SHUFFLE_META, label="read")
    shuffled = rows.shuffle(on="target_id", npartitions=num_buckets, shuffle_method="p2p")
    return shuffled.map_partitions(
        functools.partial(write_lightcurves, options=options),
        meta=WRITE_META,
        token="write-lightcurves",
        enforce_metadata=False,
    )


def save_table_groups(
    tables: Iterable[Table],
    path: str,
    *,
    max_bytes: int = GROUP_BYTES,
    max_files: int = GROUP_FILES,
) -> int:
    """Divide tables into groups of similar size, each of which one task reads.

    The groups are saved to a Parquet file, with a row group for each: a graph that contained
    a million names would use too much memory of the scheduler.

    Parameters
    ----------
    tables : iterable of Table
        The tables in order of time.
    path : str
        The file to write.
    max_bytes, max_files : int
        Limits of a group. A table that is larger makes a group by itself.

    Returns
    -------
    int
        Number of groups.
    """
    n_groups = size = 0
    group: list[Table] = []
    store, name = locate_file(path)
    with (
        store.atomic_path(name) as part,
        open(part, "wb") as out,
        pq.ParquetWriter(out, _GROUPS_SCHEMA) as file,
    ):

        def write_group() -> None:
            nonlocal n_groups
            columns = {f.name: [getattr(table, f.name) for table in group] for f in _GROUPS_SCHEMA}
            file.write_table(pa.table(columns, schema=_GROUPS_SCHEMA))
            n_groups += 1
            group.clear()

        for table in tables:
            if group and (size + table.bytes > max_bytes or len(group) >= max_files):
                write_group()
                size = 0
            group.append(table)
            size += table.bytes
        if group:
            write_group()
    return n_groups


_GROUPS_SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "bytes": pa.int64(),
        "rows": pa.int64(),
        "checksum": pa.string(),
        "release": pa.string(),
    }
)


def describe_table(
    name: str, size: int, rows: int | None, checksum: str | None = None, release: str = ""
) -> Table:
    """Describe a per-image table.

    Parameters
    ----------
    name : str
        Name of the file.
    size : int
        Length of the file, bytes.
    rows : int or None
        The number of rows that it must have, None if that is not known.
    checksum : str, optional
        That of its content, if it is known.
    release : str, optional
        That of its frame, if it is known.

    Returns
    -------
    Table
        Its length is that of the rows as CSV, because the shuffle moves rows as CSV. For a
        Parquet file it is estimated.
    """
    if not name.endswith(".csv"):
        size = ROW_BYTES * rows if rows is not None else PARQUET_SHRINKS * size
    return Table(name=name, bytes=size, rows=rows, checksum=checksum, release=release)


def count_partitions(
    tables: Sequence[Table], num_buckets: int, *, max_bytes: int = BUCKET_BYTES
) -> int:
    """Return how many partitions to shuffle into.

    Parameters
    ----------
    tables : sequence of Table
        The tables whose rows are shuffled.
    num_buckets : int
        Number of partitions that the user requested.
    max_bytes : int
        Approximate limit of a partition, bytes of CSV.

    Returns
    -------
    int
        At least `num_buckets`, more if the partitions would be too large; 0 without tables.
    """
    size = sum(table.bytes for table in tables)
    return max(num_buckets, -(-size // max_bytes)) if tables else 0


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    return table.to_pandas(types_mapper=lambda t: TEXT_DTYPE if t == pa.string() else None)


# A row of the shuffle holds all lines of one source from one group of tables, in order, with
# the sort keys of the first and of the last of these lines.
SHUFFLE_META = _to_pandas(
    pa.schema(
        {
            "target_id": pa.string(),
            "rows": pa.int64(),
            "first_mjd": pa.float64(),
            "first_name": pa.string(),
            "last_mjd": pa.float64(),
            "last_name": pa.string(),
            "lines": pa.string(),
        }
    ).empty_table()
)
WRITE_META = pd.DataFrame(
    {"target_id": pd.Series(dtype=TEXT_DTYPE), "rows": pd.Series(dtype="int64")}
)


def read_tables(group: int, options: CurveOptions) -> pd.DataFrame:
    """Read a group of per-image tables.

    Parameters
    ----------
    group : int
        Number of the group, from 0.
    options : CurveOptions
        The options of all tasks.

    Returns
    -------
    pandas.DataFrame
        One row for each source, with the columns of `SHUFFLE_META`.

    Raises
    ------
    FrameError
        If a file is not a per-image table, or does not have the number of rows expected.
    """
    store, name_of_groups = locate_file(options.table_groups)
    with store.open_seekable(name_of_groups) as source, pq.ParquetFile(source) as file:
        found = file.read_row_group(group).to_pydict()
    folder, read = open_store(options.per_image), []
    contents = folder.get_many(found["name"])
    columns = (found[column] for column in ("name", "rows", "checksum", "release"))
    for name, expected, checksum, release, content in zip(*columns, contents, strict=True):
        if checksum is not None and hash_table(content) != checksum:
            raise FrameError(
                f"{folder.path_to(name)} is not the table that was written: delete it, then run "
                "extract"
            )
        try:
            rows = read_lines(content, options.layout, release)
        except (pa.ArrowException, KeyError, OSError) as error:
            raise FrameError(f"{folder.path_to(name)} is not a per-image table: {error}") from error
        if expected is not None and len(rows) != expected:
            raise FrameError(
                f"{folder.path_to(name)} has {format_count(len(rows), 'row')}, {expected:,} were "
                "measured: delete it, then run extract"
            )
        read.append(rows)
    return _to_pandas(_merge_lines_by_source(pa.concat_tables(read)))


def _merge_lines_by_source(rows: pa.Table) -> pa.Table:
    """Return one row for each source, which holds the lines of all its rows, in order."""
    columns = {name: rows.column(name).combine_chunks() for name in rows.column_names}
    ranks = [_rank_values(columns[key]) for key in SORT_KEYS]
    order = np.lexsort(ranks[::-1])
    starts = np.flatnonzero(np.diff(ranks[0][order], prepend=-1))
    bounds = np.append(starts, len(order))
    first, last = pa.array(order[starts]), pa.array(order[bounds[1:] - 1])
    lines = columns["line"].take(pa.array(order))
    offsets = np.frombuffer(lines.buffers()[1], np.int32, len(order) + 1)[bounds]
    # NUL sorts before all other characters, so that the joined names sort by exposure, then band.
    names = pc.binary_join_element_wise(columns["obs_id"], columns["band"], "\0")
    return pa.table(
        {
            "target_id": columns["target_id"].take(first),
            "rows": np.diff(bounds),
            "first_mjd": columns["mjd"].take(first),
            "first_name": names.take(first),
            "last_mjd": columns["mjd"].take(last),
            "last_name": names.take(last),
            "lines": pa.StringArray.from_buffers(
                len(starts), pa.py_buffer(offsets), lines.buffers()[2]
            ),
        }
    )


def write_lightcurves(
    partition: pd.DataFrame, *, options: CurveOptions, partition_info=None
) -> pd.DataFrame:
    """Write the light curve of every source in a partition, its rows in order.

    Parameters
    ----------
    partition : pandas.DataFrame
        The columns of `SHUFFLE_META`, with one or more rows for each source.
    options : CurveOptions
        The options of all tasks.
    partition_info : dict, optional
        From Dask: its ``number`` is that of the partition. It is None for metadata.

    Returns
    -------
    pandas.DataFrame or SpxdaskError
        The columns of `WRITE_META`, a row for each source. An error is returned and not
        raised, because Dask would also log it on the user's terminal.
    """
    number = None if partition_info is None else partition_info["number"]
    try:
        return _write_partition(partition, options, number)
    except (DiskFullError, StoreError) as error:
        return error


def _write_partition(
    partition: pd.DataFrame, options: CurveOptions, number: int | None
) -> pd.DataFrame:
    """Write light curves as the options ask for, and return their numbers of rows."""
    pieces = pa.Table.from_pandas(partition, preserve_index=False)
    columns = {name: pieces.column(name).combine_chunks() for name in pieces.column_names}
    target, n = _rank_values(columns["target_id"]), len(pieces)
    names = _rank_values(pa.concat_arrays([columns["first_name"], columns["last_name"]]))
    first = columns["first_mjd"].to_numpy(), names[:n]
    last = columns["last_mjd"].to_numpy(), names[n:]
    order = np.lexsort((first[1], first[0], target))
    starts = np.flatnonzero(np.diff(target[order], prepend=-1))
    stops = np.append(starts, n)[1:]

    # Groups of tables follow each other in time, so that the pieces of a source seldom overlap.
    # Where two do, or share an exposure in two releases, their lines are sorted one by one.
    one, next_ = order[:-1], order[1:]
    ends_later = (last[0][one] > first[0][next_]) | (
        (last[0][one] == first[0][next_]) & (last[1][one] >= first[1][next_])
    )
    mixed = set(target[one][(target[one] == target[next_]) & ends_later].tolist())

    lines = pc.cast(columns["lines"], pa.large_string()).take(pa.array(order))
    spans = zip(starts.tolist(), stops.tolist(), strict=True)
    texts: list[bytes | memoryview] = [slice_lines(lines, *span) for span in spans]
    for i in np.flatnonzero(np.isin(target[order[starts]], list(mixed))).tolist():
        texts[i] = sort_lines(texts[i], options.layout)
    targets = columns["target_id"].take(pa.array(order[starts]))
    rows = np.add.reduceat(columns["rows"].to_numpy()[order], starts) if n else np.empty(0, int)
    as_parquet = [options.lightcurves] if options.format == "parquet" else []
    as_parquet += [options.buckets] if options.buckets else []
    if as_parquet and number is not None:
        content = _encode_partition(targets, rows, texts, options)
        for folder in as_parquet:
            open_store(folder).put(bucket_name(number), content)
    if options.format == "csv":
        header = render_header(options.layout.light_curve)
        refused = options.refused_characters
        file_names = (light_curve_name(target, refused) for target in targets.to_pylist())
        curves = (
            (name, b"".join((header, text))) for name, text in zip(file_names, texts, strict=True)
        )
        open_store(options.lightcurves).put_many(curves)
    return pd.DataFrame(
        {"target_id": pd.Series(targets.to_pandas(), dtype=TEXT_DTYPE), "rows": rows}
    )


def _rank_values(column: pa.Array) -> np.ndarray:
    """Return an integer for each value of a column; the integers sort as the values do."""
    encoded = column.dictionary_encode()
    rank = np.empty(len(encoded.dictionary), np.int64)
    rank[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(rank))
    return rank[encoded.indices.to_numpy()]


def _encode_partition(
    targets: pa.Array,
    rows: np.ndarray,
    texts: Sequence[bytes | memoryview],
    options: CurveOptions,
) -> bytes:
    """Return the light curves of a partition as a Parquet file."""
    names = options.layout.light_curve
    text = b"".join((render_header(names), *texts))
    found = read_csv(pa.BufferReader(text), names)
    ids = targets.take(pa.array(np.repeat(np.arange(len(targets)), rows)))
    found = found.add_column(0, "target_id", ids)
    metadata = parquet_metadata(("target_id", *names), options.provenance, TITLE)
    return encode_parquet(found, {**metadata, "sources": str(len(targets))})


def light_curve_name(target_id: str, refused_characters: str = "") -> str:
    """Return the name of the CSV file with the light curve of a source.

    Parameters
    ----------
    target_id : str
        Id of the source.
    refused_characters : str
        What file names cannot have where the file is.

    Returns
    -------
    str
        Characters that a file name cannot have are escaped.
    """
    return f"{file_stem(target_id, refused_characters)}.csv"


def bucket_name(number: int) -> str:
    """Return the name of the Parquet file of a partition.

    Parameters
    ----------
    number : int
        Number of the partition, from 0.

    Returns
    -------
    str
    """
    return f"bucket-{number:05d}.parquet"


def remove_others(
    folder: Store, names: set[str], find_ours: Callable[[Store, set[str]], set[str]]
) -> tuple[set[str], set[str]]:
    """Remove the files of earlier runs from a folder; other files of the user stay.

    Parameters
    ----------
    folder : Store
        The folder.
    names : set of str
        Names of the files of this run.
    find_ours : callable
        Is called with the folder and a set of names, and returns the names of those files
        that spxdask wrote.

    Returns
    -------
    missing : set of str
        Files of this run that are not in the folder.
    removed : set of str
        Files that were removed.
    """
    found = folder.list_names()
    removed = find_ours(folder, found - names)
    folder.delete_many(removed)
    return names - found, removed


def find_light_curves(folder: Store, names: set[str]) -> set[str]:
    """Return which of some files are light curves, by their first line or their name.

    Parameters
    ----------
    folder : Store
        Where the files are.
    names : set of str
        Names of the files.

    Returns
    -------
    set of str
    """
    texts = sorted(name for name in names if PurePath(name).suffix == ".csv")
    header = render_header(LIGHT_CURVE_START).rstrip(b"\n")
    return folder.find_starting_with(texts, header) | find_buckets(folder, names)


def find_layout(folder: Store, name: str) -> Layout:
    """Return the columns of a per-image table.

    Parameters
    ----------
    folder : Store
        Where it is.
    name : str
        Name of the file.

    Returns
    -------
    Layout

    Raises
    ------
    FrameError
        If it has any other columns.
    """
    try:
        with folder.open_seekable(name) as source:
            if name.endswith(".csv"):
                header = source.read(HEADER_BYTES).partition(b"\n")[0]
                names = header.decode("utf-8", "replace").split(",")
            else:
                names = pq.ParquetFile(source).schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        raise FrameError(f"{folder.path_to(name)} is not a per-image table: {error}") from error
    for layout in LAYOUTS:
        if tuple(names) == layout.per_image:
            return layout
    raise FrameError(f"{folder.path_to(name)} does not have the columns of a per-image table")


def find_buckets(folder: Store, names: set[str]) -> set[str]:
    """Return which of some files are partitions, by their name.

    Parameters
    ----------
    folder : Store
        Where the files are.
    names : set of str
        Names of the files.

    Returns
    -------
    set of str
    """
    return set(filter(is_bucket_name, names))


def is_bucket_name(name: str) -> bool:
    """Return whether a name is that of the Parquet file of a partition.

    Parameters
    ----------
    name : str
        Name of the file.

    Returns
    -------
    bool
    """
    path = PurePath(name)
    return path.suffix == ".parquet" and path.stem.startswith("bucket-")
