"""Frames measured on few rows: the same numbers, whatever is in the others."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from partly import PartlyRead
from psf_reference import epsf_samples

from spxdask.errors import MissingRowsError
from spxdask.science.calibration import NO_CALIBRATION, DetectorCalibration
from spxdask.science.kernels.pixels import Planes
from spxdask.science.level2.frame import Frame, open_frame
from spxdask.science.options import PhotometryConfig
from spxdask.science.photometry import find_needed_rows, measure
from spxdask.science.psf.epsf import make_epsf_model
from spxdask.science.psf.fit import choose_linked
from spxdask.science.rows import (
    BANDS,
    MORE_BANDS,
    ROWS_OF_BAND,
    find_bands,
    find_share,
    find_spread_rows,
    sum_zodi_of_rows,
)
from spxdask.simulate.frames import Exposure, SceneOptions, make_planes, make_sky, write_frame

NX, NY = 110, 500
WINDOW = (900, 700, NX, NY)
# What does not depend on the fit, to the bit.
FIXED = ("x", "y", "wavelength", "bandwidth", "flag", "aperture_radius")


@functools.cache
def make_content(folder, layout: str, crowding: float = 0.3) -> bytes:
    exposure = Exposure(
        obs_id="2025W51_1A_0684_2",
        detector=3,
        ra=10.0,
        dec=40.0,
        roll_deg=25.0,
        mjd_begin=61027.25,
    )
    ra, dec = exposure.wcs(WINDOW).all_pix2world(NX / 2, NY / 2, 0)
    sky = make_sky(float(ra), float(dec), 0.45, n_sources=200, min_separation_arcsec=20, seed=3)
    options = SceneOptions(crowding=crowding, bad_pixels_on_sources=True, diffuse_amplitude=0.0)
    planes = make_planes(exposure, sky, options, window=WINDOW)
    path = folder / f"{layout}.fits"
    write_frame(path, exposure, planes, window=WINDOW, layout=layout)
    return path.read_bytes()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="session")
def product() -> DetectorCalibration:
    x, y = (a.ravel() for a in np.meshgrid([900.0, 990.0], [800.0, 1000.0, 1100.0]))
    samples = np.array([epsf_samples(1 + 0.05 * k) for k in range(6)])
    return DetectorCalibration(psf=make_epsf_model(x, y, samples))


def measure_both(
    content: bytes, x, y, config, calibration=NO_CALIBRATION, contaminants=None, layouts=None
):
    """Measure a frame of few rows with garbage around, and the whole one in the same way."""
    whole = open_frame(memoryview(content), "a.fits")
    ra, dec = whole.wcs.pixel_to_sky(x, y)
    others = None if contaminants is None else whole.wcs.pixel_to_sky(*contaminants)
    part = PartlyRead(content)
    heads: list[Frame] = []

    def choose(head: Frame):
        heads.append(head)
        rows = find_needed_rows(head, ra, dec, config, calibration, others)
        return rows if rows.any() else None

    def measure_few(frame: Frame):
        return measure(frame, ra, dec, config, calibration, others, few_rows=True)

    frame = part.read(choose, layouts)
    few = measure_few(heads[0]) if frame is None else part.measure(frame, measure_few)
    return few, measure_few(whole), measure(whole, ra, dec, config, calibration, others), part


def assert_equal(one, other, *, but=()) -> None:
    """That measurements are equal to the bit."""
    for group in ("columns", "psf_columns"):
        columns, others = getattr(one, group), getattr(other, group)
        assert list(columns) == list(others)
        for name in columns:
            if name not in but:
                assert columns[name].tobytes() == others[name].tobytes(), name
    for field in dataclasses.fields(one):
        if field.name not in ("index", "columns", "psf_columns", *but):
            assert getattr(one, field.name) == getattr(other, field.name), field.name
    assert np.array_equal(one.index, other.index)


# Anywhere, edges and beyond included, and often near one another or near the middle of a pixel.
coordinate = st.one_of(
    st.floats(-8, NX + 8), st.integers(0, NX).map(float), st.integers(0, NX).map(lambda k: k + 0.5)
)
position = st.tuples(coordinate, st.one_of(st.floats(-8, NY + 8), st.floats(200, 230)))
positions = st.lists(position, max_size=6)
backgrounds = st.one_of(
    st.builds(
        lambda height, width: {"window_size": (height, width)},
        st.integers(9, 40),
        st.integers(9, 40),
    ),
    st.builds(
        lambda outer, step, attempts: {
            "background_method": "annulus",
            "max_outer_radius": outer,
            "annulus_expansion_step": step,
            "max_annulus_attempts": attempts,
        },
        st.floats(8, 22),
        st.floats(0.5, 5),
        st.integers(1, 6),
    ),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["qr2", "qr3"]),
    positions,
    st.none() | positions,
    backgrounds,
    st.sampled_from(["none", "nearest", "bilinear"]),
    st.booleans(),
    st.sampled_from([{}, {"subtract_zodi": False}, {"aperture_method": "fixed"}]),
)
def test_what_is_not_needed_is_not_used(
    folder, product, layout, sources, others, background, psf, is_product, more
):
    config = PhotometryConfig(psf=psf, **background, **more)
    x, y = np.array(sources).reshape(-1, 2).T
    contaminants = None if others is None else np.array(others).reshape(-1, 2).T
    calibration = product if is_product else NO_CALIBRATION
    few, same, whole, part = measure_both(
        make_content(folder, layout), x, y, config, calibration, contaminants
    )
    assert_equal(few, same)
    if not config.subtract_zodi:
        # Nothing is fitted, but for the median variance of few rows, which is in errors alone.
        errors = ("flux_error", "mag_ab_error")
        assert_equal(few, whole, but=(*errors, "warnings", "psf_name", "fit_rows"))
    for name in FIXED:
        assert few.columns[name].tobytes() == whole.columns[name].tobytes(), name
    if len(few.index) and few.is_zodi_fitted == whole.is_zodi_fitted:
        flux, level = (
            np.abs(few.columns[name] - whole.columns[name]) for name in ("flux", "bg_level")
        )
        assert np.nanmax(flux / whole.columns["flux_error"], initial=0) < 5e-3
        assert np.nanmax(level / whole.columns["bg_error"], initial=0) < 1
    if not len(few.index) and not few.skipped:
        assert part.held.total < 40_000


@pytest.mark.parametrize("layout", ["qr2", "qr3"])
def test_the_rows_that_are_named_are_those_that_are_read(folder, layout):
    """One row less is noticed, wherever it is; of those around, nothing is used."""
    content = make_content(folder, layout)
    whole = open_frame(memoryview(content), "a.fits")
    config = PhotometryConfig(psf="nearest", window_size=21)
    ra, dec = whole.wcs.pixel_to_sky([50.2, 61.9], [140.4, 300.0])
    rows = find_needed_rows(whole, ra, dec, config)
    # 140.4 - 10.5 to 140.4 + 10.5, and 300 - 10.5 to 300 + 10.5; the stamps are within.
    windows = np.zeros(NY, bool)
    windows[129:151] = windows[289:311] = True
    assert np.array_equal(rows, windows | find_spread_rows(NY))
    for row in np.flatnonzero(rows)[::7]:
        without = rows.copy()
        without[row] = False
        with pytest.raises(MissingRowsError) as caught:
            measure(dataclasses.replace(whole, rows=without), ra, dec, config, few_rows=True)
        assert caught.value.rows[row]
    assert find_share(whole, rows) == pytest.approx(16 * NX * rows.sum() / len(content))
    assert not find_needed_rows(whole, ra[:0], dec[:0], config).any()


def test_a_frame_that_is_nearly_half_clear_is_seen_in_more_rows(folder):
    """The number of clear pixels is near one half of all, or too small, or a frame's own."""
    content = make_content(folder, "qr2", 0.45)
    few, same, _, part = measure_both(content, np.array([50.0]), np.array([200.0]), CONFIG)
    assert_equal(few, same)
    # Headers, rows, rows of the second look.
    image = 4 * NX
    assert sum(stop - start for start, stop in part.rounds[-1]) >= 4 * image * MORE_BANDS // 2


CONFIG = PhotometryConfig(psf="none", window_size=21)


@pytest.mark.parametrize("share", [0.495, 0.499, 0.501, 0.505])
def test_whether_half_of_a_frame_is_clear_is_as_all_rows_tell(folder, share):
    frame = open_frame(memoryview(make_content(folder, "qr2")), "a.fits")
    hidden = np.zeros(NX * NY, bool)
    hidden[: round((1 - share) * hidden.size)] = True
    hidden = np.random.default_rng(1).permutation(hidden).reshape(NY, NX)
    flags = np.where(hidden, 1 << frame.flag_bits["SOURCE"], 0).astype(">i4")
    frame = dataclasses.replace(frame, flags=flags)
    ra, dec = frame.wcs.pixel_to_sky([50.0], [200.0])
    few = measure(frame, ra, dec, CONFIG, few_rows=True)
    assert few.is_zodi_fitted == (share > 0.5)
    assert few.fit_rows == NY
    assert few.zodi_scale == measure(frame, ra, dec, CONFIG).zodi_scale


def test_a_row_that_is_missing_is_an_error_and_never_zeros(folder):
    content = make_content(folder, "qr2")
    whole = open_frame(memoryview(content), "a.fits")
    ra, dec = whole.wcs.pixel_to_sky([50.0], [200.0])
    rows = find_needed_rows(whole, ra, dec, CONFIG)
    with pytest.raises(MissingRowsError, match=f"{NY - rows.sum()} rows of the frame are needed"):
        measure(dataclasses.replace(whole, rows=rows), ra, dec, CONFIG)


def test_a_gradient_is_in_a_fit_of_few_rows_as_in_that_of_all(folder):
    """Light that is not in ZODI, rising along y: rows of the source alone would follow it."""
    content = make_content(folder, "qr2")
    frame = open_frame(memoryview(content), "a.fits")
    tilt = np.linspace(-0.02, 0.02, NY)[:, np.newaxis]
    frame = dataclasses.replace(frame, image=(frame.image + tilt).astype(">f4"))
    config = dataclasses.replace(CONFIG, min_usable_pixels=10)
    for y in (30.0, 250.0, 470.0):
        ra, dec = frame.wcs.pixel_to_sky([50.0], [y])
        few = measure(frame, ra, dec, config, few_rows=True)
        whole = measure(frame, ra, dec, config)
        assert few.is_zodi_fitted
        assert few.zodi_scale != whole.zodi_scale
        level = abs(few.columns["bg_level"] - whole.columns["bg_level"])
        assert (level < whole.columns["bg_error"]).all()


def test_bands_are_spread_over_the_frame():
    bands = find_bands(2040)
    assert bands.shape == (BANDS, ROWS_OF_BAND)
    # Each is in the middle of what it stands for, 255 rows.
    assert np.array_equal(bands.mean(axis=1), 255 * np.arange(BANDS) + 127)
    rows = find_spread_rows(2040)
    assert np.array_equal(np.flatnonzero(rows), bands.ravel())
    assert find_spread_rows(2040, MORE_BANDS).sum() == MORE_BANDS * ROWS_OF_BAND
    assert find_spread_rows(4).any()
    assert find_bands(1).max() == 0


def test_the_fit_of_few_rows_is_the_same_for_all_sources(folder):
    frame = open_frame(memoryview(make_content(folder, "qr2")), "a.fits")
    scales = set()
    for y in ([60.0], [250.0], [100.0, 300.0, 440.0]):
        ra, dec = frame.wcs.pixel_to_sky(np.full(len(y), 50.0), y)
        few = measure(frame, ra, dec, CONFIG, few_rows=True)
        scales.add(few.zodi_scale)
        assert few.fit_rows == MORE_BANDS * ROWS_OF_BAND
    assert len(scales) == 1
    assert measure(frame, ra, dec, CONFIG).fit_rows == NY


SHAPE = (2040, 1000)
EXCLUDED = np.uint32(1)


def fit(image, flags, bands=None) -> float:
    """Return the scale of a ZODI of 1 and a variance of 1, of bands or of all."""

    def view(plane, kind):
        words = plane.astype(kind).view("<u4")
        words.flags.writeable = False
        return words

    ones = view(np.ones(SHAPE), ">f4")
    planes = Planes(view(image, ">f4"), ones, ones, view(flags, ">i4"))
    sums, share, _ = sum_zodi_of_rows(planes, EXCLUDED, np.ones(SHAPE[0], bool), bands)
    assert share == pytest.approx((flags == 0).mean(), abs=0.1)
    return sums.weighted_iz / sums.weighted_zz


def make_slopes() -> tuple[np.ndarray, np.ndarray]:
    """Return y and x of each pixel, from -1 to 1."""
    y, x = (np.linspace(-1, 1, n) for n in SHAPE)
    return y[:, np.newaxis] + 0 * x, x + 0 * y[:, np.newaxis]


@pytest.mark.parametrize("axis", [0, 1])
def test_chance_in_the_number_of_stars_does_not_tilt_the_fit(axis):
    rng = np.random.default_rng(2)
    light = make_slopes()[axis]
    bands = find_bands(SHAPE[0])
    errors, by_pixels = [], []
    for _ in range(6):
        # Masks as long as a block, so that the share of clear pixels is noisy.
        coarse = rng.uniform(size=(SHAPE[0] // 4, SHAPE[1] // 20)) < 0.4
        flags = np.kron(coarse, np.ones((4, 20), bool))
        whole = fit(1 + light, flags)
        errors.append(fit(1 + light, flags, bands) - whole)
        chosen = flags[bands.ravel()] == 0
        by_pixels.append((1 + light[bands.ravel()])[chosen].mean() - whole)
    assert np.std(errors) < 0.5 * np.std(by_pixels)


def test_a_frame_with_more_stars_at_one_end_is_followed():
    rng = np.random.default_rng(3)
    y, x = make_slopes()
    flags = rng.uniform(size=SHAPE) < 0.3 + 0.1 * y - 0.15 * x
    light = 0.5 * (y + x)
    whole = fit(1 + light, flags)
    assert abs(whole - 1) > 0.01
    assert fit(1 + light, flags, find_bands(SHAPE[0])) == pytest.approx(whole, abs=2e-3)


def test_blocks_without_clear_pixels_count_for_nothing():
    flags = np.zeros(SHAPE, bool)
    # One band, and half of the frame's columns.
    flags[find_bands(SHAPE[0])[3]] = flags[:, 500:] = True
    image = np.where(flags, 1e9, 1.25)
    assert fit(image, flags, find_bands(SHAPE[0])) == pytest.approx(1.25)


def link_plainly(x, y, other_x, other_y, reach) -> np.ndarray:
    """Sources without rows that are reached from one with a row, one step after the other."""
    corner = [np.floor(np.append(a, b) + 0.5) for a, b in ((x, other_x), (y, other_y))]
    apart = np.max([abs(c[:, np.newaxis] - c) for c in corner], axis=0) if len(corner[0]) else None
    reached = np.arange(len(corner[0])) < len(x)
    while apart is not None:
        more = reached | (apart[:, reached] < reach).any(axis=1)
        if np.array_equal(more, reached):
            break
        reached = more
    return reached[len(x) :]


place = st.tuples(st.floats(-5, 60), st.floats(-5, 60))


@given(st.lists(place, max_size=5), st.lists(place, max_size=12), st.floats(0.5, 5))
def test_others_are_linked_by_stamps_that_overlap(sources, others, radius):
    x, y = np.array(sources).reshape(-1, 2).T
    other_x, other_y = np.array(others).reshape(-1, 2).T
    found = choose_linked(x, y, other_x, other_y, 7, radius)
    reach = 7 + max(int(np.ceil(radius)) - 3, 0)
    assert np.array_equal(found, link_plainly(x, y, other_x, other_y, reach))


def test_the_links_of_many_sources():
    rng = np.random.default_rng(0)
    x, y, other_x, other_y = rng.uniform(0, 2040, (4, 10_000))
    found = choose_linked(x, y, other_x, other_y, 7, 1.06)
    alone = choose_linked(x[:1], y[:1], other_x, other_y, 7, 1.06)
    assert 0.2 < found.mean() < 0.9
    assert alone.sum() < 50
    assert (found | ~alone).all()


@pytest.mark.parametrize("is_product", [True, False])
def test_a_chain_of_contaminants_is_followed(folder, product, is_product):
    """Each has light on the next one's stamp; the last ones are far from the window."""
    content = make_content(folder, "qr2")
    config = PhotometryConfig(psf="nearest", window_size=9, min_usable_pixels=10)
    step = 6 if is_product else 10
    x, y = np.array([50.2]), np.array([200.3])
    chain = np.array([50.4 + np.arange(8), 200.3 + step * np.arange(1, 9)])
    calibration = product if is_product else NO_CALIBRATION
    few, same, *_ = measure_both(content, x, y, config, calibration, tuple(chain))
    assert_equal(few, same)
    assert np.isfinite(few.psf_columns["psf_flux"]).all()
    frame = open_frame(memoryview(content), "a.fits")
    sky = frame.wcs.pixel_to_sky
    rows = find_needed_rows(frame, *sky(x, y), config, calibration, sky(*chain))
    # The stamp of the last one: three rows above its middle, or five.
    last = int(200.3 + 8 * step) + (3 if is_product else 5)
    beyond = find_spread_rows(NY)
    assert rows[: last + 1][205:].all()
    assert np.array_equal(rows[last + 1 :], beyond[last + 1 :])
    without = rows.copy()
    without[last] = False
    arguments = *sky(x, y), config, calibration, sky(*chain)
    with pytest.raises(MissingRowsError):
        measure(dataclasses.replace(frame, rows=without), *arguments, few_rows=True)
    # One that is missing in between cuts off all behind it.
    broken = chain[:, [0, 2, 3, 4, 5, 6, 7]]
    fewer = find_needed_rows(frame, *sky(x, y), config, calibration, sky(*broken))
    assert not (fewer & ~beyond)[int(200.3 + step) + 6 :].any()
