"""What is constant in time on each detector: wavelengths, solid angles and gains of its pixels.

The calibration products hold these maps, and frames are simulated with them.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from astropy.wcs import WCS
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import RectBivariateSpline

__all__ = [
    "BAND_LIMITS_UM",
    "FRAME_SIZE",
    "NOMINAL_LIMITS_UM",
    "RESOLVING_POWER",
    "WAVELENGTH_SHIFT_UM",
    "make_gain_map",
    "make_solid_angle_map",
    "smooth_wavelength",
]

FRAME_SIZE = 2040
BAND_LIMITS_UM = {
    1: (0.75, 1.115),
    2: (1.10, 1.65),
    3: (1.637, 2.44),
    4: (2.42, 3.82),
    5: (3.815, 4.417),
    6: (4.42, 5.00),
}
# What the archive's table of observations has, which is less.
NOMINAL_LIMITS_UM = BAND_LIMITS_UM | {
    1: (0.75, 1.09),
    2: (1.10, 1.62),
    3: (1.63, 2.41),
    5: (3.83, 4.41),
}
RESOLVING_POWER = {1: 39, 2: 41, 3: 41, 4: 35, 5: 112, 6: 128}
# What version 5 of the wavelengths adds to version 4. No figure is published for detector 6.
WAVELENGTH_SHIFT_UM = {1: 0.0, 2: 0.0, 3: 0.0, 4: 0.0, 5: 0.0064, 6: 0.0040}

_ISO_LINE_CURVATURE = 0.05
# Lowest row, median and highest row of the factors from the gains of before QR3 to those of QR3.
# Those of detectors 1 and 5 are the real ones.
_GAIN_LIMITS = {
    1: (0.875, 0.970, 0.983),
    2: (0.962, 0.984, 0.996),
    3: (0.971, 0.992, 1.006),
    4: (0.979, 1.001, 1.015),
    5: (0.987, 1.007, 1.029),
    6: (0.981, 1.004, 1.022),
}
# Standard deviation of the factors within a row.
_GAIN_SCATTER = 1e-3
# Distance in pixels of the places where solid angles are computed; between them, they are
# interpolated.
_SOLID_ANGLE_STEP = 60


def smooth_wavelength(
    detector: int, x: ArrayLike, y: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the wavelengths that the control points of WCS-WAVE are taken from.

    Parameters
    ----------
    detector : int
        1 to 6.
    x, y : array_like
        Positions in 1-based pixels of the full frame; they are broadcast.

    Returns
    -------
    wavelength_um : float array
        Central wavelength in um.
    bandwidth_um : float array
        Bandwidth in um.
    """
    across = (2.0 * np.asarray(x) - FRAME_SIZE - 1) / (FRAME_SIZE - 1)
    along = (np.asarray(y) - 1.0) / (FRAME_SIZE - 1)
    step = (along + _ISO_LINE_CURVATURE * across**2) / (1.0 + _ISO_LINE_CURVATURE)
    shortest, longest = BAND_LIMITS_UM[detector]
    wavelength = shortest * (longest / shortest) ** step
    return wavelength, wavelength / RESOLVING_POWER[detector]


def make_solid_angle_map(wcs: WCS, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Return the solid angle of each pixel: the Jacobian of the whole WCS at its centre.

    Parameters
    ----------
    wcs : astropy.wcs.WCS
        Celestial WCS, with its distortions.
    shape : (int, int)
        Shape (ny, nx) of the image.

    Returns
    -------
    (ny, nx) float array
        Solid angles in arcsec^2.
    """
    # The rim beyond the edges keeps the places apart on an image of one pixel, too.
    y, x = (np.linspace(-1.0, n, max(4, n // _SOLID_ANGLE_STEP)) for n in shape)
    grid_x, grid_y = np.meshgrid(x, y)
    nodes = RectBivariateSpline(y, x, _solid_angles(wcs, grid_x, grid_y))
    return nodes(*(np.arange(n, dtype=float) for n in shape))


def _solid_angles(wcs: WCS, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return solid angles in arcsec^2 at 0-based positions, by differences over one pixel."""

    def direction(dx: float, dy: float) -> NDArray[np.float64]:
        ra, dec = np.radians(wcs.all_pix2world(x + dx, y + dy, 0))
        return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], -1)

    along_x = direction(0.5, 0.0) - direction(-0.5, 0.0)
    along_y = direction(0.0, 0.5) - direction(0.0, -0.5)
    area = np.linalg.norm(np.cross(along_x, along_y), axis=-1)
    return area * math.degrees(3600.0) ** 2


@lru_cache(maxsize=2)
def make_gain_map(detector: int) -> NDArray[np.float32]:
    """Return the factors that put a frame of before QR3 on the gain scale of QR3.

    Parameters
    ----------
    detector : int
        1 to 6.

    Returns
    -------
    (2040, 2040) float32 array
        The factors, without the wild values of the product. It cannot be written to.
    """
    lowest, median, highest = _GAIN_LIMITS[detector]
    power = math.log((highest - median) / (highest - lowest)) / math.log(0.5)
    rows = highest - (highest - lowest) * np.linspace(1.0, 0.0, FRAME_SIZE) ** power
    noise = np.random.default_rng(detector).standard_normal((FRAME_SIZE,) * 2, dtype=np.float32)
    gain = rows.astype(np.float32)[:, np.newaxis] * (1.0 + np.float32(_GAIN_SCATTER) * noise)
    gain.flags.writeable = False
    return gain
