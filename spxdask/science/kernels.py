"""The compiled inner loops: pixels of a mapped frame in, numbers of a source out.

Planes come as they lie in the file, big-endian, seen as uint32; a pixel is swapped when
it is looked at, so that a frame with ten sources costs ten windows and one pass for the
zodiacal fit, and no copy. Everything is computed in double precision. Nothing here holds
the GIL. What each number means is said in `spxdask.science.photometry`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy import uint32

_COMPILE = {"nogil": True, "cache": True, "error_model": "numpy", "boundscheck": False}


@njit(inline="always", **_COMPILE)
def _swap(word):
    word = uint32(word)
    return uint32(
        (word >> uint32(24))
        | ((word >> uint32(8)) & uint32(0xFF00))
        | ((word << uint32(8)) & uint32(0xFF0000))
        | (word << uint32(24))
    )


@njit(inline="always", **_COMPILE)
def _real(word):
    return np.float64(_swap(word).view(np.float32))


# The inverse distortion is found to this many pixels; the fit behind the AP and BP cards
# is good to about 1e-3 only, so the forward polynomials are inverted instead.
_TOLERANCE_PIXELS = 1e-10
_MAX_ITERATIONS = 50


@njit(**_COMPILE)
def _polynomial(coefficients, u, v):
    """Sum of coefficients[p, q] u^p v^q over p + q <= order, by Horner's rule."""
    order = len(coefficients) - 1
    total = 0.0
    for p in range(order, -1, -1):
        inner = 0.0
        for q in range(order - p, -1, -1):
            inner = inner * v + coefficients[p, q]
        total = total * u + inner
    return total


@njit(**_COMPILE)
def sky_to_pixel(ra, dec, rotation, inverse, crpix, a, b):
    """Project positions onto the detector; see `spxdask.science.wcs.TanSip`."""
    n = len(ra)
    x, y = np.full(n, math.nan), np.full(n, math.nan)
    for k in range(n):
        alpha, delta = math.radians(ra[k]), math.radians(dec[k])
        # Unit vector in the celestial system, then n0 the native axes.
        c0 = math.cos(delta) * math.cos(alpha)
        c1 = math.cos(delta) * math.sin(alpha)
        c2 = math.sin(delta)
        n2 = rotation[2, 0] * c0 + rotation[2, 1] * c1 + rotation[2, 2] * c2
        if not n2 > 0.0:
            continue
        n0 = rotation[0, 0] * c0 + rotation[0, 1] * c1 + rotation[0, 2] * c2
        n1 = rotation[1, 0] * c0 + rotation[1, 1] * c1 + rotation[1, 2] * c2
        xi, eta = math.degrees(n1 / n2), math.degrees(-n0 / n2)
        target_u = inverse[0, 0] * xi + inverse[0, 1] * eta
        target_v = inverse[1, 0] * xi + inverse[1, 1] * eta
        u, v = target_u, target_v
        for _ in range(_MAX_ITERATIONS):
            next_u = target_u - _polynomial(a, u, v)
            next_v = target_v - _polynomial(b, u, v)
            moved = max(abs(next_u - u), abs(next_v - v))
            u, v = next_u, next_v
            if moved <= _TOLERANCE_PIXELS:
                x[k], y[k] = u + crpix[0], v + crpix[1]
                break
    return x, y


@njit(**_COMPILE)
def zodi_sums(image, variance, zodi, flags, excluded):
    """Sums for the weighted fit of ZODI to IMAGE (PHOTOMETRY 3).

    Parameters
    ----------
    image, variance, zodi, flags : (ny, nx) uint32 array
        Planes as in the file.
    excluded : uint32
        The bad bits and the SOURCE bit.

    Returns
    -------
    izw, zzw : float
        Sums of I Z / variance and Z^2 / variance over usable pixels.
    iz, zz : float
        Sums of I Z and Z^2 over usable pixels whose variance is invalid and flagged:
        they get the weight of the frame's median variance.
    clear : int
        Pixels with none of the excluded bits.
    unflagged : int
        Pixels with an invalid variance and no flag at all.
    finite, valid : int
        Pixels with a finite IMAGE; pixels with a valid variance.
    """
    ny, nx = image.shape
    izw = zzw = iz = zz = 0.0
    clear = unflagged = finite = valid = 0
    for row in range(ny):
        # Partial sums a row keep the rounding error small, and their order fixed.
        row_izw = row_zzw = 0.0
        for column in range(nx):
            flag = _swap(flags[row, column])
            v = _real(variance[row, column])
            usable = v > 0.0 and v < math.inf
            valid += usable
            i = _real(image[row, column])
            finite += i * 0.0 == 0.0
            if not usable and flag == 0:
                unflagged += 1
            if flag & excluded:
                continue
            clear += 1
            z = _real(zodi[row, column])
            # A NaN or an infinity in either makes the product's difference a NaN.
            if z == 0.0 or not (i * 0.0 + z * 0.0 == 0.0):
                continue
            if usable:
                row_izw += i * z / v
                row_zzw += z * z / v
            elif flag:
                iz += i * z
                zz += z * z
        izw += row_izw
        zzw += row_zzw
    return izw, zzw, iz, zz, clear, unflagged, finite, valid


@njit(inline="always", **_COMPILE)
def _corner(x, y, r):
    """Area of a disc about the origin within [0, x] x [0, y], signed as x y is."""
    sign = 1.0
    if x < 0.0:
        x, sign = -x, -sign
    if y < 0.0:
        y, sign = -y, -sign
    x, y = min(x, r), min(y, r)
    if x * x + y * y <= r * r:
        return sign * x * y
    # Up to `start` the top is the line y, beyond it the arc.
    start = math.sqrt(max(r * r - y * y, 0.0))
    arc = x * math.sqrt(max(r * r - x * x, 0.0)) + r * r * math.asin(x / r)
    arc -= start * y + r * r * math.asin(start / r)
    return sign * (start * y + 0.5 * arc)


@njit(**_COMPILE)
def _aperture(image, variance, zodi, flags, x, y, r, scale, unit, median_variance):
    """Exact-fraction sums in a circle, and the flags of the pixel centres within it."""
    ny, nx = image.shape
    low_column, high_column = max(math.floor(x - r + 0.5), 0), min(math.ceil(x + r - 0.5), nx - 1)
    low_row, high_row = max(math.floor(y - r + 0.5), 0), min(math.ceil(y + r - 0.5), ny - 1)
    total = total_variance = 0.0
    flag_or = uint32(0)
    repaired = False
    corners = np.empty(high_column - low_column + 2)
    for k in range(len(corners)):
        corners[k] = _corner(low_column - 0.5 + k - x, low_row - 0.5 - y, r)
    for row in range(low_row, high_row + 1):
        left = corners[0]
        corners[0] = _corner(low_column - 0.5 - x, row + 0.5 - y, r)
        for column in range(low_column, high_column + 1):
            k = column - low_column + 1
            below = corners[k]
            corners[k] = _corner(column + 0.5 - x, row + 0.5 - y, r)
            fraction = corners[k] - corners[k - 1] - below + left
            left = below
            flag = _swap(flags[row, column])
            dx, dy = column - x, row - y
            if dx * dx + dy * dy <= r * r:
                flag_or |= flag
            # What rounding leaves of a pixel outside must not let its NaN in.
            if fraction <= 1e-14:
                continue
            value = _real(image[row, column])
            if scale != 0.0:
                value -= scale * _real(zodi[row, column])
            v = _real(variance[row, column])
            if not (v > 0.0 and v < math.inf):
                v = median_variance if flag else math.nan
                repaired = repaired or flag != 0
            total += fraction * (value * unit)
            total_variance += fraction * (v * unit * unit)
    if not (total * 0.0 == 0.0 and total_variance * 0.0 == 0.0):
        total = total_variance = math.nan
    return total, total_variance, flag_or, repaired


@njit(**_COMPILE)
def _select(values, n, k):
    """The k-th smallest of values[:n] (Hoare's selection); reorders them."""
    low, high = 0, n - 1
    while low < high:
        pivot = values[(low + high) >> 1]
        i, j = low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if k <= j:
            high = j
        elif k >= i:
            low = i
        else:
            break
    return values[k]


@njit(**_COMPILE)
def _median(values, n):
    upper = _select(values, n, n // 2)
    if n % 2:
        return upper
    lower = values[0]
    for i in range(1, n // 2):
        lower = max(lower, values[i])
    return 0.5 * (lower + upper)


@njit(**_COMPILE)
def _clipped(values, n, sigma, iterations):
    """Median and standard deviation after clipping about the mean; reorders values."""
    kept = n
    for iteration in range(iterations + 1):
        total = 0.0
        for i in range(kept):
            total += values[i]
        mean = total / kept
        squares = 0.0
        for i in range(kept):
            squares += (values[i] - mean) ** 2
        deviation = math.sqrt(squares / kept)
        if iteration == iterations:
            break
        limit = sigma * deviation
        inside = 0
        for i in range(kept):
            value = values[i]
            if abs(value - mean) <= limit:
                values[inside] = value
                inside += 1
        # No spread at all: rounding of the mean must not throw everything out.
        if inside == kept or inside == 0:
            break
        kept = inside
    return _median(values, kept), deviation


@njit(**_COMPILE)
def _gather(
    image, variance, zodi, flags, x, y, inner2, outer2, box, scale, unit, excluded, values
):
    """Collect I' of the usable pixels of a box with inner2 < distance^2 < outer2."""
    n = 0
    for row in range(box[0], box[1] + 1):
        dy2 = (row - y) ** 2
        for column in range(box[2], box[3] + 1):
            d2 = (column - x) ** 2 + dy2
            if not (inner2 < d2 < outer2):
                continue
            flag = _swap(flags[row, column])
            if flag & excluded:
                continue
            value = _real(image[row, column])
            if scale != 0.0:
                value -= scale * _real(zodi[row, column])
            if not value * 0.0 == 0.0:
                continue
            if flag == 0:
                v = _real(variance[row, column])
                if not (v > 0.0 and v < math.inf):
                    continue
            values[n] = value * unit
            n += 1
    return n


@njit(inline="always", **_COMPILE)
def _box(ny, nx, y, x, half_height, half_width):
    return (
        max(math.floor(y - half_height), 0),
        min(math.ceil(y + half_height) - 1, ny - 1),
        max(math.floor(x - half_width), 0),
        min(math.ceil(x + half_width) - 1, nx - 1),
    )


@njit(**_COMPILE)
def measure_sources(
    image,
    variance,
    zodi,
    flags,
    x,
    y,
    radius,
    scale,
    unit,
    median_variance,
    bad,
    source,
    minimum,
    sigma,
    iterations,
    height,
    width,
    annulus,
):
    """Background and aperture of every source (PHOTOMETRY 7, 8 and 10).

    Parameters
    ----------
    image, variance, zodi, flags : (ny, nx) uint32 array
        Planes as in the file.
    x, y : (n,) float array
        0-based pixel positions.
    radius : float
        Aperture radius, pixels.
    scale : float
        ZODI times this is subtracted; nothing is when it is 0.
    unit : float
        Factor from the planes' unit to that of the results.
    median_variance : float
        Stands in for invalid variances of flagged pixels, in the planes' unit.
    bad, source : uint32
        Masks of the bad bits and of the SOURCE bit.
    minimum : int
        Usable pixels a background needs.
    sigma, iterations : float, int
        Clipping about the mean.
    height, width : float
        Size of the background window, pixels; not used with an annulus.
    annulus : (5,) float array
        Empty for the window. Else inner radius, first outer radius, largest outer
        radius, growth a step, steps.

    Returns
    -------
    sums : (n, 4) float array
        Aperture sum, its variance, background level and error, in result units. NaN
        background where there were too few usable pixels.
    flag : (n,) uint32 array
        Flags of the pixels whose centres lie in the aperture.
    repaired : (n,) bool array
        Whether the median variance was used.
    """
    ny, nx = image.shape
    n = len(x)
    sums = np.empty((n, 4))
    flag = np.empty(n, np.uint32)
    repaired = np.empty(n, np.bool_)
    if len(annulus):
        reach = annulus[2]
        height = width = 2.0 * reach
    values = np.empty(int((height + 3) * (width + 3)))
    window_inner = (radius + 0.707) ** 2
    for k in range(n):
        box = _box(ny, nx, y[k], x[k], 0.5 * height, 0.5 * width)
        count = 0
        if len(annulus):
            # The inner edge belongs to the annulus, the outer does not, as in photutils.
            inner2 = np.nextafter(annulus[0] ** 2, 0.0)
            outer = annulus[1]
            for step in range(int(annulus[4]) + 1):
                count = _gather(
                    image, variance, zodi, flags, x[k], y[k], inner2, outer * outer, box,
                    scale, unit, bad | source, values,
                )  # fmt: skip
                if count >= minimum or outer >= annulus[2] or step == int(annulus[4]):
                    break
                outer = min(outer + annulus[3], annulus[2])
            outer2 = outer * outer
        else:
            inner2, outer2 = window_inner, math.inf
            count = _gather(
                image, variance, zodi, flags, x[k], y[k], inner2, outer2, box,
                scale, unit, bad | source, values,
            )  # fmt: skip
        if count < minimum:
            count = _gather(
                image, variance, zodi, flags, x[k], y[k], inner2, outer2, box,
                scale, unit, bad, values,
            )  # fmt: skip
        if count < minimum:
            sums[k] = math.nan
            flag[k] = 0
            repaired[k] = False
            continue
        level, deviation = _clipped(values, count, sigma, iterations)
        total, total_variance, flag_or, used_median = _aperture(
            image, variance, zodi, flags, x[k], y[k], radius, scale, unit, median_variance
        )
        sums[k, 0], sums[k, 1] = total, total_variance
        sums[k, 2], sums[k, 3] = level, deviation / math.sqrt(count)
        flag[k] = flag_or
        repaired[k] = used_median
    return sums, flag, repaired


@njit(**_COMPILE)
def positive_median(plane):
    """Median of the finite positive values of a plane, NaN when there are none.

    The bits of positive floats sort as the floats do, so two histograms, of the upper
    and of the lower half of the bits, find the middle values exactly in two passes.
    """
    upper_counts = np.zeros(1 << 16, np.int64)
    total = 0
    for row in range(plane.shape[0]):
        for column in range(plane.shape[1]):
            word = _swap(plane[row, column])
            # 0x7F800000 is infinity; NaNs and negative numbers are above it.
            if uint32(0) < word < uint32(0x7F800000):
                upper_counts[word >> uint32(16)] += 1
                total += 1
    if total == 0:
        return math.nan
    result = 0.0
    lower_counts = np.zeros(1 << 16, np.int64)
    counted = -1
    for rank in ((total - 1) // 2, total // 2):
        upper, before = 0, 0
        while before + upper_counts[upper] <= rank:
            before += upper_counts[upper]
            upper += 1
        if upper != counted:
            lower_counts[:] = 0
            counted = upper
            for row in range(plane.shape[0]):
                for column in range(plane.shape[1]):
                    word = _swap(plane[row, column])
                    if word >> uint32(16) == upper and word > uint32(0):
                        lower_counts[word & uint32(0xFFFF)] += 1
        lower = 0
        while before + lower_counts[lower] <= rank:
            before += lower_counts[lower]
            lower += 1
        word = uint32((upper << 16) | lower)
        result += 0.5 * np.float64(word.view(np.float32))
    return result
