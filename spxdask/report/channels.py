"""The 102 spectral channels, 17 a band, which rows are counted in."""

from __future__ import annotations

import numpy as np

__all__ = ["BANDS", "CHANNELS_PER_BAND", "CHANNEL_WIDTHS", "find_channels", "list_channels"]

BANDS = ("D1", "D2", "D3", "D4", "D5", "D6")
CHANNELS_PER_BAND = 17
# First and last wavelength of the channels of each band, um, as the archive's product
# spectral_channels (cal-sch-v1-2026-106) has them. Within a band, the steps are about equal in the
# logarithm; neighbouring channels overlap by a few nm.
_LIMITS_UM = np.array(
    [
        (0.743, 1.116),
        (1.099, 1.651),
        (1.636, 2.440),
        (2.422, 3.827),
        (3.808, 4.420),
        (4.412, 5.003),
    ]
)
_LOG_LIMITS = np.log(_LIMITS_UM)
# Width of a channel of each band, in the logarithm of the wavelength.
CHANNEL_WIDTHS = (_LOG_LIMITS[:, 1] - _LOG_LIMITS[:, 0]) / CHANNELS_PER_BAND


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
        0 to 16 within the band; -1 where the wavelength is not finite. Those outside of the band
        count for its first or last channel.
    """
    is_known = np.isfinite(wavelength) & (wavelength > 0)
    steps = np.log(np.where(is_known, wavelength, 1.0)) - _LOG_LIMITS[band, 0]
    number = np.clip(np.floor(steps / CHANNEL_WIDTHS[band]), 0, CHANNELS_PER_BAND - 1)
    return np.where(is_known, number, -1).astype(np.int64)


def list_channels() -> list[tuple[str, int, float]]:
    """List the channels.

    Returns
    -------
    list of (str, int, float)
        Band, number from 1 and central wavelength, um.
    """
    numbers = np.arange(CHANNELS_PER_BAND)
    return [
        (band, int(number) + 1, float(np.exp(_LOG_LIMITS[i, 0] + (number + 0.5) * width)))
        for i, (band, width) in enumerate(zip(BANDS, CHANNEL_WIDTHS, strict=True))
        for number in numbers
    ]
