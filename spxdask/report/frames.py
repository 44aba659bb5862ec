"""What became of the frames of a run, from its ledger."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from spxdask.report.channels import BANDS
from spxdask.run.folder import RunFolder
from spxdask.run.frame_table import FRAME_SCHEMA, load_frame_table
from spxdask.run.observations import Observations
from spxdask.science.catalogue import Catalogue

__all__ = ["STATES", "FrameRecord", "collect_frames", "describe_frames"]

# In the order in which they are shown.
STATES = ("measured", "failed", "fetched", "pending", "empty")
# An offset of so many pixels takes about one percent from a flux.
MAX_OFFSET_PIXELS = 0.1
# A frame with a larger one is named if as many stars or more tell it.
MIN_STARS_OF_FRAME = 5
_URL = re.compile(r"\b[a-z][a-z0-9+]*://\S+\s*")


@dataclass(kw_only=True)
class FrameRecord:
    """The frames of a query.

    Attributes
    ----------
    frames : pandas.DataFrame
        A row a frame, in order of time: the columns of `FRAME_COLUMNS`.
    footprints : list of (k, 2) float array or None
        Corners of each, deg; None where they are not known.
    failures : dict of str to (str, str)
        Stage and reason of each that failed, by name.
    warnings : Counter
        Frames by warning.
    seconds : dict of str to float
        Time in the tasks of each stage, added up.
    bytes_fetched, bytes_written : int
        Length of the frames that were fetched, and of their tables.
    first_time, last_time : str or None
        When the first and the last outcome that counts was recorded, ISO 8601.
    """

    frames: pd.DataFrame
    footprints: list[np.ndarray | None] = field(default_factory=list)
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)
    warnings: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: {"download": 0.0, "extract": 0.0})
    bytes_fetched: int = 0
    bytes_written: int = 0
    first_time: str | None = None
    last_time: str | None = None


def collect_frames(
    folder: RunFolder, observations: Observations | None, sources: Catalogue | None
) -> FrameRecord:
    """Read what became of each frame.

    Parameters
    ----------
    folder : RunFolder
        The run; its ledger is up to date.
    observations : Observations or None
        The frames of the last query; None without one.
    sources : Catalogue or None
        The sources where frames without any are not fetched, None where they are.

    Returns
    -------
    FrameRecord
        Without frames where there was no query.
    """
    if observations is None:
        return FrameRecord(frames=FRAME_SCHEMA.empty_table().to_pandas())
    table = load_frame_table(folder.state, observations, folder.ledger, sources)
    record = FrameRecord(frames=table.to_pandas())
    for observation in observations:
        packed = observation.footprint
        corners = None if packed is None else np.frombuffer(packed, "<f8").reshape(-1, 2)
        record.footprints.append(corners)
        _add_outcomes(record, folder, observation.filename)
    return record


def _add_outcomes(record: FrameRecord, folder: RunFolder, filename: str) -> None:
    for stage in ("download", "extract"):
        outcome = folder.ledger.get(stage, filename)
        if outcome is None:
            continue
        record.seconds[stage] += outcome.seconds
        times = [t for t in (record.first_time, record.last_time, outcome.time) if t is not None]
        record.first_time, record.last_time = (min(times), max(times)) if times else (None, None)
        if outcome.status != "done":
            record.failures[filename] = stage, outcome.reason or "unknown reason"
            continue
        # As in the table of frames, extraction decides where there was one.
        if stage == "extract":
            record.failures.pop(filename, None)
            record.bytes_written += outcome.bytes
        else:
            record.bytes_fetched += outcome.bytes
        record.warnings.update(outcome.warnings)


def describe_frames(record: FrameRecord, output: str) -> dict[str, Any]:
    """Return the numbers of the frames.

    Parameters
    ----------
    record : FrameRecord
        The frames.
    output : str
        The output folder, for the command that tries failed frames again.

    Returns
    -------
    dict
        As `report.json` has it under ``frames``.
    """
    frames = record.frames
    status = frames["status"]
    return {
        "found": len(frames),
        "by_state": {state: int((status == state).sum()) for state in STATES},
        "by_band": _count_states(frames, "band"),
        "by_release": _count_states(frames, "release"),
        "failures": list(_group_failures(record)),
        "retry_command": f"spxdask run --output {shlex.quote(output)} --retry-failed",
        "warnings": dict(sorted(record.warnings.items())),
        "detectors": list(_describe_detectors(frames)),
        "astrometry": _describe_astrometry(frames),
        "sources_left_out": _add_counts(frames["skipped"]),
        "rows_without_psf_flux": _add_counts(frames["psf_empty"]),
        "first_mjd": _as_number(frames["mjd"][status == "measured"].min()),
        "last_mjd": _as_number(frames["mjd"][status == "measured"].max()),
        "calibration": sorted(
            {token for text in frames["calibration"].dropna().unique() for token in _split(text)}
        ),
        "psf": sorted(frames["psf"].dropna().unique()),
    }


def _split(tokens: str) -> list[str]:
    return [token for token in tokens.split(", ") if token]


def _count_states(frames: pd.DataFrame, column: str) -> list[dict[str, Any]]:
    """Count the frames of each band or release by their states."""
    found = []
    for name, group in frames.groupby(column, sort=True):
        counts = {state: int((group["status"] == state).sum()) for state in STATES}
        n_bytes = int(group["bytes"].fillna(0).sum())
        rows = int(group["rows"].fillna(0).sum())
        found.append({column: name, "found": len(group), **counts, "rows": rows, "bytes": n_bytes})
    return found


def _group_failures(record: FrameRecord) -> Iterator[dict[str, Any]]:
    """Group failures whose reasons differ in the names of files alone, the largest group first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for filename, (stage, reason) in record.failures.items():
        stem = filename.rpartition(".")[0] or filename
        general = _URL.sub("", reason).replace(filename, "<frame>").replace(stem, "<frame>")
        groups.setdefault((stage, general or reason), []).append(filename)
    for (stage, reason), names in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        yield {
            "stage": stage,
            "reason": reason,
            "n": len(names),
            "filenames": sorted(names),
        }


def _describe_detectors(frames: pd.DataFrame) -> Iterator[dict[str, Any]]:
    measured = frames[frames["status"] == "measured"]
    for band in BANDS:
        group = measured[measured["band"] == band]
        if not len(group):
            continue
        found: dict[str, Any] = {
            "band": band,
            "frames": len(group),
            "zodi_not_fitted": int((group["is_zodi_fitted"] == False).sum()),  # noqa: E712
        }
        for name in ("zodi_scale", "background", "aperture_radius"):
            values = group[name].dropna().to_numpy(np.float64)
            low, median, high = (
                np.percentile(values, (15.865, 50.0, 84.135)) if len(values) else [np.nan] * 3
            )
            found[name] = _as_number(median)
            found[f"{name}_scatter"] = _as_number((high - low) / 2)
        yield found


def _describe_astrometry(frames: pd.DataFrame) -> dict[str, Any]:
    """Return the offsets of stars by detector, and which frames are off."""
    names = [f"astrometry_{name}" for name in ("dx", "dy", "scatter", "error")]
    told = frames[(frames["status"] == "measured") & (frames["astrometry_stars"] > 0)]
    detectors = []
    for band in BANDS:
        group = told[told["band"] == band]
        if not len(group):
            continue
        stars = group["astrometry_stars"].to_numpy(np.int64)
        found: dict[str, Any] = {"band": band, "frames": len(group), "stars": int(stars.sum())}
        for name in names:
            # A frame counts by its stars.
            values = np.repeat(group[name].to_numpy(np.float64), stars)
            values = values[np.isfinite(values)]
            low, median, high = (
                np.percentile(values, (15.865, 50.0, 84.135)) if len(values) else [np.nan] * 3
            )
            short = name.removeprefix("astrometry_")
            found[short] = _as_number(median)
            if short in ("dx", "dy"):
                found[f"{short}_scatter"] = _as_number((high - low) / 2)
        detectors.append(found)
    offset = np.hypot(told["astrometry_dx"], told["astrometry_dy"])
    is_off = (offset > MAX_OFFSET_PIXELS) & (told["astrometry_stars"] >= MIN_STARS_OF_FRAME)
    return {
        "frames": len(told),
        "stars": int(told["astrometry_stars"].sum()),
        "detectors": detectors,
        "max_offset": MAX_OFFSET_PIXELS,
        "frames_off": [
            {"filename": name, "band": band, "offset": round(float(one), 4)}
            for name, band, one in zip(
                told["filename"][is_off], told["band"][is_off], offset[is_off], strict=True
            )
        ],
    }


def _add_counts(column: pd.Series) -> dict[str, int]:
    total: Counter[str] = Counter()
    for text in column.dropna():
        # Most frames have none.
        if text != "{}":
            total.update(json.loads(text))
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def _as_number(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)
