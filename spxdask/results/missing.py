"""Sources of the catalogue that have no row, and why."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spxdask.run.folder import SKIPPED_ROWS_NAME
from spxdask.run.observations import Observations
from spxdask.science.catalogue import Catalogue
from spxdask.science.footprint import find_sources_on
from spxdask.storage import Store
from spxdask.tables.quantities import Meaning
from spxdask.text import format_count

__all__ = ["MISSING_MEANINGS", "find_missing", "read_skipped_rows"]

MISSING_MEANINGS = {
    "id": Meaning("", "id of the source as in the catalogue", "meta.id;meta.main"),
    "ra": Meaning("deg", "right ascension in the catalogue, ICRS", "pos.eq.ra;meta.main"),
    "dec": Meaning("deg", "declination in the catalogue, ICRS", "pos.eq.dec;meta.main"),
    "frames": Meaning("", "frames of the query whose footprints it lies in", "meta.number"),
    "measured": Meaning("", "how many of them were measured", "meta.number"),
    "failed": Meaning("", "how many of them failed", "meta.number"),
    "reason": Meaning("", "why it has no row", "meta.note"),
}
# Frames that are compared with the sources at once.
BATCH_SIZE = 1000


def find_missing(
    catalogue: Catalogue,
    ids: pa.Array,
    observations: Observations | None,
    statuses: Mapping[str, str],
    *,
    is_aggregated: bool,
) -> pa.Table:
    """Return the sources of a catalogue that have no row.

    Parameters
    ----------
    catalogue : Catalogue
        All sources.
    ids : pyarrow large_string array
        Those with a row.
    observations : Observations or None
        The frames of the query, None if they are not known.
    statuses : mapping of str to str
        What became of each frame, by file name.
    is_aggregated : bool
        Whether the light curves have all rows that were measured.

    Returns
    -------
    pyarrow.Table
        The columns of `MISSING_MEANINGS`, in the order of the catalogue.
    """
    is_missing = ~pc.is_in(catalogue.target_id, value_set=ids).to_numpy(zero_copy_only=False)
    index = np.flatnonzero(is_missing)
    index = index[np.argsort(catalogue.row[index], kind="stable")]
    ra, dec = catalogue.ra[index], catalogue.dec[index]
    counts = {name: np.zeros(len(index), np.int64) for name in ("frames", "measured", "failed")}
    n_unknown = 0
    if observations is not None and len(index):
        frames = iter(observations)
        while batch := list(islice(frames, BATCH_SIZE)):
            footprints = [observation.footprint for observation in batch]
            n_unknown += footprints.count(None)
            for frame, near in zip(batch, find_sources_on(footprints, ra, dec), strict=True):
                counts["frames"][near] += 1
                status = statuses.get(frame.filename)
                if status in counts:
                    counts[status][near] += 1
    reasons = [
        _explain(
            *numbers,
            n_unknown=n_unknown,
            is_known=observations is not None,
            is_aggregated=is_aggregated,
        )
        for numbers in zip(*(counts[name].tolist() for name in counts), strict=True)
    ]
    return pa.table(
        {
            "id": catalogue.target_id.take(pa.array(index)),
            "ra": ra,
            "dec": dec,
            **counts,
            "reason": pa.array(reasons, pa.string()),
        }
    )


def _explain(
    n_frames: int,
    n_measured: int,
    n_failed: int,
    *,
    n_unknown: int,
    is_known: bool,
    is_aggregated: bool,
) -> str:
    """Return why a source has no row, from the numbers of its frames."""
    if not is_known:
        return "not known: there is no query in the folder"
    if not n_frames:
        if n_unknown:
            return f"not known: {format_count(n_unknown, 'frame')} of the query without a footprint"
        return "on no frame of the query"
    if n_measured and not is_aggregated:
        return "not known: the light curves are not up to date, resume the run"
    if n_measured:
        others = f", {n_failed:,} failed" if n_failed else ""
        return (
            f"at the edge of {format_count(n_measured, 'measured frame')}, or with too few pixels "
            f"for a background{others}"
        )
    if n_failed == n_frames:
        return f"{format_count(n_frames, 'frame')} failed"
    left = n_frames - n_failed
    others = f", {n_failed:,} failed" if n_failed else ""
    return f"{format_count(left, 'frame')} not measured yet{others}"


def read_skipped_rows(root: Store) -> Iterator[dict[str, str]]:
    """Yield the rows of the user's catalogue that were skipped.

    Parameters
    ----------
    root : Store
        The output folder.

    Yields
    ------
    dict of str to str
        ``row``, ``line``, ``reason``, ``target_id``, ``ra`` and ``dec``, as text.
    """
    if not root.exists(SKIPPED_ROWS_NAME):
        return
    text = root.get(SKIPPED_ROWS_NAME).decode()
    yield from csv.DictReader(io.StringIO(text, newline=""))
