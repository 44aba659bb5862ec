"""Calibration products: their content, what makes one unusable, and their values at a position.

All products are on the pixels of the full detector.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spxdask.errors import FrameError
from spxdask.science.families import EPSF, FLUX_CORRECTION, SOLID_ANGLE, SPECTRAL_WCS
from spxdask.science.level2.fits import Hdu, Header, map_image, scan, verify
from spxdask.science.maps import USABLE_FACTORS, interpolate_map, repair_factors
from spxdask.science.psf.model import PsfModel
from spxdask.science.psf.product import read_epsf

__all__ = [
    "NO_CALIBRATION",
    "DetectorCalibration",
    "check_product",
    "open_products",
]

# Rows and columns of a detector.
DETECTOR_PIXELS = 2040
# Values beyond these limits are no product of this kind, whatever the file is called.
USABLE_SOLID_ANGLE_ARCSEC2 = (30.0, 46.0)
USABLE_WAVELENGTH_UM = {
    "D1": (0.70, 1.15),
    "D2": (1.05, 1.68),
    "D3": (1.58, 2.50),
    "D4": (2.35, 3.95),
    "D5": (3.70, 4.55),
    "D6": (4.30, 5.20),
}
USABLE_BANDWIDTH_UM = (1e-3, 0.5)
# This share of the pixels must have a usable value.
LEAST_USABLE = 0.9
_TYPES = {-32: ">f4", -64: ">f8"}


@dataclass(frozen=True, kw_only=True)
class DetectorCalibration:
    """The products that frames of one detector are measured with; what is None is not used.

    Attributes
    ----------
    solid_angle : (2040, 2040) array or None
        Of each pixel, arcsec^2.
    wavelength, bandwidth : (2040, 2040) array or None
        At the centre of each pixel, um.
    psf : PsfModel or None
        The effective PSF.
    flux_correction : (2040, 2040) array or None
        Factor by which IMAGE is to be multiplied, as it is in the file.
    """

    solid_angle: np.ndarray | None = None
    wavelength: np.ndarray | None = None
    bandwidth: np.ndarray | None = None
    psf: PsfModel | None = None
    flux_correction: np.ndarray | None = None

    @cached_property
    def factors(self) -> np.ndarray | None:
        """The factors with which IMAGE is multiplied, wrong ones replaced."""
        return None if self.flux_correction is None else repair_factors(self.flux_correction)

    def solid_angle_at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray | None:
        """Return the solid angle of the pixels at some positions.

        Parameters
        ----------
        x, y : (n,) float array
            0-based pixels of the full frame.

        Returns
        -------
        (n,) float array or None
            arcsec^2, NaN where the map has no value; None without a map.
        """
        if self.solid_angle is None:
            return None
        low, high = USABLE_SOLID_ANGLE_ARCSEC2
        found = self.solid_angle[_round(y), _round(x)].astype(float)
        return np.where((found >= low) & (found <= high), found, np.nan)

    def wavelength_at(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Return wavelength and bandwidth at some positions, bilinear between pixel centres.

        Parameters
        ----------
        x, y : (n,) float array
            0-based pixels of the full frame.

        Returns
        -------
        wavelength, bandwidth : (n,) float array
            um; None in place of the two without maps.
        """
        if self.wavelength is None or self.bandwidth is None:
            return None
        return interpolate_map(self.wavelength, x, y), interpolate_map(self.bandwidth, x, y)

    def factors_of(self, shape: tuple[int, int], origin: tuple[float, float]) -> np.ndarray | None:
        """Return the factors that put a frame of before QR3 on the flux scale of QR3.

        Parameters
        ----------
        shape : (int, int)
            Rows and columns of the frame.
        origin : (float, float)
            Full-frame 0-based pixel of its pixel (0, 0).

        Returns
        -------
        (ny, nx) float32 array or None
            Read-only; None without a correction.

        Raises
        ------
        FrameError
            If the frame is not a part of the detector.
        """
        factors = self.factors
        if factors is None:
            return None
        (ny, nx), x0, y0 = shape, round(origin[0]), round(origin[1])
        if not (0 <= x0 <= DETECTOR_PIXELS - nx and 0 <= y0 <= DETECTOR_PIXELS - ny):
            raise FrameError("the frame is not a part of the detector, as its origin has it")
        # One compiled form serves frames and parts of them, which are copied.
        part = np.ascontiguousarray(factors[y0 : y0 + ny, x0 : x0 + nx])
        part.flags.writeable = False
        return part


NO_CALIBRATION = DetectorCalibration()


def _round(position: np.ndarray) -> np.ndarray:
    """Return the pixel that a coordinate is in."""
    return np.clip(np.rint(position), 0, DETECTOR_PIXELS - 1).astype(int)


def check_product(family: str, band: str, content: memoryview) -> None:
    """Raise an error unless a file is a usable product.

    Parameters
    ----------
    family : str
        One of `spxdask.science.families.FAMILIES`.
    band : str
        ``D1`` to ``D6``.
    content : memoryview
        The whole file.

    Raises
    ------
    FrameError
        If its sums, extensions, shapes, units or values are not those of such a product.
    """
    verify(content)
    _READERS[family](content.toreadonly(), band)


def open_products(paths: Mapping[str, Path], band: str) -> DetectorCalibration:
    """Map the products of one detector from files.

    Parameters
    ----------
    paths : mapping of str to Path
        Files, by family. They must never change.
    band : str
        ``D1`` to ``D6``.

    Returns
    -------
    DetectorCalibration
        Nothing of the maps is read before it is used.

    Raises
    ------
    FrameError
        If a file is not such a product.
    OSError
        If a file cannot be opened.
    """
    parts: dict[str, Any] = {}
    for family, path in paths.items():
        with open(path, "rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        try:
            parts |= _READERS[family](content, band, is_checked=True)
        except FrameError as error:
            raise FrameError(f"{path}: {error}") from error
    return DetectorCalibration(**parts)


def _read_solid_angle(
    content: memoryview, band: str, *, is_checked: bool = False
) -> dict[str, np.ndarray]:
    found = _find(content, band, "IMAGE")
    plane = _map_plane(content, found["IMAGE"], ("arcsec2", "arcsec**2", "arcsec^2"))
    if not is_checked:
        _check_values(plane, "IMAGE", USABLE_SOLID_ANGLE_ARCSEC2)
    return {"solid_angle": plane}


def _read_spectral_wcs(
    content: memoryview, band: str, *, is_checked: bool = False
) -> dict[str, np.ndarray]:
    found = _find(content, band, "CWAVE", "CBAND")
    units = ("um", "micron", "micrometer")
    wavelength = _map_plane(content, found["CWAVE"], units)
    bandwidth = _map_plane(content, found["CBAND"], units)
    if not is_checked:
        _check_values(wavelength, "CWAVE", USABLE_WAVELENGTH_UM[band])
        _check_values(bandwidth, "CBAND", USABLE_BANDWIDTH_UM)
    return {"wavelength": wavelength, "bandwidth": bandwidth}


def _read_flux_correction(
    content: memoryview, band: str, *, is_checked: bool = False
) -> dict[str, np.ndarray]:
    hdus = _find(content, band).values()
    planes = [hdu for hdu in hdus if hdu.header.get("NAXIS") == 2 and _is_plane(hdu)]
    if not planes:
        raise FrameError("no extension is an image")
    plane = _map_plane(content, planes[0], ())
    if not is_checked:
        _check_values(plane, planes[0].name, USABLE_FACTORS)
    return {"flux_correction": plane}


def _read_epsf(content: memoryview, band: str, *, is_checked: bool = False) -> dict[str, PsfModel]:
    found = _find(content, band, "EPSF")
    return {"psf": read_epsf(content, found["EPSF"])}


_READERS: dict[str, Callable[..., dict[str, Any]]] = {
    SPECTRAL_WCS: _read_spectral_wcs,
    SOLID_ANGLE: _read_solid_angle,
    EPSF: _read_epsf,
    FLUX_CORRECTION: _read_flux_correction,
}


def _find(content: memoryview, band: str, *names: str) -> dict[str, Hdu]:
    """Return the extensions by name; those named are there, and none is of another detector."""
    hdus: dict[str, Hdu] = {}
    for hdu in scan(content):
        hdus.setdefault(hdu.name, hdu)
        detector = hdu.header.get("DETECTOR", band[1:])
        if str(detector) not in (band, band[1:]):
            raise FrameError(f"the product is of detector {detector}, not {band}")
    missing = [name for name in names if name not in hdus]
    if missing:
        raise FrameError(f"no extension named {', '.join(missing)}")
    return hdus


def _is_plane(hdu: Hdu) -> bool:
    return hdu.header.get("XTENSION", "IMAGE") == "IMAGE" and hdu.header.get("BITPIX") in _TYPES


def _map_plane(content: memoryview, hdu: Hdu, units: tuple[str, ...]) -> np.ndarray:
    bitpix = hdu.header.get("BITPIX")
    if bitpix not in _TYPES:
        raise FrameError(f"{hdu.name} must have BITPIX -32 or -64, got {bitpix}")
    plane = map_image(content, hdu, bitpix, _TYPES[bitpix])
    if plane.shape != (DETECTOR_PIXELS, DETECTOR_PIXELS):
        raise FrameError(f"{hdu.name} is {plane.shape} pixels, not those of a detector")
    _check_unit(hdu.header, hdu.name, units)
    return plane


def _check_unit(header: Header, name: str, units: tuple[str, ...]) -> None:
    unit = header.get("BUNIT")
    # A file that states no unit is judged by its values.
    if units and unit is not None and str(unit).replace(" ", "").lower() not in units:
        raise FrameError(f"BUNIT of {name} must be {units[0]}, got {unit!r}")


def _check_values(plane: np.ndarray, name: str, limits: tuple[float, float]) -> None:
    low, high = limits
    with np.errstate(invalid="ignore"):
        usable = float(((plane >= low) & (plane <= high)).mean())
    if usable < LEAST_USABLE:
        raise FrameError(
            f"{name}: {1 - usable:.0%} of the values are not within {low:g} to {high:g}"
        )
