"""Data for the benchmarks, which are simulated once and reused by later runs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from spxdask.archive.calibration import CalibrationSet, ProductSource, obtain_calibration
from spxdask.archive.retry import RetryPolicy
from spxdask.simulate.archive import ArchivedFrame
from spxdask.simulate.frames import Exposure, SceneOptions, make_planes, make_sky, write_frame
from spxdask.simulate.products import CATALOG, make_products
from spxdask.tables.csv import render_header, render_lines, slice_lines
from spxdask.tables.schema import APERTURE_ONLY

CENTER = (270.0, 66.56)
FIRST_ID = 39633458707826492
# Range of pixels that is outside of the margins at which either side rejects sources.
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
    """Return a full-size frame in the page cache; simulate it if it does not exist."""
    path = folder / one.filename
    if not path.exists():
        sky = make_sky(*CENTER, 1.2, n_sources=1500, min_separation_arcsec=90, seed=1)
        write_frame(path, one, make_planes(one, sky, SceneOptions(crowding=0.45)))
    _reload_page_cache(path)
    return path


def _reload_page_cache(path: Path) -> None:
    """Read a file into the page cache again, from disk.

    Pages from writing the file are small, and mapping them takes more than twice as long.
    """
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(1 << 20):
            pass


def catalogue(folder: Path, on_frame: int, all_sky: int = 0) -> Path:
    """Return a catalogue with `on_frame` sources on the frame and `all_sky` elsewhere."""
    path = folder / f"catalogue-{on_frame}-{all_sky}.csv"
    if path.exists():
        return path
    rng = np.random.default_rng([on_frame, all_sky])
    x, y = rng.uniform(*INSIDE, on_frame), rng.uniform(*INSIDE, on_frame)
    ra, dec = exposure().wcs().all_pix2world(x, y, 0)
    if all_sky:
        elsewhere_ra = rng.uniform(0, 360, all_sky)
        elsewhere_dec = np.rad2deg(np.arcsin(rng.uniform(-1, 1, all_sky)))
        # The corners of the frame are less than three degrees from its centre.
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
    """Return a folder of per-image tables with `rows` rows in total, of columns the peer has."""
    parent = folder / f"tables-{rows}-{sources}"
    done = parent / "done"
    target = parent / "per_image"
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
        for name in APERTURE_ONLY.per_image[6:-1]:
            columns[name] = rng.integers(0, 1 << 22, n) if name == "flag" else rng.lognormal(size=n)
        columns["filename"] = pa.repeat(one.filename, n)
        text = bytes(slice_lines(render_lines(columns)))
        name = f"{Path(one.filename).stem}_photometry.csv"
        (target / name).write_bytes(render_header(APERTURE_ONLY.per_image) + text)
    done.touch()
    return target


def products(folder: Path) -> Path:
    """Return a tree of the newest calibration products of the frame's detector."""
    parent = folder / "products"
    done = parent / "done"
    if not done.exists():
        tokens = [token for release, _, token, _ in CATALOG if release == "qr3"]
        make_products(parent, detectors=[exposure().detector], tokens=tokens)
        done.touch()
    return parent


def obtain_products(tree: Path, cache: Path, band: str) -> CalibrationSet:
    """Fetch the products of a tree into a cache, as a run does once."""
    os.environ["SPXDASK_CACHE"] = str(cache)
    source = ProductSource(
        url=tree.absolute().as_uri(), retry=RetryPolicy(max_retries=0), stall_timeout_s=60
    )
    return obtain_calibration(source, bands=[band], releases=["qr2"], pins={})


def archived(number: int, path: Path) -> ArchivedFrame:
    """Return a frame of the archive."""
    return ArchivedFrame.of(exposure(number), path)
