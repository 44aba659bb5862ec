"""Pixels as they are stored in a FITS file: big-endian words, swapped one at a time.

Planes are arrays of uint32 in a mapped file. The bytes of a pixel are swapped when it is
used, so that no plane is copied: for a frame with ten sources, only ten small windows are
read, and all pixels once for the fit of the zodiacal light.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy import uint32

from spxdask.science.compiled import compiled_inline


class Planes(NamedTuple):
    """The four planes of a frame.

    Attributes
    ----------
    image, variance, zodi, flags : (ny, nx) uint32 array
        Words as they are in the file; those of the first three planes are float32.
    """

    image: np.ndarray
    variance: np.ndarray
    zodi: np.ndarray
    flags: np.ndarray


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
