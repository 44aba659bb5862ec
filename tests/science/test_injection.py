"""Artificial sources in a frame: where they are, what they add, and what stays as it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import simulated
from scipy.spatial.distance import pdist

from spxdask.science.calibration import NO_CALIBRATION
from spxdask.science.injection import draw_positions, estimate_photon_variance, inject_sources
from spxdask.science.level2.frame import map_file, open_frame
from spxdask.science.options import PhotometryConfig
from spxdask.science.photometry import UJY_PER_ARCSEC2, choose_psf, find_solid_angles

SHAPE = (240, 240)


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frame")
    [one] = simulated.simulate(folder, [simulated.exposure(0, 3)], simulated.field_sky())
    return open_frame(map_file(one.path), one.path.name)


def inject(frame, x, y, flux, **options):
    x, y = np.array(x, float), np.array(y, float)
    model, _ = choose_psf(frame, NO_CALIBRATION, x, y, PhotometryConfig(), [])
    area = find_solid_angles(frame, NO_CALIBRATION, x, y, [])
    options = {"photon_variance": 9e-5} | options
    rng = np.random.default_rng(5)
    return inject_sources(frame, model, x, y, np.array(flux), area, rng, **options), area


def is_same(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return one.view("u4") == other.view("u4")


def test_what_no_light_falls_on_is_the_same_to_the_bit(frame):
    before = [getattr(frame, name).tobytes() for name in ("image", "variance", "flags", "zodi")]
    found, _ = inject(frame, [60.3, 150.8], [70.1, 160.2], [3e4, 300.0])
    after = [getattr(frame, name).tobytes() for name in ("image", "variance", "flags", "zodi")]
    assert before == after
    rows, columns = np.indices(SHAPE)
    far = np.ones(SHAPE, bool)
    for x, y in ((60.3, 70.1), (150.8, 160.2)):
        far &= np.maximum(abs(columns - x), abs(rows - y)) > 5
    for name in ("image", "variance", "flags"):
        plane, old = getattr(found, name), getattr(frame, name)
        assert plane.dtype == old.dtype
        assert is_same(plane, old)[far].all()
        assert not is_same(plane, old)[~far].all()
    assert found.zodi is frame.zodi


def test_the_light_is_the_flux_and_has_its_noise(frame):
    quiet = replace(frame, image=np.zeros(SHAPE, ">f4"), variance=np.full(SHAPE, 1e-4, ">f4"))
    x, y = (
        axis.ravel() + 0.3 for axis in np.meshgrid(np.arange(30, 210, 20), np.arange(30, 210, 20))
    )
    flux = np.full(len(x), 5e3)
    found, area = inject(quiet, x, y, flux, photon_variance=0.0)
    total = found.image.sum(dtype=float) * UJY_PER_ARCSEC2 * area.mean()
    assert total == pytest.approx(flux.sum(), rel=1e-3)
    assert is_same(found.variance, quiet.variance).all()
    noisy, _ = inject(quiet, x, y, flux, photon_variance=1e-3)
    light = found.image.astype(float).clip(min=0)
    np.testing.assert_allclose(noisy.variance, 1e-4 + 1e-3 * light, rtol=1e-6)
    core = light > 1e-3 * light.max()
    pulls = (noisy.image - found.image)[core] / np.sqrt(1e-3 * light[core])
    assert abs(pulls.mean()) < 0.15
    assert 0.9 < pulls.std() < 1.1
    factors = np.full((2040, 2040), 2.0)
    half, _ = inject(quiet, x, y, flux, photon_variance=0.0, factors=factors)
    np.testing.assert_allclose(half.image, found.image / 2, rtol=1e-6, atol=1e-9)


def test_invalid_pixels_stay_so(frame):
    image, variance = frame.image.copy(), frame.variance.copy()
    image[120, 100] = np.nan
    variance[120, 101], variance[121, 100] = np.nan, -1.0
    found, _ = inject(replace(frame, image=image, variance=variance), [100.0], [120.0], [1e4])
    assert np.isnan(found.image[120, 100])
    assert np.isnan(found.variance[120, 101])
    assert found.variance[121, 100] == -1.0


def test_the_variance_of_light_is_that_of_the_frame(frame):
    # The simulator's own number.
    assert estimate_photon_variance(frame) == pytest.approx(simulated.OPTIONS.shot_noise, rel=0.1)
    falling = replace(frame, variance=(1.0 / (1.0 + abs(frame.image))).astype(">f4"))
    assert estimate_photon_variance(falling) >= 0.0
    flat = replace(frame, image=np.ones(SHAPE, ">f4"))
    assert estimate_photon_variance(flat) == 0.0


@pytest.mark.parametrize("n_sources", [1, 40, 4000])
def test_positions_are_within_the_margin_and_apart(n_sources):
    rng = np.random.default_rng(3)
    x, y = rng.uniform(30, 200, (2, n_sources))
    found = np.column_stack(draw_positions(x, y, 50, shape=SHAPE, margin=26, rng=rng))
    assert 20 <= len(found) <= 50
    assert found.min() >= 26
    assert found.max() < SHAPE[0] - 26
    assert pdist(found).min() >= 10
    assert np.hypot(*(found[:, np.newaxis] - np.column_stack([x, y])).T).min() >= 0.5


def test_positions_are_near_the_catalogue_and_none_without():
    rng = np.random.default_rng(3)
    options = {"shape": (2040, 2040), "margin": 26, "rng": rng}
    x, y = rng.uniform(1000, 1100, (2, 300))
    found = np.column_stack(draw_positions(x, y, 30, **options))
    assert len(found) == 30
    assert abs(found - 1050).max() < 71
    assert len(draw_positions(np.array([3.0]), np.array([500.0]), 10, **options)[0]) == 0
