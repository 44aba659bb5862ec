"""Which frames can hold a source, and which circles on the sky hold all sources."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spxdask.science.sphere import unit_vectors

if TYPE_CHECKING:
    from scipy.spatial import cKDTree

__all__ = ["FOOTPRINT_TOLERANCE_DEG", "Circle", "SourceSky", "find_sources_on", "pack_footprint"]

# The archive's footprints are polygons through the corners of the detector. The distortion bends
# the edges of a frame by up to 39 arcsec out of them (12 real headers, two a detector); 180 arcsec
# leave room for other headers, and for a position of the archive that is not the file's.
FOOTPRINT_TOLERANCE_DEG = 0.05
# Sources are first examined in few, coarse cells, then in fine ones where that does not decide.
CELL_SIZES_DEG = (0.5, 0.05)
# A polygon that reaches farther than this from its centre is not that of a frame (2.5 deg).
MAX_FRAME_RADIUS_DEG = 5.0
# Frames whose near cells are in memory at once; one has some 8,000 at the most.
FRAMES_AT_ONCE = 64

# Sources within one of these distances of the first of their group share a circle. Circles of the
# last have centres so far apart that there are at most 91 of them: caps of half this radius about
# them do not overlap, and the sphere has room for 2 / (1 - cos(12 deg)).
GROUP_RADII_DEG = (3.0, 6.0, 12.0, 24.0)
MAX_GROUPS = 256
# What a query costs besides its rows, as the area whose frames cost as much: a query takes some
# 15 s however short its answer is, and 100 deg^2 have some 3,400 frames.
GROUP_COST_DEG2 = 100.0
# Half of a frame is added to the radius of a circle, as frames that touch it are found, too.
HALF_FRAME_DEG = 1.75

# Numbers may have exponents.
_POLYGON = re.compile(r"\s*polygon\b(?:[\s(']*icrs\b)?([^a-df-z]*)", re.IGNORECASE)


class Circle(NamedTuple):
    """A circle on the sky.

    Attributes
    ----------
    ra, dec, radius : float
        ICRS, deg.
    """

    ra: float
    dec: float
    radius: float


def pack_footprint(value: Any) -> bytes | None:
    """Return the corners of a footprint in the form in which they are kept.

    Parameters
    ----------
    value : str, bytes or float array
        As a TAP service gives it: ``POLYGON ICRS ra dec ra dec ...``, or its numbers alone, deg.

    Returns
    -------
    bytes or None
        Right ascension and declination of each corner in deg, as little-endian floats of 64
        bits; None for what is not one polygon on the sky.
    """
    try:
        if isinstance(value, bytes):
            value = value.decode("ascii")
        if isinstance(value, str):
            shape = _POLYGON.fullmatch(value)
            numbers = re.split(r"[\s,()']+", shape[1].strip(" ,()'")) if shape else []
            values = np.array(numbers, float)
        else:
            values = np.asarray(value, float).ravel()
    except (TypeError, ValueError):
        return None
    if len(values) < 6 or len(values) % 2 or not np.isfinite(values).all():
        return None
    if np.abs(values[1::2]).max() > 90:
        return None
    return struct.pack(f"<{len(values)}d", *values)


def find_sources_on(
    footprints: Sequence[bytes | None], ra: np.ndarray, dec: np.ndarray
) -> Iterator[np.ndarray]:
    """Find which sources lie on each of some frames.

    Parameters
    ----------
    footprints : sequence of bytes or None
        As from `pack_footprint`; None where it is not known.
    ra, dec : (n,) float array
        ICRS, deg; at least one source.

    Yields
    ------
    (m,) int array
        Indices of the sources in the polygon of a frame, for each in order; none where the
        footprint is not known. Edges are those of the archive, without a tolerance.
    """
    from scipy.spatial import cKDTree

    vectors = unit_vectors(ra, dec)
    tree = cKDTree(vectors)
    for footprint in footprints:
        if footprint is None:
            yield np.zeros(0, np.int64)
            continue
        frame = _Polygons.from_corners(np.frombuffer(footprint, "<f8").reshape(1, -1, 2))
        near = tree.query_ball_point(frame.centre[0], float(_to_chord(frame.radius[0])))
        index = np.sort(np.asarray(near, np.int64))
        yield index[(vectors[index] @ frame.normals[0].T >= 0).all(axis=1)]


class SourceSky:
    """Where on the sky there are sources.

    Parameters
    ----------
    ra, dec : (n,) float array
        ICRS, deg; at least one source.
    shift_deg : float
        How far a source may be from its position, deg.
    """

    def __init__(self, ra: np.ndarray, dec: np.ndarray, shift_deg: float = 0.0) -> None:
        self._tolerance_deg = FOOTPRINT_TOLERANCE_DEG + shift_deg
        self._vectors = unit_vectors(ra, dec)
        self._levels = [_Cells.sort(self._vectors, ra, dec, size) for size in CELL_SIZES_DEG]

    def find_empty(self, footprints: Sequence[bytes | None]) -> np.ndarray:
        """Find the frames on which no source can lie.

        Parameters
        ----------
        footprints : sequence of bytes or None
            As from `pack_footprint`; None where it is not known.

        Returns
        -------
        (n,) bool array
            True for a frame if every source is outside of its polygon by more than
            `FOOTPRINT_TOLERANCE_DEG` and its shift. False where the footprint is not known, and
            where it is no convex polygon of a frame's size and a source is in its bounding circle.
        """
        is_empty = np.zeros(len(footprints), bool)
        lengths = np.array([0 if f is None else len(f) for f in footprints])
        for length in np.unique(lengths[lengths > 0]):
            index = np.flatnonzero(lengths == length)
            packed = b"".join(footprints[i] or b"" for i in index.tolist())
            frames = _Polygons.from_corners(np.frombuffer(packed, "<f8").reshape(len(index), -1, 2))
            is_empty[index] = self._find_empty(frames)
        return is_empty

    def _find_empty(self, frames: _Polygons) -> np.ndarray:
        # Undecided frames are looked at again in finer cells.
        is_empty = np.zeros(len(frames.radius), bool)
        left = np.flatnonzero(frames.radius <= np.deg2rad(MAX_FRAME_RADIUS_DEG))
        for cells in self._levels:
            has_source, may_have = cells.examine(frames.take(left), np.deg2rad(self._tolerance_deg))
            is_empty[left[~may_have]] = True
            left = left[may_have & ~has_source]
        return is_empty

    def cover(self) -> list[Circle]:
        """Cover the sources with circles, close sources with one.

        Returns
        -------
        list of Circle
            At most `MAX_GROUPS`, each no wider than its sources, their shift and
            `FOOTPRINT_TOLERANCE_DEG` demand, in the order of the sky. The same for the same
            positions.
        """
        cells = self._levels[0]
        best: tuple[float, list[Circle]] | None = None
        for reach in GROUP_RADII_DEG:
            groups = cells.group(np.deg2rad(reach), MAX_GROUPS)
            if groups is None:
                continue
            leaders = cells.vectors[np.unique(groups, return_index=True)[1]]
            circles = _enclose(self._vectors, groups[cells.cell_of], leaders, self._tolerance_deg)
            radii = np.deg2rad([circle.radius + HALF_FRAME_DEG for circle in circles])
            area = 2 * np.pi * np.rad2deg(1.0) ** 2 * (1 - np.cos(radii))
            cost = float((GROUP_COST_DEG2 + area).sum())
            if best is None or cost < best[0]:
                best = cost, circles
        assert best is not None, "there are at most 91 groups of the widest radius"
        return best[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Polygons:
    """Polygons with a bounding circle each; all angles in radians.

    `normals` (n, k, 3) of the edges point inwards, and are 0 where a polygon is to be taken for
    its bounding circle, of which `centre` is (n, 3) and `radius` (n,). A circle of the radius
    `inner` about the centre is within the polygon.
    """

    normals: np.ndarray
    centre: np.ndarray
    radius: np.ndarray
    inner: np.ndarray

    @classmethod
    def from_corners(cls, corners: np.ndarray) -> _Polygons:
        """Take polygons with the same number of corners, (n, k, 2), in either direction."""
        vertices = unit_vectors(corners[..., 0], corners[..., 1])
        total = vertices.sum(axis=1)
        length = np.linalg.norm(total, axis=1)
        centre = total / np.maximum(length, 1e-12)[:, None]
        radius = _to_angle(np.linalg.norm(vertices - centre[:, None], axis=2)).max(axis=1)
        normals = np.cross(vertices, np.roll(vertices, -1, axis=1))
        lengths = np.linalg.norm(normals, axis=2, keepdims=True)
        # The first corner may be repeated at the end.
        is_edge = lengths > 1e-9
        normals = np.where(is_edge, normals / np.maximum(lengths, 1e-12), 0.0)
        height = np.einsum("nkc,nc->nk", normals, centre)
        inwards = np.where(height.sum(axis=1) < 0, -1.0, 1.0)[:, None]
        normals, height = normals * inwards[..., None], height * inwards
        is_convex = (np.einsum("nkc,njc->nkj", normals, vertices) >= -1e-5).all(axis=(1, 2))
        normals[~is_convex] = 0.0
        inner = np.arcsin(np.where(is_edge[..., 0], height, 1.0).min(axis=1).clip(-1.0, 1.0))
        # The corners of a polygon without a centre are all around the sky.
        radius[length < 1e-6] = np.pi
        return cls(
            normals=normals,
            centre=centre,
            radius=radius,
            inner=np.where(is_convex, np.minimum(inner, radius), radius),
        )

    def take(self, index: np.ndarray) -> _Polygons:
        """Return some of them."""
        return _Polygons(
            normals=self.normals[index],
            centre=self.centre[index],
            radius=self.radius[index],
            inner=self.inner[index],
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Cells:
    """Sources in cells of the sky, each of which stands for all sources in it.

    `first` (m,) is the index of one source of each cell, `slop` (m,) the distance in radians
    within which the others lie, `cell_of` (n,) the cell of each source.
    """

    vectors: np.ndarray
    first: np.ndarray
    slop: np.ndarray
    cell_of: np.ndarray

    @classmethod
    def sort(cls, vectors: np.ndarray, ra: np.ndarray, dec: np.ndarray, size_deg: float) -> _Cells:
        """Sort sources into cells of about equal sides."""
        zone = np.floor((np.asarray(dec) + 90.0) / size_deg).astype(np.int64)
        middle = np.deg2rad((zone + 0.5) * size_deg - 90.0)
        width = size_deg / np.maximum(np.cos(middle), size_deg / 360.0)
        key = zone * 1_000_000 + np.floor(np.asarray(ra) % 360.0 / width).astype(np.int64)
        _, first, cell_of = np.unique(key, return_index=True, return_inverse=True)
        distance = _to_angle(np.linalg.norm(vectors - vectors[first[cell_of]], axis=1))
        slop = np.zeros(len(first))
        np.maximum.at(slop, cell_of, distance)
        return cls(vectors=vectors[first], first=first, slop=slop, cell_of=cell_of)

    @cached_property
    def _tree(self) -> cKDTree:
        # Imported here, as workers need no tree and would start half a second later.
        from scipy.spatial import cKDTree

        return cKDTree(self.vectors)

    def examine(self, frames: _Polygons, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
        """Return which frames have a source for certain, and which may have one.

        One that is outside of a frame by less than `tolerance` radians counts.
        """
        nearest = _to_angle(self._tree.query(frames.centre)[0])
        has_source = nearest <= frames.inner + tolerance
        reach = frames.radius + tolerance + self.slop.max()
        may_have = nearest <= reach
        left = np.flatnonzero(may_have & ~has_source)
        for start in range(0, len(left), FRAMES_AT_ONCE):
            index = left[start : start + FRAMES_AT_ONCE]
            near = self._tree.query_ball_point(frames.centre[index], _to_chord(reach[index]))
            counts = np.array([len(cells) for cells in near])
            frame = np.repeat(np.arange(len(index)), counts)
            cell = np.concatenate([np.asarray(cells, np.int64) for cells in near])
            vector, slop = self.vectors[cell], self.slop[cell]
            height = np.einsum("pkc,pc->pk", frames.normals[index][frame], vector).min(axis=1)
            distance = np.linalg.norm(vector - frames.centre[index][frame], axis=1)
            off_centre = _to_angle(distance) - frames.radius[index][frame]
            # A polygon without edges is its bounding circle.
            has_edges = (frames.normals[index] != 0).any(axis=(1, 2))[frame]
            outside = np.where(has_edges, -np.arcsin(height.clip(-1.0, 1.0)), off_centre)
            has_source[index] = np.bincount(frame, outside <= tolerance, len(index)) > 0
            may_have[index] = np.bincount(frame, outside <= tolerance + slop, len(index)) > 0
        return has_source, may_have

    def group(self, reach: float, max_groups: int) -> np.ndarray | None:
        """Return the group of each cell, or None if there are more than `max_groups`.

        The first cell without a group begins one, of all cells without a group in its reach.
        """
        groups = np.full(len(self.first), -1, np.int64)
        n_groups, begin = 0, 0
        while begin < len(groups):
            if n_groups == max_groups:
                return None
            near = np.array(self._tree.query_ball_point(self.vectors[begin], _to_chord(reach)))
            groups[near[groups[near] < 0]] = n_groups
            # Rounding may put a cell out of its own reach.
            groups[begin] = n_groups
            n_groups += 1
            left = np.flatnonzero(groups[begin:] < 0)
            begin = begin + int(left[0]) if len(left) else len(groups)
        return groups


def _enclose(
    vectors: np.ndarray, groups: np.ndarray, leaders: np.ndarray, margin_deg: float
) -> list[Circle]:
    """Return a circle about the sources of each group, the smallest of three attempts."""
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], np.arange(len(leaders)))
    circles = []
    for first, members in zip(leaders, np.split(vectors[order], starts[1:]), strict=True):
        one = members[np.argmax(_distances(members, first))]
        other = members[np.argmax(_distances(members, one))]
        attempts = [
            centre / np.linalg.norm(centre)
            for centre in (first, members.mean(axis=0), one + other)
            if np.linalg.norm(centre) > 1e-6
        ]
        radii = [float(_distances(members, centre).max()) for centre in attempts]
        best = int(np.argmin(radii))
        x, y, z = attempts[best].tolist()
        circles.append(
            Circle(
                float(np.rad2deg(np.arctan2(y, x)) % 360.0),
                float(np.rad2deg(np.arctan2(z, np.hypot(x, y)))),
                float(np.rad2deg(radii[best])) + margin_deg,
            )
        )
    return circles


def _distances(vectors: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return _to_angle(np.linalg.norm(vectors - centre, axis=1))


def _to_angle(chord: np.ndarray) -> np.ndarray:
    """Return the angle that a chord of the unit sphere spans, radians."""
    return 2 * np.arcsin(np.minimum(chord / 2, 1.0))


def _to_chord(angle: np.ndarray | float) -> np.ndarray:
    return 2 * np.sin(np.minimum(angle, np.pi) / 2)
