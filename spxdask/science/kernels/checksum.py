"""The checksum that FITS calls DATASUM, and the part of XXH64 that goes over all bytes."""

from __future__ import annotations

import numpy as np

from spxdask.science.compiled import compiled, compiled_inline
from spxdask.science.kernels.pixels import swap_word

# Constants of XXH64.
PRIMES = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)
_PRIME_1, _PRIME_2 = np.uint64(PRIMES[0]), np.uint64(PRIMES[1])
_SEEDS = tuple(np.uint64(n % 2**64) for n in (PRIMES[0] + PRIMES[1], PRIMES[1], 0, -PRIMES[0]))
_LEFT, _RIGHT = np.uint64(31), np.uint64(33)


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


@compiled_inline
def _mix(lane: np.uint64, word: np.uint64) -> np.uint64:
    """Mix a word into a lane."""
    lane += word * _PRIME_2
    return (lane << _LEFT | lane >> _RIGHT) * _PRIME_1


@compiled
def hash_stripes(words: np.ndarray) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """Return the four lanes of XXH64 after all whole stripes of 32 bytes, with the seed 0.

    Parameters
    ----------
    words : (4 n,) uint64 array
        The bytes as little-endian words.

    Returns
    -------
    tuple of 4 int
        The lanes.
    """
    one, two, three, four = _SEEDS
    for i in range(0, len(words), 4):
        one = _mix(one, words[i])
        two = _mix(two, words[i + 1])
        three = _mix(three, words[i + 2])
        four = _mix(four, words[i + 3])
    return one, two, three, four
