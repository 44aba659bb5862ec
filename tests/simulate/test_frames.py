"""The simulated frames hold what they claim, by routes other than the simulator's own."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_area
from photutils.aperture import CircularAperture
from scipy.special import ndtr

from spxdask.simulate.frames import (
    BAND_LIMITS_UM,
    Exposure,
    SceneOptions,
    Sky,
    add_neighbours,
    make_planes,
    make_sky,
    pixel_integrated_psf,
    write_frame,
)

pytestmark = pytest.mark.slow

WINDOW = (700, 1200, 300, 280)
REAL = Exposure(
    obs_id="2025W51_1A_0684_2",
    detector=3,
    ra=10.0880653194,
    dec=40.8987511044,
    roll_deg=0.0,
    mjd_begin=61027.214984375,
)
ROLLED = replace(REAL, detector=5, ra=270.3, dec=66.2, roll_deg=137.0, release="qr3", version=30)
DARK = {"zodi_scale": 0.0, "diffuse_amplitude": 0.0, "crowding": 0.0}
NOISELESS = {"read_noise": 0.0, "shot_noise": 0.0}
NO_BAD_PIXELS = {"bad_pixel_fraction": 0.0, "cosmic_ray_density": 0.0}
BIT = {
    "TRANSIENT": 0,
    "PHANTOM": 4,
    "NONFUNC": 6,
    "DICHROIC": 7,
    "HOT": 10,
    "COLD": 11,
    "FULLSAMPLE": 12,
    "OUTLIER": 19,
    "SOURCE": 21,
}
BAD = sum(1 << BIT[name] for name in BIT if name not in ("PHANTOM", "FULLSAMPLE", "SOURCE"))


def sky_around(exposure: Exposure, window=WINDOW, *, n_sources=40, radius_deg=0.4) -> Sky:
    _, _, nx, ny = window
    ra, dec = exposure.wcs(window).all_pix2world(nx / 2, ny / 2, 0)
    return make_sky(
        float(ra), float(dec), radius_deg, n_sources=n_sources, min_separation_arcsec=150.0, seed=3
    )


@pytest.fixture(scope="module")
def sky() -> Sky:
    return sky_around(REAL)


@pytest.fixture(scope="module")
def planes(sky):
    return make_planes(REAL, sky, SceneOptions(seed=1), window=WINDOW)


@pytest.fixture(scope="module")
def full_frame():
    """A full crowded frame, and the same without noise."""
    sky = make_sky(REAL.ra, REAL.dec, 2.6, n_sources=1500, min_separation_arcsec=150.0, seed=5)
    crowded = make_planes(REAL, sky, SceneOptions(seed=2))
    return crowded, make_planes(REAL, sky, SceneOptions(seed=2, **NOISELESS))


@pytest.fixture(params=[(REAL, "qr2"), (REAL, "qr3"), (ROLLED, "qr3"), (ROLLED, "qr2")])
def written(request, tmp_path):
    exposure, layout = request.param
    planes = make_planes(exposure, sky_around(exposure), SceneOptions(), window=WINDOW)
    path = tmp_path / exposure.filename
    write_frame(path, exposure, planes, window=WINDOW, layout=layout)
    with fits.open(path) as hdus:
        yield exposure, layout, planes, hdus


def test_sky_is_isolated_and_uniform_on_the_sphere():
    sky = make_sky(120.0, 89.0, 3.0, n_sources=2000, min_separation_arcsec=60.0, seed=1)
    position = SkyCoord(sky.ra, sky.dec, unit="deg")
    _, nearest, _ = position.match_to_catalog_sky(position, nthneighbor=2)
    assert nearest.arcsec.min() >= 60.0
    distance = position.separation(SkyCoord(120.0, 89.0, unit="deg")).deg
    assert distance.max() <= 3.0
    inner = np.count_nonzero(distance < 1.5) / len(sky)
    assert inner == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 2000))


def test_sky_without_room_is_refused():
    with pytest.raises(ValueError, match="no room for 500 sources"):
        make_sky(10.0, 0.0, 0.1, n_sources=500, min_separation_arcsec=60.0, seed=1)


def test_sky_with_ragged_arrays_is_refused(sky):
    with pytest.raises(ValueError, match="equal length"):
        replace(sky, slope=sky.slope[:-1])


def test_neighbours_are_at_their_distance(sky):
    pairs = add_neighbours(sky, (6.0, 18.0), flux_ratio=(0.5, 2.0), seed=4)
    n = len(sky)
    assert len(pairs) == 2 * n
    np.testing.assert_array_equal(pairs.take(slice(n)).ra, sky.ra)
    first, second = (
        SkyCoord(pairs.ra[s], pairs.dec[s], unit="deg") for s in (slice(n), slice(n, None))
    )
    distance = first.separation(second).arcsec
    assert 6.0 <= distance.min() < 9.0
    assert 15.0 < distance.max() <= 18.0
    ratio = pairs.flux(3.1)[n:] / sky.flux(3.1)
    assert 0.5 <= ratio.min() < ratio.max() <= 2.0
    same = add_neighbours(sky, (6.0, 18.0), flux_ratio=(0.5, 2.0), seed=4)
    np.testing.assert_array_equal(same.dec, pairs.dec)


def test_flux_is_power_law_times_line():
    one = np.ones(1)
    sky = Sky(
        ra=one,
        dec=one,
        amplitude=100.0 * one,
        slope=-2.0 * one,
        line_strength=0.5 * one,
        line_center_um=4.0 * one,
        line_width_um=0.1 * one,
    )
    assert sky.flux(4.0)[0] == pytest.approx(25.0 * 1.5, rel=1e-12)
    assert sky.flux(1.0)[0] == pytest.approx(400.0, rel=1e-12)
    assert sky.flux(4.1)[0] == pytest.approx(100.0 / 2.05**2 * (1.0 + 0.5 * np.exp(-0.5)))


def test_names_are_the_archive_s():
    assert REAL.filename == "level2_2025W51_1A_0684_2D3_spx_l2b-v21-2025-354.fits"
    assert REAL.uri == (
        "ibe/data/spherex/qr2/level2/2025W51_1A/l2b-v21-2025-354/3/"
        "level2_2025W51_1A_0684_2D3_spx_l2b-v21-2025-354.fits"
    )
    assert (REAL.band, REAL.collection) == ("D3", "spherex_qr2")


@pytest.mark.parametrize("change", [{"obs_id": "2025W51_0684"}, {"detector": 7}])
def test_impossible_exposure_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(REAL, **change)


@pytest.mark.parametrize("window", [(-1, 0, 10, 10), (0, 0, 0, 10), (2000, 0, 41, 10)])
def test_window_off_the_frame_is_refused(window):
    with pytest.raises(ValueError, match="not within"):
        REAL.wcs(window)


def test_real_exposure_gets_the_real_cards():
    header = REAL.image_header()
    assert header["EXPIDN"] == 202551101068423
    assert header["DATE-BEG"] == "2025-12-18T05:09:34.650"
    assert header["PC1_2"] == pytest.approx(0.000724894672199, abs=1e-18)
    area = proj_plane_pixel_area(REAL.wcs()) * 3600.0**2
    assert area == pytest.approx(header["OMEGA_MEDIAN"], rel=1e-4)
    assert (REAL.mjd_end - header["MJD-BEG"]) * 86400 == pytest.approx(header["TELAPSE"], abs=1e-5)


@pytest.mark.parametrize("exposure", [REAL, ROLLED, replace(ROLLED, ra=0.01, dec=-89.5)])
def test_wcs_round_trip_to_the_corners(exposure):
    x, y = (
        grid.ravel() for grid in np.meshgrid([-0.5, 300.0, 1019.5, 2039.5], [-0.5, 800, 2039.5])
    )
    wcs = exposure.wcs()
    back = wcs.all_world2pix(*wcs.all_pix2world(x, y, 0), 0, tolerance=1e-9)
    np.testing.assert_allclose(back, [x, y], rtol=0, atol=1e-7)


def test_roll_turns_the_sky_about_the_reference_position():
    straight, rolled = REAL.wcs(), replace(REAL, roll_deg=30.0).wcs()
    center = SkyCoord(REAL.ra, REAL.dec, unit="deg")
    before, after = (
        SkyCoord(*wcs.all_pix2world(100.0, 1900.0, 0), unit="deg") for wcs in (straight, rolled)
    )
    assert center.separation(after).arcsec == pytest.approx(center.separation(before).arcsec)
    turned = (center.position_angle(before) - center.position_angle(after)).wrap_at(180 * u.deg)
    assert turned.deg == pytest.approx(30.0, abs=1e-6)


def test_footprint_is_the_outer_corners():
    corners = SkyCoord(REAL.footprint(), unit="deg")
    x, y = REAL.wcs().all_world2pix(corners.ra.deg, corners.dec.deg, 0)
    np.testing.assert_allclose(x, [-0.5, 2039.5, 2039.5, -0.5], atol=1e-4)
    np.testing.assert_allclose(y, [-0.5, -0.5, 2039.5, 2039.5], atol=1e-4)


def test_window_is_a_crop():
    x0, y0, nx, ny = WINDOW
    x, y = np.array([0.0, 17.3, nx - 1]), np.array([0.0, 200.9, ny - 1])
    full = REAL.wcs().all_pix2world(x + x0, y + y0, 0)
    np.testing.assert_allclose(REAL.wcs(WINDOW).all_pix2world(x, y, 0), full, rtol=0, atol=1e-11)
    header = REAL.image_header(WINDOW)
    assert (1 + 5 - header["CRPIX1A"], 1 + 5 - header["CRPIX2A"]) == (x0 + 5, y0 + 5)
    np.testing.assert_allclose(
        REAL.wavelength(x, y, window=WINDOW), REAL.wavelength(x + x0, y + y0), rtol=1e-14
    )


def test_window_shows_the_smooth_light_of_the_full_frame(full_frame, planes):
    x0, y0, nx, ny = WINDOW
    cut = np.s_[y0 : y0 + ny, x0 : x0 + nx]
    np.testing.assert_allclose(planes.zodi, full_frame[0].zodi[cut], rtol=1e-6)


@pytest.mark.parametrize("detector", BAND_LIMITS_UM)
@pytest.mark.parametrize("release", ["qr2", "qr3"])
def test_wavelengths_rise_along_y_within_the_band(detector, release):
    exposure = replace(REAL, detector=detector, release=release)
    y, x = np.mgrid[0:2040:40.0, 0:2040:40.0]
    wavelength, bandwidth = exposure.wavelength(x, y)
    shortest, longest = exposure.wavelength_limits_um
    assert (np.diff(wavelength, axis=0) > 0).all()
    assert shortest <= wavelength.min()
    assert wavelength.max() <= longest
    assert wavelength.max() - wavelength.min() > 0.9 * (longest - shortest)
    assert np.ptp(wavelength[25]) > 0.01 * (longest - shortest)
    assert (bandwidth > 0).all()


def test_file_holds_the_planes(written):
    exposure, layout, planes, hdus = written
    psf = "PSF" if layout == "qr2" else "EPSF"
    names = ["PRIMARY", "IMAGE", "FLAGS", "VARIANCE", "ZODI", psf, "WCS-WAVE"]
    assert [hdu.name for hdu in hdus] == names
    for name in ("IMAGE", "FLAGS", "VARIANCE", "ZODI"):
        plane = getattr(planes, name.lower())
        np.testing.assert_array_equal(hdus[name].data, plane)
        assert hdus[name].data.dtype.newbyteorder("=") == plane.dtype
    assert hdus[0].header["VERSION"].startswith({"qr2": "6.", "qr3": "7."}[layout])
    header = hdus["IMAGE"].header
    assert (header["OBSID"], header["DETECTOR"]) == (exposure.obs_id, exposure.detector)
    assert header["L2 N_SOURCE"] == np.count_nonzero(planes.flags & 1 << BIT["SOURCE"])
    for hdu in hdus:
        hdu.verify("exception")


def test_flag_bits_are_named(written):
    _, layout, _, hdus = written
    header = hdus["FLAGS"].header
    if layout == "qr2":
        named = {key[3:]: bit for key, bit in header.items() if key.startswith("MP_")}
    else:
        named = {name: int(key[4:]) for key, name in header.items() if key.startswith("MSKN")}
        assert not any(key.startswith("MP_") for key in header)
        assert isinstance(hdus["FLAGS"], fits.CompImageHDU)
        assert hdus["FLAGS"].compression_type == "RICE_1"
        assert hdus["FLAGS"].tile_shape == (1, WINDOW[2])
    assert named.items() >= BIT.items()


def test_wave_tab_is_the_bilinear_table(written):
    exposure, _, _, hdus = written
    x, y = np.array([0.0, 33.3, 250.0, 299.0]), np.array([279.0, 11.1, 140.2, 0.0])
    wcs = WCS(hdus["IMAGE"].header, fobj=hdus, key="W")
    wcs.sip = None
    np.testing.assert_allclose(
        wcs.all_pix2world(x, y, 0), exposure.wavelength(x, y, window=WINDOW), rtol=1e-12
    )
    table = hdus["WCS-WAVE"].data
    ny, nx, _ = table["VALUES"][0].shape
    assert (table["X"][0].shape, table["Y"][0].shape) == ((nx,), (ny,))
    i, j = nx // 2, ny // 3
    at_knot = exposure.wavelength(table["X"][0][i] - 1, table["Y"][0][j] - 1)
    np.testing.assert_allclose(at_knot, table["VALUES"][0][j, i], rtol=1e-12)


def test_lattices_differ():
    shapes = {
        exposure.wave_table()[2].shape[:2]
        for exposure in (REAL, ROLLED, replace(ROLLED, release="qr2"))
    }
    assert shapes == {(11, 11), (9, 9), (14, 9)}


def test_psf_extension_is_the_psf_of_the_image(written):
    exposure, layout, _, hdus = written
    scale = np.sqrt(proj_plane_pixel_area(exposure.wcs())) * 3600.0
    if layout == "qr2":
        cube, header = hdus["PSF"].data, hdus["PSF"].header
        assert cube.shape == (121, 101, 101)
        np.testing.assert_allclose(cube.sum(axis=(1, 2), dtype=float), 1.0, rtol=1e-6)
        central, width = cube[7][45:56, 45:56].sum(dtype=float), 1.1
        assert header["XCTR_2"] > header["XCTR_1"]
        assert header["YCTR_2"] == header["YCTR_1"]
        assert header["XCTR_61"] == header["YCTR_61"] == 1020.5
    else:
        table = hdus["EPSF"].data
        assert len(table) == (451 if exposure.detector == 3 else 441)
        assert table["EPSF"].shape[1:] == (33, 33)
        central, width = table["EPSF"][3][16, 16], 1.0
    sigma = 5.222648214064271 / scale / 2.3548200450309493
    expected = (ndtr(0.5 * width / sigma) - ndtr(-0.5 * width / sigma)) ** 2
    assert central == pytest.approx(expected, rel=1e-6)


def test_pixel_integrated_psf_against_the_normal_distribution():
    stamp = pixel_integrated_psf(10.3, 4.8, 0.85, 9)
    edges = np.arange(-4.5, 5.0)
    sigma = 0.85 / 2.3548200450309493
    in_x = np.diff(ndtr((edges + 10 - 10.3) / sigma))
    in_y = np.diff(ndtr((edges + 5 - 4.8) / sigma))
    np.testing.assert_allclose(stamp, np.outer(in_y, in_x), rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(pixel_integrated_psf([10.3], [4.8], 0.85, 9), stamp[np.newaxis])
    with pytest.raises(ValueError, match="odd"):
        pixel_integrated_psf(0.0, 0.0, 0.85, 8)


@pytest.mark.parametrize("exposure", [REAL, ROLLED])
def test_injected_flux_is_recovered(exposure):
    options = SceneOptions(**DARK, **NOISELESS, **NO_BAD_PIXELS)
    sky = sky_around(exposure)
    planes = make_planes(exposure, sky, options, window=WINDOW)
    _, _, nx, ny = WINDOW
    inside = (planes.x > 6) & (planes.x < nx - 7) & (planes.y > 6) & (planes.y < ny - 7)
    assert np.count_nonzero(inside) > 10
    x, y = planes.x[inside], planes.y[inside]
    area = proj_plane_pixel_area(exposure.wcs()) * 3600.0**2
    sigma = 5.222648214064271 / np.sqrt(area) / 2.3548200450309493
    edges_x, edges_y = np.arange(nx + 1) - 0.5, np.arange(ny + 1) - 0.5
    image = planes.image.astype(float)
    for radius in (0.9, 4.0):
        apertures = [CircularAperture(position, r=radius) for position in zip(x, y, strict=True)]
        encircled = [
            aperture.do_photometry(
                np.outer(
                    np.diff(ndtr((edges_y - aperture.positions[1]) / sigma)),
                    np.diff(ndtr((edges_x - aperture.positions[0]) / sigma)),
                )
            )[0][0]
            for aperture in apertures
        ]
        total = [aperture.do_photometry(image)[0][0] for aperture in apertures]
        flux = (total * u.MJy / u.sr * area * u.arcsec**2).to_value(u.uJy)
        np.testing.assert_allclose(flux, planes.flux_ujy[inside] * encircled, rtol=1e-6)
    np.testing.assert_allclose(flux, planes.flux_ujy[inside], rtol=1e-6)


def test_truth_is_the_sky_s(sky, planes):
    ra, dec = REAL.wcs(WINDOW).all_pix2world(planes.x, planes.y, 0)
    true = SkyCoord(sky.ra[planes.source], sky.dec[planes.source], unit="deg")
    assert SkyCoord(ra, dec, unit="deg").separation(true).arcsec.max() < 1e-6
    wavelength, bandwidth = REAL.wavelength(planes.x, planes.y, window=WINDOW)
    np.testing.assert_array_equal(planes.wavelength_um, wavelength)
    np.testing.assert_array_equal(planes.bandwidth_um, bandwidth)
    for i, source in enumerate(planes.source):
        assert planes.flux_ujy[i] == pytest.approx(sky.flux(wavelength[i])[source], rel=1e-12)
    assert planes.zodi_scale == 1.08


def test_sources_on_the_far_side_of_the_sky_are_not_on_the_frame(sky):
    antipode = replace(sky, ra=(sky.ra + 180.0) % 360.0, dec=-sky.dec)
    assert make_planes(REAL, antipode, SceneOptions(), window=WINDOW).source.size == 0


def test_source_just_off_the_frame_still_shines_on_it(sky):
    options = SceneOptions(**DARK, **NOISELESS, **NO_BAD_PIXELS)
    whole = make_planes(REAL, sky, options, window=WINDOW)
    i = np.flatnonzero((whole.x > 10) & (whole.y > 10) & (whole.y < 200))[0]
    first = int(np.rint(whole.x[i])) + 1
    x0, y0, nx, ny = WINDOW
    cut = make_planes(REAL, sky, options, window=(x0 + first, y0, nx - first, ny))
    np.testing.assert_allclose(cut.image, whole.image[:, first:], rtol=1e-5, atol=1e-12)
    assert cut.image[:, 0].max() > 0


def test_noise_has_the_variance_of_the_plane(full_frame):
    noisy, model = full_frame
    good = (noisy.flags & BAD == 0) & np.isfinite(noisy.variance)
    pull = (noisy.image - model.image)[good] / np.sqrt(noisy.variance[good], dtype=float)
    assert np.mean(pull**2) == pytest.approx(1.0, abs=6 * np.sqrt(2.0 / pull.size))
    assert np.mean(pull) == pytest.approx(0.0, abs=5 / np.sqrt(pull.size))
    bright = noisy.variance[good] > 2.0 * np.nanmedian(noisy.variance)
    assert np.count_nonzero(bright) > 1000
    assert np.mean(pull[bright] ** 2) == pytest.approx(1.0, abs=5 * np.sqrt(2.0 / bright.sum()))


def test_crowded_frame_carries_the_flags_of_a_real_one(full_frame):
    flags, variance, image = full_frame[0].flags, full_frame[0].variance, full_frame[0].image
    assert 0.4 < np.mean(flags >> BIT["SOURCE"] & 1) < 0.7
    assert {name for name, bit in BIT.items() if (flags & 1 << bit).any()} == set(BIT)
    dead = flags & 1 << BIT["NONFUNC"] != 0
    np.testing.assert_array_equal(np.isnan(image), dead)
    unknown = np.isnan(variance)
    assert unknown[dead].all()
    assert (unknown & (flags & BAD == 0)).any()
    assert (flags[unknown] != 0).all()


def test_all_stray_light_is_flagged(full_frame):
    model = full_frame[1]
    y, x = np.indices(model.image.shape)
    clean = model.flags & (BAD | 1 << BIT["SOURCE"]) == 0
    smooth = model.image[clean] - model.zodi_scale * model.zodi[clean].astype(float)
    design = np.column_stack([np.ones(smooth.size), x[clean], y[clean]])
    residual = smooth - design @ np.linalg.lstsq(design, smooth, rcond=None)[0]
    assert np.abs(residual).max() < 1e-6
    assert np.ptp(smooth) > 0.5 * SceneOptions().diffuse_amplitude


def near_sources(planes, radius):
    y, x = np.indices(planes.image.shape)
    distance2 = (x[..., np.newaxis] - planes.x) ** 2 + (y[..., np.newaxis] - planes.y) ** 2
    return (distance2 <= radius**2).any(axis=-1)


def test_bad_pixels_spare_the_sources_unless_asked(sky):
    spotty = SceneOptions(bad_pixel_fraction=0.3, cosmic_ray_density=0.01)
    spared = make_planes(REAL, sky, spotty, window=WINDOW)
    near = near_sources(spared, 4.0)
    assert not (spared.flags[near] & BAD).any()
    assert np.isfinite(spared.variance[near]).all()
    hit = make_planes(REAL, sky, replace(spotty, bad_pixels_on_sources=True), window=WINDOW)
    assert (hit.flags[near] & BAD).any()


def test_field_stars_keep_clear_of_the_sources(planes):
    near = near_sources(planes, 8.0) & ~near_sources(planes, 3.0)
    assert not (planes.flags[near] & 1 << BIT["SOURCE"]).any()
    own = near_sources(planes, 3.0)
    assert (planes.flags[own] & 1 << BIT["SOURCE"]).all()


def test_same_arguments_same_planes(sky, planes):
    again = make_planes(
        *pickle.loads(pickle.dumps((REAL, sky, SceneOptions(seed=1)))), window=WINDOW
    )
    for field in fields(planes):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(planes, field.name))
    for exposure, seed in ((REAL, 2), (replace(REAL, obs_id="2025W51_1A_0684_3"), 1)):
        other = make_planes(exposure, sky, SceneOptions(seed=seed), window=WINDOW)
        assert not np.array_equal(other.image, planes.image, equal_nan=True)


def test_another_process_draws_the_same():
    code = (
        "import pickle, sys; from spxdask.simulate.frames import make_planes;"
        "*args, window = pickle.load(sys.stdin.buffer);"
        "sys.stdout.buffer.write(make_planes(*args, window=window).image.tobytes())"
    )
    window = (0, 0, 60, 50)
    args = (REAL, sky_around(REAL, window), SceneOptions())
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        input=pickle.dumps((*args, window)),
        capture_output=True,
        env=env,
        check=True,
    )
    assert done.stdout == make_planes(*args, window=window).image.tobytes()
    assert done.stderr == b""


@pytest.mark.parametrize("name", ["crowding", "bad_pixel_fraction", "harmless_fraction"])
def test_impossible_fraction_is_refused(name):
    with pytest.raises(ValueError, match=name):
        SceneOptions(**{name: 1.0})


def test_write_is_atomic(planes, tmp_path, monkeypatch):
    path = tmp_path / "frame.fits"
    path.write_text("the old one")

    def full_disk(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_frame(path, REAL, planes, window=WINDOW)
    assert [entry.name for entry in tmp_path.iterdir()] == ["frame.fits"]
    assert path.read_text() == "the old one"


def test_planes_of_another_window_are_refused(planes, tmp_path):
    with pytest.raises(ValueError, match="do not fill"):
        write_frame(tmp_path / "frame.fits", REAL, planes)
    with pytest.raises(ValueError, match="layout"):
        write_frame(tmp_path / "frame.fits", REAL, planes, window=WINDOW, layout="qr9")
    assert not any(tmp_path.iterdir())
