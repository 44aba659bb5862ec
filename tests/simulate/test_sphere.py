"""Spherical geometry against the plane: in a gnomonic projection about a circle's centre great
circles are straight lines, and the circle is one of radius tan r.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from spxdask.simulate.sphere import Circle, ConvexPolygon, contains, intersects, separation_deg

# Degrees: closer decisions than this are left to rounding.
MARGIN = 1e-7

directions = st.tuples(
    st.one_of(st.sampled_from([0.0, 90.0, 180.0, 359.9999]), st.floats(0, 360)),
    st.one_of(st.sampled_from([-90.0, 0.0, 89.0, 90.0]), st.floats(-90, 90)),
)


def tangent_frame(ra_deg, dec_deg):
    """East, north and outward unit vectors at a position."""
    ra, dec = math.radians(ra_deg), math.radians(dec_deg)
    east = np.array([-math.sin(ra), math.cos(ra), 0])
    north = np.array([-math.sin(dec) * math.cos(ra), -math.sin(dec) * math.sin(ra), math.cos(dec)])
    return np.array([east, north, np.cross(east, north)])


def from_plane(centre, points):
    """(k, 2) gnomonic offsets about a centre to ICRS degrees."""
    vectors = np.column_stack([points, np.ones(len(points))]) @ tangent_frame(*centre)
    x, y, z = vectors.T
    return np.degrees(
        np.column_stack([np.arctan2(y, x) % (2 * np.pi), np.arctan2(z, np.hypot(x, y))])
    )


def to_plane(centre, positions):
    """ICRS degrees to gnomonic offsets about a centre, if all are on its side of the sky."""
    ra, dec = np.radians(positions).T
    vectors = np.column_stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)])
    x, y, z = tangent_frame(*centre) @ vectors.T
    assume(z.min() > 0.05)
    return np.column_stack([x, y]) / z[:, None]


@st.composite
def polygons(draw, near=None):
    """Corners of a convex polygon (on an ellipse in a tangent plane), in either winding."""
    centre = near or draw(directions)
    n_corners = draw(st.integers(3, 6))
    gaps = [draw(st.floats(0.3, 1.0)) for _ in range(n_corners)]
    angles = draw(st.floats(0, 6)) + 2 * np.pi * np.cumsum(gaps) / sum(gaps)
    shape = np.column_stack([np.cos(angles), np.sin(angles)])
    size = [math.tan(math.radians(draw(st.floats(0.2, 20.0)))) for _ in range(2)]
    shift = [draw(st.floats(-0.2, 0.2)) for _ in range(2)]
    assume(np.ptp(angles) > np.pi)
    corners = from_plane(centre, shape * size + shift)
    return corners[:: draw(st.sampled_from([1, -1]))]


@st.composite
def circles_and_polygons(draw):
    polygon = draw(polygons())
    # The centre near the polygon, or neither answer is ever close.
    corner = polygon[0]
    offset = [[draw(st.floats(-0.5, 0.5)), draw(st.floats(-0.5, 0.5))]]
    ((ra, dec),) = from_plane(corner, offset)
    return Circle(ra, dec, draw(st.floats(0.0, 30.0))), polygon


def inside_and_distance(points):
    """Whether the origin lies in a plane convex polygon, and its distance from the boundary."""
    ends = np.roll(points, -1, axis=0)
    side = points[:, 0] * ends[:, 1] - points[:, 1] * ends[:, 0]
    along = ends - points
    foot = np.clip(-(points * along).sum(axis=1) / (along**2).sum(axis=1), 0, 1)
    nearest = points + foot[:, None] * along
    inside = (side > 0).all() or (side < 0).all()
    return inside, np.hypot(*nearest.T).min()


def test_separations():
    assert separation_deg(0, 0, 90, 0) == pytest.approx(90, abs=1e-12)
    assert separation_deg(359.5, 0, 0.5, 0) == pytest.approx(1, abs=1e-12)
    assert separation_deg(10, 89, 190, 89) == pytest.approx(2, abs=1e-12)
    assert separation_deg(10, 40, 190, -40) == pytest.approx(180, abs=1e-6)
    assert separation_deg(20, 30, 20, 30 + 1e-9) == pytest.approx(1e-9, rel=1e-5)


@settings(deadline=None)
@given(circles_and_polygons())
@example((Circle(0, 90, 1), np.array([(0, 85.0), (90, 85.0), (180, 85.0), (270, 85.0)])))
@example((Circle(0.5, 0, 1), np.array([(359, -2.0), (359, 2.0), (3, 2.0), (3, -2.0)])))
def test_circle_and_polygon_as_in_the_plane(shapes):
    circle, corners = shapes
    points = to_plane((circle.ra_deg, circle.dec_deg), corners)
    inside, distance = inside_and_distance(points)
    distance_deg = math.degrees(math.atan(distance))
    farthest_deg = math.degrees(math.atan(np.hypot(*points.T).max()))
    assume(min(abs(distance_deg - circle.radius_deg), distance_deg) > MARGIN)
    assume(abs(farthest_deg - circle.radius_deg) > MARGIN)
    polygon = ConvexPolygon(corners)
    point = Circle(circle.ra_deg, circle.dec_deg)

    expected = inside or distance_deg < circle.radius_deg
    assert intersects(circle, polygon) == intersects(polygon, circle) == expected
    assert contains(polygon, circle) == (inside and distance_deg > circle.radius_deg)
    assert contains(circle, polygon) == (farthest_deg < circle.radius_deg)
    assert contains(polygon, point) == intersects(point, polygon) == inside


@settings(deadline=None)
@given(circles_and_polygons())
def test_distance_to_the_boundary_by_sampling(shapes):
    circle, corners = shapes
    polygon = ConvexPolygon(corners)
    weight = np.linspace(0, 1, 2001)[:, None, None]
    edges = (1 - weight) * polygon.vertices + weight * np.roll(polygon.vertices, -1, axis=0)
    step = np.linalg.norm(np.diff(edges, axis=0), axis=2).max()
    edges /= np.linalg.norm(edges, axis=2, keepdims=True)
    sampled = 2 * np.arcsin(np.linalg.norm(edges - circle.centre, axis=2).min() / 2)
    distance = polygon.boundary_distance(circle.centre)
    assert distance <= sampled + 1e-12
    assert sampled - distance <= 1.2 * step


@settings(deadline=None)
@given(directions, st.data())
def test_two_polygons_as_in_the_plane(centre, data):
    first, second = (data.draw(polygons(near=centre)) for _ in range(2))
    plane = [to_plane(centre, corners) for corners in (first, second)]
    # Separating axes: the normals of all edges.
    along = np.concatenate([np.roll(points, -1, axis=0) - points for points in plane])
    normals = np.column_stack([-along[:, 1], along[:, 0]]) / np.hypot(*along.T)[:, None]
    heights = [points @ normals.T for points in plane]
    gap = np.maximum(
        heights[0].min(axis=0) - heights[1].max(axis=0),
        heights[1].min(axis=0) - heights[0].max(axis=0),
    ).max()
    assume(abs(gap) > 1e-9)
    a, b = ConvexPolygon(first), ConvexPolygon(second)
    assert intersects(a, b) == intersects(b, a) == (gap < 0)

    n_first = len(first)
    orientation = np.sign(heights[0][:, :n_first].mean(axis=0) - np.diag(heights[0][:, :n_first]))
    inset = (orientation * (heights[1][:, :n_first] - np.diag(heights[0][:, :n_first]))).min()
    assume(abs(inset) > 1e-9)
    assert contains(a, b) == (inset > 0)


def test_polygons_on_opposite_sides_of_the_sky_do_not_meet():
    corners = np.array([(10, -1.0), (12, -1.0), (12, 1.0), (10, 1.0)])
    opposite = corners + np.array([180, 0])
    assert not intersects(ConvexPolygon(corners), ConvexPolygon(opposite))
    bar = ConvexPolygon([(185, -0.5), (185, 0.5), (200, 0.5), (200, -0.5)])
    assert not intersects(ConvexPolygon(corners), bar)
    assert intersects(ConvexPolygon(opposite), bar)


@settings(deadline=None)
@given(polygons())
def test_a_polygon_contains_and_meets_itself(corners):
    polygon = ConvexPolygon(corners)
    assert contains(polygon, polygon)
    assert intersects(polygon, ConvexPolygon(corners[::-1]))
    for ra_deg, dec_deg in corners:
        assert contains(polygon, Circle(ra_deg, dec_deg))


@settings(deadline=None)
@given(directions, directions, st.floats(0, 180), st.floats(0, 180))
def test_two_circles(first, second, r1, r2):
    separation = separation_deg(*first, *second)
    assume(min(abs(separation - r1 - r2), abs(separation + r2 - r1), 180 - r1) > MARGIN)
    a, b = Circle(*first, r1), Circle(*second, r2)
    assert intersects(a, b) == intersects(b, a) == (separation < r1 + r2)
    assert contains(a, b) == (separation + r2 < r1)


def test_circles_of_more_than_a_hemisphere():
    polygon = ConvexPolygon([(0, 80), (120, 80), (240, 80)])
    assert contains(Circle(0, 0, 180), Circle(50, 50, 180))
    assert not contains(Circle(0, -90, 179.9), polygon)
    # The northernmost edge of this one reaches atan(tan(81 deg) / cos(45 deg)) = 83.61 deg.
    beside_pole = ConvexPolygon([(0, 81), (90, 81), (45, 70)])
    assert contains(Circle(0, -90, 173.62), beside_pole)
    assert not contains(Circle(0, -90, 173.60), beside_pole)
    assert intersects(Circle(0, -90, 170.1), polygon)
    assert not intersects(Circle(0, -90, 169.9), polygon)
    assert not contains(polygon, Circle(0, 90, 91))


def test_edges_are_great_circles_not_parallels():
    polygon = ConvexPolygon([(-20, 60), (20, 60), (20, 50), (-20, 50)])
    top = math.degrees(math.atan(math.tan(math.radians(60)) / math.cos(math.radians(20))))
    assert top > 61.5
    assert contains(polygon, Circle(0, top - 1e-6))
    assert not contains(polygon, Circle(0, top + 1e-6))


@pytest.mark.parametrize(
    "corners",
    [
        [(0, 0), (1, 1), (1, 0), (0, 1)],
        [(0, 0), (4, 0), (1, 1), (0, 4)],
        [(0, 0), (1, 0), (2, 0)],
        [(0, 0), (1, 0), (1, 0), (0, 1)],
        [(0, 0), (120, 0), (240, 0)],
        [(0, 0), (180, 0), (90, 45)],
        [(0, 0), (1, 0)],
        [(0, 0, 0), (1, 0, 0), (0, 1, 0)],
        [(0, 0), (1, np.nan), (0, 1)],
        [(0, 0), (1, 91), (0, 1)],
    ],
)
def test_not_a_convex_polygon(corners):
    with pytest.raises(ValueError, match=r"polygon|declination"):
        ConvexPolygon(corners)


@pytest.mark.parametrize("values", [(0, 91, 1), (np.inf, 0, 1), (0, 0, -1), (0, 0, np.nan)])
def test_not_a_circle(values):
    with pytest.raises(ValueError, match=r"radius|declination"):
        Circle(*values)
