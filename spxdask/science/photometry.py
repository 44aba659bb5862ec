"""Aperture photometry of many sources in one frame, and what each number means.

Brightness is in uJy/arcsec^2 once read, fluxes are in uJy, x and y are 0-based pixel
coordinates with (0, 0) at the centre of the first pixel, "bad" means one of the
configured flag bits.

- **Variance**: an invalid one (not finite, not positive) of a flagged pixel is replaced
  by the median valid variance of the frame; with no flag, the pixel counts as bad.
- **Zodiacal light**: I' = I - s ZODI with s = sum(w I Z) / sum(w Z^2), w = 1/variance,
  over finite pixels without bad and SOURCE bits. s = 1 when fewer than half of the
  pixels are free of these bits or the fit is outside (zodi_scale_min, zodi_scale_max].
- **Background**: median, after clipping about the mean, of usable pixels in a window or
  an annulus; its error is their standard deviation / sqrt(number before clipping). A
  round of clipping that would leave no pixel is not done.
- **Flux**: exact-fraction sum of I' in the circle minus background x pi r^2, times the
  pixel area; the error adds the variances so summed and (background error x pi r^2)^2.
  Both are NaN when a pixel inside is not finite, or the circle leaves the frame.
- **Magnitude**: AB, -2.5 log10(f_nu / (erg s^-1 cm^-2 Hz^-1)) - 48.6.
- **Flag**: bitwise OR over pixels whose centre is within r.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import astropy.units as u
import numpy as np

from spxdask.errors import FrameError
from spxdask.science import kernels
from spxdask.science.level2.frame import Frame
from spxdask.science.options import PhotometryConfig

# From the planes' MJy/sr to uJy/arcsec^2.
UJY_PER_ARCSEC2 = (1.0 * u.MJy / u.sr).to_value(u.uJy / u.arcsec**2)
# AB magnitude of 1 uJy, which is 1e-29 erg/s/cm2/Hz: 2.5 x 29 - 48.6.
AB_ZERO_POINT_UJY = 23.9
FWHM_FALLBACK_ARCSEC = 6.0
# SPHEREx pixels are 6.15 arcsec; a header that says something outside this says nothing.
USABLE_SCALE_ARCSEC = (1.0, 60.0)
# Sources are measured in bands of this many rows, from left to right.
TILE_ROWS = 32

MEASURED = (
    "x",
    "y",
    "flux",
    "flux_error",
    "mag_ab",
    "mag_ab_error",
    "wavelength",
    "bandwidth",
    "flag",
    "bg_level",
    "bg_error",
    "aperture_radius",
)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a frame gave.

    Attributes
    ----------
    index : (n,) int array
        Which of the given positions each row is of, in their order.
    columns : dict of str to (n,) array
        One array for each name in `MEASURED`, in their order. Pixels, uJy, AB mag, um,
        uJy/arcsec^2; `flag` is int64; NaN where a number is missing.
    radius : float
        Of the aperture, pixels.
    zodi_scale : float
        The scale that ZODI was subtracted with; 0 when it was not.
    skipped : dict of str to int
        Sources on the frame without a row, by reason.
    warnings : tuple of str
        Repairs and fallbacks a user should know of.
    """

    index: np.ndarray
    columns: dict[str, np.ndarray]
    radius: float
    zodi_scale: float
    skipped: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def margin(config: PhotometryConfig) -> float:
    """Return the distance in pixels that a source must keep from every edge."""
    height, width = config.window_shape
    return float(
        max(config.aperture_diameter / 2, config.max_outer_radius, height // 2 + 1, width // 2 + 1)
    )


def on_frame(frame: Frame, ra, dec, config: PhotometryConfig):
    """Find the sources that truly lie on a frame.

    Parameters
    ----------
    frame : Frame
    ra, dec : (n,) float array
        ICRS, deg. They must lie within `frame.cap`: farther away, the projection can
        put a source on the detector that is not there.
    config : PhotometryConfig
        Its margin to the edges is kept.

    Returns
    -------
    index : (m,) int array
        Which sources are on the frame.
    x, y : (m,) float array
        Their 0-based pixel positions.
    """
    ny, nx = frame.shape
    m = margin(config)
    x, y = frame.wcs.sky_to_pixel(ra, dec)
    index = np.flatnonzero((x >= m) & (x < nx - m) & (y >= m) & (y < ny - m))
    return index, x[index], y[index]


def measure(frame: Frame, ra, dec, config: PhotometryConfig) -> Measurement:
    """Measure every given source that lies on a frame.

    Parameters
    ----------
    frame : Frame
    ra, dec : (n,) float array
        ICRS, deg, within `frame.cap`.
    config : PhotometryConfig

    Returns
    -------
    Measurement
        One row a source with a background, in the order given.

    Raises
    ------
    FrameError
        If no pixel of the frame has a value, or none a variance.
    """
    warnings = list(frame.warnings)
    pixel_area = frame.wcs.pixel_area_arcsec2
    if not USABLE_SCALE_ARCSEC[0] <= math.sqrt(pixel_area) <= USABLE_SCALE_ARCSEC[1]:
        warnings.append(
            f"pixel scale of {math.sqrt(pixel_area):.4g} arcsec is not usable, "
            f"{config.pixel_scale_fallback} arcsec taken"
        )
        pixel_area = config.pixel_scale_fallback**2
    radius = _aperture_radius(frame, math.sqrt(pixel_area), config, warnings)

    words = [_words(p) for p in (frame.image, frame.variance, frame.zodi, frame.flags)]
    bad = _mask(config.bad_flags)
    source = _mask([frame.flag_bits["SOURCE"]])
    # Most frames need no median, which costs as much as the rest of a small catalogue.
    median_variance = functools.cache(lambda: kernels.positive_median(words[1]))
    scale, unflagged = _zodi_scale(frame, words, bad | source, median_variance, config)
    if unflagged:
        warnings.append(f"{unflagged} unflagged pixels with an invalid variance taken as bad")

    index, x, y = on_frame(frame, ra, dec, config)

    def measure_some(some: np.ndarray, median: float) -> list[np.ndarray]:
        # Neighbours one after the other, as they look at the same pixels.
        order = some[np.lexsort((x[some], y[some] // TILE_ROWS))]
        results = _measure_sources(
            words, x[order], y[order], radius, scale, median, bad, source, unflagged > 0, config
        )
        back = np.argsort(order)
        return [result[back] for result in results]

    sums, flag, repaired = measure_some(np.arange(len(index)), math.nan)
    if repaired.any():
        again = np.flatnonzero(repaired)
        sums[again] = measure_some(again, median_variance())[0]

    kept = np.flatnonzero(~np.isnan(sums[:, 2]))
    skipped = {}
    if len(kept) < len(index):
        skipped["too few usable background pixels"] = len(index) - len(kept)
    index, x, y, flag = index[kept], x[kept], y[kept], flag[kept]
    total, variance, level, level_error = sums[kept].T

    circle = math.pi * radius**2
    flux = (total - level * circle) * pixel_area
    flux_error = np.sqrt(variance + (level_error * circle) ** 2) * pixel_area
    magnitude, magnitude_error = ab_magnitude(flux, flux_error)
    wavelength, bandwidth = frame.wavelength_at(x, y)
    values = (
        x,
        y,
        flux,
        flux_error,
        magnitude,
        magnitude_error,
        wavelength,
        bandwidth,
        flag.astype(np.int64),
        level,
        level_error,
        np.full(len(index), radius),
    )
    return Measurement(
        index=index,
        columns=dict(zip(MEASURED, values, strict=True)),
        radius=radius,
        zodi_scale=scale,
        skipped=skipped,
        warnings=tuple(warnings),
    )


def ab_magnitude(flux, flux_error) -> tuple[np.ndarray, np.ndarray]:
    """Return AB magnitudes and errors of fluxes in uJy; NaN where a flux is not positive."""
    flux = np.where(np.asarray(flux, float) > 0, flux, np.nan)
    magnitude = AB_ZERO_POINT_UJY - 2.5 * np.log10(flux)
    return magnitude, 2.5 / math.log(10) * flux_error / flux


def _aperture_radius(frame: Frame, pixel_scale: float, config, warnings: list[str]) -> float:
    if config.aperture_method == "fixed":
        return config.aperture_diameter / 2
    fwhm = frame.psf_fwhm
    if fwhm is None:
        fwhm = FWHM_FALLBACK_ARCSEC
        warnings.append(f"no usable PSF_FWHM, {FWHM_FALLBACK_ARCSEC} arcsec taken")
    return fwhm / pixel_scale * config.fwhm_multiplier / 2


def _words(plane: np.ndarray) -> np.ndarray:
    words = np.asarray(plane).view("<u4")
    # Like those of a mapped file, so that one compiled form serves all.
    words.flags.writeable = False
    return words


def _mask(bits: list[int]) -> np.uint32:
    return np.uint32(sum(1 << bit for bit in bits))


def _zodi_scale(frame: Frame, words, excluded, median_variance, config) -> tuple[float, int]:
    """Scale of ZODI (0 when it is not subtracted), and the count of unflagged bad variances."""
    izw, zzw, iz, zz, clear, unflagged, finite, valid = kernels.zodi_sums(*words, excluded)
    if not finite:
        raise FrameError("IMAGE has no finite pixel")
    if not valid:
        raise FrameError("VARIANCE has no finite positive pixel")
    if not config.subtract_zodi:
        return 0.0, unflagged
    if zz > 0:
        weight = 1.0 / median_variance()
        izw, zzw = izw + weight * iz, zzw + weight * zz
    scale = izw / zzw if zzw > 0 else math.nan
    if 2 * clear < frame.image.size or not config.zodi_scale_min < scale <= config.zodi_scale_max:
        scale = 1.0
    return scale, unflagged


def _measure_sources(words, x, y, radius, scale, median, bad, source, check, config):
    height, width = config.window_shape
    annulus = np.empty(0)
    if config.background_method == "annulus":
        inner = radius + config.annulus_inner_offset
        outer = min(
            math.sqrt(config.min_annulus_area / math.pi + inner**2), config.max_outer_radius
        )
        annulus = np.array(
            [
                inner,
                outer,
                config.max_outer_radius,
                config.annulus_expansion_step,
                config.max_annulus_attempts,
            ]
        )
    image, variance, zodi, flags = words
    return kernels.measure_sources(
        image,
        variance,
        # Nothing of ZODI, not even its NaNs, when it is not subtracted.
        zodi if config.subtract_zodi else image,
        flags,
        x,
        y,
        radius,
        scale,
        UJY_PER_ARCSEC2,
        median,
        bad,
        source,
        check,
        config.min_usable_pixels,
        config.bg_sigma_clip_sigma,
        config.bg_sigma_clip_maxiters,
        float(height),
        float(width),
        annulus,
    )
