"""Which rows of a frame its sources need, and which more the fit of the zodiacal light needs."""

from __future__ import annotations

import numpy as np

from spxdask.errors import MissingRowsError
from spxdask.science.kernels.background import Region
from spxdask.science.kernels.zodi import ZodiSums
from spxdask.science.level2.frame import Frame

__all__ = [
    "choose_spread_rows",
    "find_share",
    "find_stamp_rows",
    "find_window_rows",
    "is_fit_poor",
    "require_rows",
]

# The scale of the zodiacal light from this many pixels moves a background by less than a third of
# its error, as that of a window is from 2,500 pixels at most.
LEAST_CLEAR_PIXELS = 25_000
# The scale is fitted when half of the pixels are clear. Where the share in the rows of the sources
# is this close to one half, that of the frame may be on the other side.
NEAR_HALF = 0.1
# The rows that are added then, in bands spread evenly over the frame. They tell the share of clear
# pixels to 0.01.
SPREAD_BANDS = 16
ROWS_OF_BAND = 2


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


def choose_spread_rows(ny: int) -> np.ndarray:
    """Return rows that are spread over a frame, the same for all frames of this height.

    Parameters
    ----------
    ny : int
        Rows of the frame.

    Returns
    -------
    (ny,) bool array
    """
    first = np.floor((np.arange(SPREAD_BANDS) + 0.5) * ny / SPREAD_BANDS)
    return _mark(ny, first, first + ROWS_OF_BAND - 1)


def is_fit_poor(sums: ZodiSums, pixels: int, is_subtracted: bool) -> bool:
    """Return whether some rows do not tell enough of the zodiacal light of their frame.

    Parameters
    ----------
    sums : ZodiSums
        Of these rows.
    pixels : int
        Their number of pixels.
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
    if not is_subtracted:
        return False
    above_half = sums.clear - 0.5 * pixels
    if abs(above_half) <= NEAR_HALF * pixels:
        return True
    return above_half > 0 and sums.clear < LEAST_CLEAR_PIXELS


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
