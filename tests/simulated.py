"""A small simulated survey that tests share: cut-outs of a few frames, and their archive."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spxdask.simulate.archive import ArchivedFrame, SimulatedArchive
from spxdask.simulate.frames import (
    Exposure,
    Planes,
    SceneOptions,
    Sky,
    make_planes,
    make_sky,
    write_frame,
)

CENTER = (270.0, 66.56)
# Cut-outs about the reference pixel, so that files are small and sources are on them.
WINDOW = (900, 900, 240, 240)
# The real zodiacal scale is fitted only when most pixels are free of SOURCE.
OPTIONS = SceneOptions(crowding=0.3)


@dataclass(frozen=True)
class SimulatedFrame:
    exposure: Exposure
    planes: Planes
    path: Path

    @property
    def archived(self) -> ArchivedFrame:
        return ArchivedFrame.of(self.exposure, self.path, WINDOW)


def exposure(number: int, detector: int = 3, **options) -> Exposure:
    defaults = {
        "obs_id": f"2025W51_1A_{number:04d}_1",
        "detector": detector,
        "ra": CENTER[0],
        "dec": CENTER[1] + 0.01 * number,
        "roll_deg": 15.0 * number,
        "mjd_begin": 61027.0 + number,
    }
    return Exposure(**(defaults | options))


def field_sky(n_sources: int = 40) -> Sky:
    return make_sky(*CENTER, 0.2, n_sources=n_sources, min_separation_arcsec=70, seed=11)


def simulate(folder: Path, exposures: list[Exposure], sky: Sky) -> list[SimulatedFrame]:
    frames = []
    for one in exposures:
        planes = make_planes(one, sky, OPTIONS, window=WINDOW)
        path = folder / one.filename
        write_frame(path, one, planes, window=WINDOW)
        frames.append(SimulatedFrame(one, planes, path))
    return frames


def write_catalogue(path: Path, ids, ra, dec) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["targetid", "ra", "dec"])
        writer.writerows(zip(ids, np.asarray(ra).tolist(), np.asarray(dec).tolist(), strict=True))
    return path


def small_survey(folder: Path, number: int) -> tuple[Path, list[ArchivedFrame]]:
    """Return a catalogue and some frames about it, five places in six bands."""
    sky = field_sky()
    ids = [f"s{i}" for i in range(len(sky))]
    catalogue = write_catalogue(folder / "sources.csv", ids, sky.ra, sky.dec)
    exposures = [exposure(i % 5, 1 + i % 6) for i in range(number)]
    return catalogue, [frame.archived for frame in simulate(folder, exposures, sky)]


def run_options(catalogue: Path, archive: SimulatedArchive, output: Path | str) -> dict:
    """Return the options of a run over the field, few buckets and no patience."""
    return {
        "catalog_path": str(catalogue),
        "center_ra": CENTER[0],
        "center_dec": CENTER[1],
        "radius": 0.05,
        "output_dir": str(output),
        "num_buckets": 5,
        "max_retries": 0,
        "tap_url": archive.tap_url,
        "archive_url": archive.archive_url,
    }
