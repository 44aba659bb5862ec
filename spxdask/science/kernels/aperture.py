"""Sums over a circle in which each pixel has the exact fraction of its area inside as weight."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy import uint32

from spxdask.science.compiled import compiled_helper, compiled_inline
from spxdask.science.kernels.pixels import (
    Conversion,
    Planes,
    is_finite,
    read_brightness,
    read_real,
    read_variance,
    swap_word,
)

# A pixel outside of the circle can have a fraction up to this, because of rounding of areas that
# grow with the square of the radius.
SMALLEST_FRACTION = 1e-11


@compiled_helper
def _prepare_edges(
    first: int, count: int, centre: float, r: float, position: np.ndarray, arc: np.ndarray
) -> None:
    """Prepare `_corner_area` for the edges of pixels along one axis.

    `position` is filled with the distances from the centre to the edges `first` - 0.5,
    `first` + 0.5 and so on, clipped to -r and r. `arc` is filled with the areas between the
    axis and the circle from the centre to these edges.
    """
    for k in range(count):
        t = min(max(first - 0.5 + k - centre, -r), r)
        position[k] = t
        t = abs(t)
        arc[k] = 0.5 * (t * math.sqrt(max(r * r - t * t, 0.0)) + r * r * math.asin(t / r))


@compiled_inline
def _corner_area(x: float, x_arc: float, y: float, y_arc: float, r: float) -> float:
    """Return the area of a disc about the origin within [0, x] x [0, y], with the sign of x y."""
    if x * x + y * y <= r * r:
        return x * y
    # The strips up to x and up to y together cover the quarter disc, and overlap in the area
    # that is wanted, so that it is the sum of the two strips minus the quarter disc.
    return math.copysign(x_arc + y_arc - 0.25 * math.pi * r * r, x * y)


@compiled_helper
def make_aperture_buffers(ny: int, nx: int, r: float) -> Any:
    """Allocate the working memory of `sum_aperture`.

    Parameters
    ----------
    ny, nx : int
        Size of the frame, pixels.
    r : float
        Radius of the circles, pixels.

    Returns
    -------
    edges : (5, n + 1) float array
        For the edges of up to n pixels along an axis.
    values : (3, n, n) float array
        For the brightness, variance and fraction of n x n pixels.
    masks : (n, n) uint32 array
        For their flags.
    """
    n = min(int(2.0 * r), max(ny, nx)) + 3
    return np.empty((5, n + 1)), np.empty((3, n, n)), np.empty((n, n), np.uint32)


@compiled_helper
def fill_fractions(
    first_row: int,
    first_column: int,
    rows: int,
    columns: int,
    x: float,
    y: float,
    r: float,
    edges: np.ndarray,
    fractions: np.ndarray,
) -> None:
    """Compute which fraction of each pixel of a rectangle lies in a circle.

    Parameters
    ----------
    first_row, first_column : int
        First pixel of the rectangle.
    rows, columns : int
        Its size.
    x, y : float
        Centre of the circle, 0-based pixels.
    r : float
        Radius, pixels.
    edges : (5, n + 1) float array
        Working memory; n is at least the larger side.
    fractions : (n, n) float array
        Filled in; a pixel outside can have up to `SMALLEST_FRACTION`, because of rounding.
    """
    xs, x_arcs, ys, y_arcs, corners = edges
    _prepare_edges(first_column, columns + 1, x, r, xs, x_arcs)
    _prepare_edges(first_row, rows + 1, y, r, ys, y_arcs)
    for k in range(columns + 1):
        corners[k] = _corner_area(xs[k], x_arcs[k], ys[0], y_arcs[0], r)
    for j in range(rows):
        left = corners[0]
        corners[0] = _corner_area(xs[0], x_arcs[0], ys[j + 1], y_arcs[j + 1], r)
        for k in range(columns):
            below = corners[k + 1]
            corners[k + 1] = _corner_area(xs[k + 1], x_arcs[k + 1], ys[j + 1], y_arcs[j + 1], r)
            fractions[j, k] = corners[k + 1] - corners[k] - below + left
            left = below


@compiled_helper
def sum_aperture(
    planes: Planes, conversion: Conversion, x: float, y: float, r: float, buffers: Any
) -> tuple[float, float, uint32, bool]:
    """Sum brightness and variance over a circle, with exact fractions of the pixels.

    Parameters
    ----------
    planes : Planes
        The frame.
    conversion : Conversion
        From pixels of the planes to brightness and variance.
    x, y : float
        Centre of the circle, 0-based pixels.
    r : float
        Radius, pixels.
    buffers : tuple of array
        From `make_aperture_buffers`.

    Returns
    -------
    total : float
        Sum of brightness, in result units; NaN if a pixel inside is not finite, or if the
        circle extends beyond the frame.
    total_variance : float
        Sum of variance, in result units squared; NaN under the same conditions.
    flag_or : uint32
        All flags of the pixels whose centres lie in the circle.
    repaired : bool
        Whether the median variance replaced an invalid one.
    """
    image, variance, zodi, flags, factors = planes
    scale, unit, median_variance = conversion
    edges, (values, variances, fractions), masks = buffers
    ny, nx = image.shape
    low_column, high_column = max(math.floor(x - r + 0.5), 0), min(math.ceil(x + r - 0.5), nx - 1)
    low_row, high_row = max(math.floor(y - r + 0.5), 0), min(math.ceil(y + r - 0.5), ny - 1)
    rows, columns = high_row - low_row + 1, high_column - low_column + 1
    # Pixels are copied first, so that the processor waits for several rows of memory at once.
    for j in range(rows):
        for k in range(columns):
            pixel = low_row + j, low_column + k
            brightness = read_brightness(image, factors, pixel)
            values[j, k] = brightness - scale * read_real(zodi[pixel])
            variances[j, k] = read_variance(variance, factors, pixel)
            masks[j, k] = swap_word(flags[pixel])
    fill_fractions(low_row, low_column, rows, columns, x, y, r, edges, fractions)
    total = total_variance = 0.0
    flag_or = uint32(0)
    repaired = False
    for j in range(rows):
        for k in range(columns):
            fraction = fractions[j, k]
            flag = masks[j, k]
            dx, dy = low_column + k - x, low_row + j - y
            if dx * dx + dy * dy <= r * r:
                flag_or |= flag
            # A pixel outside may be NaN, which would make the sum NaN even with weight zero.
            if fraction <= SMALLEST_FRACTION:
                continue
            v = variances[j, k]
            if not (v > 0.0 and v < math.inf):
                v = median_variance if flag else math.nan
                repaired = repaired or flag != 0
            total += fraction * (values[j, k] * unit)
            total_variance += fraction * (v * unit * unit)
    outside = x - r < -0.5 or y - r < -0.5 or x + r > nx - 0.5 or y + r > ny - 0.5
    if outside or not (is_finite(total) and is_finite(total_variance)):
        total = total_variance = math.nan
    return total, total_variance, flag_or, repaired
