"""The demo: a run against a simulated archive, and its results compared with the truth."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from tqdm.auto import tqdm

from spxdask.config import BatchConfig
from spxdask.errors import InputError
from spxdask.extras import import_extra
from spxdask.pipeline import BatchPipeline
from spxdask.run.folder import CONFIG_NAME, RunFolder
from spxdask.run.summary import RunSummary
from spxdask.simulate.archive import ArchivedFrame, SimulatedArchive
from spxdask.simulate.frames import (
    CALIBRATED_SCENE,
    Exposure,
    Sky,
    make_planes,
    make_sky,
    write_frame,
)
from spxdask.simulate.products import CATALOG, make_products
from spxdask.tables.selection import select_good_rows

CENTER_RA, CENTER_DEC, RADIUS_DEG = 270.0, 66.56, 0.4
N_SOURCES = 300
# Offsets of the pointings. They are far apart, so that each detector measures a source at two
# wavelengths.
DEC_OFFSETS_DEG = (-1.0, 1.0)
# A fifth of the pixels is near faint stars that are not in the catalogue.
SCENE = replace(CALIBRATED_SCENE, crowding=0.2)
# Each takes about 400 MB of memory.
MAX_SIMULATED_AT_ONCE = 2
FIRST_ID = 39633458707826492
# The ways of measuring a total flux that are compared.
KINDS = ("aperture", "psf")
# A file with this name marks the folder of a demo, which later demos may overwrite.
MARK = "spxdask-demo.txt"
MARK_TEXT = "spxdask demo made this folder and will overwrite the files in it.\n"


@dataclass(frozen=True)
class DemoFrame:
    """A simulated frame, and the true values of each source in it, one row a source."""

    archived: ArchivedFrame
    truth: pd.DataFrame


def run_demo(output: str) -> RunSummary:
    """Simulate an archive, run the pipeline against it, print and plot the results.

    Parameters
    ----------
    output : str
        Folder of the run.

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
        "The sky of this demo is SIMULATED: sources of known spectrum, rendered into full-size\n"
        "Level 2 frames and served, with calibration products, by an archive on 127.0.0.1. The\n"
        "four stages are the real ones.\n"
    )
    catalogue = Path(folder.path, "sources.csv")
    sky = make_sky(
        CENTER_RA,
        CENTER_DEC,
        RADIUS_DEG,
        n_sources=N_SOURCES,
        min_separation_arcsec=75,
        amplitude_ujy=(1_000.0, 50_000.0),
        seed=2026,
    )
    _write_catalogue(catalogue, sky)
    with tempfile.TemporaryDirectory(
        prefix="archive-", dir=folder.path, ignore_cleanup_errors=True
    ) as archive_folder:
        frames = _simulate_frames(sky, Path(archive_folder))
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
    print(summary)
    measured = _compare_with_truth(folder, pd.concat([frame.truth for frame in frames]))
    print(_format_comparison(measured))
    plot = Path(folder.path, "spectra.png")
    _plot_spectra(plot, measured, sky)
    print(f"\nspectra     {plot}")
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


def _make_exposures() -> list[Exposure]:
    """Return two pointings with six detectors each, and one frame in an older release, too."""
    exposures = []
    for number, offset in enumerate(DEC_OFFSETS_DEG):
        for detector in range(1, 7):
            newest: dict[str, Any] = {}
            if number:
                newest = {"release": "qr3", "version": 30, "year": 2026, "day": 90}
            exposures.append(
                Exposure(
                    obs_id=f"2025W51_1A_{684 + number:04d}_{1 + detector % 2}",
                    detector=detector,
                    ra=CENTER_RA,
                    dec=CENTER_DEC + offset,
                    roll_deg=4.0 * number,
                    mjd_begin=61027.2 + 30.0 * number + 0.002 * (detector % 3),
                    **newest,
                )
            )
    last = exposures[-1]
    return [
        *exposures,
        Exposure(
            obs_id=last.obs_id,
            detector=last.detector,
            ra=last.ra,
            dec=last.dec,
            roll_deg=last.roll_deg,
            mjd_begin=last.mjd_begin,
        ),
    ]


def _simulate_frames(sky: Sky, folder: Path) -> list[DemoFrame]:
    """Simulate all frames, several at a time, as numpy leaves the interpreter to other threads."""
    exposures = _make_exposures()
    with ThreadPoolExecutor(MAX_SIMULATED_AT_ONCE) as pool:
        frames = pool.map(partial(_simulate_frame, sky=sky, folder=folder), exposures)
        return list(tqdm(frames, "simulate", total=len(exposures), unit=" frames", disable=None))


def _simulate_frame(exposure: Exposure, sky: Sky, folder: Path) -> DemoFrame:
    planes = make_planes(exposure, sky, SCENE)
    path = folder / exposure.uri
    path.parent.mkdir(parents=True, exist_ok=True)
    write_frame(path, exposure, planes)
    truth = pd.DataFrame(
        {
            "filename": exposure.filename,
            "target_id": [_make_target_id(i) for i in planes.source],
            "true_wavelength": planes.wavelength_um,
            "injected": planes.flux_ujy,
        }
    )
    return DemoFrame(ArchivedFrame.of(exposure, path), truth)


def _make_target_id(number: int) -> str:
    return str(FIRST_ID + int(number))


def _write_catalogue(path: Path, sky: Sky) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["targetid", "ra", "dec"])
        for number, position in enumerate(zip(sky.ra.tolist(), sky.dec.tolist(), strict=True)):
            writer.writerow([_make_target_id(number), *position])


def _compare_with_truth(folder: RunFolder, truth: pd.DataFrame) -> pd.DataFrame:
    """Read the light curves as a user would, and add the true values to each row."""
    keys = ["target_id", "obs_id", "band"]
    frames = pd.concat(
        pd.read_csv(path, dtype={"target_id": str}, usecols=[*keys, "filename"])
        for path in sorted(Path(str(folder.per_image)).glob("*.csv"))
    )
    measured = pd.concat(
        pd.read_csv(path).assign(target_id=path.stem)
        for path in sorted(Path(str(folder.lightcurves)).glob("*.csv"))
    )
    measured = measured.merge(frames, on=keys, validate="one_to_one")
    measured = measured.merge(truth, on=["filename", "target_id"], validate="one_to_one")
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
    lines = [
        "",
        "Total flux, injected and recovered: by the aperture, flux x aperture_correction, and by",
        "the PSF, psf_flux. A pull is (recovered - injected) / error of the measurement.",
        "",
        "                            recovered / injected    aperture: pulls     PSF: pulls",
        "band   rows   wavelength     aperture      PSF      median   scatter   median   scatter",
        "                  [um]",
    ]
    bands = [(str(band), rows) for band, rows in measured.groupby("band")]
    for band, rows in [*bands, ("all", measured)]:
        cells = [f"{rows[f'{kind}_ratio'].median():9.4f}" for kind in KINDS]
        for kind in KINDS:
            pulls = rows[f"{kind}_pull"].dropna()
            cells.append(f"{pulls.median():+7.3f}   {robust_scatter(pulls):7.3f}")
        shortest, longest = rows["wavelength"].min(), rows["wavelength"].max()
        lines.append(
            f"{band:<4} {len(rows):>6,}  {shortest:5.2f} - {longest:4.2f}  {'  '.join(cells)}"
        )
    off = (measured["wavelength"] - measured["true_wavelength"]).abs().max()
    lines += ["", f"Largest error of a wavelength: {off:.1e} um"]
    empty = int(measured["psf_flux"].isna().sum())
    if empty:
        lines.append(f"Rows without a PSF flux: {empty:,}")
    return "\n".join(lines)


def _plot_spectra(path: Path, measured: pd.DataFrame, sky: Sky) -> None:
    """Plot the spectra of four sources, from the brightest to a faint one."""
    order = np.argsort(sky.amplitude)[::-1]
    chosen = order[[0, len(order) // 4, len(order) // 2, -len(order) // 8]]
    wavelength = np.linspace(0.75, 5.0, 600)
    drawing: Any = import_extra("matplotlib.figure", "plot", "spxdask demo")
    figure = drawing.Figure(figsize=(9, 6), layout="constrained")
    for number, source in enumerate(chosen):
        axes = figure.add_subplot(2, 2, number + 1)
        one = sky.take(np.array([source]))
        axes.plot(wavelength, [one.flux(w)[0] for w in wavelength], color="0.7", label="injected")
        rows = select_good_rows(measured[measured["target_id"] == _make_target_id(source)])
        axes.errorbar(
            rows["wavelength"],
            rows["psf_flux"],
            rows["psf_flux_error"],
            fmt="o",
            markersize=3,
            label="recovered (psf_flux)",
        )
        axes.set(
            xlabel="wavelength (um)", ylabel="flux density (uJy)", title=_make_target_id(source)
        )
    figure.axes[0].legend()
    figure.suptitle("spxdask demo: spectra of simulated sources")
    figure.savefig(path, dpi=120)
