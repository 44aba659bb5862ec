"""The compiled photometry against a plain reading of the definitions."""

from __future__ import annotations

import dataclasses

import numpy as np
import photometry_reference as reference
import pytest
from astropy.wcs import WCS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba import njit
from photutils.aperture import CircularAperture
from scipy.interpolate import RegularGridInterpolator

from spxdask.errors import FrameError
from spxdask.science import photometry
from spxdask.science.calibration import DetectorCalibration
from spxdask.science.kernels.aperture import make_aperture_buffers, sum_aperture
from spxdask.science.kernels.pixels import Conversion, Planes
from spxdask.science.kernels.statistics import (
    SAMPLE_STRIDE,
    bracket_median,
    find_positive_median,
)
from spxdask.science.kernels.zodi import sum_zodi
from spxdask.science.level2.frame import Frame
from spxdask.science.level2.wavelength import WavelengthTable
from spxdask.science.level2.wcs import TanSip
from spxdask.science.maps import repair_factors
from spxdask.science.options import PhotometryConfig
from spxdask.science.rows import find_looks
from spxdask.science.sphere import angular_distance
from spxdask.science.zodi import fit_zodi
from spxdask.tables.schema import COLUMNS

SIZE = 160
BAD_OR_SOURCE = np.uint32(sum(1 << bit for bit in {*PhotometryConfig().bad_flags, 21}))
MEASURED = tuple(column.name for column in COLUMNS if column.is_measured and not column.needs_psf)


def make_frame(seed=0, *, size=SIZE, source_fraction=0.3, **changes) -> Frame:
    """A small frame with everything that can be wrong with a pixel, sky 1:1 on pixels."""
    rng = np.random.default_rng(seed)
    shape = (size, size)
    zodi = 0.3 + 0.1 * rng.random(shape)
    variance = 4e-4 * rng.uniform(0.5, 1.5, shape)
    image = 1.07 * zodi + rng.standard_normal(shape) * np.sqrt(variance)
    flags = np.where(rng.random(shape) < source_fraction, 1 << 21, 0)
    for bit, count in ((0, 60), (6, 60), (10, 60), (12, 300), (4, 100), (22, 100)):
        flags.flat[rng.integers(0, flags.size, count)] |= 1 << bit
    flat = rng.permutation(flags.size)
    image.flat[flat[:15]] = np.nan
    flags.flat[flat[:10]] |= 1 << 6
    image.flat[flat[15:20]] = np.inf
    variance.flat[flat[20:60]] = np.nan
    flags.flat[flat[20:50]] |= 1 << 12
    variance.flat[flat[60:70]] = 0.0
    variance.flat[flat[70:80]] = -1.0
    zodi.flat[flat[80:90]] = 0.0
    zodi.flat[flat[90:95]] = np.nan
    image.flat[flat[100:140]] += rng.uniform(0.5, 50, 40)
    y = x = np.array([1.0, 700.0, 1400.0, 2040.0])
    table = WavelengthTable(x=x, y=y, values=1.6 + 0.1 * rng.random((4, 4, 2)))
    frame = Frame(
        filename="frame.fits",
        obs_id="2025W51_1A_0684_2",
        band="D3",
        mjd=61027.2,
        image=image.astype(">f4"),
        variance=variance.astype(">f4"),
        zodi=zodi.astype(">f4"),
        flags=flags.astype(">i4"),
        wcs=TanSip(
            crpix=np.array([size / 2, size / 2]),
            crval=np.array([30.0, 20.0]),
            matrix=np.array([[-0.00171, 0.0001], [0.0001, 0.00171]]),
            lonpole=180.0,
            a=np.zeros((1, 1)),
            b=np.zeros((1, 1)),
        ),
        wavelengths=table,
        psf_fwhm=5.2226,
    )
    return dataclasses.replace(frame, **changes)


def solid_angles(frame: Frame, x, y) -> np.ndarray:
    """The solid angles of pixels, arcsec^2: areas of the tangent plane, shrunk by cos^3.

    Only for a frame without distortion.
    """
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crpix, wcs.wcs.crval = frame.wcs.crpix + 1, frame.wcs.crval
    wcs.wcs.cd = frame.wcs.matrix
    center = wcs.pixel_to_world(*frame.wcs.crpix)
    separation = wcs.pixel_to_world(x, y).separation(center)
    return abs(np.linalg.det(frame.wcs.matrix)) * 3600**2 * np.cos(separation.rad) ** 3


def compare(frame: Frame, x, y, config: PhotometryConfig) -> photometry.Measurement:
    ra, dec = frame.wcs.pixel_to_sky(x, y)
    # What the round trip leaves of x and y decides which pixel an edge falls on.
    x, y = frame.wcs.sky_to_pixel(ra, dec)
    got = photometry.measure(frame, ra, dec, config)
    table = frame.wavelengths
    lookups = [RegularGridInterpolator((table.y, table.x), table.values[..., k]) for k in (0, 1)]

    def wavelengths(xs, ys):
        at = (ys + 1 + frame.origin[1], xs + 1 + frame.origin[0])
        return lookups[0](at).item(), lookups[1](at).item()

    m = photometry.margin(config)
    ny, nx = frame.shape
    inside = (x >= m) & (x < nx - m) & (y >= m) & (y < ny - m)
    rows, scale = reference.measure(
        frame.image,
        frame.variance,
        frame.zodi,
        frame.flags,
        x[inside],
        y[inside],
        solid_angle=solid_angles(frame, x[inside], y[inside]),
        pixel_scale=np.sqrt(solid_angles(frame, (nx - 1) / 2, (ny - 1) / 2)),
        fwhm=frame.psf_fwhm,
        wavelengths=wavelengths,
        config=config,
    )
    assert got.zodi_scale == pytest.approx(scale, rel=1e-12)
    has_row = np.array([row is not None for row in rows], bool)
    np.testing.assert_array_equal(got.index, np.flatnonzero(inside)[has_row])
    assert sum(got.skipped.values()) == (~has_row).sum()
    rows = [row for row in rows if row is not None]
    assert tuple(got.columns) == MEASURED
    for name, column in got.columns.items():
        expected = np.array([row[name] for row in rows], float)
        scale_of = np.abs(expected)
        if name == "flux":  # near zero it is the difference of larger numbers
            scale_of = np.maximum(scale_of, np.array([row["flux_error"] for row in rows]))
        if name in ("x", "y"):
            np.testing.assert_allclose(column, expected, rtol=0, atol=1e-8)
            continue
        np.testing.assert_array_equal(np.isnan(column), np.isnan(expected), err_msg=name)
        ok = np.isfinite(expected)
        assert (np.abs(column - expected)[ok] <= 1e-6 * scale_of[ok]).all(), name
        if name in ("flag", "bg_level"):
            np.testing.assert_allclose(column[ok], expected[ok], rtol=1e-11, err_msg=name)
    return got


def positions(seed, n, size=SIZE):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, size, n), rng.uniform(0, size, n)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subtract_zodi": False},
        {"zodi_scale_max": 1.0},
        {"zodi_scale_min": 1.2},
        {"aperture_method": "fixed"},
        {"aperture_method": "fixed", "aperture_diameter": 7.5},
        {"fwhm_multiplier": 4.0},
        {"window_size": 21},
        {"window_size": (15, 40)},
        {"bg_sigma_clip_sigma": 1.5, "bg_sigma_clip_maxiters": 10},
        {"bg_sigma_clip_maxiters": 0},
        {"min_usable_pixels": 1400},
        {"min_usable_pixels": 1500, "window_size": 40},
        {"bad_flags": [0, 10]},
        {"bad_flags": []},
        {"background_method": "annulus"},
        {"background_method": "annulus", "min_usable_pixels": 25},
        {"background_method": "annulus", "min_usable_pixels": 45},
        {"background_method": "annulus", "min_usable_pixels": 60},
        {"background_method": "annulus", "min_annulus_area": 40.0, "annulus_inner_offset": 2.0},
        {"background_method": "annulus", "max_outer_radius": 9.0, "max_annulus_attempts": 2,
         "min_usable_pixels": 28, "annulus_expansion_step": 0.7},
    ],
    ids=str,
)  # fmt: skip
def test_agrees_with_plain_reading(options):
    x, y = positions(1, 60)
    got = compare(make_frame(1), x, y, PhotometryConfig(**options))
    assert len(got.index) + sum(got.skipped.values()) > 10
    assert len(got.index) > 10 or options["min_usable_pixels"] in (60, 1500)


@settings(max_examples=20, deadline=None)
# A pixel of no value that the circle touches, and that rounding must not put into it.
@example(seed=3961, source_fraction=0.0, method="window", diameter=11.999999999999998)
@given(
    seed=st.integers(0, 10_000),
    source_fraction=st.sampled_from([0.0, 0.3, 0.49, 0.6, 0.99]),
    method=st.sampled_from(["window", "annulus"]),
    diameter=st.floats(0.3, 12.0),
)
def test_agrees_on_any_frame(seed, source_fraction, method, diameter):
    frame = make_frame(seed, source_fraction=source_fraction, size=100)
    config = PhotometryConfig(
        aperture_method="fixed",
        aperture_diameter=diameter,
        background_method=method,
        window_size=31,
        max_outer_radius=9.0,
    )
    x, y = positions(seed, 12, 100)
    compare(frame, x, y, config)


def test_every_subpixel_phase_and_coincident_sources():
    phase = np.linspace(-0.5, 0.5, 9)
    x, y = (a.ravel() + 60.0 for a in np.meshgrid(phase, phase))
    frame = make_frame(3)
    got = compare(frame, np.append(x, x[:3]), np.append(y, y[:3]), PhotometryConfig())
    for name, column in got.columns.items():
        np.testing.assert_allclose(column[-3:], column[:3], rtol=1e-12, err_msg=name)


@njit(error_model="numpy")
def sum_brightness(planes, x, y, r):
    conversion = Conversion(0.0, 1.0, np.nan)
    buffers = make_aperture_buffers(*planes.image.shape, r)
    return sum_aperture(planes, conversion, x, y, r, buffers)[0]


@pytest.mark.slow
@given(
    x=st.floats(-0.5, 0.5),
    y=st.floats(-0.5, 0.5),
    r=st.one_of(st.floats(0.01, 12.0), st.sampled_from([0.5, 1.0, 1.5, 2.0, 5.0])),
)
@settings(deadline=None, max_examples=100)
def test_pixel_fractions_are_exact(x, y, r):
    """Each pixel's fraction, read off an image that is 1 there, against photutils and pi r^2."""
    size = 31
    center = size // 2
    mask = CircularAperture((center + x, center + y), r).to_mask(method="exact")
    expected = mask.to_image((size, size))
    one = np.ones((size, size), ">f4").view("<u4")
    flags = np.zeros((size, size), ">i4").view("<u4")
    planes = Planes(one, one, one, flags)
    total = sum_brightness(planes, center + x, center + y, r)
    assert total == pytest.approx(np.pi * r * r, rel=1e-10, abs=1e-12)
    column, row = center + round(np.clip(r * 0.9 + x, -14, 14)), center
    spot = np.zeros((size, size), ">f4")
    spot[row, column] = 1.0
    planes = Planes(spot.view("<u4"), one, one, flags)
    total = sum_brightness(planes, center + x, center + y, r)
    assert total == pytest.approx(expected[row, column], rel=1e-9, abs=1e-12)


def test_flux_is_linear_in_the_image():
    config = PhotometryConfig(subtract_zodi=False, bg_sigma_clip_maxiters=0)
    frame = make_frame(5)
    ra, dec = frame.wcs.pixel_to_sky(*positions(5, 40))
    one = photometry.measure(frame, ra, dec, config).columns["flux"]
    doubled = dataclasses.replace(frame, image=(2 * frame.image).astype(">f4"))
    two = photometry.measure(doubled, ra, dec, config).columns["flux"]
    np.testing.assert_allclose(two, 2 * one, rtol=1e-9, atol=1e-9)


def test_order_and_company_do_not_matter():
    frame = make_frame(6)
    x, y = positions(6, 50)
    ra, dec = frame.wcs.pixel_to_sky(x, y)
    together = photometry.measure(frame, ra, dec, PhotometryConfig())
    for row, k in enumerate(together.index):
        alone = photometry.measure(frame, ra[k : k + 1], dec[k : k + 1], PhotometryConfig())
        for name, column in alone.columns.items():
            np.testing.assert_array_equal(column[0], together.columns[name][row], err_msg=name)


def test_margins_are_half_open():
    frame = make_frame(7, size=100)
    config = PhotometryConfig(window_size=20)
    m = photometry.margin(config)
    assert m == 11
    x = np.array([m, m - 1e-6, 100 - m, 100 - m - 1e-6, 50, 50])
    y = np.array([50, 50, 50, 50, m, 100 - m])
    # A tiny shift of the reference pixel makes the round trip through the sky exact enough.
    ra, dec = frame.wcs.pixel_to_sky(x + 1e-9, y + 1e-9)
    index, _, _ = photometry.on_frame(frame, ra, dec, config)
    assert index.tolist() == [0, 3, 4]


def test_fallbacks_are_used_and_said():
    frame = make_frame(8, psf_fwhm=None)
    ra, dec = frame.wcs.pixel_to_sky(*positions(8, 5))
    got = photometry.measure(frame, ra, dec, PhotometryConfig())
    center = (SIZE - 1) / 2
    scale = np.sqrt(solid_angles(frame, center, center))
    np.testing.assert_allclose(got.columns["aperture_radius"], 6.0 / scale * 1.25)
    assert any("PSF_FWHM" in w for w in got.warnings)

    odd = dataclasses.replace(frame.wcs, matrix=frame.wcs.matrix * 100)
    ra, dec = odd.pixel_to_sky(*positions(8, 5))
    got = photometry.measure(
        dataclasses.replace(frame, wcs=odd), ra, dec, PhotometryConfig(pixel_scale_fallback=5.0)
    )
    np.testing.assert_allclose(got.columns["aperture_radius"], 6.0 / 5.0 * 1.25)
    assert any("pixel scale" in w and "5.0 arcsec" in w for w in got.warnings)


def test_unflagged_invalid_variances_are_counted():
    got = photometry.measure(make_frame(9), np.empty(0), np.empty(0), PhotometryConfig())
    assert any("unflagged pixels with an invalid variance" in w for w in got.warnings)
    assert len(got.index) == 0
    assert set(got.columns) == set(MEASURED)


@pytest.mark.slow
@pytest.mark.parametrize(
    "origin, options",
    [
        ((0, 0), {}),
        ((1880, 700), {"background_method": "annulus"}),
        ((37, 1880), {"subtract_zodi": False}),
    ],
)
def test_a_flux_correction_is_as_if_the_planes_had_been_multiplied(origin, options):
    """To the last bit, medians of the variance and what is not finite included."""
    rng = np.random.default_rng(6)
    product = rng.uniform(0.8, 1.1, (2040, 2040)).astype(">f4")
    product.flat[rng.integers(0, product.size, 20_000)] = 3653.0
    frame = make_frame(6, origin=origin)
    calibration = DetectorCalibration(flux_correction=product)
    (x0, y0), config = origin, PhotometryConfig(**options)
    factors = repair_factors(product)[y0 : y0 + SIZE, x0 : x0 + SIZE]
    corrected = dataclasses.replace(
        frame,
        image=(frame.image.astype("f4") * factors).astype(">f4"),
        variance=(frame.variance.astype("f4") * (factors * factors)).astype(">f4"),
    )
    ra, dec = frame.wcs.pixel_to_sky(*positions(6, 120))
    expected = photometry.measure(corrected, ra, dec, config)
    got = photometry.measure(frame, ra, dec, config, calibration)
    assert got.zodi_scale == expected.zodi_scale
    np.testing.assert_array_equal(got.index, expected.index)
    assert len(got.index) > 30
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(got.columns[name], column, err_msg=name)
    first = find_looks(SIZE)[0]
    product_factors = calibration.factors_of((SIZE, SIZE), origin)
    few = [
        fit_zodi(view_planes(one, part), BAD_OR_SOURCE, np.ones(SIZE, bool), first, config)
        for one, part in ((corrected, None), (frame, product_factors))
    ]
    assert few[0].n_rows < SIZE
    assert few[0][:-1] == few[1][:-1]
    assert few[0].median_variance() == few[1].median_variance()
    plain = photometry.measure(frame, ra, dec, config)
    assert not np.array_equal(plain.columns["flux"], got.columns["flux"])
    with pytest.raises(FrameError, match="not a part of the detector"):
        photometry.measure(
            dataclasses.replace(frame, origin=(1900, 0)), ra, dec, config, calibration
        )


@pytest.mark.parametrize("plane, says", [("image", "IMAGE"), ("variance", "VARIANCE")])
def test_frame_without_values(plane, says):
    frame = make_frame(1)
    empty = np.full(frame.shape, np.nan, ">f4")
    with pytest.raises(FrameError, match=says):
        photometry.measure(
            dataclasses.replace(frame, **{plane: empty}),
            np.empty(0),
            np.empty(0),
            PhotometryConfig(),
        )


def view_planes(frame: Frame, factors: np.ndarray | None) -> Planes:
    planes = [getattr(frame, name).view("<u4") for name in ("image", "variance", "zodi", "flags")]
    for plane in planes:
        plane.flags.writeable = False
    return Planes(*planes, factors)


def find_median_beside_sums(variance, rows, factors, groups=1):
    """Find the median in the pass of the zodiacal sums, of groups of the rows."""
    words = variance.astype(">f4").view("<u4")
    flags = np.zeros_like(words)
    for array in (words, flags, factors):
        if array is not None:
            # As in a frame, so that the same compiled form is used.
            array.flags.writeable = False
    planes = Planes(words, words, words, flags, factors)
    bracket = bracket_median(words, rows, factors)
    for group in range(groups):
        sum_zodi(planes, np.uint32(1), rows[np.newaxis, group::groups].copy(), bracket)
    return find_positive_median(words, rows, factors, bracket), bracket.counts


def test_positive_median_is_exact():
    rng = np.random.default_rng(4)
    for n in (1, 2, 3, 10, 1001, 5000):
        plane = rng.lognormal(size=(1, n)).astype("f4")
        if n > 10:
            plane[0, :3] = [np.nan, -1.0, np.inf]
        for factors in (None, rng.uniform(0.5, 2.0, plane.shape).astype("f4")):
            scaled = plane if factors is None else plane * (factors * factors)
            good = scaled[np.isfinite(scaled) & (scaled > 0)].astype(float)
            found, _ = find_median_beside_sums(plane, np.arange(1), factors)
            assert found == np.median(good)
    for invalid in (-1.0, 0.0, np.inf, np.nan):
        found, _ = find_median_beside_sums(np.full((2, 2), invalid), np.arange(2), None)
        assert np.isnan(found)


@pytest.mark.parametrize("is_corrected", [False, True])
@pytest.mark.parametrize("kind", ["smooth", "few levels", "misleading sample", "subnormal"])
def test_the_median_of_many_values_is_exact_whatever_the_sample_says(kind, is_corrected):
    """Of some rows, in groups; if the sample misleads, in a pass of its own."""
    rng = np.random.default_rng(8)
    plane = rng.lognormal(size=(700, 512)).astype("f4")
    rows = np.delete(np.arange(700), rng.integers(0, 700, 60))
    if kind == "few levels":
        plane = np.ceil(3 * plane)
    elif kind == "misleading sample":
        at = np.arange(0, len(rows) * 512, SAMPLE_STRIDE)
        plane[rows[at // 512], at % 512] = 1e-3
    elif kind == "subnormal":
        plane *= np.float32(1e-39)
    plane[rng.uniform(size=plane.shape) < 0.01] = np.nan
    plane[rng.uniform(size=plane.shape) < 0.01] = -1.0
    factors = rng.uniform(0.9, 1.1, plane.shape).astype("f4") if is_corrected else None
    scaled = (plane if factors is None else plane * (factors * factors))[rows]
    good = scaled[np.isfinite(scaled) & (scaled > 0)].astype(float)
    found, counts = find_median_beside_sums(plane, rows, factors, groups=3)
    assert found == np.median(good)
    assert counts[0] == len(good)
    if kind == "misleading sample":
        assert counts[2] == len(good)
    elif kind != "few levels":
        assert counts[2] < 0.2 * len(good)


def test_the_pixel_scale_is_that_at_the_centre():
    """By the distance of the corners of the central pixel on the sky."""
    frame = make_frame(1)
    offsets = np.array([-0.5, 0.5])
    ra, dec = frame.wcs.pixel_to_sky(79.5 + offsets[None, :], 79.5 + offsets[:, None])
    diagonals = angular_distance(ra[0], dec[0], ra[1, ::-1], dec[1, ::-1]) * 3600
    # The pixel is a square: half the product of its diagonals.
    assert frame.pixel_scale == pytest.approx(np.sqrt(diagonals.prod() / 2), rel=1e-6)
    assert frame.pixel_scale == pytest.approx(np.sqrt(frame.wcs.pixel_area_arcsec2), rel=1e-5)


def test_ab_magnitude_of_the_standard():
    magnitude, error = photometry.ab_magnitude(
        np.array([1e6, 0.0, -5.0]), np.array([1e4, 1.0, 1.0])
    )
    assert magnitude[0] == pytest.approx(8.9)  # 1 Jy
    assert error[0] == pytest.approx(0.010857362)
    assert np.isnan(magnitude[1:]).all()
    assert np.isnan(error[1:]).all()


def test_errors_are_the_scatter_for_wide_apertures_and_cautious_for_small():
    """Variances are summed with the fractions, not with their squares: see the README."""
    rng = np.random.default_rng(12)
    frame = make_frame(12, size=400)
    variance = np.full(frame.shape, 4e-4)
    frame = dataclasses.replace(
        frame,
        image=(rng.standard_normal(frame.shape) * 0.02).astype(">f4"),
        variance=variance.astype(">f4"),
        flags=np.zeros(frame.shape, ">i4"),
    )
    x, y = (
        a.ravel() + rng.uniform(0, 1, a.size) for a in np.meshgrid(*[np.arange(30, 370, 9)] * 2)
    )
    ra, dec = frame.wcs.pixel_to_sky(x, y)
    scatter = {}
    for diameter in (2.12, 8.0):
        config = PhotometryConfig(
            subtract_zodi=False, aperture_method="fixed", aperture_diameter=diameter
        )
        columns = photometry.measure(frame, ra, dec, config).columns
        scatter[diameter] = np.std(columns["flux"] / columns["flux_error"])
    assert scatter[2.12] == pytest.approx(0.79, abs=0.05)
    assert scatter[8.0] == pytest.approx(0.96, abs=0.05)


@pytest.mark.parametrize("sigma", [1e-6, 0.01, 0.1, 0.9])
def test_clipping_that_would_leave_nothing_stops(sigma):
    frame = make_frame(13)
    ra, dec = frame.wcs.pixel_to_sky(*positions(13, 20))
    config = PhotometryConfig(bg_sigma_clip_sigma=sigma, bg_sigma_clip_maxiters=50)
    columns = photometry.measure(frame, ra, dec, config).columns
    assert np.isfinite(columns["bg_level"]).all()
    unclipped = photometry.measure(
        frame, ra, dec, PhotometryConfig(bg_sigma_clip_maxiters=0)
    ).columns
    assert (columns["bg_error"] <= unclipped["bg_error"]).all()


def test_circle_that_leaves_the_frame_has_no_flux():
    """Only a wide fwhm aperture can: the margin does not know its radius."""
    ones = np.ones((SIZE, SIZE), ">f4")
    frame = dataclasses.replace(make_frame(14), image=ones, variance=ones, zodi=ones)
    x, y = np.array([80.0, 15.5, 80.0]), np.array([80.0, 80.0, 143.5])
    ra, dec = frame.wcs.pixel_to_sky(x, y)
    config = PhotometryConfig(window_size=29, fwhm_multiplier=39.0, min_usable_pixels=1)
    got = photometry.measure(frame, ra, dec, config).columns
    assert 16 < got["aperture_radius"][0] < 17
    assert np.isnan(got["flux"]).tolist() == np.isnan(got["flux_error"]).tolist()
    assert np.isnan(got["flux"]).tolist() == [False, True, True]
