"""Sums for the fit of the zodiacal light model, from one pass over the four planes."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy import uint32

from spxdask.science.compiled import compiled
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
    clear : int
        Number of pixels of these rows with none of the excluded bits.
    unflagged : int
        Number of pixels with an invalid variance and no flag.
    finite, valid : bool
        Whether any pixel of IMAGE is finite, and whether any variance is valid.
    """

    weighted_iz: float
    weighted_zz: float
    iz: float
    zz: float
    clear: int
    unflagged: int
    finite: bool
    valid: bool

    def add(self, other: ZodiSums, weight: float) -> ZodiSums:
        """Return these sums and those of other rows.

        Parameters
        ----------
        other : ZodiSums
            Of other rows.
        weight : float
            Factor of their sums, but not of their numbers of pixels.

        Returns
        -------
        ZodiSums
        """
        return ZodiSums(
            weighted_iz=self.weighted_iz + weight * other.weighted_iz,
            weighted_zz=self.weighted_zz + weight * other.weighted_zz,
            iz=self.iz + weight * other.iz,
            zz=self.zz + weight * other.zz,
            clear=self.clear + other.clear,
            unflagged=self.unflagged + other.unflagged,
            finite=self.finite or other.finite,
            valid=self.valid or other.valid,
        )


NO_SUMS = ZodiSums(0.0, 0.0, 0.0, 0.0, 0, 0, False, False)


@compiled
def sum_zodi(planes: Planes, excluded: uint32, rows: np.ndarray, bracket: Bracket) -> ZodiSums:
    """Compute the sums for the weighted fit of ZODI to IMAGE.

    Values around the median variance are picked in the same pass, as most frames need it.

    Parameters
    ----------
    planes : Planes
        The frame.
    excluded : uint32
        The bad bits and the SOURCE bit.
    rows : (n,) int array
        The rows that are used.
    bracket : Bracket
        Gets the variances of these rows.

    Returns
    -------
    ZodiSums
        A pixel is usable if it is finite in IMAGE and ZODI and has none of the excluded bits.
    """
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
    sums = np.zeros(2)
    for lane in range(LANES):
        sums[0] += izw[lane]
        sums[1] += zzw[lane]
    return ZodiSums(sums[0], sums[1], iz, zz, clear, unflagged, finite, valid)
