"""The frames of a query, kept in the output folder for the later stages."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spxdask.archive.observation import Observation, frame_url
from spxdask.archive.urls import strip_credentials
from spxdask.storage import Store
from spxdask.text import format_count, format_html_table

# Observations in a part, unless that makes more than so many parts: few enough that reading a
# part costs nothing, many enough to spread over workers.
PART_SIZE = 100
MAX_PARTS = 1000

# Two threads that read an open Parquet file at once bring down the process.
_one_reader = threading.Lock()

_SCHEMA = pa.schema(
    {
        "obs_id": pa.string(),
        "band": pa.string(),
        "mjd": pa.float64(),
        "wavelength_um": pa.float64(),
        "uri": pa.string(),
        "download_url": pa.string(),
        "size_bytes": pa.int64(),
        "footprint": pa.binary(),
    }
)


class Observations:
    """The frames of a query in order of time, read part by part, as there may be a million.

    Parameters
    ----------
    store : Store
        Where the file is.
    name : str
        The file that `save_observations` wrote.
    archive_url : str
        Where the frames are now.

    Attributes
    ----------
    query_options : dict
        Options that decide which frames are found, as the query had them.
    query_time : str
        When the archive was asked, ISO 8601.
    n_parts : int
        Number of parts.
    """

    def __init__(self, store: Store, name: str, archive_url: str) -> None:
        self._store, self._name, self._archive_url = store, name, archive_url
        found = self._file.metadata
        self._length, self.n_parts = found.num_rows, found.num_row_groups
        self.query_options: dict[str, Any] = json.loads(found.metadata[b"query"])
        self.query_time: str = found.metadata[b"query_time"].decode()

    @cached_property
    def _file(self) -> Any:
        file = self._store.open_seekable(self._name)
        weakref.finalize(self, file.close)
        return pq.ParquetFile(file)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_file"}

    def __repr__(self) -> str:
        return f"<Observations: {format_count(len(self), 'frame')}, queried {self.query_time}>"

    def _repr_html_(self) -> str:
        bands = Counter(o.band for o in self)
        rows = [(band, format_count(n, "frame")) for band, n in sorted(bands.items())]
        n_bytes = sum(o.size_bytes or 0 for o in self)
        rows += [("size", f"{n_bytes / 1e9:.3g} GB"), ("queried", self.query_time)]
        return format_html_table(f"Observations: {format_count(len(self), 'frame')}", rows)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Observation]:
        return chain.from_iterable(map(self.part, range(self.n_parts)))

    def part(self, number: int) -> list[Observation]:
        """Return one of the parts.

        Parameters
        ----------
        number : int
            From 0 to before `n_parts`.

        Returns
        -------
        list of Observation
        """
        with _one_reader:
            rows = self._file.read_row_group(number)
        return [
            Observation(**row | {"download_url": frame_url(self._archive_url, row["uri"])})
            for row in rows.to_pylist()
        ]


def save_observations(
    store: Store,
    name: str,
    observations: Sequence[Observation],
    query_options: dict[str, Any],
    *,
    part_size: int = PART_SIZE,
    max_parts: int = MAX_PARTS,
) -> None:
    """Write the frames of a query, without credentials.

    Parameters
    ----------
    store : Store
        Where the file is to be.
    name : str
        The file.
    observations : sequence of Observation
        In order of time.
    query_options : dict
        Options that decide which frames are found; must survive JSON.
    part_size : int
        Observations in a part, at the least.
    max_parts : int
        Number of parts, at the most.
    """
    names = [option.name for option in dataclasses.fields(Observation)]
    columns = {name: [getattr(o, name) for o in observations] for name in names}
    columns["download_url"] = list(map(strip_credentials, columns["download_url"]))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    schema = _SCHEMA.with_metadata({"query": json.dumps(query_options), "query_time": now})
    rows = max(part_size, math.ceil(len(observations) / max_parts))
    with store.atomic_path(name) as part, open(part, "wb") as file:
        pq.write_table(pa.table(columns, schema=schema), file, row_group_size=rows)
