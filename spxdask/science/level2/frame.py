"""A SPHEREx Level 2 file: four planes, the projection, the wavelength table."""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spxdask.errors import FrameError
from spxdask.science.flags import FLAG_BITS
from spxdask.science.level2.fits import Hdu, Header, locate_rows, map_image, require, scan, walk
from spxdask.science.level2.flags import locate_flags, read_flag_bits, read_flags
from spxdask.science.level2.spans import Span, Spans
from spxdask.science.level2.wavelength import WavelengthTable, read_wavelength_table
from spxdask.science.level2.wcs import TanSip
from spxdask.science.sphere import angular_distance

__all__ = ["Frame", "list_spans", "map_file", "open_frame", "open_head"]

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
    held : Spans or None
        Which bytes of the content are there; None for all.
    """

    content: memoryview
    hdu: Hdu
    held: Spans | None = None


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
    rows : (ny,) bool array or None
        Which rows of the four planes may be used, of a frame that was read in parts; the others
        hold anything, also where their bytes happen to be there. None if all may be.
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
    rows: np.ndarray | None = None

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


def open_frame(
    source: str | os.PathLike | memoryview,
    filename: str | None = None,
    *,
    held: Spans | None = None,
    rows: np.ndarray | None = None,
) -> Frame:
    """Open a Level 2 file of any release.

    Parameters
    ----------
    source : path or memoryview
        A local file, or its content, in the QR2 layout (flags as plain integers) or the QR3
        layout (flags compressed). Extensions are found by name.
    filename : str, optional
        The archive's own name of the file; default: that of the path.
    held : Spans, optional
        Which bytes of the content are there, if not all. It may grow while the frame is in use.
    rows : (ny,) bool array, optional
        Which rows of the planes are wanted, if not all.

    Returns
    -------
    Frame
        Its planes are not copied: they refer to the mapped file or the memory given, and
        nothing is read before it is used.

    Raises
    ------
    FrameError
        If the file is not a readable Level 2 frame; the message describes the reason.
    MissingBytesError
        If bytes that these rows need are not held; it has all that are known to be missing.
    OSError
        If the file cannot be opened.
    """
    if isinstance(source, memoryview):
        buffer = source.toreadonly()
    else:
        filename = filename or Path(source).name
        buffer = map_file(source)
    hdus = _find_extensions(buffer, held)
    header = hdus["IMAGE"].header
    values = _read_values(header)

    image = map_image(buffer, hdus["IMAGE"], -32, ">f4")
    ny, nx = image.shape
    if rows is not None and rows.shape != (ny,):
        raise FrameError(f"IMAGE has {ny} rows, and not {rows.shape}")
    planes = {name: map_image(buffer, hdus[name], -32, ">f4") for name in ("VARIANCE", "ZODI")}
    if held is not None:
        require(held, list_spans(hdus, np.ones(ny, bool) if rows is None else rows))
    planes["FLAGS"] = read_flags(buffer, hdus["FLAGS"], (ny, nx), held, rows)
    for name, plane in planes.items():
        if plane.shape != image.shape:
            raise FrameError(f"{name} is {plane.shape} pixels, IMAGE is {image.shape}")

    frame = Frame(
        filename=filename or "",
        image=image,
        variance=planes["VARIANCE"],
        zodi=planes["ZODI"],
        flags=planes["FLAGS"],
        wavelengths=read_wavelength_table(buffer, hdus["WCS-WAVE"]),
        psf=_find_psf(buffer, hdus, held),
        flag_bits=read_flag_bits(hdus["FLAGS"].header),
        file_bytes=len(buffer),
        rows=rows,
        **values,
    )
    _check_place(frame)
    return frame


def open_head(content: memoryview, filename: str, *, held: Spans | None = None) -> Frame:
    """Read what the header of IMAGE says: what a frame is, and where it is on the sky.

    Parameters
    ----------
    content : memoryview
        As long as the file.
    filename : str
        The archive's own name of it.
    held : Spans, optional
        Which bytes of the content are there, if not all.

    Returns
    -------
    Frame
        Without pixels and wavelengths: none of its `rows` may be used, and its wavelengths are
        NaN. All that headers of other extensions say has its default.

    Raises
    ------
    FrameError
        If this header is not that of a Level 2 frame.
    MissingBytesError
        If bytes of the headers up to that of IMAGE are not held.
    """
    hdu = next((hdu for hdu in walk(content, held) if hdu.name == "IMAGE"), None)
    if hdu is None:
        raise FrameError("no extension named IMAGE")
    shape = map_image(content, hdu, -32, ">f4").shape
    nothing = np.broadcast_to(np.array(np.nan, ">f4"), shape)
    lattice = np.array([0.0, 1.0])
    frame = Frame(
        filename=filename,
        image=nothing,
        variance=nothing,
        zodi=nothing,
        flags=np.broadcast_to(np.array(-1, ">i4"), shape),
        wavelengths=WavelengthTable(x=lattice, y=lattice, values=np.full((2, 2, 2), np.nan)),
        file_bytes=len(content),
        rows=np.zeros(shape[0], bool),
        **_read_values(hdu.header),
    )
    _check_place(frame)
    return frame


def list_spans(hdus: dict[str, Hdu], rows: np.ndarray) -> list[Span]:
    """Return where the bytes are, headers apart, that a frame of some rows is opened with.

    Parameters
    ----------
    hdus : dict of str to Hdu
        The extensions by name; all that a frame must have.
    rows : (ny,) bool array
        Rows of the planes.

    Returns
    -------
    list of (int, int)
        They are not sorted. Tiles of compressed flags are not among them, as the table that is
        says where they are.

    Raises
    ------
    FrameError
        If an extension cannot be read.
    """
    table = hdus["WCS-WAVE"]
    spans = [(table.data_start, table.data_start + table.data_size)]
    spans += locate_flags(hdus["FLAGS"], rows)
    for name in ("IMAGE", "VARIANCE", "ZODI"):
        spans += locate_rows(hdus[name], rows)
    return spans


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


def _read_values(header: Header) -> dict[str, Any]:
    """Return the attributes of a frame that the header of IMAGE has."""
    _check_unit(header)
    return {
        "band": _read_band(header),
        "obs_id": _read_obs_id(header),
        "mjd": _read_mjd(header),
        "origin": _read_origin(header),
        "wcs": TanSip.from_header(header),
        "psf_fwhm": _read_psf_fwhm(header),
        "observer_km": _read_observer(header),
        "warnings": _list_warnings(header),
    }


def _check_place(frame: Frame) -> None:
    if not np.isfinite(frame.bounding_circle).all():
        raise FrameError("no usable celestial WCS: the frame is nowhere on the sky")


def _find_extensions(buffer: memoryview, held: Spans | None) -> dict[str, Hdu]:
    """Return the extensions by name, the first of each; all that are needed are there."""
    hdus: dict[str, Hdu] = {}
    for hdu in scan(buffer, held):
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


def _find_psf(buffer: memoryview, hdus: dict[str, Hdu], held: Spans | None) -> PsfExtension | None:
    for name in ("EPSF", "PSF"):
        if name in hdus:
            return PsfExtension(buffer, hdus[name], held)
    return None


def _list_warnings(header: Header) -> tuple[str, ...]:
    warnings = []
    if header.get("FINAST", 0) != 0:
        warnings.append(f"astrometric solution not good: FINAST is {header['FINAST']!r}")
    if header.get("L2DQAFLG", "Pass") != "Pass":
        warnings.append(f"archive's quality check: L2DQAFLG is {header['L2DQAFLG']!r}")
    return tuple(warnings)
