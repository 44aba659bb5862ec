"""The figures of a report, each from the numbers of `collect_numbers`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from spxdask.report.channels import BANDS, CHANNEL_WIDTHS, CHANNELS_PER_BAND, list_channels
from spxdask.report.collect import Drawing, SampleSpectrum
from spxdask.report.statistics import Ratios, find_medians, to_magnitude
from spxdask.report.svg import MUTED, Axis, Plot

__all__ = [
    "BAND_COLORS",
    "plot_astrometry",
    "plot_channels",
    "plot_chi2",
    "plot_measures",
    "plot_releases",
    "plot_rms",
    "plot_rows_per_source",
    "plot_sky",
    "plot_spectrum",
    "plot_time",
]

# From blue to red, as the wavelengths are.
BAND_COLORS = ("#4056a1", "#2f8fb5", "#3c9d6b", "#c79a1e", "#d9722c", "#b2403c")
MEASURE_COLORS = {"psf": "#2f6fb5", "aperture": "#d9722c"}
FOOTPRINT_COLOR, FAILED_COLOR, SOURCE_COLOR = "#5b7ea6", "#c0392b", "#26303a"
WAVELENGTH_TICKS = (0.75, 1, 1.5, 2, 3, 4, 5)
# Where there are more, the density is drawn, or every k-th.
MAX_FOOTPRINTS = 400
MAX_POINTS = 3000
# A field that is larger is drawn as a map of the whole sky.
MAX_LOCAL_RADIUS_DEG = 30.0


def _thin(n: int, limit: int = MAX_POINTS) -> slice:
    """Return which of some points are drawn: every k-th."""
    return slice(None, None, max(1, -(-n // limit)))


def plot_sky(drawing: Drawing) -> tuple[Plot, str]:
    """Draw where frames and sources are.

    Parameters
    ----------
    drawing : Drawing
        Of the report.

    Returns
    -------
    plot : Plot
    caption : str
        What is seen, as text.
    """
    frames = drawing.record.frames
    known = [(i, f) for i, f in enumerate(drawing.record.footprints) if f is not None]
    ra, dec = np.empty(0), np.empty(0)
    if drawing.catalogue is not None:
        ra, dec = drawing.catalogue.ra, drawing.catalogue.dec
    centres = np.array([_mean_vector(*f.T) for _, f in known]).reshape(-1, 3)
    vectors = np.concatenate([centres, _to_vectors(ra, dec)])
    if not len(vectors):
        plot = Plot(Axis(-1, 1, ticks=[]), Axis(-1, 1, ticks=[]), "Frames and sources", height=420)
        return plot, "No frame and no source is known."
    # Frames decide: sources far away from all of them are counted, not drawn.
    shown = centres if len(centres) else vectors
    middle = shown.sum(axis=0)
    radius = 180.0
    if np.linalg.norm(middle) > 1e-6:
        middle /= np.linalg.norm(middle)
        radius = float(np.rad2deg(np.arccos(np.clip(shown @ middle, -1, 1)).max()))
    is_local = radius <= MAX_LOCAL_RADIUS_DEG
    plot, project, place = (
        _make_local_map(middle, radius + 2.6 if len(centres) else radius * 1.1 + 0.02)
        if is_local
        else _make_sky_map()
    )
    status = frames["status"].to_numpy()
    drawn = known if is_local else []
    every = _thin(len(drawn), MAX_FOOTPRINTS)
    groups = (
        ("frames", FOOTPRINT_COLOR, lambda s: s != "failed"),
        ("failed", FAILED_COLOR, lambda s: s == "failed"),
    )
    for label, color, is_one in groups:
        chosen = [f for i, f in drawn[every] if is_one(status[i])]
        polygons = [np.column_stack(project(_to_vectors(*f.T))) for f in chosen]
        opacity = min(0.12, 1.5 / max(len(drawn[every]), 1))
        plot.draw_polygons(polygons, color, fill_opacity=opacity, label=label)
    if not is_local and len(centres):
        x, y = project(centres)
        plot.draw_density(x, y, FOOTPRINT_COLOR, cell=8, label="frames")
    caption = place
    if every.step > 1:
        caption += f" One in {every.step} of {len(drawn):,} footprints is drawn."
    if len(ra):
        x, y = project(_to_vectors(ra, dec))
        inside = (plot.x.place(x) >= 0) & (plot.x.place(x) <= 1)
        inside &= (plot.y.place(y) >= 0) & (plot.y.place(y) <= 1)
        x, y = x[inside], y[inside]
        if len(x) > MAX_POINTS:
            plot.draw_density(x, y, SOURCE_COLOR, cell=4, label="sources")
            caption += " Of sources, the density is drawn."
        else:
            plot.draw_points(x, y, SOURCE_COLOR, size=2.2, label="sources")
        if outside := len(ra) - len(x):
            verb = "lies" if outside == 1 else "lie"
            caption += f" {outside:,} of {len(ra):,} sources {verb} outside of the map."
    return plot, caption


def _to_vectors(ra: np.ndarray, dec: np.ndarray) -> np.ndarray:
    ra, dec = np.deg2rad(ra), np.deg2rad(dec)
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=-1)


def _mean_vector(ra: np.ndarray, dec: np.ndarray) -> np.ndarray:
    total = _to_vectors(ra, dec).sum(axis=0)
    return total / max(float(np.linalg.norm(total)), 1e-12)


def _make_local_map(middle: np.ndarray, radius: float) -> tuple[Plot, Any, str]:
    """Return a map about a point, north up and east to the left, with equal scales."""
    ra, dec = np.arctan2(middle[1], middle[0]), np.arcsin(np.clip(middle[2], -1, 1))
    east = np.array([-np.sin(ra), np.cos(ra), 0.0])
    north = np.array([-np.sin(dec) * np.cos(ra), -np.sin(dec) * np.sin(ra), np.cos(dec)])

    def project(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Zenithal equidistant: true distances from the middle.
        x, y = vectors @ east, vectors @ north
        distance = np.arctan2(np.hypot(x, y), vectors @ middle)
        factor = np.rad2deg(distance) / np.maximum(np.hypot(x, y), 1e-12)
        return x * factor, y * factor

    width, height = 560, 520
    ratio = (width - 76) / (height - 74)
    plot = Plot(
        Axis(radius * ratio, -radius * ratio, "east, deg"),
        Axis(-radius, radius, "north, deg"),
        "Frames and sources",
        width=width,
        height=height,
    )
    degrees = float(np.rad2deg(ra) % 360), float(np.rad2deg(dec))
    return plot, project, f"Offsets from {degrees[0]:.4f}, {degrees[1]:+.4f} (ICRS, deg)."


def _make_sky_map() -> tuple[Plot, Any, str]:
    """Return a map of the whole sky in Hammer's projection, which keeps areas."""

    def project(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ra = np.rad2deg(np.arctan2(vectors[:, 1], vectors[:, 0])) % 360
        return _project_hammer(ra, np.rad2deg(np.arcsin(np.clip(vectors[:, 2], -1, 1))))

    plot = Plot(
        Axis(-2.95, 2.95, "right ascension from 360 deg at the left to 0, ICRS", ticks=[]),
        Axis(-1.5, 1.5, ticks=[]),
        "Frames and sources",
        width=1160,
        height=620,
    )
    for dec in range(-60, 61, 30):
        line = _project_hammer(np.linspace(0.01, 359.99, 181), np.full(181, float(dec)))
        plot.draw_line(*line, "#d4dae0", width=0.8)
    for ra in (0.01, 60, 120, 180, 240, 300, 359.99):
        line = _project_hammer(np.full(91, float(ra)), np.linspace(-90, 90, 91))
        plot.draw_line(*line, "#d4dae0", width=0.8)
    for ra in (60, 120, 180, 240, 300):
        x, y = _project_hammer(np.array([float(ra)]), np.array([2.0]))
        plot.write(float(x[0]), float(y[0]), f"{ra}", MUTED)
    return plot, project, "The whole sky, in equal areas (Hammer's projection)."


def _project_hammer(ra: np.ndarray, dec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half, dec = np.deg2rad(180.0 - ra) / 2, np.deg2rad(dec)
    z = np.sqrt(1 + np.cos(dec) * np.cos(half))
    return 2 * np.sqrt(2) * np.cos(dec) * np.sin(half) / z, np.sqrt(2) * np.sin(dec) / z


def plot_channels(numbers: dict[str, Any]) -> Plot:
    """Draw how many rows each spectral channel has.

    Parameters
    ----------
    numbers : dict
        Of the report.

    Returns
    -------
    Plot
    """
    channels = numbers["coverage"]["channels"]
    largest = max((c["rows"] for c in channels), default=0)
    plot = Plot(
        Axis(0.72, 5.15, "wavelength, um", is_log=True, ticks=WAVELENGTH_TICKS),
        Axis(0, 1.06 * (largest or 1), "rows"),
        "Rows by spectral channel",
        width=1160,
        height=280,
    )
    for number, band in enumerate(BANDS):
        ours = [c for c in channels if c["band"] == band]
        centre = np.array([c["wavelength"] for c in ours])
        width = centre * CHANNEL_WIDTHS[number] * 0.44
        for key, opacity in (("rows", 0.35), ("good", 0.9)):
            top = np.array([float(c[key]) for c in ours])
            label = band if key == "good" else ""
            plot.draw_bars(
                centre - width,
                centre + width,
                top,
                BAND_COLORS[number],
                opacity=opacity,
                label=label,
            )
    return plot


def plot_rows_per_source(numbers: dict[str, Any]) -> Plot:
    """Draw how many sources have how many rows.

    Parameters
    ----------
    numbers : dict
        Of the report.

    Returns
    -------
    Plot
    """
    found = numbers["coverage"]["rows_per_source"]
    rows = np.array([f["rows"] for f in found], np.float64)
    sources = np.array([f["sources"] for f in found], np.float64)
    step = max(1, int(np.ceil((rows.max(initial=1) + 1) / 60)))
    edges = np.arange(0, rows.max(initial=1) + step + 1, step)
    counts, edges = np.histogram(rows, edges, weights=sources)
    plot = Plot(
        Axis(-0.5 * step, float(edges[-1]), "rows (epochs) of a source"),
        Axis(0, 1.06 * max(counts.max(initial=1.0), 1.0), "sources"),
        "Epochs a source",
    )
    centre = edges[:-1] + (step - 1) / 2
    plot.draw_bars(centre - 0.42 * step, centre + 0.42 * step, counts, FOOTPRINT_COLOR)
    return plot


def plot_time(drawing: Drawing, column: str, title: str, label: str) -> Plot:
    """Draw a number of each frame against time, by detector.

    Parameters
    ----------
    drawing : Drawing
        Of the report.
    column : str
        Of the table of frames.
    title, label : str
        Of the plot, and of its vertical axis.

    Returns
    -------
    Plot
    """
    frames = drawing.record.frames
    frames = frames[(frames["status"] == "measured") & frames[column].notna()]
    mjd = frames["mjd"].to_numpy(np.float64)
    values = frames[column].to_numpy(np.float64)
    low, high = np.percentile(values, (0.5, 99.5)) if len(values) else (0.0, 1.0)
    # A few frames far off do not hide how the others vary; they are drawn at the edge.
    room = 0.6 * (high - low) or 0.05 * abs(low) or 0.1
    in_range = values[(values >= low - room) & (values <= high + room)]
    plot = Plot(
        Axis.around(mjd, "mid-exposure, UTC", is_time=True),
        Axis.around(in_range, label, 0.08),
        title,
        height=250,
    )
    for name, color, ours in _choose_by_band(frames):
        plot.draw_points(mjd[ours], values[ours], color, size=4, label=name)
    return plot


def _choose_by_band(frames: pd.DataFrame) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield each band, its colour, and which of its frames are drawn."""
    drawn = np.arange(len(frames))[_thin(len(frames))]
    band = frames["band"].to_numpy()[drawn]
    for name, color in zip(BANDS, BAND_COLORS, strict=True):
        yield name, color, drawn[band == name]


def plot_astrometry(numbers: dict[str, Any], drawing: Drawing) -> tuple[Plot, bool]:
    """Draw how far stars are from their positions: a point a frame, and the detectors' medians.

    Parameters
    ----------
    numbers : dict
        Of the report.
    drawing : Drawing
        Of the report.

    Returns
    -------
    plot : Plot
        With equal scales.
    is_limit_drawn : bool
        Whether offsets are so large that the circle about those that are not too large is in it.
    """
    frames = drawing.record.frames
    frames = frames[(frames["status"] == "measured") & frames["astrometry_dx"].notna()]
    dx, dy = (frames[f"astrometry_{name}"].to_numpy(np.float64) for name in ("dx", "dy"))
    found = numbers["frames"]["astrometry"]
    # A few frames far off are drawn at the edge.
    reach = float(np.percentile(np.hypot(dx, dy), 99.0)) if len(dx) else 0.0
    limit = found["max_offset"]
    is_limit_drawn = reach > 0.4 * limit
    half = 1.15 * max(limit, reach) if is_limit_drawn else max(1.3 * reach, 0.01 * limit)
    width, height = 560, 500
    ratio = (width - 76) / (height - 74)
    plot = Plot(
        Axis(-half * ratio, half * ratio, "dx, pixels"),
        Axis(-half, half, "dy, pixels"),
        "Offsets of bright sources",
        width=width,
        height=height,
    )
    if is_limit_drawn:
        angle = np.linspace(0, 2 * np.pi, 181)
        circle = limit * np.cos(angle), limit * np.sin(angle)
        plot.draw_line(*circle, MUTED, width=1, dashes="4 3")
    for _, color, ours in _choose_by_band(frames):
        plot.draw_points(dx[ours], dy[ours], color, opacity=0.45)
    for d in found["detectors"]:
        color = BAND_COLORS[BANDS.index(d["band"])]
        at = np.array([d["dx"]]), np.array([d["dy"]])
        plot.draw_points(*at, "#ffffff", size=11, opacity=1)
        plot.draw_points(*at, color, size=8, opacity=1, label=d["band"])
    return plot, is_limit_drawn


def plot_rms(numbers: dict[str, Any], drawing: Drawing) -> Plot:
    """Draw the scatter of fluxes against magnitude, with the errors that are quoted.

    Parameters
    ----------
    numbers : dict
        Of the report.
    drawing : Drawing
        Of the report.

    Returns
    -------
    Plot
    """
    y = [100 * values[1] for values in drawing.triplets.values()]
    plot = Plot(
        _magnitude_axis(drawing),
        Axis.around(_middle(np.concatenate(y)), "rms / flux, %", is_log=True),
        "Scatter of isolated sources",
        height=340,
    )
    for measure, values in drawing.triplets.items():
        every = _thin(values.shape[1], MAX_POINTS // 2)
        color = MEASURE_COLORS[measure]
        plot.draw_points(values[0][every], 100 * values[1][every], color, size=2.4, opacity=0.35)
    for measure in drawing.triplets:
        x, rms, error, _ = _read_bins(numbers, measure)
        color = MEASURE_COLORS[measure]
        plot.draw_line(x, 100 * rms, color, label=_short_name(measure))
        plot.draw_line(x, 100 * error, color, dashes="5 4", label="quoted")
    return plot


def plot_chi2(numbers: dict[str, Any], drawing: Drawing) -> Plot:
    """Draw the reduced chi^2 of sources against magnitude.

    Parameters
    ----------
    numbers : dict
        Of the report.
    drawing : Drawing
        Of the report.

    Returns
    -------
    Plot
    """
    plot = Plot(
        _magnitude_axis(drawing),
        Axis(0.05, 50, "reduced chi^2", is_log=True, ticks=(0.1, 1, 10)),
        "Are the errors honest? They are at 1",
        height=340,
    )
    plot.draw_level(1.0)
    for measure, values in drawing.triplets.items():
        every = _thin(values.shape[1], MAX_POINTS // 2)
        color = MEASURE_COLORS[measure]
        plot.draw_points(values[0][every], values[2][every], color, size=2.4, opacity=0.35)
    for measure in drawing.triplets:
        x, _, _, chi2 = _read_bins(numbers, measure)
        plot.draw_line(x, chi2, MEASURE_COLORS[measure], label=_short_name(measure))
    return plot


def _short_name(measure: str) -> str:
    return {"psf": "PSF", "aperture": "aperture"}[measure]


def _middle(values: np.ndarray) -> np.ndarray:
    """Return values without the one percent at each end."""
    values = values[np.isfinite(values)]
    if not len(values):
        return values
    low, high = np.percentile(values, (1, 99))
    return values[(values >= low) & (values <= high)]


def _magnitude_axis(drawing: Drawing) -> Axis:
    magnitudes = np.concatenate([np.empty(0), *(v[0] for v in drawing.triplets.values())])
    return Axis.around(_middle(magnitudes), "AB magnitude of the total flux")


def _read_bins(numbers: dict[str, Any], measure: str) -> tuple[np.ndarray, ...]:
    """Return magnitude, rms, quoted error and chi^2 of the bins with enough fluxes."""
    bins = [b for b in numbers["checks"]["errors"][measure]["by_magnitude"] if b["fluxes"] >= 10]
    x = np.array([sum(b["magnitude"]) / 2 for b in bins], np.float64)
    return (x, *(np.array([b[k] for b in bins], np.float64) for k in ("rms", "error", "chi2")))


def plot_measures(ratios: Ratios) -> Plot:
    """Draw PSF fluxes divided by aperture-corrected ones, against magnitude.

    Parameters
    ----------
    ratios : Ratios
        Of the report.

    Returns
    -------
    Plot
    """
    plot = Plot(
        Axis.around(_middle(ratios.magnitude), "AB magnitude of the total flux"),
        _ratio_axis(ratios.ratio, "PSF flux / aperture-corrected flux"),
        "PSF against aperture",
        height=320,
    )
    every = _thin(len(ratios.ratio))
    for number, band in enumerate(BANDS):
        ours = ratios.band[every] == number
        plot.draw_points(
            ratios.magnitude[every][ours],
            ratios.ratio[every][ours],
            BAND_COLORS[number],
            size=2.4,
            opacity=0.5,
            label=band,
        )
    plot.draw_level(1.0)
    x, y = find_medians(ratios.magnitude, ratios.ratio, 0.5)
    plot.draw_line(x, y, "#26303a")
    return plot


def plot_releases(name: str, ratios: Ratios) -> Plot:
    """Draw the ratio of the fluxes of two releases by channel.

    Parameters
    ----------
    name : str
        The releases, such as ``qr2 / qr3``.
    ratios : Ratios
        Of the report.

    Returns
    -------
    Plot
    """
    centres = np.array([centre for _, _, centre in list_channels()])
    place = ratios.band * CHANNELS_PER_BAND + ratios.channel
    plot = Plot(
        Axis(0.72, 5.15, "wavelength, um", is_log=True, ticks=WAVELENGTH_TICKS),
        _ratio_axis(ratios.ratio, f"flux, {name}"),
        f"{name}, same sources, by channel",
        height=320,
    )
    every = _thin(len(place))
    rng = np.random.default_rng(0)
    spread = centres[place] * (1 + CHANNEL_WIDTHS[ratios.band] * rng.uniform(-0.4, 0.4, len(place)))
    for number, band in enumerate(BANDS):
        ours = ratios.band[every] == number
        plot.draw_points(
            spread[every][ours],
            ratios.ratio[every][ours],
            BAND_COLORS[number],
            size=2.2,
            opacity=0.35,
            label=band,
        )
    plot.draw_level(1.0)
    present = [p for p in np.unique(place) if (place == p).sum() >= 5]
    medians = np.array([np.median(ratios.ratio[place == p]) for p in present])
    plot.draw_points(centres[present], medians, "#26303a", size=4.5, opacity=1)
    return plot


def _ratio_axis(ratio: np.ndarray, label: str) -> Axis:
    """Return an axis about 1 that holds most of the ratios."""
    low, high = np.percentile(ratio, (1, 99)) if len(ratio) else (1.0, 1.0)
    reach = max(abs(low - 1), abs(high - 1), 0.004) * 1.3
    return Axis(1 - reach, 1 + reach, label)


def plot_spectrum(spectrum: SampleSpectrum) -> Plot:
    """Draw the spectrum of a source.

    Parameters
    ----------
    spectrum : SampleSpectrum
        Of the report.

    Returns
    -------
    Plot
    """
    flux = spectrum.flux
    magnitude = float(to_magnitude(np.array([np.median(flux)]))[0])
    suffix = f", {magnitude:.1f} mag" if np.isfinite(magnitude) else ""
    name = spectrum.target_id
    name = name if len(name) <= 24 else f"{name[:21]}..."
    low, high = np.percentile(flux, (1, 99))
    room = 0.35 * (high - low) or 0.1 * abs(high) or 1.0
    # From zero where that is not far away, and below it only for fluxes that are.
    bottom = 0.0 if 0 < low < 0.6 * high else low - room
    plot = Plot(
        Axis(0.72, 5.15, "wavelength, um", is_log=True, ticks=(0.75, 1, 1.5, 2, 3, 5)),
        Axis(bottom, high + room, "total flux, uJy"),
        f"{name}{suffix}",
        width=380,
        height=230,
    )
    if plot.y.low < 0:
        plot.draw_level(0.0)
    for number in range(len(BANDS)):
        ours = spectrum.band == number
        plot.draw_errors(
            spectrum.wavelength[ours], flux[ours], spectrum.error[ours], BAND_COLORS[number]
        )
        plot.draw_points(spectrum.wavelength[ours], flux[ours], BAND_COLORS[number], size=3.2)
    return plot
