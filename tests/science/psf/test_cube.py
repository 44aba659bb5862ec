"""The PSF of a QR2 cube, against integrals by brute force."""

from __future__ import annotations

import numpy as np
import pytest
from psf_reference import cube_samples, integrate_by_brute_force, optical

from spxdask.science.psf.cube import arrange_cube_zones, make_cube_model, read_centres

AXIS = 92.5 + 185.4 * np.arange(11)


def find_peak():
    """The brightest point of the optical PSF (x, y), pixels."""
    steps = np.linspace(-0.1, 0.1, 401)
    light = optical(*np.meshgrid(steps, steps))
    row, column = np.unravel_index(np.argmax(light), light.shape)
    return steps[column], steps[row]


PEAK = find_peak()


def one_zone(**options):
    zones = arrange_cube_zones([1019.5], [1019.5])
    return make_cube_model(zones, cube_samples(**options)[None].astype(">f4"))


def offsets(model, x, y):
    stamps, corners, _ = model.render(x, y)
    k = np.arange(model.size)
    dx = corners[:, 1, None, None] + k - np.reshape(x, (-1, 1, 1))
    dy = corners[:, 0, None, None] + k[:, None] - np.reshape(y, (-1, 1, 1))
    return stamps, *np.broadcast_arrays(dx, dy)


def phases():
    rng = np.random.default_rng(1)
    regular = np.linspace(-0.5, 0.5, 6)
    x, y = (a.ravel() + 1000.0 for a in np.meshgrid(regular, regular))
    more = rng.uniform(0, 2039, (2, 24))
    return np.append(x, more[0]), np.append(y, more[1])


@pytest.mark.parametrize("wide", [1.0, 1.4])
def test_stamps_are_integrals_over_native_pixels(wide):
    model = one_zone(wide=wide)
    stamps, dx, dy = offsets(model, *phases())
    assert stamps.shape[1:] == (11, 11)
    # The source is where the brightest point is: see below.
    truth = integrate_by_brute_force(dx + PEAK[0], dy + PEAK[1], wide) / cube_samples(wide).sum()
    inside = (abs(dx) < 4.5) & (abs(dy) < 4.5)
    assert abs(stamps - truth)[inside].max() < 1e-3 * stamps.max()
    np.testing.assert_allclose(stamps.sum(axis=(1, 2)), 1.0, atol=2e-4)


def test_samples_at_the_edges_of_a_pixel_have_half_weights():
    """At phases for which edges are samples, and up to the next term of the same formula."""
    stamps, _, _ = one_zone().render([1000.0], [1000.0])
    samples = cube_samples()
    weights = np.ones(11)
    weights[[0, -1]] = 0.5
    by_hand = weights @ samples[45:56, 45:56] @ weights / samples.sum()
    assert stamps[0, 5, 5] == pytest.approx(by_hand, rel=0.015)
    # Sums of 10 samples, not 11 with half weights, are half a sample off: they are no way out.
    shifted = samples[45:55, 45:55].sum() / samples.sum()
    truth = integrate_by_brute_force(0.0, 0.0) / samples.sum()
    assert abs(stamps[0, 5, 5] - truth) < 0.1 * abs(shifted - truth)


@pytest.mark.slow
@pytest.mark.parametrize("core", [(-0.05, -0.05), (-0.03, 0.01), (0.0, -0.11), (0.07, 0.03)])
def test_the_core_is_moved_onto_the_source(core):
    model = one_zone(core=np.subtract(core, PEAK))
    assert model.psf.core[0] == pytest.approx(core, abs=0.002)
    stamps, dx, dy = offsets(model, *phases())
    truth = integrate_by_brute_force(dx + PEAK[0], dy + PEAK[1])
    inside = (abs(dx) < 4.4) & (abs(dy) < 4.4)
    scale = (stamps * truth).sum() / (truth * truth).sum()
    assert abs(stamps - scale * truth)[inside].max() < 6e-3 * stamps.max()


def numbered_cube():
    """Planes that can be told apart: their width grows with iy, and their core with ix."""
    return np.array(
        [
            cube_samples(wide=1.0 + 0.05 * iy, core=(0.04 * (ix - 5), 0.0))
            for iy in range(11)
            for ix in range(11)
        ],
        ">f4",
    )


@pytest.fixture(scope="module")
def cube():
    return numbered_cube()


def listed(order):
    """Cards of the centres, in the order of the planes or x-major, as old headers have them."""
    pairs = [(x, y) for y in AXIS for x in AXIS]
    if order == "transposed":
        pairs = [(x, y) for x in AXIS for y in AXIS]
    cards = {f"XCTR_{k + 1}": pair[0] for k, pair in enumerate(pairs)}
    return cards | {f"YCTR_{k + 1}": pair[1] for k, pair in enumerate(pairs)}


@pytest.mark.parametrize("order", ["of the planes", "transposed"])
def test_planes_are_assigned_by_number_whatever_the_header_lists(cube, order):
    zones = arrange_cube_zones(*read_centres(listed(order), 121))
    x, y = AXIS[[1, 9, 3]] + 20.0, AXIS[[8, 0, 5]] - 30.0
    assert zones.nearest_to(x, y)[0].ravel().tolist() == [8 * 11 + 1, 9, 5 * 11 + 3]
    model = make_cube_model(zones, cube, at=(x, y))
    places = model.find_zones(x, y)[0].ravel()
    assert model.psf.core[places, 0] - 0.04 * (np.array([1, 9, 3]) - 5) == pytest.approx(
        0.0, abs=0.02
    )


@pytest.mark.parametrize("is_bilinear", [False, True])
def test_a_model_of_the_needed_zones_is_the_same(cube, is_bilinear):
    zones = arrange_cube_zones(*read_centres(listed("transposed"), 121))
    x, y = np.random.default_rng(4).uniform(0, 2039, (2, 7))
    whole = make_cube_model(zones, cube, is_bilinear=is_bilinear)
    part = make_cube_model(zones, cube, at=(x, y), is_bilinear=is_bilinear)
    assert len(whole.psf.coefficients) == 121
    assert len(part.psf.coefficients) <= (28 if is_bilinear else 7)
    np.testing.assert_array_equal(part.render(x, y)[0], whole.render(x, y)[0])
    with pytest.raises(ValueError, match="made for other places"):
        part.find_zones(*np.meshgrid(AXIS, AXIS))


def test_the_byte_order_of_the_samples_does_not_matter(cube):
    zones = arrange_cube_zones(*read_centres(listed("of the planes"), 121))
    x, y = [300.3], [1500.7]
    one = make_cube_model(zones, cube, at=(x, y))
    other = make_cube_model(zones, cube.astype("<f4"), at=(x, y))
    assert one == other


def test_zones_without_light_are_replaced_by_their_neighbours(cube):
    cube = cube.copy()
    cube[60, 3, 3] = np.nan
    cube[0] = 0.0
    zones = arrange_cube_zones(*read_centres(listed("of the planes"), 121))
    x, y = [AXIS[5], AXIS[0], AXIS[7]], [AXIS[5], AXIS[0], AXIS[7]]
    model = make_cube_model(zones, cube, at=(x, y))
    assert model.unusable == 2
    assert model.render(x, y)[0].sum(axis=(1, 2)) == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(ValueError, match="no zone has a usable PSF"):
        make_cube_model(zones, np.full_like(cube, np.nan))


def test_cubes_that_make_no_sense_are_refused(cube):
    zones = arrange_cube_zones(*read_centres(listed("of the planes"), 121))
    for wrong in (cube[:-1], cube[:, 1:, 1:], cube[:, 1:], cube[0]):
        with pytest.raises(ValueError, match="a PSF cube of 121 zones"):
            make_cube_model(zones, wrong)
    with pytest.raises(ValueError, match="at 0 samples a pixel"):
        make_cube_model(zones, cube, oversampling=0)
    cards = listed("of the planes")
    for value in (None, "x", np.nan, True):
        with pytest.raises(ValueError, match="YCTR_7 of the PSF must be a number"):
            read_centres(cards | {"YCTR_7": value}, 121)
    with pytest.raises(ValueError, match="do not form a lattice"):
        arrange_cube_zones(np.arange(12.0), np.arange(12.0))
    with pytest.raises(ValueError, match="do not form a lattice"):
        arrange_cube_zones([0.0, 1.0, 0.0], [0.0, 0.0, 1.0])
