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

from spxdask.science.compiled import OPTIONS, compiled, inner

# Sums that run side by side in the statistics of a background.
_LANES = 64
# The same in the zodiacal fit.
_ZODI_LANES = 128
# Bits of the smallest and of the largest positive float.
_SMALLEST = uint32(1)
_LARGEST = uint32(0x7F7FFFFF)
# Odd, so that a sample of the pixels sees all columns; its median is good to 0.4 %.
_SAMPLE_STRIDE = 251


@njit(inline="always", **OPTIONS)
def _swap(word):
    word = uint32(word)
    return uint32(
        (word >> uint32(24))
        | ((word >> uint32(8)) & uint32(0xFF00))
        | ((word << uint32(8)) & uint32(0xFF0000))
        | (word << uint32(24))
    )


@njit(inline="always", **OPTIONS)
def _real(word):
    return np.float64(_swap(word).view(np.float32))


# The inverse distortion is found to this many pixels; the fit behind the AP and BP cards
# is good to about 1e-3 only, so the forward polynomials are inverted instead.
_TOLERANCE_PIXELS = 1e-10
_MAX_ITERATIONS = 50


@inner
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


@compiled
def distort(u, v, a, b):
    """Add the SIP distortion to pixel offsets; (n,) arrays in and out."""
    new_u, new_v = np.empty_like(u), np.empty_like(v)
    for k in range(len(u)):
        new_u[k] = u[k] + _polynomial(a, u[k], v[k])
        new_v[k] = v[k] + _polynomial(b, u[k], v[k])
    return new_u, new_v


@compiled
def sky_to_pixel(ra, dec, rotation, inverse, crpix, a, b):
    """Project positions onto the detector; see `spxdask.science.level2.wcs.TanSip`."""
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


@njit(inline="always", **OPTIONS)
def _is_finite(value):
    # An infinity or a NaN times zero is a NaN; unlike math.isfinite, this vectorises.
    return value * 0.0 == 0.0


@compiled
def zodi_sums(image, variance, zodi, flags, excluded):
    """Return the sums behind the weighted fit of ZODI to IMAGE.

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
    finite, valid : bool
        Whether any pixel of IMAGE is finite, any variance valid.
    """
    ny, nx = image.shape
    clear = unflagged = 0
    finite = valid = False
    iz = zz = 0.0
    # No branch, and a sum for each of many lanes: the loop runs on vectors, and the order
    # of the additions, so the result, does not depend on how long they are.
    izw, zzw = np.zeros(_ZODI_LANES), np.zeros(_ZODI_LANES)
    for row in range(ny):
        for start in range(0, nx, _ZODI_LANES):
            some_image = image[row, start : start + _ZODI_LANES]
            some_variance = variance[row, start : start + _ZODI_LANES]
            some_zodi = zodi[row, start : start + _ZODI_LANES]
            some_flags = flags[row, start : start + _ZODI_LANES]
            odd = False
            for k in range(len(some_image)):
                flag = _swap(some_flags[k])
                v = _real(some_variance[k])
                i = _real(some_image[k])
                z = _real(some_zodi[k])
                is_valid = (v > 0.0) & (v < math.inf)
                is_clear = (flag & excluded) == 0
                is_finite = _is_finite(i)
                use = is_clear & is_finite & _is_finite(z)
                valid |= is_valid
                clear += is_clear
                finite |= is_finite
                odd |= (not is_valid) & (use | (flag == 0))
                i, z = (i if use else 0.0), (z if use else 0.0)
                weighted = z / v if is_valid else 0.0
                izw[k] += i * weighted
                zzw[k] += z * weighted
            if not odd:
                continue
            # Few pixels have an invalid variance that matters; they are looked at again.
            for k in range(len(some_image)):
                v = _real(some_variance[k])
                if (v > 0.0) & (v < math.inf):
                    continue
                flag = _swap(some_flags[k])
                i, z = _real(some_image[k]), _real(some_zodi[k])
                if flag == 0:
                    unflagged += 1
                elif (flag & excluded) == 0 and _is_finite(i) and _is_finite(z):
                    iz += i * z
                    zz += z * z
    sums = np.zeros(2)
    for lane in range(_ZODI_LANES):
        sums[0] += izw[lane]
        sums[1] += zzw[lane]
    return sums[0], sums[1], iz, zz, clear, unflagged, finite, valid


@inner
def _edges(first, count, centre, r, position, arc):
    """Prepare `_corner` for the edges of pixels along one axis.

    `position` gets the distances from the centre to the edges `first` - 0.5, `first` + 0.5
    and so on, no farther than r, and `arc` the areas under the circle from the centre to there.
    """
    for k in range(count):
        t = min(max(first - 0.5 + k - centre, -r), r)
        position[k] = t
        t = abs(t)
        arc[k] = 0.5 * (t * math.sqrt(max(r * r - t * t, 0.0)) + r * r * math.asin(t / r))


@njit(inline="always", **OPTIONS)
def _corner(x, x_arc, y, y_arc, r):
    """Area of a disc about the origin within [0, x] x [0, y], signed as x y is."""
    if x * x + y * y <= r * r:
        return x * y
    # Up to x and up to y, the quarter of the disc is covered; what is covered twice is the area.
    return math.copysign(x_arc + y_arc - 0.25 * math.pi * r * r, x * y)


@inner
def _aperture_room(ny, nx, r):
    """Return what `_aperture` needs to work in, for circles of radius r anywhere on a frame."""
    n = min(int(2.0 * r), max(ny, nx)) + 3
    return np.empty((5, n + 1)), np.empty((2, n, n)), np.empty((n, n), np.uint32)


@inner
def _aperture(image, variance, zodi, flags, x, y, r, scale, unit, median_variance, room):
    """Return exact-fraction sums in a circle, and the flags of the pixel centres within it.

    The sums are NaN when a pixel inside is not finite, or the circle leaves the frame.
    """
    (xs, x_arcs, ys, y_arcs, corners), (values, variances), masks = room
    ny, nx = image.shape
    low_column, high_column = max(math.floor(x - r + 0.5), 0), min(math.ceil(x + r - 0.5), nx - 1)
    low_row, high_row = max(math.floor(y - r + 0.5), 0), min(math.ceil(y + r - 0.5), ny - 1)
    rows, columns = high_row - low_row + 1, high_column - low_column + 1
    # Copied first, so that the memory of one row is waited for while that of others is.
    for j in range(rows):
        for k in range(columns):
            row, column = low_row + j, low_column + k
            values[j, k] = _real(image[row, column]) - scale * _real(zodi[row, column])
            variances[j, k] = _real(variance[row, column])
            masks[j, k] = _swap(flags[row, column])
    _edges(low_column, columns + 1, x, r, xs, x_arcs)
    _edges(low_row, rows + 1, y, r, ys, y_arcs)
    total = total_variance = 0.0
    flag_or = uint32(0)
    repaired = False
    for k in range(columns + 1):
        corners[k] = _corner(xs[k], x_arcs[k], ys[0], y_arcs[0], r)
    for j in range(rows):
        left = corners[0]
        corners[0] = _corner(xs[0], x_arcs[0], ys[j + 1], y_arcs[j + 1], r)
        for k in range(columns):
            below = corners[k + 1]
            corners[k + 1] = _corner(xs[k + 1], x_arcs[k + 1], ys[j + 1], y_arcs[j + 1], r)
            fraction = corners[k + 1] - corners[k] - below + left
            left = below
            flag = masks[j, k]
            dx, dy = low_column + k - x, low_row + j - y
            if dx * dx + dy * dy <= r * r:
                flag_or |= flag
            # What rounding leaves of a pixel outside must not let its NaN in.
            if fraction <= 1e-14:
                continue
            v = variances[j, k]
            if not (v > 0.0 and v < math.inf):
                v = median_variance if flag else math.nan
                repaired = repaired or flag != 0
            total += fraction * (values[j, k] * unit)
            total_variance += fraction * (v * unit * unit)
    outside = x - r < -0.5 or y - r < -0.5 or x + r > nx - 0.5 or y + r > ny - 0.5
    if outside or not (_is_finite(total) and _is_finite(total_variance)):
        total = total_variance = math.nan
    return total, total_variance, flag_or, repaired


@inner
def _select(values, n, k):
    """Return the k-th smallest of values[:n] (Hoare's selection); reorders them."""
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


@inner
def _select_two(values, n, lower, upper):
    """Return the values of two ranks that are one and the same or neighbours; reorders them."""
    second = first = _select(values, n, upper)
    if lower < upper:
        first = values[0]
        for i in range(1, upper):
            first = max(first, values[i])
    return first, second


@inner
def _moments(values, size, low, high, pivot, first, second):
    """Return number, mean and standard deviation of the values from low to high.

    `pivot` should be near the mean, so that its square does not swallow the spread. NaNs
    are outside of everything. `first` and `second` hold a sum for each of many lanes: side
    by side they run on vectors, and in an order that does not depend on their length.
    """
    count = 0
    first[:] = 0.0
    second[:] = 0.0
    for start in range(0, size, _LANES):
        block = values[start : start + _LANES]
        for lane in range(_LANES):
            value = block[lane]
            inside = (value >= low) & (value <= high)
            count += inside
            offset = value - pivot if inside else 0.0
            first[lane] += offset
            second[lane] += offset * offset
    total = squares = 0.0
    for lane in range(_LANES):
        total += first[lane]
        squares += second[lane]
    shift = total / count
    return count, pivot + shift, math.sqrt(max(squares / count - shift * shift, 0.0))


@inner
def _median(values, size, count, below, mean, deviation, scratch):
    """Return the median of values, of which `count` are not NaN and `below` below the mean.

    The count and a Gaussian's density bring a guess close to it. The values about the
    guess are then picked out, wider and wider until the middle ranks are among them, and
    only those are put in order.
    """
    guess = mean + (0.5 * count - below) / count * 2.5 * deviation
    lower_rank, upper_rank = (count - 1) // 2, count // 2
    # Some twenty of 2,500 values; the guess is hardly ever farther off.
    half = 0.01 * deviation
    while True:
        before = picked = 0
        for i in range(size):
            before += values[i] - guess < -half
        for i in range(size):
            # No branch, which would be guessed wrong now and then.
            scratch[picked] = values[i]
            picked += abs(values[i] - guess) <= half
        if before <= lower_rank and upper_rank < before + picked:
            break
        # A spread that rounding made zero must not stop the widening.
        half = 4.0 * half if half > 0.0 else 1e-12 * max(abs(guess), 1.0)
    lower, upper = _select_two(scratch, picked, lower_rank - before, upper_rank - before)
    return 0.5 * (lower + upper)


@inner
def _clipped(values, size, sigma, iterations, scratch):
    """Return median and standard deviation after clipping about the mean.

    Sets that are clipped lie within one another, so bounds say which values are left.
    """
    first, second = scratch[:_LANES], scratch[_LANES : 2 * _LANES]
    low, high = -math.inf, math.inf
    # With the zodiacal light subtracted, the mean is near zero.
    count, mean, deviation = _moments(values, size, low, high, 0.0, first, second)
    if not abs(mean) <= 4.0 * deviation:
        # From near, the second look has no rounding error to speak of.
        count, mean, deviation = _moments(values, size, low, high, mean, first, second)
    for _ in range(iterations):
        limit = sigma * deviation
        inner_low, inner_high = max(low, mean - limit), min(high, mean + limit)
        left, left_mean, left_deviation = _moments(
            values, size, inner_low, inner_high, mean, first, second
        )
        # A round that would leave nothing, as those below one sigma can, is not done.
        if left == 0 or left == count:
            break
        low, high, count, mean, deviation = inner_low, inner_high, left, left_mean, left_deviation
    below = 0
    for i in range(size):
        value = values[i] if (values[i] >= low) & (values[i] <= high) else math.nan
        below += value < mean
        values[i] = value
    return _median(values, size, count, below, mean, deviation, scratch), deviation


@inner
def _gather(
    image, variance, zodi, flags, x, y, inner2, outer2, box, scale, unit, excluded, check, values
):
    """Put I' of the pixels of a box into `values`, and NaN for those of no use.

    Of use are pixels with none of the excluded bits, a finite value and inner2 <
    distance^2 < outer2; with `check`, also unflagged ones must have a valid variance.
    Returns the size filled, a multiple of `_LANES`, and how many pixels are of use.
    """
    first_row, last_row, first_column, last_column = box
    columns = last_column - first_column + 1
    size = count = 0
    for row in range(first_row, last_row + 1):
        # Rows cut out first: from zero on, the compiler sees that no index is negative.
        image_row = image[row, first_column : last_column + 1]
        zodi_row = zodi[row, first_column : last_column + 1]
        flags_row = flags[row, first_column : last_column + 1]
        into = values[size : size + columns]
        dy2 = (row - y) ** 2
        dx = first_column - x
        for k in range(columns):
            d2 = (dx + k) ** 2 + dy2
            value = _real(image_row[k]) - scale * _real(zodi_row[k])
            use = (d2 > inner2) & (d2 < outer2) & ((_swap(flags_row[k]) & excluded) == 0)
            use &= _is_finite(value)
            count += use
            into[k] = value * unit if use else math.nan
        if check:
            for k in range(columns):
                v = _real(variance[row, first_column + k])
                if flags_row[k] == 0 and not (v > 0.0 and v < math.inf):
                    count -= _is_finite(into[k])
                    into[k] = math.nan
        size += columns
    while size % _LANES:
        values[size] = math.nan
        size += 1
    return size, count


@njit(inline="always", **OPTIONS)
def _box(ny, nx, y, x, half_height, half_width):
    return (
        max(math.floor(y - half_height), 0),
        min(math.ceil(y + half_height) - 1, ny - 1),
        max(math.floor(x - half_width), 0),
        min(math.ceil(x + half_width) - 1, nx - 1),
    )


@compiled
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
    check,
    minimum,
    sigma,
    iterations,
    height,
    width,
    annulus,
):
    """Measure background and aperture of every source.

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
    check : bool
        Whether the frame has unflagged pixels with an invalid variance.
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
        height = width = 2.0 * annulus[2]
    values = np.empty(int((height + 3) * (width + 3)) + 2 * _LANES)
    scratch = np.empty(len(values))
    room = _aperture_room(ny, nx, radius)
    for k in range(n):
        box = _box(ny, nx, y[k], x[k], 0.5 * height, 0.5 * width)
        # The inner edge belongs to an annulus, the outer does not, as in photutils.
        inner2, outer2 = (radius + 0.707) ** 2, math.inf
        steps = 0
        if len(annulus):
            inner2, outer2 = np.nextafter(annulus[0] ** 2, 0.0), annulus[1] ** 2
            steps = int(annulus[4])
        excluded = bad | source
        while True:
            size, count = _gather(
                image, variance, zodi, flags, x[k], y[k], inner2, outer2, box,
                scale, unit, excluded, check, values,
            )  # fmt: skip
            if count >= minimum or excluded == bad:
                break
            if steps > 0 and outer2 < annulus[2] ** 2:
                steps -= 1
                outer2 = min(math.sqrt(outer2) + annulus[3], annulus[2]) ** 2
            else:
                excluded = bad
        if count < minimum:
            sums[k] = math.nan
            flag[k] = 0
            repaired[k] = False
            continue
        level, deviation = _clipped(values, size, sigma, iterations, scratch)
        total, total_variance, flag_or, used_median = _aperture(
            image, variance, zodi, flags, x[k], y[k], radius, scale, unit, median_variance, room
        )
        sums[k, 0], sums[k, 1] = total, total_variance
        sums[k, 2], sums[k, 3] = level, deviation / math.sqrt(count)
        flag[k] = flag_or
        repaired[k] = used_median
    return sums, flag, repaired


@compiled
def word_sum(words):
    """Return the ones' complement sum of big-endian 32-bit words, the sum of FITS's DATASUM."""
    total = np.uint64(0)
    for i in range(len(words)):
        total += np.uint64(_swap(words[i]))
    while total >> np.uint64(32):
        total = (total & np.uint64(0xFFFFFFFF)) + (total >> np.uint64(32))
    return total


@compiled
def positive_median(plane):
    """Return the median of the finite positive values of a plane, NaN when there are none.

    The bits of positive floats sort as the floats do. A sample brackets the median, one
    pass counts what is below the bracket and picks out what is in it. Should the sample
    have been misleading, everything is picked out.
    """
    pixels = plane.reshape(plane.size)
    sample = np.empty(len(pixels) // _SAMPLE_STRIDE + 1, np.uint32)
    n = 0
    for i in range(0, len(pixels), _SAMPLE_STRIDE):
        sample[n] = _swap(pixels[i])
        n += sample[n] - _SMALLEST <= _LARGEST - _SMALLEST
    low, high = _SMALLEST, _LARGEST
    if n > 1000:
        low, high = _select(sample, n, int(0.485 * n)), _select(sample, n, int(0.515 * n))
    picked = np.empty(len(pixels), np.uint32)
    while True:
        total = before = inside = 0
        for start in range(0, len(pixels), _LANES):
            block = pixels[start : start + _LANES]
            some = 0
            for k in range(len(block)):
                word = _swap(block[k])
                # Unsigned, so that what is below wraps round to above.
                total += word - _SMALLEST <= _LARGEST - _SMALLEST
                before += word - _SMALLEST < low - _SMALLEST
                some += word - low <= high - low
            if some:
                for k in range(len(block)):
                    # No branch, which would be guessed wrong now and then.
                    picked[inside] = _swap(block[k])
                    inside += picked[inside] - low <= high - low
        if total == 0:
            return math.nan
        lower_rank, upper_rank = (total - 1) // 2 - before, total // 2 - before
        if lower_rank >= 0 and upper_rank < inside:
            break
        low, high = _SMALLEST, _LARGEST
    lower, upper = _select_two(picked, inside, lower_rank, upper_rank)
    lower, upper = uint32(lower).view(np.float32), uint32(upper).view(np.float32)
    return 0.5 * (np.float64(lower) + np.float64(upper))
