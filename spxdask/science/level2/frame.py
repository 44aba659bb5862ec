"""Reading a SPHEREx Level 2 file: four planes, the projection, the wavelength table."""

from __future__ import annotations

import io
import mmap
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from spxdask.errors import FrameError
from spxdask.science.flags import FLAG_BITS
from spxdask.science.level2.fits import Hdu, Header, scan
from spxdask.science.level2.rice import decompress, is_row_compressed
from spxdask.science.level2.wcs import TanSip

NEEDED = ("IMAGE", "FLAGS", "VARIANCE", "ZODI", "WCS-WAVE")
# Outside of these, a header says nothing: the PSF is 5 to 6 arcsec wide.
USABLE_FWHM_ARCSEC = (1.0, 60.0)
LAST_MJD = 1e6
LARGEST_ORIGIN = 1e5


@dataclass(frozen=True, kw_only=True)
class WavelengthTable:
    """The WCS-WAVE lattice of a frame.

    Attributes
    ----------
    x : (nx,) float array
        Control points, 1-based pixels of the full frame, increasing.
    y : (ny,) float array
        The same along y.
    values : (ny, nx, 2) float array
        Wavelength and bandwidth, um.
    """

    x: np.ndarray
    y: np.ndarray
    values: np.ndarray

    def at(self, x, y) -> tuple[np.ndarray, np.ndarray]:
        """Return wavelength and bandwidth (um) at 1-based full-frame pixels, bilinear.

        This is what the WAVE-TAB alternate WCS says (FITS Paper III, section 6) with the
        SIP terms, which do not belong to it, left out.
        """
        i, fx = _cell(self.x, x)
        j, fy = _cell(self.y, y)
        fx, fy = fx[:, None], fy[:, None]
        below = (1 - fx) * self.values[j, i] + fx * self.values[j, i + 1]
        above = (1 - fx) * self.values[j + 1, i] + fx * self.values[j + 1, i + 1]
        wavelength, bandwidth = ((1 - fy) * below + fy * above).T
        return wavelength, bandwidth


def _cell(points: np.ndarray, position) -> tuple[np.ndarray, np.ndarray]:
    """Index of the lattice cell of each position and the fraction of the way through it."""
    index = np.clip(np.searchsorted(points, position, side="right") - 1, 0, len(points) - 2)
    return index, (position - points[index]) / (points[index + 1] - points[index])


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
        Full-frame 0-based pixel of this file's pixel (0, 0); zero but for cut-outs.
    psf_fwhm : float or None
        Median PSF FWHM, arcsec.
    flag_bits : dict of str to int
        Bit of each flag, by the header's own names.
    warnings : tuple of str
        What a user should know of the file although it can be measured.
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
    flag_bits: dict[str, int] = field(default_factory=lambda: dict(FLAG_BITS))
    warnings: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, (ny, nx)."""
        return self.image.shape

    def wavelength_at(self, x, y) -> tuple[np.ndarray, np.ndarray]:
        """Return wavelength and bandwidth (um) at 0-based pixels of this file."""
        return self.wavelengths.at(x + self.origin[0] + 1.0, y + self.origin[1] + 1.0)

    @cached_property
    def cap(self) -> tuple[float, float, float]:
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


def angular_distance(ra1, dec1, ra2, dec2) -> np.ndarray:
    """Great-circle distance in deg of positions in deg, by the haversine formula."""
    ra1, dec1, ra2, dec2 = (np.deg2rad(a) for a in (ra1, dec1, ra2, dec2))
    chord = (
        np.sin((dec2 - dec1) / 2) ** 2 + np.cos(dec1) * np.cos(dec2) * np.sin((ra2 - ra1) / 2) ** 2
    )
    return np.rad2deg(2 * np.arcsin(np.sqrt(np.clip(chord, 0, 1))))


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
        Its planes lie where they are, in the mapped file or the memory given: nothing is
        read before it is used.

    Raises
    ------
    FrameError
        If the file is not a readable Level 2 frame; the message says what is wrong.
    OSError
        If the file cannot be opened.
    """
    if isinstance(source, memoryview):
        mapped = source.toreadonly()
    else:
        filename = filename or Path(source).name
        mapped = _map(source)
    hdus: dict[str, Hdu] = {}
    for hdu in scan(mapped):
        hdus.setdefault(hdu.name, hdu)
    missing = [name for name in NEEDED if name not in hdus]
    if missing:
        raise FrameError(f"no extension named {', '.join(missing)}")

    header = hdus["IMAGE"].header
    unit = str(header.get("BUNIT", "")).replace(" ", "")
    if unit != "MJy/sr":
        raise FrameError(f"BUNIT of IMAGE is {header.get('BUNIT')!r}, 'MJy / sr' is needed")
    detector = header.integer("DETECTOR")
    if not 1 <= detector <= 6:
        raise FrameError(f"DETECTOR is {detector}, 1 to 6 is allowed")
    obs_id = header.get("OBSID")
    if not isinstance(obs_id, str) or not obs_id or not obs_id.isprintable():
        raise FrameError(f"OBSID is {obs_id!r}, a name is needed")
    warnings = []
    fwhm = header.get("PSF_FWHM")
    low, high = USABLE_FWHM_ARCSEC
    if isinstance(fwhm, bool) or not isinstance(fwhm, int | float) or not low <= fwhm <= high:
        fwhm = None
    mjd = (header.number("MJD-BEG") + header.number("MJD-END")) / 2
    if not 0 <= mjd <= LAST_MJD:
        raise FrameError(f"MJD-BEG and MJD-END give the time {mjd}, which is no MJD")
    origin = (1.0 - header.number("CRPIX1A", 1.0), 1.0 - header.number("CRPIX2A", 1.0))
    if not max(map(abs, origin)) <= LARGEST_ORIGIN:
        raise FrameError(f"CRPIX1A and CRPIX2A put the cut-out at {origin}")
    if header.get("FINAST", 0) != 0:
        warnings.append(f"astrometric solution not good: FINAST is {header['FINAST']!r}")
    if header.get("L2DQAFLG", "Pass") != "Pass":
        warnings.append(f"archive's quality check: L2DQAFLG is {header['L2DQAFLG']!r}")

    image = _plane(mapped, hdus["IMAGE"], -32, ">f4")
    flags_hdu = hdus["FLAGS"]
    if is_row_compressed(flags_hdu):
        _check_compressed(flags_hdu.header, image.shape)
        flags = decompress(mapped, flags_hdu)
    elif flags_hdu.header.get("ZIMAGE") is True:
        _check_compressed(flags_hdu.header, image.shape)
        flags = _compressed_flags(mapped)
    else:
        flags = _plane(mapped, flags_hdu, 32, ">i4")
    planes = {
        "FLAGS": flags,
        "VARIANCE": _plane(mapped, hdus["VARIANCE"], -32, ">f4"),
        "ZODI": _plane(mapped, hdus["ZODI"], -32, ">f4"),
    }
    for name, plane in planes.items():
        if plane.shape != image.shape:
            raise FrameError(f"{name} is {plane.shape} pixels, IMAGE is {image.shape}")

    frame = Frame(
        filename=filename,
        obs_id=obs_id,
        band=f"D{detector}",
        mjd=mjd,
        image=image,
        variance=planes["VARIANCE"],
        zodi=planes["ZODI"],
        flags=flags,
        wcs=TanSip.from_header(header),
        wavelengths=_wavelength_table(mapped, hdus["WCS-WAVE"]),
        origin=origin,
        psf_fwhm=None if fwhm is None else float(fwhm),
        flag_bits=_flag_bits(flags_hdu.header),
        warnings=tuple(warnings),
    )
    if not np.isfinite(frame.cap).all():
        raise FrameError("no usable celestial WCS: the frame is nowhere on the sky")
    return frame


def _map(path: str | os.PathLike) -> memoryview:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise FrameError("the file is empty")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _plane(mapped: memoryview, hdu: Hdu, bitpix: int, dtype: str) -> np.ndarray:
    """Map a two-dimensional image where it lies in the file."""
    header = hdu.header
    if header.get("XTENSION", "IMAGE") != "IMAGE":
        raise FrameError(f"{hdu.name} is a {header['XTENSION']!r} extension, 'IMAGE' is needed")
    if header.get("NAXIS") != 2 or header.get("BITPIX") != bitpix:
        raise FrameError(
            f"{hdu.name} has NAXIS {header.get('NAXIS')} and BITPIX {header.get('BITPIX')}, "
            f"2 and {bitpix} are needed"
        )
    if header.number("BZERO", 0.0) != 0 or header.number("BSCALE", 1.0) != 1:
        raise FrameError(f"{hdu.name} is scaled by BZERO and BSCALE, which Level 2 files do not do")
    shape = header.integer("NAXIS2"), header.integer("NAXIS1")
    if min(shape) < 2:
        raise FrameError(f"{hdu.name} is only {shape} pixels")
    return np.frombuffer(mapped, dtype, shape[0] * shape[1], hdu.data_start).reshape(shape)


def _check_compressed(header: Header, shape: tuple[int, int]) -> None:
    """Refuse what a decoder would trust: sizes, and numbers that it does not look at."""
    found = header.get("ZNAXIS2"), header.get("ZNAXIS1")
    if found != shape:
        raise FrameError(f"FLAGS is {found} pixels, IMAGE is {shape}")
    tile = header.get("ZTILE1", shape[1]), header.get("ZTILE2", 1)
    # All that a decoder may take for its parameters, in whatever case and however often.
    parameters = [
        (str(header[name]).upper(), header.get(f"ZVAL{name[5:]}"))
        for name in header
        if name.upper().startswith("ZNAME")
    ]
    sound = (
        header.get("XTENSION") == "BINTABLE"
        and header.get("ZCMPTYPE") in ("RICE_1", "GZIP_1", "GZIP_2")
        and (header.get("ZNAXIS"), header.get("ZBITPIX")) == (2, 32)
        and header.get("TFIELDS") in (1, 2, 3, 4)
        and all(isinstance(length, int) for length in tile)
        and 1 <= tile[0] <= shape[1]
        and 1 <= tile[1] <= shape[0]
        and all(value in (16, 32) for name, value in parameters if name == "BLOCKSIZE")
        and all(value in (1, 2, 4) for name, value in parameters if name == "BYTEPIX")
    )
    if not sound:
        raise FrameError("FLAGS cannot be decompressed: not compressed integers of a known kind")


def _compressed_flags(mapped: memoryview) -> np.ndarray:
    """Read flags that are compressed in another way than QR3's, which is possible."""
    from astropy.io import fits  # slow to import, and hardly ever needed

    try:
        with fits.open(io.BytesIO(mapped)) as hdus:
            flags = hdus["FLAGS"].data
    except Exception as error:
        # The decoder has errors of its own, derived from Exception and from nothing nearer.
        reason = " ".join(str(error).split())
        raise FrameError(f"FLAGS cannot be decompressed: {reason}") from error
    if flags is None or flags.ndim != 2 or flags.dtype.kind != "i":
        raise FrameError("FLAGS cannot be decompressed: not a two-dimensional integer image")
    return flags.astype(">i4")


def _wavelength_table(mapped: memoryview, hdu: Hdu) -> WavelengthTable:
    """Read the one row of WCS-WAVE: control points X and Y, VALUES (2, nx, ny)."""
    header = hdu.header
    types = {"J": ">i4", "I": ">i2", "K": ">i8", "E": ">f4", "D": ">f8"}
    columns: dict[str, np.ndarray] = {}
    offset = hdu.data_start
    if header.get("XTENSION") != "BINTABLE" or header.get("NAXIS2") != 1:
        raise FrameError(f"WCS-WAVE has {header.get('NAXIS2')} rows, a table of one is needed")
    for number in range(1, header.integer("TFIELDS") + 1):
        form = str(header.get(f"TFORM{number}", "")).strip()
        if form[-1:] not in types or not (form[:-1] or "1").isdecimal():
            raise FrameError(f"WCS-WAVE column {number} has the unreadable form {form!r}")
        count, dtype = int(form[:-1] or 1), np.dtype(types[form[-1]])
        if offset + count * dtype.itemsize > hdu.data_start + hdu.data_size:
            raise FrameError(f"WCS-WAVE column {number} reaches beyond its row")
        if header.get(f"TSCAL{number}", 1) != 1 or header.get(f"TZERO{number}", 0) != 0:
            raise FrameError(f"WCS-WAVE column {number} is scaled by TSCAL and TZERO")
        name = str(header.get(f"TTYPE{number}", "")).strip().upper()
        columns[name] = np.frombuffer(mapped, dtype, count, offset).astype(float)
        offset += count * dtype.itemsize
    missing = [name for name in ("X", "Y", "VALUES") if name not in columns]
    if missing:
        raise FrameError(f"WCS-WAVE has no column {', '.join(missing)}")
    x, y, values = columns["X"], columns["Y"], columns["VALUES"]
    if len(x) < 2 or len(y) < 2 or len(values) != 2 * len(x) * len(y):
        raise FrameError(
            f"WCS-WAVE has {len(x)} x {len(y)} control points and {len(values)} values"
        )
    values = values.reshape(len(y), len(x), 2)
    finite = all(np.isfinite(column).all() for column in (x, y, values))
    if not finite or not (np.diff(x) > 0).all() or not (np.diff(y) > 0).all():
        raise FrameError("WCS-WAVE has control points out of order or values that are not finite")
    if not (values > 0).all():
        raise FrameError("WCS-WAVE has wavelengths or bandwidths that are not positive")
    return WavelengthTable(x=x, y=y, values=values)


def _flag_bits(header: Header) -> dict[str, int]:
    """Bit of each flag: `MP_<NAME> = bit` in QR2, `MSKN<bit> = '<NAME>'` in QR3."""
    bits = {}
    for keyword in header:
        if keyword.startswith("MP_"):
            bits[keyword[3:]] = header.integer(keyword)
        elif keyword.startswith("MSKN") and keyword[4:].isdecimal():
            bits[str(header[keyword])] = int(keyword[4:])
    wrong = {name: bit for name, bit in bits.items() if not 0 <= bit <= 31}
    if wrong:
        raise FrameError(f"FLAGS header gives bits outside 0 to 31: {wrong}")
    return FLAG_BITS | bits
