"""Which rows of a frame its sources need, and which more the fit of the zodiacal light needs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from spxdask.errors import MissingRowsError
from spxdask.science.kernels.background import Region
from spxdask.science.level2.frame import Frame

__all__ = [
    "BANDS",
    "ROWS_OF_BAND",
    "Look",
    "find_looks",
    "find_share",
    "find_spread_rows",
    "find_stamp_rows",
    "find_window_rows",
    "require_rows",
]

# The zodiacal light is fitted to bands of rows that are spread evenly over the frame, and to
# nothing else. Light that is not in its model, such as a gradient, is in its scale, and the rows of
# sources would have too much of the light that is there. Each band takes a request for each plane.
# Fewer of them miss structure in that light; broader ones tell little more, as they have the light
# and the masks of the same stars.
BANDS = 8
ROWS_OF_BAND = 3
# At the second look, two more bands are between any two of them. A request costs as much as many
# rows, so they are broader.
MORE_BANDS = 3 * BANDS
ROWS_OF_MORE_BANDS = 8
# Groups of as many rows at either edge, of which parts may have no clear pixels, such as those near
# the edge of the dichroic (12 rows).
EDGE_GROUPS = 3


class Look(NamedTuple):
    """Groups of neighbouring rows that stand for a frame in the zodiacal fit.

    Attributes
    ----------
    bands : tuple of (n, m) int array
        The rows of bands that are spread evenly over the frame; those in one array are of the same
        height.
    edges : (n, m) int array
        The rows of groups that follow one another from either edge; none at the first look.
    """

    bands: tuple[np.ndarray, ...]
    edges: np.ndarray

    @property
    def groups(self) -> tuple[np.ndarray, ...]:
        """All of them, (n, m) int arrays, none of which is empty."""
        return tuple(some for some in (*self.bands, self.edges) if len(some))

    @property
    def rows(self) -> np.ndarray:
        """The rows of all groups, an (n,) int array."""
        return np.concatenate([some.ravel() for some in self.groups])

    def mark_rows(self, ny: int) -> np.ndarray:
        """Return the rows of all groups of a frame.

        Parameters
        ----------
        ny : int
            Rows of the frame.

        Returns
        -------
        (ny,) bool array
        """
        marks = np.zeros(ny, bool)
        marks[self.rows] = True
        return marks


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


def find_looks(ny: int) -> tuple[Look | None, ...]:
    """Return what the zodiacal fit sees of a frame at one look after the other.

    They are the same for all frames of this height, and each has the rows of that before it.

    Parameters
    ----------
    ny : int
        Rows of the frame.

    Returns
    -------
    tuple of Look or None
        None for all rows, which is the last. Looks at frames of too few rows are left out.
    """
    few = _find_bands(ny, BANDS, ROWS_OF_BAND)
    many = _find_bands(ny, MORE_BANDS, ROWS_OF_MORE_BANDS)
    between = many[np.arange(MORE_BANDS) % 3 != 1]
    first = Look((few,), few[:0])
    if not _are_apart(first, ny):
        return (None,)
    # In a low frame, the bands begin nearer to the edge.
    for n_groups in range(EDGE_GROUPS, 0, -1):
        edge = np.arange(n_groups * ROWS_OF_MORE_BANDS).reshape(n_groups, -1)
        second = Look((few, between), np.concatenate([edge, edge + ny - edge.size]))
        if _are_apart(second, ny):
            return first, second, None
    return first, None


def find_spread_rows(ny: int) -> np.ndarray:
    """Return the rows of the first look at a frame.

    Parameters
    ----------
    ny : int
        Rows of the frame.

    Returns
    -------
    (ny,) bool array
    """
    first = find_looks(ny)[0]
    return np.ones(ny, bool) if first is None else first.mark_rows(ny)


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


def _find_bands(ny: int, bands: int, height: int) -> np.ndarray:
    """Return the rows of bands, each in the middle of one of so many equal parts of a frame.

    Those of another number that have the same middle begin with the same row.
    """
    first = np.floor((np.arange(bands) + 0.5) * ny / bands - (ROWS_OF_BAND - 1) / 2)
    return first.astype(np.int64)[:, np.newaxis] + np.arange(height)


def _are_apart(look: Look, ny: int) -> bool:
    """Return whether all rows of a look are on the frame, and none is in two groups."""
    rows = look.rows
    return bool(rows.min() >= 0 and rows.max() < ny and len(np.unique(rows)) == len(rows))


def _mark(ny: int, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return the rows of some bands, each from its first row to its last."""
    first, last = np.clip(first, 0, ny), np.clip(last + 1, 0, ny)
    use = first < last
    steps = np.zeros(ny + 1, np.int64)
    np.add.at(steps, first[use].astype(np.int64), 1)
    np.add.at(steps, last[use].astype(np.int64), -1)
    return np.cumsum(steps[:-1]) > 0
