"""Which rows of a frame its sources need, and which more the fit of the zodiacal light needs."""

from __future__ import annotations

import numpy as np

from spxdask.errors import MissingRowsError
from spxdask.science.kernels.background import Region
from spxdask.science.kernels.pixels import Planes
from spxdask.science.kernels.statistics import Bracket
from spxdask.science.kernels.zodi import NO_SUMS, ZodiSums, sum_zodi
from spxdask.science.level2.frame import Frame

__all__ = [
    "MORE_BANDS",
    "find_share",
    "find_spread_rows",
    "find_stamp_rows",
    "find_window_rows",
    "is_fit_poor",
    "require_rows",
    "sum_zodi_of_rows",
    "weigh_rows",
]

# Light that is not in the model of the zodiacal light, such as a gradient, is in its scale, which
# would be another one from rows in one place only. So a fit always sees some bands of rows that are
# spread evenly over the frame, each of which stands for the rows around it. Fewer and broader bands
# of as many rows are fewer requests, but were seen to move a background by more than its error.
BANDS = 16
ROWS_OF_BAND = 2
# There are more of them where these do not tell enough.
MORE_BANDS = 48
# The scale from this many pixels moves a background by less than a third of its error, as that of
# a window is from 2,500 pixels at most.
LEAST_CLEAR_PIXELS = 25_000
# The scale is fitted when half of the pixels are clear. The bands tell this share to 0.01.
NEAR_HALF = 0.03


def find_window_rows(ny: int, y: np.ndarray, radius: float, region: Region) -> np.ndarray:
    """Return the rows of the apertures and of the regions of the background of some sources.

    Parameters
    ----------
    ny : int
        Rows of the frame.
    y : (n,) float array
        0-based pixel positions.
    radius : float
        Of the aperture, pixels.
    region : Region
        Of the background, with all that it may grow to.

    Returns
    -------
    (ny,) bool array
        Exactly the rows that `spxdask.science.kernels.sources.measure_sources` reads.
    """
    half = 0.5 * region.height
    windows = _mark(ny, np.floor(y - half), np.ceil(y + half) - 1)
    return windows | _mark(ny, np.floor(y - radius + 0.5), np.ceil(y + radius - 0.5))


def find_stamp_rows(ny: int, y: np.ndarray, size: int) -> np.ndarray:
    """Return the rows of the stamps of some sources.

    Parameters
    ----------
    ny : int
        Rows of the frame.
    y : (n,) float array
        0-based pixel positions.
    size : int
        Rows of a stamp.

    Returns
    -------
    (ny,) bool array
        Exactly the rows that `spxdask.science.kernels.psf_fit.fit_stamps` reads.
    """
    first = np.floor(y + 0.5) - size // 2
    return _mark(ny, first, first + size - 1)


def find_spread_rows(ny: int, bands: int = BANDS) -> np.ndarray:
    """Return rows that are spread over a frame, the same for all frames of this height.

    Parameters
    ----------
    ny : int
        Rows of the frame.
    bands : int
        Number of bands.

    Returns
    -------
    (ny,) bool array
    """
    first = np.floor((np.arange(bands) + 0.5) * ny / bands - ROWS_OF_BAND / 2)
    return _mark(ny, first, first + ROWS_OF_BAND - 1)


def weigh_rows(rows: np.ndarray) -> np.ndarray:
    """Return how many rows of a frame each of some rows stands for.

    Parameters
    ----------
    rows : (ny,) bool array
        The rows, at least one.

    Returns
    -------
    (ny,) float array
        1 for each of these, and as much more for those at the ends of a band that a gap is shared
        by the nearest rows on both sides of it. Zero for all others, and ny in sum.
    """
    ny = len(rows)
    weights = rows.astype(float)
    edges = np.flatnonzero(np.diff(rows, prepend=False, append=False))
    firsts, lasts = edges[::2], edges[1::2]
    gaps = firsts[1:] - lasts[:-1]
    before, after = np.append(firsts[0], gaps / 2), np.append(gaps / 2, ny - lasts[-1])
    for first, last, below, above in zip(firsts, lasts, before, after, strict=True):
        width = min(ROWS_OF_BAND, last - first)
        weights[first : first + width] += below / width
        weights[last - width : last] += above / width
    return weights


def sum_zodi_of_rows(
    planes: Planes, excluded: np.uint32, rows: np.ndarray, bracket: Bracket
) -> tuple[ZodiSums, float]:
    """Estimate the sums of `sum_zodi` over a whole frame from some of its rows.

    Parameters
    ----------
    planes : Planes
        The frame.
    excluded : uint32
        The bad bits and the SOURCE bit.
    rows : (ny,) bool array
        The rows that are used, at least one.
    bracket : Bracket
        From `spxdask.science.kernels.statistics.bracket_median` of these rows; gets all their
        variances.

    Returns
    -------
    sums : ZodiSums
        Each row stands for those around it (`weigh_rows`), but in `clear` and `unflagged`, which
        are numbers of pixels in the rows used.
    share : float
        That of clear pixels in the frame.
    """
    weights = weigh_rows(rows)
    total, clear = NO_SUMS, 0.0
    # All rows of a weight together: those of a whole frame are summed in one pass.
    for weight in np.unique(weights[rows]).tolist():
        sums = sum_zodi(planes, excluded, np.flatnonzero(weights == weight), bracket)
        total = total.add(sums, weight)
        clear += weight * sums.clear
    return total, clear / planes.image.size


def is_fit_poor(sums: ZodiSums, share: float, is_subtracted: bool) -> bool:
    """Return whether some rows do not tell enough of the zodiacal light of their frame.

    Parameters
    ----------
    sums : ZodiSums
        From `sum_zodi_of_rows`.
    share : float
        That of clear pixels.
    is_subtracted : bool
        Whether zodiacal light is subtracted at all.

    Returns
    -------
    bool
        True if they have too few clear pixels, or so nearly one half that the frame may have more
        or fewer; also if no pixel or variance is valid, as others may be.
    """
    if not (sums.finite and sums.valid):
        return True
    if not is_subtracted or share < 0.5 - NEAR_HALF:
        return False
    return share <= 0.5 + NEAR_HALF or sums.clear < LEAST_CLEAR_PIXELS


def find_share(frame: Frame, rows: np.ndarray) -> float:
    """Return which share of a file some rows of its planes make.

    Parameters
    ----------
    frame : Frame
        The frame, or its head.
    rows : (ny,) bool array
        The rows.

    Returns
    -------
    float
        0 to 1; the four planes are taken as if they were not compressed.
    """
    pixels = np.count_nonzero(rows) * frame.shape[1]
    return min(4 * 4 * pixels / max(frame.file_bytes, 1), 1.0)


def require_rows(frame: Frame, rows: np.ndarray) -> None:
    """Raise an error unless rows of a frame may be used.

    Parameters
    ----------
    frame : Frame
        The frame.
    rows : (ny,) bool array
        The rows.

    Raises
    ------
    MissingRowsError
        If one of them may not; it has all of these.
    """
    if frame.rows is None:
        return
    missing = rows & ~frame.rows
    if missing.any():
        raise MissingRowsError(
            f"{np.count_nonzero(missing)} rows of the frame are needed that were not read",
            rows=missing,
        )


def _mark(ny: int, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return the rows of some bands, each from its first row to its last."""
    first, last = np.clip(first, 0, ny), np.clip(last + 1, 0, ny)
    use = first < last
    steps = np.zeros(ny + 1, np.int64)
    np.add.at(steps, first[use].astype(np.int64), 1)
    np.add.at(steps, last[use].astype(np.int64), -1)
    return np.cumsum(steps[:-1]) > 0
