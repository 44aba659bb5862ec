"""The output folder of a run: what lies where, and what a run keeps for the next one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from upath import UPath

from spxdask.archive.observation import Observation, frame_url
from spxdask.archive.urls import without_credentials
from spxdask.config import BatchConfig, LiteralPath
from spxdask.errors import RunFolderError, SpxdaskError, StoreError
from spxdask.run import lock
from spxdask.run.ledger import Ledger
from spxdask.science.catalogue import Catalogue
from spxdask.storage.files import (
    as_path,
    atomic_path,
    is_local,
    open_seekable,
    read_bytes,
    remove,
    remove_parts,
    sizes,
    translate_store_errors,
)

# Observations are read so many at a time, or in so many parts: few enough that walking over
# them costs nothing, many enough to spread.
PART = 100
MAX_PARTS = 1000

# An open Parquet file bears one reader at a time; another brings down the process.
_reading = threading.Lock()

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class RunFolder:
    """The places below an output folder; making one touches nothing on disk."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = as_path(path)
        if is_local(self.path):
            # As workers may have another working folder.
            self.path = self.path.absolute()
        self.images = self.path / "images"
        self.per_image = self.path / "per_image"
        self.lightcurves = self.path / "lightcurves"
        self.buckets = self.path / "buckets"
        self.query_summary = self.path / "query_summary.yaml"
        self.state = self.path / "state"
        self.config = self.state / "config.yaml"
        self.observations = self.state / "observations.parquet"
        self.tables = self.state / "tables.parquet"
        self._taken: threading.Event | None = None

    def refuse_within(self, path: str | os.PathLike) -> None:
        """Raise RunFolderError for a file of the user's that a run could write over."""
        path = _resolved(as_path(path))
        for ours in (*self._folders, self.query_summary):
            inside = _resolved(ours)
            if is_local(path) == is_local(inside) and inside in (path, *path.parents):
                raise RunFolderError(f"{path} lies where the run writes ({ours}): move it away")

    @property
    def _folders(self) -> tuple[Path | UPath, ...]:
        return self.images, self.per_image, self.lightcurves, self.buckets, self.state

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep other runs out of it for as long as the block lasts.

        Raises
        ------
        RunFolderError
            If the folder cannot be made, or another run is at work in it.
        """
        with ExitStack() as held:
            try:
                if is_local(self.path):
                    for folder in (self.images, self.per_image, self.lightcurves, self.state):
                        folder.mkdir(parents=True, exist_ok=True)
                self._taken = held.enter_context(lock.locked(self.state / "lock"))
            except StoreError as error:
                raise RunFolderError(f"output_dir {error}") from error
            except OSError as error:
                raise RunFolderError(f"output_dir {self.path}: {error.strerror}") from error
            self.tidy()
            yield

    @property
    def is_lock_lost(self) -> bool:
        """Whether another run has taken the folder over from the one that held it last."""
        return self._taken is not None and self._taken.is_set()

    def raise_if_lock_lost(self) -> None:
        """Raise RunFolderError if another run has taken the folder over."""
        if self.is_lock_lost:
            raise RunFolderError(
                f"another run has taken over {self.path}, as nothing was heard of this one for "
                "some time: it stops"
            )

    def tidy(self) -> None:
        """Remove what writers that were killed left; only while nobody writes."""
        for folder in (self.path, *self._folders):
            remove_parts(folder)

    def busy(self) -> str | None:
        """Return which process is at work in the folder, None when there is none."""
        return lock.holder(self.state / "lock")

    def save_config(self, config: BatchConfig) -> None:
        """Keep the configuration for later stages, wherever they are started from."""
        config = dataclasses.replace(
            config,
            output_dir=LiteralPath(self.path),
            catalog_path=LiteralPath(_absolute(as_path(config.catalog_path))),
        )
        with atomic_path(self.config) as part:
            config.to_yaml(part)

    def saved_config(self) -> BatchConfig:
        """Return the configuration of the last run; raise RunFolderError when there is none."""
        try:
            with translate_store_errors(self.path):
                exists = self.config.exists()
        except StoreError as error:
            raise RunFolderError(f"output_dir {error}") from error
        if not exists:
            raise RunFolderError(
                f"{self.path} is not the output folder of a run: start with `spxdask run` or "
                "`spxdask query`, or name the folder with --output"
            )
        # The folder may have been moved.
        saved = BatchConfig.from_yaml(self.config)
        return dataclasses.replace(saved, output_dir=LiteralPath(self.path))

    @cached_property
    def ledger(self) -> Ledger:
        """The outcomes of every frame."""
        return Ledger(self.state / ("ledger.jsonl" if is_local(self.path) else "ledger"))

    def save_catalogue(self, catalogue: Catalogue) -> Path | UPath:
        """Keep the sorted catalogue where workers map it; return its path."""
        path = self.state / f"catalogue-{catalogue.fingerprint}.arrow"
        there = {name for name in sizes(self.state) if name.startswith("catalogue-")}
        if path.name not in there:
            with atomic_path(path) as part:
                catalogue.save(part)
        remove(self.state, there - {path.name})
        return path

    def save_query(self, observations: Sequence[Observation], config: BatchConfig) -> None:
        """Keep the query's result, for the later stages and for the user."""
        names = [option.name for option in dataclasses.fields(Observation)]
        columns = {name: [getattr(o, name) for o in observations] for name in names}
        columns["download_url"] = list(map(without_credentials, columns["download_url"]))
        with atomic_path(self.observations) as part:
            asked = {"query": json.dumps(_query_options(config)), "query_time": _now()}
            schema = _OBSERVATION_SCHEMA.with_metadata(asked)
            size = max(PART, math.ceil(len(observations) / MAX_PARTS))
            pq.write_table(pa.table(columns, schema=schema), part, row_group_size=size)
        with atomic_path(self.query_summary) as part, open(part, "w", encoding="utf-8") as file:
            _write_summary(file, observations, config)

    def load_observations(self, config: BatchConfig) -> Observations | None:
        """Return the last query's result, None before the first.

        Raises
        ------
        RunFolderError
            If it is the result of another query than the configuration asks for.
        """
        with translate_store_errors(self.path):
            if not self.observations.exists():
                return None
            found = Observations(self.observations, config.archive_url)
        for name, value in _query_options(config).items():
            if found.asked[name] != value:
                raise RunFolderError(
                    f"the frames in {self.path} were found with {name} {found.asked[name]!r}, "
                    f"the configuration says {value!r}: run query first"
                )
        return found


class Observations:
    """The frames of a query in order of time, read part by part, as there may be a million.

    Parameters
    ----------
    path : Path or UPath
        The file that `RunFolder.save_query` wrote.
    archive_url : str
        Where the frames are now.

    Attributes
    ----------
    asked : dict
        Options of the query.
    query_time : str
        When, ISO 8601.
    n_parts : int
    """

    def __init__(self, path: Path | UPath, archive_url: str) -> None:
        self._path, self._archive_url = path, archive_url
        found = self._file.metadata
        self._length, self.n_parts = found.num_rows, found.num_row_groups
        self.asked = json.loads(found.metadata[b"query"])
        self.query_time = found.metadata[b"query_time"].decode()

    @cached_property
    def _file(self) -> pq.ParquetFile:
        return pq.ParquetFile(open_seekable(self._path))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_file"}

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Observation]:
        return chain.from_iterable(map(self.part, range(self.n_parts)))

    def part(self, number: int) -> list[Observation]:
        """Return one of the `n_parts` parts."""
        with _reading:
            rows = self._file.read_row_group(number)
        return [
            Observation(**row | {"download_url": frame_url(self._archive_url, row["uri"])})
            for row in rows.to_pylist()
        ]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _absolute(path: Path | UPath) -> Path | UPath:
    return path.absolute() if is_local(path) else path


def _resolved(path: Path | UPath) -> Path | UPath:
    return path.resolve() if is_local(path) else path


def _query_options(config: BatchConfig) -> dict[str, Any]:
    """Return the options that decide which frames are found."""
    options = config.to_dict()
    names = ("center_ra", "center_dec", "radius", "coverage_mode", "bands", "mjd_range", "release")
    return {name: options[name] for name in names}


_OBSERVATION_SCHEMA = pa.schema(
    {
        "obs_id": pa.string(),
        "band": pa.string(),
        "mjd": pa.float64(),
        "wavelength_um": pa.float64(),
        "uri": pa.string(),
        "download_url": pa.string(),
        "size_bytes": pa.int64(),
    }
)


def _write_summary(file, observations: Sequence[Observation], config: BatchConfig) -> None:
    """Write query_summary.yaml, the list of observations piece by piece."""
    how = {"Dumper": _DUMPER, "sort_keys": False, "allow_unicode": True}
    head = summarise(observations, config)
    if not observations:
        head["observations"] = []
    yaml.dump(head, file, **how)
    if observations:
        file.write("observations:\n")
    for start in range(0, len(observations), 1000):
        rows = [
            {
                "obs_id": o.obs_id,
                "band": o.band,
                "mjd": round(o.mjd, 6),
                "wavelength_um": round(o.wavelength_um, 6),
                "download_url": without_credentials(o.download_url),
            }
            for o in observations[start : start + 1000]
        ]
        yaml.dump(rows, file, **how)


def summarise(observations: Sequence[Observation], config: BatchConfig) -> dict[str, Any]:
    """Return what query_summary.yaml says of a query, but for its observations."""
    times = [o.mjd for o in observations]
    return {
        "query_time": _now(),
        "region": {
            "center_ra": config.center_ra,
            "center_dec": config.center_dec,
            "radius_deg": config.radius,
            "coverage_mode": config.coverage_mode,
        },
        "filters": {
            "bands": config.bands,
            "mjd_range": list(config.mjd_range) if config.mjd_range else None,
            "release": config.release,
        },
        "n_observations": len(observations),
        "band_counts": dict(sorted(Counter(o.band for o in observations).items())),
        "time_span_days": round(max(times) - min(times), 6) if times else 0.0,
        "total_bytes": sum(o.size_bytes or 0 for o in observations),
    }


def load_query_summary(path: str | os.PathLike) -> dict[str, Any]:
    """Read the query_summary.yaml of a run.

    Parameters
    ----------
    path : path
        The output folder, or the file itself.

    Returns
    -------
    dict
        query_time, region, filters, n_observations, band_counts, time_span_days,
        total_bytes and observations.

    Raises
    ------
    RunFolderError
        If there is no readable summary.
    """
    path = as_path(path)
    try:
        with translate_store_errors(path):
            file = path / "query_summary.yaml" if path.is_dir() else path
        return yaml.load(read_bytes(file).decode(), Loader=_LOADER)
    except (OSError, SpxdaskError, ValueError, yaml.YAMLError) as error:
        raise RunFolderError(f"{path}: no readable query summary: {error}") from error
