"""Tile-compressed integers: the format of the FLAGS extension in release QR3 and later.

`spxdask.science.kernels.rice` describes the compression and has the inner loop.
"""

from __future__ import annotations

import numpy as np

from spxdask.errors import FrameError
from spxdask.science.kernels.rice import BLOCK, decompress_rows
from spxdask.science.level2.fits import Hdu, Header, require
from spxdask.science.level2.spans import Span, Spans


def is_row_compressed(hdu: Hdu) -> bool:
    """Return whether an extension is 32-bit integers in RICE_1 tiles of one row each.

    Parameters
    ----------
    hdu : Hdu
        The extension.

    Returns
    -------
    bool
        Whether `decompress` can read it.
    """
    header = hdu.header
    parameters = {
        header.get(f"ZNAME{n}"): header.get(f"ZVAL{n}") for n in (1, 2) if f"ZNAME{n}" in header
    }
    return (
        header.get("ZIMAGE") is True
        and header.get("ZCMPTYPE") == "RICE_1"
        and header.get("ZBITPIX") == 32
        and header.get("ZNAXIS") == 2
        and header.get("ZTILE1", header.get("ZNAXIS1")) == header.get("ZNAXIS1")
        and header.get("ZTILE2", 1) == 1
        and parameters.get("BLOCKSIZE", BLOCK) == BLOCK
        and parameters.get("BYTEPIX", 4) == 4
        and header.get("TFIELDS") == 1
        and str(header.get("TFORM1")).startswith(("1PB", "PB", "1QB", "QB"))
        and header.get("BZERO", 0) == 0
        and header.get("BSCALE", 1) == 1
    )


def locate_descriptors(hdu: Hdu) -> Span:
    """Return where the places and lengths of the tiles are, for `is_row_compressed` extensions.

    Parameters
    ----------
    hdu : Hdu
        The extension.

    Returns
    -------
    (int, int)
        The first byte in the file, and the one after the last.

    Raises
    ------
    FrameError
        If the table does not have one row for each tile.
    """
    header = hdu.header
    ny, nx = header.integer("ZNAXIS2"), header.integer("ZNAXIS1")
    width = 2 * np.dtype(_get_descriptor(header)).itemsize
    if header.integer("NAXIS2") != ny or header.integer("NAXIS1") != width or nx < 1:
        raise FrameError(f"FLAGS cannot be decompressed: not one row for each of {ny} tiles")
    return hdu.data_start, hdu.data_start + ny * width


def _get_descriptor(header: Header) -> str:
    return ">i8" if "Q" in header["TFORM1"] else ">i4"


def decompress(
    buffer: memoryview, hdu: Hdu, held: Spans | None = None, rows: np.ndarray | None = None
) -> np.ndarray:
    """Decompress an extension for which `is_row_compressed` holds.

    Parameters
    ----------
    buffer : memoryview
        The content of the file.
    hdu : Hdu
        The extension.
    held : Spans, optional
        Which bytes of it are there, if not all.
    rows : (ny,) bool array, optional
        Which rows to decompress, if not all. The others are not filled in.

    Returns
    -------
    (ny, nx) big-endian int32 array
        Its pixels.

    Raises
    ------
    FrameError
        If the table does not have one row for each tile, or a tile ends too early.
    MissingBytesError
        If the descriptors or tiles of these rows are not held.
    """
    header = hdu.header
    ny, nx = header.integer("ZNAXIS2"), header.integer("ZNAXIS1")
    descriptors = locate_descriptors(hdu)
    require(held, [descriptors])
    table = np.frombuffer(buffer, _get_descriptor(header), 2 * ny, hdu.data_start).reshape(ny, 2)
    lengths, starts = table.astype(np.int64).T
    begin = header.integer("THEAP", descriptors[1] - descriptors[0])
    if not 0 <= begin <= hdu.data_size:
        raise FrameError(f"FLAGS cannot be decompressed: THEAP is {begin}")
    heap = np.frombuffer(buffer, np.uint8, hdu.data_size - begin, hdu.data_start + begin)
    # Start and length are not added, because their sum may overflow.
    outside = (starts < 0) | (lengths < 4) | (lengths > len(heap)) | (starts > len(heap) - lengths)
    if outside.any():
        raise FrameError("FLAGS cannot be decompressed: a tile lies outside of the table")
    wanted = np.arange(ny) if rows is None else np.flatnonzero(rows)
    if held is not None:
        first = hdu.data_start + begin + starts[wanted]
        last = first + lengths[wanted]
        require(held, zip(first.tolist(), last.tolist(), strict=True))
    out = np.empty((ny, nx), np.uint32)
    row = decompress_rows(heap, starts, lengths, wanted, out)
    if row >= 0:
        raise FrameError(f"FLAGS cannot be decompressed: the tile of row {row} ends too early")
    return out.view(">i4")
