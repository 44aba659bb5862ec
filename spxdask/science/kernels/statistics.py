"""Medians and sigma clipping of many numbers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy import uint32

from spxdask.science.compiled import compiled, compiled_helper
from spxdask.science.kernels.pixels import read_variance, scale_variance, slice_factors, swap_word

# Number of partial sums that are added to in parallel. Arrays of values are filled up with NaN
# to a multiple of it.
LANES = 64
# Bits of the smallest and of the largest positive float32.
SMALLEST = uint32(1)
LARGEST = uint32(0x7F7FFFFF)
# Pixels from one of a sample to the next. It is odd, so that the sample has pixels of all
# columns.
SAMPLE_STRIDE = 251


class Clipping(NamedTuple):
    """Clipping about the mean.

    Attributes
    ----------
    sigma : float
        Values farther from the mean than this many standard deviations are excluded.
    iterations : int
        Maximum number of rounds.
    """

    sigma: float
    iterations: int


@compiled_helper
def _select(values: np.ndarray, n: int, k: int) -> Any:
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


@compiled_helper
def _select_two(values: np.ndarray, n: int, lower: int, upper: int) -> Any:
    """Return the values of two ranks, which are equal or differ by one; reorders the values."""
    second = first = _select(values, n, upper)
    if lower < upper:
        first = values[0]
        for i in range(1, upper):
            first = max(first, values[i])
    return first, second


@compiled_helper
def _compute_moments(
    values: np.ndarray,
    size: int,
    low: float,
    high: float,
    pivot: float,
    first: np.ndarray,
    second: np.ndarray,
) -> tuple[int, float, float]:
    """Return number, mean and standard deviation of the values from low to high.

    `pivot` should be near the mean, because rounding of the square of their difference limits
    the accuracy of the standard deviation. NaNs are excluded. `first` and `second` hold
    partial sums, one for each of `LANES` lanes: the compiler adds to them with vector
    instructions, and the order of the additions does not depend on the length of the vectors.
    """
    count = 0
    first[:] = 0.0
    second[:] = 0.0
    for start in range(0, size, LANES):
        block = values[start : start + LANES]
        for lane in range(LANES):
            value = block[lane]
            inside = (value >= low) & (value <= high)
            count += inside
            offset = value - pivot if inside else 0.0
            first[lane] += offset
            second[lane] += offset * offset
    total = squares = 0.0
    for lane in range(LANES):
        total += first[lane]
        squares += second[lane]
    shift = total / count
    return count, pivot + shift, math.sqrt(max(squares / count - shift * shift, 0.0))


@compiled_helper
def _find_median(
    values: np.ndarray,
    size: int,
    count: int,
    below: int,
    mean: float,
    deviation: float,
    scratch: np.ndarray,
) -> float:
    """Return the median of values, of which `count` are not NaN and `below` below the mean.

    The number of values below the mean and the density of a Gaussian give a guess that is
    close to the median. The values near the guess are then copied, from an interval that is
    widened until it includes the middle ranks, and only these values are sorted.
    """
    guess = mean + (0.5 * count - below) / count * 2.5 * deviation
    lower_rank, upper_rank = (count - 1) // 2, count // 2
    # The interval holds about 20 of 2,500 values, and nearly always includes the median.
    half = 0.01 * deviation
    while True:
        before = picked = 0
        for i in range(size):
            before += values[i] - guess < -half
        for i in range(size):
            # There is no branch here, because the processor would often mispredict it.
            scratch[picked] = values[i]
            picked += abs(values[i] - guess) <= half
        if before <= lower_rank and upper_rank < before + picked:
            break
        # A deviation that rounding made zero must not prevent the widening.
        half = 4.0 * half if half > 0.0 else 1e-12 * max(abs(guess), 1.0)
    lower, upper = _select_two(scratch, picked, lower_rank - before, upper_rank - before)
    return 0.5 * (lower + upper)


@compiled_helper
def find_clipped_median(
    values: np.ndarray, size: int, clipping: Clipping, scratch: np.ndarray
) -> tuple[float, float]:
    """Return median and standard deviation after clipping about the mean.

    Parameters
    ----------
    values : (n,) float array
        The values, of which NaNs are excluded; they are overwritten.
    size : int
        Number of values to use, a multiple of `LANES`.
    clipping : Clipping
        How the values are clipped.
    scratch : (n,) float array
        Working memory.

    Returns
    -------
    median, deviation : float
        Median and standard deviation of the values that remain.
    """
    # Each round keeps a subset of the values of the round before, so two bounds define it.
    sigma, iterations = clipping
    first, second = scratch[:LANES], scratch[LANES : 2 * LANES]
    low, high = -math.inf, math.inf
    # The mean is near zero if the zodiacal light is subtracted.
    count, mean, deviation = _compute_moments(values, size, low, high, 0.0, first, second)
    if not abs(mean) <= 4.0 * deviation:
        # The rounding error of a second pass is negligible, because its pivot is near the mean.
        count, mean, deviation = _compute_moments(values, size, low, high, mean, first, second)
    for _ in range(iterations):
        limit = sigma * deviation
        inner_low, inner_high = max(low, mean - limit), min(high, mean + limit)
        left, left_mean, left_deviation = _compute_moments(
            values, size, inner_low, inner_high, mean, first, second
        )
        # Clipping below one sigma can exclude all values; such a round is skipped.
        if left == 0 or left == count:
            break
        low, high, count, mean, deviation = inner_low, inner_high, left, left_mean, left_deviation
    below = 0
    for i in range(size):
        value = values[i] if (values[i] >= low) & (values[i] <= high) else math.nan
        below += value < mean
        values[i] = value
    return _find_median(values, size, count, below, mean, deviation, scratch), deviation


class Bracket(NamedTuple):
    """Two bounds around the median of VARIANCE, and what is between them.

    Positive floats sort as their bits do, read as integers. One pass counts the valid values below
    the bounds and copies those between them: only these have to be sorted.

    Attributes
    ----------
    bounds : (2,) uint32 array
        Bits of the lowest and of the highest value between the bounds.
    counts : (3,) int array
        Number of valid values, of those below the bounds, and of those between them.
    picked : (n,) uint32 array
        Bits of those between them, with room for all pixels.
    """

    bounds: np.ndarray
    counts: np.ndarray
    picked: np.ndarray


@compiled
def bracket_median(plane: np.ndarray, rows: np.ndarray, factors: np.ndarray | None) -> Bracket:
    """Find bounds around the median of some rows of VARIANCE in a sample.

    Parameters
    ----------
    plane : (ny, nx) uint32 array
        Float32 words as they are in the file.
    rows : (n,) int array
        The rows that are used.
    factors : (ny, nx) float32 array or None
        Those of `Planes`.

    Returns
    -------
    Bracket
        Nothing is counted yet: `count_values` has to get each of the rows.
    """
    nx = plane.shape[1]
    size = len(rows) * nx
    sample = np.empty(size // SAMPLE_STRIDE + 1, np.uint32)
    n = 0
    for i in range(0, size, SAMPLE_STRIDE):
        place = rows[i // nx], i % nx
        sample[n] = np.float32(read_variance(plane, factors, place)).view(uint32)
        n += sample[n] - SMALLEST <= LARGEST - SMALLEST
    bounds = np.array([SMALLEST, LARGEST], np.uint32)
    if n > 100:
        # Four standard deviations of the number of values of a sample that are below the median.
        half = 2.0 * math.sqrt(n)
        bounds[0] = _select(sample, n, int(0.5 * n - half))
        bounds[1] = _select(sample, n, int(0.5 * n + half))
    return Bracket(bounds, np.zeros(3, np.int64), np.empty(size, np.uint32))


@compiled_helper
def count_values(words: np.ndarray, bracket: Bracket) -> None:
    """Count the values of a row of VARIANCE, and pick those between the bounds.

    Parameters
    ----------
    words : (n,) uint32 array
        Words like those of a file.
    bracket : Bracket
        The bounds; its counts and picked values are changed.
    """
    (low, high), counts, picked = bracket
    all_valid, all_before, inside = counts
    # The integers are unsigned, so that those below a bound wrap to large ones and one comparison
    # checks both bounds. All have 32 bits, of which the vector instructions take the most at once.
    valid, below, width = uint32(LARGEST - SMALLEST), uint32(low - SMALLEST), uint32(high - low)
    for start in range(0, len(words), LANES):
        block = words[start : start + LANES]
        total = before = some = np.int32(0)
        for k in range(len(block)):
            word = swap_word(block[k])
            total = np.int32(total + np.int32(uint32(word - SMALLEST) <= valid))
            before = np.int32(before + np.int32(uint32(word - SMALLEST) < below))
            some = np.int32(some + np.int32(uint32(word - low) <= width))
        all_valid += total
        all_before += before
        if some:
            for k in range(len(block)):
                # There is no branch here, because the processor would often mispredict it.
                picked[inside] = swap_word(block[k])
                inside += uint32(picked[inside] - low) <= width
    # One by one, as a tuple takes numba seconds to compile.
    counts[0], counts[1], counts[2] = all_valid, all_before, inside


@compiled_helper
def _narrow(
    values: np.ndarray, n: int, bounds: np.ndarray, lower: int, upper: int
) -> tuple[int, int]:
    """Keep the values near two ranks; return their number and how many values are below them.

    Between bounds that are close, values are nearly evenly distributed. Where they are not, all of
    values[:n] are kept.
    """
    low, high = np.int64(bounds[0]), np.int64(bounds[1])
    guess, half = low + (high - low) * lower // n, (high - low) // 32
    start, width = uint32(guess - half), uint32(2 * half)
    before = kept = 0
    for i in range(n):
        before += values[i] < start
        kept += bool(uint32(values[i] - start) <= width)
    if not before <= lower <= upper < before + kept:
        return n, 0
    kept = 0
    for i in range(n):
        values[kept] = values[i]
        kept += bool(uint32(values[kept] - start) <= width)
    return kept, before


@compiled
def find_positive_median(
    plane: np.ndarray, rows: np.ndarray, factors: np.ndarray | None, bracket: Bracket
) -> float:
    """Return the median of the finite positive values of some rows of VARIANCE.

    If it is not between the bounds, all values are copied in a second pass.

    Parameters
    ----------
    plane : (ny, nx) uint32 array
        Float32 words as they are in the file.
    rows : (n,) int array
        The rows that are used.
    factors : (ny, nx) float32 array or None
        Those of `Planes`.
    bracket : Bracket
        From `bracket_median` with the same arguments, with each of the rows counted. The picked
        values are reordered.

    Returns
    -------
    float
        The median in the unit of the plane; NaN when there are no such values.
    """
    nx = plane.shape[1]
    bounds, counts, picked = bracket
    while True:
        total, before, inside = counts
        if total == 0:
            return math.nan
        lower_rank, upper_rank = (total - 1) // 2 - before, total // 2 - before
        if lower_rank >= 0 and upper_rank < inside:
            break
        bounds[0], bounds[1] = SMALLEST, LARGEST
        counts[:] = 0
        scaled = np.empty(nx, np.uint32)
        for row in rows:
            factors_row = slice_factors(factors, row, 0, nx)
            count_values(scale_variance(plane[row], factors_row, scaled), bracket)
    inside, before = _narrow(picked, inside, bounds, lower_rank, upper_rank)
    lower, upper = _select_two(picked, inside, lower_rank - before, upper_rank - before)
    lower, upper = uint32(lower).view(np.float32), uint32(upper).view(np.float32)
    return 0.5 * (np.float64(lower) + np.float64(upper))
