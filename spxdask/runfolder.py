"""The output folder of a run: what lies where, and what a run keeps for the next one."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from spxdask.config import BatchConfig
from spxdask.errors import RunFolderError
from spxdask.ledger import Ledger
from spxdask.observation import Observation
from spxdask.science.catalogue import Catalogue
from spxdask.storage import remove_parts, whole_file

logger = logging.getLogger(__name__)

LOCK_ATTEMPTS = 3
LOCK_PAUSE_S = 0.05

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class RunFolder:
    """The places below an output folder; making one touches nothing on disk."""

    def __init__(self, path: str | os.PathLike) -> None:
        # Absolute, as workers may have another working folder.
        self.path = Path(path).absolute()
        self.images = self.path / "images"
        self.per_image = self.path / "per_image"
        self.lightcurves = self.path / "lightcurves"
        self.buckets = self.path / "buckets"
        self.query_summary = self.path / "query_summary.yaml"
        self.state = self.path / "state"
        self.config = self.state / "config.yaml"
        self.observations = self.state / "observations.parquet"

    def refuse_within(self, path: str | os.PathLike) -> None:
        """Raise RunFolderError for a file of the user's that a run could write over."""
        path = Path(path).resolve()
        for place in (
            self.images,
            self.per_image,
            self.lightcurves,
            self.buckets,
            self.query_summary,
            self.state,
        ):
            if path.is_relative_to(place.resolve()):
                raise RunFolderError(f"{path} lies where the run writes ({place}): move it away")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep other runs out of it for as long as the block lasts.

        Raises
        ------
        RunFolderError
            If the folder cannot be made, or another run is at work in it.
        """
        try:
            for folder in (self.images, self.per_image, self.lightcurves, self.state):
                folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.state / "lock", "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise RunFolderError(f"output_dir {self.path}: {error.strerror}") from error
        with lock:
            try:
                _lock(lock)
            except BlockingIOError as error:
                lock.seek(0)
                raise RunFolderError(
                    f"another run is at work in {self.path} ({lock.read().strip()}); wait for "
                    "its end, or give this one another output_dir"
                ) from error
            except OSError as error:
                # Some network file systems have no locks.
                logger.warning("%s cannot be locked: %s", self.path, error.strerror)
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            self.tidy()
            yield

    def tidy(self) -> None:
        """Remove what writers that were killed left; only while nobody writes."""
        for folder in (
            self.path,
            self.images,
            self.per_image,
            self.lightcurves,
            self.buckets,
            self.state,
        ):
            remove_parts(folder)

    def busy(self) -> str | None:
        """Return which process is at work in the folder, None when there is none."""
        try:
            lock = open(self.state / "lock", encoding="utf-8")  # noqa: SIM115
        except FileNotFoundError:
            return None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read().strip()
            except OSError as error:
                logger.warning("%s cannot be locked: %s", self.path, error.strerror)
            return None

    def save_config(self, config: BatchConfig) -> None:
        """Keep the configuration for later stages, wherever they are started from."""
        config = dataclasses.replace(
            config,
            output_dir=str(self.path),
            catalog_path=os.path.abspath(config.catalog_path),
        )
        with whole_file(self.config) as part:
            config.to_yaml(part)

    def saved_config(self) -> BatchConfig:
        """Return the configuration of the last run; raise RunFolderError when there is none."""
        if not self.config.exists():
            raise RunFolderError(
                f"{self.path} is not the output folder of a run: start with `spxdask run` or "
                "`spxdask query`, or name the folder with --output"
            )
        # The folder may have been moved.
        return dataclasses.replace(BatchConfig.from_yaml(self.config), output_dir=str(self.path))

    @cached_property
    def ledger(self) -> Ledger:
        """The outcomes of every frame."""
        return Ledger(self.state / "ledger.jsonl")

    def save_catalogue(self, catalogue: Catalogue) -> Path:
        """Keep the sorted catalogue where workers map it; return its path."""
        path = self.state / f"catalogue-{catalogue.fingerprint}.arrow"
        if not path.exists():
            with whole_file(path) as part:
                catalogue.save(part)
        for other in self.state.glob("catalogue-*.arrow"):
            if other != path:
                other.unlink()
        return path

    def save_query(self, observations: Sequence[Observation], config: BatchConfig) -> None:
        """Keep the query's result, for the later stages and for the user."""
        names = [option.name for option in dataclasses.fields(Observation)]
        columns = {name: [getattr(o, name) for o in observations] for name in names}
        with whole_file(self.observations) as part:
            asked = {"query": json.dumps(_query_options(config))}
            schema = _OBSERVATION_SCHEMA.with_metadata(asked)
            pq.write_table(pa.table(columns, schema=schema), part)
        with whole_file(self.query_summary) as part, open(part, "w", encoding="utf-8") as file:
            summary = summarise(observations, config)
            yaml.dump(summary, file, Dumper=_DUMPER, sort_keys=False, allow_unicode=True)

    def load_observations(self, config: BatchConfig) -> list[Observation] | None:
        """Return the last query's result, None before the first.

        Raises
        ------
        RunFolderError
            If it is the result of another query than the configuration asks for.
        """
        if not self.observations.exists():
            return None
        table = pq.read_table(self.observations)
        asked = json.loads(table.schema.metadata[b"query"])
        for name, value in _query_options(config).items():
            if asked[name] != value:
                raise RunFolderError(
                    f"the frames in {self.path} were found with {name} {asked[name]!r}, the "
                    f"configuration says {value!r}: run query first"
                )
        return [
            Observation(**row | {"download_url": f"{config.archive_url}/{row['uri']}"})
            for row in table.to_pylist()
        ]


def _lock(file: IO) -> None:
    """Lock a file for ourselves; one who looks whether it is locked is waited for."""
    for _ in range(LOCK_ATTEMPTS - 1):
        with suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(LOCK_PAUSE_S)
    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


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


def summarise(observations: Sequence[Observation], config: BatchConfig) -> dict[str, Any]:
    """Return what query_summary.yaml says of a query."""
    times = [o.mjd for o in observations]
    return {
        "query_time": datetime.now(UTC).isoformat(timespec="seconds"),
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
        "observations": [
            {
                "obs_id": o.obs_id,
                "band": o.band,
                "mjd": round(o.mjd, 6),
                "wavelength_um": round(o.wavelength_um, 6),
                "download_url": o.download_url,
            }
            for o in observations
        ],
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
    path = Path(path)
    file = path / "query_summary.yaml" if path.is_dir() else path
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=_LOADER)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunFolderError(f"{file}: no readable query summary: {error}") from error
