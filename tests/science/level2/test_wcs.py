from __future__ import annotations

import numpy as np
import pytest
from astropy.coordinates import angular_separation
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_area
from hypothesis import given, settings
from hypothesis import strategies as st
from real_headers import REAL_CARDS

from spxdask.errors import FrameError
from spxdask.science.level2.fits import BLOCK, scan
from spxdask.science.level2.wcs import TanSip
from spxdask.simulate.frames import FRAME_SIZE, Exposure

CENTERS = [
    (10.0880653194, 40.8987511044),
    (0.0, 0.0),
    (0.3, -0.2),
    (359.9, 5.0),
    (180.0, -66.5),
    (270.0, 66.56),
    (123.4, 89.0),
    (0.0, 90.0),
    (77.0, 90.0),
    (211.0, -90.0),
    (300.0, -89.9),
]


def header_of(ra=10.0, dec=40.0, roll_deg=0.0, window=None, **cards) -> fits.Header:
    """A real header, moved, with cards changed, or removed where they are None."""
    exposure = Exposure(
        obs_id="2025W51_1A_0684_2",
        detector=3,
        ra=ra,
        dec=dec,
        roll_deg=roll_deg,
        mjd_begin=61027.0,
    )
    header = exposure.image_header(window)
    for keyword, value in cards.items():
        if value is None:
            del header[keyword]
        else:
            header[keyword] = value
    return header


def parsed(header: fits.Header):
    """The header as the reader of frames gets it, through the bytes of a file."""
    cards = "SIMPLE  =                    T".ljust(80) + "NAXIS   = 0".ljust(80)
    cards += "BITPIX  = 8".ljust(80) + header.tostring(endcard=True, padding=False)
    return scan(cards.ljust(-(-len(cards) // BLOCK) * BLOCK).encode("ascii"))[0].header


def tan_sip(header: fits.Header) -> TanSip:
    return TanSip.from_header(parsed(header))


def celestial(header: fits.Header) -> WCS:
    """What astropy makes of the header; the alternate WCSs need a file around them."""
    return WCS(header, key=" ")


def grid(step=97.0):
    axis = np.arange(-60.0, FRAME_SIZE + 60.0, step)
    x, y = np.meshgrid(axis, axis)
    return x.ravel(), y.ravel()


def separation_mas(ra1, dec1, ra2, dec2):
    return np.degrees(angular_separation(*map(np.radians, (ra1, dec1, ra2, dec2)))) * 3.6e6


def as_cd(header: fits.Header, **cards) -> fits.Header:
    for i in (1, 2):
        for j in (1, 2):
            if f"PC{i}_{j}" in header:
                header[f"CD{i}_{j}"] = header.pop(f"PC{i}_{j}")
        del header[f"CDELT{i}"]
    header.update(cards)
    return header


def without_sip(header: fits.Header) -> fits.Header:
    for name in ("A", "B", "AP", "BP"):
        del header[f"{name}_*"]
    header["CTYPE1"], header["CTYPE2"] = "RA---TAN", "DEC--TAN"
    return header


def without_inverse(header: fits.Header) -> fits.Header:
    for name in ("AP", "BP"):
        del header[f"{name}_*"]
    return header


def scaled(header: fits.Header) -> fits.Header:
    """CDELT that is not 1, and different along the axes."""
    for i, step in ((1, -0.002), (2, 0.0015)):
        header[f"CDELT{i}"] = step
        for j in (1, 2):
            header[f"PC{i}_{j}"] /= step
    return header


HEADERS = {
    **{f"{ra} {dec}": header_of(ra, dec, 33.0) for ra, dec in CENTERS},
    "real": header_of(*CENTERS[0]),
    "cut-out": header_of(359.99, 10.0, 200.0, window=(900, 40, 120, 70)),
    "LONPOLE 150": header_of(50.0, -30.0, 10.0, LONPOLE=150.0),
    "LONPOLE 0": header_of(0.1, -89.5, 10.0, LONPOLE=0.0),
    "LONPOLE -75.5": header_of(200.0, 85.0, 10.0, LONPOLE=-75.5),
    "no LONPOLE": header_of(50.0, -30.0, LONPOLE=None, LATPOLE=None),
    "no LONPOLE, north": header_of(50.0, 90.0, LONPOLE=None, LATPOLE=None),
    "no LONPOLE, south": header_of(50.0, -90.0, LONPOLE=None, LATPOLE=None),
    "CD": as_cd(header_of(350.0, -12.0, 5.0)),
    "some CD": as_cd(header_of(350.0, -12.0, PC1_1=None, PC2_2=None), CDELT1=1.0),
    "CDELT": scaled(header_of(350.0, -12.0, 5.0)),
    "no CUNIT": header_of(350.0, -12.0, CUNIT1=None, CUNIT2=None),
    "negative longitudes": header_of(-10.0, -12.0, LONPOLE=-180.0),
    "no CDELT": header_of(350.0, -12.0, CDELT1=None, CDELT2=None),
    "no SIP": without_sip(header_of(0.0, 70.0, 70.0)),
    "no inverse": without_inverse(header_of(0.0, 70.0)),
    "orders differ": header_of(0.0, 70.0, B_ORDER=2),
}


def real_header(cards) -> fits.Header:
    """The header of a real cut-out, of which only the cards of the projection were kept."""
    header = header_of()
    for name in ("A", "B", "AP", "BP"):
        del header[f"{name}_?_?"]
    del header["AP_ORDER"], header["BP_ORDER"]
    header.update({name: value for name, value in cards.items() if name != "OMEGA_MEDIAN"})
    return header


@pytest.fixture(params=HEADERS, scope="module")
def both(request):
    return tan_sip(HEADERS[request.param]), celestial(HEADERS[request.param])


def test_pixel_to_sky(both):
    ours, theirs = both
    x, y = grid()
    ra, dec = ours.pixel_to_sky(x, y)
    assert separation_mas(ra, dec, *theirs.all_pix2world(x, y, 0)).max() < 1e-4
    assert ((ra >= 0) & (ra <= 360) & (abs(dec) <= 90)).all()


def test_sky_to_pixel(both):
    ours, theirs = both
    x, y = grid()
    ra, dec = theirs.all_pix2world(x, y, 0)
    found = np.array(ours.sky_to_pixel(ra, dec))
    # astropy's criterion of convergence is the same, so both are good to about 1e-9.
    expected = np.array(theirs.all_world2pix(ra, dec, 0, tolerance=1e-10))
    assert abs(found - expected).max() < 1e-8
    assert abs(found - [x, y]).max() < 1e-7


def test_pixel_area(both):
    ours, theirs = both
    assert ours.pixel_area_arcsec2 == pytest.approx(
        proj_plane_pixel_area(theirs) * 3600.0**2, rel=1e-12
    )


def test_pixel_area_of_the_real_header():
    header = HEADERS["real"]
    area = tan_sip(header).pixel_area_arcsec2
    assert area == pytest.approx(37.86, abs=0.005)
    assert area == pytest.approx(header["OMEGA_MEDIAN"], rel=1e-4)


@given(
    st.floats(0, 360),
    st.floats(-90, 90),
    st.floats(0, 360),
    st.floats(-180, 180),
    st.tuples(st.floats(-0.5, 2039.5), st.floats(-0.5, 2039.5)),
)
@settings(max_examples=30, deadline=None)
def test_any_pointing(ra, dec, roll_deg, lonpole, pixel):
    header = header_of(ra, dec, roll_deg, LONPOLE=lonpole)
    ours, theirs = tan_sip(header), celestial(header)
    x, y = np.array(pixel)[:, None]
    sky = theirs.all_pix2world(x, y, 0)
    assert separation_mas(*ours.pixel_to_sky(x, y), *sky)[0] < 1e-4
    assert abs(np.array(ours.sky_to_pixel(*sky)) - [x, y]).max() < 1e-7


def test_shapes_and_nothing_at_all():
    wcs = tan_sip(HEADERS["real"])
    ra, dec = wcs.pixel_to_sky(np.zeros((3, 4)), np.zeros((3, 4)))
    assert ra.shape == dec.shape == (3, 4)
    assert [len(a) for a in wcs.sky_to_pixel(np.empty(0), np.empty(0))] == [0, 0]
    assert [len(a) for a in wcs.sky_to_pixel([10.0], [40])] == [1, 1]


def test_a_position_does_not_depend_on_the_others():
    wcs = tan_sip(HEADERS["359.9 5.0"])
    rng = np.random.default_rng(3)
    x, y = rng.uniform(-100, FRAME_SIZE + 100, (2, 300))
    ra, dec = wcs.pixel_to_sky(x, y)
    far = rng.uniform(0, 360, 300), rng.uniform(-90, 90, 300)
    alone = np.array([np.ravel(wcs.sky_to_pixel([a], [d])) for a, d in zip(ra, dec, strict=True)])
    among = np.array(wcs.sky_to_pixel(np.append(far[0], ra), np.append(far[1], dec)))[:, 300:]
    order = rng.permutation(300)
    shuffled = np.array(wcs.sky_to_pixel(ra[order], dec[order]))
    assert np.array_equal(alone.T, among)
    assert np.array_equal(alone.T[:, order], shuffled)


@pytest.mark.parametrize("name", ["real", "0.3 -0.2", "0.0 90.0", "LONPOLE 150", "no SIP"])
def test_the_other_side_of_the_sky_is_nowhere(name):
    wcs = tan_sip(HEADERS[name])
    ra0, dec0 = wcs.crval
    rng = np.random.default_rng(5)
    ra = np.append((ra0 + 180.0) % 360.0, rng.uniform(0, 360, 2000))
    dec = np.append(-dec0, np.degrees(np.arcsin(rng.uniform(-1, 1, 2000))))
    hidden = (
        np.degrees(angular_separation(*np.radians([ra0, dec0])[:, None], *np.radians([ra, dec])))
        > 90.0
    )
    assert 900 < hidden.sum() < 1100
    for position in wcs.sky_to_pixel(ra[hidden], dec[hidden]):
        assert np.isnan(position).all()


def test_no_position_no_pixel():
    wcs = tan_sip(HEADERS["real"])
    ra0, dec0 = wcs.crval
    for position in wcs.sky_to_pixel([np.nan, ra0, np.inf], [dec0, np.nan, dec0]):
        assert np.isnan(position).all()


@pytest.mark.parametrize("name", HEADERS)
def test_what_is_near_but_off_the_frame_stays_off(name):
    """Within the cap that holds the frame, the inversion has one solution, the true one."""
    wcs = tan_sip(HEADERS[name])
    rng = np.random.default_rng(4)
    bearing = rng.uniform(0, 2 * np.pi, 4000)
    # The full frame's half diagonal is 2.54 deg.
    distance = 2.75 * np.sqrt(rng.uniform(0, 1, 4000))
    middle = wcs.crpix
    x0 = middle[0] + distance / 6.15 * 3600 * np.cos(bearing)
    y0 = middle[1] + distance / 6.15 * 3600 * np.sin(bearing)
    ra, dec = wcs.pixel_to_sky(x0, y0)
    x, y = wcs.sky_to_pixel(ra, dec)
    converged = np.isfinite(x)
    assert converged[(abs(x0 - middle[0]) < 1100) & (abs(y0 - middle[1]) < 1100)].all()
    assert abs(x - x0)[converged].max() < 1e-6
    assert abs(y - y0)[converged].max() < 1e-6


NO_MATRIX = {f"PC{i}_{j}": None for i in (1, 2) for j in (1, 2)}
BAD = [
    ({"CTYPE1": "RA---SIN"}, "no usable celestial WCS: CTYPE1, CTYPE2 are"),
    ({"CTYPE2": None}, "no usable celestial WCS: CTYPE1, CTYPE2 are"),
    ({"CTYPE1": "DEC--TAN-SIP", "CTYPE2": "RA---TAN-SIP"}, "no usable celestial WCS"),
    ({"CTYPE1": "GLON-TAN-SIP"}, "no usable celestial WCS"),
    ({"PC1_1": None, "CDELT1": None}, "it has none of CD1_1, PC1_1 and CDELT1"),
    ({"PC1_1": 0.0, "PC1_2": 0.0}, "no usable celestial WCS: its matrix is singular"),
    ({"CDELT2": 0.0}, "its matrix is singular"),
    ({"PC1_1": 1e200, "PC2_2": 1e200}, "its matrix is singular"),
    ({"CRVAL2": 90.1}, "CRVAL1, CRVAL2 or LONPOLE is off the sky"),
    ({"CRVAL1": 360.0 * 10**9 + 270.0}, "CRVAL1, CRVAL2 or LONPOLE is off the sky"),
    ({"CRVAL1": -360.1}, "CRVAL1, CRVAL2 or LONPOLE is off the sky"),
    ({"LONPOLE": 1e18}, "CRVAL1, CRVAL2 or LONPOLE is off the sky"),
    ({"CUNIT1": "arcsec", "CUNIT2": "arcsec"}, "CUNIT1, CUNIT2 are ('arcsec', 'arcsec')"),
    ({"CUNIT2": 1.0}, "CUNIT1, CUNIT2 are ('deg', 1.0)"),
    ({"PV1_3": 90.0}, "it has PC and PV cards"),
    ({"PV2_1": 0.0, **NO_MATRIX}, "it has PV cards"),
    ({"CD1_1": 0.0017}, "it has CD and PC cards"),
    ({"CROTA2": 30.0, **NO_MATRIX}, "it has CROTA cards"),
    ({"CRVAL1": None}, "CRVAL1 must be a number, got None"),
    ({"CRPIX2": None}, "CRPIX2 must be a number, got None"),
    ({"CRPIX1": "1020.5"}, "CRPIX1 must be a number, got '1020.5'"),
    ({"LONPOLE": "x"}, "LONPOLE must be a number, got 'x'"),
    ({"A_ORDER": -1}, "A_ORDER must be 2 to 9, got -1"),
    ({"B_ORDER": 10}, "B_ORDER must be 2 to 9, got 10"),
    ({"B_ORDER": 1}, "B_ORDER must be 2 to 9, got 1"),
    ({"A_ORDER": None}, "A_ORDER must be an integer, got None"),
    ({"A_ORDER": 3.0}, "A_ORDER must be an integer, got 3.0"),
    ({"A_2_1": "x"}, "A_2_1 must be a number, got 'x'"),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("cards", "message"), BAD)
def test_unusable_headers_are_refused(cards, message):
    header = header_of(**cards)
    with pytest.raises(FrameError) as caught:
        tan_sip(header)
    assert message in str(caught.value)


@pytest.mark.parametrize("keyword", ["CRVAL1", "CRVAL2", "CRPIX1", "PC1_2", "LONPOLE", "A_1_1"])
def test_values_beyond_all_numbers_are_refused(keyword):
    text = header_of().tostring(padding=False)
    at = text.index(f"{keyword:8}= ")
    header = fits.Header.fromstring(text[:at] + f"{keyword:8}= 1E999".ljust(80) + text[at + 80 :])
    with pytest.raises(FrameError, match=f"{keyword} must be a number, got inf"):
        tan_sip(header)


def solid_angles_by_differences(wcs: WCS, x, y, step=0.5):
    """|d(sky)/d(pixel)| from positions half a pixel to every side, arcsec^2."""

    def direction(dx, dy):
        ra, dec = np.radians(wcs.all_pix2world(x + dx, y + dy, 0))
        return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)])

    along_x = (direction(step, 0) - direction(-step, 0)) / (2 * step)
    along_y = (direction(0, step) - direction(0, -step)) / (2 * step)
    area = np.linalg.norm(np.cross(along_x, along_y, axis=0), axis=0)
    return area * np.degrees(3600.0) ** 2


def test_solid_angles_are_those_of_the_whole_projection(both):
    ours, theirs = both
    x, y = grid()
    expected = solid_angles_by_differences(theirs, x, y)
    np.testing.assert_allclose(ours.solid_angle_at(x, y), expected, rtol=1e-6)


@pytest.mark.parametrize("detector", REAL_CARDS)
def test_the_median_solid_angle_is_that_of_the_header(detector):
    cards = REAL_CARDS[detector]
    header = real_header(cards)
    wcs = tan_sip(header)
    # Of a cut-out: its reference pixels are counted from its own corner.
    axis = np.arange(0.0, FRAME_SIZE, 7.0)
    x, y = np.meshgrid(axis + cards["CRPIX1A"] - 1, axis + cards["CRPIX2A"] - 1)
    angles = wcs.solid_angle_at(x, y)
    assert angles.shape == x.shape
    assert np.median(angles) == pytest.approx(cards["OMEGA_MEDIAN"], rel=2e-5)
    assert 0.97 < angles.min() / angles.max() < 0.99
    np.testing.assert_allclose(
        angles[::50, ::50],
        solid_angles_by_differences(celestial(header), x[::50, ::50], y[::50, ::50]),
        rtol=1e-6,
    )


def test_solid_angles_of_nothing_and_of_one():
    wcs = tan_sip(HEADERS["real"])
    assert wcs.solid_angle_at(np.empty(0), np.empty(0)).shape == (0,)
    assert wcs.solid_angle_at(1000.0, 20.0) == wcs.solid_angle_at([1000.0], [20.0])[0]
