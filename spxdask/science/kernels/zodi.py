"""The sums behind the fit of the zodiacal light model, one pass of four planes."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy import uint32

from spxdask.science.compiled import compiled
from spxdask.science.kernels.pixels import Planes, is_finite, read_real, swap_word

# Sums that run side by side.
LANES = 128


class ZodiSums(NamedTuple):
    """The sums behind the weighted fit of ZODI to IMAGE.

    Attributes
    ----------
    weighted_iz, weighted_zz : float
        Sums of I Z / variance and Z^2 / variance over usable pixels.
    iz, zz : float
        Sums of I Z and Z^2 over usable pixels whose variance is invalid and flagged:
        they get the weight of the frame's median variance.
    clear : int
        Pixels with none of the excluded bits.
    unflagged : int
        Pixels with an invalid variance and no flag at all.
    finite, valid : bool
        Whether any pixel of IMAGE is finite, any variance valid.
    """

    weighted_iz: float
    weighted_zz: float
    iz: float
    zz: float
    clear: int
    unflagged: int
    finite: bool
    valid: bool


@compiled
def sum_zodi(planes: Planes, excluded: uint32) -> ZodiSums:
    """Return the sums behind the weighted fit of ZODI to IMAGE.

    Parameters
    ----------
    planes : Planes
        The whole frame.
    excluded : uint32
        The bad bits and the SOURCE bit.

    Returns
    -------
    ZodiSums
        Usable pixels are finite in IMAGE and ZODI and have none of the excluded bits.
    """
    image, variance, zodi, flags = planes
    ny, nx = image.shape
    clear = unflagged = 0
    finite = valid = False
    iz = zz = 0.0
    # No branch, and a sum for each of many lanes: the loop runs on vectors, and the order
    # of the additions, so the result, does not depend on how long the vectors are.
    izw, zzw = np.zeros(LANES), np.zeros(LANES)
    for row in range(ny):
        for start in range(0, nx, LANES):
            some_image = image[row, start : start + LANES]
            some_variance = variance[row, start : start + LANES]
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
            # Few pixels have an invalid variance that matters, so a second pass is cheap.
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
    sums = np.zeros(2)
    for lane in range(LANES):
        sums[0] += izw[lane]
        sums[1] += zzw[lane]
    return ZodiSums(sums[0], sums[1], iz, zz, clear, unflagged, finite, valid)
