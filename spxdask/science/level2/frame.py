"""A SPHEREx Level 2 file: four planes, the projection, the wavelength table."""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from spxdask.errors import FrameError
from spxdask.science.flags import FLAG_BITS
from spxdask.science.level2.fits import Hdu, Header, map_image, scan
from spxdask.science.level2.flags import read_flag_bits, read_flags
from spxdask.science.level2.wavelength import WavelengthTable, read_wavelength_table
from spxdask.science.level2.wcs import TanSip
from spxdask.science.sphere import angular_distance

__all__ = ["Frame", "map_file", "open_frame"]

NEEDED = ("IMAGE", "FLAGS", "VARIANCE", "ZODI", "WCS-WAVE")
# The PSF is 5 to 6 arcsec wide; a width outside of these limits is an error in the header.
USABLE_FWHM_ARCSEC = (1.0, 60.0)
# Times, in days, and offsets of a cut-out, in pixels, beyond these are errors in the header.
LAST_MJD = 1e6
LARGEST_ORIGIN = 1e5
# The spacecraft is 7,000 km from the Earth's centre; a position beyond this is an error.
FARTHEST_OBSERVER_KM = 1e5


@dataclass(frozen=True, slots=True)
class PsfExtension:
    """An extension with a PSF, not yet read.

    Attributes
    ----------
    content : memoryview
        The whole file.
    hdu : Hdu
        ``EPSF``, a table, or ``PSF``, a cube.
    """

    content: memoryview
    hdu: Hdu


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One Level 2 file, its planes mapped from disk and still big-endian.

    Attributes
    ----------
    filename : str
        The archive's own file name.
    obs_id, band : str
        Such as ``2025W51_1A_0684_2`` and ``D3``.
    mjd : float
        Middle of the exposure, days: (MJD-BEG + MJD-END) / 2.
    image, variance, zodi : (ny, nx) big-endian float32 array
        MJy/sr, (MJy/sr)^2, MJy/sr.
    flags : (ny, nx) big-endian int32 array
        Flag bits.
    wcs : TanSip
        Celestial projection.
    wavelengths : WavelengthTable
        Wavelength over the full frame.
    origin : (float, float)
        Full-frame 0-based pixel of this file's pixel (0, 0); zero except for cut-outs.
    psf_fwhm : float or None
        Median PSF FWHM, arcsec.
    observer_km : tuple of float or None
        Position of the spacecraft from the Earth's centre, equatorial axes, km.
    psf : PsfExtension or None
        The extension with the PSF of the frame, if it has one.
    flag_bits : dict of str to int
        Bit of each flag, by the header's own names.
    warnings : tuple of str
        What a user should know of the file although it can be measured.
    file_bytes : int
        Length of the file.
    checksum : str or None
        Hash of the file's content, where it is known.
    """

    filename: str
    obs_id: str
    band: str
    mjd: float
    image: np.ndarray
    variance: np.ndarray
    zodi: np.ndarray
    flags: np.ndarray
    wcs: TanSip
    wavelengths: WavelengthTable
    origin: tuple[float, float] = (0.0, 0.0)
    psf_fwhm: float | None = None
    observer_km: tuple[float, float, float] | None = None
    psf: PsfExtension | None = None
    flag_bits: dict[str, int] = field(default_factory=lambda: dict(FLAG_BITS))
    warnings: tuple[str, ...] = ()
    file_bytes: int = 0
    checksum: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, (ny, nx)."""
        ny, nx = self.image.shape
        return ny, nx

    @cached_property
    def pixel_scale(self) -> float:
        """Width of the pixel at the centre, arcsec: the root of its solid angle."""
        ny, nx = self.shape
        return math.sqrt(float(self.wcs.solid_angle_at((nx - 1) / 2, (ny - 1) / 2)))

    def wavelength_at(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Interpolate wavelength and bandwidth.

        Parameters
        ----------
        x, y : (n,) float array
            0-based pixels of this file.

        Returns
        -------
        wavelength, bandwidth : (n,) float array
            In um.
        """
        return self.wavelengths.at(x + self.origin[0] + 1.0, y + self.origin[1] + 1.0)

    @cached_property
    def bounding_circle(self) -> tuple[float, float, float]:
        """Centre (ra, dec) and radius of the smallest circle about it that holds the frame, deg."""
        ny, nx = self.shape
        left, right, low, high = -0.5, nx - 0.5, -0.5, ny - 0.5
        x = np.array(
            [(nx - 1) / 2, left, right, left, right, left, right, (nx - 1) / 2, (nx - 1) / 2]
        )
        y = np.array([(ny - 1) / 2, low, low, high, high, (ny - 1) / 2, (ny - 1) / 2, low, high])
        ra, dec = self.wcs.pixel_to_sky(x, y)
        farthest = angular_distance(ra[0], dec[0], ra[1:], dec[1:]).max()
        # The edges bulge by far less than this beyond the corners.
        return float(ra[0]), float(dec[0]), float(farthest) * 1.001


def open_frame(source: str | os.PathLike | memoryview, filename: str | None = None) -> Frame:
    """Open a Level 2 file of any release.

    Parameters
    ----------
    source : path or memoryview
        A local file, or its content, in the QR2 layout (flags as plain integers) or the QR3
        layout (flags compressed). Extensions are found by name.
    filename : str, optional
        The archive's own name of the file; default: that of the path.

    Returns
    -------
    Frame
        Its planes are not copied: they refer to the mapped file or the memory given, and
        nothing is read before it is used.

    Raises
    ------
    FrameError
        If the file is not a readable Level 2 frame; the message describes the reason.
    OSError
        If the file cannot be opened.
    """
    if isinstance(source, memoryview):
        buffer = source.toreadonly()
    else:
        filename = filename or Path(source).name
        buffer = map_file(source)
    hdus = _find_extensions(buffer)
    header = hdus["IMAGE"].header
    _check_unit(header)
    band, obs_id = _read_band(header), _read_obs_id(header)
    mjd, origin = _read_mjd(header), _read_origin(header)

    image = map_image(buffer, hdus["IMAGE"], -32, ">f4")
    ny, nx = image.shape
    planes = {
        "FLAGS": read_flags(buffer, hdus["FLAGS"], (ny, nx)),
        "VARIANCE": map_image(buffer, hdus["VARIANCE"], -32, ">f4"),
        "ZODI": map_image(buffer, hdus["ZODI"], -32, ">f4"),
    }
    for name, plane in planes.items():
        if plane.shape != image.shape:
            raise FrameError(f"{name} is {plane.shape} pixels, IMAGE is {image.shape}")

    frame = Frame(
        filename=filename or "",
        obs_id=obs_id,
        band=band,
        mjd=mjd,
        image=image,
        variance=planes["VARIANCE"],
        zodi=planes["ZODI"],
        flags=planes["FLAGS"],
        wcs=TanSip.from_header(header),
        wavelengths=read_wavelength_table(buffer, hdus["WCS-WAVE"]),
        origin=origin,
        psf_fwhm=_read_psf_fwhm(header),
        observer_km=_read_observer(header),
        psf=_find_psf(buffer, hdus),
        flag_bits=read_flag_bits(hdus["FLAGS"].header),
        warnings=_list_warnings(header),
        file_bytes=len(buffer),
    )
    if not np.isfinite(frame.bounding_circle).all():
        raise FrameError("no usable celestial WCS: the frame is nowhere on the sky")
    return frame


def map_file(path: str | os.PathLike) -> memoryview:
    """Map a file into memory.

    Parameters
    ----------
    path : path
        A local file.

    Returns
    -------
    memoryview
        Its content; nothing is read before it is used.

    Raises
    ------
    FrameError
        If it is empty.
    OSError
        If it cannot be opened.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise FrameError("the file is empty")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _find_extensions(buffer: memoryview) -> dict[str, Hdu]:
    """Return the extensions by name, the first of each; all that are needed are there."""
    hdus: dict[str, Hdu] = {}
    for hdu in scan(buffer):
        hdus.setdefault(hdu.name, hdu)
    missing = [name for name in NEEDED if name not in hdus]
    if missing:
        raise FrameError(f"no extension named {', '.join(missing)}")
    return hdus


def _check_unit(header: Header) -> None:
    if str(header.get("BUNIT", "")).replace(" ", "") != "MJy/sr":
        raise FrameError(f"BUNIT of IMAGE must be 'MJy / sr', got {header.get('BUNIT')!r}")


def _read_band(header: Header) -> str:
    detector = header.integer("DETECTOR")
    if not 1 <= detector <= 6:
        raise FrameError(f"DETECTOR must be 1 to 6, got {detector}")
    return f"D{detector}"


def _read_obs_id(header: Header) -> str:
    obs_id = header.get("OBSID")
    if not isinstance(obs_id, str) or not obs_id or not obs_id.isprintable():
        raise FrameError(f"OBSID must be a name, got {obs_id!r}")
    return obs_id


def _read_mjd(header: Header) -> float:
    mjd = (header.number("MJD-BEG") + header.number("MJD-END")) / 2
    if not 0 <= mjd <= LAST_MJD:
        raise FrameError(f"MJD-BEG and MJD-END give the time {mjd}, which is no MJD")
    return mjd


def _read_origin(header: Header) -> tuple[float, float]:
    """Return the full-frame 0-based pixel of the first pixel."""
    origin = (1.0 - header.number("CRPIX1A", 1.0), 1.0 - header.number("CRPIX2A", 1.0))
    if not max(map(abs, origin)) <= LARGEST_ORIGIN:
        raise FrameError(f"CRPIX1A and CRPIX2A put the cut-out at {origin}")
    return origin


def _read_psf_fwhm(header: Header) -> float | None:
    """Return the width of the PSF in arcsec, None where the header has no usable one."""
    fwhm = header.get("PSF_FWHM")
    low, high = USABLE_FWHM_ARCSEC
    if isinstance(fwhm, bool) or not isinstance(fwhm, int | float) or not low <= fwhm <= high:
        return None
    return float(fwhm)


def _read_observer(header: Header) -> tuple[float, float, float] | None:
    """Return the position of the spacecraft, None where the header has no usable one."""
    values = [header.get(f"{axis}_SC") for axis in "XYZ"]
    found = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(found) < 3 or not math.hypot(*found) <= FARTHEST_OBSERVER_KM:
        return None
    return found[0], found[1], found[2]


def _find_psf(buffer: memoryview, hdus: dict[str, Hdu]) -> PsfExtension | None:
    for name in ("EPSF", "PSF"):
        if name in hdus:
            return PsfExtension(buffer, hdus[name])
    return None


def _list_warnings(header: Header) -> tuple[str, ...]:
    warnings = []
    if header.get("FINAST", 0) != 0:
        warnings.append(f"astrometric solution not good: FINAST is {header['FINAST']!r}")
    if header.get("L2DQAFLG", "Pass") != "Pass":
        warnings.append(f"archive's quality check: L2DQAFLG is {header['L2DQAFLG']!r}")
    return tuple(warnings)
