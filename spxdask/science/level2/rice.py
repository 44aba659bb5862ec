"""Tile-compressed integers: the format of the FLAGS extension in release QR3 and later.

`spxdask.science.kernels.rice` describes the compression and has the inner loop.
"""

from __future__ import annotations

import numpy as np

from spxdask.errors import FrameError
from spxdask.science.kernels.rice import BLOCK, decompress_rows
from spxdask.science.level2.fits import Hdu


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


def decompress(buffer: memoryview, hdu: Hdu) -> np.ndarray:
    """Decompress an extension for which `is_row_compressed` holds.

    Parameters
    ----------
    buffer : memoryview
        The content of the file.
    hdu : Hdu
        The extension.

    Returns
    -------
    (ny, nx) big-endian int32 array
        Its pixels.

    Raises
    ------
    FrameError
        If the table does not have one row for each tile, or a tile ends too early.
    """
    header = hdu.header
    ny, nx = header.integer("ZNAXIS2"), header.integer("ZNAXIS1")
    descriptor = ">i8" if "Q" in header["TFORM1"] else ">i4"
    width = 2 * np.dtype(descriptor).itemsize
    if header.integer("NAXIS2") != ny or header.integer("NAXIS1") != width or nx < 1:
        raise FrameError(f"FLAGS cannot be decompressed: not one row for each of {ny} tiles")
    table = np.frombuffer(buffer, descriptor, 2 * ny, hdu.data_start).reshape(ny, 2)
    lengths, starts = table.astype(np.int64).T
    begin = header.integer("THEAP", width * ny)
    if not 0 <= begin <= hdu.data_size:
        raise FrameError(f"FLAGS cannot be decompressed: THEAP is {begin}")
    heap = np.frombuffer(buffer, np.uint8, hdu.data_size - begin, hdu.data_start + begin)
    # Start and length are not added, because their sum may overflow.
    outside = (starts < 0) | (lengths < 4) | (lengths > len(heap)) | (starts > len(heap) - lengths)
    if outside.any():
        raise FrameError("FLAGS cannot be decompressed: a tile lies outside of the table")
    out = np.empty((ny, nx), np.uint32)
    row = decompress_rows(heap, starts, lengths, out)
    if row >= 0:
        raise FrameError(f"FLAGS cannot be decompressed: the tile of row {row} ends too early")
    return out.view(">i4")
