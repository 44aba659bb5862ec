"""Calibration products that have a value for every pixel of a detector."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["interpolate_map", "repair_factors"]

# A factor outside of these limits is wrong.
USABLE_FACTORS = (0.5, 2.0)


def interpolate_map(plane: np.ndarray, x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """Interpolate a map bilinearly, reading no more than four of its pixels a source.

    Parameters
    ----------
    plane : (ny, nx) float array
        In any byte order; it may be mapped from a file.
    x, y : (n,) float array
        0-based pixels of the full frame, the centre of the first pixel being (0, 0).

    Returns
    -------
    (n,) float array
        NaN where one of the four pixels is; extrapolated in the outer halves of the outermost
        pixels.

    Raises
    ------
    ValueError
        If the map has fewer than 2 x 2 pixels.
    """
    ny, nx = plane.shape
    if ny < 2 or nx < 2:
        raise ValueError(f"a map needs 2 x 2 pixels, got {ny} x {nx}")
    x, y = np.asarray(x, float), np.asarray(y, float)
    column = np.clip(np.nan_to_num(x), 0, nx - 2).astype(np.intp)
    row = np.clip(np.nan_to_num(y), 0, ny - 2).astype(np.intp)
    fx, fy = x - column, y - row
    # Doubles, as the values of a map that is big-endian cannot be computed with in place.
    corners = (
        np.asarray(plane[row + down, column + right], float) for down in (0, 1) for right in (0, 1)
    )
    low_left, low_right, high_left, high_right = corners
    low = (1 - fx) * low_left + fx * low_right
    high = (1 - fx) * high_left + fx * high_right
    return (1 - fy) * low + fy * high


def repair_factors(factors: np.ndarray) -> np.ndarray:
    """Replace wrong factors of a flux correction by the median of the good ones of their row.

    Parameters
    ----------
    factors : (ny, nx) float array
        Any rows of the product, in any byte order.

    Returns
    -------
    (ny, nx) float32 array
        A copy in the byte order of the machine. Factors outside of 0.5 to 2 and those that
        are not finite are replaced; in rows without a good one, by the median of all good ones.

    Raises
    ------
    ValueError
        If no factor is good.
    """
    factors = np.array(factors, np.float32)
    low, high = USABLE_FACTORS
    is_good = (factors >= low) & (factors <= high)
    for row in np.flatnonzero(~is_good.all(axis=1)):
        good = is_good[row]
        if good.any():
            factors[row, ~good] = np.median(factors[row, good])
    hopeless = ~is_good.any(axis=1)
    if hopeless.any():
        if not is_good.any():
            raise ValueError(f"no factor of the flux correction is within {low} to {high}")
        factors[hopeless] = np.median(factors[is_good])
    return factors
