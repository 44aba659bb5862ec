"""Sums for the fit of the zodiacal light model, from one pass over the four planes."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy import uint32

from spxdask.science.compiled import compiled, compiled_helper
from spxdask.science.kernels.pixels import (
    Planes,
    is_finite,
    read_real,
    scale_both,
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
    # The loop has no branch and a partial sum for each lane, so that the compiler uses vector
    # instructions. The order of the additions, and so the result, does not depend on the length
    # of the vectors.
    izw, zzw = np.zeros(LANES), np.zeros(LANES)
    scaled = np.empty(nx, np.uint32), np.empty(nx, np.uint32)
    for row in rows:
        factors_row = slice_factors(factors, row, 0, nx)
        image_row, variance_row = scale_both(image[row], variance[row], factors_row, scaled)
        for start in range(0, nx, LANES):
            some_image = image_row[start : start + LANES]
            some_variance = variance_row[start : start + LANES]
            some_zodi = zodi[row, start : start + LANES]
            some_flags = flags[row, start : start + LANES]
            any_invalid = False
            for k in range(len(some_image)):
                flag = swap_word(some_flags[k])
                v = read_real(some_variance[k])
                i = read_real(some_image[k])
                z = read_real(some_zodi[k])
                is_valid = (v > 0.0) & (v < math.inf)
                is_clear = (flag & excluded) == 0
                is_real = is_finite(i)
                use = is_clear & is_real & is_finite(z)
                valid |= is_valid
                clear += is_clear
                finite |= is_real
                any_invalid |= (not is_valid) & (use | (flag == 0))
                i, z = (i if use else 0.0), (z if use else 0.0)
                weighted = z / v if is_valid else 0.0
                izw[k] += i * weighted
                zzw[k] += z * weighted
            if not any_invalid:
                continue
            # Few usable or unflagged pixels have an invalid variance, so a second pass is cheap.
            for k in range(len(some_image)):
                v = read_real(some_variance[k])
                if (v > 0.0) & (v < math.inf):
                    continue
                flag = swap_word(some_flags[k])
                i, z = read_real(some_image[k]), read_real(some_zodi[k])
                if flag == 0:
                    unflagged += 1
                elif (flag & excluded) == 0 and is_finite(i) and is_finite(z):
                    iz += i * z
                    zz += z * z
        count_values(variance_row, bracket)
    weighted_iz = weighted_zz = 0.0
    for lane in range(LANES):
        weighted_iz += izw[lane]
        weighted_zz += zzw[lane]
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
