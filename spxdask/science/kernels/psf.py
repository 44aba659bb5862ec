"""The PSF of a source on the pixels around it, from the coefficients of a spline.

A model is a tensor product of uniform B-splines for each zone of the detector. With a whole
number of samples a pixel, all pixels of a source have the same weights, only at other samples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from spxdask.science.compiled import compiled, compiled_helper
from spxdask.science.kernels.aperture import SMALLEST_FRACTION, fill_fractions
from spxdask.science.kernels.pixels import is_finite, read_real

# B-splines of degree 2 and 3 are not zero at this many knots, or fewer.
TAPS = 4
# Zeros around the coefficients of a cube, so that no index exceeds the array.
PADDING = 4
# Straight lines between samples widen a PSF by 1/6 of a sample squared along each axis. The
# filter (-w, 1 + 2 w, -w) takes 2 w off.
SHARPENING = 1.0 / 12.0


class Psf(NamedTuple):
    """A PSF model as arrays, for the compiled functions.

    Attributes
    ----------
    coefficients : (zones, m, m) float array
        Of the spline, [y, x]; its values are shares of the flux in a pixel.
    core : (zones, 2) float array
        Where the source is, relative to the centre of the samples (x, y), pixels.
    origin : float
        Place of the first coefficient relative to the centre, samples.
    limit : float
        Farther from the centre along an axis, the PSF is zero, samples.
    oversampling : int
        Samples a pixel.
    degree : int
        Of the spline, 2 or 3.
    size : int
        Rows and columns of a stamp, odd.
    """

    coefficients: np.ndarray
    core: np.ndarray
    origin: float
    limit: float
    oversampling: int
    degree: int
    size: int


@compiled_helper
def _fill_weights(degree: int, position: float, weights: np.ndarray) -> int:
    """Fill in the weights of the `TAPS` coefficients at a position, and return the first."""
    if degree == 2:
        first = math.floor(position + 0.5)
        f = position + 0.5 - first
        weights[0] = 0.5 * (1.0 - f) * (1.0 - f)
        weights[1] = 0.5 + f * (1.0 - f)
        weights[2] = 0.5 * f * f
        weights[3] = 0.0
        return first - 1
    first = math.floor(position)
    f = position - first
    g = 1.0 - f
    weights[0] = g * g * g / 6.0
    weights[1] = (4.0 - 6.0 * f * f + 3.0 * f * f * f) / 6.0
    weights[2] = (4.0 - 6.0 * g * g + 3.0 * g * g * g) / 6.0
    weights[3] = f * f * f / 6.0
    return first - 1


@compiled_helper
def _find_corner(position: float, size: int) -> int:
    """Return the first pixel of a stamp along an axis."""
    return math.floor(position + 0.5) - size // 2


@compiled_helper
def _find_span(psf: Psf, start: float) -> tuple[int, int]:
    """Return the first pixel within the support, and the first beyond it.

    `start` is the place of the stamp's first pixel relative to the centre, samples.
    """
    step = psf.oversampling
    low = max(math.ceil((-psf.limit - start) / step), 0)
    high = min(math.floor((psf.limit - start) / step) + 1, psf.size)
    return low, high


@compiled_helper
def _add_zone(
    psf: Psf,
    zone: int,
    share: float,
    x: float,
    y: float,
    corner: np.ndarray,
    weights: np.ndarray,
    stamp: np.ndarray,
) -> None:
    """Add the PSF of one zone, times its share, to the stamp of a source."""
    step = psf.oversampling
    start_x = (corner[1] - x + psf.core[zone, 0]) * step
    start_y = (corner[0] - y + psf.core[zone, 1]) * step
    left, right = _find_span(psf, start_x)
    low, high = _find_span(psf, start_y)
    if right <= left or high <= low:
        return
    first_x = _fill_weights(psf.degree, start_x - psf.origin + left * step, weights[0])
    first_y = _fill_weights(psf.degree, start_y - psf.origin + low * step, weights[1])
    coefficients = psf.coefficients[zone]
    for row in range(low, high):
        at = first_y + (row - low) * step
        for column in range(left, right):
            k = first_x + (column - left) * step
            total = 0.0
            for j in range(TAPS):
                total += weights[1, j] * (
                    weights[0, 0] * coefficients[at + j, k]
                    + weights[0, 1] * coefficients[at + j, k + 1]
                    + weights[0, 2] * coefficients[at + j, k + 2]
                    + weights[0, 3] * coefficients[at + j, k + 3]
                )
            stamp[row, column] += share * total


@compiled_helper
def add_psf(
    psf: Psf,
    zones: np.ndarray,
    shares: np.ndarray,
    x: float,
    y: float,
    corner: np.ndarray,
    weights: np.ndarray,
    stamp: np.ndarray,
) -> None:
    """Add the PSF of a source to a stamp, which may be that of another place nearby.

    Parameters
    ----------
    psf : Psf
        The model.
    zones : (k,) int array
        The zones of the source.
    shares : (k,) float array
        The factor of each of these.
    x, y : float
        0-based pixel position.
    corner : (2,) int array
        Row and column of the first pixel of the stamp.
    weights : (2, TAPS) float array
        Memory to work in.
    stamp : (size, size) float array
        Shares of the flux are added to it.
    """
    for k in range(len(zones)):
        if shares[k] != 0.0:
            _add_zone(psf, zones[k], shares[k], x, y, corner, weights, stamp)


@compiled
def render_stamps(
    psf: Psf, zones: np.ndarray, shares: np.ndarray, x: np.ndarray, y: np.ndarray, r: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the PSF of every source on the pixels around it, and its share in a circle.

    Parameters
    ----------
    psf : Psf
        The model.
    zones : (n, k) int array
        The zones of each source.
    shares : (n, k) float array
        The factor of each of these.
    x, y : (n,) float array
        0-based pixel positions.
    r : float
        Radius of the circle, pixels.

    Returns
    -------
    stamps : (n, size, size) float array
        Shares of the flux.
    corners : (n, 2) int array
        Row and column of the first pixel of each stamp.
    enclosed : (n,) float array
        Share of the flux within the circle, with exact fractions of the pixels.
    """
    n, size = len(x), psf.size
    stamps = np.zeros((n, size, size))
    corners = np.empty((n, 2), np.int64)
    enclosed = np.zeros(n)
    weights = np.empty((2, TAPS))
    edges, fractions = np.empty((5, size + 1)), np.empty((size, size))
    for i in range(n):
        corners[i, 0], corners[i, 1] = _find_corner(y[i], size), _find_corner(x[i], size)
        add_psf(psf, zones[i], shares[i], x[i], y[i], corners[i], weights, stamps[i])
        fill_fractions(corners[i, 0], corners[i, 1], size, size, x[i], y[i], r, edges, fractions)
        for row in range(size):
            for column in range(size):
                if fractions[row, column] > SMALLEST_FRACTION:
                    enclosed[i] += fractions[row, column] * stamps[i, row, column]
    return stamps, corners, enclosed


@compiled_helper
def _find_core(samples: np.ndarray, step: int) -> tuple[float, float]:
    """Return the place (x, y) of the maximum within half a pixel of the centre, pixels."""
    centre = samples.shape[0] // 2
    near = min(step // 2, centre - 1)
    top, left = centre, centre
    for row in range(centre - near, centre + near + 1):
        for column in range(centre - near, centre + near + 1):
            if samples[row, column] > samples[top, left]:
                top, left = row, column
    here = samples[top, left]
    dx = _find_vertex(samples[top, left - 1], here, samples[top, left + 1])
    dy = _find_vertex(samples[top - 1, left], here, samples[top + 1, left])
    return (left - centre + dx) / step, (top - centre + dy) / step


@compiled_helper
def _find_vertex(before: float, here: float, after: float) -> float:
    """Return where three equidistant values have their maximum, as a Gaussian has."""
    if not (before > 0.0 and after > 0.0 and here >= before and here >= after):
        return 0.0
    before, here, after = math.log(before), math.log(here), math.log(after)
    curvature = before - 2.0 * here + after
    return 0.5 * (before - after) / curvature if curvature < 0.0 else 0.0


@compiled_helper
def _sum_running(samples: np.ndarray, m: int, step: int, factor: float, sums: np.ndarray) -> None:
    """Fill in the sums of `step` consecutive samples, sharpened and times a factor.

    The sum that ends with the first sample is at `PADDING` + 1.
    """
    sums.fill(0.0)
    before = here = 0.0
    for j in range(m + step + 1):
        after = here
        if j < m:
            after += samples[j]
        if j >= step:
            after -= samples[j - step] if j - step < m else 0.0
        # The sums before, here and after are those of three consecutive places.
        sums[PADDING + j] = factor * (here - SHARPENING * (before - 2.0 * here + after))
        before, here = here, after


@compiled
def prepare_cube(
    words: np.ndarray, planes: np.ndarray, oversampling: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the coefficients of zones of an optical PSF, integrated over native pixels.

    From edge to edge of a pixel, samples are summed, with half weights of those at the edges.
    Quadratic B-splines whose coefficients are sums of `oversampling` consecutive samples are
    that at phases for which the edges are samples, and go smoothly through all others: they
    are the integral of straight lines between samples. These make the PSF wider, which the
    next term of the Euler-Maclaurin formula corrects.

    Parameters
    ----------
    words : (zones, m, m) uint32 array
        Float32 samples as they are in the file, [y, x], m odd.
    planes : (k,) int array
        Which zones.
    oversampling : int
        Samples a pixel.

    Returns
    -------
    coefficients : (k, m', m') float array
        As in `Psf`, for degree 2, with m' = m + oversampling + 1 + 2 `PADDING`. Those of a
        zone without light, or with samples that are not finite, are NaN.
    core : (k, 2) float array
        Place of the brightest point relative to the central sample (x, y), pixels.
    """
    m, step = words.shape[1], oversampling
    wide = m + step + 1 + 2 * PADDING
    coefficients = np.zeros((len(planes), wide, wide))
    core = np.zeros((len(planes), 2))
    samples = np.empty((m, m))
    half = np.zeros((m, wide))
    for i in range(len(planes)):
        plane = words[planes[i]]
        total = 0.0
        for row in range(m):
            for column in range(m):
                samples[row, column] = read_real(plane[row, column])
                total += samples[row, column]
        if not (total > 0.0 and is_finite(total)):
            coefficients[i].fill(math.nan)
            continue
        core[i, 0], core[i, 1] = _find_core(samples, step)
        for row in range(m):
            _sum_running(samples[row], m, step, 1.0 / total, half[row])
        for column in range(wide):
            _sum_running(half[:, column], m, step, 1.0, coefficients[i, :, column])
    return coefficients, core
