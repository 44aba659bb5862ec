"""The channels that rows are counted in: those of `spxdask.science.channels`, band by band."""

from __future__ import annotations

import numpy as np

from spxdask.science.channels import BANDS, PUBLISHED_CHANNELS, SUBCHANNELS

__all__ = ["BANDS", "CHANNELS_PER_BAND", "CHANNEL_WIDTHS", "find_channels", "list_channels"]

CHANNELS_PER_BAND = SUBCHANNELS
_LOWEST = PUBLISHED_CHANNELS.wavelength_min[::SUBCHANNELS]
_HIGHEST = PUBLISHED_CHANNELS.wavelength_max[SUBCHANNELS - 1 :: SUBCHANNELS]
# Mean width of a channel of each band, in the logarithm of the wavelength.
CHANNEL_WIDTHS = np.log(_HIGHEST / _LOWEST) / SUBCHANNELS


def find_channels(band: np.ndarray, wavelength: np.ndarray) -> np.ndarray:
    """Return the channel that each wavelength is in.

    Parameters
    ----------
    band : (n,) int array
        0 for D1 to 5 for D6.
    wavelength : (n,) float array
        In um.

    Returns
    -------
    (n,) int array
        0 to 16 within the band; -1 where the wavelength is not finite or not positive. Those
        outside of the band count for its first or last channel.
    """
    known = np.where(np.isfinite(wavelength) & (wavelength > 0), wavelength, np.nan)
    channel = PUBLISHED_CHANNELS.assign(band, np.clip(known, _LOWEST[band], _HIGHEST[band]))
    return np.where(channel < 0, -1, channel - SUBCHANNELS * band)


def list_channels() -> list[tuple[str, int, float]]:
    """List the channels.

    Returns
    -------
    list of (str, int, float)
        Band, number from 1 and central wavelength, um.
    """
    c = PUBLISHED_CHANNELS
    return [
        (BANDS[band], number, centre)
        for band, number, centre in zip(
            c.band.tolist(), c.subchannel.tolist(), c.wavelength.tolist(), strict=True
        )
    ]
