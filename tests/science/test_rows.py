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
from spxdask.science.rows import BANDS, ROWS_OF_BAND, find_looks, find_share, find_spread_rows
from spxdask.science.zodi import ZodiFit, fit_zodi
from spxdask.simulate.frames import Exposure, SceneOptions, make_planes, make_sky, write_frame

NX, NY = 110, 500
WINDOW = (900, 700, NX, NY)
# What does not depend on the fit, to the bit.
FIXED = ("x", "y", "wavelength", "bandwidth", "flag", "aperture_radius")


@functools.cache
def make_content(folder, layout: str, window=WINDOW, light: float = 0.0) -> bytes:
    """Return a cut-out with light of a slope along y, from minus this to this, MJy/sr."""
    exposure = Exposure(
        obs_id="2025W51_1A_0684_2",
        detector=3,
        ra=10.0,
        dec=40.0,
        roll_deg=25.0,
        mjd_begin=61027.25,
    )
    ny = window[3]
    ra, dec = exposure.wcs(window).all_pix2world(NX / 2, ny / 2, 0)
    sky = make_sky(float(ra), float(dec), 0.45, n_sources=200, min_separation_arcsec=20, seed=3)
    options = SceneOptions(crowding=0.3, bad_pixels_on_sources=True, diffuse_amplitude=0.0)
    planes = make_planes(exposure, sky, options, window=window)
    planes.image[...] += np.linspace(-light, light, ny)[:, np.newaxis]
    path = folder / f"{layout}.fits"
    write_frame(path, exposure, planes, window=window, layout=layout)
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


PLANES = ("image", "variance", "zodi", "flags")


def view(plane: np.ndarray) -> np.ndarray:
    """Return a plane of a frame as `Planes` have it."""
    words = np.asarray(plane).view("<u4")
    words.flags.writeable = False
    return words


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


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
        assert np.nanmax(flux / whole.columns["flux_error"], initial=0) < 1e-3
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


TALL = (900, 300, NX, 1500)


@pytest.mark.parametrize("layout", ["qr2", "qr3"])
@pytest.mark.parametrize(
    ("size", "light", "n_rows"), [(11, 0.0, 24), (21, 0.0, 200), (21, 0.2, 1500)]
)
def test_more_rows_are_read_where_few_do_not_tell_enough(folder, layout, size, light, n_rows):
    """Larger windows have smaller errors; with a slope, it matters more what is masked where."""
    content = make_content(folder, layout, TALL, light)
    config = dataclasses.replace(CONFIG, window_size=size)
    x, y = np.array([30.0, 50.0, 70.0]), np.array([110.0, 400.0, 1300.0])
    few, same, whole, part = measure_both(content, x, y, config)
    assert_equal(few, same)
    assert (len(few.index), few.is_zodi_fitted, few.fit_rows) == (3, True, n_rows)
    held = part.held.total / (4 * 4 * NX)
    assert held > n_rows if layout == "qr2" else held > 0.7 * n_rows
    assert held < n_rows + 3 * (size + 1) + 90
    level, flux = (abs(few.columns[name] - whole.columns[name]) for name in ("bg_level", "flux"))
    assert (level < whole.columns["bg_error"]).all()
    assert (flux < 1e-3 * whole.columns["flux_error"]).all()
    if n_rows == 1500:
        assert few.zodi_scale == whole.zodi_scale


def test_a_flux_that_depends_on_the_error_of_the_scale_takes_more_rows(folder):
    """A pixel of the background that is clipped or not makes a step, with any change of scale."""
    frame = open_frame(memoryview(make_content(folder, "qr2", TALL)), "a.fits")
    # All pixels of a window would move together if zodiacal light did not change over it.
    more = frame.zodi * np.linspace(-0.5, 0.5, NX)
    image, zodi = frame.image + 1.08 * more, frame.zodi + more
    frame = dataclasses.replace(frame, image=image.astype(">f4"), zodi=zodi.astype(">f4"))
    config = dataclasses.replace(CONFIG, window_size=11)
    x, y = np.random.default_rng(1).uniform([[10], [10]], [[100], [1490]], (2, 3000))
    ra, dec = frame.wcs.pixel_to_sky(x, y)
    planes = Planes(*(view(getattr(frame, name)) for name in PLANES))
    excluded = np.uint32(sum(1 << bit for bit in {*config.bad_flags, frame.flag_bits["SOURCE"]}))
    seen = fit_zodi(planes, excluded, np.ones(1500, bool), find_looks(1500)[0], config)
    # With a scale that is not fitted.
    fixed = dataclasses.replace(config, zodi_scale_max=0.1)

    def measure_at(scale: float):
        image = (frame.image - (scale - 1.0) * frame.zodi.astype(float)).astype(">f4")
        return measure(dataclasses.replace(frame, image=image), ra, dec, fixed).columns

    low, middle, high = (measure_at(seen.scale + k * seen.reach) for k in (-1, 0, 1))
    step = np.maximum(*(abs(end["flux"] - middle["flux"]) for end in (low, high)))
    step /= middle["flux_error"]
    index = measure(frame, ra, dec, fixed).index
    sure, unsure = index[step < 1e-4], index[step > 1e-3]
    assert len(unsure) > 2
    for sources, is_sure in ((sure[:5], True), (unsure[:5], False)):
        for k in sources:
            few = measure(frame, ra[[k]], dec[[k]], config, few_rows=True)
            assert (few.fit_rows == 24) == is_sure


FIRST, SECOND, ALL = find_looks(2040)


def test_looks_are_spread_over_the_frame():
    [bands] = FIRST.bands
    assert (bands.shape, len(FIRST.edges)) == ((BANDS, ROWS_OF_BAND), 0)
    # Each is in the middle of what it stands for, 255 rows.
    assert np.array_equal(bands.mean(axis=1), 255 * np.arange(BANDS) + 127)
    rows = find_spread_rows(2040)
    assert np.array_equal(np.flatnonzero(rows), bands.ravel())
    more = SECOND.mark_rows(2040)
    assert (more.sum(), more[:24].all(), more[-24:].all()) == (24 + 16 * 8 + 48, True, True)
    assert more[rows].all()
    first = np.sort([band[0] for group in SECOND.bands for band in group])
    assert set(np.diff(first)) == {85}
    assert ALL is None


@pytest.mark.parametrize(("ny", "n"), [(1, 1), (23, 1), (24, 2), (500, 2), (1500, 3)])
def test_frames_of_few_rows_have_fewer_looks(ny, n):
    looks = find_looks(ny)
    assert (len(looks), looks[-1]) == (n, None)
    assert find_spread_rows(ny).sum() == (ny if n == 1 else 24)


SHAPE = (2040, 1000)
EXCLUDED = np.uint32(1)


def fit(image, flags, look, config=CONFIG) -> ZodiFit | None:
    """Fit a ZODI of 1 with a variance of 1."""
    ones = view(np.ones(SHAPE, ">f4"))
    planes = Planes(view(image.astype(">f4")), ones, ones, view(flags.astype(">i4")))
    return fit_zodi(planes, EXCLUDED, np.ones(SHAPE[0], bool), look, config)


def make_slopes() -> tuple[np.ndarray, np.ndarray]:
    """Return y and x of each pixel, from -1 to 1."""
    y, x = (np.linspace(-1, 1, n) for n in SHAPE)
    return y[:, np.newaxis] + 0 * x, x + 0 * y[:, np.newaxis]


@pytest.mark.parametrize("axis", [0, 1])
def test_chance_in_the_number_of_stars_does_not_tilt_the_fit(axis):
    rng = np.random.default_rng(2)
    light = make_slopes()[axis]
    [bands] = FIRST.bands
    errors, by_pixels = [], []
    for _ in range(6):
        # Masks as long as a block, so that the share of clear pixels is noisy.
        coarse = rng.uniform(size=(SHAPE[0] // 4, SHAPE[1] // 20)) < 0.4
        flags = np.kron(coarse, np.ones((4, 20), bool))
        whole = fit(1 + light, flags, ALL).scale
        errors.append(fit(1 + light, flags, FIRST).scale - whole)
        chosen = flags[bands.ravel()] == 0
        by_pixels.append((1 + light[bands.ravel()])[chosen].mean() - whole)
    assert np.std(errors) < 0.5 * np.std(by_pixels)


@pytest.mark.parametrize("slope", [(0.1, -0.15), (0.18, 0.03)])
def test_a_frame_with_more_stars_at_one_end_is_followed(slope):
    """Both slopes of the share count if it is tilted at all, however small one of them is."""
    rng = np.random.default_rng(3)
    y, x = make_slopes()
    flags = rng.uniform(size=SHAPE) < 0.3 + slope[0] * y + slope[1] * x
    light = 0.5 * (y + x)
    whole = fit(1 + light, flags, ALL).scale
    assert abs(whole - 1) > 0.01
    assert fit(1 + light, flags, FIRST).scale == pytest.approx(whole, abs=2e-3)


def test_blocks_without_clear_pixels_count_for_nothing():
    flags = np.zeros(SHAPE, bool)
    # One band, and some of the frame's columns.
    flags[FIRST.bands[0][3]] = flags[:, 700:] = True
    image = np.where(flags, 1e9, 1.25)
    assert fit(image, flags, FIRST).scale == pytest.approx(1.25)


def test_edges_without_clear_pixels_are_seen_at_the_second_look():
    """The dichroic takes twelve rows, which is much where there is a slope."""
    flags = np.zeros(SHAPE, bool)
    flags[-12:] = True
    y, _ = make_slopes()
    image = 1.0 + 0.1 * y
    whole, first, second = (fit(image, flags, look) for look in (ALL, FIRST, SECOND))
    assert whole.reach == 0
    assert 4e-4 < abs(first.scale - whole.scale) < first.reach
    assert abs(second.scale - whole.scale) < 1e-4


def add_stripes(rng, y, x):
    return np.repeat(rng.normal(0, 0.1, (SHAPE[0] // 60, 1)), 60, axis=0)


def add_clouds(rng, y, x):
    return np.kron(rng.normal(0, 0.3, (17, 10)), np.ones((120, 100)))


LIGHTS = {
    "a slope": lambda rng, y, x: 1.5 * (y + x),
    "a curve": lambda rng, y, x: 0.5 * y**2,
    "stripes": add_stripes,
    "clouds": add_clouds,
}


@pytest.mark.parametrize("light", LIGHTS)
def test_the_error_of_a_scale_tells_of_light_that_is_not_in_the_model(light):
    rng = np.random.default_rng(4)
    y, x = make_slopes()
    coarse = rng.uniform(size=(SHAPE[0] // 4, SHAPE[1] // 4)) < 0.4
    flags = np.kron(coarse, np.ones((4, 4), bool))
    noise = rng.standard_normal(SHAPE, dtype=np.float32)
    plain = fit(1 + noise, flags, FIRST)
    # 2.5 times the error of the mean of the clear pixels.
    assert plain.reach == pytest.approx(2.5 / np.sqrt(0.6 * 24 * 1000), rel=0.1)
    image = 1 + noise + LIGHTS[light](rng, y, x)
    whole, first, second = (fit(image, flags, look) for look in (ALL, FIRST, SECOND))
    assert first.reach > 1.2 * plain.reach
    for seen in (first, second):
        assert abs(seen.scale - whole.scale) < seen.reach


def test_masks_that_vary_over_the_frame_add_to_the_error():
    """With light of a slope, it is not known where the masks begin and end between the bands."""
    y, x = make_slopes()
    noise = np.random.default_rng(5).standard_normal(SHAPE, dtype=np.float32)
    image = 1 + noise + 0.1 * (y + x)
    clear = np.zeros(SHAPE, bool)
    hole = np.hypot(y - 0.3, x + 0.3) < 0.5
    whole, first = (fit(image, hole, look) for look in (ALL, FIRST))
    assert first.reach > 1.5 * fit(image, clear, FIRST).reach
    assert abs(first.scale - whole.scale) < first.reach


@pytest.mark.parametrize(
    ("limits", "is_told"), [((0.0, 1.0), False), ((0.0, 0.9), True), ((1.1, 2.0), True)]
)
def test_a_scale_near_its_limits_is_left_to_more_rows(limits, is_told):
    noise = np.random.default_rng(6).standard_normal(SHAPE, dtype=np.float32)
    low, high = limits
    config = dataclasses.replace(CONFIG, zodi_scale_min=low, zodi_scale_max=high)
    found = fit(1 + noise, np.zeros(SHAPE, bool), FIRST, config)
    assert (found is not None) == is_told
    if found is not None:
        assert (found.is_fitted, found.scale, found.reach) == (False, 1, 0)


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
