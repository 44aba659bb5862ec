"""Injection and recovery on the frames of a run: artificial sources of known flux, measured.

Artificial sources of known flux are added to frames in memory, next to sources of the catalogue
and with the PSF of the frame, and measured together with the catalogue by the code of the
extraction. No frame or table of the run changes.
"""

from __future__ import annotations

import io
import logging
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from astropy.stats import mad_std
from scipy.spatial import KDTree
from tqdm.auto import tqdm

from spxdask.archive.calibration import CalibrationSet
from spxdask.archive.observation import Observation
from spxdask.config import BatchConfig
from spxdask.errors import ConfigError, FrameError, InputError, RunFolderError, SpxdaskError
from spxdask.extras import import_extra
from spxdask.run.folder import INJECTION_FIGURE_NAME, INJECTION_TABLE_NAME, RunFolder
from spxdask.run.sources import RunSources
from spxdask.science.astrometry import locate_observer
from spxdask.science.calibration import DetectorCalibration
from spxdask.science.catalogue import Catalogue
from spxdask.science.injection import draw_positions, estimate_photon_variance, inject_sources
from spxdask.science.level2.frame import Frame, map_file, open_frame
from spxdask.science.options import PhotometryConfig
from spxdask.science.photometry import (
    AB_ZERO_POINT_UJY,
    choose_psf,
    find_solid_angles,
    margin,
    measure,
)
from spxdask.stages.calibration import prepare_calibration
from spxdask.stages.extract import find_positions, open_calibration
from spxdask.tables.selection import select_good_rows
from spxdask.text import format_count

__all__ = [
    "InjectionReport",
    "inject_into_frame",
    "run_injection",
    "summarize_injections",
]

logger = logging.getLogger(__name__)

N_FRAMES, N_PER_FRAME, MAGNITUDES, MIN_SNR, SEED = 12, 200, (13.0, 21.0), 5.0, 1
# Rounding of the projection must not move a source beyond the margin, pixels.
SLACK_PIXELS = 0.01
# A source this far beyond an edge is still a neighbour, pixels.
REACH_PIXELS = 20.0
# Where the nearest other source is, pixels: in the aperture or next to it; on the stamp of the
# PSF; beyond.
CROWDING_EDGES = (0.0, 3.0, 7.0, np.inf)
CROWDING_NAMES = ("under 3 pixels", "3 to 7 pixels", "over 7 pixels")


@dataclass(frozen=True, kw_only=True)
class InjectionReport:
    """What became of artificial sources.

    Attributes
    ----------
    rows : DataFrame
        One row a source, with the columns of ``injection.csv``.
    n_frames : int
        Frames that have some.
    failed : dict of str to str
        Why a frame could not be used, by file name.
    notes : dict of str to int
        Numbers of what else was left out, by reason.
    magnitudes : (float, float)
        AB magnitude of the brightest and the faintest that were asked for.
    min_snr : float
        Flux over error of a source that counts as detected.
    table, figure : str
        Paths of the files.
    """

    rows: pd.DataFrame
    n_frames: int
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    magnitudes: tuple[float, float] = MAGNITUDES
    min_snr: float = MIN_SNR
    table: str = ""
    figure: str = ""

    def __str__(self) -> str:
        return _format_report(self)


def run_injection(
    output: str | os.PathLike[str],
    *,
    frames: int = N_FRAMES,
    per_frame: int = N_PER_FRAME,
    magnitudes: Sequence[float] = MAGNITUDES,
    min_snr: float = MIN_SNR,
    seed: int = SEED,
    progress: bool = False,
) -> InjectionReport:
    """Inject sources into the frames of a run, measure them, and write a table and a figure.

    Frames are measured one after the other in this process, with the options, sources and
    calibration products of the run.

    Parameters
    ----------
    output : path
        The output folder of a run that keeps its frames. ``injection.csv`` and
        ``injection.png`` are written into it.
    frames : int
        At most so many frames, evenly over bands and time.
    per_frame : int
        Sources on each, if there is room for them.
    magnitudes : (float, float)
        AB magnitude of the brightest and the faintest; evenly between them.
    min_snr : float
        Flux over error of a source that counts as detected.
    seed : int
        The same sources and noise again for the same seed.
    progress : bool
        Whether a bar is drawn.

    Returns
    -------
    InjectionReport
        Its text is what the command line prints.

    Raises
    ------
    ConfigError
        If an argument is not allowed.
    RunFolderError
        If there is no run, it has no frames, or another run works in it.
    CatalogueError
        If the catalogue cannot be used.
    MissingExtraError
        If matplotlib is not installed.
    InputError
        If no source could be injected into any frame.
    """
    drawing = import_extra("matplotlib.figure", "plot", "the figure of spxdask inject")
    bright, faint = _check_arguments(frames, per_frame, magnitudes, min_snr, seed)
    folder = RunFolder(output)
    config = folder.saved_config()
    with folder.locked():
        sources = RunSources(config, folder)
        config = sources.config
        catalogue, contaminants = sources.read(), sources.read_contaminants()
        observations = folder.require_observations(config, catalogue)
        chosen = _choose_frames(folder, observations, frames)
        calibration = prepare_calibration(folder, config, observations)
        tables: list[pd.DataFrame] = []
        failed: dict[str, str] = {}
        notes: Counter[str] = Counter()
        for observation in tqdm(
            chosen, "inject", unit=" frames", disable=None if progress else True
        ):
            try:
                frame = _open_frame(folder, observation.filename)
                found = inject_into_frame(
                    frame,
                    catalogue,
                    _photometry_of(config),
                    _open_products(calibration, observation),
                    contaminants=contaminants,
                    n=per_frame,
                    magnitudes=(bright, faint),
                    min_snr=min_snr,
                    # Of the frame alone, whatever other frames there are.
                    rng=np.random.default_rng([seed, zlib.crc32(observation.filename.encode())]),
                )
            except (FrameError, OSError) as error:
                failed[observation.filename] = str(error)
                continue
            except SpxdaskError:
                # It concerns all frames.
                raise
            except Exception as error:
                # One frame must not cost the others; the log has the traceback.
                logger.exception("%s: unexpected error", observation.filename)
                failed[observation.filename] = f"unexpected {type(error).__name__}: {error}"
                continue
            if len(found):
                tables.append(found)
            else:
                notes["no source of the catalogue on the frame"] += 1
            if 0 < len(found) < per_frame:
                notes["fewer sources than wanted, for lack of room"] += 1
        if not tables:
            raise InputError(_say_why_nothing(failed, notes), path=folder.path)
        rows = pd.concat(tables, ignore_index=True)
        folder.raise_if_lock_lost()
        folder.root.put(INJECTION_TABLE_NAME, rows.to_csv(index=False).encode())
        folder.root.put(
            INJECTION_FIGURE_NAME, _draw_figure(drawing, rows, (bright, faint), min_snr)
        )
    return InjectionReport(
        rows=rows,
        n_frames=len(tables),
        failed=failed,
        notes=dict(notes),
        magnitudes=(bright, faint),
        min_snr=min_snr,
        table=folder.root.path_to(INJECTION_TABLE_NAME),
        figure=folder.root.path_to(INJECTION_FIGURE_NAME),
    )


def inject_into_frame(
    frame: Frame,
    catalogue: Catalogue,
    photometry: PhotometryConfig,
    calibration: DetectorCalibration,
    *,
    contaminants: Catalogue | None = None,
    n: int,
    magnitudes: tuple[float, float],
    min_snr: float,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Inject sources into one frame, and measure them together with the catalogue.

    Parameters
    ----------
    frame : Frame
        It stays as it is.
    catalogue : Catalogue
        The sources, next to which others are injected.
    photometry : PhotometryConfig
        How sources are measured, with PSF fluxes.
    calibration : DetectorCalibration
        Calibration products.
    contaminants : Catalogue, optional
        Sources of the solution for PSF fluxes that get no rows.
    n : int
        How many are injected, if there is room.
    magnitudes : (float, float)
        AB magnitude of the brightest and the faintest.
    min_snr : float
        Flux over error of a source that counts as detected.
    rng : Generator
        Decides on positions, fluxes and noise.

    Returns
    -------
    DataFrame
        One row a source; without rows if no source of the catalogue is on the frame.

    Raises
    ------
    FrameError
        If the frame has no PSF, or cannot be measured.
    """
    ra, dec = _locate(frame, catalogue)
    others = None if contaminants is None else _locate(frame, contaminants)
    x, y = _find_on_frame(frame, ra, dec)
    other_xy = None if others is None else _find_on_frame(frame, *others)
    new_x, new_y = draw_positions(
        x,
        y,
        n,
        shape=frame.shape,
        margin=margin(photometry) + SLACK_PIXELS,
        rng=rng,
        others=other_xy,
    )
    if not len(new_x):
        return pd.DataFrame()
    warnings: list[str] = []
    model, _ = choose_psf(frame, calibration, new_x, new_y, photometry, warnings)
    if model is None:
        raise FrameError(warnings[-1])
    magnitude = rng.uniform(*magnitudes, len(new_x))
    flux = 10 ** (0.4 * (AB_ZERO_POINT_UJY - magnitude))
    injected = inject_sources(
        frame,
        model,
        new_x,
        new_y,
        flux,
        find_solid_angles(frame, calibration, new_x, new_y, warnings),
        rng,
        photon_variance=estimate_photon_variance(frame),
        factors=calibration.factors,
    )
    new_ra, new_dec = frame.wcs.pixel_to_sky(new_x, new_y)
    measured = measure(
        injected,
        np.append(ra, new_ra),
        np.append(dec, new_dec),
        photometry,
        calibration,
        others,
    )
    is_new = measured.index >= len(ra)
    place = measured.index[is_new] - len(ra)

    def pick(name: str) -> np.ndarray:
        # A source without a background has no row, and is not detected.
        values = np.full(len(new_x), np.nan)
        values[place] = {**measured.columns, **measured.psf_columns}[name][is_new]
        return values

    correction = pick("aperture_correction")
    rows = pd.DataFrame(
        {
            "filename": frame.filename,
            "band": frame.band,
            "x": new_x,
            "y": new_y,
            "ra": new_ra,
            "dec": new_dec,
            "wavelength": pick("wavelength"),
            "magnitude": magnitude,
            "injected_flux": flux,
            "total_flux": pick("flux") * correction,
            "total_flux_error": pick("flux_error") * correction,
            "psf_flux": pick("psf_flux"),
            "psf_flux_error": pick("psf_flux_error"),
            "psf_chi2": pick("psf_chi2"),
            "neighbour_flux": pick("neighbour_flux"),
            "neighbour_distance": _find_neighbours(new_x, new_y, (x, y), other_xy),
            "flag": pd.array(pick("flag"), dtype="Int64"),
        }
    )
    snr = (rows["psf_flux"] / rows["psf_flux_error"]).fillna(
        rows["total_flux"] / rows["total_flux_error"]
    )
    return rows.assign(is_detected=snr > min_snr)


def summarize_injections(rows: pd.DataFrame, by: Any) -> pd.DataFrame:
    """Reduce the rows of artificial sources to bias, pulls and completeness of groups.

    Parameters
    ----------
    rows : DataFrame
        As in ``injection.csv``.
    by : str, list or Series
        What `DataFrame.groupby` takes, such as ``"band"``, or bins of ``magnitude``.

    Returns
    -------
    DataFrame
        One row a group: ``n`` sources; ``n_good`` of them with a flux and without flags that
        speak against it (see `select_good_rows`); for ``total`` and ``psf`` fluxes of these, the
        medians of measured / injected - 1 (``bias_``) and of (measured - injected) / error
        (``pull_``), and the robust scatter of the latter (``scatter_``); ``completeness``, the
        part of all sources that was detected.
    """
    groups = rows.groupby(by, observed=True, sort=True)
    return pd.DataFrame({key: _summarize(group) for key, group in groups}).T


def _summarize(rows: pd.DataFrame) -> dict[str, float]:
    flags = rows["flag"].astype("Float64").to_numpy(float, na_value=np.nan)
    good = select_good_rows(rows.assign(flux=rows["total_flux"], flag=flags))
    found: dict[str, float] = {"n": len(rows), "n_good": len(good)}
    for name in ("total", "psf"):
        difference = good[f"{name}_flux"] - good["injected_flux"]
        pull = (difference / good[f"{name}_flux_error"]).dropna().to_numpy(float)
        found[f"bias_{name}"] = (difference / good["injected_flux"]).median()
        found[f"pull_{name}"] = float(np.median(pull)) if len(pull) else np.nan
        found[f"scatter_{name}"] = float(mad_std(pull)) if len(pull) > 1 else np.nan
    return found | {"completeness": float(rows["is_detected"].mean())}


def _check_arguments(
    frames: Any, per_frame: Any, magnitudes: Any, min_snr: Any, seed: Any
) -> tuple[float, float]:
    """Return the magnitudes; raise ConfigError for an argument that is not allowed."""
    for name, number, least in (
        ("frames", frames, 1),
        ("per_frame", per_frame, 1),
        ("seed", seed, 0),
    ):
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < least:
            raise ConfigError(option=name, rule=f"an integer >= {least}", value=number)
    if not _is_number(min_snr) or min_snr <= 0:
        raise ConfigError(option="min_snr", rule="a number > 0", value=min_snr)
    pair = list(magnitudes) if isinstance(magnitudes, Sequence | np.ndarray) else []
    if len(pair) != 2 or not all(map(_is_number, pair)) or not -5 <= pair[0] < pair[1] <= 35:
        rule = "two numbers from -5 to 35, the brighter (smaller) first"
        raise ConfigError(option="magnitudes", rule=rule, value=magnitudes)
    return float(pair[0]), float(pair[1])


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return is_real and bool(np.isfinite(value))


def _photometry_of(config: BatchConfig) -> PhotometryConfig:
    """Return how the run measures; total fluxes are compared also where the run has none."""
    photometry = config.photometry
    return replace(photometry, psf="nearest") if photometry.psf == "none" else photometry


def _choose_frames(folder: RunFolder, observations: Any, n: int) -> list[Observation]:
    """Return at most so many frames that are in images/, evenly over bands and time."""
    sizes = folder.images.list_sizes()
    by_band: dict[str, list[Observation]] = {}
    for observation in observations:
        if observation.is_complete(sizes):
            by_band.setdefault(observation.band, []).append(observation)
    if not by_band:
        raise RunFolderError(
            f"{folder.images} has none of the frames of the last query: sources are injected into "
            "frames that are kept (keep_images), which `spxdask download` fetches"
        )
    quota = dict.fromkeys(sorted(by_band), 0)
    while sum(quota.values()) < n:
        open_bands = [band for band, number in quota.items() if number < len(by_band[band])]
        if not open_bands:
            break
        for band in open_bands[: n - sum(quota.values())]:
            quota[band] += 1
    chosen = []
    for band, number in quota.items():
        found = by_band[band]
        # The middle of each of so many parts of the time.
        chosen += [found[int((k + 0.5) * len(found) / number)] for k in range(number)]
    return chosen


def _open_frame(folder: RunFolder, name: str) -> Frame:
    local = folder.images.local_path
    content = map_file(local / name) if local else memoryview(folder.images.get(name))
    return open_frame(content, name)


def _open_products(calibration: CalibrationSet, observation: Observation) -> DetectorCalibration:
    products = calibration.choose(observation.band, observation.is_early)
    return open_calibration(tuple(products.values()), calibration.source, observation.band)


def _locate(frame: Frame, catalogue: Catalogue) -> tuple[np.ndarray, np.ndarray]:
    """Return where those sources are that can be on a frame, at its time."""
    ra, dec, radius = frame.bounding_circle
    near = catalogue.within(ra, dec, radius + catalogue.largest_shift_deg)
    return find_positions(catalogue, near, locate_observer(frame.mjd, frame.observer_km))


def _find_on_frame(frame: Frame, ra: np.ndarray, dec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixel positions of the sources on a frame, and next to it."""
    ny, nx = frame.shape
    x, y = frame.wcs.sky_to_pixel(ra, dec)
    near = (x > -REACH_PIXELS) & (x < nx + REACH_PIXELS)
    near &= (y > -REACH_PIXELS) & (y < ny + REACH_PIXELS)
    return x[near], y[near]


def _find_neighbours(
    x: np.ndarray,
    y: np.ndarray,
    sources: tuple[np.ndarray, np.ndarray],
    others: tuple[np.ndarray, np.ndarray] | None,
) -> np.ndarray:
    """Return the distance of each position to the nearest source, pixels; not to itself."""
    points = np.column_stack([x, y])
    groups = [points, np.column_stack(sources)]
    groups += [] if others is None else [np.column_stack(others)]
    return KDTree(np.vstack(groups)).query(points, k=2)[0][:, 1]


def _say_why_nothing(failed: dict[str, str], notes: Counter[str]) -> str:
    reasons = [*(f"{name}: {reason}" for name, reason in failed.items()), *notes]
    return f"no source could be injected into any frame ({reasons[0]})"


def _bin_magnitudes(rows: pd.DataFrame, limits: tuple[float, float]) -> pd.Series:
    """Return the bin of about one magnitude that each row is in."""
    bright, faint = limits
    edges = np.linspace(bright, faint, max(1, round(faint - bright)) + 1)
    return pd.cut(rows["magnitude"], edges, include_lowest=True)


def _bin_crowding(rows: pd.DataFrame) -> pd.Series:
    return pd.cut(rows["neighbour_distance"], CROWDING_EDGES, labels=CROWDING_NAMES)


_HEADING = """\
                                   bias [%]        pull, median    pull, scatter   complete
                   rows    good   total     psf   total     psf   total     psf        [%]"""


def _format_report(report: InjectionReport) -> str:
    rows = report.rows
    lines = [
        f"{format_count(len(rows), 'artificial source')} on "
        f"{format_count(report.n_frames, 'frame')}"
        f"; complete: S/N > {report.min_snr:g}",
        "total: aperture flux times aperture correction; psf: flux of the PSF",
        "",
        _HEADING,
    ]
    bins = _bin_magnitudes(rows, report.magnitudes)
    names = bins.map(lambda b: f"{b.mid - b.length / 2:.1f} - {b.mid + b.length / 2:.1f}")
    for title, by in (
        ("magnitude", names),
        ("band", "band"),
        ("neighbour", _bin_crowding(rows)),
        ("all", pd.Series("", rows.index)),
    ):
        lines.append(title)
        lines += [
            _format_group(name, group) for name, group in summarize_injections(rows, by).iterrows()
        ]
    lines.append("")
    for name, reason in report.failed.items():
        lines.append(f"not used    {name}: {reason}")
    for reason, number in report.notes.items():
        lines.append(f"note        {format_count(number, 'frame')}: {reason}")
    return "\n".join([*lines, f"rows        {report.table}", f"figure      {report.figure}"])


def _format_group(name: Any, group: pd.Series) -> str:
    numbers = [100 * group["bias_total"], 100 * group["bias_psf"]]
    numbers += [group[f"{kind}_{of}"] for kind in ("pull", "scatter") for of in ("total", "psf")]
    return (
        f"  {name!s:<15}{int(group['n']):>6,}  {int(group['n_good']):>6,}"
        + "".join(f"{number:8.2f}" if np.isfinite(number) else f"{'-':>8}" for number in numbers)
        + f"{100 * group['completeness']:11.1f}"
    )


def _draw_figure(
    drawing: Any, rows: pd.DataFrame, limits: tuple[float, float], min_snr: float
) -> bytes:
    """Draw bias, scatter of pulls, and completeness against magnitude, a line a band; as PNG."""
    figure = drawing.Figure(figsize=(13, 4.2), layout="constrained")
    bias, scatter, completeness = figure.subplots(1, 3)
    for number, (band, of_band) in enumerate(rows.groupby("band")):
        found = summarize_injections(of_band, _bin_magnitudes(of_band, limits))
        middle = [interval.mid for interval in found.index]
        for name, style in (("psf", "-"), ("total", ":")):
            how = {"color": f"C{number}", "linestyle": style, "marker": "o", "markersize": 3}
            bias.plot(middle, 100 * found[f"bias_{name}"], **how)
            scatter.plot(middle, found[f"scatter_{name}"], **how)
        how = {"color": f"C{number}", "marker": "o", "markersize": 3}
        completeness.plot(middle, 100 * found["completeness"], **how, label=str(band))
    bias.axhline(0.0, color="0.7", zorder=0)
    # Relative errors of what is fainter than the noise would hide all others.
    bias.set_yscale("symlog", linthresh=1.0)
    scatter.axhline(1.0, color="0.7", zorder=0)
    bias.set(ylabel="median of measured / injected - 1 [%]", title="bias")
    scatter.set(ylabel="scatter of (measured - injected) / error", title="pulls")
    completeness.set(ylabel=f"S/N > {min_snr:g} [%]", title="completeness", ylim=(-3, 103))
    for axes in (bias, scatter, completeness):
        axes.set_xlabel("injected AB magnitude")
    completeness.legend(title="band; dotted: aperture", fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
