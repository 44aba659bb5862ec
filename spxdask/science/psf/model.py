"""A PSF model over a detector, whatever product it was made from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from spxdask.science.kernels.psf import Psf, render_stamps

__all__ = ["PsfModel", "Zones", "arrange_zones"]

# Centres of zones that differ by less are the same, pixels.
SAME_CENTRE_PIXELS = 1e-3
# A lattice may have this many times as many places as there are zones.
MOST_PLACES_A_ZONE = 4


@dataclass(frozen=True, kw_only=True)
class Zones:
    """The lattice of zones that divides a detector.

    Attributes
    ----------
    x, y : (nx,), (ny,) float array
        Their centres, 0-based pixels of the full frame, increasing.
    index : (ny, nx) int array
        Which zone of the model is at each place.
    """

    x: np.ndarray
    y: np.ndarray
    index: np.ndarray

    def nearest_to(self, x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Return the zone whose centre is nearest, and its share, which is 1.

        Parameters
        ----------
        x, y : (n,) float array
            0-based pixels of the full frame.

        Returns
        -------
        zones : (n, 1) int array
            Which zone.
        shares : (n, 1) float array
            Ones.
        """
        i, j = _find_nearest(self.x, x), _find_nearest(self.y, y)
        return self.index[j, i][:, np.newaxis], np.ones((len(i), 1))

    def around(self, x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Return the four zones around, with the shares of a bilinear interpolation.

        Parameters
        ----------
        x, y : (n,) float array
            0-based pixels of the full frame. Beyond the outermost centres, the PSF is the
            same as at them.

        Returns
        -------
        zones : (n, 4) int array
            Which zones.
        shares : (n, 4) float array
            Of sum 1 for each source.
        """
        i, next_i, fx = _find_pair(self.x, x)
        j, next_j, fy = _find_pair(self.y, y)
        zones = [self.index[j, i], self.index[j, next_i]]
        zones += [self.index[next_j, i], self.index[next_j, next_i]]
        shares = [(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx]
        return np.stack(zones, axis=1), np.stack(shares, axis=1)

    def select(
        self, at: tuple[ArrayLike, ArrayLike] | None, is_bilinear: bool
    ) -> tuple[np.ndarray, Zones]:
        """Choose the zones that some sources need.

        Parameters
        ----------
        at : ((n,) float array, (n,) float array) or None
            Positions of the sources (x, y), 0-based pixels of the full frame; None for
            everywhere.
        is_bilinear : bool
            Whether the PSF is interpolated between four zones.

        Returns
        -------
        needed : (k,) int array
            Which zones.
        zones : Zones
            The lattice with the indices of these in `needed`, and -1 for all others.
        """
        find = self.around if is_bilinear else self.nearest_to
        needed = np.unique(self.index if at is None else find(*at)[0])
        place = np.full(self.index.max() + 1, -1)
        place[needed] = np.arange(len(needed))
        return needed, Zones(x=self.x, y=self.y, index=place[self.index])


def arrange_zones(x: ArrayLike, y: ArrayLike, usable: ArrayLike) -> Zones:
    """Arrange zones on a lattice by their centres, in whatever order they come.

    Parameters
    ----------
    x, y : (n,) float array
        Centre of each zone, 0-based pixels of the full frame.
    usable : (n,) bool array
        Which of them have a PSF.

    Returns
    -------
    Zones
        At a place without a usable zone is the nearest usable one.

    Raises
    ------
    ValueError
        If none is usable, two have the same centre, or the centres are no lattice.
    """
    x, y, usable = np.asarray(x, float), np.asarray(y, float), np.asarray(usable, bool)
    if not usable.any():
        raise ValueError("no zone has a usable PSF")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("the centre of a zone is not finite")
    columns, i = _find_levels(x)
    rows, j = _find_levels(y)
    if len(columns) * len(rows) > MOST_PLACES_A_ZONE * len(x):
        raise ValueError(f"the centres of {len(x)} zones do not form a lattice")
    index = np.full((len(rows), len(columns)), -1)
    good = np.flatnonzero(usable)
    index[j[good], i[good]] = good
    lost = good[index[j[good], i[good]] != good]
    if len(lost):
        raise ValueError(f"two zones have the centre ({x[lost[0]]:g}, {y[lost[0]]:g})")
    for row, column in np.argwhere(index < 0):
        distance = np.hypot(x[good] - columns[column], y[good] - rows[row])
        index[row, column] = good[np.argmin(distance)]
    return Zones(x=columns, y=rows, index=index)


@dataclass(frozen=True, kw_only=True)
class PsfModel:
    """The PSF everywhere on a detector.

    Attributes
    ----------
    psf : Psf
        Plain arrays, for the compiled functions.
    zones : Zones
        Where each zone of these is.
    unusable : int
        Zones of the product without a PSF, replaced by their neighbours; only those that
        were looked at count.
    is_bilinear : bool
        Whether the PSF is interpolated between four zones, and not that of the nearest.
    """

    psf: Psf
    zones: Zones
    unusable: int = 0
    is_bilinear: bool = False

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PsfModel) and self.fingerprint == other.fingerprint

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that the PSF depends on, the same in every process."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (*self.psf, self.zones.x, self.zones.y, self.zones.index, self.is_bilinear):
            array = np.ascontiguousarray(part)
            digest.update(f"{array.dtype.str} {array.shape} ".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    @property
    def size(self) -> int:
        """Rows and columns of a stamp."""
        return self.psf.size

    def interpolated(self, is_bilinear: bool = True) -> PsfModel:
        """Return this model, interpolated between zones or not.

        Parameters
        ----------
        is_bilinear : bool
            Whether to interpolate bilinearly between the centres of four zones.

        Returns
        -------
        PsfModel
            It shares its arrays with this one.
        """
        return replace(self, is_bilinear=is_bilinear)

    def find_zones(self, x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Return which zones make up the PSF of each source.

        Parameters
        ----------
        x, y : (n,) float array
            0-based pixels of the full frame.

        Returns
        -------
        zones : (n, k) int array
            Of `psf`; k is 1, or 4 between zones.
        shares : (n, k) float array
            The factor of each.

        Raises
        ------
        ValueError
            If the model was not made for these places.
        """
        find = self.zones.around if self.is_bilinear else self.zones.nearest_to
        zones, shares = find(x, y)
        if (zones < 0).any():
            raise ValueError("this PSF model was made for other places on the detector")
        return zones, shares

    def render(
        self,
        x: ArrayLike,
        y: ArrayLike,
        radius: float = 1.0,
        origin: tuple[float, float] = (0.0, 0.0),
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compute the PSF of every source on the pixels around it, and its share in a circle.

        Parameters
        ----------
        x, y : (n,) float array
            0-based pixel positions.
        radius : float
            Of the circle, pixels.
        origin : (float, float)
            Full-frame 0-based pixel of the pixel (0, 0) of these positions.

        Returns
        -------
        stamps : (n, size, size) float array
            Shares of the flux, [y, x].
        corners : (n, 2) int array
            Row and column of the first pixel of each stamp.
        enclosed : (n,) float array
            Share of the flux within the circle, by the exact fraction of each pixel. The
            aperture correction is 1 / `enclosed`.
        """
        x, y = np.ascontiguousarray(x, float), np.ascontiguousarray(y, float)
        zones, shares = self.find_zones(x + origin[0], y + origin[1])
        return render_stamps(self.psf, zones, shares, x, y, radius)


def _find_levels(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the different values, increasing, and which of these each value is."""
    order = np.argsort(values, kind="stable")
    is_new = np.append(True, np.diff(values[order]) > SAME_CENTRE_PIXELS)
    level = np.empty(len(values), int)
    level[order] = np.cumsum(is_new) - 1
    return values[order][is_new], level


def _find_nearest(points: np.ndarray, position: ArrayLike) -> np.ndarray:
    """Return the index of the point that is nearest to each position."""
    return np.searchsorted(0.5 * (points[1:] + points[:-1]), np.asarray(position, float))


def _find_pair(
    points: np.ndarray, position: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the points below and above each position, and the fraction of the way between."""
    position = np.clip(np.asarray(position, float), points[0], points[-1])
    below = np.clip(np.searchsorted(points, position, side="right") - 1, 0, len(points) - 1)
    above = np.minimum(below + 1, len(points) - 1)
    width = np.where(above > below, points[above] - points[below], 1.0)
    return below, above, (position - points[below]) / width
