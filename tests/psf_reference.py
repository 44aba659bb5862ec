"""A PSF that is no Gaussian and varies over the detector, and plain ways to put it on pixels."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.polynomial.legendre import leggauss

# Amplitude, offset (x, y) and widths along two axes of the parts of the optical PSF, pixels.
PARTS = [
    (0.70, 0.00, 0.00, 0.33, 0.36),
    (0.20, 0.10, -0.15, 0.60, 0.50),
    (0.08, -0.30, 0.25, 0.95, 1.05),
    (0.02, 0.40, 0.50, 1.40, 1.30),
]


def optical(dx, dy, wide=1.0):
    """Density of light at offsets from the source, a pixel."""
    total = 0.0
    for share, x, y, sx, sy in PARTS:
        sx, sy = sx * wide, sy * wide
        exponent = -0.5 * ((dx - x) / sx) ** 2 - 0.5 * ((dy - y) / sy) ** 2
        total = total + share * np.exp(exponent) / (2 * np.pi * sx * sy)
    return total


def effective(dx, dy, wide=1.0, order=12):
    """Light in a pixel whose centre is at offsets from the source: Gauss-Legendre integrals."""
    nodes, weights = leggauss(order)
    dx, dy = np.asarray(dx, float), np.asarray(dy, float)
    total = 0.0
    for u, wu in zip(nodes / 2, weights / 2, strict=True):
        for v, wv in zip(nodes / 2, weights / 2, strict=True):
            total = total + wu * wv * optical(dx + u, dy + v, wide)
    return total


def integrate_by_brute_force(dx, dy, wide=1.0, samples=25):
    """The same by the mean of `samples` x `samples` points a pixel."""
    points = (np.arange(samples) + 0.5) / samples - 0.5
    u, v = np.meshgrid(points, points)
    dx, dy = np.asarray(dx, float)[..., None, None], np.asarray(dy, float)[..., None, None]
    return optical(dx + u, dy + v, wide).mean(axis=(-2, -1))


@cache
def epsf_samples(wide=1.0, m=33, oversampling=5):
    """A zone of an EPSF table: its samples sum to about 1."""
    steps = (np.arange(m) - m // 2) / oversampling
    dx, dy = np.meshgrid(steps, steps)
    samples = effective(dx, dy, wide) / oversampling**2
    samples.setflags(write=False)
    return samples


def cube_samples(wide=1.0, core=(0.0, 0.0), m=101, oversampling=10):
    """A plane of a PSF cube, whose core is off the centre by `core` pixels."""
    steps = (np.arange(m) - m // 2) / oversampling
    dx, dy = np.meshgrid(steps - core[0], steps - core[1])
    return optical(dx, dy, wide) / oversampling**2
