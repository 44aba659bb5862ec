"""Aggregate: from one table a frame to one light curve a source."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spxdask import tables
from spxdask.errors import DiskFullError, FrameError
from spxdask.storage import file_stem, told_when_full, whole_file, write_whole

TEXT = pd.ArrowDtype(pa.string())
# A shuffle costs some 30 ms an input partition, so small tables are read in groups; one
# group must fit a worker many times over.
GROUP_BYTES = 32_000_000
GROUP_FILES = 500
# One of these is sorted and written at a time by each thread, with some copies of it.
BUCKET_BYTES = 32_000_000


@dataclass(frozen=True, kw_only=True)
class Table:
    """A per-image table on disk and the rows it must have, None when that is not known."""

    path: str
    rows: int | None


def light_curves(
    groups: Sequence[Sequence[Table]], folder: str, buckets: str | None, num_buckets: int
) -> dd.DataFrame:
    """Build the graph that turns per-image tables into light curves.

    Parameters
    ----------
    groups : sequence of sequences of Table
        Tables to read together; see `group`.
    folder : str
        Where one CSV a source is written.
    buckets : str or None
        Where the shuffled and sorted partitions are kept as Parquet, if anywhere.
    num_buckets : int
        Output partitions of the shuffle.

    Returns
    -------
    dask.dataframe.DataFrame
        Lazy; one row a source with its `target_id` and the `rows` of its light curve.
    """
    rows = dd.from_map(read_tables, groups, meta=META, label="read-tables")
    shuffled = rows.shuffle(on="target_id", npartitions=num_buckets, shuffle_method="p2p")
    write = functools.partial(write_lightcurves, folder=folder, buckets=buckets)
    return shuffled.map_partitions(
        write,
        meta=WRITTEN,
        token="write-lightcurves",
        enforce_metadata=False,
    )


def group(found: Sequence[Table]) -> list[list[Table]]:
    """Divide tables into groups of similar size, each read by one task."""
    groups: list[list[Table]] = []
    size = 0
    for table in found:
        bytes_ = os.stat(table.path).st_size
        if not groups or size + bytes_ > GROUP_BYTES or len(groups[-1]) >= GROUP_FILES:
            groups.append([])
            size = 0
        groups[-1].append(table)
        size += bytes_
    return groups


def partitions(groups: Sequence[Sequence[Table]], num_buckets: int) -> int:
    """Return how many partitions to shuffle into: more than asked for if they were large."""
    size = sum(os.stat(table.path).st_size for tables_ in groups for table in tables_)
    return max(num_buckets, -(-size // BUCKET_BYTES))


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    return table.to_pandas(types_mapper=lambda t: TEXT if t == pa.string() else None)


# What is shuffled: the lines of a source from one group of tables in one piece, in order,
# and what the first and the last of them are ordered by.
META = _to_pandas(
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
WRITTEN = pd.DataFrame({"target_id": pd.Series(dtype=TEXT), "rows": pd.Series(dtype="int64")})


def read_tables(group: Sequence[Table]) -> pd.DataFrame:
    """Read a group of per-image tables; raise FrameError for one that lost rows.

    Returns
    -------
    pandas.DataFrame
        One row a source, as `META` has it.
    """
    read = []
    for table in group:
        try:
            rows = tables.read_lines(table.path)
        except pa.ArrowException as error:
            raise FrameError(f"{table.path} is not a per-image table: {error}") from error
        if table.rows is not None and len(rows) != table.rows:
            raise FrameError(
                f"{table.path} has {len(rows)} rows, {table.rows} were measured; extract it again"
            )
        read.append(rows)
    return _to_pandas(_bundled(pa.concat_tables(read)))


def _bundled(rows: pa.Table) -> pa.Table:
    """Put the lines of each source into one piece, in order."""
    columns = {name: rows.column(name).combine_chunks() for name in rows.column_names}
    ranks = [_rank(columns[key]) for key in tables.SORT_KEYS]
    order = np.lexsort(ranks[::-1])
    starts = np.flatnonzero(np.diff(ranks[0][order], prepend=-1))
    bounds = np.append(starts, len(order))
    first, last = pa.array(order[starts]), pa.array(order[bounds[1:] - 1])
    lines = columns["line"].take(pa.array(order))
    offsets = np.frombuffer(lines.buffers()[1], np.int32, len(order) + 1)[bounds]
    # As no character comes before it, a pair of names sorts as its first, then its second.
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
    partition: pd.DataFrame, *, folder: str, buckets: str | None, partition_info=None
) -> pd.DataFrame:
    """Write the light curve of every source in a partition, its rows in order.

    Returns
    -------
    pandas.DataFrame or DiskFullError
        As `WRITTEN`. An error is returned, as Dask would log it where the user sees it.
    """
    number = None if partition_info is None else partition_info["number"]
    try:
        with told_when_full(folder):
            return _write(partition, folder, buckets, number)
    except DiskFullError as error:
        return error


def _write(
    partition: pd.DataFrame, folder: str, buckets: str | None, number: int | None
) -> pd.DataFrame:
    pieces = pa.Table.from_pandas(partition, preserve_index=False)
    columns = {name: pieces.column(name).combine_chunks() for name in pieces.column_names}
    target, n = _rank(columns["target_id"]), len(pieces)
    names = _rank(pa.concat_arrays([columns["first_name"], columns["last_name"]]))
    first = columns["first_mjd"].to_numpy(), names[:n]
    last = columns["last_mjd"].to_numpy(), names[n:]
    order = np.lexsort((first[1], first[0], target))
    starts = np.flatnonzero(np.diff(target[order], prepend=-1))
    stops = np.append(starts, n)[1:]

    # Tables are read in order of time, so that one piece hardly ever begins before
    # another ends.
    one, next_ = order[:-1], order[1:]
    ends_later = (last[0][one] > first[0][next_]) | (
        (last[0][one] == first[0][next_]) & (last[1][one] > first[1][next_])
    )
    mixed = set(target[one][(target[one] == target[next_]) & ends_later].tolist())

    lines = pc.cast(columns["lines"], pa.large_string()).take(pa.array(order))
    texts = [
        tables.lines_to_bytes(lines, start, stop) for start, stop in zip(starts, stops, strict=True)
    ]
    for i in np.flatnonzero(np.isin(target[order[starts]], list(mixed))):
        texts[i] = tables.sort_lines(texts[i])
    targets = columns["target_id"].take(pa.array(order[starts]))
    rows = np.add.reduceat(columns["rows"].to_numpy()[order], starts) if n else np.empty(0, int)
    if buckets is not None and number is not None:
        ids = targets.take(pa.array(np.repeat(np.arange(len(targets)), rows)))
        _write_bucket(Path(buckets) / bucket_name(number), ids, texts)
    header = tables.csv_header(tables.LIGHT_CURVE)
    for name, text in zip(targets.to_pylist(), texts, strict=True):
        write_whole(f"{folder}/{light_curve_name(name)}", b"".join((header, text)))
    return pd.DataFrame({"target_id": pd.Series(targets.to_pandas(), dtype=TEXT), "rows": rows})


def _rank(column: pa.Array) -> np.ndarray:
    """Return integers that sort as the values of a column do."""
    encoded = column.dictionary_encode()
    rank = np.empty(len(encoded.dictionary), np.int64)
    rank[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(rank))
    return rank[encoded.indices.to_numpy()]


def _write_bucket(path: Path, ids: pa.Array, texts: Sequence[memoryview]) -> None:
    """Write a sorted partition as Parquet, its numbers as numbers."""
    text = b"".join((tables.csv_header(tables.LIGHT_CURVE), *texts))
    rows = tables.read_csv(pa.BufferReader(text), tables.LIGHT_CURVE)
    with whole_file(path, durable=False) as part:
        pq.write_table(rows.add_column(0, "target_id", ids), part)


def light_curve_name(target_id: str) -> str:
    """Return the name of a source's light-curve file."""
    return f"{file_stem(target_id)}.csv"


def bucket_name(number: int) -> str:
    """Return the name of the Parquet file of a partition."""
    return f"bucket-{number:05d}.parquet"


def keep_only(folder: str, names: set[str], is_ours: Callable[[Path], bool]) -> set[str]:
    """Remove from a folder what an older run left there; a user's own files stay.

    Returns
    -------
    set of str
        The names that are not there.
    """
    missing = set(names)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in names:
                missing.discard(entry.name)
            elif entry.is_file(follow_symlinks=False) and is_ours(Path(entry.path)):
                os.unlink(entry.path)
    return missing


def is_light_curve(path: Path) -> bool:
    """Tell whether a file is a light curve that we wrote, by its first line."""
    header = tables.csv_header(tables.LIGHT_CURVE)
    with open(path, "rb") as file:
        return path.suffix == ".csv" and file.read(len(header)) == header


def is_bucket(path: Path) -> bool:
    """Tell whether a file is named as a kept partition is."""
    return path.suffix == ".parquet" and path.stem.startswith("bucket-")
