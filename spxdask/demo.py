"""The demo: a run against a simulated archive, and its results compared with the truth."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
from astropy import units as u
from astropy.coordinates import SkyCoord
from numpy.typing import ArrayLike
from tqdm.auto import tqdm

from spxdask.cluster.limits import count_cores
from spxdask.config import BatchConfig
from spxdask.demo_plots import Chosen, plot_checks, plot_spectra
from spxdask.errors import InputError
from spxdask.extras import import_extra
from spxdask.pipeline import BatchPipeline
from spxdask.results.run import Run, open_run
from spxdask.run.folder import CONFIG_NAME, RunFolder
from spxdask.run.summary import RunSummary
from spxdask.simulate.archive import SimulatedArchive
from spxdask.simulate.frames import CALIBRATED_SCENE, Exposure, Sky, make_sky
from spxdask.simulate.products import CATALOG, make_products
from spxdask.simulate.survey import Job, SimulatedFrame, aim, find_window, simulate_frames
from spxdask.tables.selection import select_good_rows
from spxdask.text import wrap_report

CENTER_RA, CENTER_DEC, RADIUS_DEG = 270.0, 66.56, 0.25
N_SOURCES = 130
# A visit is one pointing of all six detectors. Each has the field a channel further along the
# detectors, so that all visits together see nearly every source in all 102 channels. The longest
# wavelengths are in the corners, where the last visit has the field. The order of visits is
# mixed, as a source that is variable would otherwise be one with another spectrum.
VISIT_PIXELS = [(1020.0, 126.0 * place + 63.0) for place in range(16)] + [(200.0, 1990.0)]
VISIT_ORDER = (8, 3, 14, 0, 10, 6, 16, 2, 12, 5, 9, 15, 1, 11, 7, 4, 13)
MJD_BEGIN, DAYS_BETWEEN_VISITS = 61027.2, 9.0
# The first visit is of full size; others are cut-outs of the field, which take a tenth of the time.
N_FULL_VISITS = 1
# Half of their edge, in pixels: the field and a rim.
CUT_OUT_HALF = 175
# Visits from this one on are of the newer release.
FIRST_NEW_VISIT = 9
# A fifth of the pixels is near faint stars that are not in the catalogue.
SCENE = replace(CALIBRATED_SCENE, crowding=0.2)
# Each takes about 400 MB of memory.
MAX_SIMULATED_AT_ONCE = 2
FIRST_ID = 39633458707826492
# Of the sources with a purpose: flux density at 2 um (uJy), exponent of the power law, and
# strength, centre and width (um) of the line.
BRIGHT = (30_000.0, -1.6, -0.45, 2.35, 0.10)
EMISSION = (6_000.0, 0.6, 1.0, 3.3, 0.07)
VARIABLE = (8_000.0, -0.8, 0.0, 2.0, 0.1)
CONSTANT = (8_000.0, -0.8, 0.0, 2.0, 0.1)
FAINT = (8.0, 0.0, 0.0, 2.0, 0.1)
PAIR = ((6_000.0, -1.3, 0.0, 2.0, 0.1), (3_500.0, 0.7, 0.0, 2.0, 0.1))
PAIR_PIXELS, PIXEL_ARCSEC = 2.0, 6.15
VARIABILITY, PERIOD_DAYS = 0.25, 61.0
# The ways of measuring a total flux that are compared.
KINDS = ("psf", "aperture")
# A file with this name marks the folder of a demo, which later demos may overwrite.
MARK = "spxdask-demo.txt"
MARK_TEXT = "spxdask demo made this folder and will overwrite the files in it.\n"


@dataclass(frozen=True)
class DemoSky:
    """The sources of the demo, and the places of those that are plotted."""

    sky: Sky
    bright: int
    emission: int
    variable: int
    constant: int
    faint: int
    pair: tuple[int, int]

    def at(self, mjd: float) -> Sky:
        """Return the sources as they are at a time.

        Parameters
        ----------
        mjd : float
            Middle of an exposure.

        Returns
        -------
        Sky
        """
        factor = np.ones(len(self.sky))
        factor[self.variable] = variability(mjd)
        return replace(self.sky, amplitude=self.sky.amplitude * factor)


def variability(mjd: ArrayLike) -> np.ndarray:
    """Return the flux of the variable source over its mean.

    Parameters
    ----------
    mjd : float or (n,) array_like
        Middle of the exposures.

    Returns
    -------
    float or (n,) float array
        Of all wavelengths.
    """
    phase = (np.asarray(mjd) - MJD_BEGIN) / PERIOD_DAYS
    return 1.0 + VARIABILITY * np.sin(2.0 * np.pi * phase)


def run_demo(output: str, *, visits: Sequence[int] = range(len(VISIT_ORDER))) -> RunSummary:
    """Simulate an archive, run the pipeline against it, print and plot the results.

    Parameters
    ----------
    output : str
        Folder of the run.
    visits : sequence of int, optional
        Those of the 17 visits to the field that are made; by default all, which together see
        every channel.

    Returns
    -------
    RunSummary
        The summary that is also printed.

    Raises
    ------
    InputError
        If the folder contains files that an earlier demo did not write.
    MissingExtraError
        If matplotlib is not installed.
    """
    # Before anything is made.
    import_extra("matplotlib.figure", "plot", "spxdask demo")
    folder = RunFolder(output)
    _prepare_folder(folder)
    print(
        "The sky of this demo is SIMULATED: sources of known spectra, rendered into\n"
        "Level 2 frames and served, with calibration products, by an archive on\n"
        "127.0.0.1. The four stages are the real ones.\n"
    )
    catalogue = Path(folder.path, "sources.csv")
    sky = _make_sky()
    _write_catalogue(catalogue, sky.sky)
    with tempfile.TemporaryDirectory(
        prefix="archive-", dir=folder.path, ignore_cleanup_errors=True
    ) as archive_folder:
        frames = _simulate(sky, Path(archive_folder), visits)
        # Those that are the archive's newest.
        products = make_products(
            archive_folder, tokens=[token for release, _, token, _ in CATALOG if release == "qr3"]
        )
        with (
            _cache_in(Path(archive_folder, "cache")),
            SimulatedArchive([frame.archived for frame in frames], products=products) as archive,
        ):
            config = BatchConfig(
                catalog_path=str(catalogue),
                center_ra=CENTER_RA,
                center_dec=CENTER_DEC,
                radius=RADIUS_DEG,
                output_dir=output,
                tap_url=archive.tap_url,
                archive_url=archive.archive_url,
            )
            pipeline = BatchPipeline(config, progress=True)
            with pipeline:
                summary = pipeline.run_all()
    print(wrap_report(str(summary)))
    # From here on, only what a user has: the output folder. The truth is for comparison.
    run = open_run(output)
    measured = _compare(run.to_dask().compute(scheduler="synchronous"), _list_truth(frames))
    print(_format_comparison(measured))
    folder_path = Path(folder.path)
    chosen = {
        field.name: _choose(run, sky.sky, getattr(sky, field.name))
        for field in fields(sky)
        if field.name not in ("sky", "pair")
    }
    pair = [_choose(run, sky.sky, source) for source in sky.pair]
    plot_spectra(folder_path / "spectra.png", measured, chosen, pair)
    plot_checks(folder_path / "checks.png", measured, chosen, variability)
    print(f"\nspectra     {folder_path / 'spectra.png'}")
    print(f"checks      {folder_path / 'checks.png'}")
    print(f"in Python   spxdask.open_run({folder.path!r})")
    print("\nThe simulated archive has ended: this run can be read, but not measured again.")
    return summary


def _prepare_folder(folder: RunFolder) -> None:
    """Make and mark the folder of the demo; raise InputError if it has other files."""
    elsewhere = "choose another folder for the demo with --output"
    path = folder.root.local_path
    if path is None:
        raise InputError(f"{folder.path} is not on a disk of this machine: {elsewhere}")
    mark = path / MARK
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not mark.exists() and any(path.iterdir()):
            raise InputError(f"{folder.path} has files that no demo wrote: {elsewhere}")
        if folder.state.exists(CONFIG_NAME) and "127.0.0.1" not in folder.saved_config().tap_url:
            raise InputError(f"{folder.path} has the files of a real run: {elsewhere}")
        mark.write_text(MARK_TEXT, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder.path}: {error.strerror}") from error


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Keep simulated products out of the user's cache, in this process and its workers."""
    before = os.environ.get("SPXDASK_CACHE")
    os.environ["SPXDASK_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SPXDASK_CACHE"]
        else:
            os.environ["SPXDASK_CACHE"] = before


def _make_sky() -> DemoSky:
    """Return isolated sources at random, of which those near the middle get a purpose."""
    sky = make_sky(
        CENTER_RA,
        CENTER_DEC,
        RADIUS_DEG,
        n_sources=N_SOURCES,
        min_separation_arcsec=75,
        amplitude_ujy=(300.0, 50_000.0),
        seed=2026,
    )
    positions = SkyCoord(sky.ra, sky.dec, unit="deg")
    center = SkyCoord(CENTER_RA, CENTER_DEC, unit="deg")
    nearest = [int(i) for i in np.argsort(positions.separation(center))[:6]]
    partner = positions[nearest[5]].directional_offset_by(
        50 * u.deg, PAIR_PIXELS * PIXEL_ARCSEC * u.arcsec
    )
    values = {field.name: np.append(getattr(sky, field.name), 0.0) for field in fields(sky)}
    values["ra"][-1], values["dec"][-1] = partner.ra.deg, partner.dec.deg
    purposes = [BRIGHT, EMISSION, VARIABLE, CONSTANT, FAINT, *PAIR]
    names = ("amplitude", "slope", "line_strength", "line_center_um", "line_width_um")
    for source, purpose in zip([*nearest, N_SOURCES], purposes, strict=True):
        for name, value in zip(names, purpose, strict=True):
            values[name][source] = value
    bright, emission, variable, constant, faint, first = nearest
    return DemoSky(
        sky=Sky(**values),
        bright=bright,
        emission=emission,
        variable=variable,
        constant=constant,
        faint=faint,
        pair=(first, N_SOURCES),
    )


def _list_exposures(visits: Sequence[int]) -> list[tuple[Exposure, bool]]:
    """Return all exposures, and whether they are of full size; one in an older release, too."""
    found = []
    for visit in visits:
        roll = 0.7 * (visit % 5)
        column, row = VISIT_PIXELS[VISIT_ORDER[visit]]
        ra, dec = aim(CENTER_RA, CENTER_DEC, column=column, row=row, roll_deg=roll)
        for detector in range(1, 7):
            exposure = Exposure(
                obs_id=f"2025W51_1A_{684 + visit:04d}_{1 + detector % 2}",
                detector=detector,
                ra=ra,
                dec=dec,
                roll_deg=roll,
                mjd_begin=MJD_BEGIN + DAYS_BETWEEN_VISITS * visit,
            )
            is_full = visit < N_FULL_VISITS
            if visit >= FIRST_NEW_VISIT:
                newer = replace(exposure, release="qr3", version=30, year=2026, day=90)
                found.append((newer, is_full))
            if visit < FIRST_NEW_VISIT or (visit, detector) == (FIRST_NEW_VISIT, 1):
                found.append((exposure, is_full))
    return found


def _simulate(sky: DemoSky, folder: Path, visits: Sequence[int]) -> list[SimulatedFrame]:
    """Simulate all frames, several at a time."""
    jobs = [
        Job(
            exposure=exposure,
            sky=sky.at(0.5 * (exposure.mjd_begin + exposure.mjd_end)),
            scene=SCENE,
            window=None if is_full else find_window(exposure, CENTER_RA, CENTER_DEC, CUT_OUT_HALF),
        )
        for exposure, is_full in _list_exposures(visits)
    ]
    # Maps of a detector are made once if its frames follow one another.
    jobs.sort(key=lambda job: (job.window is not None, job.exposure.detector))
    processes = min(MAX_SIMULATED_AT_ONCE, count_cores())
    frames = simulate_frames(jobs, folder, processes=processes)
    return list(tqdm(frames, "simulate  ", total=len(jobs), unit=" frames", disable=None))


def _make_target_id(number: int) -> str:
    return str(FIRST_ID + int(number))


def _choose(run: Run, sky: Sky, source: int) -> Chosen:
    """Return the light curve of a source, as a user would open it, and its true spectrum."""
    one = sky.take(np.array([source]))
    return Chosen(run[_make_target_id(source)], one.flux)


def _write_catalogue(path: Path, sky: Sky) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["targetid", "ra", "dec"])
        for number, position in enumerate(zip(sky.ra.tolist(), sky.dec.tolist(), strict=True)):
            writer.writerow([_make_target_id(number), *position])


def _list_truth(frames: list[SimulatedFrame]) -> pd.DataFrame:
    """Return a row a source and frame: wavelength and flux that were injected."""
    return pd.concat(
        pd.DataFrame(
            {
                "filename": frame.archived.path.name,
                "target_id": [_make_target_id(i) for i in frame.source],
                "true_wavelength": frame.wavelength_um,
                "injected": frame.flux_ujy,
            }
        )
        for frame in frames
    )


def _compare(rows: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    """Add the true values to the good rows of all light curves."""
    rows = select_good_rows(rows.astype({"target_id": object, "filename": object}))
    measured = rows.merge(truth, on=["filename", "target_id"], validate="one_to_one")
    measured["aperture_flux"] = measured["flux"] * measured["aperture_correction"]
    measured["aperture_flux_error"] = measured["flux_error"] * measured["aperture_correction"]
    for kind in KINDS:
        difference = measured[f"{kind}_flux"] - measured["injected"]
        measured[f"{kind}_pull"] = difference / measured[f"{kind}_flux_error"]
        measured[f"{kind}_ratio"] = measured[f"{kind}_flux"] / measured["injected"]
    return measured


def robust_scatter(values: ArrayLike) -> float:
    """Return 1.4826 x the median absolute deviation, which is sigma for a Gaussian.

    Parameters
    ----------
    values : (n,) array_like
        The values.

    Returns
    -------
    float
        In the unit of the values.
    """
    values = np.asarray(values)
    return float(1.4826 * np.median(np.abs(values - np.median(values))))


def _format_comparison(measured: pd.DataFrame) -> str:
    """Return a table of the injected and the recovered flux in each band."""
    n_sources = measured["target_id"].nunique()
    lines = [
        "",
        f"Total flux of {n_sources} sources, recovered over injected (median), and pulls, which",
        "are (recovered - injected) / error: their median and their scatter.",
        "",
        "                         psf_flux                  flux x aperture_correction",
        "band    rows         um   ratio  median  scatter      ratio  median  scatter",
    ]
    bands = [(str(band), rows) for band, rows in measured.groupby("band")]
    for band, rows in [*bands, ("all", measured)]:
        shortest, longest = rows["wavelength"].min(), rows["wavelength"].max()
        cells = []
        for kind in KINDS:
            pulls = rows[f"{kind}_pull"].dropna()
            ratio = rows[f"{kind}_ratio"].median()
            cells.append(f"{ratio:.4f}  {pulls.median():+.3f}    {robust_scatter(pulls):.3f}")
        lines.append(
            f"{band:<4} {len(rows):>7,}  {shortest:.2f}-{longest:.2f}  {'    '.join(cells)}"
        )
    off = (measured["wavelength"] - measured["true_wavelength"]).abs().max()
    lines += ["", f"Largest error of a wavelength: {off:.1e} um"]
    return "\n".join(lines)
