"""The scale of the zodiacal light of a frame, from all of its rows, or from bands of them.

Light that is not in ZODI, such as a slope or cirrus, is in the scale with its mean over the clear
pixels of the frame. Bands of rows give this mean with an error, which their own scatter tells:

- the noise of their pixels;
- light that changes between bands otherwise than evenly: the scatter of each band about the mean
  of its neighbours, where there is more of it than noise;
- chance in the masks: a slope of the light counts with the slope of the share of clear pixels,
  which is known with an error;
- rows at the edges that no band sees, and which may have no clear pixel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from spxdask.errors import FrameError
from spxdask.science.kernels.pixels import Planes
from spxdask.science.kernels.statistics import Bracket, bracket_median, find_positive_median
from spxdask.science.kernels.zodi import ZodiSums, sum_zodi
from spxdask.science.options import PhotometryConfig
from spxdask.science.rows import Look

__all__ = ["ZodiFit", "fit_zodi"]

# A scale is taken to be within so many times its error.
SURE = 2.5
# The scale is fitted when half of the pixels are clear. Bands tell this share to 0.01, and those of
# the second look to 0.003. A wrong answer costs a background many times its error.
NEAR_HALF = 0.03
STILL_NEAR_HALF = 0.01
# Bands are divided along x into blocks of as many pixels at least. They are wider than what is
# masked around a star, and so narrow that light hardly changes within them.
LEAST_BLOCK_PIXELS = 100
# Cells, one block of one band, with a smaller share of clear pixels tell too little.
LEAST_CLEAR_SHARE = 0.1
# Chi^2 from which the two slopes of the share of clear pixels count, which chance gives to one
# frame of 400; and the slope, from the middle to an edge, that may be there before any is seen, as
# a part of the share.
SIGNIFICANT_SLOPES = 12.0
UNSEEN_SLOPE = 0.01
# Light is not even if the cells scatter about a plane by so many times the variance of their
# noise, or the bands about their neighbours; chance does it in less than one frame of 1,000.
UNEVEN_CELLS = 1.5
UNEVEN_BANDS = 4.0
# Rows at one of the edges that may have no clear pixel where bands do not see it: the dichroic
# takes 12 rows of two of six detectors, of which this is the root mean square.
UNSEEN_ROWS = 7.0
# The scatter of bands about their neighbours is from as many of them at least.
LEAST_TRIPLES = 3


class ZodiFit(NamedTuple):
    """What all pixels of a frame tell together, or those of some rows.

    Attributes
    ----------
    scale : float
        Of ZODI, 0 if it is not subtracted.
    reach : float
        The scale from all rows is taken to differ by no more than this.
    is_fitted : bool
        Whether it was fitted.
    unflagged : int
        Number of pixels with an invalid variance and no flag.
    n_rows : int
        Number of rows that scale and median are from.
    median_variance : callable
        Returns the median of all valid variances.
    """

    scale: float
    reach: float
    is_fitted: bool
    unflagged: int
    n_rows: int
    median_variance: Callable[[], float]


class _Seen(NamedTuple):
    """What a look at a frame tells.

    Attributes
    ----------
    sums : ZodiSums
        Those of the frame, up to a factor.
    share : float
        That of clear pixels in the frame.
    doubt : float
        How much this share may be wrong.
    rows : (n,) int array
        The rows that were fitted.
    bracket : Bracket
        With all variances of these rows.
    estimate_error : callable
        Returns the error of the scale that it is given.
    """

    sums: ZodiSums
    share: float
    doubt: float
    rows: np.ndarray
    bracket: Bracket
    estimate_error: Callable[[float], float]


class _Cells(NamedTuple):
    """Blocks of the groups of rows of a look, from the lowest group to the highest.

    Attributes
    ----------
    fields : (8, n, blocks) float array
        Those of `ZodiSums`.
    shares : (n, blocks) float array
        Of clear pixels.
    is_used : (n, blocks) bool array
        Whether these are enough.
    middle : (n,) float array
        Of each group, in rows from the edge of the frame.
    height : (n,) float array
        Rows of each group.
    is_band : (n,) bool array
        Whether it is one of the even bands.
    ny : int
        Rows of the frame.
    """

    fields: np.ndarray
    shares: np.ndarray
    is_used: np.ndarray
    middle: np.ndarray
    height: np.ndarray
    is_band: np.ndarray
    ny: int

    @property
    def plane(self) -> np.ndarray:
        """The terms of a plane, 1, x, y, of which x and y are from -1 to 1: (n, blocks, 3)."""
        n, blocks = self.shares.shape
        x = np.broadcast_to((2 * np.arange(blocks) + 1) / blocks - 1, (n, blocks))
        y = np.broadcast_to((2 * self.middle / self.ny - 1)[:, np.newaxis], (n, blocks))
        return np.stack([np.ones((n, blocks)), x, y], axis=2)

    @property
    def represented(self) -> np.ndarray:
        """Rows of the frame that each group stands for: exact for light that changes evenly."""
        y = np.concatenate([-self.middle[:1], self.middle, 2 * self.ny - self.middle[-1:]])
        return (y[2:] - y[:-2]) / 2


def fit_zodi(
    planes: Planes,
    excluded: np.uint32,
    rows: np.ndarray,
    look: Look | None,
    config: PhotometryConfig,
) -> ZodiFit | None:
    """Fit the scale of ZODI to IMAGE.

    Parameters
    ----------
    planes : Planes
        The frame.
    excluded : uint32
        The bad bits and the SOURCE bit.
    rows : (ny,) bool array
        The rows that are used for anything, those of the look included.
    look : Look or None
        The rows that are used for the fit; None for all of the frame.
    config : PhotometryConfig
        Whether zodiacal light is subtracted, and limits of the scale.

    Returns
    -------
    ZodiFit or None
        None if the look does not tell whether the scale is to be fitted, or nothing at all.

    Raises
    ------
    FrameError
        If no pixel of the frame has a finite value, or none a valid variance.
    """
    seen = _see_all(planes, excluded) if look is None else _see_groups(planes, excluded, rows, look)
    sums, share = seen.sums, seen.share
    if not (sums.finite and sums.valid):
        if look is not None:
            return None
        what = "VARIANCE has no finite positive" if sums.finite else "IMAGE has no finite"
        raise FrameError(f"{what} pixel")

    @functools.cache
    def median_variance() -> float:
        median = find_positive_median(planes.variance, seen.rows, planes.factors, seen.bracket)
        return float(median)

    fit = ZodiFit(1.0, 0.0, False, int(sums.unflagged), len(seen.rows), median_variance)
    if not config.subtract_zodi:
        return fit._replace(scale=0.0)
    if share < 0.5 - seen.doubt:
        return fit
    if seen.doubt and share <= 0.5 + seen.doubt:
        return None
    izw, zzw = sums.weighted_iz, sums.weighted_zz
    if sums.zz > 0:
        weight = 1.0 / median_variance()
        izw, zzw = izw + weight * sums.iz, zzw + weight * sums.zz
    scale = izw / zzw if zzw > 0 else math.nan
    reach = SURE * seen.estimate_error(scale)
    low, high = config.zodi_scale_min, config.zodi_scale_max
    if low < scale - reach and scale + reach <= high:
        return fit._replace(scale=scale, reach=reach, is_fitted=True)
    is_beyond = scale + reach <= low or high < scale - reach
    return fit if look is None or is_beyond else None


def _see_all(planes: Planes, excluded: np.uint32) -> _Seen:
    """Look at all rows."""
    ny, nx = planes.image.shape
    rows = np.arange(ny)
    bracket = bracket_median(planes.variance, rows, planes.factors)
    [found] = sum_zodi(planes, excluded, rows[np.newaxis], bracket).tolist()
    sums = ZodiSums(*found)
    return _Seen(sums, sums.clear / (ny * nx), 0.0, rows, bracket, lambda scale: 0.0)


def _see_groups(planes: Planes, excluded: np.uint32, rows: np.ndarray, look: Look) -> _Seen:
    """Look at groups of rows; of the other rows that are used, only numbers and marks count."""
    bracket = bracket_median(planes.variance, look.rows, planes.factors)
    cells = _sum_cells(planes, excluded, look, bracket)
    smooth, is_tilted = _smooth(cells)
    weights = _weigh(cells, smooth)
    return _Seen(
        sums=_add_up(cells, weights, _sum_others(planes, excluded, rows, look)),
        share=float(np.average(cells.shares.mean(axis=1), weights=cells.represented)),
        doubt=STILL_NEAR_HALF if len(look.edges) else NEAR_HALF,
        rows=look.rows,
        bracket=bracket,
        estimate_error=functools.partial(_estimate_error, cells, weights, smooth, is_tilted),
    )


def _sum_cells(planes: Planes, excluded: np.uint32, look: Look, bracket: Bracket) -> _Cells:
    """Compute the sums of `sum_zodi` over each cell of a look."""
    ny, nx = planes.image.shape
    blocks = max(n for n in range(1, max(nx // LEAST_BLOCK_PIXELS, 1) + 1) if nx % n == 0)
    # As if each row were as many rows of one block.
    shape = -1, nx // blocks
    factors = None if planes.factors is None else planes.factors.reshape(shape)
    image, variance, zodi, flags = (plane.reshape(shape) for plane in planes[:4])
    cut = Planes(image, variance, zodi, flags, factors)
    found = []
    for group in look.groups:
        cells = group[:, np.newaxis] * blocks + np.arange(blocks)[:, np.newaxis]
        sums = sum_zodi(cut, excluded, cells.reshape(-1, group.shape[1]), bracket)
        found.append(sums.reshape(len(group), blocks, -1))
    middle = np.concatenate([group.mean(axis=1) + 0.5 for group in look.groups])
    height = np.concatenate([np.full(len(group), group.shape[1]) for group in look.groups])
    order = np.argsort(middle)
    fields = np.moveaxis(np.concatenate(found)[order], 2, 0)
    shares = ZodiSums(*fields).clear / (height[order, np.newaxis] * shape[1])
    return _Cells(
        fields=fields,
        shares=shares,
        is_used=shares >= LEAST_CLEAR_SHARE,
        middle=middle[order],
        height=height[order],
        is_band=order < len(order) - len(look.edges),
        ny=ny,
    )


def _sum_others(planes: Planes, excluded: np.uint32, rows: np.ndarray, look: Look) -> ZodiSums:
    """Compute the sums of rows that do not enter the fit, but tell when a variance is wrong."""
    apart = rows.copy()
    apart[look.rows] = False
    at = np.flatnonzero(apart)
    bracket = bracket_median(planes.variance, at, planes.factors)
    return ZodiSums(*sum_zodi(planes, excluded, at[np.newaxis], bracket)[0].tolist())


def _smooth(cells: _Cells) -> tuple[np.ndarray, bool]:
    """Return shares of clear pixels without their noise: a plane, if its slopes are significant."""
    shares, use = cells.shares, cells.is_used & cells.is_band[:, np.newaxis]
    n = np.count_nonzero(use)
    flat = np.full(shares.shape, math.fsum(shares[use]) / n if n else 1.0)
    terms = cells.plane[use]
    if n < 4 or np.linalg.matrix_rank(terms) < 3:
        return flat, False
    inverse = np.linalg.inv(terms.T @ terms)
    fitted = inverse @ terms.T @ shares[use]
    scatter = ((shares[use] - terms @ fitted) ** 2).sum() / (n - 3)
    # The last digits are not the same on all machines.
    slopes = fitted[1:].round(9)
    if slopes @ np.linalg.solve(inverse[1:, 1:], slopes) <= SIGNIFICANT_SLOPES * scatter:
        return flat, False
    plane = cells.plane[..., 1:] @ slopes
    tilted = flat + plane - math.fsum(plane[use]) / n
    return np.clip(tilted, LEAST_CLEAR_SHARE, 1.0), bool(slopes.any())


def _weigh(cells: _Cells, smooth: np.ndarray) -> np.ndarray:
    """Return weights of the pixels of cells, of which the share of clear ones is given smoothly.

    Where a band happens to have more clear pixels than the frame has thereabouts, it would have too
    much weight, and so would light that is there and not in ZODI. So each cell of a band is
    weighted as if the share of clear pixels were the same everywhere, or rose evenly over the
    frame, if it clearly does. At the edges, the share is what it is.
    """
    shares, is_used = cells.shares, cells.is_used
    wanted = np.where(cells.is_band[:, np.newaxis], smooth, shares)
    pixels = (cells.represented / cells.height)[:, np.newaxis]
    return np.where(is_used, pixels * wanted / np.where(is_used, shares, 1.0), 0.0)


def _add_up(cells: _Cells, weights: np.ndarray, others: ZodiSums) -> ZodiSums:
    """Return the sums of weighted cells; numbers and marks are of the other rows as well."""
    *weighted, clear, unflagged, finite, valid = cells.fields
    # Exact sums, which are the same on all machines.
    izw, zzw, iz, zz = (math.fsum((weights * field).flat) for field in weighted)
    return ZodiSums(
        weighted_iz=izw,
        weighted_zz=zzw,
        iz=iz,
        zz=zz,
        clear=float(clear.sum()),
        unflagged=float(unflagged.sum()) + others.unflagged,
        finite=max(float(finite.max()), others.finite),
        valid=max(float(valid.max()), others.valid),
    )


def _estimate_error(
    cells: _Cells, weights: np.ndarray, smooth: np.ndarray, is_tilted: bool, scale: float
) -> float:
    """Return the error of a scale from cells, against that from all of the frame.

    It is infinite if the cells are too few to tell. The edges, which are a small part of the frame,
    are left out of account.
    """
    is_band = cells.is_band
    sums = ZodiSums(*cells.fields[:, is_band])
    use = cells.is_used[is_band] & (sums.weighted_zz > 0.0)
    n = np.count_nonzero(use)
    if n <= 3:
        return math.inf
    precision = np.where(use, sums.weighted_zz, 1.0)
    # The part that each cell has in the scale, and its light that is neither model nor noise, in
    # units of the scale.
    parts = np.where(use, weights[is_band] * precision, 0.0)
    parts /= parts.sum()
    light = np.where(use, sums.weighted_iz / precision - scale, 0.0)
    noise = (parts**2 / precision).sum()

    root = np.sqrt(precision[use])
    terms = cells.plane[is_band][use]
    plane = np.linalg.lstsq(terms * root[:, np.newaxis], light[use] * root, rcond=None)[0]
    unevenness = (precision[use] * (light[use] - terms @ plane) ** 2).sum() / (n - 3)
    between = _find_scatter(parts, light)
    is_uneven = unevenness > UNEVEN_CELLS or between > UNEVEN_BANDS * noise
    sampling = max(noise, between) if is_uneven else noise

    # Cells without clear pixels are part of what makes the share uncertain.
    deviation = ((cells.shares[is_band] / smooth[is_band] - 1.0) ** 2).mean()
    mean = (parts * light).sum()
    squares = np.where(use, (light - mean) ** 2 - 1.0 / precision, 0.0)
    chance = deviation * max((parts**2 * squares).sum(), 0.0)
    if not is_tilted and cells.is_used[is_band].all():
        # What is known of its slopes before any look counts like another measurement.
        slope = UNSEEN_SLOPE**2
        chance *= slope / (slope + 3.0 * deviation / n)

    unseen = plane[2] * UNSEEN_ROWS / cells.ny if is_band.all() else 0.0
    return math.sqrt(sampling + chance + unseen**2)


def _find_scatter(parts: np.ndarray, light: np.ndarray) -> float:
    """Return the variance of the mean of bands, from each one about the mean of its neighbours.

    It is infinite if too few of them have clear pixels.
    """
    of_bands = parts.sum(axis=1)
    means = np.full(len(parts), np.nan)
    np.divide((parts * light).sum(axis=1), of_bands, out=means, where=of_bands > 0)
    apart = means[1:-1] - 0.5 * (means[:-2] + means[2:])
    apart = apart[np.isfinite(apart)]
    if len(apart) < LEAST_TRIPLES:
        return math.inf
    # Each of these differences has the variance of one band and a half.
    return float((apart**2).mean() / 1.5 / len(means))
