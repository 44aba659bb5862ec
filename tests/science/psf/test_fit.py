"""PSF fluxes of all sources together, against dense algebra and against the truth."""

from __future__ import annotations

import numpy as np
import pytest
from photutils.aperture import CircularAperture
from psf_reference import cube_samples, effective, epsf_samples

from spxdask.science.kernels.pixels import Conversion, Planes
from spxdask.science.psf.cube import arrange_cube_zones, make_cube_model
from spxdask.science.psf.epsf import make_epsf_model
from spxdask.science.psf.fit import (
    TOO_CLOSE,
    TOO_MASKED,
    Contaminants,
    choose_linked,
    measure_psf_fluxes,
)

BAD, PSF_BAD = 1 << 6 | 1 << 19, 1 << 6
OMEGA = 37.8


def epsf_model(noise=0.0):
    rng = np.random.default_rng(0)
    x, y = (a.ravel() for a in np.meshgrid([50.0, 150.0, 250.0], [50.0, 150.0, 250.0]))
    samples = [epsf_samples(1 + 0.1 * k) for k in (0, 1, 2)] * 3
    samples = [one + rng.normal(0, noise, one.shape) for one in samples]
    return make_epsf_model(x, y, samples)


def cube_model():
    x, y = (a.ravel() for a in np.meshgrid([50.0, 250.0], [50.0, 250.0]))
    zones = arrange_cube_zones(x, y)
    samples = [cube_samples(wide, (-0.05, -0.05)) for wide in (1.0, 1.1, 1.2, 1.3)]
    return make_cube_model(zones, np.array(samples, ">f4"))


@pytest.fixture(scope="module", params=["epsf", "cube"])
def model(request):
    return epsf_model() if request.param == "epsf" else cube_model()


@pytest.fixture(scope="module")
def epsf():
    return epsf_model()


class Scene:
    """A frame with sources of known brightness, summed over their PSF."""

    def __init__(
        self, model, x, y, flux, *, shape=(300, 300), level=0.5, sigma=0.0, shot=0.0, seed=1
    ):
        rng = np.random.default_rng(seed)
        self.model, self.x, self.y = model, np.asarray(x, float), np.asarray(y, float)
        self.design = np.zeros((len(self.x), *shape))
        stamps, corners, _ = model.render(self.x, self.y)
        for one, stamp, (row, column) in zip(self.design, stamps, corners, strict=True):
            for j, k in np.ndindex(stamp.shape):
                if 0 <= row + j < shape[0] and 0 <= column + k < shape[1]:
                    one[row + j, column + k] = stamp[j, k]
        self.flux = np.asarray(flux, float)
        self.image = level + np.tensordot(self.flux, self.design, axes=1)
        self.variance = np.full(shape, max(sigma, 0.01) ** 2) + shot * self.image
        if sigma:
            self.image += rng.normal(0, 1, shape) * np.sqrt(self.variance)
        self.flags = np.zeros(shape, np.int64)
        self.level = np.full(len(self.x), level)
        self.level_error = np.zeros(len(self.x))

    def measure(self, some=None, radius=1.06, factors=None, **options):
        some = np.arange(len(self.x)) if some is None else some
        words = [plane.astype(">f4").view("<u4") for plane in (self.image, self.variance)]
        words += [np.zeros_like(words[0]), self.flags.astype(">i4").view("<u4")]
        for plane in words:
            plane.flags.writeable = False
        arguments = {
            "level": self.level[some],
            "level_error": self.level_error[some],
            "radius": radius,
            "solid_angle": np.full(len(some), OMEGA),
            "bad": BAD,
            "psf_bad": PSF_BAD,
        }
        return measure_psf_fluxes(
            Planes(*words, factors),
            Conversion(0.0, 1.0, np.nan),
            self.model,
            self.x[some],
            self.y[some],
            **(arguments | options),
        )

    def solve_densely(self):
        """The definition, with matrices over all pixels, and the covariance of the whole."""
        good = np.isfinite(self.image) & (self.variance > 0) & (self.flags & PSF_BAD == 0)
        stored = self.image.astype("f4").astype(float)
        variance = self.variance.astype("f4").astype(float)
        masked = self.design[:, good]
        inverse = np.linalg.inv(masked @ masked.T)
        right = masked @ stored[good] - masked.sum(axis=1) * self.level
        covariance = inverse @ (masked * variance[good]) @ masked.T @ inverse
        effect = inverse @ (masked.sum(axis=1) * self.level_error)
        fraction = (masked**2).sum(axis=1) / (self.design**2).sum(axis=(1, 2))
        flux = inverse @ right
        error = np.sqrt(np.diag(covariance) + effect**2)
        return flux * OMEGA, error * OMEGA, fraction


def clusters(seed=0, n=14):
    """Blends of up to four sources, one to three pixels apart, far from one another."""
    rng = np.random.default_rng(seed)
    x, y = [], []
    for k in range(n):
        centre = 20 + 18.0 * np.array([k % 4, k // 4]) * 4 + rng.uniform(0, 1, 2)
        for _ in range(rng.integers(1, 5)):
            at = centre + rng.uniform(-2.5, 2.5, 2)
            if all(np.hypot(at[0] - a, at[1] - b) > 0.8 for a, b in zip(x, y, strict=True)):
                x.append(at[0])
                y.append(at[1])
    return np.array(x), np.array(y), 10 ** rng.uniform(0, 3, len(x))


def test_factors_are_as_if_the_planes_had_been_multiplied(model):
    x, y, flux = clusters(4)
    scene = Scene(model, x, y, flux, sigma=0.3, shot=0.02)
    rng = np.random.default_rng(4)
    factors = rng.uniform(0.8, 1.1, scene.image.shape).astype("f4")
    got = scene.measure(factors=factors)
    scene.image = scene.image.astype("f4") * factors
    scene.variance = scene.variance.astype("f4") * (factors * factors)
    expected = scene.measure()
    for name in ("flux", "flux_error", "chi2", "neighbour_flux"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


def test_agrees_with_dense_algebra(model):
    x, y, flux = clusters()
    scene = Scene(model, x, y, flux, sigma=0.3, shot=0.02)
    scene.level_error[:] = 0.01
    rng = np.random.default_rng(3)
    scene.flags[rng.uniform(size=scene.flags.shape) < 0.05] |= 1 << 6
    scene.flags[rng.uniform(size=scene.flags.shape) < 0.05] |= 1 << 19
    bad = rng.uniform(size=scene.flags.shape) < 0.02
    scene.image[bad] = np.nan
    scene.variance[rng.uniform(size=scene.flags.shape) < 0.02] = np.nan
    scene.variance[rng.uniform(size=scene.flags.shape) < 0.01] = 0.0
    expected, error, fraction = scene.solve_densely()
    got = scene.measure()
    np.testing.assert_allclose(got.fraction, fraction, rtol=1e-9)
    has = fraction >= 0.3
    assert has.sum() >= 20
    np.testing.assert_allclose(got.flux[has], expected[has], rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(got.flux_error[has], error[has], rtol=1e-8)
    assert np.isnan(got.flux[~has]).all()
    assert got.empty == ({TOO_MASKED: int((~has).sum())} if (~has).any() else {})


def test_fluxes_without_noise_are_the_truth(model):
    x, y, flux = clusters(1)
    got = Scene(model, x, y, flux).measure()
    np.testing.assert_allclose(got.flux, flux * OMEGA, rtol=2e-5)
    assert (got.chi2 < 1e-3).all()
    np.testing.assert_allclose(got.fraction, 1.0)


def test_neighbours_and_corrections_are_sums_over_the_circle(model):
    x, y, flux = clusters(2)
    scene = Scene(model, x, y, flux, level=0.0)
    scene.flags[::2, ::3] = 1 << 19
    for radius in (1.06, 2.5, 9.5):
        got = scene.measure(radius=radius)
        for k in range(len(x)):
            mask = CircularAperture((x[k], y[k]), radius).to_mask(method="exact")
            weights = mask.to_image(scene.image.shape)
            own = np.sum(weights * scene.design[k])
            others = np.tensordot(scene.flux, scene.design, axes=1) - flux[k] * scene.design[k]
            assert got.aperture_correction[k] == pytest.approx(1 / own, rel=1e-9)
            assert got.neighbour_flux[k] == pytest.approx(
                np.sum(weights * others) * OMEGA, rel=1e-4, abs=1e-4
            )
            on_bad = np.sum((weights * scene.design[k])[scene.flags > 0]) / own
            assert got.bad_fraction[k] == pytest.approx(on_bad, rel=1e-9, abs=1e-12)
            # What the aperture holds, without the neighbours, corrected, is the total.
            inside = np.sum(weights * scene.image) * OMEGA - got.neighbour_flux[k]
            assert inside * got.aperture_correction[k] == pytest.approx(flux[k] * OMEGA, rel=1e-3)


def grid_of(n, spacing, rng):
    x, y = (a.ravel() for a in np.meshgrid(np.arange(n), np.arange(n)))
    return 20 + spacing * x + rng.uniform(0, 1, x.size), 20 + spacing * y + rng.uniform(
        0, 1, x.size
    )


def render_image(model, x, y, flux, shape):
    image = np.zeros(shape)
    stamps, corners, _ = model.render(x, y)
    size = model.size
    for one, (row, column), f in zip(stamps, corners, flux, strict=True):
        image[row : row + size, column : column + size] += f * one
    return image


def noisy(model, x, y, flux, shape, seed, sigma=0.3, shot=0.05, level=0.5):
    """A large scene with VARIANCE noise; the variance is that of the observed brightness."""
    scene = Scene(model, [], [], [], shape=(1, 1))
    scene.x, scene.y, scene.flux = x, y, flux
    rng = np.random.default_rng(seed)
    light = level + render_image(model, x, y, flux, shape)
    scene.image = light + rng.normal(0, 1, shape) * np.sqrt(sigma**2 + shot * light)
    scene.variance = sigma**2 + shot * np.maximum(scene.image, 0.0)
    scene.flags = np.zeros(shape, np.int64)
    # Medians of windows of 2,500 pixels, of which one half is usable.
    scene.level_error = np.full(len(x), 1.25 * sigma / np.sqrt(1250))
    scene.level = level + rng.normal(0, 1, len(x)) * scene.level_error
    return scene


def test_pulls_of_isolated_sources(model):
    rng = np.random.default_rng(5)
    x, y = grid_of(70, 16.0, rng)
    flux = 10 ** rng.uniform(0.5, 3.5, len(x))
    scene = noisy(model, x, y, flux, (1160, 1160), 6)
    got = scene.measure()
    pull = (got.flux / OMEGA - flux) / (got.flux_error / OMEGA)
    assert abs(np.median(pull)) < 0.04  # 70 x 70 sources leave 0.018 of noise
    assert 0.96 < np.std(pull) < 1.04
    # The variance follows the noise, and 1 / variance is large where the noise is low.
    assert 0.97 < np.mean(got.chi2) < 1.05
    bright = flux > 1000
    assert abs(np.median(got.flux[bright] / OMEGA / flux[bright] - 1)) < 0.002


def test_pulls_of_pairs(model):
    rng = np.random.default_rng(7)
    x, y = grid_of(60, 18.0, rng)
    distance, angle = rng.uniform(1, 3, len(x)), rng.uniform(0, 2 * np.pi, len(x))
    x = np.append(x, x + distance * np.cos(angle))
    y = np.append(y, y + distance * np.sin(angle))
    flux = 10 ** rng.uniform(0.5, 3.0, len(x))
    scene = noisy(model, x, y, flux, (1130, 1130), 8)
    half = len(x) // 2
    # Windows of a pair are nearly the same.
    scene.level[half:] = scene.level[:half]
    got = scene.measure()
    pull = (got.flux / OMEGA - flux) / (got.flux_error / OMEGA)
    assert got.empty == {}
    assert abs(np.median(pull)) < 0.05
    assert 0.95 < np.std(pull) < 1.05


def test_errors_of_a_large_group_are_those_of_the_whole(epsf):
    """Of 400 sources in one group, of which the covariance of each considers some."""
    rng = np.random.default_rng(9)
    side = 74.0
    x, y = np.empty(0), np.empty(0)
    while len(x) < 400:
        at = rng.uniform(15, 15 + side * 1.6, 2)
        if not len(x) or np.hypot(x - at[0], y - at[1]).min() > 0.7:
            x, y = np.append(x, at[0]), np.append(y, at[1])
    scene = Scene(epsf, x, y, 10 ** rng.uniform(1, 3, 400), sigma=0.3, shape=(160, 160))
    scene.level_error[:] = 0.01
    expected, error, _ = scene.solve_densely()
    got = scene.measure()
    np.testing.assert_allclose(got.flux, expected, rtol=1e-6, atol=1e-6 * abs(expected).max())
    np.testing.assert_allclose(got.flux_error, error, rtol=1e-3)


def test_sources_that_cannot_be_told_apart_are_empty_and_counted(epsf):
    """Their neighbours are measured as if there were one source."""
    x = [40.0, 40.0, 41.8, 100.0, 100.4, 200.0, 200.3]
    y = [40.0, 40.0, 40.5, 100.0, 100.0, 200.0, 200.45]
    flux = [100.0, 50.0, 80.0, 10.0, 20.0, 30.0, 40.0]
    scene = Scene(epsf, x, y, flux)
    got = scene.measure()
    assert np.isnan(got.flux).tolist() == [True, True, False, True, True, False, False]
    np.testing.assert_allclose(got.flux[[2, 5, 6]], np.array(flux)[[2, 5, 6]] * OMEGA, rtol=1e-4)
    assert got.empty == {TOO_CLOSE: 4}
    for name in ("flux_error", "chi2", "neighbour_flux"):
        np.testing.assert_array_equal(np.isnan(getattr(got, name)), np.isnan(got.flux))
    single = Scene(epsf, [40.0, 41.8], [40.0, 40.5], [150.0, 80.0]).measure()
    assert got.flux_error[2] == pytest.approx(single.flux_error[1], rel=1e-6)
    assert got.neighbour_flux[2] == pytest.approx(single.neighbour_flux[1], rel=1e-4)


def test_a_masked_core_gives_no_flux(epsf):
    scene = Scene(epsf, [60.1, 120.0], [60.0, 120.0], [100.0, 100.0])
    scene.flags[59:62, 59:62] = 1 << 6
    got = scene.measure()
    assert got.fraction[0] < 0.3
    assert np.isnan(got.flux[0])
    assert got.flux[1] == pytest.approx(100 * OMEGA, rel=1e-4)
    assert got.empty == {TOO_MASKED: 1}
    assert got.bad_fraction[0] > 0.99
    # All pixels masked.
    scene.flags[50:70, 50:70] = 1 << 6
    got = scene.measure()
    assert got.fraction[0] == 0
    assert np.isnan([got.flux[0], got.flux_error[0], got.chi2[0]]).all()
    assert got.neighbour_flux[0] == 0


def test_contaminants_take_part_and_get_no_rows(model):
    x, y, flux = [60.2, 120.0], [60.4, 119.7], [100.0, 60.0]
    more = [61.9, 60.2 + 0.1, 120.0 + 0.3], [60.0, 60.4, 119.7]
    scene = Scene(model, [*x, more[0][0]], [*y, more[1][0]], [*flux, 500.0])
    catalogue = np.arange(2)
    alone = scene.measure(catalogue)
    assert alone.flux[0] / OMEGA > 120
    nan = np.full(1, np.nan)
    beside = Contaminants(
        x=np.array(more[0][:1]), y=np.array(more[1][:1]), level=nan, level_error=nan
    )
    got = scene.measure(catalogue, contaminants=beside)
    assert len(got.flux) == 2
    np.testing.assert_allclose(got.flux, np.array(flux) * OMEGA, rtol=1e-4)
    assert got.neighbour_flux[0] > 10 * got.neighbour_flux[1]
    assert got.same_contaminants == 0
    # One that is a source of the catalogue is left out, one that may be another is not.
    nan = np.full(3, np.nan)
    beside = Contaminants(x=np.array(more[0]), y=np.array(more[1]), level=nan, level_error=nan)
    got = scene.measure(catalogue, contaminants=beside)
    assert got.same_contaminants == 1
    assert got.flux[0] == pytest.approx(flux[0] * OMEGA, rel=1e-4)
    assert got.empty == {TOO_CLOSE: 1}


def test_stamps_beyond_the_edge(model):
    """Contaminants may lie there; what is on the frame is used."""
    x, y = np.array([1.2, 298.9, 150.0, -2.0]), np.array([2.0, 299.4, 0.1, 30.0])
    scene = Scene(model, x, y, [10.0, 20.0, 30.0, 40.0])
    got = scene.measure()
    np.testing.assert_allclose(got.flux[:3], [378, 756, 1134], rtol=1e-4)
    assert got.empty == {TOO_MASKED: 1}


def test_order_does_not_matter_and_strangers_neither(epsf):
    x, y, flux = clusters(4)
    scene = Scene(epsf, x, y, flux, sigma=0.2)
    together = scene.measure()
    order = np.random.default_rng(1).permutation(len(x))
    shuffled = scene.measure(order)
    np.testing.assert_allclose(shuffled.flux, together.flux[order], rtol=1e-9)
    np.testing.assert_allclose(shuffled.flux_error, together.flux_error[order], rtol=1e-9)
    # Groups do not know of one another, to the last bit.
    group = np.flatnonzero(np.hypot(x - x[0], y - y[0]) < 10)
    alone = scene.measure(group)
    for name in ("flux", "flux_error", "chi2", "fraction", "neighbour_flux", "bad_fraction"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(together, name)[group])


def test_no_sources(epsf):
    got = Scene(epsf, [], [], []).measure()
    assert got.flux.shape == (0,)
    assert got.empty == {}


@pytest.mark.parametrize("kind", ["epsf", "cube"])
@pytest.mark.parametrize("wide", [0.9, 1.2])
@pytest.mark.slow
def test_fluxes_of_an_analytic_psf_are_unbiased(kind, wide):
    """The frame is drawn with the integral of the PSF over each pixel, not with the model."""
    if kind == "epsf":
        model = make_epsf_model([100.0], [100.0], [epsf_samples(wide)])
        share = epsf_samples(wide).sum()
        core = np.zeros(2)
    else:
        zones = arrange_cube_zones([100.0], [100.0])
        model = make_cube_model(zones, cube_samples(wide)[None].astype(">f4"))
        share, core = 1.0, model.psf.core[0]
    x, y = grid_of(12, 20.0, np.random.default_rng(2))
    scene = Scene(model, [], [], [], shape=(1, 1))
    scene.x, scene.y = x, y
    scene.level, scene.level_error = np.zeros(len(x)), np.zeros(len(x))
    scene.image = np.zeros((260, 260))
    scene.variance, scene.flags = np.ones((260, 260)), np.zeros((260, 260), int)
    box = np.arange(-8, 9)
    for k in range(len(x)):
        column, row = box + round(x[k]), box[:, None] + round(y[k])
        light = effective(column - x[k] + core[0], row - y[k] + core[1], wide)
        scene.image[row, column] += 1000.0 * light
    radius = 1.06
    got = scene.measure(radius=radius)
    # Light beyond the support of the model is not in the flux.
    flux = got.flux / OMEGA / 1000.0 / share
    assert abs(np.median(flux) - 1) < 1e-3
    assert abs(flux - 1).max() < 2e-3
    # And the sum over the aperture, corrected.
    for k in range(len(x)):
        mask = CircularAperture((x[k], y[k]), radius).to_mask(method="exact")
        total = np.sum(mask.to_image(scene.image.shape) * scene.image) / 1000.0 / share
        assert total * got.aperture_correction[k] == pytest.approx(1.0, abs=3e-3)


@pytest.mark.parametrize("radius", [1.06, 5.3])
def test_sources_without_a_link_change_nothing(epsf, radius):
    """Fluxes are equal to the bit without the sources that no overlapping stamps lead to."""
    rng = np.random.default_rng(8)
    x, y = rng.uniform(-3, 203, (2, 250))
    catalogue = np.arange(250) < 30
    # Sources with rows are ordered among the others in every way.
    scene = Scene(epsf, x, y, rng.uniform(5, 200, 250), shape=(200, 200), sigma=0.3)
    others = ~catalogue
    linked = choose_linked(x[catalogue], y[catalogue], x[others], y[others], epsf.size, radius)
    assert 20 < linked.sum() < 200

    def list_others(use):
        unknown = np.full(use.sum(), np.nan)
        return Contaminants(x=x[others][use], y=y[others][use], level=unknown, level_error=unknown)

    every, some = (
        scene.measure(np.flatnonzero(catalogue), radius=radius, contaminants=list_others(use))
        for use in (np.ones_like(linked), linked)
    )
    for name in ("flux", "flux_error", "chi2", "fraction", "neighbour_flux", "bad_fraction"):
        assert getattr(every, name).tobytes() == getattr(some, name).tobytes(), name
    assert every.empty == some.empty


def draw_stars(model, *, n=13, seed=5):
    """A frame of isolated stars, none of them at the border of zones."""
    rng = np.random.default_rng(seed)
    x, y = np.add(grid_of(n, 20.0, rng), 5.0)
    return Scene(model, x, y, 10 ** rng.uniform(2.3, 3, len(x)), sigma=0.3, shot=0.02, seed=seed)


@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.2, -0.1)])
def test_offsets_of_single_stars_scatter_by_their_errors(model, shift):
    pulls = []
    for seed in range(8):
        scene = draw_stars(model, n=5, seed=seed)
        scene.x, scene.y = scene.x - shift[0], scene.y - shift[1]
        found = scene.measure(is_star=np.ones(len(scene.x), bool)).offsets
        assert sorted(found.index) == list(range(25))
        pulls += [(found.dx - shift[0]) / found.dx_error, (found.dy - shift[1]) / found.dy_error]
        assert 0.001 < np.median(found.dx_error) < 0.01
    pulls = np.concatenate(pulls)
    # Of 400 numbers. The second fit leaves 0.0005 pixels of an offset of 0.2.
    assert np.std(pulls) == pytest.approx(1.0, abs=0.12)
    assert abs(np.mean(pulls)) < 0.25


def test_stars_that_tell_no_offset_are_left_out(epsf):
    scene = draw_stars(epsf, n=4)
    is_star = np.ones(16, bool)
    is_star[0] = False
    row, column = np.rint([scene.y, scene.x]).astype(int)
    # One has a pixel that cannot be used, one a neighbour that is in the catalogue, and one light
    # that is like no PSF. A faint neighbour is subtracted.
    scene.flags[row[1], column[1]] = PSF_BAD
    more = Scene(
        epsf,
        np.append(scene.x, scene.x[[2, 4]] + 2.0),
        np.append(scene.y, scene.y[[2, 4]]),
        np.append(scene.flux, scene.flux[[2, 4]] * (0.5, 0.03)),
        sigma=0.3,
        shot=0.02,
    )
    more.flags = scene.flags
    more.image[row[3] - 2 : row[3] + 3, column[3] - 2 : column[3] + 3] += 0.2 * scene.flux[3]
    found = more.measure(is_star=np.append(is_star, [False, False])).offsets
    assert sorted(found.index) == list(range(4, 16))
    assert (np.abs(found.dx) < 5 * found.dx_error).all()
    # The brightest are first, and contaminants and others are none.
    snr = more.flux[found.index]
    assert (np.diff(snr) <= 0.05 * snr[:-1]).all()
    unknown = np.full(12, np.nan)
    others = Contaminants(x=scene.x[4:], y=scene.y[4:], level=unknown, level_error=unknown)
    found = scene.measure(np.arange(4), is_star=is_star[:4], contaminants=others).offsets
    assert sorted(found.index) == [2, 3]
    assert len(scene.measure().offsets.index) == 0
