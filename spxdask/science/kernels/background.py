"""Selection of the pixels around a source from which its background is estimated."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
    slice_factors,
    swap_word,
)
from spxdask.science.kernels.statistics import LANES


class Masks(NamedTuple):
    """Which pixels are excluded from a background.

    Attributes
    ----------
    bad : uint32
        Bits that exclude a pixel.
    source : uint32
        The SOURCE bit, which excludes a pixel if enough pixels without it remain.
    check_variance : bool
        Whether the frame has unflagged pixels with an invalid variance, which are excluded.
    """

    bad: uint32
    source: uint32
    check_variance: bool


class Region(NamedTuple):
    """Region of the background of a source: a rectangle, a ring, or their intersection.

    Attributes
    ----------
    height, width : float
        Size of the rectangle around the source, pixels.
    beyond_squared : float
        Square of the inner radius of the ring, pixels^2.
    outer_radius : float
        Outer radius of the ring, pixels; infinite if the region is the rectangle alone.
    max_outer_radius : float
        Limit to which the outer radius may grow, pixels.
    growth : float
        Added to the outer radius each time that there are too few usable pixels, pixels.
    max_growths : int
        How many times the outer radius may grow.
    min_pixels : int
        Number of usable pixels that a background needs.
    """

    height: float
    width: float
    beyond_squared: float
    outer_radius: float
    max_outer_radius: float
    growth: float
    max_growths: int
    min_pixels: int


@compiled_inline
def _bound_box(
    ny: int, nx: int, y: float, x: float, half_height: float, half_width: float
) -> tuple[int, int, int, int]:
    """Return first and last row, first and last column of a rectangle, within the frame."""
    return (
        max(math.floor(y - half_height), 0),
        min(math.ceil(y + half_height) - 1, ny - 1),
        max(math.floor(x - half_width), 0),
        min(math.ceil(x + half_width) - 1, nx - 1),
    )


@compiled_helper
def _gather_ring(
    planes: Planes,
    conversion: Conversion,
    x: float,
    y: float,
    beyond: float,
    within: float,
    box: Any,
    excluded: uint32,
    check_variance: bool,
    values: np.ndarray,
) -> tuple[int, int]:
    """Fill `values` with the brightness of the pixels of a box, and NaN for unusable pixels.

    A pixel is usable if it has none of the excluded bits, is finite, and lies where beyond <
    distance^2 < within; with `check_variance`, unflagged pixels also need a valid variance.
    Returns the size filled, which is a multiple of `LANES`, and the number of usable pixels.
    """
    image, variance, zodi, flags, factors = planes
    scale, unit, _ = conversion
    first_row, last_row, first_column, last_column = box
    columns = last_column - first_column + 1
    size = count = 0
    for row in range(first_row, last_row + 1):
        # With slices that start at 0, the compiler knows that no index is negative.
        image_row = image[row, first_column : last_column + 1]
        zodi_row = zodi[row, first_column : last_column + 1]
        flags_row = flags[row, first_column : last_column + 1]
        factors_row = slice_factors(factors, row, first_column, last_column + 1)
        into = values[size : size + columns]
        dy2 = (row - y) ** 2
        dx = first_column - x
        for k in range(columns):
            d2 = (dx + k) ** 2 + dy2
            value = read_brightness(image_row, factors_row, k) - scale * read_real(zodi_row[k])
            use = (d2 > beyond) & (d2 < within) & ((swap_word(flags_row[k]) & excluded) == 0)
            use &= is_finite(value)
            count += use
            into[k] = value * unit if use else math.nan
        if check_variance:
            for k in range(columns):
                v = read_variance(variance, factors, (row, first_column + k))
                if flags_row[k] == 0 and not (v > 0.0 and v < math.inf):
                    count -= is_finite(into[k])
                    into[k] = math.nan
        size += columns
    while size % LANES:
        values[size] = math.nan
        size += 1
    return size, count


@compiled_helper
def gather_background(
    planes: Planes,
    conversion: Conversion,
    masks: Masks,
    region: Region,
    x: float,
    y: float,
    values: np.ndarray,
) -> tuple[int, int]:
    """Gather the usable pixels of a region around a source.

    While there are fewer than needed, the ring grows up to its limits; after that, pixels
    with the SOURCE bit are used, too.

    Parameters
    ----------
    planes : Planes
        The frame.
    conversion : Conversion
        From pixels of the planes to brightness.
    masks : Masks
        Pixels that are excluded.
    region : Region
        Region around the source.
    x, y : float
        Position of the source, 0-based pixels.
    values : (n,) float array
        Filled with brightness in result units, and NaN for pixels that are not usable.

    Returns
    -------
    size : int
        Number of values filled, a multiple of `LANES`.
    count : int
        How many of them are usable.
    """
    ny, nx = planes.image.shape
    box = _bound_box(ny, nx, y, x, 0.5 * region.height, 0.5 * region.width)
    outer = region.outer_radius
    growths_left = region.max_growths
    excluded = masks.bad | masks.source
    while True:
        size, count = _gather_ring(
            planes, conversion, x, y, region.beyond_squared, outer * outer, box,
            excluded, masks.check_variance, values,
        )  # fmt: skip
        if count >= region.min_pixels or excluded == masks.bad:
            return size, count
        if growths_left > 0 and outer < region.max_outer_radius:
            growths_left -= 1
            outer = min(outer + region.growth, region.max_outer_radius)
        else:
            excluded = masks.bad
