"""Circles and convex great-circle polygons on the sphere, as ADQL compares them.

All edges are arcs of great circles between unit vectors, so the poles and right ascension 0 need
no special treatment. A shape includes its boundary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Circle", "ConvexPolygon", "contains", "intersects", "separation_deg"]

# In radians, 2e-7 arcsec. With it, rounding does not put a polygon's own vertex outside of it.
_TOLERANCE = 1e-12
# In radians. The acos of a cosine near 1 is this uncertain, so bounding caps are enlarged by it.
_CAP_MARGIN = 1e-7

_NEXT_AXIS = [1, 2, 0]
_LAST_AXIS = [2, 0, 1]


def separation_deg(ra1_deg: float, dec1_deg: float, ra2_deg: float, dec2_deg: float) -> float:
    """Return the angular distance of two points.

    Parameters
    ----------
    ra1_deg, dec1_deg, ra2_deg, dec2_deg : float
        ICRS coordinates, degrees.

    Returns
    -------
    float
        Distance in degrees, 0 to 180.
    """
    first, second = _unit_vectors(np.array([(ra1_deg, dec1_deg), (ra2_deg, dec2_deg)]))
    return math.degrees(_angle(first, second))


@dataclass(frozen=True)
class Circle:
    """All points within an angular radius of a centre; with radius 0, a single point.

    Attributes
    ----------
    ra_deg, dec_deg : float
        Centre, ICRS degrees.
    radius_deg : float
        Radius in degrees, 0 to 180.

    Raises
    ------
    ValueError
        If a coordinate is not finite, or declination or radius is out of range.
    """

    ra_deg: float
    dec_deg: float
    radius_deg: float = 0.0

    def __post_init__(self) -> None:
        _check_positions(np.array([(self.ra_deg, self.dec_deg)]))
        if not 0 <= self.radius_deg <= 180:
            raise ValueError(f"radius must be >= 0 and <= 180 degrees, got {self.radius_deg}")

    @cached_property
    def centre(self) -> NDArray[np.float64]:
        """The centre as a unit vector.

        Returns
        -------
        (3,) float array
            Cartesian components.
        """
        return _unit_vectors(np.array([self.ra_deg, self.dec_deg]))

    @property
    def radius(self) -> float:
        """The radius in radians.

        Returns
        -------
        float
            0 to pi.
        """
        return math.radians(self.radius_deg)


class ConvexPolygon:
    """A convex polygon of great-circle edges, smaller than a hemisphere.

    Parameters
    ----------
    vertices_deg : (k, 2) array_like, k >= 3
        ICRS right ascension and declination of the corners, degrees, in either direction; the
        first corner is not repeated at the end.

    Attributes
    ----------
    vertices : (k, 3) float array
        Unit vectors of the corners, counterclockwise as seen from outside the sphere.

    Raises
    ------
    ValueError
        If the corners are not finite positions, or do not form a convex polygon.
    """

    def __init__(self, vertices_deg: ArrayLike) -> None:
        vertices_deg = np.asarray(vertices_deg, dtype=float)
        if vertices_deg.ndim != 2 or vertices_deg.shape[1] != 2 or len(vertices_deg) < 3:
            raise ValueError(
                f"a polygon needs three or more (ra, dec) pairs, got shape {vertices_deg.shape}"
            )
        _check_positions(vertices_deg)
        vertices = _unit_vectors(vertices_deg)
        normals = _edge_normals(vertices)
        centre = vertices.sum(axis=0)
        if (normals @ centre).sum() < 0:
            vertices = vertices[::-1]
            normals = _edge_normals(vertices)
        lengths = np.sqrt((normals**2).sum(axis=1))
        if lengths.min() < _TOLERANCE:
            raise ValueError("adjacent corners of a polygon must not be equal or opposite")
        normals /= lengths[:, None]
        if (normals @ vertices.T).min() < -_TOLERANCE or (normals @ centre).min() < _TOLERANCE:
            raise ValueError("the corners do not form a convex polygon within a hemisphere")

        self.vertices = vertices
        # Shape (k, 3), pointing into the polygon; edge i leads from vertex i to vertex i + 1.
        self._normals = normals
        self._cap_centre = centre / math.sqrt(centre @ centre)
        self._cap_radius = math.acos(min(1.0, (vertices @ self._cap_centre).min())) + _CAP_MARGIN

    @cached_property
    def _edge_frame(self) -> NDArray[np.float64]:
        """Normal, start, direction at the start and direction at the end of each edge."""
        ends = np.roll(self.vertices, -1, axis=0)
        return np.array(
            [
                self._normals,
                self.vertices,
                _cross(self._normals, self.vertices),
                _cross(self._normals, ends),
            ]
        )

    def contains_vector(self, vector: NDArray[np.float64]) -> bool:
        """Return whether a point lies inside or on an edge.

        Parameters
        ----------
        vector : (3,) float array
            Unit vector of the point.

        Returns
        -------
        bool
            True for points of the polygon.
        """
        return bool((self._normals @ vector).min() >= -_TOLERANCE)

    def boundary_distance(self, vector: NDArray[np.float64]) -> float:
        """Return the distance from a point to the nearest point of any edge.

        Parameters
        ----------
        vector : (3,) float array
            Unit vector of the point.

        Returns
        -------
        float
            Distance in radians.
        """
        normal, start, ahead, beyond = self._edge_frame @ vector
        to_vertex = 2 * np.arcsin(
            np.minimum(1.0, np.sqrt(((self.vertices - vector) ** 2).sum(axis=1)) / 2)
        )
        # An edge is nearer than its ends only if the foot of the perpendicular is between them.
        to_edge = np.where(
            (ahead >= 0) & (beyond <= 0), np.arctan2(np.abs(normal), np.hypot(start, ahead)), np.inf
        )
        return float(min(to_vertex.min(), to_edge.min()))

    def is_beyond(self, vector: NDArray[np.float64], distance: float) -> bool:
        """Return whether the bounding cap alone shows that the polygon is out of reach.

        Parameters
        ----------
        vector : (3,) float array
            Unit vector of a point.
        distance : float
            Distance in radians.

        Returns
        -------
        bool
            True only if every point of the polygon is farther away than `distance`.
        """
        cosine = max(-1.0, min(1.0, float(self._cap_centre @ vector)))
        return math.acos(cosine) > self._cap_radius + distance

    def reaches(self, vector: NDArray[np.float64], distance: float) -> bool:
        """Return whether any point of the polygon lies within a distance of a point.

        Parameters
        ----------
        vector : (3,) float array
            Unit vector of the point.
        distance : float
            Distance in radians.

        Returns
        -------
        bool
            True if the polygon touches the circle of that radius.
        """
        if self.is_beyond(vector, distance):
            return False
        return (
            self.contains_vector(vector) or self.boundary_distance(vector) <= distance + _TOLERANCE
        )

    def crosses(self, other: ConvexPolygon) -> bool:
        """Return whether an edge of this polygon crosses an edge of another one.

        Parameters
        ----------
        other : ConvexPolygon
            The other polygon.

        Returns
        -------
        bool
            True if two edges cross; edges that only touch do not.
        """
        mine, theirs = self.vertices, other.vertices
        side_of_theirs = self._normals @ theirs.T
        side_of_mine = other._normals @ mine.T
        # Two arcs cross if the ends of each are on different sides of the other. If the great
        # circles meet at the antipode instead, the two changes of sign are equal, not opposite.
        change_theirs = np.sign(side_of_theirs) - np.sign(np.roll(side_of_theirs, -1, axis=1))
        change_mine = np.sign(side_of_mine) - np.sign(np.roll(side_of_mine, -1, axis=1))
        return bool((change_theirs * change_mine.T < 0).any())


Shape = Circle | ConvexPolygon


def intersects(first: Shape, second: Shape) -> bool:
    """Return whether two shapes have at least one point in common.

    Parameters
    ----------
    first, second : Circle or ConvexPolygon
        The shapes, in either order.

    Returns
    -------
    bool
        True also if only their boundaries touch.
    """
    if isinstance(first, Circle):
        if isinstance(second, Circle):
            reach = first.radius + second.radius
            return _angle(first.centre, second.centre) <= reach + _TOLERANCE
        return second.reaches(first.centre, first.radius)
    if isinstance(second, Circle):
        return first.reaches(second.centre, second.radius)
    return (
        any(map(first.contains_vector, second.vertices))
        or any(map(second.contains_vector, first.vertices))
        or first.crosses(second)
    )


def contains(outer: Shape, inner: Shape) -> bool:
    """Return whether every point of one shape belongs to another.

    Parameters
    ----------
    outer, inner : Circle or ConvexPolygon
        The containing shape and the contained one.

    Returns
    -------
    bool
        True also if their boundaries touch.
    """
    if isinstance(outer, Circle):
        if isinstance(inner, Circle):
            reach = _angle(outer.centre, inner.centre) + inner.radius
            return reach <= outer.radius + _TOLERANCE or outer.radius_deg == 180
        # The farthest point from the centre is the one nearest to the centre's antipode.
        antipode = -outer.centre
        return not inner.contains_vector(antipode) and (
            inner.boundary_distance(antipode) >= math.pi - outer.radius - _TOLERANCE
        )
    if isinstance(inner, Circle):
        return (
            not outer.is_beyond(inner.centre, 0.0)
            and outer.contains_vector(inner.centre)
            and outer.boundary_distance(inner.centre) >= inner.radius - _TOLERANCE
        )
    return all(map(outer.contains_vector, inner.vertices))


def _check_positions(positions_deg: NDArray[np.float64]) -> None:
    if not np.isfinite(positions_deg).all():
        raise ValueError("right ascension and declination must be finite numbers")
    if np.abs(positions_deg[:, 1]).max() > 90:
        raise ValueError("declination must be -90 to 90 degrees")


def _unit_vectors(positions_deg: NDArray[np.float64]) -> NDArray[np.float64]:
    ra, dec = np.moveaxis(np.radians(positions_deg), -1, 0)
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=-1)


def _cross(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cross product of each row, which np.cross computes more slowly if k is small."""
    return a[:, _NEXT_AXIS] * b[:, _LAST_AXIS] - a[:, _LAST_AXIS] * b[:, _NEXT_AXIS]


def _edge_normals(vertices: NDArray[np.float64]) -> NDArray[np.float64]:
    return _cross(vertices, np.concatenate([vertices[1:], vertices[:1]]))


def _angle(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return 2 * math.atan2(float(np.linalg.norm(a - b)), float(np.linalg.norm(a + b)))
