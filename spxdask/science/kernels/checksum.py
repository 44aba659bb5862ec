"""The checksum that FITS calls DATASUM."""

from __future__ import annotations

import numpy as np

from spxdask.science.compiled import compiled
from spxdask.science.kernels.pixels import swap_word


@compiled
def sum_words(words: np.ndarray) -> np.uint64:
    """Return the ones' complement sum of big-endian 32-bit words.

    Parameters
    ----------
    words : (n,) uint32 array
        The words as they are in the file.

    Returns
    -------
    int
        From 0 to 2^32 - 1.
    """
    total = np.uint64(0)
    for i in range(len(words)):
        total += np.uint64(swap_word(words[i]))
    while total >> np.uint64(32):
        total = (total & np.uint64(0xFFFFFFFF)) + (total >> np.uint64(32))
    return total
