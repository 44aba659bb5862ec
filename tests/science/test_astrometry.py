"""Barycentric times and proper motions, against astropy."""

from __future__ import annotations

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import (
    GCRS,
    ITRS,
    CartesianRepresentation,
    Distance,
    EarthLocation,
    SkyCoord,
    angular_separation,
    get_body_barycentric,
)
from astropy.time import Time
from astropy.utils import iers

from spxdask.science.astrometry import find_bjd_tdb, locate_observer, move_to_epoch

# X_SC, Y_SC, Z_SC of 2025W51_1A_0684_2, km.
SPACECRAFT = (5481.951086440418, 150.0940688632607, 4388.6535283501635)
MJD = 61027.215650564
BARNARD = {"ra": 269.452, "dec": 4.6934, "pmra": -801.55, "pmdec": 10362.39, "parallax": 546.98}


@pytest.fixture(autouse=True)
def no_downloads():
    with iers.conf.set_temp("auto_download", False), iers.conf.set_temp("auto_max_age", None):
        yield


def sky(n=200, seed=1):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 360, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))


@pytest.mark.parametrize("mjd", [MJD, 60800.0, 60750.3, 61200.9])
@pytest.mark.parametrize("spacecraft", [None, SPACECRAFT])
def test_times_are_those_of_astropy(mjd, spacecraft):
    time = Time(mjd, format="mjd", scale="utc")
    at = CartesianRepresentation(*(spacecraft or (0.0, 0.0, 0.0)), unit=u.km)
    fixed = GCRS(at, obstime=time).transform_to(ITRS(obstime=time))
    location = EarthLocation.from_geocentric(*fixed.cartesian.xyz)
    ra, dec = sky()
    light_time = time.light_travel_time(
        SkyCoord(ra, dec, unit="deg"), location=location, ephemeris="builtin"
    )
    expected = time.tdb + light_time
    got = find_bjd_tdb(locate_observer(mjd, spacecraft), ra, dec)
    difference = (Time(got, format="jd", scale="tdb") - expected).to_value(u.s)
    assert abs(difference).max() < 1e-3
    assert abs((got - (mjd + 2400000.5)) * 1440).max() < 8.4 + 69.2 / 60


def test_times_of_any_year():
    """No leap second is known beyond the next years, and nothing is said of that."""
    for mjd in (40000.0, 70000.0, 80000.0):
        got = find_bjd_tdb(locate_observer(mjd), [10.0], [0.0])
        assert abs(got[0] - mjd - 2400000.5) < 0.01


def separation_mas(ra1, dec1, ra2, dec2):
    return np.degrees(angular_separation(*map(np.radians, (ra1, dec1, ra2, dec2)))) * 3.6e6


@pytest.mark.parametrize("ref_epoch", [2016.0, 2000.0, 1991.25])
def test_motions_are_those_of_astropy(ref_epoch):
    ra, dec = sky()
    rng = np.random.default_rng(3)
    pmra, pmdec = rng.normal(0, 500, (2, len(ra)))
    dec[:2] = 89.99, -89.99
    for values, of in ((ra, "ra"), (dec, "dec"), (pmra, "pmra"), (pmdec, "pmdec")):
        values[2] = BARNARD[of]
    start = SkyCoord(
        ra * u.deg,
        dec * u.deg,
        pm_ra_cosdec=pmra * u.mas / u.yr,
        pm_dec=pmdec * u.mas / u.yr,
        distance=Distance(np.full(len(ra), 20.0) * u.pc),
        obstime=Time(ref_epoch, format="jyear", scale="tdb"),
    )
    expected = start.apply_space_motion(new_obstime=Time(MJD, format="mjd", scale="utc"))
    got = move_to_epoch(locate_observer(MJD), ra, dec, pmra=pmra, pmdec=pmdec, ref_epoch=ref_epoch)
    assert separation_mas(*got, expected.ra.deg, expected.dec.deg).max() < 0.5
    assert separation_mas(*got, ra, dec).max() > 90_000


def test_parallaxes_are_shifts_of_the_earth():
    ra, dec = sky()
    rng = np.random.default_rng(4)
    pmra, pmdec = rng.normal(0, 300, (2, len(ra)))
    parallax = rng.uniform(0.5, 800, len(ra))
    time = Time(MJD, format="mjd", scale="utc")
    start = SkyCoord(
        ra * u.deg,
        dec * u.deg,
        pm_ra_cosdec=pmra * u.mas / u.yr,
        pm_dec=pmdec * u.mas / u.yr,
        distance=Distance(parallax=parallax * u.mas),
        obstime=Time(2016.0, format="jyear", scale="tdb"),
    )
    moved = start.apply_space_motion(new_obstime=time)
    earth = get_body_barycentric("earth", time, ephemeris="builtin")
    seen = SkyCoord(moved.cartesian.without_differentials() - earth)
    observer = locate_observer(MJD, SPACECRAFT)
    got = move_to_epoch(observer, ra, dec, pmra=pmra, pmdec=pmdec, parallax=parallax)
    assert separation_mas(*got, seen.ra.deg, seen.dec.deg).max() < 1.0
    without = move_to_epoch(observer, ra, dec, pmra=pmra, pmdec=pmdec)
    assert separation_mas(*got, *without).max() > 500


def test_what_is_empty_does_not_move():
    nan = np.nan
    ra, dec = np.array([359.9999999, 10.1, 20.0, 30.0]), np.array([0.1, -89.9, 5.0, 6.0])
    got = move_to_epoch(
        locate_observer(MJD),
        ra,
        dec,
        pmra=np.array([nan, 0.0, 100.0, 100.0]),
        pmdec=np.array([nan, nan, nan, 0.0]),
        ref_epoch=np.array([nan, 2000.0, nan, 2016.0]),
        parallax=np.array([nan, -3.0, 0.0, nan]),
    )
    np.testing.assert_array_equal(got[0][:2], ra[:2])
    np.testing.assert_array_equal(got[1][:2], dec[:2])
    years = locate_observer(MJD).julian_year - 2016.0
    for k in (2, 3):
        moved = (got[0][k] - ra[k]) * np.cos(np.radians(dec[k])) * 3.6e6
        assert moved == pytest.approx(100.0 * years, rel=1e-6)


def test_the_year_of_an_exposure():
    assert locate_observer(MJD).julian_year == pytest.approx(
        Time(MJD, format="mjd").jyear, abs=1e-5
    )
