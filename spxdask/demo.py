"""The demo: a run against a simulated archive, and its results compared with the truth."""

from __future__ import annotations

import csv
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from photutils.aperture import CircularAperture
from tqdm.auto import tqdm

from spxdask.config import BatchConfig
from spxdask.errors import InputError
from spxdask.pipeline import BatchPipeline
from spxdask.run.folder import CONFIG_NAME, RunFolder
from spxdask.run.summary import RunSummary
from spxdask.simulate.archive import ArchivedFrame, SimulatedArchive
from spxdask.simulate.frames import (
    Exposure,
    SceneOptions,
    Sky,
    make_planes,
    make_sky,
    pixel_integrated_psf,
    write_frame,
)
from spxdask.tables.selection import select_good_rows

CENTER_RA, CENTER_DEC, RADIUS_DEG = 270.0, 66.56, 0.4
N_SOURCES = 300
# Offsets of the pointings. They are a degree apart, so that each detector measures a source at
# three wavelengths.
DEC_OFFSETS_DEG = (-1.0, 0.0, 1.0)
FIRST_ID = 39633458707826492
STAMP_SIZE = 21
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
    """
    folder = RunFolder(output)
    _prepare_folder(folder)
    print(
        "The sky of this demo is SIMULATED: sources of known spectrum, rendered into full-size\n"
        "Level 2 frames and served by an archive on 127.0.0.1. The four stages are the real ones.\n"
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
        frames = [
            _simulate_frame(exposure, sky, Path(archive_folder))
            for exposure in tqdm(_make_exposures(), "simulate", unit=" frames", disable=None)
        ]
        with SimulatedArchive([frame.archived for frame in frames]) as archive:
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


def _make_exposures() -> list[Exposure]:
    """Return three pointings with six detectors each, and one frame in an older release, too."""
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


def _simulate_frame(exposure: Exposure, sky: Sky, folder: Path) -> DemoFrame:
    # The frame is crowded, as the real sky is, but more than half of its pixels are free of
    # sources, which the fit of the zodiacal light requires.
    planes = make_planes(exposure, sky, SceneOptions(crowding=0.45))
    path = folder / exposure.uri
    path.parent.mkdir(parents=True, exist_ok=True)
    write_frame(path, exposure, planes)
    truth = pd.DataFrame(
        {
            "filename": exposure.filename,
            "target_id": [_make_target_id(i) for i in planes.source],
            "true_x": planes.x,
            "true_y": planes.y,
            "true_wavelength": planes.wavelength_um,
            "injected": planes.flux_ujy,
            "fwhm_pixels": exposure.fwhm_pixels,
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
    per_image = pd.concat(
        pd.read_csv(
            path, dtype={"target_id": str}, usecols=["target_id", "obs_id", "band", "filename"]
        )
        for path in sorted(Path(str(folder.per_image)).glob("*.csv"))
    )
    curves = []
    for path in sorted(Path(str(folder.lightcurves)).glob("*.csv")):
        curves.append(pd.read_csv(path).assign(target_id=path.stem))
    keys = ["target_id", "obs_id", "band"]
    measured = pd.concat(curves).merge(per_image, on=keys, validate="one_to_one")
    measured = measured.merge(truth, on=["filename", "target_id"], validate="one_to_one")
    measured["expected"] = measured["injected"] * _compute_encircled_fractions(measured)
    measured["pull"] = (measured["flux"] - measured["expected"]) / measured["flux_error"]
    return measured


def _compute_encircled_fractions(measured: pd.DataFrame) -> np.ndarray:
    """Return the fraction of the simulated PSF within each aperture, computed by photutils."""
    fractions = []
    middle = STAMP_SIZE // 2
    for row in measured.itertuples():
        stamp = pixel_integrated_psf(row.true_x, row.true_y, row.fwhm_pixels, STAMP_SIZE)
        center = (
            row.true_x - np.rint(row.true_x) + middle,
            row.true_y - np.rint(row.true_y) + middle,
        )
        aperture = CircularAperture(center, row.aperture_radius)
        fractions.append(aperture.do_photometry(stamp, method="exact")[0][0])
    return np.array(fractions)


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
        "Injected and recovered flux. Expected is the injected flux times the part of the",
        "PSF inside the aperture; sigma is the flux_error of each measurement.",
        "",
        "                            median of each, in uJy         (measured - expected) / sigma",
        "band   rows   wavelength   injected   expected   measured         median   scatter",
        "                  [um]",
    ]
    bands = [(band, rows) for band, rows in measured.groupby("band")]
    for band, rows in [*bands, ("all", measured)]:
        shortest, longest = rows["wavelength"].min(), rows["wavelength"].max()
        injected, expected, flux = (rows[c].median() for c in ("injected", "expected", "flux"))
        lines.append(
            f"{band:<4} {len(rows):>6,}  {shortest:5.2f} - {longest:4.2f}   {injected:8,.0f}   "
            f"{expected:8,.0f}   {flux:8,.0f}         {rows['pull'].median():+6.3f}   "
            f"{robust_scatter(rows['pull']):7.3f}"
        )
    off = (measured["wavelength"] - measured["true_wavelength"]).abs().max()
    lines += ["", f"Largest error of a wavelength: {off:.1e} um"]
    return "\n".join(lines)


def _plot_spectra(path: Path, measured: pd.DataFrame, sky: Sky) -> None:
    """Plot the spectra of four sources, from the brightest to a faint one."""
    order = np.argsort(sky.amplitude)[::-1]
    chosen = order[[0, len(order) // 4, len(order) // 2, -len(order) // 8]]
    wavelength = np.linspace(0.75, 5.0, 600)
    figure = Figure(figsize=(9, 6), layout="constrained")
    for number, source in enumerate(chosen):
        axes = figure.add_subplot(2, 2, number + 1)
        one = sky.take(np.array([source]))
        axes.plot(wavelength, [one.flux(w)[0] for w in wavelength], color="0.7", label="injected")
        rows = select_good_rows(measured[measured["target_id"] == _make_target_id(source)])
        # The spectrum is total flux, so the aperture flux is corrected to that.
        correction = rows["injected"] / rows["expected"]
        axes.errorbar(
            rows["wavelength"],
            rows["flux"] * correction,
            rows["flux_error"] * correction,
            fmt="o",
            markersize=3,
            label="recovered",
        )
        axes.set(
            xlabel="wavelength (um)", ylabel="flux density (uJy)", title=_make_target_id(source)
        )
    figure.axes[0].legend()
    figure.suptitle("spxdask demo: spectra of simulated sources")
    figure.savefig(path, dpi=120)
