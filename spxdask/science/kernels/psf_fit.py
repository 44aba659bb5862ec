"""The fluxes of all sources of a frame together, by least squares on overlapping stamps.

Brightness is that of a pixel, and a flux is the sum of it over the PSF: the solid angle comes
in afterwards. Sources are ordered by the first row of their stamps. A pixel that is not usable
has the variance 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy import uint32

from spxdask.science.compiled import compiled, compiled_helper
from spxdask.science.kernels.aperture import SMALLEST_FRACTION, fill_fractions
from spxdask.science.kernels.pixels import (
    Conversion,
    Planes,
    is_finite,
    read_brightness,
    read_real,
    read_variance,
    swap_word,
)

# Conjugate gradients end when no residual exceeds this part of the largest right-hand side.
TOLERANCE = 1e-12
MAX_ITERATIONS = 500
# The covariance is that of the whole group, up to this many sources and one. In larger groups, it
# is that of a source and of up to this many around it: those that are linked to it by PSFs that
# overlap, as long as the product of the squares of their correlations exceeds the limit. All
# others count as known. Errors are those of the whole group to 0.1 %, up to one source in 9 pixels.
CLOSEST = 24
LEAST_EFFECT = 1e-4
# A source with less of its PSF on usable pixels takes no part in the solution.
LEAST_PART = 0.01
# A source whose PSF is this close to a combination of others' counts as one of them.
SINGULAR = 1e-10


class Fit(NamedTuple):
    """What was fitted, one number a source.

    Attributes
    ----------
    flux, flux_error : (n,) float array
        Brightness summed over the PSF, and its standard deviation; NaN for sources that took
        no part.
    chi2 : (n,) float array
        Reduced, of all usable pixels of the stamp.
    fraction : (n,) float array
        Share of the square of the PSF on usable pixels.
    neighbours : (n,) float array
        Brightness of the other sources, summed over the aperture.
    bad : (n,) float array
        Share of the PSF's light within the aperture on pixels with a bad flag.
    separation : (n,) float array
        Distance of the nearest other source, pixels; infinite if no stamp overlaps.
    """

    flux: np.ndarray
    flux_error: np.ndarray
    chi2: np.ndarray
    fraction: np.ndarray
    neighbours: np.ndarray
    bad: np.ndarray
    separation: np.ndarray


@compiled
def read_stamps(
    planes: Planes, conversion: Conversion, bad: uint32, corners: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read the pixels of every stamp.

    Parameters
    ----------
    planes : Planes
        The frame.
    conversion : Conversion
        From pixels of the planes to brightness and variance.
    bad : uint32
        Bits of pixels that are not usable.
    corners : (n, 2) int array
        Row and column of the first pixel of each stamp.
    size : int
        Rows and columns of a stamp.

    Returns
    -------
    values, variances : (n, size, size) float array
        Brightness and its variance in result units; both are 0 where a pixel is not usable.
    masks : (n, size, size) uint32 array
        Flags; 0 beyond the frame.
    """
    image, variance, zodi, flags, factors = planes
    scale, unit, _ = conversion
    ny, nx = image.shape
    n = len(corners)
    values, variances = np.empty((n, size, size)), np.empty((n, size, size))
    masks = np.empty((n, size, size), np.uint32)
    for i in range(n):
        for j in range(size):
            row = corners[i, 0] + j
            for k in range(size):
                column = corners[i, 1] + k
                values[i, j, k] = variances[i, j, k] = 0.0
                masks[i, j, k] = 0
                if row < 0 or row >= ny or column < 0 or column >= nx:
                    continue
                pixel = row, column
                flag = swap_word(flags[pixel])
                value = read_brightness(image, factors, pixel) - scale * read_real(zodi[pixel])
                v = read_variance(variance, factors, pixel)
                masks[i, j, k] = flag
                if (flag & bad) == 0 and is_finite(value) and v > 0.0 and v < math.inf:
                    values[i, j, k] = value * unit
                    variances[i, j, k] = v * unit * unit
    return values, variances, masks


@compiled_helper
def _count_pairs(corners: np.ndarray, reach: int, counts: np.ndarray) -> int:
    """Count, for each source, the others with a first pixel less than `reach` away on each axis."""
    n = len(corners)
    total = 0
    counts.fill(0)
    for i in range(n):
        for j in range(i + 1, n):
            if corners[j, 0] - corners[i, 0] >= reach:
                break
            if abs(corners[j, 1] - corners[i, 1]) < reach:
                counts[i] += 1
                counts[j] += 1
                total += 1
    return total


@compiled_helper
def _list_neighbours(
    corners: np.ndarray, reach: int, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the neighbours that were counted: those of i are from start[i] to start[i + 1]."""
    n = len(corners)
    start = np.zeros(n + 1, np.int64)
    for i in range(n):
        start[i + 1] = start[i] + counts[i]
    neighbour = np.empty(start[n], np.int32)
    filled = start[:n].copy()
    for i in range(n):
        for j in range(i + 1, n):
            if corners[j, 0] - corners[i, 0] >= reach:
                break
            if abs(corners[j, 1] - corners[i, 1]) < reach:
                neighbour[filled[i]] = j
                neighbour[filled[j]] = i
                filled[i] += 1
                filled[j] += 1
    return start, neighbour


@compiled_helper
def _multiply_stamps(
    stamps: np.ndarray, variances: np.ndarray, corners: np.ndarray, i: int, j: int
) -> tuple[float, float]:
    """Sum the product of two PSFs over usable pixels, and the same times the variance."""
    size = stamps.shape[1]
    down, right = corners[j, 0] - corners[i, 0], corners[j, 1] - corners[i, 1]
    product = weighted = 0.0
    for row in range(max(down, 0), min(size, size + down)):
        for column in range(max(right, 0), min(size, size + right)):
            v = variances[i, row, column]
            if v > 0.0:
                both = stamps[i, row, column] * stamps[j, row - down, column - right]
                product += both
                weighted += both * v
    return product, weighted


@compiled_helper
def _list_groups(
    start: np.ndarray, neighbour: np.ndarray, product: np.ndarray, diagonal: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sources that take part, group by group, and where each group begins."""
    n = len(diagonal)
    members = np.empty(n, np.int32)
    begin = np.empty(n + 1, np.int64)
    seen = diagonal <= 0.0
    filled = groups = 0
    for seed in range(n):
        if seen[seed]:
            continue
        begin[groups] = filled
        groups += 1
        seen[seed] = True
        members[filled] = seed
        reached = filled
        filled += 1
        while reached < filled:
            i = members[reached]
            reached += 1
            for k in range(start[i], start[i + 1]):
                j = neighbour[k]
                if product[k] != 0.0 and not seen[j]:
                    seen[j] = True
                    members[filled] = j
                    filled += 1
    begin[groups] = filled
    return members[:filled], begin[: groups + 1]


@compiled_helper
def _solve_group(
    group: np.ndarray,
    start: np.ndarray,
    neighbour: np.ndarray,
    product: np.ndarray,
    diagonal: np.ndarray,
    right: np.ndarray,
    flux: np.ndarray,
    work: np.ndarray,
) -> None:
    """Solve the normal equations of a group by conjugate gradients, scaled by the diagonal.

    `work` are three arrays that are zero for sources outside of the group.
    """
    residual, direction, image = work
    largest = rho = 0.0
    for i in group:
        flux[i] = 0.0
        residual[i] = right[i]
        direction[i] = right[i] / diagonal[i]
        rho += residual[i] * direction[i]
        largest = max(largest, abs(right[i]))
    for _ in range(MAX_ITERATIONS):
        if not rho > 0.0:
            break
        curvature = 0.0
        for i in group:
            total = diagonal[i] * direction[i]
            for k in range(start[i], start[i + 1]):
                total += product[k] * direction[neighbour[k]]
            image[i] = total
            curvature += total * direction[i]
        if not curvature > 0.0:
            break
        step = rho / curvature
        left = 0.0
        previous, rho = rho, 0.0
        for i in group:
            flux[i] += step * direction[i]
            residual[i] -= step * image[i]
            left = max(left, abs(residual[i]))
            rho += residual[i] * residual[i] / diagonal[i]
        if left <= TOLERANCE * largest:
            break
        for i in group:
            direction[i] = residual[i] / diagonal[i] + rho / previous * direction[i]
    for i in group:
        residual[i] = direction[i] = image[i] = 0.0


@compiled_helper
def _choose_closest(
    i: int,
    start: np.ndarray,
    neighbour: np.ndarray,
    product: np.ndarray,
    diagonal: np.ndarray,
    least: float,
    chosen: np.ndarray,
    place: np.ndarray,
    effect: np.ndarray,
) -> int:
    """Fill in up to `CLOSEST` sources with at least this effect on i, and i as the last.

    Returns their number. `place` is -1 everywhere, and becomes the index in `chosen`.
    """
    count, reached = 1, 0
    chosen[0] = i
    place[i] = 0
    effect[0] = 1.0
    while reached < count and count <= CLOSEST:
        member, through = chosen[reached], effect[reached] / diagonal[chosen[reached]]
        reached += 1
        for k in range(start[member], start[member + 1]):
            j = neighbour[k]
            if place[j] < 0 and count <= CLOSEST:
                link = through * product[k] * product[k]
                if link > least * diagonal[j]:
                    chosen[count] = j
                    place[j] = count
                    effect[count] = link / diagonal[j]
                    count += 1
    chosen[0], chosen[count - 1] = chosen[count - 1], chosen[0]
    place[chosen[0]] = 0
    place[chosen[count - 1]] = count - 1
    return count


@compiled_helper
def _find_last_row(matrix: np.ndarray, m: int, row: np.ndarray) -> None:
    """Fill in the last row of the inverse of a symmetric matrix, which is overwritten.

    By Cholesky's decomposition. Unknowns that others before them determine are left out; where
    the last one is such, the row is NaN.
    """
    for j in range(m):
        pivot = matrix[j, j]
        for k in range(j):
            pivot -= matrix[j, k] * matrix[j, k]
        if pivot <= SINGULAR * matrix[j, j]:
            if j == m - 1:
                row.fill(math.nan)
                return
            # The unknown is separated from all others, and its part of the row is zero.
            for k in range(j):
                matrix[j, k] = 0.0
            for i in range(j + 1, m):
                matrix[i, j] = 0.0
            matrix[j, j] = 1.0
            continue
        root = math.sqrt(pivot)
        matrix[j, j] = root
        for i in range(j + 1, m):
            total = matrix[i, j]
            for k in range(j):
                total -= matrix[i, k] * matrix[j, k]
            matrix[i, j] = total / root
    last = m - 1
    row[last] = 1.0 / (matrix[last, last] * matrix[last, last])
    for i in range(last - 1, -1, -1):
        total = 0.0
        for k in range(i + 1, m):
            total -= matrix[k, i] * row[k]
        row[i] = total / matrix[i, i]


@compiled_helper
def _estimate_variance(
    i: int,
    start: np.ndarray,
    neighbour: np.ndarray,
    product: np.ndarray,
    weighted: np.ndarray,
    diagonal: np.ndarray,
    weighted_diagonal: np.ndarray,
    level_effect: np.ndarray,
    least: float,
    chosen: np.ndarray,
    place: np.ndarray,
    matrix: np.ndarray,
    row: np.ndarray,
) -> float:
    """Return the variance of a flux, from the covariance with the sources around it.

    The solution is linear in the pixels, so that their variances, and those of the levels, go
    through the inverse of the normal matrix. The windows of levels of overlapping stamps are
    nearly the same, so that their errors are taken as one.
    """
    count = _choose_closest(i, start, neighbour, product, diagonal, least, chosen, place, row)
    for a in range(count):
        member = chosen[a]
        for b in range(a):
            matrix[a, b] = 0.0
        matrix[a, a] = diagonal[member]
        for k in range(start[member], start[member + 1]):
            b = place[neighbour[k]]
            if 0 <= b < a:
                matrix[a, b] = product[k]
    _find_last_row(matrix, count, row)
    variance = level = 0.0
    for a in range(count):
        member = chosen[a]
        total = weighted_diagonal[member] * row[a]
        for k in range(start[member], start[member + 1]):
            b = place[neighbour[k]]
            if b >= 0:
                total += weighted[k] * row[b]
        variance += row[a] * total
        level += row[a] * level_effect[member]
    for a in range(count):
        place[chosen[a]] = -1
    return variance + level * level


@compiled_helper
def _add_fluxes(
    i: int,
    start: np.ndarray,
    neighbour: np.ndarray,
    stamps: np.ndarray,
    corners: np.ndarray,
    flux: np.ndarray,
    border: int,
    light: np.ndarray,
) -> None:
    """Fill in the light of all other sources on the stamp of a source, and `border` around it."""
    size, wide = stamps.shape[1], len(light)
    light.fill(0.0)
    for k in range(start[i], start[i + 1]):
        j = neighbour[k]
        if flux[j] == 0.0:
            continue
        down = corners[j, 0] - corners[i, 0] + border
        right = corners[j, 1] - corners[i, 1] + border
        for row in range(max(down, 0), min(wide, size + down)):
            for column in range(max(right, 0), min(wide, size + right)):
                light[row, column] += flux[j] * stamps[j, row - down, column - right]


@compiled_helper
def _find_border(size: int, r: float) -> int:
    """Return how many pixels a circle around a source may extend beyond its stamp."""
    return max(math.ceil(r) - size // 2, 0)


@compiled_helper
def _find_root(parent: np.ndarray, i: int) -> int:
    """Return the representative of a group, and shorten the way to it."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@compiled
def find_linked(corners: np.ndarray, is_seed: np.ndarray, size: int, r: float) -> np.ndarray:
    """Find the sources that have to do with some of them, directly or through others.

    Parameters
    ----------
    corners : (n, 2) int array
        Row and column of the first pixel of each stamp, or of another pixel in the same place
        of all, ordered by row.
    is_seed : (n,) bool array
        The sources that it is about.
    size : int
        Rows and columns of a stamp.
    r : float
        Radius of the aperture, pixels.

    Returns
    -------
    (n,) bool array
        Which sources may have light on the stamp or in the aperture of one of these, or of
        another that may have, and so on.
    """
    n, reach = len(corners), size + _find_border(size, r)
    parent = np.arange(n)
    for i in range(n):
        for j in range(i + 1, n):
            if corners[j, 0] - corners[i, 0] >= reach:
                break
            if abs(corners[j, 1] - corners[i, 1]) < reach:
                parent[_find_root(parent, j)] = _find_root(parent, i)
    has_seed = np.zeros(n, np.bool_)
    for i in range(n):
        if is_seed[i]:
            has_seed[_find_root(parent, i)] = True
    linked = np.empty(n, np.bool_)
    for i in range(n):
        linked[i] = has_seed[_find_root(parent, i)]
    return linked


@compiled
def examine_pairs(
    corners: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    is_contaminant: np.ndarray,
    size: int,
    r: float,
    same: float,
) -> tuple[int, np.ndarray]:
    """Count the pairs of sources that have to do with each other, and find doubles.

    Parameters
    ----------
    corners : (n, 2) int array
        Row and column of the first pixel of each stamp, ordered by row.
    x, y : (n,) float array
        0-based pixel positions.
    is_contaminant : (n,) bool array
        Which of them are contaminants.
    size : int
        Rows and columns of a stamp.
    r : float
        Radius of the aperture, pixels.
    same : float
        A contaminant this close to a source that is none is the same, pixels.

    Returns
    -------
    pairs : int
        Of which one may have light on the stamp or in the aperture of the other.
    is_double : (n,) bool array
        Contaminants that are in the catalogue, too.
    """
    n = len(corners)
    is_double = np.zeros(n, np.bool_)
    for i in range(n):
        for j in range(i + 1, n):
            if corners[j, 0] - corners[i, 0] > 1 + same:
                break
            if is_contaminant[i] != is_contaminant[j]:
                is_near = math.hypot(x[i] - x[j], y[i] - y[j]) <= same
                is_double[i if is_contaminant[i] else j] |= is_near
    reach = size + _find_border(size, r)
    return _count_pairs(corners, reach, np.empty(n, np.int64)), is_double


@compiled
def fit_stamps(
    values: np.ndarray,
    variances: np.ndarray,
    masks: np.ndarray,
    bad: uint32,
    stamps: np.ndarray,
    corners: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    r: float,
    level: np.ndarray,
    level_error: np.ndarray,
) -> Fit:
    """Fit the fluxes of all sources of a frame together, with uniform weights.

    Parameters
    ----------
    values, variances, masks : (n, size, size) array
        Pixels of the stamps, from `read_stamps`.
    bad : uint32
        Bits of bad pixels in the aperture.
    stamps : (n, size, size) float array
        PSF of each source.
    corners : (n, 2) int array
        Row and column of the first pixel of each stamp, ordered by row.
    x, y : (n,) float array
        0-based pixel positions.
    r : float
        Aperture radius, pixels.
    level, level_error : (n,) float array
        Background of each source and its error, in result units.

    Returns
    -------
    Fit
        One number a source.
    """
    n, size = len(x), stamps.shape[1]
    border = _find_border(size, r)
    counts = np.empty(n, np.int64)
    _count_pairs(corners, size + border, counts)
    start, neighbour = _list_neighbours(corners, size + border, counts)

    # The normal equations.
    diagonal, weighted_diagonal, right = np.zeros(n), np.zeros(n), np.zeros(n)
    level_effect, fraction = np.zeros(n), np.zeros(n)
    usable = np.zeros(n, np.int64)
    for i in range(n):
        whole = 0.0
        for row in range(size):
            for column in range(size):
                p, v = stamps[i, row, column], variances[i, row, column]
                whole += p * p
                if v > 0.0:
                    usable[i] += 1
                    diagonal[i] += p * p
                    weighted_diagonal[i] += p * p * v
                    right[i] += p * (values[i, row, column] - level[i])
                    level_effect[i] += p * level_error[i]
        fraction[i] = diagonal[i] / whole if whole > 0.0 else 0.0
        if not fraction[i] >= LEAST_PART:
            diagonal[i] = 0.0
    product, weighted = np.zeros(len(neighbour)), np.zeros(len(neighbour))
    separation = np.full(n, math.inf)
    for i in range(n):
        for k in range(start[i], start[i + 1]):
            j = neighbour[k]
            separation[i] = min(separation[i], math.hypot(x[i] - x[j], y[i] - y[j]))
            if diagonal[i] > 0.0 and diagonal[j] > 0.0:
                product[k], weighted[k] = _multiply_stamps(stamps, variances, corners, i, j)

    flux = np.zeros(n)
    members, begin = _list_groups(start, neighbour, product, diagonal)
    work = np.zeros((3, n))
    least = np.zeros(n)
    for g in range(len(begin) - 1):
        group = members[begin[g] : begin[g + 1]]
        if len(group) > CLOSEST + 1:
            for i in group:
                least[i] = LEAST_EFFECT
        if len(group) == 1:
            flux[group[0]] = right[group[0]] / diagonal[group[0]]
        else:
            _solve_group(group, start, neighbour, product, diagonal, right, flux, work)

    flux_error, chi2 = np.full(n, math.nan), np.full(n, math.nan)
    neighbours, bad_share = np.empty(n), np.empty(n)
    chosen, place = np.empty(CLOSEST + 1, np.int32), np.full(n, -1, np.int32)
    matrix, inverse_row = np.empty((CLOSEST + 1, CLOSEST + 1)), np.empty(CLOSEST + 1)
    wide = size + 2 * border
    light, fractions = np.empty((wide, wide)), np.empty((wide, wide))
    edges = np.empty((5, wide + 1))
    for i in range(n):
        if start[i + 1] > start[i]:
            _add_fluxes(i, start, neighbour, stamps, corners, flux, border, light)
        else:
            light.fill(0.0)
        if diagonal[i] > 0.0:
            flux_error[i] = math.sqrt(
                _estimate_variance(
                    i, start, neighbour, product, weighted, diagonal, weighted_diagonal,
                    level_effect, least[i], chosen, place, matrix, inverse_row,
                )
            )  # fmt: skip
            chi2[i] = 0.0
            for row in range(size):
                for column in range(size):
                    if variances[i, row, column] > 0.0:
                        model = level[i] + flux[i] * stamps[i, row, column]
                        residual = (
                            values[i, row, column] - model - light[row + border, column + border]
                        )
                        chi2[i] += residual * residual / variances[i, row, column]
            chi2[i] = chi2[i] / (usable[i] - 1) if usable[i] > 1 else math.nan
        fill_fractions(
            corners[i, 0] - border, corners[i, 1] - border, wide, wide, x[i], y[i], r, edges,
            fractions,
        )  # fmt: skip
        total = inside = on_bad = 0.0
        for row in range(wide):
            for column in range(wide):
                share = fractions[row, column]
                if share <= SMALLEST_FRACTION:
                    continue
                total += share * light[row, column]
                j, k = row - border, column - border
                if 0 <= j < size and 0 <= k < size:
                    p = share * stamps[i, j, k]
                    inside += p
                    if masks[i, j, k] & bad:
                        on_bad += p
        neighbours[i] = total
        bad_share[i] = on_bad / inside if inside > 0.0 else math.nan
    for i in range(n):
        if diagonal[i] <= 0.0:
            flux[i] = math.nan
    return Fit(flux, flux_error, chi2, fraction, neighbours, bad_share, separation)
