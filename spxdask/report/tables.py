"""The tables of a run, read once: sums over all rows, and the rows of some sources."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spxdask.errors import SpxdaskError
from spxdask.report.channels import BANDS, CHANNELS_PER_BAND, find_channels
from spxdask.science.catalogue import Catalogue
from spxdask.science.flags import REJECTING_MASK
from spxdask.storage import locate_file, open_store
from spxdask.tables.csv import read_csv
from spxdask.tables.parquet import PARQUET_MARK
from spxdask.tables.schema import APERTURE_ONLY, SCHEMA

__all__ = ["Table", "Tally", "TallyOptions", "read_tables"]

# Tables that are read together: each group looks up the ids of the whole catalogue.
GROUP_BYTES = 96_000_000
GROUP_FILES = 2000
# Length of a CSV table divided by that of the same table in Parquet.
PARQUET_SHRINKS = 3
N_BITS = 32
_one_index = threading.Lock()
# What is read of each table. Those behind `flag` are not in tables without PSF photometry.
NUMBERS = ("mjd", "wavelength", "flux", "flux_error", "flag")
PSF_NUMBERS = (
    *("aperture_correction", "psf_flux", "psf_flux_error", "psf_chi2"),
    *("psf_fraction", "neighbour_flux", "bad_fraction"),
)
# Rows of single sources in memory, each of some 70 bytes.
SAMPLE_TYPES: dict[str, Any] = {
    "source": np.int32,
    "band": np.int8,
    "release": np.int16,
    "is_good": np.bool_,
    "mjd": np.float64,
    **dict.fromkeys(("wavelength", "flux", "flux_error", *PSF_NUMBERS), np.float32),
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """A per-image table.

    Attributes
    ----------
    name : str
        Name of the file.
    bytes : int
        Its length.
    release : int
        Number of the release that its frame is of.
    """

    name: str
    bytes: int
    release: int


@dataclass(frozen=True, kw_only=True)
class TallyOptions:
    """What all groups of tables share.

    Attributes
    ----------
    per_image : str
        Folder of the tables.
    catalogue : str
        A file written by `Catalogue.save`.
    stride : int
        Rows of single sources are kept of every source whose index in the catalogue this divides.
    """

    per_image: str
    catalogue: str
    stride: int


@dataclass(kw_only=True)
class Tally:
    """Sums over rows, of some tables or of all.

    Attributes
    ----------
    n_tables, rows, good, with_flux, with_psf_flux, rejected, unknown : int
        Tables read; their rows; those that are good (see `select_good_rows`); those with a flux
        and with a PSF flux; those with a flag that speaks against them; and those of sources that
        are not in the catalogue.
    flags : (32,) int array
        Rows by bit of `flag`.
    channels : (2, 6, 17) int array
        Rows, and good rows, by band and channel.
    per_source : (6, n) int array
        Rows by band and source, in the order of the catalogue.
    sample : dict of str to (m,) array
        Rows of every `stride`-th source, with the columns `SAMPLE_TYPES`.
    unreadable : Counter
        Tables that were not read, by reason.
    """

    n_tables: int = 0
    rows: int = 0
    good: int = 0
    with_flux: int = 0
    with_psf_flux: int = 0
    rejected: int = 0
    unknown: int = 0
    flags: np.ndarray
    channels: np.ndarray
    per_source: np.ndarray
    sample: dict[str, np.ndarray]
    unreadable: Counter[str] = field(default_factory=Counter)

    @classmethod
    def make_empty(cls, n_sources: int) -> Tally:
        """Return the tally of no table.

        Parameters
        ----------
        n_sources : int
            Sources in the catalogue.

        Returns
        -------
        Tally
        """
        return cls(
            flags=np.zeros(N_BITS, np.int64),
            channels=np.zeros((2, len(BANDS), CHANNELS_PER_BAND), np.int64),
            per_source=np.zeros((len(BANDS), n_sources), np.int32),
            sample={name: np.empty(0, kind) for name, kind in SAMPLE_TYPES.items()},
        )

    def __add__(self, other: Tally) -> Tally:
        # Neither is changed, as Dask may need them again.
        sums = {
            name: getattr(self, name) + getattr(other, name)
            for name in vars(self)
            if name != "sample"
        }
        sample = {
            name: np.concatenate([values, other.sample[name]])
            for name, values in self.sample.items()
        }
        return Tally(**sums, sample=sample)


def read_tables(
    tables: Sequence[Table],
    options: TallyOptions,
    scheduler: Any = None,
    *,
    group_bytes: int = GROUP_BYTES,
) -> Tally:
    """Read tables once, on Dask where they are large.

    Parameters
    ----------
    tables : sequence of Table
        The tables.
    options : TallyOptions
        What all of them share.
    scheduler : optional
        A client of a cluster, or what `dask.compute` takes for `scheduler`; by default, threads of
        this process.
    group_bytes : int
        Tables of so many bytes are read together; where there are no more than twice as many, they
        are read one after the other, without Dask.

    Returns
    -------
    Tally
        Of all of them; its sample is in the order of source, band, release and wavelength.
    """
    groups = _group_tables(tables, group_bytes)
    if sum(map(_estimate_bytes, tables)) <= 2 * group_bytes:
        empty = Tally.make_empty(len(_open_catalogue(options.catalogue)))
        total = sum((tally_group(group, options) for group in groups), empty)
    else:
        import dask.bag as db

        tallies = db.from_sequence(groups, npartitions=len(groups)).map(tally_group, options)
        # A reduction in rounds, so that no machine holds the tallies of all groups.
        total = tallies.fold(_add, split_every=8).compute(scheduler=scheduler or "threads")
    sample = total.sample
    keys = ("mjd", "wavelength", "release", "band", "source")
    order = np.lexsort([sample[name] for name in keys])
    total.sample = {name: values[order] for name, values in sample.items()}
    return total


def tally_group(tables: Sequence[Table], options: TallyOptions) -> Tally:
    """Read some tables; the task of the report.

    Parameters
    ----------
    tables : sequence of Table
        The tables.
    options : TallyOptions
        What all groups share.

    Returns
    -------
    Tally
        Of those that can be read; the others are counted.
    """
    found = Tally.make_empty(len(_open_catalogue(options.catalogue)))
    read, releases = [], []
    for table, content in _get_contents(options.per_image, tables):
        try:
            if content is None:
                raise FileNotFoundError("it is not there any more")
            read.append(_parse(content))
        except (pa.ArrowException, KeyError, OSError, SpxdaskError, ValueError) as error:
            found.unreadable[str(error).partition("\n")[0][:200] or type(error).__name__] += 1
            continue
        releases.append(np.full(len(read[-1]), table.release, np.int16))
    found.n_tables = len(read)
    if read:
        _count(pa.concat_tables(read), np.concatenate(releases), options, found)
    return found


def _add(one: Tally, other: Tally) -> Tally:
    return one + other


def _estimate_bytes(table: Table) -> int:
    return table.bytes if table.name.endswith(".csv") else PARQUET_SHRINKS * table.bytes


def _group_tables(tables: Iterable[Table], group_bytes: int) -> list[list[Table]]:
    groups: list[list[Table]] = []
    size = 0
    for table in tables:
        length = _estimate_bytes(table)
        if not groups or size + length > group_bytes or len(groups[-1]) >= GROUP_FILES:
            groups.append([])
            size = 0
        groups[-1].append(table)
        size += length
    return groups


def _get_contents(
    folder: str, tables: Sequence[Table]
) -> list[tuple[Table, bytes | bytearray | None]]:
    store = open_store(folder)
    try:
        return list(zip(tables, store.get_many([t.name for t in tables]), strict=True))
    except FileNotFoundError:
        pass
    # A run at work, or the user, has removed one.
    contents: list[tuple[Table, bytes | bytearray | None]] = []
    for table in tables:
        try:
            contents.append((table, store.get(table.name)))
        except FileNotFoundError:
            contents.append((table, None))
    return contents


def _parse(content: bytes | bytearray) -> pa.Table:
    """Return the columns of a table that the report reads, those of the PSF null without one."""
    wanted = ("target_id", "band", *NUMBERS, *PSF_NUMBERS)
    if content.startswith(PARQUET_MARK):
        names: list[str] = pq.read_schema(pa.BufferReader(content)).names
    else:
        names = content[: content.find(b"\n")].decode("utf-8", "replace").split(",")
    present = [name for name in wanted if name in names or name in APERTURE_ONLY.per_image]
    if content.startswith(PARQUET_MARK):
        rows = pq.read_table(pa.BufferReader(content), columns=present).select(present)
    else:
        rows = read_csv(pa.BufferReader(content), present)
    for name in wanted:
        if name not in present:
            rows = rows.append_column(name, pa.nulls(len(rows), SCHEMA.field(name).type))
    schema = pa.schema([SCHEMA.field(name) for name in wanted])
    return rows.select(wanted).cast(schema)


@functools.lru_cache(maxsize=2)
def _open_catalogue(path: str) -> Catalogue:
    """Map the catalogue once in a process; a file of this name never changes."""
    store, name = locate_file(path)
    return Catalogue.open(store.local_copy(name))


@functools.lru_cache(maxsize=2)
def _index_ids(path: str) -> pd.Index:
    """Return the ids of the catalogue, hashed once in a process: that is most of the work."""
    ids = pd.Index(_open_catalogue(path).target_id.to_numpy(zero_copy_only=False), dtype=object)
    # The first search builds the table.
    ids.get_indexer(ids[:1])
    return ids


def _count(rows: pa.Table, release: np.ndarray, options: TallyOptions, found: Tally) -> None:
    """Add rows to a tally."""
    with _one_index:
        known = _index_ids(options.catalogue)
    source = known.get_indexer(rows.column("target_id").to_numpy()).astype(np.int64)
    band = _to_numpy(pc.index_in(rows.column("band"), value_set=pa.array(BANDS)))
    band = np.where(np.isnan(band.astype(np.float64)), 0, band).astype(np.int64)
    numbers = {
        name: _to_numpy(rows.column(name)).astype(np.float64)
        for name in (*NUMBERS, *PSF_NUMBERS)
        if name != "flag"
    }
    flag = _to_numpy(pc.fill_null(rows.column("flag"), 0)).astype(np.int64)
    has_flux = np.isfinite(numbers["flux"])
    is_rejected = flag & REJECTING_MASK != 0
    is_good = has_flux & ~is_rejected
    channel = find_channels(band, numbers["wavelength"])

    found.rows += len(rows)
    found.with_flux += int(has_flux.sum())
    found.with_psf_flux += int(np.isfinite(numbers["psf_flux"]).sum())
    found.rejected += int(is_rejected.sum())
    found.good += int(is_good.sum())
    found.unknown += int((source < 0).sum())
    for bit in range(N_BITS):
        found.flags[bit] += int((flag >> bit & 1).sum())
    n_channels = found.channels[0].size
    place = band * CHANNELS_PER_BAND + channel
    for i, which in enumerate((channel >= 0, (channel >= 0) & is_good)):
        counts = np.bincount(place[which], minlength=n_channels)
        found.channels[i] += counts.reshape(found.channels[i].shape)
    is_known = source >= 0
    n_sources = found.per_source.shape[1]
    places = (band * n_sources + source)[is_known]
    counts = np.bincount(places, minlength=found.per_source.size)
    found.per_source += counts.reshape(found.per_source.shape).astype(np.int32)

    kept = np.flatnonzero(is_known & (source % options.stride == 0))
    columns = {
        "source": source,
        "band": band,
        "release": release,
        "is_good": is_good,
        **numbers,
    }
    found.sample = {name: columns[name][kept].astype(kind) for name, kind in SAMPLE_TYPES.items()}


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy()
