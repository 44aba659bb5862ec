"""Data for the benchmarks, made from the simulator and kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from spxdask.simulate.archive import ArchivedFrame
from spxdask.simulate.frames import Exposure, SceneOptions, make_planes, make_sky, write_frame
from spxdask.tables.csv import render_header, render_lines, slice_lines
from spxdask.tables.schema import PER_IMAGE

CENTER = (270.0, 66.56)
FIRST_ID = 39633458707826492
# Clear of every margin that either side keeps.
INSIDE = (40.0, 2000.0)


def exposure(number: int = 0, **options) -> Exposure:
    defaults = {
        "obs_id": f"2025W51_1A_{number:04d}_1",
        "detector": 3,
        "ra": CENTER[0],
        "dec": CENTER[1],
        "roll_deg": 0.0,
        "mjd_begin": 61027.0 + 0.01 * number,
    }
    return Exposure(**(defaults | options))


def frame(folder: Path, one: Exposure) -> Path:
    """Return a full-size frame, made if it is not there, in the page cache."""
    path = folder / one.filename
    if not path.exists():
        sky = make_sky(*CENTER, 1.2, n_sources=1500, min_separation_arcsec=90, seed=1)
        write_frame(path, one, make_planes(one, sky, SceneOptions(crowding=0.45)))
    _read_anew(path)
    return path


def _read_anew(path: Path) -> None:
    """Have a file in the page cache as one that was read from disk, in large pieces.

    As it was written there, in small ones, it takes more than twice as long to map.
    """
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(1 << 20):
            pass


def catalogue(folder: Path, on_frame: int, all_sky: int = 0) -> Path:
    """Return a catalogue with so many sources on the frame, and so many elsewhere."""
    path = folder / f"catalogue-{on_frame}-{all_sky}.csv"
    if path.exists():
        return path
    rng = np.random.default_rng([on_frame, all_sky])
    x, y = rng.uniform(*INSIDE, on_frame), rng.uniform(*INSIDE, on_frame)
    ra, dec = exposure().wcs().all_pix2world(x, y, 0)
    if all_sky:
        elsewhere_ra = rng.uniform(0, 360, all_sky)
        elsewhere_dec = np.rad2deg(np.arcsin(rng.uniform(-1, 1, all_sky)))
        # Three degrees from the frame's centre is off its corners.
        near = np.cos(np.deg2rad(elsewhere_dec - CENTER[1])) > np.cos(np.deg2rad(3.0))
        near &= np.abs((elsewhere_ra - CENTER[0] + 180) % 360 - 180) < 3 / np.cos(
            np.deg2rad(abs(CENTER[1]) + 3)
        )
        ra = np.concatenate([ra, elsewhere_ra[~near]])
        dec = np.concatenate([dec, elsewhere_dec[~near]])
        shuffled = rng.permutation(len(ra))
        ra, dec = ra[shuffled], dec[shuffled]
    ids = pa.array(np.arange(FIRST_ID, FIRST_ID + len(ra))).cast(pa.string())
    pa_csv.write_csv(pa.table({"targetid": ids, "ra": ra, "dec": dec}), path)
    return path


def per_image_tables(folder: Path, rows: int, sources: int, rows_per_frame: int) -> Path:
    """Return a folder of per-image tables with so many rows in all."""
    place = folder / f"tables-{rows}-{sources}"
    done = place / "done"
    target = place / "per_image"
    if done.exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(rows)
    ids = pa.array(np.arange(FIRST_ID, FIRST_ID + sources)).cast(pa.string())
    n = rows_per_frame
    for number in range(rows // n):
        one = exposure(number)
        columns = {
            "target_id": ids.take(pa.array(np.sort(rng.choice(sources, n, replace=False)))),
            "ra": rng.uniform(0, 360, n),
            "dec": rng.uniform(-90, 90, n),
            "obs_id": pa.repeat(one.obs_id, n),
            "band": pa.repeat(one.band, n),
            "mjd": np.full(n, one.mjd_begin),
        }
        for name in PER_IMAGE[6:-1]:
            columns[name] = rng.integers(0, 1 << 22, n) if name == "flag" else rng.lognormal(size=n)
        columns["filename"] = pa.repeat(one.filename, n)
        text = bytes(slice_lines(render_lines(columns)))
        name = f"{Path(one.filename).stem}_photometry.csv"
        (target / name).write_bytes(render_header(PER_IMAGE) + text)
    done.touch()
    return target


def archived(number: int, path: Path) -> ArchivedFrame:
    """Return an entry of the archive."""
    return ArchivedFrame.of(exposure(number), path)
