"""The 102 channels of SPHEREx: 17 wavelength ranges on each of six detectors."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import BinaryIO

import numpy as np

from spxdask.errors import InputError

__all__ = ["BANDS", "PUBLISHED_CHANNELS", "PUBLISHED_TOKEN", "Channels", "read_channels"]

BANDS = ("D1", "D2", "D3", "D4", "D5", "D6")
PUBLISHED_TOKEN = "cal-sch-v1-2026-106"
SUBCHANNELS = 17
# The table of the product, which has a map of each detector besides.
EXTENSION = "SPECTRAL_CHANNELS"


@dataclass(frozen=True, eq=False, kw_only=True)
class Channels:
    """Channels in order of detector and wavelength.

    Attributes
    ----------
    band : (n,) int array
        0 for D1 to 5 for D6.
    subchannel : (n,) int array
        1 for the shortest wavelengths of a detector.
    wavelength, wavelength_min, wavelength_max, bandwidth : (n,) float array
        Centre, edges and width, um. Edges of neighbours overlap by some nanometres.
    token : str
        The product that these numbers are of.
    """

    band: np.ndarray
    subchannel: np.ndarray
    wavelength: np.ndarray
    wavelength_min: np.ndarray
    wavelength_max: np.ndarray
    bandwidth: np.ndarray
    token: str = field(default=PUBLISHED_TOKEN)

    def __len__(self) -> int:
        return len(self.band)

    @cached_property
    def _edges(self) -> dict[int, tuple[int, np.ndarray]]:
        """First channel, and edges without an overlap, of each detector."""
        found = {}
        for band in np.unique(self.band).tolist():
            index = np.flatnonzero(self.band == band)
            low, high = self.wavelength_min[index], self.wavelength_max[index]
            inner = (high[:-1] + low[1:]) / 2
            found[band] = int(index[0]), np.concatenate([low[:1], inner, high[-1:]])
        return found

    def assign(self, band: np.ndarray, wavelength: np.ndarray) -> np.ndarray:
        """Return the channel that each wavelength lies in.

        Parameters
        ----------
        band : (m,) int array
            0 for D1 to 5 for D6; others are in no channel.
        wavelength : (m,) float array
            In um.

        Returns
        -------
        (m,) int array
            Index of a channel, -1 where there is none. Where two channels of a detector
            overlap, the middle of the overlap divides them.
        """
        band, wavelength = np.asarray(band), np.asarray(wavelength, float)
        channel = np.full(len(wavelength), -1, np.int64)
        for number, (first, edges) in self._edges.items():
            mine = np.flatnonzero(band == number)
            place = np.searchsorted(edges, wavelength[mine], side="right") - 1
            # The last edge belongs to the last channel; NaN sorts behind it.
            place[wavelength[mine] == edges[-1]] = len(edges) - 2
            is_inside = (place >= 0) & (place < len(edges) - 1)
            channel[mine[is_inside]] = first + place[is_inside]
        return channel


def read_channels(source: str | os.PathLike[str] | BinaryIO, token: str) -> Channels:
    """Read a spectral_channels product.

    Parameters
    ----------
    source : path or file
        FITS, compressed by gzip or not.
    token : str
        Its name, such as ``cal-sch-v1-2026-106``.

    Returns
    -------
    Channels

    Raises
    ------
    InputError
        If it is anything else.
    """
    from astropy.io import fits

    names = ("DETECTOR", "SUBCHAN", "WAVELENGTH", "WL_MIN", "WL_MAX", "BANDWIDTH")
    try:
        with fits.open(source, memmap=False) as file:
            rows = file[EXTENSION].data
            detector, subchannel, centre, low, high, width = (
                np.asarray(rows[name], float) for name in names
            )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{token} is no product of spectral channels: {error}") from error
    order = np.lexsort((centre, detector))
    found = Channels(
        band=detector[order].astype(np.int64) - 1,
        subchannel=subchannel[order].astype(np.int64),
        wavelength=centre[order],
        wavelength_min=low[order],
        wavelength_max=high[order],
        bandwidth=width[order],
        token=token,
    )
    is_right = (
        len(found) > 0
        and np.isin(found.band, range(len(BANDS))).all()
        and (found.wavelength_min < found.wavelength).all()
        and (found.wavelength < found.wavelength_max).all()
        and (found.wavelength_min > 0.5).all()
        and (found.wavelength_max < 6.0).all()
    )
    if not is_right:
        raise InputError(
            f"{token} is no product of spectral channels: its wavelengths are not those of SPHEREx"
        )
    return found


# Centre, edges and width of each, um: the product cal-sch-v1-2026-106 of the archive (NASA, CC0).
_PUBLISHED = (
    # D1
    (0.753, 0.743, 0.762, 0.018), (0.771, 0.761, 0.781, 0.019), (0.790, 0.780, 0.800, 0.019),
    (0.809, 0.798, 0.819, 0.020), (0.828, 0.817, 0.839, 0.020), (0.848, 0.837, 0.859, 0.021),
    (0.868, 0.857, 0.879, 0.022), (0.889, 0.877, 0.900, 0.023), (0.910, 0.898, 0.922, 0.023),
    (0.932, 0.920, 0.944, 0.024), (0.955, 0.942, 0.967, 0.025), (0.978, 0.964, 0.990, 0.026),
    (1.001, 0.988, 1.014, 0.026), (1.025, 1.012, 1.039, 0.027), (1.050, 1.036, 1.064, 0.028),
    (1.075, 1.061, 1.090, 0.029), (1.102, 1.086, 1.116, 0.030),
    # D2
    (1.113, 1.099, 1.126, 0.026), (1.139, 1.125, 1.153, 0.027), (1.167, 1.152, 1.182, 0.028),
    (1.195, 1.180, 1.210, 0.029), (1.224, 1.209, 1.240, 0.030), (1.254, 1.238, 1.269, 0.030),
    (1.284, 1.267, 1.300, 0.031), (1.315, 1.298, 1.331, 0.032), (1.346, 1.329, 1.363, 0.032),
    (1.378, 1.360, 1.396, 0.033), (1.412, 1.393, 1.430, 0.034), (1.446, 1.426, 1.464, 0.035),
    (1.481, 1.461, 1.500, 0.036), (1.517, 1.496, 1.537, 0.037), (1.554, 1.533, 1.575, 0.038),
    (1.592, 1.570, 1.613, 0.039), (1.631, 1.608, 1.651, 0.039),
    # D3
    (1.656, 1.636, 1.676, 0.039), (1.695, 1.675, 1.715, 0.041), (1.735, 1.714, 1.756, 0.042),
    (1.775, 1.754, 1.797, 0.043), (1.818, 1.795, 1.840, 0.045), (1.861, 1.838, 1.884, 0.046),
    (1.905, 1.881, 1.928, 0.047), (1.949, 1.925, 1.973, 0.048), (1.995, 1.970, 2.019, 0.049),
    (2.041, 2.015, 2.067, 0.051), (2.089, 2.062, 2.115, 0.052), (2.139, 2.111, 2.166, 0.054),
    (2.189, 2.160, 2.216, 0.055), (2.240, 2.211, 2.268, 0.056), (2.292, 2.262, 2.321, 0.057),
    (2.345, 2.314, 2.375, 0.058), (2.399, 2.367, 2.440, 0.059),
    # D4
    (2.445, 2.422, 2.474, 0.058), (2.506, 2.470, 2.542, 0.073), (2.575, 2.538, 2.612, 0.074),
    (2.646, 2.607, 2.684, 0.076), (2.719, 2.678, 2.758, 0.078), (2.794, 2.752, 2.835, 0.079),
    (2.871, 2.828, 2.914, 0.084), (2.951, 2.906, 2.995, 0.086), (3.033, 2.985, 3.079, 0.089),
    (3.118, 3.069, 3.164, 0.091), (3.204, 3.155, 3.252, 0.093), (3.293, 3.242, 3.342, 0.094),
    (3.383, 3.330, 3.434, 0.096), (3.476, 3.422, 3.528, 0.098), (3.570, 3.514, 3.624, 0.099),
    (3.667, 3.610, 3.723, 0.102), (3.768, 3.707, 3.827, 0.103),
    # D5
    (3.827, 3.808, 3.845, 0.035), (3.861, 3.843, 3.879, 0.036), (3.895, 3.876, 3.913, 0.036),
    (3.929, 3.910, 3.947, 0.036), (3.964, 3.944, 3.982, 0.036), (3.999, 3.979, 4.018, 0.036),
    (4.034, 4.014, 4.053, 0.037), (4.070, 4.049, 4.089, 0.037), (4.106, 4.085, 4.125, 0.037),
    (4.142, 4.120, 4.161, 0.037), (4.178, 4.156, 4.197, 0.037), (4.214, 4.193, 4.234, 0.037),
    (4.251, 4.229, 4.271, 0.037), (4.288, 4.265, 4.307, 0.037), (4.325, 4.302, 4.345, 0.037),
    (4.362, 4.339, 4.382, 0.038), (4.399, 4.376, 4.420, 0.038),
    # D6
    (4.429, 4.412, 4.446, 0.035), (4.461, 4.444, 4.478, 0.036), (4.494, 4.476, 4.511, 0.035),
    (4.527, 4.509, 4.544, 0.036), (4.560, 4.542, 4.578, 0.036), (4.594, 4.576, 4.612, 0.037),
    (4.629, 4.609, 4.647, 0.036), (4.663, 4.643, 4.682, 0.037), (4.698, 4.678, 4.717, 0.037),
    (4.733, 4.713, 4.752, 0.037), (4.767, 4.747, 4.786, 0.036), (4.802, 4.782, 4.821, 0.036),
    (4.837, 4.816, 4.856, 0.037), (4.873, 4.851, 4.893, 0.038), (4.909, 4.887, 4.930, 0.038),
    (4.945, 4.924, 4.966, 0.037), (4.982, 4.960, 5.003, 0.037),
)  # fmt: skip
_CENTRE, _LOW, _HIGH, _WIDTH = np.array(_PUBLISHED).T
PUBLISHED_CHANNELS = Channels(
    band=np.repeat(np.arange(len(BANDS)), SUBCHANNELS),
    subchannel=np.tile(np.arange(1, SUBCHANNELS + 1), len(BANDS)),
    wavelength=_CENTRE,
    wavelength_min=_LOW,
    wavelength_max=_HIGH,
    bandwidth=_WIDTH,
)
