"""The photometry of a frame computed independently: whole planes, numpy and photutils.

It is slow and follows the definitions literally, so that both can be read side by side. It
shares only the configuration with the package; planes are given in MJy/sr, native floats.
"""

from __future__ import annotations

import math

import astropy.units as u
import numpy as np
from astropy.stats import SigmaClip
from photutils.aperture import CircularAperture

UNIT = (1 * u.MJy / u.sr).to_value(u.uJy / u.arcsec**2)


def measure(
    image,
    variance,
    zodi,
    flags,
    x,
    y,
    *,
    solid_angle,
    pixel_scale,
    fwhm,
    wavelengths,
    config,
    source_bit=21,
):
    """Return a dict for each source, None for one without a row, and the zodiacal scale.

    Each source has a solid angle of its pixel, arcsec^2; the pixel scale is in arcsec.
    """
    image, variance, zodi = (np.asarray(p, float) for p in (image, variance, zodi))
    flags = np.asarray(flags).astype(np.int64)
    bad = (flags & sum(1 << b for b in config.bad_flags)) != 0
    source = (flags & (1 << source_bit)) != 0

    invalid = ~(np.isfinite(variance) & (variance > 0))
    clear = ~bad & ~source
    variance = variance.copy()
    variance[invalid & (flags != 0)] = np.median(variance[~invalid])
    variance[invalid & (flags == 0)] = np.nan
    bad |= invalid & (flags == 0)

    scale = 0.0
    if config.subtract_zodi:
        use = ~bad & ~source & np.isfinite(image) & np.isfinite(zodi) & (zodi != 0)
        w = 1 / variance[use]
        with np.errstate(invalid="ignore"):
            scale = np.sum(w * image[use] * zodi[use]) / np.sum(w * zodi[use] ** 2)
        if clear.mean() < 0.5 or not config.zodi_scale_min < scale <= config.zodi_scale_max:
            scale = 1.0
        image = image - scale * zodi
    image, variance = image * UNIT, variance * UNIT**2

    if config.aperture_method == "fixed":
        r = config.aperture_diameter / 2
    else:
        r = fwhm / pixel_scale * config.fwhm_multiplier / 2
    rows = []
    for xs, ys, area in zip(x, y, solid_angle, strict=True):
        rows.append(_one(image, variance, flags, bad, source, xs, ys, r, area, wavelengths, config))
    return rows, scale


def _one(image, variance, flags, bad, source, x, y, r, pixel_area, wavelengths, config):
    yy, xx = np.indices(image.shape)
    distance = np.hypot(xx - x, yy - y)
    good = ~bad & np.isfinite(image)
    need = config.min_usable_pixels
    if config.background_method == "window":
        h, w = config.window_shape
        region = (yy >= math.floor(y - h / 2)) & (yy <= math.ceil(y + h / 2) - 1)
        region &= (xx >= math.floor(x - w / 2)) & (xx <= math.ceil(x + w / 2) - 1)
        region &= distance > r + 0.707
    else:
        inner = r + config.annulus_inner_offset
        outer = math.sqrt(config.min_annulus_area / math.pi + inner**2)
        outer = min(outer, config.max_outer_radius)
        for _ in range(config.max_annulus_attempts):
            if (good & ~source & (distance >= inner) & (distance < outer)).sum() >= need:
                break
            outer = min(outer + config.annulus_expansion_step, config.max_outer_radius)
        region = (distance >= inner) & (distance < outer)
    values = image[region & good & ~source]
    if len(values) < need:
        values = image[region & good]
    if len(values) < need:
        return None
    clip = SigmaClip(
        sigma=config.bg_sigma_clip_sigma,
        maxiters=config.bg_sigma_clip_maxiters,
        cenfunc="mean",
        stdfunc="std",
    )
    left = clip(values, masked=False) if config.bg_sigma_clip_maxiters else values
    level, level_error = np.median(left), np.std(left) / math.sqrt(len(values))

    mask = CircularAperture((x, y), r).to_mask(method="exact")
    weights = mask.to_image(image.shape)
    inside = weights > 0
    flux = (np.sum(weights[inside] * image[inside]) - level * math.pi * r**2) * pixel_area
    error = pixel_area * math.sqrt(
        np.sum(weights[inside] * variance[inside]) + (level_error * math.pi * r**2) ** 2
    )
    if not (math.isfinite(flux) and math.isfinite(error)):
        flux = error = math.nan
    with np.errstate(invalid="ignore", divide="ignore"):
        cgs = (flux * u.uJy).to_value(u.erg / u.s / u.cm**2 / u.Hz)
        mag = -2.5 * np.log10(cgs) - 48.6 if flux > 0 else math.nan
        mag_error = 2.5 / math.log(10) * error / flux if flux > 0 else math.nan
    wavelength, bandwidth = wavelengths(x, y)
    return {
        "x": x,
        "y": y,
        "flux": flux,
        "flux_error": error,
        "mag_ab": mag,
        "mag_ab_error": mag_error,
        "wavelength": wavelength,
        "bandwidth": bandwidth,
        "flag": np.bitwise_or.reduce(flags[distance <= r]),
        "bg_level": level,
        "bg_error": level_error,
        "aperture_radius": r,
    }
