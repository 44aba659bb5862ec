"""Factors for every pixel of a frame."""

from __future__ import annotations

import numpy as np
from numpy import uint32

from spxdask.science.compiled import compiled
from spxdask.science.kernels.pixels import swap_word


@compiled
def multiply_pixels(
    image: np.ndarray,
    variance: np.ndarray,
    factors: np.ndarray,
    new_image: np.ndarray,
    new_variance: np.ndarray,
) -> None:
    """Multiply brightness by a factor and its variance by the square.

    Parameters
    ----------
    image, variance : (ny, nx) uint32 array
        Float32 words as they are in the file.
    factors : (ny, nx) float32 array
        In the byte order of the machine.
    new_image, new_variance : (ny, nx) uint32 array
        Filled in, words like those of the file.
    """
    ny, nx = image.shape
    for row in range(ny):
        old, old_variance, factor = image[row], variance[row], factors[row]
        new, squared = new_image[row], new_variance[row]
        for column in range(nx):
            f = factor[column]
            product = swap_word(old[column]).view(np.float32) * f
            new[column] = swap_word(np.float32(product).view(uint32))
            product = swap_word(old_variance[column]).view(np.float32) * (f * f)
            squared[column] = swap_word(np.float32(product).view(uint32))
