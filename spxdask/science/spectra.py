"""Spectra of one source: points averaged in channels, and a smooth curve through them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from spxdask.science.channels import Channels

__all__ = ["BinnedFlux", "SmoothFlux", "average_in_bins", "fit_smooth_flux", "sum_differences"]

# Fewest points of a band that a curve is drawn through.
MIN_POINTS = 6
# Intervals of the spline in a band: three a channel, as the filters resolve no more. With fewer
# points, one interval for two of them.
MAX_INTERVALS = 51
DEGREE = 3
# Strengths of the penalty on curvature that are tried, in units in which 1 weighs as much as the
# points do.
PENALTIES = 10.0 ** np.arange(-8.0, 6.5, 0.5)
# Factor of the degrees of freedom in generalised cross-validation; with 1, curves follow the noise
# now and then, which 1.4 avoids (Kim and Gu 2004, JRSS B 66, 337).
GCV_FACTOR = 1.4
# Residuals beyond so many standard deviations weigh less, by the square of how far beyond they
# are, so that a far outlier has hardly any influence; in so many rounds.
OUTLIER = 3.0
ROUNDS = 5
# Fewest points of a band that a polynomial of that degree is drawn through.
MIN_FOR_TREND = 8
# A point that determines the curve at its wavelength by itself cannot be compared with it.
MAX_LEVERAGE = 0.95


@dataclass(frozen=True, eq=False, kw_only=True)
class BinnedFlux:
    """Averages of points in bins.

    Attributes
    ----------
    value, error : (m,) float array
        Inverse-variance mean and its error; NaN in an empty bin.
    wavelength : (m,) float array
        Mean with the same weights.
    n : (m,) int array
        Number of points.
    chi2 : (m,) float array
        Sum of the squared differences from the mean in units of their errors, for n - 1 degrees
        of freedom; NaN with fewer than two points.
    """

    value: np.ndarray
    error: np.ndarray
    wavelength: np.ndarray
    n: np.ndarray
    chi2: np.ndarray


def average_in_bins(
    bins: np.ndarray,
    wavelength: np.ndarray,
    flux: np.ndarray,
    flux_error: np.ndarray,
    n_bins: int,
) -> BinnedFlux:
    """Average points in bins.

    Parameters
    ----------
    bins : (n,) int array
        Bin of each point, from 0; -1 for none.
    wavelength, flux, flux_error : (n,) float array
        Points without a finite flux or a positive error are left out.
    n_bins : int
        Number of bins.

    Returns
    -------
    BinnedFlux
    """
    is_used = (bins >= 0) & np.isfinite(flux) & np.isfinite(flux_error) & (flux_error > 0)
    bins, flux = bins[is_used], flux[is_used]
    weight = flux_error[is_used] ** -2.0
    n = np.bincount(bins, minlength=n_bins)
    total = np.bincount(bins, weight, n_bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.bincount(bins, weight * flux, n_bins) / total
        centre = np.bincount(bins, weight * wavelength[is_used], n_bins) / total
        error = np.where(n > 0, total**-0.5, np.nan)
    chi2 = np.bincount(bins, weight * (flux - value[bins]) ** 2, n_bins)
    return BinnedFlux(
        value=value,
        error=error,
        wavelength=centre,
        n=n,
        chi2=np.where(n > 1, chi2, np.nan),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class SmoothFlux:
    """A smooth curve through the points of one band.

    Attributes
    ----------
    value, error : (n,) float array
        At each point, the curve that the *other* points give, so that a point is not compared
        with itself, and its error. NaN where the other points do not determine it.
    degrees : float
        Effective number of parameters.
    """

    value: np.ndarray
    error: np.ndarray
    degrees: float


def fit_smooth_flux(
    wavelength: np.ndarray, flux: np.ndarray, flux_error: np.ndarray
) -> SmoothFlux | None:
    """Draw a smooth curve through points: a penalised cubic spline in the log of wavelength.

    The strength of the penalty is that of generalised cross-validation, and outlying points weigh
    less. With few points, the curve is as stiff as they demand, down to a straight line.

    Parameters
    ----------
    wavelength, flux, flux_error : (n,) float array
        Finite, with positive wavelengths and errors, in any order.

    Returns
    -------
    SmoothFlux or None
        None with fewer than 6 points, or without two different wavelengths.
    """
    n = len(flux)
    x = np.log(wavelength)
    if n < MIN_POINTS or np.ptp(x) < 1e-6:
        return None
    basis = _make_basis((x - x.min()) / np.ptp(x), min(MAX_INTERVALS, n // 2))
    rough = np.diff(np.eye(basis.shape[1]), 2, axis=0)
    penalty = rough.T @ rough
    robust, intrinsic = np.ones(n), np.zeros(n)
    for _ in range(ROUNDS):
        weight = robust / (flux_error**2 + intrinsic**2)
        inverse, degrees = _choose_curve(basis, weight, flux, penalty)
        curve = basis @ (inverse @ (basis.T @ (weight * flux)))
        pull = (flux - curve) / flux_error
        # A variable source scatters by more than its errors, which makes no point an outlier. By
        # the errors alone, which grow with the flux, its curve would be too low.
        spread = max(1.0, 1.4826 * float(np.median(np.abs(pull - np.median(pull)))))
        size = np.abs(curve)
        intrinsic = math.sqrt(spread**2 - 1.0) * size * _find_relative_error(flux_error, size)
        pull *= flux_error / np.hypot(flux_error, intrinsic)
        robust = np.minimum(1.0, OUTLIER / np.maximum(np.abs(pull), 1e-12)) ** 2
    # The value of the curve at a point is a weighted sum of all fluxes, with the part `leverage`
    # of its own; without it, the others' weights are larger by 1 / (1 - leverage).
    own = np.einsum("ni,ij,nj->n", basis, inverse, basis)
    leverage = own * weight
    scaled = basis * (weight * flux_error)[:, None]
    variance = np.einsum("ni,ni->n", basis @ (inverse @ (scaled.T @ scaled) @ inverse), basis)
    free = 1.0 - leverage
    is_free = leverage < MAX_LEVERAGE
    with np.errstate(invalid="ignore", divide="ignore"):
        value = (curve - leverage * flux) / free
        error = np.sqrt(np.maximum(variance - (leverage * flux_error) ** 2, 0.0)) / free
    return SmoothFlux(
        value=np.where(is_free, value, np.nan),
        error=np.where(is_free, error, np.nan),
        degrees=degrees,
    )


def _find_relative_error(flux_error: np.ndarray, size: np.ndarray) -> float:
    """Return the error of points that are as bright as the curve, as a part of it."""
    return float(np.median(flux_error)) / max(float(np.median(size)), 1e-300)


def _make_basis(place: np.ndarray, n_intervals: int) -> np.ndarray:
    """Return the (n, k) values of B-splines at places from 0 to 1."""
    step = 1.0 / n_intervals
    knots = np.arange(-DEGREE, n_intervals + DEGREE + 1) * step
    # Imported where it is needed: a worker that measures frames needs no scipy.
    from scipy.interpolate import BSpline

    return BSpline.design_matrix(np.clip(place, 0.0, 1.0 - 1e-12), knots, DEGREE).toarray()


def _choose_curve(
    basis: np.ndarray, weight: np.ndarray, flux: np.ndarray, penalty: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return the inverse of the normal matrix with the best penalty, and its degrees of freedom."""
    from scipy.linalg import LinAlgError, cho_factor, cho_solve

    normal = basis.T @ (basis * weight[:, None])
    right = basis.T @ (weight * flux)
    scale = np.trace(normal) / np.trace(penalty)
    # Splines that no point lies on are held by the penalty, and by this where that is weak.
    ridge = 1e-12 * np.trace(normal) / len(normal) * np.eye(len(normal))
    n = len(flux)
    best: tuple[float, np.ndarray, float] | None = None
    for strength in PENALTIES:
        try:
            factor = cho_factor(normal + strength * scale * penalty + ridge)
        except LinAlgError:
            continue
        inverse = cho_solve(factor, np.eye(len(normal)))
        degrees = float(np.sum(inverse * normal))
        free = n - GCV_FACTOR * degrees
        if free <= 0:
            continue
        residual = flux - basis @ (inverse @ right)
        score = float(np.sum(weight * residual**2)) / free**2
        if best is None or score < best[0]:
            best = score, inverse, degrees
    assert best is not None, "the stiffest curve has two degrees of freedom"
    return best[1], best[2]


def sum_differences(
    source: np.ndarray,
    band: np.ndarray,
    wavelength: np.ndarray,
    flux: np.ndarray,
    flux_error: np.ndarray,
    n_sources: int,
    channels: Channels,
) -> tuple[np.ndarray, np.ndarray]:
    """Test whether sources are constant at fixed wavelength.

    Points are compared with the mean of their channel. As a spectrum may be steep within it, a
    cubic polynomial through the points of a band is taken out first, and then the parabola
    through the mean of the channel and those of the two beside it.

    Parameters
    ----------
    source : (n,) int array
        Source of each point, from 0.
    band : (n,) int array
        0 for D1 to 5 for D6.
    wavelength, flux, flux_error : (n,) float array
        Finite, errors positive.
    n_sources : int
        Number of sources.
    channels : Channels
        Wavelengths within one of which count as the same.

    Returns
    -------
    chi2 : (n_sources,) float array
        Sum of the squared differences in units of their errors; NaN without a degree of freedom.
    dof : (n_sources,) int array
        Number of points less that of the channels they are in.
    """
    width = len(channels)
    place = channels.assign(band, wavelength)
    is_in = place >= 0
    bins = source[is_in] * width + place[is_in]
    wavelength, flux = wavelength[is_in], flux[is_in]
    weight = flux_error[is_in] ** -2.0
    n_bands = int(channels.band.max()) + 1
    flux = flux - _fit_trends(
        source[is_in] * n_bands + band[is_in], wavelength, flux, weight, n_sources * n_bands
    )
    size = n_sources * width
    mean = average_in_bins(bins, wavelength, flux, flux_error[is_in], size)
    # Differences from the means on either side, NaN at the end of a band or beside an empty bin.
    centre = mean.wavelength.reshape(n_sources, width)
    value = mean.value.reshape(n_sources, width)
    is_same_band = np.diff(channels.band) == 0
    step = np.where(is_same_band, np.diff(centre, axis=1), np.nan)
    rise = np.diff(value, axis=1) / step
    left, right = np.full_like(centre, np.nan), np.full_like(centre, np.nan)
    left[:, 1:], right[:, :-1] = rise, rise
    before, after = np.full_like(centre, np.nan), np.full_like(centre, np.nan)
    before[:, 1:], after[:, :-1] = step, step
    curvature = np.nan_to_num((right - left) / (before + after))
    slope = np.where(np.isnan(left), right, left + curvature * before)
    slope = np.where(np.isnan(left) | np.isnan(right), np.where(np.isnan(left), right, left), slope)
    slope, curvature = np.nan_to_num(slope).ravel(), curvature.ravel()
    offset = wavelength - mean.wavelength[bins]
    shape = slope[bins] * offset + curvature[bins] * offset**2
    total = np.bincount(bins, weight, size)
    with np.errstate(invalid="ignore", divide="ignore"):
        level = np.bincount(bins, weight * shape, size) / total
    pull2 = weight * (flux - mean.value[bins] - shape + level[bins]) ** 2
    owner = bins // width
    n_points = np.bincount(owner, minlength=n_sources)
    n_bins = (mean.n.reshape(n_sources, width) > 0).sum(axis=1)
    dof = n_points - n_bins
    return np.where(dof > 0, np.bincount(owner, pull2, n_sources), np.nan), dof


def _fit_trends(
    group: np.ndarray, wavelength: np.ndarray, flux: np.ndarray, weight: np.ndarray, n_groups: int
) -> np.ndarray:
    """Return a cubic polynomial through the points of each group; 0 for those with few points."""
    counts = np.bincount(group, minlength=n_groups)
    x = np.log(wavelength)
    low, high = np.full(n_groups, np.inf), np.full(n_groups, -np.inf)
    np.minimum.at(low, group, x)
    np.maximum.at(high, group, x)
    span = high - low
    is_fitted = (counts >= MIN_FOR_TREND) & (span > 0)
    used = is_fitted[group]
    mine = group[used]
    place = 2 * (x[used] - low[mine]) / span[mine] - 1
    powers = np.polynomial.legendre.legvander(place, DEGREE)
    number = np.cumsum(is_fitted) - 1
    n_fitted = int(is_fitted.sum())
    if not n_fitted:
        return np.zeros(len(flux))
    normal = np.empty((n_fitted, DEGREE + 1, DEGREE + 1))
    right = np.empty((n_fitted, DEGREE + 1))
    for i in range(DEGREE + 1):
        right[:, i] = np.bincount(number[mine], weight[used] * powers[:, i] * flux[used], n_fitted)
        for j in range(i, DEGREE + 1):
            products = weight[used] * powers[:, i] * powers[:, j]
            normal[:, i, j] = normal[:, j, i] = np.bincount(number[mine], products, n_fitted)
    # Where points share few wavelengths, the polynomial is not determined by them alone.
    normal += 1e-9 * np.einsum("gii->g", normal)[:, None, None] * np.eye(DEGREE + 1)
    factors = np.linalg.solve(normal, right[..., None])[..., 0]
    trend = np.zeros(len(flux))
    trend[used] = np.einsum("ni,ni->n", powers, factors[number[mine]])
    return trend
