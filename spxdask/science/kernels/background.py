"""The pixels about a source that its background is taken from."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy import uint32

from spxdask.science.compiled import compiled_helper, compiled_inline
from spxdask.science.kernels.pixels import Conversion, Planes, is_finite, read_real, swap_word
from spxdask.science.kernels.statistics import LANES


class Masks(NamedTuple):
    """Which pixels are of no use for a background.

    Attributes
    ----------
    bad : uint32
        Bits that exclude a pixel.
    source : uint32
        The SOURCE bit, which excludes a pixel while there are enough without it.
    check_variance : bool
        Whether the frame has unflagged pixels with an invalid variance, which are excluded.
    """

    bad: uint32
    source: uint32
    check_variance: bool


class Region(NamedTuple):
    """Where the background of a source is taken from: a rectangle, a ring, or both.

    Attributes
    ----------
    height, width : float
        Size of the rectangle about the source, pixels.
    beyond_squared : float
        Pixels must be farther than this from the source, squared, pixels^2.
    outer_radius : float
        Pixels must be nearer than this, infinite for a mere rectangle.
    max_outer_radius : float
        The outer radius grows no farther than this.
    growth : float
        What is added to the outer radius while there are too few usable pixels.
    max_growths : int
        How often that is done.
    min_pixels : int
        Usable pixels that a background needs.
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
    """Put the brightness of the pixels of a box into `values`, and NaN for unusable ones.

    Usable are pixels with none of the excluded bits, a finite value and beyond <
    distance^2 < within; with `check_variance`, unflagged ones also need a valid variance.
    Returns the size filled, a multiple of `LANES`, and how many pixels are usable.
    """
    image, variance, zodi, flags = planes
    scale, unit, _ = conversion
    first_row, last_row, first_column, last_column = box
    columns = last_column - first_column + 1
    size = count = 0
    for row in range(first_row, last_row + 1):
        # Rows are cut out first: from zero on, the compiler knows that no index is negative.
        image_row = image[row, first_column : last_column + 1]
        zodi_row = zodi[row, first_column : last_column + 1]
        flags_row = flags[row, first_column : last_column + 1]
        into = values[size : size + columns]
        dy2 = (row - y) ** 2
        dx = first_column - x
        for k in range(columns):
            d2 = (dx + k) ** 2 + dy2
            value = read_real(image_row[k]) - scale * read_real(zodi_row[k])
            use = (d2 > beyond) & (d2 < within) & ((swap_word(flags_row[k]) & excluded) == 0)
            use &= is_finite(value)
            count += use
            into[k] = value * unit if use else math.nan
        if check_variance:
            for k in range(columns):
                v = read_real(variance[row, first_column + k])
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
    """Gather the usable pixels of a region about a source.

    While there are fewer than needed, the region grows as far as it may; then pixels with
    the SOURCE bit are used, too. Returns the size of `values` that is filled, and how many
    of these are usable; the others are NaN.
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
