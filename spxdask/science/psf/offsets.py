"""Residuals of astrometry: where bright stars are, relative to the catalogue and the WCS."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spxdask.science.kernels.offsets import measure_offsets
from spxdask.science.kernels.psf_fit import Fit
from spxdask.science.psf.model import PsfModel

__all__ = ["NO_STARS", "Astrometry", "Offsets", "measure_star_offsets", "summarise_offsets"]

# A star is bright where its PSF flux is this many times its error.
LEAST_SNR = 50.0
# It has at least this share of its PSF, squared, on usable pixels.
LEAST_FRACTION = 0.99
# The brightest ones of a frame tell its offset to a few thousandths of a pixel.
MOST_STARS = 30
# A frame full of saturated or blended ones costs no more than this many.
MOST_TRIED = 200
# The scatter of fewer is not known.
LEAST_STARS_FOR_SCATTER = 3
# Times the median of absolute deviations, the standard deviation of a normal distribution.
SIGMA_PER_MAD = 1.4826


@dataclass(frozen=True, kw_only=True)
class Offsets:
    """How far bright stars are from where the catalogue and the WCS put them.

    Attributes
    ----------
    index : (k,) int array
        Which sources, from bright to faint.
    dx, dy : (k,) float array
        The place of the light minus that of the source, pixels.
    dx_error, dy_error : (k,) float array
        Standard deviations from VARIANCE, pixels.
    """

    index: np.ndarray
    dx: np.ndarray
    dy: np.ndarray
    dx_error: np.ndarray
    dy_error: np.ndarray


NO_STARS = Offsets(
    index=np.empty(0, np.int64),
    dx=np.empty(0),
    dy=np.empty(0),
    dx_error=np.empty(0),
    dy_error=np.empty(0),
)


@dataclass(frozen=True, kw_only=True)
class Astrometry:
    """The offset of a frame.

    Attributes
    ----------
    stars : int
        How many stars tell it.
    dx, dy : float or None
        Medians of their offsets, pixels; None without a star.
    scatter : float or None
        Of single stars about these along one axis, from the median absolute deviation, pixels;
        None with fewer than three stars.
    error : float or None
        Median of the errors of single stars along one axis, pixels: the scatter that noise makes.
    """

    stars: int
    dx: float | None = None
    dy: float | None = None
    scatter: float | None = None
    error: float | None = None


def measure_star_offsets(
    model: PsfModel,
    fit: Fit,
    is_usable: np.ndarray,
    values: np.ndarray,
    variances: np.ndarray,
    stamps: np.ndarray,
    corners: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    level: np.ndarray,
    origin: tuple[float, float],
) -> Offsets:
    """Measure the offsets of the brightest isolated stars.

    Parameters
    ----------
    model : PsfModel
        The PSF that fluxes were fitted with.
    fit : Fit
        These fluxes.
    is_usable : (n,) bool array
        Which sources may be taken: those without a flag that speaks against them.
    values, variances : (n, size, size) float array
        Pixels of the stamps, as for `spxdask.science.kernels.psf_fit.fit_stamps`.
    stamps : (n, size, size) float array
        PSF of each source.
    corners : (n, 2) int array
        Row and column of the first pixel of each stamp, ordered by row.
    x, y : (n,) float array
        0-based pixel positions.
    level : (n,) float array
        Background of each source, in result units.
    origin : (float, float)
        Full-frame 0-based pixel of the pixel (0, 0).

    Returns
    -------
    Offsets
        Of up to `MOST_STARS`; indices are those of the arrays given.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        snr = fit.flux / fit.flux_error
        tried = np.flatnonzero(is_usable & (snr > LEAST_SNR) & (fit.fraction > LEAST_FRACTION))
    if not len(tried):
        return NO_STARS
    tried = tried[np.argsort(-snr[tried], kind="stable")[:MOST_TRIED]]
    zones, shares = model.find_zones(x[tried] + origin[0], y[tried] + origin[1])
    found = measure_offsets(
        model.psf, zones, shares, tried, MOST_STARS, values, variances, stamps, corners, x, y,
        fit.flux, level,
    )  # fmt: skip
    is_star = ~np.isnan(found[:, 0])
    dx, dy, dx_error, dy_error = found[is_star].T
    return Offsets(index=tried[is_star], dx=dx, dy=dy, dx_error=dx_error, dy_error=dy_error)


def summarise_offsets(offsets: Offsets) -> Astrometry:
    """Return the offset that stars have in common, whatever some of them do.

    Parameters
    ----------
    offsets : Offsets
        Of the stars of a frame.

    Returns
    -------
    Astrometry
        Medians, as motions of stars, errors of the catalogue and blends with what is not in it
        are larger than the errors.
    """
    n = len(offsets.dx)
    if not n:
        return Astrometry(stars=0)
    dx, dy = _find_median(offsets.dx), _find_median(offsets.dy)
    scatter = None
    if n >= LEAST_STARS_FOR_SCATTER:
        deviations = np.abs(np.concatenate([offsets.dx - dx, offsets.dy - dy]))
        scatter = SIGMA_PER_MAD * _find_median(deviations)
    errors = np.concatenate([offsets.dx_error, offsets.dy_error])
    return Astrometry(stars=n, dx=dx, dy=dy, scatter=scatter, error=_find_median(errors))


def _find_median(values: np.ndarray) -> float:
    """Return the median of a few numbers; numpy's takes as long as the fit of a dozen stars."""
    ordered, n = np.sort(values), len(values)
    return float(0.5 * (ordered[(n - 1) // 2] + ordered[n // 2]))
