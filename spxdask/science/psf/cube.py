"""The PSF cube of QR2: the optical PSF, without the response of the pixel, at 10 samples a pixel.

Its planes are in the order k = iy * nx + ix of the zones, whatever order the header lists their
centres in: headers of pipelines up to 6.5.5 list them transposed. Therefore the centres are
sorted, and the planes assigned to them by number. The core of the PSF is not at the centre of
its plane, and is moved there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from spxdask.science.kernels.psf import PADDING, Psf, prepare_cube
from spxdask.science.psf.model import PsfModel, Zones, arrange_zones

__all__ = ["arrange_cube_zones", "make_cube_model", "read_centres"]

OVERSAMPLING = 10


def read_centres(header: Mapping[str, Any], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the centres of zones from the header of a PSF extension.

    Parameters
    ----------
    header : mapping of str to any
        With cards XCTR_1 to XCTR_n and YCTR_1 to YCTR_n.
    n : int
        Planes of the cube.

    Returns
    -------
    x, y : (n,) float array
        0-based pixels of the full frame, in the order of the header, which is not always
        that of the planes: see `arrange_cube_zones`.

    Raises
    ------
    ValueError
        If a card is missing or is not a finite number.
    """
    centres = np.empty((2, n))
    for axis, name in enumerate(("XCTR", "YCTR")):
        for k in range(n):
            value: Any = header.get(f"{name}_{k + 1}")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and math.isfinite(float(value))):
                raise ValueError(f"{name}_{k + 1} of the PSF must be a number, got {value!r}")
            centres[axis, k] = value
    return centres[0], centres[1]


def arrange_cube_zones(x: ArrayLike, y: ArrayLike) -> Zones:
    """Assign the planes of a cube to the zones of the detector.

    Parameters
    ----------
    x, y : (n,) float array
        XCTR_i and YCTR_i in any order, 0-based pixels of the full frame.

    Returns
    -------
    Zones
        Plane iy * nx + ix at the sorted centres.

    Raises
    ------
    ValueError
        If the centres do not form a full lattice.
    """
    x, y = np.ravel(np.asarray(x, float)), np.ravel(np.asarray(y, float))
    zones = arrange_zones(x, y, np.ones(len(x), bool))
    if zones.index.size != len(x):
        raise ValueError(f"the centres of {len(x)} zones do not form a lattice")
    return Zones(x=zones.x, y=zones.y, index=np.arange(len(x)).reshape(zones.index.shape))


def make_cube_model(
    zones: Zones,
    samples: np.ndarray,
    *,
    oversampling: int = OVERSAMPLING,
    at: tuple[ArrayLike, ArrayLike] | None = None,
    is_bilinear: bool = False,
    require_planes: Callable[[np.ndarray], None] = lambda needed: None,
) -> PsfModel:
    """Make the model from a cube, integrated over native pixels and centred on its core.

    Parameters
    ----------
    zones : Zones
        From `arrange_cube_zones`.
    samples : (n, m, m) float32 array
        The cube, m odd, in any byte order. Only the planes that are needed are read.
    oversampling : int
        OVERSAMP, samples a pixel.
    at : ((k,) float array, (k,) float array), optional
        Positions of the sources (x, y), 0-based pixels of the full frame: the model is made
        for the zones that these need, and is of no use elsewhere. By default it is made for
        the whole detector.
    is_bilinear : bool
        Whether the PSF is interpolated between four zones.
    require_planes : callable
        Called with the planes that are about to be read, for a cube that is there in parts; it
        raises an error if one is not.

    Returns
    -------
    PsfModel
        Each zone is normalised: its samples have the sum 1. Zones without light, or with
        samples that are not finite, are replaced by their nearest neighbours.

    Raises
    ------
    ValueError
        If the cube has another number of planes, an even size, or no usable zone.
    """
    n = zones.index.size
    m = samples.shape[-1]
    if samples.shape != (n, m, m) or m % 2 == 0 or not 1 <= oversampling <= m // 2:
        raise ValueError(
            f"a PSF cube of {n} zones must be {n} odd squares of two pixels or more, "
            f"got {samples.shape} at {oversampling} samples a pixel"
        )
    needed, selected = zones.select(at, is_bilinear)
    require_planes(needed)
    words = np.ascontiguousarray(samples, ">f4").view("<u4")
    words.flags.writeable = False
    coefficients, core = prepare_cube(words, needed, oversampling)
    usable = np.isfinite(coefficients[:, 0, 0])
    if not usable.all():
        if at is not None:
            # The neighbours of a zone without a PSF may not be among those that are needed.
            return make_cube_model(
                zones,
                samples,
                oversampling=oversampling,
                is_bilinear=is_bilinear,
                require_planes=require_planes,
            )
        places = np.meshgrid(zones.x, zones.y)
        selected = arrange_zones(places[0].ravel(), places[1].ravel(), usable)
        coefficients[~usable] = 0.0
    return PsfModel(
        psf=Psf(
            coefficients=coefficients,
            core=core,
            origin=-1.0 - PADDING - (oversampling - 1) / 2 - (m - 1) / 2,
            limit=(m + oversampling) / 2 + 1.5,
            oversampling=oversampling,
            degree=2,
            size=2 * ((m + oversampling) // (2 * oversampling)) + 1,
        ),
        zones=selected,
        unusable=int((~usable).sum()),
        is_bilinear=is_bilinear,
    )
