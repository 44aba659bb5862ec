"""Checks of the numbers of a run by themselves; nothing is compared with a truth.

All functions take the rows of some sources, sorted by source, band, release and wavelength, as
`spxdask.report.tables` makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from spxdask.report.channels import BANDS, CHANNEL_WIDTHS, CHANNELS_PER_BAND, find_channels

__all__ = [
    "MEASURES",
    "Rows",
    "Triplets",
    "compare_measures",
    "compare_releases",
    "describe_ratios",
    "find_medians",
    "find_scatter",
    "find_triplets",
    "isolate",
    "measure_total",
    "summarise_by",
    "to_magnitude",
]

Rows = dict[str, np.ndarray]

# The two total fluxes, by the names under which the report has them.
MEASURES = {"psf": "psf_flux", "aperture": "flux x aperture_correction"}
# A source is isolated where its neighbours put less than this share of its light into the aperture.
MAX_NEIGHBOUR_SHARE = 0.01
MIN_PSF_FRACTION = 0.8
MAX_BAD_FRACTION = 0.02
# Ratios are formed of fluxes with at least this signal-to-noise ratio.
MIN_SNR_OF_RATIO = 20.0
# Of a normal distribution, its standard deviation divided by the half range of its middle 68.3 %.
PERCENTILES = (15.865, 50.0, 84.135)
AB_ZERO = 23.9


def isolate(rows: Rows) -> Rows:
    """Return the rows that are fit for checks: good ones of sources without bright neighbours.

    Parameters
    ----------
    rows : dict of str to (n,) array
        Any rows.

    Returns
    -------
    dict of str to (m,) array
        Those without a flag that speaks against them, with most of the PSF on usable pixels,
        and with less than one percent of their light from neighbours.
    """
    with np.errstate(invalid="ignore"):
        kept = rows["is_good"] & (rows["flux_error"] > 0) & np.isfinite(rows["wavelength"])
        share = np.abs(rows["neighbour_flux"] / rows["flux"])
        # Tables without PSF photometry say nothing of neighbours.
        kept &= (share <= MAX_NEIGHBOUR_SHARE) | ~np.isfinite(rows["aperture_correction"])
        kept &= ~(rows["psf_fraction"] < MIN_PSF_FRACTION)
        kept &= ~(rows["bad_fraction"] > MAX_BAD_FRACTION)
    return {name: values[kept] for name, values in rows.items()}


def measure_total(rows: Rows, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a total flux of each row, and its error.

    Parameters
    ----------
    rows : dict of str to (n,) array
        Any rows.
    measure : str
        ``psf`` or ``aperture``; the latter is without the light of neighbours in the catalogue.

    Returns
    -------
    flux, error : (n,) float array
        In uJy; NaN where there is none. Tables without PSF photometry have `flux` alone.
    """
    if measure == "psf":
        flux, error = rows["psf_flux"], rows["psf_flux_error"]
        return flux.astype(np.float64), error.astype(np.float64)
    factor = rows["aperture_correction"].astype(np.float64)
    has_psf = bool(np.isfinite(factor).any())
    factor = factor if has_psf else np.ones(len(factor))
    neighbours = rows["neighbour_flux"].astype(np.float64) if has_psf else 0.0
    return (rows["flux"] - neighbours) * factor, rows["flux_error"] * factor


@dataclass(frozen=True, kw_only=True)
class Triplets:
    """Fluxes beside the straight line through their two neighbours in wavelength.

    A source's flux is compared where both are of the same band and release, and the three lie
    within one spectral channel. So its spectrum hardly matters, and no true value is needed.

    Attributes
    ----------
    source, band : (n,) int array
        Of which source and band each is.
    flux : (n,) float array
        Mean of the three, uJy.
    residual : (n,) float array
        Flux minus that of the line, divided by the error that the three errors give it.
    scatter, error : (n,) float array
        The residual, and its error, of a single flux: in uJy.
    """

    source: np.ndarray
    band: np.ndarray
    flux: np.ndarray
    residual: np.ndarray
    scatter: np.ndarray
    error: np.ndarray


def find_triplets(rows: Rows, measure: str) -> Triplets:
    """Compare fluxes with the line through their neighbours in wavelength.

    Parameters
    ----------
    rows : dict of str to (n,) array
        Sorted; see `isolate`.
    measure : str
        A key of `MEASURES`.

    Returns
    -------
    Triplets
        Each row is the middle of one at most.
    """
    flux, error = measure_total(rows, measure)
    kept = np.isfinite(flux) & (error > 0)
    flux, error = flux[kept], error[kept]
    source, band, release = (rows[n][kept].astype(np.int64) for n in ("source", "band", "release"))
    wave = np.log(rows["wavelength"][kept].astype(np.float64))
    is_one = np.zeros(max(len(flux) - 2, 0), bool)
    if len(is_one):
        is_one = (wave[2:] - wave[:-2]) <= CHANNEL_WIDTHS[band[1:-1]]
        for key in (source, band, release):
            is_one &= (key[2:] == key[:-2]) & (key[1:-1] == key[:-2])
    a = np.flatnonzero(is_one)
    b, c = a + 1, a + 2
    span = wave[c] - wave[a]
    right = np.where(span > 0, (wave[b] - wave[a]) / np.where(span > 0, span, 1.0), 0.5)
    left = 1.0 - right
    off = flux[b] - left * flux[a] - right * flux[c]
    sigma = np.sqrt(error[b] ** 2 + (left * error[a]) ** 2 + (right * error[c]) ** 2)
    single = np.sqrt(1.0 + left**2 + right**2)
    return Triplets(
        source=source[b],
        band=band[b],
        flux=(flux[a] + flux[b] + flux[c]) / 3.0,
        residual=off / sigma,
        scatter=off / single,
        error=sigma / single,
    )


def summarise_by(key: np.ndarray, *values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return means of values by an integer key.

    Parameters
    ----------
    key : (n,) int array
        What the means are of.
    *values : (n,) float array
        One or more.

    Returns
    -------
    keys : (m,) int array
        Increasing.
    counts : (m,) int array
        Rows of each.
    means : (k, m) float array
        Of each of the values.
    """
    keys, place, counts = np.unique(key, return_inverse=True, return_counts=True)
    sums = [np.bincount(place, v, len(keys)) for v in values]
    return keys, counts, np.array(sums).reshape(len(values), len(keys)) / np.maximum(counts, 1)


def find_scatter(values: np.ndarray) -> float:
    """Return the standard deviation about zero that outliers do not enter.

    Parameters
    ----------
    values : (n,) float array
        At least one.

    Returns
    -------
    float
        The limit below which 68.3 % of the absolute values are.
    """
    return float(np.percentile(np.abs(values), 68.27))


def to_magnitude(flux: np.ndarray) -> np.ndarray:
    """Return AB magnitudes.

    Parameters
    ----------
    flux : (n,) float array
        In uJy.

    Returns
    -------
    (n,) float array
        NaN where the flux is not positive.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(flux > 0, AB_ZERO - 2.5 * np.log10(np.where(flux > 0, flux, 1.0)), np.nan)


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Ratios of two fluxes of the same source.

    Attributes
    ----------
    band, channel : (n,) int array
        Of which band and channel each is.
    ratio : (n,) float array
    magnitude : (n,) float array
        AB magnitude of the flux below the line.
    """

    band: np.ndarray
    channel: np.ndarray
    ratio: np.ndarray
    magnitude: np.ndarray


def compare_measures(rows: Rows) -> Ratios:
    """Divide PSF fluxes by aperture-corrected fluxes.

    Parameters
    ----------
    rows : dict of str to (n,) array
        Those of isolated sources.

    Returns
    -------
    Ratios
        Of rows in which both are at least `MIN_SNR_OF_RATIO` times their errors.
    """
    psf, psf_error = measure_total(rows, "psf")
    aperture, aperture_error = measure_total(rows, "aperture")
    with np.errstate(invalid="ignore"):
        kept = psf > MIN_SNR_OF_RATIO * psf_error
        kept &= aperture > MIN_SNR_OF_RATIO * aperture_error
    band = rows["band"][kept].astype(np.int64)
    return Ratios(
        band=band,
        channel=find_channels(band, rows["wavelength"][kept].astype(np.float64)),
        ratio=psf[kept] / aperture[kept],
        magnitude=to_magnitude(aperture[kept]),
    )


def compare_releases(rows: Rows, measure: str, one: int, other: int) -> Ratios:
    """Divide fluxes of one release by those of another in the same channel.

    Their wavelengths differ within the channel, either way, which scatters single ratios by a
    percent or two, but not their medians.

    Parameters
    ----------
    rows : dict of str to (n,) array
        Those of isolated sources.
    measure : str
        A key of `MEASURES`.
    one, other : int
        The releases, that below the line second.

    Returns
    -------
    Ratios
        Of the weighted means of each source in each channel, where both are at least
        `MIN_SNR_OF_RATIO` times their errors.
    """
    flux, error = measure_total(rows, measure)
    n_places = len(BANDS) * CHANNELS_PER_BAND
    found = {}
    for release in (one, other):
        kept = np.isfinite(flux) & (error > 0) & (rows["release"] == release)
        band = rows["band"][kept].astype(np.int64)
        channel = find_channels(band, rows["wavelength"][kept].astype(np.float64))
        key = rows["source"][kept].astype(np.int64) * n_places + band * CHANNELS_PER_BAND + channel
        weight = error[kept] ** -2.0
        keys, counts, (weights, sums) = summarise_by(key, weight, weight * flux[kept])
        mean = sums / weights
        is_bright = mean > MIN_SNR_OF_RATIO / np.sqrt(weights * counts)
        found[release] = keys[is_bright], mean[is_bright]
    keys, i, j = np.intersect1d(found[one][0], found[other][0], return_indices=True)
    place = keys % n_places
    below = found[other][1][j]
    return Ratios(
        band=place // CHANNELS_PER_BAND,
        channel=place % CHANNELS_PER_BAND,
        ratio=found[one][1][i] / below,
        magnitude=to_magnitude(below),
    )


def describe_ratios(ratios: Ratios) -> list[dict[str, float | int | str]]:
    """Return medians and scatter by band.

    Parameters
    ----------
    ratios : Ratios
        Any.

    Returns
    -------
    list of dict
        ``band``, ``n``, ``median``, its ``error``, and ``scatter``: half the range of the middle
        68 %. Bands without a ratio are left out.
    """
    found = []
    for number, band in enumerate(BANDS):
        values = ratios.ratio[ratios.band == number]
        if len(values):
            low, median, high = np.percentile(values, PERCENTILES)
            scatter = float(high - low) / 2
            found.append(
                {
                    "band": band,
                    "n": len(values),
                    "median": float(median),
                    # Of a median of normal numbers.
                    "error": 1.2533 * scatter / len(values) ** 0.5,
                    "scatter": scatter,
                }
            )
    return found


def find_medians(
    x: np.ndarray, y: np.ndarray, step: float, reduce: Callable = np.median, min_count: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """Return medians in steps of another number.

    Parameters
    ----------
    x, y : (n,) float array
        Where, and what.
    step : float
        Width of a bin, of which one begins at zero.
    reduce : callable
        In place of the median.
    min_count : int
        Bins with fewer are left out.

    Returns
    -------
    x, y : (m,) float array
        Centres of the bins, and the medians.
    """
    kept = np.isfinite(x) & np.isfinite(y)
    number, y = np.floor(x[kept] / step).astype(np.int64), y[kept]
    bins = [b for b in np.unique(number) if (number == b).sum() >= min_count]
    return (
        np.array([(b + 0.5) * step for b in bins]),
        np.array([float(reduce(y[number == b])) for b in bins]),
    )
