"""Small simulated surveys for tests: a sky, cut-outs of a few frames, and a catalogue."""

from __future__ import annotations

import csv
from collections.abc import Sequence
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
# Ids that mean something to a file system, a shell, a CSV reader, a spreadsheet or a parser of
# numbers, and one whose file name would be too long.
AWKWARD_IDS = [
    "39633458707826492",
    "39633458707826493",
    "a/b",
    "../../etc/passwd",
    ".hidden",
    'quo"te, comma',
    "line\nfeed",
    "100%",
    "=cmd()|' /C calc'!A0",
    "bell\a\x01\x7f\r",
    "é" * 150,
    "007",
    "7",
    "7.5",
    "NA",
]
# A cut-out about the reference pixel keeps files small and has the field's sources on it.
WINDOW = (900, 900, 240, 240)
# The zodiacal scale is fitted only when most pixels are free of the SOURCE flag.
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


def simulate(folder: Path, exposures: Sequence[Exposure], sky: Sky) -> list[SimulatedFrame]:
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


@dataclass(frozen=True)
class Survey:
    """A sky with the names of its sources, and the frames that were taken of it."""

    sky: Sky
    ids: list[str]
    frames: list[SimulatedFrame]

    @property
    def archived(self) -> list[ArchivedFrame]:
        return [frame.archived for frame in self.frames]

    @property
    def size_bytes(self) -> int:
        """The size of all frames together."""
        return sum(frame.path.stat().st_size for frame in self.frames)

    def write_catalogue(self, path: Path) -> Path:
        return write_catalogue(path, self.ids, self.sky.ra, self.sky.dec)


def make_survey(
    folder: Path,
    exposures: Sequence[Exposure],
    *,
    ids: Sequence[str] = (),
    n_sources: int = 40,
) -> Survey:
    """Simulate exposures of the field; sources without a given id are s0, s1 and so on."""
    sky = field_sky(n_sources)
    ids = [*ids, *(f"s{i}" for i in range(len(sky) - len(ids)))]
    return Survey(sky, ids, simulate(folder, exposures, sky))


def small_survey(folder: Path, number: int) -> tuple[Path, list[ArchivedFrame]]:
    """Return a catalogue and some frames of its sources, at five positions in six bands."""
    survey = make_survey(folder, [exposure(i % 5, 1 + i % 6) for i in range(number)])
    return survey.write_catalogue(folder / "sources.csv"), survey.archived


def run_options(catalogue: Path, archive: SimulatedArchive, output: Path | str) -> dict:
    """Return the options of a run over the field, with few buckets, without retries and report.

    The archive has no calibration products, so none are looked for.
    """
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
        "calibration": "frame",
        # Each takes longer than such a run; tests/report and others ask for it.
        "report": False,
    }
