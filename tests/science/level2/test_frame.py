from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from astropy.coordinates import angular_separation
from astropy.io import fits
from astropy.wcs import WCS

from spxdask.errors import FrameError
from spxdask.science.flags import FLAG_BITS
from spxdask.science.level2.fits import BLOCK, scan
from spxdask.science.level2.frame import NEEDED, open_frame
from spxdask.science.options import PhotometryConfig
from spxdask.science.photometry import measure
from spxdask.science.sphere import angular_distance
from spxdask.simulate.frames import Exposure, SceneOptions, make_planes, make_sky, write_frame

WINDOW = (900, 880, 120, 100)
CUT_OUTS = {
    "middle": WINDOW,
    "first pixels": (0, 0, 40, 30),
    "last pixels": (2000, 2010, 40, 30),
    "wide": (300, 1500, 200, 20),
}


def exposure_of(detector=3, *, ra=10.0, dec=40.0, release="qr2") -> Exposure:
    return Exposure(
        obs_id="2025W51_1A_0684_2",
        detector=detector,
        ra=ra,
        dec=dec,
        roll_deg=25.0,
        mjd_begin=61027.25,
        release=release,
    )


def write(path, exposure, window=WINDOW, layout=None):
    ra, dec = exposure.wcs(window).all_pix2world(window[2] / 2, window[3] / 2, 0)
    sky = make_sky(float(ra), float(dec), 0.05, n_sources=5, min_separation_arcsec=30.0, seed=1)
    planes = make_planes(exposure, sky, SceneOptions(), window=window)
    write_frame(path, exposure, planes, window=window, layout=layout)
    return planes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("frames")


@pytest.fixture(scope="module")
def scene(folder):
    """One scene in both layouts: planes, and the files by layout."""
    paths = {layout: folder / f"{layout}.fits" for layout in ("qr2", "qr3")}
    for path in paths.values():
        planes = write(path, exposure_of(), layout=path.stem)
    return planes, paths


@pytest.fixture(params=["qr2", "qr3"])
def path(request, scene):
    return scene[1][request.param]


@pytest.fixture
def damaged(path, tmp_path):
    """A copy to spoil."""
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    return copy


def test_what_a_frame_says_of_itself(path, scene):
    planes, _ = scene
    frame = open_frame(path)
    exposure = exposure_of()
    assert frame.filename == path.name
    assert frame.obs_id == exposure.obs_id
    assert frame.band == "D3"
    assert frame.mjd == pytest.approx((exposure.mjd_begin + exposure.mjd_end) / 2, abs=1e-10)
    assert frame.shape == (100, 120)
    assert frame.origin == (900.0, 880.0)
    assert frame.psf_fwhm == 5.222648214064271
    assert frame.warnings == ()
    for name in ("image", "variance", "zodi", "flags"):
        found = getattr(frame, name)
        assert found.dtype == (">i4" if name == "flags" else ">f4")
        assert np.array_equal(found, getattr(planes, name), equal_nan=name != "flags"), name
    assert np.isnan(frame.variance).any()
    assert open_frame(str(path)).shape == frame.shape


def test_both_layouts_are_one_frame(scene):
    qr2, qr3 = (open_frame(path) for path in scene[1].values())
    for name in ("image", "variance", "zodi", "flags"):
        assert getattr(qr2, name).tobytes() == getattr(qr3, name).tobytes(), name
    x, y = np.meshgrid(np.linspace(-0.5, 119.5, 30), np.linspace(-0.5, 99.5, 30))
    ra, dec = qr2.wcs.pixel_to_sky(x.ravel(), y.ravel())
    for one, other in zip(
        qr2.wcs.sky_to_pixel(ra, dec), qr3.wcs.sky_to_pixel(ra, dec), strict=True
    ):
        assert np.array_equal(one, other)
    for one, other in zip(
        qr2.wavelength_at(x.ravel(), y.ravel()),
        qr3.wavelength_at(x.ravel(), y.ravel()),
        strict=True,
    ):
        assert np.array_equal(one, other)
    assert qr2.bounding_circle == qr3.bounding_circle
    # The simulated cards lack the bits that the real frame had no use for.
    assert qr2.flag_bits == qr3.flag_bits == FLAG_BITS
    assert qr2.mjd == qr3.mjd
    assert qr2.origin == qr3.origin


def flat(value):
    """All that is in a dataclass, arrays as their type and bytes."""
    if dataclasses.is_dataclass(value):
        return {f.name: flat(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {name: flat(one) for name, one in value.items()}
    return value


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_a_file_and_its_content_are_one_frame(path, kind):
    mapped = open_frame(path)
    held = open_frame(memoryview(kind(path.read_bytes())), path.name)
    assert flat(held) == flat(mapped)
    assert not held.image.flags.writeable
    assert held.bounding_circle == mapped.bounding_circle
    x, y = np.meshgrid(np.arange(20.0, 100.0, 9.3), np.arange(20.0, 80.0, 8.7))
    ra, dec = mapped.wcs.pixel_to_sky(x.ravel(), y.ravel())
    config = PhotometryConfig(window_size=25)
    measured = [flat(measure(frame, ra, dec, config)) for frame in (mapped, held)]
    assert measured[0] == measured[1]
    assert measured[0]["index"][1] == (63,)


COUNT_SIGNATURES = """
import json, sys
from pathlib import Path
from spxdask.science.level2.frame import open_frame
from spxdask.science.options import PhotometryConfig
from spxdask.science.photometry import measure

for path in sys.argv[1:]:
    content = Path(path).read_bytes()
    for source in (path, memoryview(content), memoryview(bytearray(content))):
        frame = open_frame(source, "frame.fits")
        measure(frame, *frame.wcs.pixel_to_sky([60.0], [50.0]), PhotometryConfig(window_size=25))
from spxdask.science.kernels import projection, rice, sources, statistics, zodi

modules = (projection, rice, sources, statistics, zodi)
functions = {name: f for module in modules for name, f in vars(module).items()}
compiled = {name: f.dispatcher for name, f in functions.items() if hasattr(f, "dispatcher")}
print(json.dumps({name: len(dispatcher.signatures) for name, dispatcher in compiled.items()}))
"""


@pytest.mark.slow
def test_frames_of_every_kind_need_one_compilation(scene):
    command = [sys.executable, "-c", COUNT_SIGNATURES, *map(str, scene[1].values())]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    assert found["measure_sources"] == found["decompress_rows"] == found["project_to_pixels"] == 1
    assert max(found.values()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("release", ["qr2", "qr3"])
@pytest.mark.parametrize("detector", range(1, 7))
def test_wavelengths_are_astropys(folder, detector, release):
    """The WAVE-TAB alternate WCS, without the SIP terms that astropy gives it."""
    window = list(CUT_OUTS.values())[detector % 4]
    exposure = exposure_of(detector, release=release)
    path = folder / exposure.filename
    write(path, exposure, window)
    frame = open_frame(path)
    assert frame.band == f"D{detector}"
    assert frame.origin == window[:2]
    with fits.open(path) as hdus:
        wcs = WCS(hdus["IMAGE"].header, hdus, key="W")
        wcs.sip = None
    # Pixel centres: outside the lattice, beyond the outermost, astropy has no values.
    x, y = (
        a.ravel()
        for a in np.meshgrid(np.linspace(0, window[2] - 1, 23), np.linspace(0, window[3] - 1, 19))
    )
    expected = wcs.wcs_pix2world(x, y, 0)
    found = frame.wavelength_at(x, y)
    # astropy may give metres for what the file has in um.
    scale = 1e6 if wcs.wcs.cunit[0] == "m" else 1.0
    for one, other in zip(found, expected, strict=True):
        assert abs(one - other * scale).max() < 1e-9
    truth = exposure.wavelength(x, y, window=window)
    for one, other in zip(found, truth, strict=True):
        assert abs(one - other).max() < 1e-9
    low, high = exposure.wavelength_limits_um
    assert ((found[0] > low - 0.01) & (found[0] < high + 0.01)).all()
    assert (found[1] < 0.1 * found[0]).all()


def test_wavelengths_on_the_outer_half_pixels(folder):
    """Beyond the last control points the outermost cells go on."""
    window = (2000, 2010, 40, 30)
    exposure = exposure_of(5)
    path = folder / "corner.fits"
    write(path, exposure, window)
    x, y = np.array([39.0, 39.5, 39.5, 0.3]), np.array([29.0, 29.5, 3.2, 29.5])
    for one, other in zip(
        open_frame(path).wavelength_at(x, y), exposure.wavelength(x, y, window=window), strict=True
    ):
        assert abs(one - other).max() < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("window", CUT_OUTS.values(), ids=CUT_OUTS)
@pytest.mark.parametrize(
    ("ra", "dec"), [(10.0, 40.0), (0.0, 0.0), (359.99, -5.0), (50.0, 90.0), (5.0, -89.0)]
)
def test_the_cap_holds_every_pixel(folder, ra, dec, window):
    path = folder / "cap.fits"
    exposure = exposure_of(ra=ra, dec=dec)
    write(path, exposure, window)
    frame = open_frame(path)
    nx, ny = window[2:]
    x, y = np.meshgrid(np.arange(-0.5, nx), np.arange(-0.5, ny))
    assert (x.max(), y.max()) == (nx - 0.5, ny - 0.5)
    sky = np.radians(exposure.wcs(window).all_pix2world(x.ravel(), y.ravel(), 0))
    center = np.radians(frame.bounding_circle[:2])
    apart = np.degrees(angular_separation(*center[:, None], *sky))
    assert apart.max() <= frame.bounding_circle[2] <= 1.01 * apart.max()


def test_the_cap_of_a_full_frame(folder):
    """Without its pixels: the projection and the shape are enough."""
    path = folder / "full.fits"
    exposure = exposure_of(ra=0.2, dec=85.0)
    write(path, exposure, (0, 0, 40, 30))
    small = open_frame(path)
    full = type(small)(
        **{
            name: getattr(small, name)
            for name in ("filename", "obs_id", "band", "mjd", "wcs", "wavelengths")
        },
        **dict.fromkeys(("image", "variance", "zodi", "flags"), np.empty((2040, 2040), ">f4")),
    )
    edge = np.linspace(-0.5, 2039.5, 300)
    sides = [(edge, e + 0 * edge) for e in (-0.5, 2039.5)] + [
        (e + 0 * edge, edge) for e in (-0.5, 2039.5)
    ]
    x, y = np.concatenate(sides, axis=1)
    sky = np.radians(exposure.wcs().all_pix2world(x, y, 0))
    apart = np.degrees(angular_separation(*np.radians(full.bounding_circle[:2])[:, None], *sky))
    assert apart.max() <= full.bounding_circle[2] <= 1.01 * apart.max()
    assert full.bounding_circle[2] == pytest.approx(2.54, abs=0.01)


def test_nothing_far_within_the_cap_is_on_the_frame_by_mistake(scene):
    """All that the cap lets through comes back to where it was, on the frame or off it."""
    frame = open_frame(scene[1]["qr2"])
    ra0, dec0, radius = frame.bounding_circle
    rng = np.random.default_rng(2)
    ra = ra0 + rng.uniform(-radius, radius, 3000) / np.cos(np.radians(dec0))
    dec = dec0 + rng.uniform(-radius, radius, 3000)
    x, y = frame.wcs.sky_to_pixel(ra, dec)
    back = frame.wcs.pixel_to_sky(x, y)
    assert angular_distance(ra, dec, *back).max() < 1e-9


def test_angular_distance():
    rng = np.random.default_rng(0)
    ra1, ra2 = rng.uniform(0, 360, (2, 500))
    dec1, dec2 = rng.uniform(-90, 90, (2, 500))
    ra2[:100], dec2[:100] = ra1[:100] + 1e-6, dec1[:100]
    expected = np.degrees(angular_separation(*np.radians([ra1, dec1, ra2, dec2])))
    assert np.allclose(angular_distance(ra1, dec1, ra2, dec2), expected, rtol=1e-9, atol=1e-13)
    assert angular_distance(0, 90, 123, 90) == pytest.approx(0, abs=1e-14)
    assert angular_distance(10, -20, 190, 20) == pytest.approx(180)
    assert angular_distance(359.5, 0, 0.5, 0) == pytest.approx(1)


# Flag names.


def change(path, name, **cards):
    """Set cards of an extension where they stand, or remove them for None; data stay bytes."""
    with fits.open(path, mode="update", disable_image_compression=True) as hdus:
        header = hdus[name].header
        for keyword, value in cards.items():
            if value is None:
                del header[keyword]
            else:
                header[keyword] = value


def replace_card(path, keyword, value, *, name="IMAGE"):
    """Put a raw value where a card is, whatever FITS thinks of it; blanks for None."""
    content = path.read_bytes()
    start = content.index(b"XTENSION= ", content.index(b"END     "))
    for hdu in scan(content):
        if hdu.name == name:
            at = content.index(f"{keyword:8}= ".encode(), start)
            assert at < hdu.data_start
            card = "" if value is None else f"{keyword:8}= {value}"
            path.write_bytes(content[:at] + card.ljust(80).encode() + content[at + 80 :])
            return
        start = hdu.data_start + hdu.data_size
    raise AssertionError(name)


def test_flag_bits_come_from_the_header(damaged):
    layout = damaged.stem
    if layout == "qr2":
        change(damaged, "FLAGS", MP_HOT=13, **{"HIERARCH MP_NEW_ONE": 31})
    else:
        change(damaged, "FLAGS", MSKN0010=None, MSKN0013="HOT", MSKN0031="NEW_ONE")
    assert open_frame(damaged).flag_bits == FLAG_BITS | {"HOT": 13, "NEW_ONE": 31}


def test_flag_bits_fall_back_on_the_list(damaged):
    change(damaged, "FLAGS", **{"MP_*" if damaged.stem == "qr2" else "MSKN*": None})
    assert open_frame(damaged).flag_bits == FLAG_BITS
    assert len(FLAG_BITS) == len(set(FLAG_BITS.values())) == 25
    assert [FLAG_BITS[n] for n in ("TRANSIENT", "SOURCE", "SATELLITE_HALO")] == [0, 21, 29]


@pytest.mark.parametrize(
    ("bit", "message"), [(32, "bits outside 0 to 31"), (-1, "bits outside 0 to 31")]
)
def test_impossible_flag_bits(scene, tmp_path, bit, message):
    path = shutil.copy(scene[1]["qr2"], tmp_path / "bits.fits")
    change(path, "FLAGS", MP_HOT=bit)
    with pytest.raises(FrameError, match=message):
        open_frame(path)


# What a user should know.


@pytest.mark.parametrize(
    ("cards", "warning"),
    [
        ({"FINAST": 2}, "astrometric solution not good: FINAST is 2"),
        ({"FINAST": "bad"}, "astrometric solution not good: FINAST is 'bad'"),
        ({"L2DQAFLG": "Fail"}, "archive's quality check: L2DQAFLG is 'Fail'"),
    ],
)
def test_warnings(damaged, cards, warning):
    change(damaged, "IMAGE", **cards)
    assert open_frame(damaged).warnings == (warning,)


@pytest.mark.parametrize("value", [None, 0.0, -5.0, 0.99, 60.1, 1e300, "wide", True])
def test_an_unusable_fwhm_is_none(damaged, value):
    change(damaged, "IMAGE", PSF_FWHM=value)
    assert open_frame(damaged).psf_fwhm is None


def test_without_a_physical_wcs_it_is_a_full_frame(damaged):
    change(damaged, "IMAGE", CRPIX1A=None, CRPIX2A=None)
    assert open_frame(damaged).origin == (0.0, 0.0)


@pytest.mark.parametrize("unit", ["MJy/sr", "MJy / sr"])
def test_units_with_and_without_blanks(damaged, unit):
    change(damaged, "IMAGE", BUNIT=unit)
    assert open_frame(damaged).shape == (100, 120)


def test_extensions_are_found_by_name(damaged):
    content = damaged.read_bytes()
    ends = [hdu.data_start + -(-hdu.data_size // BLOCK) * BLOCK for hdu in scan(content)]
    primary, *others = (content[a:b] for a, b in itertools.pairwise([0, *ends]))
    shuffled = damaged.with_name("shuffled.fits")
    shuffled.write_bytes(primary + b"".join(reversed(others)))
    one, other = open_frame(damaged), open_frame(shuffled)
    for name in ("image", "variance", "zodi", "flags"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name


# What is not a frame.


def assert_refused(path, message):
    """One sentence, which says what is wrong."""
    with pytest.raises(FrameError, match=message) as caught:
        open_frame(path)
    text = str(caught.value)
    assert len(text) < 250
    assert not re.search(r"[\n\t]|Traceback|  ", text)


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_extension(damaged, name):
    change(damaged, name, EXTNAME="OTHER")
    assert_refused(damaged, f"^no extension named {name}$")


def test_all_extensions_missing(tmp_path):
    fits.PrimaryHDU().writeto(tmp_path / "bare.fits")
    assert_refused(
        tmp_path / "bare.fits", "^no extension named IMAGE, FLAGS, VARIANCE, ZODI, WCS-WAVE$"
    )


@pytest.mark.parametrize("name", ["FLAGS", "VARIANCE", "ZODI"])
def test_planes_of_different_shape(damaged, name):
    with fits.open(damaged, disable_image_compression=True) as hdus:
        dtype = np.int32 if name == "FLAGS" else np.float32
        other = fits.ImageHDU(np.zeros((100, 119), dtype), name=name)
        hdus[name] = other
        hdus.writeto(damaged.with_name("other.fits"))
    assert_refused(
        damaged.with_name("other.fits"), rf"^{name} is \(100, 119\) pixels, IMAGE is \(100, 120\)$"
    )


@pytest.mark.parametrize("name", ["IMAGE", "FLAGS", "VARIANCE", "ZODI"])
@pytest.mark.parametrize(
    "data",
    [np.zeros((100, 120), ">f8"), np.zeros((2, 100, 120), ">f4"), np.zeros(120, ">i4"), None],
    ids=["doubles", "cube", "line", "nothing"],
)
def test_planes_of_another_kind(scene, tmp_path, name, data):
    path = tmp_path / "kind.fits"
    with fits.open(scene[1]["qr2"]) as hdus:
        hdus[name].data = data
        hdus.writeto(path)
    assert_refused(path, f"^{name} must have NAXIS 2 and BITPIX .+, got .+$")


def test_scaled_planes(scene, tmp_path):
    for card in ({"BZERO": 1.0}, {"BSCALE": 2.0}):
        path = shutil.copy(scene[1]["qr2"], tmp_path / "scaled.fits")
        with fits.open(path, mode="update", do_not_scale_image_data=True) as hdus:
            hdus["ZODI"].header.update(card)
        assert_refused(path, "^ZODI is scaled by BZERO and BSCALE")


def test_unreadable_compressed_flags(scene, tmp_path):
    path = shutil.copy(scene[1]["qr3"], tmp_path / "flags.fits")
    content = bytearray(path.read_bytes())
    flags = {hdu.name: hdu for hdu in scan(content)}["FLAGS"]
    heap = flags.data_start + flags.header["NAXIS1"] * flags.header["NAXIS2"]
    content[heap : flags.data_start + flags.data_size] = b"\xff" * (
        flags.data_start + flags.data_size - heap
    )
    path.write_bytes(content)
    assert_refused(path, "^FLAGS cannot be decompressed: ")


NOT_DECOMPRESSED = "^FLAGS cannot be decompressed: "


@pytest.mark.parametrize(
    ("cards", "message"),
    [
        ({"ZNAXIS1": "10000000000"}, r"^FLAGS is \(100, 10000000000\) pixels, IMAGE is"),
        ({"ZNAXIS1": "10000000000", "ZTILE1": None}, r"^FLAGS is \(100, 10000000000\) pixels"),
        ({"ZNAXIS2": "'NONE'"}, r"^FLAGS is \('NONE', 120\) pixels, IMAGE is"),
        ({"ZNAXIS": "3"}, NOT_DECOMPRESSED),
        ({"ZCMPTYPE": "'NONE'"}, NOT_DECOMPRESSED),
        ({"ZCMPTYPE": "'HCOMPRESS_1'"}, NOT_DECOMPRESSED),
        ({"ZBITPIX": "16"}, NOT_DECOMPRESSED),
        ({"ZTILE1": "'NONE'"}, NOT_DECOMPRESSED),
        ({"ZTILE1": "121"}, NOT_DECOMPRESSED),
        ({"ZTILE2": "0"}, NOT_DECOMPRESSED),
        ({"XTENSION": "'IMAGE'"}, NOT_DECOMPRESSED),
        # With these, astropy's decoder writes where it should not, or hangs.
        ({"ZVAL1": "0"}, NOT_DECOMPRESSED),
        ({"ZVAL2": "-1"}, NOT_DECOMPRESSED),
        ({"ZVAL2": "100000"}, NOT_DECOMPRESSED),
        ({"ZVAL2": None}, NOT_DECOMPRESSED),
        ({"ZNAME2": "'BytePix'", "ZVAL2": "100000"}, NOT_DECOMPRESSED),
        ({"TFIELDS": "2147483648"}, NOT_DECOMPRESSED),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::astropy.utils.exceptions.AstropyWarning")
def test_compressed_flags_with_a_spoilt_header(scene, tmp_path, monkeypatch, cards, message):
    path = shutil.copy(scene[1]["qr3"], tmp_path / "flags.fits")
    for keyword, value in cards.items():
        replace_card(path, keyword, value, name="FLAGS")
    # None of this is for the decoder to find.
    monkeypatch.delattr("spxdask.science.level2.flags._decompress_with_astropy")
    assert_refused(path, message)


@pytest.mark.parametrize(
    "options",
    [
        {"compression_type": "GZIP_1"},
        {"compression_type": "GZIP_2", "tile_shape": (30, 50)},
        {"tile_shape": (100, 120)},
        {"tile_shape": (7, 11)},
    ],
    ids=str,
)
def test_flags_compressed_in_another_way(scene, tmp_path, options):
    path = tmp_path / "flags.fits"
    how = {"compression_type": "RICE_1", "tile_shape": (1, 120)} | options
    with fits.open(scene[1]["qr2"]) as hdus:
        hdus["FLAGS"] = fits.CompImageHDU(hdus["FLAGS"].data, name="FLAGS", **how)
        hdus.writeto(path)
    flags = open_frame(path).flags
    assert flags.dtype == ">i4"
    np.testing.assert_array_equal(flags, scene[0].flags)


def test_a_table_that_does_not_claim_to_be_an_image(scene, tmp_path):
    path = shutil.copy(scene[1]["qr3"], tmp_path / "flags.fits")
    replace_card(path, "ZIMAGE", "F", name="FLAGS")
    assert_refused(path, "^FLAGS must be an 'IMAGE' extension, got 'BINTABLE'$")


@pytest.mark.parametrize("name", ["IMAGE", "VARIANCE", "ZODI"])
def test_planes_that_claim_to_be_tables(damaged, name):
    replace_card(damaged, "XTENSION", "'BINTABLE'", name=name)
    assert_refused(damaged, f"^{name} must be an 'IMAGE' extension, got 'BINTABLE'$")


@pytest.mark.parametrize(
    ("keyword", "value", "message"),
    [
        ("BUNIT", "'Jy'", "^BUNIT of IMAGE must be 'MJy / sr', got 'Jy'$"),
        ("BUNIT", "", "^BUNIT of IMAGE must be 'MJy / sr', got None$"),
        ("DETECTOR", "7", "^DETECTOR must be 1 to 6, got 7$"),
        ("DETECTOR", "0", "^DETECTOR must be 1 to 6, got 0$"),
        ("DETECTOR", "'3'", "DETECTOR must be an integer, got '3'$"),
        ("OBSID", "", "^OBSID must be a name, got None$"),
        ("OBSID", "'  '", "^OBSID must be a name, got ''$"),
        ("OBSID", "'a\tb'", r"^OBSID must be a name, got 'a\\tb'$"),
        ("OBSID", "17", "^OBSID must be a name, got 17$"),
        ("MJD-BEG", "", "MJD-BEG must be a number, got None$"),
        ("MJD-END", "'x'", "MJD-END must be a number, got 'x'$"),
        ("MJD-END", "1E999", "MJD-END must be a number, got inf$"),
        ("MJD-END", "1E308", "^MJD-BEG and MJD-END give the time 5e.307, which is no MJD$"),
        ("MJD-BEG", "-1E5", "^MJD-BEG and MJD-END give the time -.*, which is no MJD$"),
        ("CTYPE1", "", "^no usable celestial WCS: CTYPE1, CTYPE2 are"),
        ("CRVAL2", "", "CRVAL2 must be a number, got None$"),
        ("CRPIX1", "1E300", "^no usable celestial WCS: the frame is nowhere on the sky$"),
        ("CRPIX1A", "'a'", "CRPIX1A must be a number, got 'a'$"),
        ("CRPIX2A", "1E6", "^CRPIX1A and CRPIX2A put the cut-out at "),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_unusable_cards(damaged, keyword, value, message):
    replace_card(damaged, keyword, value)
    assert_refused(damaged, message)


@pytest.mark.parametrize("keyword", ["BUNIT", "DETECTOR", "OBSID", "MJD-BEG", "MJD-END", "CTYPE2"])
def test_missing_cards(damaged, keyword):
    change(damaged, "IMAGE", **{keyword: None})
    assert_refused(damaged, f"{keyword}.* None")


def test_no_celestial_wcs_at_all(damaged):
    change(
        damaged,
        "IMAGE",
        **{f"{key}{i}": None for key in ("CTYPE", "CRVAL", "CRPIX") for i in (1, 2)},
    )
    assert_refused(damaged, "^no usable celestial WCS: CTYPE1, CTYPE2 are")


def spoil_wave(x, y, values, how):
    if how == "NaN":
        values[0, 3, 2, 1] = np.nan
    elif how == "infinite":
        values[0, 0, 0, 0] = np.inf
    elif how == "x in disorder":
        x[0, 1] = x[0, 2]
    elif how == "y in disorder":
        y[0] = y[0, ::-1].copy()
    elif how == "zero":
        values[0, 0, 0, 0] = 0.0


OUT_OF_ORDER = "^WCS-WAVE has control points out of order or values that are not finite$"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        *((how, OUT_OF_ORDER) for how in ("NaN", "infinite", "x in disorder", "y in disorder")),
        ("zero", "^WCS-WAVE has wavelengths or bandwidths that are not positive$"),
    ],
)
def test_a_spoilt_wavelength_table(damaged, how, message):
    with fits.open(damaged, mode="update") as hdus:
        table = hdus["WCS-WAVE"].data
        spoil_wave(table["X"], table["Y"], table["VALUES"], how)
    assert_refused(damaged, message)


def test_wavelengths_at_infinite_control_points(scene, tmp_path):
    with fits.open(scene[1]["qr2"]) as hdus:
        table = hdus["WCS-WAVE"].data
        points = table["X"].astype(float)
        points[0, -1] = np.inf
        columns = [fits.Column("X", f"{points.size}D", array=points), *table.columns[1:]]
        hdus["WCS-WAVE"] = fits.BinTableHDU.from_columns(columns, name="WCS-WAVE")
        hdus.writeto(tmp_path / "wave.fits")
    assert_refused(tmp_path / "wave.fits", OUT_OF_ORDER)


@pytest.mark.parametrize(
    ("keyword", "value", "message"),
    [
        ("NAXIS2", "0", "^WCS-WAVE must be a table of one row, got 0 rows$"),
        ("XTENSION", "'IMAGE'", "^WCS-WAVE must be a table of one row, got 1 rows$"),
        ("TSCAL3", "2.0", "^WCS-WAVE column 3 is scaled by TSCAL and TZERO$"),
        ("TZERO1", "5.0", "^WCS-WAVE column 1 is scaled by TSCAL and TZERO$"),
        ("TTYPE3", "'OTHER'", "^WCS-WAVE has no column VALUES$"),
        ("TFIELDS", "2", "^WCS-WAVE has no column VALUES$"),
        ("TFIELDS", "4", "^WCS-WAVE column 4 has the unreadable form ''$"),
        ("TFORM1", "'10A'", "^WCS-WAVE column 1 has the unreadable form '10A'$"),
        ("TFORM1", "'\xb2J'", "^WCS-WAVE column 1 has the unreadable form"),
        ("TFORM3", "'99999D'", "^WCS-WAVE column 3 reaches beyond its row$"),
        ("TFORM3", "'12D'", "^WCS-WAVE has 11 x 11 control points and 12 values$"),
    ],
)
def test_a_wavelength_table_of_another_form(scene, tmp_path, keyword, value, message):
    path = shutil.copy(scene[1]["qr2"], tmp_path / "wave.fits")
    content = path.read_bytes()
    start = content.index(b"XTENSION= 'BINTABLE")
    at = content.find(f"{keyword:8}= ".encode(), start)
    if at < 0:
        at = content.index(b"TDIM3   = ", start)
    card = f"{keyword:8}= {value}".ljust(80).encode("latin-1")
    path.write_bytes(content[:at] + card + content[at + 80 :])
    assert_refused(path, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "^the file is empty$"),
        (b"x", "^not a FITS file$"),
        (b"<html><body>503 Service Unavailable</body></html>\n" * 100, "^not a FITS file$"),
        (b"SIMPLE  =                    T", "^the header at byte 0 has no END card$"),
    ],
)
def test_not_a_frame(tmp_path, content, message):
    (tmp_path / "frame.fits").write_bytes(content)
    assert_refused(tmp_path / "frame.fits", message)


def test_a_truncated_file(damaged):
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    assert_refused(damaged, r"^file is cut short: \d+ bytes, extension \d needs \d+$")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_frame(tmp_path / "absent.fits")
    with pytest.raises(IsADirectoryError):
        open_frame(tmp_path)
