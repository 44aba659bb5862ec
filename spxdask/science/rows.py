"""Which rows of a frame its sources need, and which more the fit of the zodiacal light needs."""

from __future__ import annotations

import math

import numpy as np

from spxdask.errors import MissingRowsError
from spxdask.science.kernels.background import Region
from spxdask.science.kernels.pixels import Planes
from spxdask.science.kernels.statistics import Bracket, bracket_median
from spxdask.science.kernels.zodi import ZodiSums, sum_zodi
from spxdask.science.level2.frame import Frame

__all__ = [
    "BANDS",
    "MORE_BANDS",
    "find_bands",
    "find_share",
    "find_spread_rows",
    "find_stamp_rows",
    "find_window_rows",
    "is_fit_poor",
    "is_half_clear",
    "require_rows",
    "sum_zodi_of_rows",
]

# The fit sees bands of rows that are spread evenly over the frame, and nothing else, so that it is
# the same whichever sources are on the frame. Light that is not in the model of the zodiacal light,
# such as a gradient, is in its scale, and the rows of sources would have too much of the light that
# is there. Each band takes a request for each plane. Fewer of them miss structure in that
# light; broader ones tell little more, as they have the light and the masks of the same stars.
BANDS = 8
ROWS_OF_BAND = 3
# There are more of them where these do not tell enough.
MORE_BANDS = 48
# The scale from this many pixels moves a background by less than a third of its error, as that of
# a window is from 2,500 pixels at most.
LEAST_CLEAR_PIXELS = 20_000
# The scale is fitted when half of the pixels are clear. The bands tell this share to 0.01, and more
# bands to 0.003. A wrong answer costs a background many times its error.
NEAR_HALF = 0.03
STILL_NEAR_HALF = 0.01
# Bands are divided along x into blocks of as many pixels at least. They are wider than what is
# masked around a star, and so narrow that light hardly changes within them.
LEAST_BLOCK_PIXELS = 100
# Cells, one block of one band, with a smaller share of clear pixels tell too little.
LEAST_CLEAR_SHARE = 0.1
# A slope of the share of clear pixels counts if it is this many times its error.
SIGNIFICANT = 3.0


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


def find_bands(ny: int, bands: int = BANDS) -> np.ndarray:
    """Return bands of rows that are spread over a frame, the same for all frames of this height.

    Parameters
    ----------
    ny : int
        Rows of the frame.
    bands : int
        Number of bands.

    Returns
    -------
    (bands, m) int array
        The rows of each band, which is in the middle of one of so many equal parts of the frame.
    """
    first = np.floor((np.arange(bands) + 0.5) * ny / bands - (ROWS_OF_BAND - 1) / 2)
    rows = first.astype(np.int64)[:, np.newaxis] + np.arange(ROWS_OF_BAND)
    return np.clip(rows, 0, ny - 1)


def find_spread_rows(ny: int, bands: int = BANDS) -> np.ndarray:
    """Return the rows of `find_bands`.

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
    rows = np.zeros(ny, bool)
    rows[find_bands(ny, bands)] = True
    return rows


def sum_zodi_of_rows(
    planes: Planes, excluded: np.uint32, rows: np.ndarray, bands: np.ndarray | None
) -> tuple[ZodiSums, float, Bracket]:
    """Compute the sums of `sum_zodi` over a frame, or estimate them from some bands of it.

    Where a band happens to have more clear pixels than the frame has thereabouts, it would have too
    much weight, and so would light that is there and not in ZODI. So each block of a band is
    weighted as if the share of clear pixels were the same everywhere, or rose evenly over
    the frame, if it clearly does.

    Parameters
    ----------
    planes : Planes
        The frame.
    excluded : uint32
        The bad bits and the SOURCE bit.
    rows : (ny,) bool array
        The rows that are used for anything, those of the bands included.
    bands : (n, m) int array or None
        The rows that are used for the fit, from `find_bands`; None for all of the frame.

    Returns
    -------
    sums : ZodiSums
        Of the whole frame, or of the bands, with weights. Not weighted is `clear`, of the bands;
        `unflagged`, `finite` and `valid` are of all rows that are used.
    share : float
        That of clear pixels in the frame.
    bracket : Bracket
        With all variances of the whole frame, or of the bands.
    """
    ny, nx = planes.image.shape
    if bands is None:
        bracket = bracket_median(planes.variance, np.arange(ny), planes.factors)
        [found] = sum_zodi(planes, excluded, np.arange(ny)[np.newaxis], bracket).tolist()
        whole = ZodiSums(*found)
        return whole, whole.clear / (ny * nx), bracket
    bracket = bracket_median(planes.variance, bands.ravel(), planes.factors)
    blocks = max(n for n in range(1, max(nx // LEAST_BLOCK_PIXELS, 1) + 1) if nx % n == 0)
    # As if each row were as many rows of one block.
    shape = -1, nx // blocks
    factors = None if planes.factors is None else planes.factors.reshape(shape)
    image, variance, zodi, flags = (plane.reshape(shape) for plane in planes[:4])
    cut = Planes(image, variance, zodi, flags, factors)
    cells = bands[:, np.newaxis] * blocks + np.arange(blocks)[:, np.newaxis]
    found = sum_zodi(cut, excluded, cells.reshape(-1, bands.shape[1]), bracket)
    fields = found.T.reshape(-1, len(bands), blocks)
    # Nothing of these rows enters the fit, but they must tell when a variance is wrong.
    apart = rows.copy()
    apart[bands] = False
    at = np.flatnonzero(apart)[np.newaxis]
    beside = bracket_median(planes.variance, at[0], planes.factors)
    others = ZodiSums(*sum_zodi(planes, excluded, at, beside)[0].tolist())
    *weighted, clear, unflagged, finite, valid = fields
    shares = clear * blocks / bands[0].size / nx
    used = shares >= LEAST_CLEAR_SHARE
    weights = np.where(used, _smooth(shares, used) / np.where(used, shares, 1.0), 0.0)
    # Exact sums, which are the same on all machines.
    izw, zzw, iz, zz = (math.fsum((weights * field).flat) for field in weighted)
    sums = ZodiSums(
        weighted_iz=izw,
        weighted_zz=zzw,
        iz=iz,
        zz=zz,
        clear=float(clear.sum()),
        unflagged=float(unflagged.sum()) + others.unflagged,
        finite=max(float(finite.max()), others.finite),
        valid=max(float(valid.max()), others.valid),
    )
    return sums, sums.clear / (bands.size * nx), bracket


def _smooth(shares: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Return shares of clear pixels without their noise: a plane, of significant slopes alone."""
    n = np.count_nonzero(used)
    flat = np.full(shares.shape, math.fsum(shares[used]) / n if n else 1.0)
    ny, nx = shares.shape
    y, x = np.meshgrid(
        (2 * np.arange(ny) + 1) / ny - 1, (2 * np.arange(nx) + 1) / nx - 1, indexing="ij"
    )
    terms = np.stack([np.ones(n), x[used], y[used]], axis=1)
    if n < 4 or np.linalg.matrix_rank(terms) < 3:
        return flat
    inverse = np.linalg.inv(terms.T @ terms)
    fitted = inverse @ terms.T @ shares[used]
    scatter = ((shares[used] - terms @ fitted) ** 2).sum() / (n - 3)
    errors = np.sqrt(scatter * np.diag(inverse))
    # The last digits are not the same on all machines.
    _, along_x, along_y = np.where(abs(fitted) > SIGNIFICANT * errors, fitted, 0.0).round(9)
    plane = along_x * x + along_y * y
    return np.clip(flat + plane - math.fsum(plane[used]) / n, LEAST_CLEAR_SHARE, 1.0)


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


def is_half_clear(share: float, is_subtracted: bool) -> bool:
    """Return whether only all rows tell if zodiacal light is fitted to a frame.

    Parameters
    ----------
    share : float
        That of clear pixels in many bands.
    is_subtracted : bool
        Whether zodiacal light is subtracted at all.

    Returns
    -------
    bool
        True if it is one half within its error.
    """
    return is_subtracted and abs(share - 0.5) <= STILL_NEAR_HALF


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
