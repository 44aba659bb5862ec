"""Which frames can hold a source, and the circles that hold all sources."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from spxdask.science.catalogue import Catalogue
from spxdask.science.footprint import (
    FOOTPRINT_TOLERANCE_DEG,
    MAX_GROUPS,
    SourceSky,
    pack_footprint,
)
from spxdask.science.sphere import angular_distance, unit_vectors
from spxdask.simulate.frames import FRAME_SIZE, Exposure
from spxdask.simulate.sphere import Circle, ConvexPolygon, intersects

SQUARE = [10.0, -1.0, 12.0, -1.0, 12.0, 1.0, 10.0, 1.0]


def exposure(ra=10.0, dec=20.0, roll=15.0, detector=3) -> Exposure:
    return Exposure(
        obs_id="2025W51_1A_0001_1",
        detector=detector,
        ra=ra,
        dec=dec,
        roll_deg=roll,
        mjd_begin=61000.0,
    )


def pack(polygon) -> bytes:
    packed = pack_footprint(np.ravel(polygon))
    assert packed is not None
    return packed


def is_empty(polygon, ra, dec) -> bool:
    [empty] = SourceSky(np.atleast_1d(ra), np.atleast_1d(dec)).find_empty([pack(polygon)])
    return bool(empty)


def random_sky(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 360, n), np.rad2deg(np.arcsin(rng.uniform(-1, 1, n)))


def find_distance(shape: ConvexPolygon, ra, dec) -> float:
    """Return the distance of the nearest source from a polygon, deg."""
    vectors = unit_vectors(ra, dec)
    near = vectors[vectors @ shape.vertices.mean(axis=0) > np.cos(np.deg2rad(4.0))]
    distances = [0.0 if shape.contains_vector(v) else shape.boundary_distance(v) for v in near]
    return float(np.rad2deg(min(distances, default=np.inf)))


# The forms of a footprint


@pytest.mark.parametrize(
    "value",
    [
        "POLYGON ICRS 10 -1 12 -1 12 1 10 1",
        "polygon icrs 10.0 -1.0 12.0 -1.0 12.0 1.0 10.0 1.0 ",
        "Polygon 10 -1 12 -1 12 1 10 1",
        b"POLYGON ICRS 10 -1 12 -1 12 1 10 1",
        "POLYGON('ICRS', 10, -1, 12, -1, 12, 1, 10, 1)",
        "POLYGON ICRS 1e1 -1 12 -1 12 1 10 1",
        SQUARE,
        np.ma.array(SQUARE),
        np.reshape(SQUARE, (4, 2)),
    ],
)
def test_a_polygon_in_any_form(value):
    assert pack_footprint(value) == pack(SQUARE)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "nothing",
        "POLYGON ICRS",
        "POLYGON ICRS 10 -1 12 -1",
        "POLYGON ICRS 10 -1 12 -1 12",
        "POLYGON ICRS 10 -1 12 -1 12 91",
        "POLYGON ICRS 10 -1 12 -1 12 nan",
        "POLYGON GALACTIC 10 -1 12 -1 12 1",
        "CIRCLE ICRS 10 20 1",
        b"\xff",
        "UNION (POLYGON ICRS 10 -1 12 -1 12 1 POLYGON ICRS 10 -1 12 -1 12 1)",
        [1.0, 2.0],
        [1.0, 2.0, 3.0, 4.0, 5.0, np.inf],
        3,
    ],
)
def test_what_is_no_polygon_is_unknown(value):
    assert pack_footprint(value) is None


def test_a_frame_of_unknown_footprint_may_hold_a_source():
    sky = SourceSky(np.array([190.0]), np.array([0.0]))
    assert sky.find_empty([None, pack(SQUARE), None]).tolist() == [False, True, False]
    assert sky.find_empty([]).tolist() == []


@pytest.mark.parametrize(
    ("pmra", "is_empty", "shift"), [(9000.0, False, 0.125), (1e9, False, 1.0), (0.0, True, 0.0)]
)
def test_a_source_that_moves_onto_a_frame_is_not_lost(pmra, is_empty, shift):
    """0.1 deg beside the square; what no star moves by does not lead to a circle of the sky."""
    catalogue = Catalogue.from_arrays(
        pa.array(["a"], pa.large_string()),
        np.array([12.1]),
        np.array([0.0]),
        {"pmra": np.array([pmra]), "pmdec": np.zeros(1)},
    )
    assert catalogue.sky.find_empty([pack(SQUARE)]).tolist() == [is_empty]
    [circle] = catalogue.sky.cover()
    assert circle.radius == pytest.approx(FOOTPRINT_TOLERANCE_DEG + shift)


# On the frame or not


def test_every_corner_of_a_real_frame_counts():
    """The distortion of the header bends its edges out of the polygon of the archive."""
    edge = np.linspace(-0.5, FRAME_SIZE - 0.5, 41)
    low, high = np.full(41, -0.5), np.full(41, FRAME_SIZE - 0.5)
    x, y = np.concatenate([edge, edge, low, high]), np.concatenate([low, high, edge, edge])
    for ra, dec, roll in [(10.0, 20.0, 15.0), (0.0, 0.0, 45.0), (359.9, 89.9, 0.0), (7, -90, 30)]:
        one = exposure(ra, dec, roll)
        outline = one.footprint()
        for edge_ra, edge_dec in zip(*one.wcs().all_pix2world(x, y, 0), strict=True):
            assert not is_empty(outline, edge_ra, edge_dec)


CENTRES = st.sampled_from([(0.0, 0.0), (359.99, -30.0), (12.0, 90.0), (80.0, -89.0), (180.0, 1.7)])


@pytest.mark.slow
@given(CENTRES, st.floats(0, 360), st.floats(-3, 3), st.floats(-3, 3), st.booleans(), st.booleans())
def test_as_another_geometry_has_it(centre, roll, x, y, closed, reverse):
    polygon = list(exposure(*centre, roll).footprint())
    # A source x and y degrees from the centre.
    ra, dec = exposure(*centre, 0.0).wcs().wcs_pix2world(1019.5 + x * 585, 1019.5 + y * 585, 0)
    shape = ConvexPolygon(polygon)
    tolerance = FOOTPRINT_TOLERANCE_DEG
    is_on = intersects(shape, Circle(float(ra), float(dec), 0.99 * tolerance))
    # The corners of a wider polygon are farther from its own than its edges are.
    is_off = not intersects(shape, Circle(float(ra), float(dec), 1.5 * tolerance))
    assume(is_on or is_off)
    outline = polygon[::-1] if reverse else polygon
    assert is_empty([*outline, outline[0]] if closed else outline, ra, dec) == is_off
    assert is_empty(outline, (ra + 180) % 360, -dec)


def test_a_source_at_the_limit():
    for beyond, empty in [(0.049, False), (0.051, True)]:
        assert is_empty(SQUARE, 11.0, 1.0 + 1.5e-4 + beyond) == empty
        assert is_empty(SQUARE, 10.0 - beyond, 0.0) == empty


@pytest.mark.slow
@pytest.mark.parametrize(
    "dense",
    [
        lambda rng: (rng.uniform(9, 13, 5000), rng.uniform(-3, 1, 5000)),
        lambda rng: (rng.uniform(0, 360, 5000), rng.uniform(86, 90, 5000)),
        lambda rng: (rng.normal(0, 0.05, 3000) % 360, rng.normal(0, 0.05, 3000)),
        lambda rng: random_sky(3000, 5),
    ],
)
def test_many_sources_decide_as_one_by_one(dense):
    rng = np.random.default_rng(2)
    ra, dec = dense(rng)
    centres = rng.choice(len(ra), 20)
    frames = [
        exposure((ra[i] + dx) % 360, np.clip(dec[i] + dy, -90, 90), roll).footprint()
        for i, dx, dy, roll in zip(
            centres, rng.uniform(-3, 3, 20), rng.uniform(-3, 3, 20), rng.uniform(0, 90, 20),
            strict=True,
        )
    ]  # fmt: skip
    found = SourceSky(ra, dec).find_empty([pack(frame) for frame in frames])
    for frame, empty in zip(frames, found, strict=True):
        distance = find_distance(ConvexPolygon(frame), ra, dec)
        # A cell stands for its sources, which lie within 0.08 deg of each other.
        if distance < FOOTPRINT_TOLERANCE_DEG:
            assert not empty
        if distance > 1.5 * FOOTPRINT_TOLERANCE_DEG + 0.08:
            assert empty


def test_shapes_that_are_no_frames_are_never_lost():
    inside = (np.array([11.0]), np.array([0.5]))
    dart = [10.0, -1.0, 12.0, -1.0, 12.0, 1.0, 11.5, -0.8]
    bow = [10.0, -1.0, 12.0, 1.0, 12.0, -1.0, 10.0, 1.0]
    point = [11.0, 0.5] * 4
    around = [0.0, 0.0, 120.0, 0.0, 240.0, 0.0]
    for shape in (dart, bow, point, around):
        assert not SourceSky(*inside).find_empty([pack(shape)])[0]
    assert not is_empty(around, 7.0, 80.0)
    for shape in (dart, bow, point):
        assert is_empty(shape, 20.0, 0.5)


# Circles


def check_cover(ra, dec, at_most):
    circles = SourceSky(ra, dec).cover()
    assert len(circles) <= at_most
    left = np.ones(len(ra), bool)
    for circle in circles:
        left &= angular_distance(circle.ra, circle.dec, ra, dec) > circle.radius
    assert not left.any()
    assert all(0 < circle.radius <= 26 for circle in circles)
    return circles


@pytest.mark.parametrize("n", [1, 2, 10, 100, 200, 1000, 5000, 100_000])
def test_the_number_of_circles_is_bounded(n):
    circles = check_cover(*random_sky(n, n), min(n, MAX_GROUPS))
    if n <= 10:
        assert all(circle.radius < 5 for circle in circles)


def test_the_widest_circles_need_no_bound():
    """One a degree apart everywhere, which no narrower radius covers with so few."""
    dec, ra = np.meshgrid(np.arange(-90.0, 90.1), np.arange(0.0, 360.0), indexing="ij")
    assert len(check_cover(ra.ravel(), dec.ravel(), 91)) > 40


def test_a_source_alone_has_a_small_circle():
    for ra, dec in [(0.0, 0.0), (359.999999, 45.0), (123.0, 90.0), (10.0, -90.0)]:
        [circle] = check_cover(np.array([ra]), np.array([dec]), 1)
        assert circle.radius == pytest.approx(FOOTPRINT_TOLERANCE_DEG)


@pytest.mark.parametrize(
    ("ra", "dec"),
    [([359.9, 0.1], [0.0, 0.0]), ([0.0, 120.0, 240.0], [89.5] * 3), ([5.0, 185.0], [-89.9, -89.8])],
)
def test_close_sources_share_a_circle(ra, dec):
    check_cover(np.array(ra), np.array(dec), 1)


def test_sources_far_apart_do_not():
    assert len(SourceSky(np.array([0.0, 180.0]), np.array([0.0, 0.0])).cover()) == 2
    assert len(SourceSky(np.array([0.0, 0.0]), np.array([90.0, -90.0])).cover()) == 2


def test_a_field_is_one_circle():
    """Queries cost time, so that a field of some degrees is not divided."""
    rng = np.random.default_rng(1)
    check_cover(200 + rng.uniform(-4, 4, 2000), rng.uniform(-4, 4, 2000), 1)


def test_the_order_of_a_catalogue_does_not_matter():
    ra, dec = random_sky(500, 9)
    ids = pa.array([str(i) for i in range(500)], pa.large_string())
    again = np.random.default_rng(1).permutation(500)
    circles = [
        Catalogue.from_arrays(ids, ra[order], dec[order]).sky.cover()
        for order in (np.arange(500), again)
    ]
    assert circles[0] == circles[1]
