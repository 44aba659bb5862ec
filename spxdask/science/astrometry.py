"""Where sources are at the time of a frame, and when their light passes the barycentre.

All that depends on the time alone is computed once a frame; what is left is a few vectors a
source. ERFA, the library under astropy, has the time scales and the place of the Earth.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import erfa
import numpy as np
from numpy.typing import ArrayLike

__all__ = ["DEFAULT_REF_EPOCH", "Observer", "find_bjd_tdb", "locate_observer", "move_to_epoch"]

# Of positions with motions but without an epoch: that of Gaia's third release, Julian year.
DEFAULT_REF_EPOCH = 2016.0

MJD_ZERO_JD = 2400000.5
J2000_JD, DAYS_A_YEAR = 2451545.0, 365.25
AU_KM = erfa.DAU / 1000.0
LIGHT_KM_A_DAY = erfa.CMPS * erfa.DAYSEC / 1000.0
RADIANS_A_MAS = math.radians(1.0 / 3.6e6)


@dataclass(frozen=True, kw_only=True)
class Observer:
    """Time and place of an exposure in the solar system.

    Attributes
    ----------
    jd_tdb : float
        Barycentric dynamical time of the middle of the exposure, Julian days.
    earth_au : (3,) float array
        The Earth relative to the barycentre, ICRS axes, au.
    position_au : (3,) float array
        The telescope, likewise.
    """

    jd_tdb: float
    earth_au: np.ndarray
    position_au: np.ndarray

    @property
    def julian_year(self) -> float:
        """The time as a Julian year, such as 2025.96."""
        return 2000.0 + (self.jd_tdb - J2000_JD) / DAYS_A_YEAR


def locate_observer(mjd: float, spacecraft_km: ArrayLike | None = None) -> Observer:
    """Find the telescope in the solar system.

    Parameters
    ----------
    mjd : float
        UTC, middle of the exposure, days.
    spacecraft_km : (3,) float array, optional
        X_SC, Y_SC and Z_SC: the telescope relative to the centre of the Earth, km. Without
        them it is taken to be there, which is wrong by 0.03 s of light at most.

    Returns
    -------
    Observer
        By astropy's built-in ephemeris.
    """
    with warnings.catch_warnings():
        # Of leap seconds some years ahead nobody knows.
        warnings.simplefilter("ignore", erfa.ErfaWarning)
        tt = erfa.taitt(*erfa.utctai(MJD_ZERO_JD, mjd))
        tdb = erfa.tttdb(*tt, erfa.dtdb(*tt, 0.0, 0.0, 0.0, 0.0))
        _, barycentric = erfa.epv00(*tdb)
    earth = np.array(barycentric["p"])
    offset = np.zeros(3) if spacecraft_km is None else np.asarray(spacecraft_km, float) / AU_KM
    return Observer(jd_tdb=float(tdb[0] + tdb[1]), earth_au=earth, position_au=earth + offset)


def find_bjd_tdb(observer: Observer, ra: ArrayLike, dec: ArrayLike) -> np.ndarray:
    """Return the times at which the light of sources passes the barycentre.

    Parameters
    ----------
    observer : Observer
        Time and place of the exposure.
    ra, dec : (n,) float array
        ICRS, deg.

    Returns
    -------
    (n,) float array
        Barycentric Julian dates (TDB), days.
    """
    alpha, delta = np.deg2rad(np.asarray(ra, float)), np.deg2rad(np.asarray(dec, float))
    x, y, z = observer.position_au * (AU_KM / LIGHT_KM_A_DAY)
    return observer.jd_tdb + (
        np.cos(delta) * (x * np.cos(alpha) + y * np.sin(alpha)) + z * np.sin(delta)
    )


def move_to_epoch(
    observer: Observer,
    ra: ArrayLike,
    dec: ArrayLike,
    *,
    pmra: ArrayLike,
    pmdec: ArrayLike,
    ref_epoch: ArrayLike = DEFAULT_REF_EPOCH,
    parallax: ArrayLike = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return positions at the time of an exposure, as seen from the Earth.

    Sources move in straight lines, and not along the line of sight.

    Parameters
    ----------
    observer : Observer
        Time and place of the exposure.
    ra, dec : (n,) float array
        ICRS at the epoch of the catalogue, deg.
    pmra, pmdec : (n,) float array
        Proper motion, mas/yr, that in ra times the cosine of dec. NaN is none.
    ref_epoch : float or (n,) float array
        Epoch of the catalogue, Julian year. NaN is `DEFAULT_REF_EPOCH`.
    parallax : float or (n,) float array
        In mas. NaN, and what is not positive, is none.

    Returns
    -------
    ra, dec : (n,) float array
        ICRS, deg.
    """
    ra, dec = np.asarray(ra, float), np.asarray(dec, float)
    epoch = np.nan_to_num(np.asarray(ref_epoch, float), nan=DEFAULT_REF_EPOCH)
    years = observer.julian_year - epoch
    east, north = (
        np.nan_to_num(np.asarray(motion, float)) * years * RADIANS_A_MAS for motion in (pmra, pmdec)
    )
    shift = np.maximum(np.nan_to_num(np.asarray(parallax, float)), 0.0) * RADIANS_A_MAS
    sin_a, cos_a = np.sin(np.deg2rad(ra)), np.cos(np.deg2rad(ra))
    sin_d, cos_d = np.sin(np.deg2rad(dec)), np.cos(np.deg2rad(dec))
    # In units of the distance, of which the parallax is the reciprocal in au.
    earth_x, earth_y, earth_z = observer.earth_au
    x = cos_d * cos_a - north * sin_d * cos_a - east * sin_a - shift * earth_x
    y = cos_d * sin_a - north * sin_d * sin_a + east * cos_a - shift * earth_y
    z = sin_d + north * cos_d - shift * earth_z
    moved = (east != 0) | (north != 0) | (shift != 0)
    new_ra = np.rad2deg(np.arctan2(y, x)) % 360.0
    new_dec = np.rad2deg(np.arctan2(z, np.hypot(x, y)))
    # What does not move keeps its position to the last digit.
    return np.where(moved, new_ra, ra), np.where(moved, new_dec, dec)
