"""Tile-compressed integers, as QR3 and later have their flags.

RICE_1 is described in the FITS standard 4.0, section 10.4.1: the first pixel of a tile
is stored as it is, the others as differences from the one before, mapped to unsigned
numbers; each block of 32 has its own number of low bits that are written as they are,
while the rest of a number is a run of zeros.
"""

from __future__ import annotations

import numpy as np
from numpy import uint32, uint64

from spxdask.errors import FrameError
from spxdask.science.compiled import compiled
from spxdask.science.level2.fits import Hdu

BLOCK = 32
# For four-byte integers, five bits say how many low bits a block has; 25 would mean that
# its numbers are not compressed at all.
_SPLIT_BITS = 5
_UNCOMPRESSED = 25


def is_row_compressed(hdu: Hdu) -> bool:
    """Tell whether an extension is 32-bit integers in RICE_1 tiles of one row each."""
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


def decompress(mapped, hdu: Hdu) -> np.ndarray:
    """Decompress an extension for which `is_row_compressed` holds.

    Parameters
    ----------
    mapped : buffer
        The whole file.
    hdu : Hdu

    Returns
    -------
    (ny, nx) big-endian int32 array

    Raises
    ------
    FrameError
        If the table does not have a row a tile, or a tile ends too early.
    """
    header = hdu.header
    ny, nx = header.integer("ZNAXIS2"), header.integer("ZNAXIS1")
    descriptor = ">i8" if "Q" in header["TFORM1"] else ">i4"
    width = 2 * np.dtype(descriptor).itemsize
    if header.integer("NAXIS2") != ny or header.integer("NAXIS1") != width or nx < 1:
        raise FrameError(f"FLAGS cannot be decompressed: not a row for each of {ny} tiles")
    table = np.frombuffer(mapped, descriptor, 2 * ny, hdu.data_start).reshape(ny, 2)
    lengths, starts = table.astype(np.int64).T
    begin = header.integer("THEAP", width * ny)
    if not 0 <= begin <= hdu.data_size:
        raise FrameError(f"FLAGS cannot be decompressed: THEAP is {begin}")
    heap = np.frombuffer(mapped, np.uint8, hdu.data_size - begin, hdu.data_start + begin)
    # Not their sum, which may be too large for an integer.
    outside = (starts < 0) | (lengths < 4) | (lengths > len(heap)) | (starts > len(heap) - lengths)
    if outside.any():
        raise FrameError("FLAGS cannot be decompressed: a tile lies outside of the table")
    out = np.empty((ny, nx), np.uint32)
    row = _decompress(heap, starts, lengths, out)
    if row >= 0:
        raise FrameError(f"FLAGS cannot be decompressed: the tile of row {row} ends too early")
    return out.view(">i4")


@compiled
def _decompress(heap, starts, lengths, out):
    """Fill `out` with big-endian words; return the first row whose tile is cut, or -1."""
    ny, nx = out.shape
    for row in range(ny):
        at, end = starts[row], starts[row] + lengths[row]
        last = uint32(0)
        for _ in range(4):
            last = uint32((last << uint32(8)) | uint32(heap[at]))
            at += 1
        bits, have = uint64(0), 0
        for first in range(0, nx, BLOCK):
            while have < _SPLIT_BITS:
                if at >= end:
                    return row
                bits = (bits << uint64(8)) | uint64(heap[at])
                have += 8
                at += 1
            have -= _SPLIT_BITS
            split = int((bits >> uint64(have)) & uint64(31)) - 1
            low = 32 if split == _UNCOMPRESSED else split
            for column in range(first, min(first + BLOCK, nx)):
                if split >= 0:
                    value = uint64(0)
                    if split != _UNCOMPRESSED:
                        while True:
                            if have == 0:
                                if at >= end:
                                    return row
                                bits = uint64(heap[at])
                                have = 8
                                at += 1
                            have -= 1
                            if (bits >> uint64(have)) & uint64(1):
                                break
                            value += uint64(1)
                    while have < low:
                        if at >= end:
                            return row
                        bits = (bits << uint64(8)) | uint64(heap[at])
                        have += 8
                        at += 1
                    have -= low
                    mask = (uint64(1) << uint64(low)) - uint64(1)
                    value = (value << uint64(low)) | ((bits >> uint64(have)) & mask)
                    half = uint32(value >> uint64(1))
                    last = uint32(last + (~half if value & uint64(1) else half))
                out[row, column] = (
                    (last >> uint32(24))
                    | ((last >> uint32(8)) & uint32(0xFF00))
                    | ((last << uint32(8)) & uint32(0xFF0000))
                    | (last << uint32(24))
                )
    return -1
