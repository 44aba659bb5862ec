"""The effective PSF of QR3 and later: a table of zones, with the response of the pixel in it.

Its samples are the light that a pixel receives at an offset from the source, as a fraction of
what all samples would sum to in one pixel: a pixel has 25 samples, so values times 25 are
shares of the flux. They are sampled at pixel centres, and not integrated again.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import ArrayLike

from spxdask.science.kernels.psf import Psf
from spxdask.science.psf.model import PsfModel, arrange_zones

__all__ = ["make_epsf_model"]

OVERSAMPLING = 5


def make_epsf_model(
    x: ArrayLike,
    y: ArrayLike,
    samples: ArrayLike,
    *,
    oversampling: int = OVERSAMPLING,
    at: tuple[ArrayLike, ArrayLike] | None = None,
    is_bilinear: bool = False,
) -> PsfModel:
    """Make the model from the rows of an EPSF table.

    Between samples, it is the cubic spline through them (that of photutils' ``ImagePSF``),
    and zero beyond the outermost. Each zone is normalised: its samples have the sum 1.

    Parameters
    ----------
    x, y : (n,) float array
        XCENTER and YCENTER, 0-based pixels of the full frame; zones may come in any order.
    samples : (n, m, m) or (n, m * m) float array
        EPSF, x fastest, m odd, in any byte order; zones with values that are not finite, or
        of no light, are replaced by their nearest neighbours.
    oversampling : int
        OVSMPX, samples a pixel.
    at : ((k,) float array, (k,) float array), optional
        Positions of the sources (x, y), 0-based pixels of the full frame: the model is made
        for the zones that these need, and is of no use elsewhere. By default it is made for
        the whole detector.
    is_bilinear : bool
        Whether the PSF is interpolated between four zones.

    Returns
    -------
    PsfModel
        Of stamps of 7 x 7 pixels for 33 x 33 samples at 5 a pixel.

    Raises
    ------
    ValueError
        If the shape of the samples or the centres make no sense, or no zone is usable.
    """
    samples, x, y = np.asarray(samples), np.ravel(np.asarray(x)), np.ravel(np.asarray(y))
    n = len(samples)
    if n == 0:
        raise ValueError("the EPSF has no zones")
    m = round(np.sqrt(samples[0].size))
    if samples.shape[1:] not in ((m, m), (m * m,)) or m % 2 == 0 or m < 5:
        raise ValueError(f"a zone of the EPSF must be an odd square, got {samples.shape[1:]}")
    if not 1 <= oversampling <= m // 2:
        raise ValueError(f"{m} x {m} samples of a zone cannot be {oversampling} a pixel")
    if len(x) != n or len(y) != n:
        raise ValueError(f"{n} zones of the EPSF need as many centres, got {len(x)} and {len(y)}")
    needed, zones = arrange_zones(x, y, np.ones(n, bool)).select(at, is_bilinear)
    values = samples[needed].astype(float).reshape(len(needed), m, m)
    total = values.sum(axis=(1, 2))
    usable = np.isfinite(total) & (total > 0)
    if not usable.all():
        if at is not None:
            # The neighbours of a zone without a PSF may not be among those that are needed.
            return make_epsf_model(
                x, y, samples, oversampling=oversampling, is_bilinear=is_bilinear
            )
        zones = arrange_zones(x[needed], y[needed], usable)
        values[~usable], total[~usable] = 0.0, 1.0
    values *= (oversampling**2 / total)[:, np.newaxis, np.newaxis]
    inverse = _invert_spline(m)
    coefficients = np.zeros((len(needed), m + 3, m + 3))
    coefficients[:, :-1, :-1] = inverse @ values @ inverse.T
    half = (m - 1) / 2
    return PsfModel(
        psf=Psf(
            coefficients=coefficients,
            core=np.zeros((len(needed), 2)),
            origin=-half - 1.0,
            limit=half,
            oversampling=oversampling,
            degree=3,
            size=2 * int(half / oversampling + 0.5) + 1,
        ),
        zones=zones,
        unusable=int((~usable).sum()),
        is_bilinear=is_bilinear,
    )


@cache
def _invert_spline(m: int) -> np.ndarray:
    """Return the matrix from m values to the m + 2 coefficients of the cubic spline.

    At both ends, the third derivative is the same in the first two intervals (not a knot).
    """
    matrix = np.zeros((m + 2, m + 2))
    for i in range(m):
        matrix[i, i : i + 3] = 1 / 6, 4 / 6, 1 / 6
    matrix[m, :5] = matrix[m + 1, -5:] = 1, -4, 6, -4, 1
    return np.linalg.inv(matrix)[:, :m]
