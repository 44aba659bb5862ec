"""The record of each frame of a query as a table: what became of it, and how it was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spxdask.archive.observation import Observation
from spxdask.run.ledger import Ledger, Outcome
from spxdask.run.observations import Observations
from spxdask.run.plan import BATCH_SIZE, NO_SOURCE, find_empty
from spxdask.science.catalogue import Catalogue
from spxdask.storage import Store

__all__ = [
    "FRAMES_NAME",
    "FRAME_COLUMNS",
    "FRAME_SCHEMA",
    "load_frame_table",
    "save_frame_table",
]

FRAMES_NAME = "frames.parquet"
# Name, type, unit and meaning of each column.
FRAME_COLUMNS: tuple[tuple[str, pa.DataType, str, str], ...] = (
    ("filename", pa.string(), "", "name of the frame's file"),
    ("obs_id", pa.string(), "", "exposure, such as 2025W51_1A_0684_2"),
    ("band", pa.string(), "", "detector, such as D3"),
    ("release", pa.string(), "", "release of the archive, such as qr2"),
    ("version", pa.string(), "", "processing, as the file name has it, such as l2b-v21-2025-354"),
    ("mjd", pa.float64(), "d", "middle of the exposure, modified Julian date, UTC"),
    (
        "status",
        pa.string(),
        "",
        "`measured`, `failed`, `fetched` (not measured yet), `pending` (neither), or `empty` (no "
        "source can lie on it)",
    ),
    ("reason", pa.string(), "", "why it failed, or is not measured"),
    ("zodi_scale", pa.float64(), "", "factor of the zodiacal model that was subtracted"),
    ("is_zodi_fitted", pa.bool_(), "", "whether that factor was fitted to the frame"),
    ("aperture_radius", pa.float64(), "pix", "radius of the aperture"),
    ("psf", pa.string(), "", "PSF that fluxes were fitted with"),
    ("calibration", pa.string(), "", "tokens of the calibration products used, with commas"),
    ("n_sources", pa.int64(), "", "catalogue sources near the frame"),
    ("rows", pa.int64(), "", "rows of its table"),
    ("skipped", pa.string(), "", "sources on the frame without a row, by reason, as JSON"),
    ("psf_empty", pa.string(), "", "rows without psf_flux, by reason, as JSON"),
    ("background", pa.float64(), "uJy / arcsec2", "median of bg_level over the rows"),
    (
        "background_scatter",
        pa.float64(),
        "uJy / arcsec2",
        "half the range of bg_level from the 16th to the 84th percentile",
    ),
    ("seconds", pa.float64(), "s", "time that measuring it took"),
    ("bytes", pa.int64(), "", "bytes that came of the frame's file"),
    ("file_bytes", pa.int64(), "", "length of the frame's file"),
    (
        "read",
        pa.string(),
        "",
        "how the frame came: `whole`, or `rows` (only those that its sources need)",
    ),
    ("requests", pa.int64(), "", "requests that its bytes took"),
    (
        "fit_rows",
        pa.int64(),
        "",
        "rows of pixels that the zodiacal fit and the median variance saw; null for whole frames",
    ),
    (
        "astrometry_stars",
        pa.int64(),
        "",
        "bright isolated sources whose offsets were measured; null without a PSF or a row, and "
        "for frames that earlier versions measured",
    ),
    (
        "astrometry_dx",
        pa.float64(),
        "pix",
        "median offset along x of their light from where the WCS puts the catalogue position",
    ),
    ("astrometry_dy", pa.float64(), "pix", "the same along y"),
    (
        "astrometry_scatter",
        pa.float64(),
        "pix",
        "scatter of single sources about it along one axis (1.4826 times the median absolute "
        "deviation); null for fewer than three",
    ),
    (
        "astrometry_error",
        pa.float64(),
        "pix",
        "median error of single sources along one axis, from VARIANCE",
    ),
)
FRAME_SCHEMA = pa.schema([(name, kind) for name, kind, _, _ in FRAME_COLUMNS])
# Raised when the same ledger gives another table.
_VERSION = 3


def save_frame_table(
    state: Store, observations: Observations, ledger: Ledger, sources: Catalogue | None
) -> bool:
    """Write the table of frames, unless it is up to date.

    Parameters
    ----------
    state : Store
        Receives the file `FRAMES_NAME`.
    observations : Observations
        The frames; read part by part.
    ledger : Ledger
        What became of them.
    sources : Catalogue or None
        The sources where frames without any are not fetched, None where they are.

    Returns
    -------
    bool
        Whether it was written.
    """
    origin = _describe_origin(observations, ledger, sources)
    if _read_origin(state) == origin:
        return False
    schema = FRAME_SCHEMA.with_metadata({"origin": json.dumps(origin)})
    with (
        state.atomic_path(FRAMES_NAME) as part,
        open(part, "wb") as file,
        pq.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        for rows in _list_batches(observations, ledger, sources):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return True


def load_frame_table(
    state: Store, observations: Observations, ledger: Ledger, sources: Catalogue | None
) -> pa.Table:
    """Return the table of frames, made anew where the file is not up to date.

    Parameters
    ----------
    state : Store
        Where the file `FRAMES_NAME` is.
    observations : Observations
        The frames; read part by part.
    ledger : Ledger
        What became of them.
    sources : Catalogue or None
        As for `save_frame_table`.

    Returns
    -------
    pyarrow.Table
        The columns `FRAME_COLUMNS`.
    """
    if _read_origin(state) == _describe_origin(observations, ledger, sources):
        with state.open_seekable(FRAMES_NAME) as file:
            return pq.read_table(file)
    batches = _list_batches(observations, ledger, sources)
    tables = [pa.Table.from_pylist(rows, schema=FRAME_SCHEMA) for rows in batches]
    return pa.concat_tables([FRAME_SCHEMA.empty_table(), *tables])


def _list_batches(
    observations: Observations, ledger: Ledger, sources: Catalogue | None
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of the table, up to `BATCH_SIZE` at a time, in order of time."""
    frames = find_empty(observations, sources)
    while batch := list(islice(frames, BATCH_SIZE)):
        yield [_make_row(observation, ledger, is_empty) for observation, is_empty in batch]


def _describe_origin(
    observations: Observations, ledger: Ledger, sources: Catalogue | None
) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "query_time": observations.query_time,
        "n_frames": len(observations),
        "ledger": ledger.position,
        "sources": None if sources is None else sources.identity,
    }


def _read_origin(state: Store) -> Any:
    """Return what the present table was made of, None without one that can be read."""
    if not state.exists(FRAMES_NAME):
        return None
    try:
        with state.open_seekable(FRAMES_NAME) as file:
            return json.loads(pq.read_schema(file).metadata[b"origin"])
    except (pa.ArrowException, KeyError, TypeError, ValueError):
        return None


def _make_row(observation: Observation, ledger: Ledger, is_empty: bool) -> dict[str, Any]:
    fetched = ledger.get("download", observation.filename)
    measured = ledger.get("extract", observation.filename)
    status, reason = _find_status(fetched, measured, is_empty)
    row = {
        "filename": observation.filename,
        "obs_id": observation.obs_id,
        "band": observation.band,
        "release": observation.release,
        "version": observation.stem.rpartition("_spx_")[2],
        "mjd": observation.mjd,
        "status": status,
        "reason": reason,
        "file_bytes": observation.size_bytes,
    }
    if fetched is not None and fetched.status == "done":
        row |= {
            "bytes": fetched.bytes or None,
            "file_bytes": fetched.file_bytes or observation.size_bytes,
            "read": fetched.read or "whole",
            "requests": fetched.requests or None,
        }
    if measured is None or measured.status != "done":
        return row
    row |= {
        name: value for name, value in measured.properties.items() if name in FRAME_SCHEMA.names
    }
    return row | {
        "calibration": _list_tokens(ledger.recipes.get(measured.recipe or "", {})),
        "rows": measured.rows,
        "skipped": json.dumps(measured.skipped, sort_keys=True),
        "psf_empty": json.dumps(measured.psf_empty, sort_keys=True),
        "seconds": measured.seconds,
        "file_bytes": measured.frame_bytes or row["file_bytes"],
        "read": measured.read or row.get("read"),
    }


def _find_status(
    fetched: Outcome | None, measured: Outcome | None, is_empty: bool
) -> tuple[str, str | None]:
    if measured is not None:
        return ("measured", None) if measured.status == "done" else ("failed", measured.reason)
    if fetched is not None:
        return ("fetched", None) if fetched.status == "done" else ("failed", fetched.reason)
    return ("empty", NO_SOURCE) if is_empty else ("pending", None)


def _list_tokens(recipe: dict[str, Any]) -> str:
    """Return the tokens of the products in a recipe."""
    products = [step["product"][0] for step in recipe.values() if step.get("product")]
    return ", ".join(sorted(products))
