"""The varying PSF, its models in files, and the calibrated scene, by other routes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits
from numpy.polynomial.legendre import leggauss
from photutils.aperture import CircularAperture
from photutils.psf import ImagePSF
from scipy.interpolate import RectBivariateSpline
from scipy.ndimage import uniform_filter

from spxdask.simulate.detector import make_gain_map, make_solid_angle_map
from spxdask.simulate.frames import (
    CALIBRATED_SCENE,
    Exposure,
    SceneOptions,
    VaryingPsf,
    aperture_shares,
    make_planes,
    make_sky,
    write_frame,
)
from spxdask.simulate.psf import cube_hdu

pytestmark = pytest.mark.slow

PSF = VaryingPsf()
WINDOW = (1500, 300, 260, 240)
REAL = Exposure(
    obs_id="2025W51_1A_0684_2",
    detector=3,
    ra=10.0880653194,
    dec=40.8987511044,
    roll_deg=0.0,
    mjd_begin=61027.214984375,
)
QUIET = replace(
    CALIBRATED_SCENE,
    zodi_scale=0.0,
    diffuse_amplitude=0.0,
    crowding=0.0,
    read_noise=0.0,
    shot_noise=0.0,
    bad_pixel_fraction=0.0,
    cosmic_ray_density=0.0,
    harmless_fraction=0.0,
)
PLACES = [(1019.5, 1019.5), (3.2, 2030.9), (2039.0, 0.4)]


def sky_around(exposure, window=WINDOW):
    _, _, nx, ny = window
    ra, dec = map(float, exposure.wcs(window).all_pix2world(nx / 2, ny / 2, 0))
    return make_sky(ra, dec, 0.35, n_sources=40, min_separation_arcsec=150.0, seed=3)


def scene(release="qr3", detector=3, options=QUIET, window=WINDOW):
    exposure = replace(REAL, release=release, detector=detector)
    planes = make_planes(exposure, sky_around(exposure, window), options, window=window)
    _, _, nx, ny = window
    inside = (planes.x > 9) & (planes.x < nx - 10) & (planes.y > 9) & (planes.y < ny - 10)
    assert np.count_nonzero(inside) > 8
    return exposure, planes, np.flatnonzero(inside)


def corner_areas(wcs, x, y):
    """Solid angles in arcsec^2 of the quadrilaterals between the corners of pixels."""
    corners = [
        SkyCoord(*wcs.all_pix2world(x + dx, y + dy, 0), unit="deg").cartesian.xyz.value
        for dx, dy in ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))
    ]
    diagonals = corners[2] - corners[0], corners[3] - corners[1]
    return 0.5 * np.linalg.norm(np.cross(*diagonals, axis=0), axis=0) * np.degrees(3600.0) ** 2


def flux_image(exposure, planes, window=WINDOW):
    """The light of each pixel in uJy, by the solid angles of its corners."""
    y, x = np.indices(planes.image.shape, dtype=float)
    areas = corner_areas(exposure.wcs(window), x.ravel(), y.ravel()).reshape(x.shape)
    return planes.image.astype(float) * (u.MJy / u.sr).to(u.uJy / u.arcsec**2) * areas


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("detector", [1, 6])
@pytest.mark.parametrize("reach", [PSF.reach, 1.7, np.inf])
def test_shares_are_integrals_over_pixels(detector, place, reach):
    psf = replace(PSF, reach=reach)
    x, y = place
    half = psf.stamp_half_size
    nodes, weights = leggauss(20)
    stamp = psf.stamps(detector, x, y, 2 * half + 1)
    assert stamp.sum() == pytest.approx(1.0, abs=1e-9)
    for row, column in ((0, 0), (-1, 1), (0, 2)):
        # Gauss-Legendre integrals, up to the end of the light only, as they take it to be smooth.
        (left, right), (low, high) = (
            np.clip(np.rint(z) + offset - z + (-0.5, 0.5), -reach, reach)
            for z, offset in ((x, column), (y, row))
        )
        places_x = 0.5 * (left + right + (right - left) * nodes)
        places_y = 0.5 * (low + high + (high - low) * nodes)
        density = psf.density(detector, x, y, places_x, places_y)
        expected = 0.25 * (right - left) * (high - low) * (weights @ density @ weights)
        assert stamp[half + row, half + column] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("detector", range(1, 7))
def test_an_epsf_s_support_holds_all_light_unless_it_does_not_end(detector):
    # The support of 33 samples, 5 a pixel, is 6.6 pixels wide.
    outermost = np.linspace(-3.3, 3.3, 3)
    assert not PSF.response(detector, *PLACES[1], outermost)[[0, -1]].any()
    assert PSF.response(detector, *PLACES[1], 0.99 * outermost)[[0, -1], 1].all()
    endless = replace(PSF, reach=np.inf)
    assert 5e-5 < 1.0 - endless.stamps(detector, 0.0, 0.0, 7).sum() < 1e-3


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("detector", range(1, 7))
def test_the_peak_is_at_the_source_and_the_width_that_of_the_card(detector, place):
    steps = np.linspace(-2.5, 2.5, 1001)
    image = PSF.density(detector, *place, steps, steps)
    row, column = np.unravel_index(image.argmax(), image.shape)
    assert max(abs(steps[row]), abs(steps[column])) <= 0.5 * 0.005
    area = np.count_nonzero(image > 0.5 * image.max()) * 0.005**2
    width = 2.0 * np.sqrt(area / np.pi) * 6.153
    assert width == pytest.approx(PSF.fwhm_arcsec[detector - 1], rel=PSF.variation + 0.02)


def test_the_psf_is_lopsided_elongated_and_no_gaussian():
    steps = np.linspace(-8.0, 8.0, 1601)
    image = PSF.density(6, *PLACES[2], steps, steps)
    image /= image.sum()
    along_x, along_y = image.sum(axis=0), image.sum(axis=1)
    mean_x, mean_y = along_x @ steps, along_y @ steps
    assert np.hypot(mean_x, mean_y) > 0.004
    variance_x, variance_y = along_x @ (steps - mean_x) ** 2, along_y @ (steps - mean_y) ** 2
    assert abs(variance_x / variance_y - 1.0) > 0.05
    assert along_x @ (steps - mean_x) ** 4 / variance_x**2 > 4.0


def test_the_psf_varies_smoothly():
    x = np.linspace(0.0, 2039.0, 401)
    peaks = PSF.stamps(2, np.rint(x), np.full(401, 700.0), 5).max(axis=(1, 2))
    assert np.ptp(peaks) > 0.02
    assert np.abs(np.diff(peaks)).max() < 0.001


def test_stamps_and_widths_that_cannot_be():
    with pytest.raises(ValueError, match="odd"):
        PSF.stamps(1, 0.0, 0.0, 8)
    with pytest.raises(ValueError, match="6 values"):
        VaryingPsf(fwhm_arcsec=(5.0, 5.0))
    with pytest.raises(ValueError, match="reach"):
        VaryingPsf(reach=0.0)


@pytest.mark.parametrize("detector", [3, 5])
def test_flux_is_total_on_pixels_of_their_own_solid_angle(detector):
    exposure, planes, inside = scene(detector=detector)
    light = flux_image(exposure, planes)
    total = [
        CircularAperture((planes.x[i], planes.y[i]), 8.5).do_photometry(light)[0][0] for i in inside
    ]
    np.testing.assert_allclose(total, planes.flux_ujy[inside], rtol=2e-6)
    for radius in (0.9, 1.6):
        share = aperture_shares(exposure, planes, radius, window=WINDOW)[inside]
        sums = [
            CircularAperture((planes.x[i], planes.y[i]), radius).do_photometry(light)[0][0]
            for i in inside
        ]
        assert share.max() < 0.99
        np.testing.assert_allclose(sums, planes.flux_ujy[inside] * share, rtol=2e-6)


def test_share_of_the_round_psf_is_the_normal_distribution_s():
    exposure, planes, _ = scene(options=replace(QUIET, psf=None, local_solid_angles=False))
    share = aperture_shares(exposure, planes, 4.0, window=WINDOW)
    sigma = exposure.fwhm_pixels / 2.3548200450309493
    np.testing.assert_allclose(share, 1.0 - np.exp(-0.5 * (4.0 / sigma) ** 2), rtol=1e-6)
    assert aperture_shares(exposure, planes, 9.0, window=WINDOW) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="radius"):
        aperture_shares(exposure, planes, -1.0, window=WINDOW)


def test_solid_angles_are_those_of_the_corners_and_of_the_card():
    areas = make_solid_angle_map(REAL.wcs(), (2040, 2040))
    assert np.median(areas) == pytest.approx(37.861739642774666, rel=2e-4)
    assert 0.005 < np.ptp(areas) / np.median(areas) < 0.04
    x, y = np.array([0.0, 0.0, 511.0, 1019.0, 2039.0]), np.array([0.0, 2039.0, 77.0, 1020.0, 5.0])
    found = areas[y.astype(int), x.astype(int)]
    np.testing.assert_allclose(found, corner_areas(REAL.wcs(), x, y), rtol=1e-7)
    x0, y0, nx, ny = WINDOW
    cut = make_solid_angle_map(REAL.wcs(WINDOW), (ny, nx))
    np.testing.assert_allclose(cut, areas[y0 : y0 + ny, x0 : x0 + nx], rtol=1e-7)
    one = make_solid_angle_map(REAL.wcs((3, 4, 1, 1)), (1, 1))
    assert one[0, 0] == pytest.approx(areas[4, 3], rel=1e-7)


def test_background_is_brightness_whatever_the_solid_angle():
    flat = replace(QUIET, zodi_scale=1.0)
    exposure = replace(REAL, release="qr3")
    empty = sky_around(exposure).take([])
    planes = make_planes(exposure, empty, flat, window=WINDOW)
    np.testing.assert_allclose(planes.image, planes.zodi, rtol=1e-6)


def test_cards_of_the_calibrated_scene(tmp_path):
    exposure, planes, _ = scene()
    write_frame(tmp_path / "frame.fits", exposure, planes, window=WINDOW)
    header = fits.getheader(tmp_path / "frame.fits", "IMAGE")
    areas = make_solid_angle_map(exposure.wcs(), (2040, 2040))
    assert header["OMEGA_MEDIAN"] == pytest.approx(np.median(areas), rel=1e-9)
    assert header["OMEGA_STDDEV"] == pytest.approx(np.std(areas), rel=1e-6)
    assert header["PSF_FWHM"] == 4.92


def test_epsf_of_a_frame_is_its_sources_by_photutils(tmp_path):
    exposure, planes, inside = scene()
    write_frame(tmp_path / "frame.fits", exposure, planes, window=WINDOW)
    with fits.open(tmp_path / "frame.fits") as hdus:
        header, table = hdus["EPSF"].header, hdus["EPSF"].data.copy()
    assert (header["OVSMPX"], header["OVSMPY"], header["DETCOORD"]) == (5, 5, "sky")
    assert header["TDIM11"] == "(33,33)"
    assert (len(table), set(table["BINX"]), set(table["BINY"])) == (
        451,
        set(range(11)),
        set(range(41)),
    )
    # Zero-based centres: those of the outer zones are as far from the detector's outer edges.
    assert table["XCENTER"].min() + 0.5 == pytest.approx(2039.5 - table["XCENTER"].max())
    np.testing.assert_allclose(table["EPSF"].sum(axis=(1, 2), dtype=float), 1.0, rtol=1e-6)
    light = flux_image(exposure, planes)
    for i in inside:
        x, y = planes.x[i], planes.y[i]
        distance = np.hypot(
            table["XCENTER"] - x - WINDOW[0], table["YCENTER"] - y - WINDOW[1]
        ).argmin()
        epsf = table["EPSF"][distance].astype(float)
        model = ImagePSF(25.0 * epsf, x_0=x, y_0=y, oversampling=5)
        rows, columns = (slice(round(c) - 2, round(c) + 3) for c in (y, x))
        grid_y, grid_x = np.mgrid[rows, columns]
        expected = model(grid_x, grid_y)
        np.testing.assert_allclose(
            light[rows, columns] / planes.flux_ujy[i],
            expected,
            rtol=0.0,
            atol=0.01 * expected.max(),
        )
        effective = 1.0 / np.sum(expected**2)
        assert table["NEFF_MEAN"][distance] == pytest.approx(effective, rel=0.35)


@pytest.mark.parametrize("version", [None, "6.5.5", "6.4.10", "6.5.6"])
def test_cube_of_a_frame_is_its_sources_by_integration(tmp_path, version):
    exposure, planes, inside = scene("qr2", options=replace(QUIET, early_gains=False))
    path = tmp_path / "frame.fits"
    write_frame(path, exposure, planes, window=WINDOW, pipeline_version=version)
    with fits.open(path) as hdus:
        header, cube = hdus["PSF"].header, hdus["PSF"].data.astype(float)
        assert hdus[0].header["VERSION"] == (version or "6.5.5+psffix1")
    assert (cube.shape, header["OVERSAMP"]) == ((121, 101, 101), 10)
    np.testing.assert_allclose(cube.sum(axis=(1, 2)), 1.0, rtol=1e-6)
    # Only up to 6.5.5 without the fix, y runs fastest through the header.
    is_transposed = version in ("6.5.5", "6.4.10")
    assert (header["XCTR_2"] == header["XCTR_1"]) == is_transposed
    centers = np.unique([header[f"XCTR_{i}"] for i in range(1, 122)])
    np.testing.assert_allclose(centers, (np.arange(11) + 0.5) * 2040 / 11 - 0.5)
    light = flux_image(exposure, planes)
    steps = (np.arange(101) - 50) / 10.0
    for i in inside[:6]:
        x, y = planes.x[i], planes.y[i]
        ix, iy = (np.abs(centers - c).argmin() for c in (x + WINDOW[0], y + WINDOW[1]))
        offset_y = np.linspace(0.01, -0.11, 11)[iy]
        spline = RectBivariateSpline(steps, steps, cube[iy * 11 + ix] * 100.0)
        rows, columns = (slice(round(c) - 2, round(c) + 3) for c in (y, x))
        grid_y, grid_x = np.mgrid[rows, columns]
        expected = np.array(
            [
                spline.integral(dy - 0.5, dy + 0.5, dx - 0.5, dx + 0.5)
                for dx, dy in zip(
                    (grid_x - x - 0.05).ravel(), (grid_y - y + offset_y).ravel(), strict=True
                )
            ]
        ).reshape(grid_x.shape)
        np.testing.assert_allclose(
            light[rows, columns] / planes.flux_ujy[i], expected, atol=0.012 * expected.max()
        )


def test_cores_of_the_cube_are_off_the_middle():
    cube = cube_hdu(PSF, 4).data.astype(float)
    steps = (np.arange(101) - 50) / 10.0
    for iy, offset in ((0, 0.01), (5, -0.05), (10, -0.11)):
        spline = RectBivariateSpline(steps, steps, cube[iy * 11 + 3])
        fine = np.linspace(-0.3, 0.3, 601)
        row, column = np.unravel_index(spline(fine, fine).argmax(), (601, 601))
        assert (fine[column], fine[row]) == pytest.approx((-0.05, offset), abs=0.003)


def test_frames_before_qr3_are_on_their_own_gain_scale():
    noisy = replace(QUIET, zodi_scale=1.0, read_noise=0.004)
    _, early, _ = scene("qr2", 1, noisy)
    _, late, _ = scene("qr3", 1, noisy)
    x0, y0, nx, ny = WINDOW
    gain = make_gain_map(1)[y0 : y0 + ny, x0 : x0 + nx]
    np.testing.assert_allclose(early.image * gain, late.image, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(early.variance * gain**2, late.variance, rtol=1e-5)
    np.testing.assert_array_equal(early.zodi, late.zodi)
    assert np.ptp(gain) > 0.01


@pytest.mark.parametrize(
    ("detector", "median", "rows"), [(1, 0.97, (0.875, 0.983)), (5, 1.007, (0.987, 1.029))]
)
def test_gains_are_those_of_the_real_product(detector, median, rows):
    gain = make_gain_map(detector)
    assert np.median(gain) == pytest.approx(median, abs=5e-4)
    by_row = np.median(gain, axis=1)
    assert (by_row.min(), by_row.max()) == pytest.approx(rows, abs=5e-4)
    assert np.std(gain / by_row[:, np.newaxis]) == pytest.approx(1e-3, rel=0.05)
    # Within a row there is no trend that a median would miss.
    assert np.ptp(uniform_filter(gain[1000:1100] / by_row[1000:1100, np.newaxis], 100)) < 3e-3


def test_true_wavelengths_are_those_of_the_newest_map(tmp_path):
    for release, shift in (("qr2", 0.0064), ("qr3", 0.0)):
        exposure, planes, inside = scene(release, 5)
        write_frame(tmp_path / "frame.fits", exposure, planes, window=WINDOW)
        table = fits.getdata(tmp_path / "frame.fits", "WCS-WAVE")
        values = table["VALUES"][0][..., 0]
        spline = RectBivariateSpline(table["Y"][0], table["X"][0], values, kx=1, ky=1)
        x, y = planes.x[inside] + WINDOW[0] + 1.0, planes.y[inside] + WINDOW[1] + 1.0
        offset = planes.wavelength_um[inside] - spline(y, x, grid=False)
        np.testing.assert_allclose(offset, shift, atol=0.001)
        sky = sky_around(exposure).take(planes.source)
        np.testing.assert_array_equal(planes.flux_ujy, sky.flux(planes.wavelength_um))


def test_the_plain_scene_has_none_of_it():
    plain = SceneOptions()
    assert plain.psf is None
    assert not any([plain.local_solid_angles, plain.early_gains, plain.wavelength_maps])
    full = CALIBRATED_SCENE
    assert all([full.psf, full.local_solid_angles, full.early_gains, full.wavelength_maps])
