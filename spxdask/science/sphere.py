"""Angles on the sphere."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["angular_distance", "unit_vectors"]


def angular_distance(
    ra1: ArrayLike, dec1: ArrayLike, ra2: ArrayLike, dec2: ArrayLike
) -> np.ndarray:
    """Return the great-circle distance of positions, by the haversine formula.

    Parameters
    ----------
    ra1, dec1, ra2, dec2 : float or float array
        Positions, deg; shapes are broadcast.

    Returns
    -------
    float array
        Distances, deg.

    Examples
    --------
    >>> float(angular_distance(10.0, 0.0, 12.5, 0.0).round(9))
    2.5
    """
    ra1, dec1, ra2, dec2 = (np.deg2rad(a) for a in (ra1, dec1, ra2, dec2))
    chord = (
        np.sin((dec2 - dec1) / 2) ** 2 + np.cos(dec1) * np.cos(dec2) * np.sin((ra2 - ra1) / 2) ** 2
    )
    return np.rad2deg(2 * np.arcsin(np.sqrt(np.clip(chord, 0, 1))))


def unit_vectors(ra: ArrayLike, dec: ArrayLike) -> np.ndarray:
    """Return positions as vectors of length 1.

    Parameters
    ----------
    ra, dec : float or float array
        ICRS, deg, of one shape.

    Returns
    -------
    (..., 3) float array
        Cartesian components.
    """
    ra, dec = np.deg2rad(ra), np.deg2rad(dec)
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=-1)
