"""The FLAGS extension: its bits by name, and its pixels however they are compressed."""

from __future__ import annotations

import io

import numpy as np

from spxdask.errors import FrameError
from spxdask.science.flags import FLAG_BITS
from spxdask.science.level2.fits import Hdu, Header, locate_rows, map_image, require
from spxdask.science.level2.rice import decompress, is_row_compressed, locate_descriptors
from spxdask.science.level2.spans import Span, Spans

__all__ = ["locate_flags", "read_flag_bits", "read_flags"]


def read_flag_bits(header: Header) -> dict[str, int]:
    """Return the bit of each flag by name.

    Parameters
    ----------
    header : Header
        Of FLAGS, with cards `MP_<NAME> = bit` in QR2, `MSKN<bit> = '<NAME>'` in QR3.

    Returns
    -------
    dict of str to int
        The header's flags, and those of `spxdask.science.flags` that it does not name.

    Raises
    ------
    FrameError
        If a bit is not within 0 to 31.
    """
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


def read_flags(
    buffer: memoryview,
    hdu: Hdu,
    shape: tuple[int, int],
    held: Spans | None = None,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Return the pixels of FLAGS.

    Parameters
    ----------
    buffer : memoryview
        The whole file.
    hdu : Hdu
        Plain integers, as in QR2, or compressed ones, as in QR3.
    shape : (int, int)
        Rows and columns of IMAGE, which a compressed extension must have, too.
    held : Spans, optional
        Which bytes of it are there, if not all.
    rows : (ny,) bool array, optional
        Which rows are wanted, if not all. Others may hold anything.

    Returns
    -------
    (ny, nx) big-endian int32 array
        Mapped when they are plain integers.

    Raises
    ------
    FrameError
        If they cannot be read.
    MissingBytesError
        If what these rows need is not held.
    """
    if is_row_compressed(hdu):
        _check_compressed(hdu.header, shape)
        return decompress(buffer, hdu, held, rows)
    if hdu.header.get("ZIMAGE") is True:
        _check_compressed(hdu.header, shape)
        require(held, [(hdu.data_start, hdu.data_start + hdu.data_size)])
        return _decompress_with_astropy(buffer)
    return map_image(buffer, hdu, 32, ">i4")


def locate_flags(hdu: Hdu, rows: np.ndarray) -> list[Span]:
    """Return where the bytes are that the pixels of some rows are read from.

    Parameters
    ----------
    hdu : Hdu
        FLAGS.
    rows : (ny,) bool array
        Which rows.

    Returns
    -------
    list of (int, int)
        Of tiles of one row each, it is the table that says where they are, which has to be read
        before them; of other compressed integers, all of it.

    Raises
    ------
    FrameError
        If it cannot be read.
    """
    if is_row_compressed(hdu):
        return [locate_descriptors(hdu)]
    if hdu.header.get("ZIMAGE") is True:
        return [(hdu.data_start, hdu.data_start + hdu.data_size)]
    return locate_rows(hdu, rows)


def _check_compressed(header: Header, shape: tuple[int, int]) -> None:
    """Refuse sizes and parameters that a decoder would rely on without a check."""
    found = header.get("ZNAXIS2"), header.get("ZNAXIS1")
    if found != shape:
        raise FrameError(f"FLAGS is {found} pixels, IMAGE is {shape}")
    tile = header.get("ZTILE1", shape[1]), header.get("ZTILE2", 1)
    # Everything that a decoder may use as its parameters, in any case and however often.
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


def _decompress_with_astropy(buffer: memoryview) -> np.ndarray:
    """Return flags that are compressed in another way than those of QR3."""
    # This import is slow and hardly ever needed.
    from astropy.io import fits

    try:
        with fits.open(io.BytesIO(buffer)) as hdus:
            flags = hdus["FLAGS"].data
    except Exception as error:
        # The decoder raises errors that are derived from Exception directly.
        reason = " ".join(str(error).split())
        raise FrameError(f"FLAGS cannot be decompressed: {reason}") from error
    if flags is None or flags.ndim != 2 or flags.dtype.kind != "i":
        raise FrameError("FLAGS cannot be decompressed: not a two-dimensional integer image")
    return flags.astype(">i4")
