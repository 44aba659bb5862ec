"""Sums for the fit of the zodiacal light model, from one pass over the four planes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy import uint32

from spxdask.science.compiled import compiled, compiled_helper
from spxdask.science.kernels.pixels import (
    Planes,
    is_finite,
    read_brightness,
    read_real,
    slice_factors,
    swap_word,
)
from spxdask.science.kernels.statistics import Bracket, count_values

# Number of partial sums that are added to in parallel.
LANES = 128


class ZodiSums(NamedTuple):
    """Sums for the weighted fit of ZODI to IMAGE.

    Attributes
    ----------
    weighted_iz, weighted_zz : float
        Sums of I Z / variance and Z^2 / variance over usable pixels.
    iz, zz : float
        Sums of I Z and Z^2 over usable pixels that are flagged and have an invalid variance.
        The median variance of the frame is used for them.
    clear : float
        Number of pixels with none of the excluded bits.
    unflagged : float
        Number of pixels with an invalid variance and no flag.
    finite, valid : float
        1 if any pixel of IMAGE is finite, and if any variance is valid, else 0.
    """

    weighted_iz: float
    weighted_zz: float
    iz: float
    zz: float
    clear: float
    unflagged: float
    finite: float
    valid: float


@compiled
def sum_zodi(planes: Planes, excluded: uint32, groups: np.ndarray, bracket: Bracket) -> np.ndarray:
    """Compute the sums for the weighted fit of ZODI to IMAGE, for each of some groups of rows.

    Values around the median variance are picked in the same pass, as most frames need it.

    Parameters
    ----------
    planes : Planes
        The frame.
    excluded : uint32
        The bad bits and the SOURCE bit.
    groups : (n, m) int array
        The rows of each group.
    bracket : Bracket
        Gets the variances of all these rows.

    Returns
    -------
    (n, 8) float array
        The fields of `ZodiSums`, for each group. A pixel is usable if it is finite in IMAGE and
        ZODI and has none of the excluded bits.
    """
    found = np.empty((len(groups), 8))
    for k in range(len(groups)):
        sums = _sum_group(planes, excluded, groups[k], bracket)
        for i in range(8):
            found[k, i] = sums[i]
    return found


@compiled_helper
def _sum_group(
    planes: Planes, excluded: uint32, rows: np.ndarray, bracket: Bracket
) -> tuple[float, float, float, float, float, float, float, float]:
    """Return the fields of `ZodiSums` for some rows."""
    image, variance, zodi, flags, factors = planes
    nx = image.shape[1]
    clear = unflagged = 0
    finite = valid = False
    iz = zz = 0.0
    lanes = np.zeros(2 * LANES)
    scaled = np.empty(nx, np.uint32)
    for row in rows:
        # Without factors, the words of the file are on the flux scale of the results.
        variance_row = variance[row] if factors is None else scaled
        for start in range(0, nx, LANES):
            some_image = image[row, start : start + LANES]
            some_variance = variance[row, start : start + LANES]
            some_zodi = zodi[row, start : start + LANES]
            some_flags = flags[row, start : start + LANES]
            some_factors = slice_factors(factors, row, start, start + LANES)
            n, is_any_finite, is_any_valid, is_any_invalid = _add_block(
                some_image,
                some_variance,
                some_zodi,
                some_flags,
                some_factors,
                excluded,
                lanes,
                scaled[start : start + LANES],
            )
            clear += n
            finite |= is_any_finite
            valid |= is_any_valid
            if not is_any_invalid:
                continue
            # Few usable or unflagged pixels have an invalid variance, so a second pass is cheap.
            for k in range(len(some_image)):
                v = read_real(variance_row[start + k])
                if (v > 0.0) & (v < math.inf):
                    continue
                flag = swap_word(some_flags[k])
                i = read_brightness(some_image, some_factors, k)
                z = read_real(some_zodi[k])
                if flag == 0:
                    unflagged += 1
                elif (flag & excluded) == 0 and is_finite(i) and is_finite(z):
                    iz += i * z
                    zz += z * z
        count_values(variance_row, bracket)
    weighted_iz = weighted_zz = 0.0
    for lane in range(LANES):
        weighted_iz += lanes[lane]
        weighted_zz += lanes[LANES + lane]
    return (
        weighted_iz,
        weighted_zz,
        iz,
        zz,
        float(clear),
        float(unflagged),
        1.0 if finite else 0.0,
        1.0 if valid else 0.0,
    )


@compiled_helper
def _add_block(
    image: np.ndarray,
    variance: np.ndarray,
    zodi: np.ndarray,
    flags: np.ndarray,
    factors: Any,
    excluded: uint32,
    lanes: np.ndarray,
    scaled: np.ndarray,
) -> tuple[int, bool, bool, bool]:
    """Add a part of a row to the partial sums of I Z / variance and Z^2 / variance.

    With factors, its variances are put into `scaled`, words like those of a file. The numbers
    returned are those of the clear pixels, whether any pixel is finite, whether any variance is
    valid, and whether any of a usable or unflagged pixel is not.
    """
    # The loop has no branch and a partial sum for each lane, so that the compiler uses vector
    # instructions. The order of the additions, and so the result, does not depend on the length
    # of the vectors. Factors are applied here, as a loop of their own takes twice the time.
    clear = 0
    finite = valid = any_invalid = False
    for k in range(len(image)):
        flag = swap_word(flags[k])
        real_i = swap_word(image[k]).view(np.float32)
        real_v = swap_word(variance[k]).view(np.float32)
        if factors is not None:
            real_i = np.float32(real_i * factors[k])
            real_v = np.float32(real_v * (factors[k] * factors[k]))
            scaled[k] = swap_word(real_v.view(uint32))
        i: Any = np.float64(real_i)
        v: Any = np.float64(real_v)
        z = read_real(zodi[k])
        is_valid = (v > 0.0) & (v < math.inf)
        is_clear = (flag & excluded) == 0
        is_real = is_finite(i)
        use = is_clear & is_real & is_finite(z)
        clear += is_clear
        finite |= is_real
        valid |= is_valid
        any_invalid |= (not is_valid) & (use | (flag == 0))
        i, z = (i if use else 0.0), (z if use else 0.0)
        weighted = z / v if is_valid else 0.0
        lanes[k] += i * weighted
        lanes[LANES + k] += z * weighted
    return clear, finite, valid, any_invalid
