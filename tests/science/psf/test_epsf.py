"""The PSF of an EPSF table, against photutils."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.nddata import NDData
from photutils.aperture import CircularAperture
from photutils.psf import GriddedPSFModel, ImagePSF
from psf_reference import effective, epsf_samples

from spxdask.science.psf.epsf import make_epsf_model

CENTRES = np.array([49.0, 146.0, 243.0])


def zones(nx=3, ny=3, seed=1):
    """Zones with noise, so that no two are alike, x fastest."""
    rng = np.random.default_rng(seed)
    base = epsf_samples()
    samples = [base * (1 + 0.2 * k) + rng.normal(0, 1e-4, base.shape) for k in range(nx * ny)]
    x, y = np.meshgrid(CENTRES[:nx], CENTRES[:ny])
    return x.ravel(), y.ravel(), np.array(samples)


def positions(n=200, seed=2):
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(10, 280, (2, n))
    x[:20], y[:20] = np.round(x[:20] * 2) / 2, np.round(y[:20])
    x[20:40] = np.round(x[20:40] * 5) / 5
    return x, y


def photutils_psf(samples):
    samples = samples / samples.sum() * 25
    return ImagePSF(samples, oversampling=5)


def expected_stamp(psf, x, y, corner):
    yy, xx = np.mgrid[corner[0] : corner[0] + 7, corner[1] : corner[1] + 7]
    return psf.evaluate(xx, yy, 1.0, x, y)


def test_stamps_are_those_of_photutils_in_the_nearest_zone():
    zx, zy, samples = zones()
    model = make_epsf_model(zx, zy, samples)
    x, y = positions()
    stamps, corners, _ = model.render(x, y)
    assert stamps.shape == (len(x), 7, 7)
    peak = stamps.max()
    for k in range(len(x)):
        nearest = np.argmin(np.hypot(zx - x[k], zy - y[k]))
        expected = expected_stamp(photutils_psf(samples[nearest]), x[k], y[k], corners[k])
        # At the very edge of the support, rounding decides whether a pixel is in.
        yy, xx = np.mgrid[corners[k][0] : corners[k][0] + 7, corners[k][1] : corners[k][1] + 7]
        edge = (abs(abs(xx - x[k]) - 3.2) < 1e-9) | (abs(abs(yy - y[k]) - 3.2) < 1e-9)
        assert abs(stamps[k] - expected)[~edge].max() < 1e-10 * peak


def test_bilinear_is_the_gridded_model_of_photutils():
    zx, zy, samples = zones()
    samples = samples / samples.sum(axis=(1, 2), keepdims=True) * 25
    grid = NDData(
        samples,
        meta={"grid_xypos": list(zip(zx, zy, strict=True)), "oversampling": 5},
    )
    theirs = GriddedPSFModel(grid)
    ours = make_epsf_model(zx, zy, samples).interpolated()
    x, y = np.random.default_rng(5).uniform(50, 240, (2, 40))
    stamps, corners, _ = ours.render(x, y)
    for k in range(len(x)):
        expected = expected_stamp(theirs, x[k], y[k], corners[k])
        assert abs(stamps[k] - expected).max() < 1e-9 * stamps.max()


def test_values_are_shares_of_the_flux_in_a_pixel():
    """The pixel's response is in the samples, and is not applied again."""
    model = make_epsf_model([1019.5], [1019.5], [epsf_samples().ravel() * 7.0])
    x, y = positions(50)
    stamps, corners, _ = model.render(x, y)
    rows, columns = np.arange(7)[:, None], np.arange(7)
    for k in range(len(x)):
        truth = effective(corners[k][1] + columns - x[k], corners[k][0] + rows - y[k])
        # What lies beyond 3.2 pixels is not in the model, 0.8 % of the light here.
        inside = stamps[k] != 0
        assert stamps[k].sum() == pytest.approx(1.0, abs=5e-3)
        share = epsf_samples().sum()
        assert abs(stamps[k] - truth / share)[inside].max() < 1e-3 * stamps.max()


def test_the_order_of_zones_does_not_matter():
    zx, zy, samples = zones()
    order = np.random.default_rng(3).permutation(len(zx))
    x, y = positions()
    one, _, _ = make_epsf_model(zx, zy, samples).render(x, y)
    other, _, _ = make_epsf_model(zx[order], zy[order], samples[order]).render(x, y)
    np.testing.assert_array_equal(one, other)


def test_zones_of_detector_3_are_11_by_41():
    x, y = np.meshgrid(np.linspace(92, 1947, 11), np.linspace(24, 2015, 41))
    samples = np.tile(epsf_samples().ravel(), (451, 1)) * (1 + np.arange(451)[:, None])
    zones = make_epsf_model(x.ravel(), y.ravel(), samples).zones
    assert zones.index.shape == (41, 11)
    assert zones.nearest_to([0.0, 2039.0], [0.0, 2039.0])[0].ravel().tolist() == [0, 450]


def test_zones_without_a_psf_are_replaced_by_their_neighbours():
    zx, zy, samples = zones()
    samples[4] = np.nan
    samples[0] = 0.0
    model = make_epsf_model(zx, zy, samples)
    assert model.unusable == 2
    stamps, _, _ = model.render([146.2, 49.0, 146.2], [140.0, 49.0, 60.0])
    assert np.isfinite(stamps).all()
    assert (stamps.sum(axis=(1, 2)) > 0.9).all()
    # A row that is missing is the same.
    kept = np.delete(np.arange(9), [0, 4])
    fewer = make_epsf_model(zx[kept], zy[kept], samples[kept])
    np.testing.assert_array_equal(fewer.render([146.2, 49.0], [140.0, 49.0])[0], stamps[:2])


@pytest.mark.parametrize("radius", [0.4, 1.06, 1.5, 3.0, 8.0])
@pytest.mark.parametrize("is_bilinear", [False, True])
def test_the_share_in_a_circle_is_that_of_photutils(radius, is_bilinear):
    zx, zy, samples = zones()
    model = make_epsf_model(zx, zy, samples).interpolated(is_bilinear)
    x, y = positions(40)
    stamps, corners, enclosed = model.render(x, y, radius)
    for k in range(len(x)):
        at = (x[k] - corners[k][1], y[k] - corners[k][0])
        mask = CircularAperture(at, radius).to_mask(method="exact")
        expected = np.sum(mask.to_image((7, 7)) * stamps[k])
        assert enclosed[k] == pytest.approx(expected, rel=1e-10)


def test_a_cut_out_has_the_zones_of_its_detector():
    zx, zy, samples = zones()
    model = make_epsf_model(zx, zy, samples)
    x, y = positions()
    whole, corners, _ = model.render(x, y)
    part, part_corners, _ = model.render(x - 7.0, y - 30.0, origin=(7.0, 30.0))
    assert abs(whole - part).max() < 1e-11
    np.testing.assert_array_equal(corners - [30, 7], part_corners)


@pytest.mark.parametrize("is_bilinear", [False, True])
def test_a_model_of_the_needed_zones_is_the_same(is_bilinear):
    zx, zy, samples = zones(seed=8)
    x, y = np.array([50.0, 60.0, 100.0]), np.array([50.0, 90.0, 120.0])
    whole = make_epsf_model(zx, zy, samples, is_bilinear=is_bilinear)
    # As the columns of a table are: big-endian, and not one after another in memory.
    table = np.zeros(9, [("XCENTER", ">f8"), ("EPSF", ">f4", (1089,))])
    table["EPSF"] = samples.reshape(9, -1)
    part = make_epsf_model(zx, zy, table["EPSF"], at=(x, y), is_bilinear=is_bilinear)
    assert len(part.psf.coefficients) == (4 if is_bilinear else 2)
    np.testing.assert_allclose(part.render(x, y)[0], whole.render(x, y)[0], atol=1e-7)
    with pytest.raises(ValueError, match="made for other places"):
        part.render([243.0], [243.0])
    samples[0] = np.nan
    repaired = make_epsf_model(zx, zy, samples, at=(x, y), is_bilinear=is_bilinear)
    assert repaired.unusable == 1
    assert np.isfinite(repaired.render(x, y)[0]).all()


def test_models_are_told_apart_by_their_content():
    zx, zy, samples = zones()
    one, same = make_epsf_model(zx, zy, samples), make_epsf_model(zx, zy, samples.copy())
    assert one == same
    assert hash(one) == hash(same)
    samples[3, 5, 5] *= 1.001
    others = [make_epsf_model(zx, zy, samples), make_epsf_model(zx + 1, zy, zones()[2])]
    others.append(one.interpolated())
    assert len({one, *others}) == 4


def test_nothing_to_render():
    stamps, corners, enclosed = make_epsf_model(*zones()).render([], [])
    assert (stamps.shape, corners.shape, enclosed.shape) == ((0, 7, 7), (0, 2), (0,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, s: (x, y, s * np.nan), "no zone has a usable PSF"),
        (lambda x, y, s: (x, y, s[:, :, 1:]), "must be an odd square"),
        (lambda x, y, s: (x, y, s[:, 1:, 1:]), "must be an odd square"),
        (lambda x, y, s: (x * np.inf, y, s), "not finite"),
        (lambda x, y, s: (x, y[1:], s), "as many centres"),
        (lambda x, y, s: (x, y, s[:, :3, :3]), "must be an odd square"),
        (lambda x, y, s: (x[:0], y[:0], s[:0]), "has no zones"),
        (lambda x, y, s: (x, y * 0, s), "two zones have the centre"),
        (lambda x, y, s: (x + np.arange(9), y + np.arange(9) ** 2, s), "do not form a lattice"),
    ],
)
def test_tables_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_epsf_model(*change(*zones()))


def test_a_sampling_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="33 x 33 samples of a zone cannot be 0 a pixel"):
        make_epsf_model(*zones(), oversampling=0)
