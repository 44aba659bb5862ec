"""The gnomonic projection with SIP distortion, one source at a time.

See `spxdask.science.level2.wcs.TanSip` for the meaning of the arguments.
"""

from __future__ import annotations

import math

import numpy as np

from spxdask.science.compiled import compiled, compiled_helper

# Accuracy of the inverse distortion, pixels. The forward polynomials are inverted by iteration,
# because the polynomials of the AP and BP cards are accurate to about 1e-3 pixels only.
TOLERANCE_PIXELS = 1e-10
MAX_ITERATIONS = 50


@compiled_helper
def _evaluate_polynomial(coefficients: np.ndarray, u: float, v: float) -> float:
    """Return the sum of coefficients[p, q] u^p v^q over p + q <= order, by Horner's rule."""
    order = len(coefficients) - 1
    total = 0.0
    for p in range(order, -1, -1):
        inner = 0.0
        for q in range(order - p, -1, -1):
            inner = inner * v + coefficients[p, q]
        total = total * u + inner
    return total


@compiled
def distort(
    u: np.ndarray, v: np.ndarray, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Add the SIP distortion to offsets from the reference pixel.

    Parameters
    ----------
    u, v : (n,) float array
        Offsets, pixels.
    a, b : (m, m) float array
        SIP coefficients.

    Returns
    -------
    u, v : (n,) float array
        Distorted offsets, pixels.
    """
    new_u, new_v = np.empty_like(u), np.empty_like(v)
    for k in range(len(u)):
        new_u[k] = u[k] + _evaluate_polynomial(a, u[k], v[k])
        new_v[k] = v[k] + _evaluate_polynomial(b, u[k], v[k])
    return new_u, new_v


@compiled
def project_to_pixels(
    ra: np.ndarray,
    dec: np.ndarray,
    rotation: np.ndarray,
    inverse: np.ndarray,
    crpix: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Project positions onto the detector.

    Parameters
    ----------
    ra, dec : (n,) float array
        ICRS, deg.
    rotation : (3, 3) float array
        From celestial unit vectors to the native system.
    inverse : (2, 2) float array
        From the projection plane (deg) to pixels.
    crpix : (2,) float array
        Reference pixel, 0-based.
    a, b : (m, m) float array
        SIP coefficients.

    Returns
    -------
    x, y : (n,) float array
        0-based pixels; NaN for positions 90 deg or more from the reference point, and where
        the inversion of the distortion does not converge.
    """
    n = len(ra)
    x, y = np.full(n, math.nan), np.full(n, math.nan)
    for k in range(n):
        alpha, delta = math.radians(ra[k]), math.radians(dec[k])
        # c is the unit vector in the celestial system, n the same in the native one.
        c0 = math.cos(delta) * math.cos(alpha)
        c1 = math.cos(delta) * math.sin(alpha)
        c2 = math.sin(delta)
        n2 = rotation[2, 0] * c0 + rotation[2, 1] * c1 + rotation[2, 2] * c2
        if not n2 > 0.0:
            continue
        n0 = rotation[0, 0] * c0 + rotation[0, 1] * c1 + rotation[0, 2] * c2
        n1 = rotation[1, 0] * c0 + rotation[1, 1] * c1 + rotation[1, 2] * c2
        xi, eta = math.degrees(n1 / n2), math.degrees(-n0 / n2)
        target_u = inverse[0, 0] * xi + inverse[0, 1] * eta
        target_v = inverse[1, 0] * xi + inverse[1, 1] * eta
        u, v = target_u, target_v
        for _ in range(MAX_ITERATIONS):
            next_u = target_u - _evaluate_polynomial(a, u, v)
            next_v = target_v - _evaluate_polynomial(b, u, v)
            moved = max(abs(next_u - u), abs(next_v - v))
            u, v = next_u, next_v
            if moved <= TOLERANCE_PIXELS:
                x[k], y[k] = u + crpix[0], v + crpix[1]
                break
    return x, y
