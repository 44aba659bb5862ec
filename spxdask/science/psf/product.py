"""PSF models from extensions of FITS files: of products, and of the frames themselves."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from spxdask.errors import FrameError
from spxdask.science.level2.fits import Hdu, require
from spxdask.science.level2.frame import PsfExtension
from spxdask.science.level2.spans import Spans
from spxdask.science.psf.cube import arrange_cube_zones, make_cube_model, read_centres
from spxdask.science.psf.epsf import make_epsf_model
from spxdask.science.psf.model import PsfModel

__all__ = ["read_cube", "read_epsf", "read_frame_psf"]


def read_frame_psf(
    extension: PsfExtension, at: tuple[ArrayLike, ArrayLike], *, is_bilinear: bool
) -> PsfModel:
    """Read the PSF that a frame has.

    Parameters
    ----------
    extension : PsfExtension
        Of the frame.
    at : ((n,) float array, (n,) float array)
        Positions of the sources (x, y), 0-based pixels of the full frame.
    is_bilinear : bool
        Whether the PSF is interpolated between four zones.

    Returns
    -------
    PsfModel
        Of use for these sources.

    Raises
    ------
    FrameError
        If the extension has no PSF that could be used.
    MissingBytesError
        If what these sources need of it is not held.
    """
    content, hdu, held = extension.content, extension.hdu, extension.held
    if hdu.name == "EPSF":
        require(held, [(hdu.data_start, hdu.data_start + hdu.data_size)])
        return read_epsf(content, hdu, at=at, is_bilinear=is_bilinear)
    return read_cube(content, hdu, at=at, is_bilinear=is_bilinear, held=held)


def read_epsf(
    content: memoryview,
    hdu: Hdu,
    *,
    at: tuple[ArrayLike, ArrayLike] | None = None,
    is_bilinear: bool = False,
) -> PsfModel:
    """Read an effective PSF from a table with a row for each zone.

    Parameters
    ----------
    content : memoryview
        The whole file.
    hdu : Hdu
        The extension EPSF.
    at : ((n,) float array, (n,) float array), optional
        Positions of the sources (x, y), 0-based pixels of the full frame; only their zones are
        of use.
    is_bilinear : bool
        Whether the PSF is interpolated between four zones.

    Returns
    -------
    PsfModel

    Raises
    ------
    FrameError
        If it is no such table.
    """
    rows = _read_table(content, hdu)
    try:
        x, y, samples = (rows[name] for name in ("XCENTER", "YCENTER", "EPSF"))
        oversampling = hdu.header.integer("OVSMPX", 5)
        return make_epsf_model(
            x, y, samples, oversampling=oversampling, at=at, is_bilinear=is_bilinear
        )
    except ValueError as error:
        raise FrameError(f"the table EPSF is not one of a PSF: {error}") from error


def read_cube(
    content: memoryview,
    hdu: Hdu,
    *,
    at: tuple[ArrayLike, ArrayLike] | None = None,
    is_bilinear: bool = False,
    held: Spans | None = None,
) -> PsfModel:
    """Read an optical PSF from a cube with a plane for each zone.

    Parameters
    ----------
    content : memoryview
        The whole file.
    hdu : Hdu
        The extension PSF.
    at : ((n,) float array, (n,) float array), optional
        Positions of the sources (x, y), 0-based pixels of the full frame; only their zones are
        read.
    is_bilinear : bool
        Whether the PSF is interpolated between four zones.
    held : Spans, optional
        Which bytes of the content are there, if not all.

    Returns
    -------
    PsfModel

    Raises
    ------
    FrameError
        If it is no such cube.
    MissingBytesError
        If planes of the zones are not held.
    """
    header = hdu.header
    shape = tuple(header.integer(f"NAXIS{axis}", 0) for axis in (3, 2, 1))
    if header.get("NAXIS") != 3 or header.get("BITPIX") != -32 or min(shape) < 1:
        raise FrameError(f"PSF must be a cube of 32-bit floats, got {shape}")
    samples = np.frombuffer(content, ">f4", int(np.prod(shape)), hdu.data_start).reshape(shape)
    width = 4 * shape[1] * shape[2]

    def require_planes(needed: np.ndarray) -> None:
        starts = (hdu.data_start + needed * width).tolist()
        require(held, ((start, start + width) for start in starts))

    try:
        return make_cube_model(
            arrange_cube_zones(*read_centres(header, shape[0])),
            samples,
            oversampling=header.integer("OVERSAMP", 10),
            at=at,
            is_bilinear=is_bilinear,
            require_planes=require_planes,
        )
    except ValueError as error:
        raise FrameError(f"the cube PSF is not one of a PSF: {error}") from error


def _read_table(content: memoryview, hdu: Hdu) -> np.ndarray:
    """Read a binary table of numbers as a structured array, names in upper case."""
    header = hdu.header
    if header.get("XTENSION") != "BINTABLE":
        raise FrameError(f"{hdu.name} must be a binary table")
    types = {"B": "u1", "I": ">i2", "J": ">i4", "K": ">i8", "E": ">f4", "D": ">f8", "L": "i1"}
    fields = []
    for number in range(1, header.integer("TFIELDS") + 1):
        name, form = header.get(f"TTYPE{number}"), str(header.get(f"TFORM{number}", "")).strip()
        count, code = form[:-1] or "1", form[-1:]
        if code not in types or not count.isdecimal() or not isinstance(name, str):
            raise FrameError(f"column {number} of {hdu.name} has the form {form!r}")
        fields.append((name.strip().upper(), types[code], (int(count),) if count != "1" else ()))
    dtype = np.dtype(fields)
    n, width = header.integer("NAXIS2"), header.integer("NAXIS1")
    if dtype.itemsize != width or not 0 < n * width <= hdu.data_size:
        raise FrameError(f"{hdu.name} has rows of {width} bytes, its columns {dtype.itemsize}")
    return np.frombuffer(content, dtype, n, hdu.data_start)
