"""Where the light of stars is, relative to where it was looked for.

The model of a star's pixels is the PSF at a place and what changes of it with this place, so that
an offset is a number of a linear fit, together with the flux. The fit is made again about the
place that it gives. As in the fit of fluxes, all usable pixels have the same weight.
"""

from __future__ import annotations

import math

import numpy as np

from spxdask.science.compiled import compiled, compiled_helper
from spxdask.science.kernels.pixels import is_finite
from spxdask.science.kernels.psf import TAPS, Psf, add_psf

# After this many fits, an offset of 0.2 pixels is right to 0.001, and one of 0.5 to 0.01.
FITS = 2
# The PSF is taken at places this far from each other along each axis, pixels.
STEP = 0.01
# A star that seems to be farther away than this is another one, pixels.
LARGEST_OFFSET = 1.0
# The other sources on the stamp of a star have together less than this part of its light.
MOST_LIGHT_OF_OTHERS = 0.05
# What the fit leaves is less than this many variances of the pixels, and this part of the PSF.
MOST_CHI2 = 3.0
MOST_MISFIT = 0.05


@compiled_helper
def _add_others(
    i: int, stamps: np.ndarray, corners: np.ndarray, flux: np.ndarray, light: np.ndarray
) -> float:
    """Fill in the light of all other sources on the stamp of one; return the sum of its size."""
    n, size = len(corners), stamps.shape[1]
    light.fill(0.0)
    first = i
    while first > 0 and corners[i, 0] - corners[first - 1, 0] < size:
        first -= 1
    total = 0.0
    for j in range(first, n):
        down, right = corners[j, 0] - corners[i, 0], corners[j, 1] - corners[i, 1]
        if down >= size:
            break
        if j == i or abs(right) >= size or not is_finite(flux[j]):
            continue
        for row in range(max(down, 0), min(size, size + down)):
            for column in range(max(right, 0), min(size, size + right)):
                one = flux[j] * stamps[j, row - down, column - right]
                light[row, column] += one
                total += abs(one)
    return total


@compiled_helper
def _invert(matrix: np.ndarray, inverse: np.ndarray) -> bool:
    """Fill in the inverse of a symmetric matrix of three rows; return whether it has one."""
    for i in range(3):
        j, k = (i + 1) % 3, (i + 2) % 3
        for p in range(3):
            q, r = (p + 1) % 3, (p + 2) % 3
            inverse[i, p] = matrix[j, q] * matrix[k, r] - matrix[j, r] * matrix[k, q]
    determinant = 0.0
    for i in range(3):
        determinant += matrix[0, i] * inverse[0, i]
    if not determinant > 0.0:
        return False
    for i in range(3):
        for j in range(3):
            inverse[i, j] /= determinant
    return True


@compiled
def measure_offsets(
    psf: Psf,
    zones: np.ndarray,
    shares: np.ndarray,
    tried: np.ndarray,
    most: int,
    values: np.ndarray,
    variances: np.ndarray,
    stamps: np.ndarray,
    corners: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    flux: np.ndarray,
    level: np.ndarray,
) -> np.ndarray:
    """Measure how far stars are from the places at which their fluxes were fitted.

    Parameters
    ----------
    psf : Psf
        The model.
    zones : (m, k) int array
        The zones of each star that is tried.
    shares : (m, k) float array
        The factor of each of these.
    tried : (m,) int array
        Which sources are tried, one after the other.
    most : int
        No more are tried when as many have been measured.
    values, variances : (n, size, size) float array
        Pixels of the stamps, as for `spxdask.science.kernels.psf_fit.fit_stamps`.
    stamps : (n, size, size) float array
        PSF of each source.
    corners : (n, 2) int array
        Row and column of the first pixel of each stamp, ordered by row.
    x, y : (n,) float array
        0-based pixel positions.
    flux : (n,) float array
        Brightness summed over the PSF; NaN for sources that took no part in the fit.
    level : (n,) float array
        Background of each source, in result units.

    Returns
    -------
    (m, 4) float array
        Offset along x and y, and their errors, pixels; NaN for those that are not alone, are not
        found, or are not like the PSF, and those that were not tried.
    """
    size = stamps.shape[1]
    found = np.full((len(tried), 4), math.nan)
    light, data = np.empty((size, size)), np.empty((size, size))
    # The PSF, and what changes of it with a step of the star along x, and along y.
    model = np.empty((3, size, size))
    weights = np.empty((2, TAPS))
    matrix, inverse, spread = np.empty((3, 3)), np.empty((3, 3)), np.empty((3, 3))
    right, solution = np.empty(3), np.empty(3)
    count = 0
    for t in range(len(tried)):
        if count >= most:
            break
        i = tried[t]
        if not _add_others(i, stamps, corners, flux, light) < MOST_LIGHT_OF_OTHERS * flux[i]:
            continue
        for row in range(size):
            for column in range(size):
                data[row, column] = values[i, row, column] - level[i] - light[row, column]
        dx = dy = 0.0
        is_found = True
        for number in range(FITS):
            first = 1 if number == 0 else 0
            if number == 0:
                # One by one, as a slice takes numba seconds to compile.
                for row in range(size):
                    for column in range(size):
                        model[0, row, column] = stamps[i, row, column]
            model[first:].fill(0.0)
            for k in range(first, 3):
                at_x, at_y = x[i] + dx + STEP * (k == 1), y[i] + dy + STEP * (k == 2)
                add_psf(psf, zones[t], shares[t], at_x, at_y, corners[i], weights, model[k])
            matrix.fill(0.0)
            spread.fill(0.0)
            right.fill(0.0)
            for row in range(size):
                for column in range(size):
                    model[1, row, column] -= model[0, row, column]
                    model[2, row, column] -= model[0, row, column]
                    v = variances[i, row, column]
                    if v <= 0.0:
                        continue
                    for a in range(3):
                        right[a] += model[a, row, column] * data[row, column]
                        for b in range(a + 1):
                            both = model[a, row, column] * model[b, row, column]
                            matrix[a, b] += both
                            spread[a, b] += both * v
            for a in range(3):
                for b in range(a):
                    matrix[b, a], spread[b, a] = matrix[a, b], spread[a, b]
            is_found = _invert(matrix, inverse)
            for a in range(3):
                solution[a] = 0.0
                for b in range(3):
                    solution[a] += inverse[a, b] * right[b]
            is_found &= solution[0] > 0.0
            if not is_found:
                break
            dx += STEP * solution[1] / solution[0]
            dy += STEP * solution[2] / solution[0]
            is_found = math.hypot(dx, dy) < LARGEST_OFFSET
            if not is_found:
                break
        if not is_found:
            continue
        left = noise = 0.0
        for row in range(size):
            for column in range(size):
                if variances[i, row, column] > 0.0:
                    residual = data[row, column]
                    for a in range(3):
                        residual -= solution[a] * model[a, row, column]
                    left += residual * residual
                    noise += variances[i, row, column]
        if not left < MOST_CHI2 * noise + (MOST_MISFIT * solution[0]) ** 2 * matrix[0, 0]:
            continue
        found[t, 0], found[t, 1] = dx, dy
        for a in range(1, 3):
            variance = 0.0
            for b in range(3):
                for c in range(3):
                    variance += inverse[a, b] * spread[b, c] * inverse[c, a]
            found[t, a + 1] = STEP * math.sqrt(variance) / solution[0]
        count += 1
    return found
