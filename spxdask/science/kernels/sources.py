"""The loop over the sources of a frame.

All numbers are computed in double precision, without the GIL. Their meaning is defined in
`spxdask.science.photometry`.
"""

from __future__ import annotations

import math

import numpy as np

from spxdask.science.compiled import compiled
from spxdask.science.kernels.aperture import make_aperture_buffers, sum_aperture
from spxdask.science.kernels.background import Masks, Region, gather_background
from spxdask.science.kernels.pixels import Conversion, Planes
from spxdask.science.kernels.statistics import LANES, Clipping, find_clipped_median


@compiled
def measure_sources(
    planes: Planes,
    conversion: Conversion,
    masks: Masks,
    region: Region,
    clipping: Clipping,
    radius: float,
    x: np.ndarray,
    y: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Measure the background and the aperture sum of every source.

    Parameters
    ----------
    planes : Planes
        The frame.
    conversion : Conversion
        From pixels of the planes to brightness and variance.
    masks : Masks
        Pixels that are excluded from the background.
    region : Region
        Region of the background around a source.
    clipping : Clipping
        Clipping of the pixels of the background.
    radius : float
        Aperture radius, pixels.
    x, y : (n,) float array
        0-based pixel positions.

    Returns
    -------
    sums : (n, 4) float array
        Aperture sum, its variance, background level and error, in result units. All are
        NaN where the background had too few usable pixels.
    flag : (n,) uint32 array
        All flags of the pixels whose centres lie in the aperture.
    repaired : (n,) bool array
        Whether the median variance was used.
    """
    ny, nx = planes.image.shape
    n = len(x)
    sums = np.empty((n, 4))
    flag = np.empty(n, np.uint32)
    repaired = np.empty(n, np.bool_)
    values = np.empty(int((region.height + 3) * (region.width + 3)) + 2 * LANES)
    scratch = np.empty(len(values))
    buffers = make_aperture_buffers(ny, nx, radius)
    for k in range(n):
        size, count = gather_background(planes, conversion, masks, region, x[k], y[k], values)
        if count < region.min_pixels:
            sums[k] = math.nan
            flag[k] = 0
            repaired[k] = False
            continue
        level, deviation = find_clipped_median(values, size, clipping, scratch)
        total, total_variance, flag_or, used_median = sum_aperture(
            planes, conversion, x[k], y[k], radius, buffers
        )
        sums[k, 0], sums[k, 1] = total, total_variance
        sums[k, 2], sums[k, 3] = level, deviation / math.sqrt(count)
        flag[k] = flag_or
        repaired[k] = used_median
    return sums, flag, repaired
