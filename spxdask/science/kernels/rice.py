"""The loop that decompresses RICE_1 tiles.

RICE_1 is described in the FITS standard 4.0, section 10.4.1: the first pixel of a tile
is stored unchanged, each other pixel as the difference from the pixel before, mapped to an
unsigned number. Each block of 32 pixels has a number of low bits: the low bits of a number
are stored unchanged, and the remaining high part as a run of that many zeros and a one.
"""

from __future__ import annotations

import numpy as np
from numpy import uint32, uint64

from spxdask.science.compiled import compiled
from spxdask.science.kernels.pixels import swap_word

# Number of pixels of a block, which share the number of low bits.
BLOCK = 32
# For four-byte integers, a block begins with its number of low bits plus one, in five bits.
# A number of 25 means that the numbers of the block are not compressed.
SPLIT_BITS = 5
UNCOMPRESSED = 25


@compiled
def decompress_rows(
    heap: np.ndarray, starts: np.ndarray, lengths: np.ndarray, rows: np.ndarray, out: np.ndarray
) -> int:
    """Decompress tiles of one row each.

    Parameters
    ----------
    heap : (m,) uint8 array
        The compressed tiles.
    starts, lengths : (ny,) int array
        Position and length of each tile in the heap, bytes.
    rows : (n,) int array
        Which rows to decompress.
    out : (ny, nx) uint32 array
        These rows of it are filled with big-endian words.

    Returns
    -------
    int
        The first row whose tile ends too early; -1 if all are complete.
    """
    nx = out.shape[1]
    for row in rows:
        at, end = starts[row], starts[row] + lengths[row]
        last = uint32(0)
        for _ in range(4):
            last = uint32((last << uint32(8)) | uint32(heap[at]))
            at += 1
        bits, have = uint64(0), 0
        for first in range(0, nx, BLOCK):
            while have < SPLIT_BITS:
                if at >= end:
                    return row
                bits = (bits << uint64(8)) | uint64(heap[at])
                have += 8
                at += 1
            have -= SPLIT_BITS
            split = int((bits >> uint64(have)) & uint64(31)) - 1
            low = 32 if split == UNCOMPRESSED else split
            for column in range(first, min(first + BLOCK, nx)):
                if split >= 0:
                    value = uint64(0)
                    if split != UNCOMPRESSED:
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
                out[row, column] = swap_word(last)
    return -1
