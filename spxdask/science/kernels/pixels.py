"""Pixels as they are stored in a FITS file: big-endian words, swapped one at a time.

Planes are arrays of uint32 in a mapped file. The bytes of a pixel are swapped when it is
used, so that no plane is copied: for a frame with ten sources, only ten small windows are
read, and all pixels once for the fit of the zodiacal light.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy import uint32

from spxdask.science.compiled import compiled_helper, compiled_inline


class Planes(NamedTuple):
    """The four planes of a frame, and the factors of its flux correction.

    The factors are applied wherever pixels are used, by `scale_variance` to parts of rows, by
    `read_brightness` and `read_variance` to one pixel, and by the fit of the zodiacal light, so
    that no plane is written. Without factors, the compiler leaves nothing of this.

    Attributes
    ----------
    image, variance, zodi, flags : (ny, nx) uint32 array
        Words as they are in the file; those of the first three planes are float32.
    factors : (ny, nx) float32 array or None
        IMAGE is multiplied by them, VARIANCE by their squares.
    """

    image: np.ndarray
    variance: np.ndarray
    zodi: np.ndarray
    flags: np.ndarray
    factors: np.ndarray | None = None


class Conversion(NamedTuple):
    """How pixels of the planes become brightness and its variance.

    Attributes
    ----------
    zodi_scale : float
        ZODI times this is subtracted from IMAGE; 0 to subtract nothing.
    unit : float
        Factor from the unit of the planes to that of the results.
    median_variance : float
        Replaces invalid variances of flagged pixels, in the unit of the plane.
    """

    zodi_scale: float
    unit: float
    median_variance: float


@compiled_inline
def swap_word(word: Any) -> uint32:
    """Return a big-endian word in the byte order of the machine.

    Parameters
    ----------
    word : int
        32 bits as they are in the file.

    Returns
    -------
    uint32
    """
    word = uint32(word)
    return uint32(
        (word >> uint32(24))
        | ((word >> uint32(8)) & uint32(0xFF00))
        | ((word << uint32(8)) & uint32(0xFF0000))
        | (word << uint32(24))
    )


@compiled_inline
def read_real(word: Any) -> np.float64:
    """Return a big-endian float32 as a double.

    Parameters
    ----------
    word : int
        32 bits as they are in the file.

    Returns
    -------
    float64
    """
    return np.float64(swap_word(word).view(np.float32))


@compiled_helper
def slice_factors(factors: Any, row: int, start: int, stop: int) -> Any:
    """Return the factors of a part of a row.

    Parameters
    ----------
    factors : (ny, nx) float32 array or None
        Those of `Planes`.
    row, start, stop : int
        The row, its first pixel, and the one after its last.

    Returns
    -------
    (stop - start,) float32 array or None
    """
    if factors is None:
        return None
    return factors[row, start:stop]


@compiled_helper
def scale_variance(words: np.ndarray, factors: Any, into: np.ndarray) -> np.ndarray:
    """Put a part of a row of VARIANCE on the flux scale of the results.

    Parameters
    ----------
    words : (n,) uint32 array
        Pixels as they are in the file.
    factors : (n,) float32 array or None
        Those of these pixels, whose squares are applied.
    into : (m,) uint32 array
        Where the products are put; m is at least n.

    Returns
    -------
    (n,) uint32 array
        Words like those of a file, into which the products are rounded: `words` without factors.
    """
    if factors is None:
        return words
    for k in range(len(words)):
        product = swap_word(words[k]).view(np.float32) * (factors[k] * factors[k])
        into[k] = swap_word(np.float32(product).view(uint32))
    return into[: len(words)]


@compiled_helper
def read_brightness(words: np.ndarray, factors: Any, index: Any) -> np.float64:
    """Return a pixel of IMAGE on the flux scale of the results.

    Parameters
    ----------
    words : uint32 array
        IMAGE or a part of it.
    factors : float32 array or None
        Those of the same pixels.
    index : int or (int, int)
        Which pixel of these.

    Returns
    -------
    float64
        The product is rounded to a float32.
    """
    value = swap_word(words[index]).view(np.float32)
    if factors is None:
        return np.float64(value)
    return np.float64(np.float32(value * factors[index]))


@compiled_helper
def read_variance(words: np.ndarray, factors: Any, index: Any) -> np.float64:
    """Return a pixel of VARIANCE on the flux scale of the results.

    Parameters
    ----------
    words : uint32 array
        VARIANCE or a part of it.
    factors : float32 array or None
        Those of the same pixels, whose squares are applied.
    index : int or (int, int)
        Which pixel of these.

    Returns
    -------
    float64
        The product is rounded to a float32, as `scale_variance` does.
    """
    value = swap_word(words[index]).view(np.float32)
    if factors is None:
        return np.float64(value)
    return np.float64(np.float32(value * (factors[index] * factors[index])))


@compiled_inline
def is_finite(value: float) -> bool:
    """Return whether a number is neither infinite nor NaN.

    Parameters
    ----------
    value : float
        The number.

    Returns
    -------
    bool
    """
    # Infinity or NaN times zero is NaN. Unlike math.isfinite, the compiler vectorises this.
    return value * 0.0 == 0.0
