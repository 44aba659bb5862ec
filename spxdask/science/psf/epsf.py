"""The effective PSF of QR3 and later: a table of zones, with the response of the pixel in it.

Its samples are the light that a pixel receives at an offset from the source, as a fraction of
what all samples would sum to in one pixel: a pixel has 25 samples, so values times 25 are
shares of the flux. They are sampled at pixel centres, and not integrated again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from spxdask.science.kernels.psf import Psf
from spxdask.science.psf.model import PsfModel, arrange_zones

__all__ = ["make_epsf_model"]


def make_epsf_model(
    x: ArrayLike, y: ArrayLike, samples: ArrayLike, oversampling: int = 5
) -> PsfModel:
    """Make the model from the rows of an EPSF table.

    Between samples, it is the cubic spline through them (that of photutils' ``ImagePSF``),
    and zero beyond the outermost. Each zone is normalised: its samples have the sum 1.

    Parameters
    ----------
    x, y : (n,) float array
        XCENTER and YCENTER, 0-based pixels of the full frame; zones may come in any order.
    samples : (n, m, m) or (n, m * m) float array
        EPSF, x fastest, m odd; zones with values that are not finite, or of no light, are
        replaced by their nearest neighbours.
    oversampling : int
        Samples a pixel.

    Returns
    -------
    PsfModel
        Of stamps of 7 x 7 pixels for 33 x 33 samples at 5 a pixel.

    Raises
    ------
    ValueError
        If the shape of the samples or the centres make no sense, or no zone is usable.
    """
    samples = np.asarray(samples, float)
    n = len(samples)
    if n == 0:
        raise ValueError("the EPSF has no zones")
    m = round(np.sqrt(samples[0].size))
    if m * m != samples[0].size or m % 2 == 0 or m < 5:
        raise ValueError(f"a zone of the EPSF must be an odd square, got {samples.shape[1:]}")
    if oversampling < 1 or len(np.ravel(x)) != n or len(np.ravel(y)) != n:
        raise ValueError(f"{n} zones of the EPSF need as many centres and a sampling >= 1")
    samples = samples.reshape(n, m, m)
    total = samples.sum(axis=(1, 2))
    usable = np.isfinite(total) & (total > 0)
    zones = arrange_zones(np.ravel(x), np.ravel(y), usable)
    scale = np.where(usable, oversampling**2 / np.where(usable, total, 1.0), 0.0)
    inverse = _invert_spline(m)
    samples = np.where(usable[:, None, None], samples, 0.0) * scale[:, None, None]
    coefficients = np.zeros((n, m + 3, m + 3))
    coefficients[:, :-1, :-1] = inverse @ samples @ inverse.T
    half = (m - 1) / 2
    return PsfModel(
        psf=Psf(
            coefficients=coefficients,
            core=np.zeros((n, 2)),
            origin=-half - 1.0,
            limit=half,
            oversampling=oversampling,
            degree=3,
            size=2 * int(half / oversampling + 0.5) + 1,
        ),
        zones=zones,
        unusable=int(n - usable.sum()),
    )


def _invert_spline(m: int) -> np.ndarray:
    """Return the matrix from m values to the m + 2 coefficients of the cubic spline.

    At both ends, the third derivative is the same in the first two intervals (not a knot).
    """
    matrix = np.zeros((m + 2, m + 2))
    for i in range(m):
        matrix[i, i : i + 3] = 1 / 6, 4 / 6, 1 / 6
    matrix[m, :5] = matrix[m + 1, -5:] = 1, -4, 6, -4, 1
    return np.linalg.inv(matrix)[:, :m]
