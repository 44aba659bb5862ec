"""Many simulated frames of one field: pointings, cut-outs, and files for an archive."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.table import Table
from numpy.typing import NDArray

from spxdask.simulate.archive import ArchivedFrame, SimulatedArchive
from spxdask.simulate.frames import (
    FRAME_SIZE,
    Exposure,
    SceneOptions,
    Sky,
    make_planes,
    make_sky,
    write_frame,
)

__all__ = ["Job", "SimulatedFrame", "aim", "find_window", "make_sample", "simulate_frames"]

# Of the sample: the field, and how far its cut-outs reach, in pixels.
SAMPLE_CENTER, SAMPLE_RADIUS_DEG, SAMPLE_HALF = (270.0, 66.56), 0.12, 110
SAMPLE_PIXELS = [(1020.0, 340.0), (1020.0, 1020.0), (1020.0, 1700.0)]

Window = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A frame to simulate.

    Attributes
    ----------
    exposure : Exposure
        Its pointing and identity.
    sky : Sky
        The sources as they are at that time.
    scene : SceneOptions
        What else is on the frame.
    window : (x0, y0, nx, ny) or None
        Cut-out that the file contains; None for the whole frame.
    """

    exposure: Exposure
    sky: Sky
    scene: SceneOptions
    window: Window | None = None


@dataclass(frozen=True, kw_only=True)
class SimulatedFrame:
    """A simulated frame, and the true values of each source on it.

    Attributes
    ----------
    archived : ArchivedFrame
        The file, as the archive lists it.
    source : (m,) int array
        Indices into the sky.
    wavelength_um, flux_ujy : (m,) float array
        Wavelength at the position of the source, and flux density there.
    """

    archived: ArchivedFrame
    source: NDArray[np.int64]
    wavelength_um: NDArray[np.float64]
    flux_ujy: NDArray[np.float64]


def aim(
    ra: float, dec: float, *, column: float, row: float, roll_deg: float = 0.0
) -> tuple[float, float]:
    """Return where to point so that a position is on some pixel of the detector.

    Parameters
    ----------
    ra, dec : float
        ICRS, deg.
    column, row : float
        The pixel, 0-based. It is met within 60 pixels, as exposures of one roll differ in the
        direction of north.
    roll_deg : float
        Roll of the exposure.

    Returns
    -------
    tuple of float
        ICRS right ascension and declination of the exposure's reference pixel.
    """
    at_position = Exposure(
        obs_id="2025W01_1A_0001_1", detector=1, ra=ra, dec=dec, roll_deg=roll_deg, mjd_begin=60676.0
    )
    position = SkyCoord(ra, dec, unit="deg")
    pixel = at_position.wcs().all_pix2world(column, row, 0)
    there = SkyCoord(*pixel, unit="deg")
    angle, distance = position.position_angle(there), position.separation(there)
    pointing = position.directional_offset_by(angle + 180 * u.deg, distance)
    return float(pointing.ra.deg), float(pointing.dec.deg)


def find_window(exposure: Exposure, ra: float, dec: float, half: int) -> Window:
    """Return the cut-out about a position, as far as it is on the frame.

    Parameters
    ----------
    exposure : Exposure
        The exposure.
    ra, dec : float
        ICRS, deg.
    half : int
        Pixels on each side of the position.

    Returns
    -------
    (x0, y0, nx, ny)
        At least one pixel.
    """
    middle = np.rint(exposure.wcs().all_world2pix(ra, dec, 0)).astype(int)
    first = (middle - half).clip(0, FRAME_SIZE - 1)
    last = (middle + half).clip(first, FRAME_SIZE - 1)
    (x0, y0), (nx, ny) = first.tolist(), (last - first + 1).tolist()
    return x0, y0, nx, ny


def simulate_frames(
    jobs: Sequence[Job], folder: Path, *, processes: int = 1
) -> Iterator[SimulatedFrame]:
    """Simulate frames into files below a folder.

    Parameters
    ----------
    jobs : sequence of Job
        The frames.
    folder : Path
        Files are there as they are at the archive.
    processes : int
        How many processes work; 1 is this one. A whole frame takes 400 MB of memory.

    Yields
    ------
    SimulatedFrame
        In the order of the jobs.
    """
    if processes == 1:
        for job in jobs:
            yield _simulate(job, folder)
        return
    # Threads are not forked, which this process may have.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_simulate, jobs, [folder] * len(jobs))


def _simulate(job: Job, folder: Path) -> SimulatedFrame:
    exposure, window = job.exposure, job.window
    planes = make_planes(exposure, job.sky, job.scene, window=window)
    path = folder / exposure.uri
    path.parent.mkdir(parents=True, exist_ok=True)
    write_frame(path, exposure, planes, window=window)
    return SimulatedFrame(
        archived=ArchivedFrame.of(exposure, path, window),
        source=planes.source,
        wavelength_um=planes.wavelength_um,
        flux_ujy=planes.flux_ujy,
    )


def make_sample(folder: Path | str, *, n_sources: int = 12) -> tuple[SimulatedArchive, Table]:
    """Make a small archive to try things with: three visits of the six detectors to a field.

    Parameters
    ----------
    folder : path
        Where the cut-outs are written, 20 MB.
    n_sources : int
        Sources of the field.

    Returns
    -------
    archive : SimulatedArchive
        A context manager; it also has the methods ``start`` and ``stop``. It has no calibration
        products: a run needs ``calibration="frame"``.
    sources : astropy.table.Table
        ``targetid``, ``ra`` and ``dec``, brightest first.
    """
    sky = make_sky(
        *SAMPLE_CENTER, SAMPLE_RADIUS_DEG, n_sources=n_sources, min_separation_arcsec=70, seed=5
    )
    sky = sky.take(np.argsort(-sky.amplitude))
    scene = SceneOptions(crowding=0.3)
    jobs = []
    for visit, (column, row) in enumerate(SAMPLE_PIXELS):
        ra, dec = aim(*SAMPLE_CENTER, column=column, row=row)
        for detector in range(1, 7):
            exposure = Exposure(
                obs_id=f"2025W51_1A_{visit:04d}_{1 + detector // 4}",
                detector=detector,
                ra=ra,
                dec=dec,
                roll_deg=0.0,
                mjd_begin=61027.2 + 20.0 * visit,
                release="qr3",
                version=30,
                year=2026,
                day=90,
            )
            window = find_window(exposure, *SAMPLE_CENTER, SAMPLE_HALF)
            jobs.append(Job(exposure=exposure, sky=sky, scene=scene, window=window))
    frames = [frame.archived for frame in simulate_frames(jobs, Path(folder))]
    names = [f"source {number}" for number in range(1, n_sources + 1)]
    return SimulatedArchive(frames), Table(
        [names, sky.ra, sky.dec], names=["targetid", "ra", "dec"]
    )
