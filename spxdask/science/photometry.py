"""Aperture photometry of many sources in one frame, and what each number means.

Brightness is in uJy/arcsec^2 once read, fluxes are in uJy, x and y are 0-based pixel
coordinates with (0, 0) at the centre of the first pixel, r is the radius of the aperture,
and "bad" means that a pixel has one of the configured flag bits.

- **Variance**: an invalid one (not finite, not positive) of a flagged pixel is replaced
  by the median valid variance of the frame; without any flag, the pixel counts as bad.
- **Zodiacal light**: I' = I - s ZODI with s = sum(w I Z) / sum(w Z^2), w = 1/variance,
  over finite pixels without bad and SOURCE bits. s = 1 when fewer than half of the
  pixels are free of these bits or the fit is outside (zodi_scale_min, zodi_scale_max].
- **Few rows**: in a frame that is read in parts, this fit and the median variance are from some
  bands of rows that are spread over the frame; from more of them, or from all, where the error of
  the scale would move a background by more than its error, or a flux by a thousandth of its.
  Everything else is as in a whole frame.
- **Background**: median, after clipping about the mean, of usable pixels in a window or
  an annulus; its error is their standard deviation / sqrt(number before clipping). A
  round of clipping that would leave no pixel is not done.
- **Flux**: exact-fraction sum of I' in the circle minus background x pi r^2, times the
  solid angle of the pixel at the source; the error adds the variances so summed and
  (background error x pi r^2)^2. Both are NaN when a pixel inside is not finite, or the
  circle leaves the frame.
- **Magnitude**: AB, -2.5 log10(f_nu / (erg s^-1 cm^-2 Hz^-1)) - 48.6.
- **Flag**: bitwise OR over pixels whose centre is within r.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from spxdask.errors import FrameError, MissingBytesError
from spxdask.science.calibration import NO_CALIBRATION, DetectorCalibration
from spxdask.science.flags import REJECTING_MASK
from spxdask.science.kernels.background import Masks, Region
from spxdask.science.kernels.pixels import Conversion, Planes
from spxdask.science.kernels.sources import measure_sources
from spxdask.science.kernels.statistics import Clipping
from spxdask.science.level2.frame import Frame
from spxdask.science.options import PhotometryConfig
from spxdask.science.psf.fit import Contaminants, choose_linked, measure_psf_fluxes
from spxdask.science.psf.model import PsfModel
from spxdask.science.psf.offsets import Astrometry, summarise_offsets
from spxdask.science.psf.product import read_frame_psf
from spxdask.science.rows import (
    Look,
    find_looks,
    find_spread_rows,
    find_stamp_rows,
    find_window_rows,
    require_rows,
)
from spxdask.science.zodi import ZodiFit, fit_zodi

# From the planes' MJy/sr to uJy/arcsec^2.
# A number, as every worker would need half a second to import astropy's units.
UJY_PER_ARCSEC2 = 23.50443053909789
# AB magnitude of 1 uJy, which is 1e-29 erg/s/cm2/Hz: 2.5 x 29 - 48.6.
AB_ZERO_POINT_UJY = 23.9
FWHM_FALLBACK_ARCSEC = 6.0
# SPHEREx pixels are 6.15 arcsec wide; a scale outside of these limits is an error in the header.
USABLE_SCALE_ARCSEC = (1.0, 60.0)
# The background window leaves out pixels whose centre is this close to the aperture, pixels:
# half the diagonal of a pixel.
WINDOW_GAP_PIXELS = 0.707
# A step of a flux that the scale from all rows might make, as a part of its error. It is half of
# what is promised, as PSF fluxes take somewhat larger steps.
LARGEST_FLUX_STEP = 5e-4
# Sources are measured in strips of this many rows, from left to right, so that neighbours,
# which need the same pixels, follow one another.
STRIP_ROWS = 32
# A source this far beyond an edge has light on the frame: half of a stamp of any PSF.
REACH_OF_CONTAMINANTS_PIXELS = 6.0
# Rows and columns of the stamps of a frame's own PSF, as long as it has not been read: those of a
# QR2 cube, the larger ones.
LARGEST_STAMP_PIXELS = 11


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured in a frame.

    Attributes
    ----------
    index : (n,) int array
        Which of the given positions each row belongs to, in their order.
    columns : dict of str to (n,) array
        One array for each measured column of `spxdask.tables.schema`, in its order and
        units; `flag` is int64; NaN where a number is missing.
    psf_columns : dict of str to (n,) array
        The same for the columns of PSF photometry; empty when there is none.
    radius : float
        Of the aperture, pixels.
    zodi_scale : float
        The scale that ZODI was subtracted with; 0 when it was not.
    is_zodi_fitted : bool
        Whether this scale was fitted.
    fit_rows : int
        Number of rows of pixels that this scale and the median variance are from.
    psf_name : str
        Which PSF was used, empty for none.
    psf_empty : dict of str to int
        Rows without a PSF flux, by reason.
    astrometry : Astrometry or None
        How far bright isolated stars are from their positions; None without a PSF or a row.
    skipped : dict of str to int
        Sources on the frame without a row, by reason.
    warnings : tuple of str
        Repairs and fallbacks a user should know of.
    """

    index: np.ndarray
    columns: dict[str, np.ndarray]
    radius: float
    zodi_scale: float
    is_zodi_fitted: bool = False
    fit_rows: int = 0
    psf_columns: dict[str, np.ndarray] = field(default_factory=dict)
    psf_name: str = ""
    psf_empty: dict[str, int] = field(default_factory=dict)
    astrometry: Astrometry | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def margin(config: PhotometryConfig) -> float:
    """Return the distance that a source must keep from every edge.

    Parameters
    ----------
    config : PhotometryConfig
        Its aperture, window and annulus.

    Returns
    -------
    float
        Pixels.
    """
    height, width = config.window_shape
    return float(
        max(config.aperture_diameter / 2, config.max_outer_radius, height // 2 + 1, width // 2 + 1)
    )


def on_frame(
    frame: Frame, ra: np.ndarray, dec: np.ndarray, config: PhotometryConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the sources that truly lie on a frame.

    Parameters
    ----------
    frame : Frame
        The frame.
    ra, dec : (n,) float array
        ICRS, deg. They must lie within `frame.bounding_circle`: farther away, the
        projection can put a source on the detector that is not there.
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


def measure(
    frame: Frame,
    ra: np.ndarray,
    dec: np.ndarray,
    config: PhotometryConfig,
    calibration: DetectorCalibration = NO_CALIBRATION,
    contaminants: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    few_rows: bool = False,
) -> Measurement:
    """Measure every given source that lies on a frame.

    Parameters
    ----------
    frame : Frame
        The frame.
    ra, dec : (n,) float array
        ICRS, deg, within `frame.bounding_circle`.
    config : PhotometryConfig
        How a source is measured.
    calibration : DetectorCalibration, optional
        Calibration products; by default the frame's own values are used.
    contaminants : ((m,) float array, (m,) float array), optional
        ICRS ra and dec, deg, of sources that take part in the solution for the PSF fluxes, and
        get no rows.
    few_rows : bool
        Whether the scale of zodiacal light and the median variance are from a few bands of rows
        (and more of them if these do not tell enough for these sources), and not from all. The
        results are then the same of a whole frame and of one that has these rows alone, to the
        bit. Without a source, nothing is read: the head of a frame will do.

    Returns
    -------
    Measurement
        One row a source with a background, in the order given.

    Raises
    ------
    FrameError
        If no pixel of the frame has a finite value, or none a valid variance.
    MissingRowsError
        If a row is needed that the frame does not have.
    MissingBytesError
        If the frame's own PSF is needed, and was not read.
    """
    planes = _view_planes(frame, calibration.factors_of(frame.shape, frame.origin))
    return _measure_planes(planes, frame, ra, dec, config, calibration, contaminants, few_rows)


def find_needed_rows(
    head: Frame,
    ra: np.ndarray,
    dec: np.ndarray,
    config: PhotometryConfig,
    calibration: DetectorCalibration = NO_CALIBRATION,
    contaminants: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Return the rows that `measure` will read, given the same arguments and `few_rows`.

    Parameters
    ----------
    head : Frame
        The frame, or only its head (`spxdask.science.level2.frame.open_head`).
    ra, dec : (n,) float array
        ICRS, deg, within `head.bounding_circle`.
    config : PhotometryConfig
        How a source is measured.
    calibration : DetectorCalibration, optional
        Calibration products.
    contaminants : ((m,) float array, (m,) float array), optional
        More sources of the solution for PSF fluxes.

    Returns
    -------
    (ny,) bool array
        Those of windows or annuli with all that they may grow to, of apertures, of the stamps of
        the solution, and some spread over the frame for the fit of the zodiacal light. None when
        no source is on the frame. `measure` needs more only if these do not tell enough of the
        zodiacal light, or the frame's own PSF has larger stamps than those of the archive.
    """
    ny, _ = head.shape
    radius = _choose_aperture_radius(head, _choose_pixel_scale(head, config, []), config, [])
    _, x, y = on_frame(head, ra, dec, config)
    if not len(x):
        return np.zeros(ny, bool)
    rows = find_spread_rows(ny)
    rows |= find_window_rows(ny, y, radius, _make_region(radius, config))
    if config.psf != "none":
        size = _guess_stamp_size(calibration)
        others = _find_others(head, ra, dec, contaminants, size, radius, config)
        rows |= find_stamp_rows(ny, np.append(y, others.y), size)
    return rows


def _measure_planes(
    planes: Planes,
    frame: Frame,
    ra: np.ndarray,
    dec: np.ndarray,
    config: PhotometryConfig,
    calibration: DetectorCalibration,
    contaminants: tuple[np.ndarray, np.ndarray] | None,
    few_rows: bool,
) -> Measurement:
    """Measure sources on planes, whose factors are those of the present flux scale."""
    ny, _ = frame.shape
    warnings = list(frame.warnings)
    pixel_scale = _choose_pixel_scale(frame, config, warnings)
    radius = _choose_aperture_radius(frame, pixel_scale, config, warnings)

    index, x, y = on_frame(frame, ra, dec, config)
    model: PsfModel | None = None
    psf_name, others = "", NO_CONTAMINANTS
    psf_warnings: list[str] = []
    # In a frame that may have no more than its head, a PSF is read if there is a source for it.
    if config.psf != "none" and (len(index) or not few_rows):
        size = _guess_stamp_size(calibration)
        while True:
            others = _find_others(frame, ra, dec, contaminants, size, radius, config)
            at = np.append(x, others.x), np.append(y, others.y)
            psf_warnings.clear()
            model, psf_name = choose_psf(frame, calibration, *at, config, psf_warnings)
            if model is None or model.size <= size:
                break
            size = model.size
    if not config.subtract_zodi:
        # Nothing of ZODI may enter, not even its NaNs.
        planes = planes._replace(zodi=planes.image)
    if few_rows and not len(index):
        zodi, sums, flag = _skip_zodi(config), np.empty((0, 4)), np.empty(0, np.uint32)
    else:
        looks, rows = find_looks(ny), np.zeros(ny, bool)
        if not few_rows:
            looks = looks[-1:]
        else:
            rows |= find_window_rows(ny, y, radius, _make_region(radius, config))
            if model is not None:
                rows |= find_stamp_rows(ny, np.append(y, others.y), model.size)
        zodi, sums, flag = _look_and_sum(planes, frame, x, y, radius, rows, looks, config)
    if zodi.unflagged:
        warnings.append(
            f"{zodi.unflagged} unflagged pixels with an invalid variance, treated as bad"
        )

    kept = np.flatnonzero(~np.isnan(sums[:, 2]))
    skipped = {}
    if len(kept) < len(index):
        skipped["too few usable background pixels"] = len(index) - len(kept)
        without = np.isnan(sums[:, 2])
        others = _add_others(others, x[without], y[without])
    index, x, y = index[kept], x[kept], y[kept]
    total, variance, level, level_error = sums[kept].T

    solid_angle = find_solid_angles(frame, calibration, x, y, warnings)
    circle = math.pi * radius**2
    flux = (total - level * circle) * solid_angle
    flux_error = np.sqrt(variance + (level_error * circle) ** 2) * solid_angle
    magnitude, magnitude_error = ab_magnitude(flux, flux_error)
    wavelength, bandwidth = _find_wavelengths(frame, calibration, x, y, warnings)
    psf_columns: dict[str, np.ndarray] = {}
    psf_empty: dict[str, int] = {}
    astrometry = None
    if config.psf != "none":
        warnings += psf_warnings
        found = None
        if model is not None:
            found = measure_psf_fluxes(
                planes,
                Conversion(zodi.scale, UJY_PER_ARCSEC2, math.nan),
                model,
                x,
                y,
                level=level,
                level_error=level_error,
                radius=radius,
                solid_angle=solid_angle,
                bad=int(_mask(config.bad_flags)),
                psf_bad=int(_mask(config.psf_bad_flags)),
                is_star=flag[kept] & REJECTING_MASK == 0,
                contaminants=others,
                origin=frame.origin,
            )
            psf_empty = found.empty
            astrometry = summarise_offsets(found.offsets) if len(x) else None
        psf_columns = {
            name: np.full(len(x), np.nan) if found is None else getattr(found, attribute)
            for name, attribute in _PSF_COLUMNS.items()
        }
    return Measurement(
        index=index,
        columns={
            "x": x,
            "y": y,
            "flux": flux,
            "flux_error": flux_error,
            "mag_ab": magnitude,
            "mag_ab_error": magnitude_error,
            "wavelength": wavelength,
            "bandwidth": bandwidth,
            "flag": flag[kept].astype(np.int64),
            "bg_level": level,
            "bg_error": level_error,
            "aperture_radius": np.full(len(index), radius),
        },
        psf_columns=psf_columns,
        radius=radius,
        zodi_scale=zodi.scale,
        is_zodi_fitted=zodi.is_fitted,
        fit_rows=zodi.n_rows,
        psf_name=psf_name,
        skipped=skipped,
        psf_empty=psf_empty,
        astrometry=astrometry,
        warnings=tuple(warnings),
    )


_PSF_COLUMNS = {
    "aperture_correction": "aperture_correction",
    "psf_flux": "flux",
    "psf_flux_error": "flux_error",
    "psf_chi2": "chi2",
    "psf_fraction": "fraction",
    "neighbour_flux": "neighbour_flux",
    "bad_fraction": "bad_fraction",
}


def ab_magnitude(flux: np.ndarray, flux_error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert fluxes to AB magnitudes.

    Parameters
    ----------
    flux, flux_error : (n,) float array
        In uJy.

    Returns
    -------
    magnitude, magnitude_error : (n,) float array
        NaN where the flux is not positive.
    """
    flux = np.where(np.asarray(flux, float) > 0, flux, np.nan)
    magnitude = AB_ZERO_POINT_UJY - 2.5 * np.log10(flux)
    return magnitude, 2.5 / math.log(10) * flux_error / flux


def _choose_pixel_scale(frame: Frame, config: PhotometryConfig, warnings: list[str]) -> float:
    """Return the scale at the centre in arcsec: the header's, or the fallback with a warning."""
    scale = frame.pixel_scale
    if USABLE_SCALE_ARCSEC[0] <= scale <= USABLE_SCALE_ARCSEC[1]:
        return scale
    warnings.append(
        f"pixel scale of {scale:.4g} arcsec is not usable, "
        f"used {config.pixel_scale_fallback} arcsec instead"
    )
    return config.pixel_scale_fallback


def find_solid_angles(
    frame: Frame,
    calibration: DetectorCalibration,
    x: np.ndarray,
    y: np.ndarray,
    warnings: list[str],
) -> np.ndarray:
    """Return the solid angle of the pixel at each source.

    Parameters
    ----------
    frame : Frame
        The frame.
    calibration : DetectorCalibration
        Calibration products; without a map, the projection of the frame is used.
    x, y : (n,) float array
        0-based pixel positions on the frame.
    warnings : list of str
        Fallbacks are appended.

    Returns
    -------
    (n,) float array
        arcsec^2.
    """
    own = frame.wcs.solid_angle_at
    found = calibration.solid_angle_at(x + frame.origin[0], y + frame.origin[1])
    if found is None:
        return own(x, y)
    missing = ~np.isfinite(found)
    if missing.any():
        found[missing] = own(x[missing], y[missing])
        warnings.append("the solid angle map has gaps at sources; the header's WCS was used there")
    return found


def _find_wavelengths(
    frame: Frame,
    calibration: DetectorCalibration,
    x: np.ndarray,
    y: np.ndarray,
    warnings: list[str],
) -> tuple[np.ndarray, np.ndarray]:
    """Return wavelength and bandwidth at each source, um."""
    found = calibration.wavelength_at(x + frame.origin[0], y + frame.origin[1])
    if found is None:
        return frame.wavelength_at(x, y)
    missing = ~(np.isfinite(found[0]) & np.isfinite(found[1]))
    if missing.any():
        own = frame.wavelength_at(x[missing], y[missing])
        found[0][missing], found[1][missing] = own
        warnings.append("the wavelength maps have gaps at sources; WCS-WAVE was used there")
    return found


NO_CONTAMINANTS = Contaminants(
    x=np.empty(0), y=np.empty(0), level=np.empty(0), level_error=np.empty(0)
)


def _find_others(
    frame: Frame,
    ra: np.ndarray,
    dec: np.ndarray,
    contaminants: tuple[np.ndarray, np.ndarray] | None,
    size: int,
    radius: float,
    config: PhotometryConfig,
) -> Contaminants:
    """Return the sources that are not to be measured and belong to the solution nevertheless.

    They are those at the edges, and contaminants, whose light is on the frame and whose stamps of
    `size` pixels are linked with one of a source that is measured, directly or through others.
    """
    index, row_x, row_y = on_frame(frame, ra, dec, config)
    without = np.ones(len(ra), bool)
    without[index] = False
    ra, dec = ra[without], dec[without]
    if contaminants is not None:
        ra, dec = np.append(ra, contaminants[0]), np.append(dec, contaminants[1])
    ny, nx = frame.shape
    x, y = frame.wcs.sky_to_pixel(ra, dec)
    reach = REACH_OF_CONTAMINANTS_PIXELS
    near = (x > -reach) & (x < nx + reach) & (y > -reach) & (y < ny + reach)
    x, y = x[near], y[near]
    linked = choose_linked(row_x, row_y, x, y, size, radius)
    return _add_others(NO_CONTAMINANTS, x[linked], y[linked])


def _add_others(others: Contaminants, x: np.ndarray, y: np.ndarray) -> Contaminants:
    """Return contaminants with more of them, whose background is not known, before the others."""
    unknown = np.full(len(x), np.nan)
    return Contaminants(
        x=np.append(x, others.x),
        y=np.append(y, others.y),
        level=np.append(unknown, others.level),
        level_error=np.append(unknown, others.level_error),
    )


def _guess_stamp_size(calibration: DetectorCalibration) -> int:
    """Return rows and columns of a stamp, or as many as a frame's own PSF has at the most."""
    return LARGEST_STAMP_PIXELS if calibration.psf is None else calibration.psf.size


def choose_psf(
    frame: Frame,
    calibration: DetectorCalibration,
    x: np.ndarray,
    y: np.ndarray,
    config: PhotometryConfig,
    warnings: list[str],
) -> tuple[PsfModel | None, str]:
    """Return the PSF of the product, else the frame's own.

    Parameters
    ----------
    frame : Frame
        The frame.
    calibration : DetectorCalibration
        Calibration products.
    x, y : (n,) float array
        0-based pixel positions on the frame of all sources that it is needed for.
    config : PhotometryConfig
        Whether it is interpolated between zones.
    warnings : list of str
        What is wrong with a PSF that cannot be used is appended.

    Returns
    -------
    model : PsfModel or None
        Of use for these sources; None if there is none.
    name : str
        Where it is from, empty without one.
    """
    is_bilinear = config.psf == "bilinear"
    if calibration.psf is not None:
        return calibration.psf.interpolated(is_bilinear), "epsf product"
    if frame.psf is None:
        warnings.append("no PSF: aperture corrections and PSF fluxes are empty")
        return None, ""
    ny, nx = frame.shape
    at = (
        np.clip(x, 0, nx - 1) + frame.origin[0],
        np.clip(y, 0, ny - 1) + frame.origin[1],
    )
    try:
        model = read_frame_psf(frame.psf, at, is_bilinear=is_bilinear)
    except MissingBytesError:
        raise
    except FrameError as error:
        warnings.append(f"no usable PSF, so that PSF fluxes are empty: {error}")
        return None, ""
    return model, f"{frame.psf.hdu.name} of the frame"


def _choose_aperture_radius(
    frame: Frame, pixel_scale: float, config: PhotometryConfig, warnings: list[str]
) -> float:
    """Return the radius of the aperture in pixels; `pixel_scale` is in arcsec."""
    if config.aperture_method == "fixed":
        return config.aperture_diameter / 2
    fwhm = frame.psf_fwhm
    if fwhm is None:
        fwhm = FWHM_FALLBACK_ARCSEC
        warnings.append(f"no usable PSF_FWHM, used {FWHM_FALLBACK_ARCSEC} arcsec instead")
    return fwhm / pixel_scale * config.fwhm_multiplier / 2


def _view_planes(frame: Frame, factors: np.ndarray | None) -> Planes:
    """Return the planes of a frame as words, and the factors of its flux correction."""

    def view(plane: np.ndarray) -> np.ndarray:
        words = np.asarray(plane).view("<u4")
        # Read-only as those of a mapped file are, so that one compiled form serves all.
        words.flags.writeable = False
        return words

    planes = map(view, (frame.image, frame.variance, frame.zodi, frame.flags))
    return Planes(*planes)._replace(factors=factors)


def _mask(bits: Iterable[int]) -> np.uint32:
    return np.uint32(sum(1 << bit for bit in bits))


def _skip_zodi(config: PhotometryConfig) -> ZodiFit:
    """Return the fit of a frame of which no row is used."""
    scale = 1.0 if config.subtract_zodi else 0.0
    return ZodiFit(scale, 0.0, False, 0, 0, lambda: math.nan)


def _look_and_sum(
    planes: Planes,
    frame: Frame,
    x: np.ndarray,
    y: np.ndarray,
    radius: float,
    rows: np.ndarray,
    looks: Iterable[Look | None],
    config: PhotometryConfig,
) -> tuple[ZodiFit, np.ndarray, np.ndarray]:
    """Fit the zodiacal light, and return what `_sum_sources` does with it.

    Of the looks, the last of which is at all rows, the first is taken that tells enough: the scale
    from all rows would not change these sources. `rows` are needed anyway.
    """
    bad, source = _mask(config.bad_flags), _mask([frame.flag_bits["SOURCE"]])
    for look in looks:
        used = np.ones(len(rows), bool) if look is None else rows | look.mark_rows(len(rows))
        require_rows(frame, used)
        zodi = fit_zodi(planes, bad | source, used, look, config)
        if zodi is None:
            continue
        masks = Masks(bad, source, zodi.unflagged > 0)
        sums, flag = _sum_sources(planes, x, y, radius, zodi, masks, config)
        ends = () if zodi.reach == 0 else (zodi.scale - zodi.reach, zodi.scale + zodi.reach)
        moved = (
            _sum_sources(planes, x, y, radius, zodi._replace(scale=end), masks, config)[0]
            for end in ends
        )
        if look is None or not any(_is_other(sums, some, radius) for some in moved):
            return zodi, sums, flag
    raise AssertionError("the last look is at all rows")


def _is_other(sums: np.ndarray, moved: np.ndarray, radius: float) -> bool:
    """Return whether sums of sources are others with another scale of the zodiacal light.

    All pixels of a source move together, so that fluxes hardly change, unless another pixel of the
    background is clipped.
    """
    circle = math.pi * radius**2
    total, variance, level, error = sums.T
    step = moved[:, 2] - level
    flux_step = moved[:, 0] - total - circle * step
    flux_error = np.sqrt(variance + (error * circle) ** 2)
    return bool(
        (abs(step) > error).any() or (abs(flux_step) > LARGEST_FLUX_STEP * flux_error).any()
    )


def _sum_sources(
    planes: Planes,
    x: np.ndarray,
    y: np.ndarray,
    radius: float,
    zodi: ZodiFit,
    masks: Masks,
    config: PhotometryConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums and flags of `measure_sources`, in the order of the sources.

    Sources are measured as if no variance had to be replaced. Those for which this was
    wrong are measured again with the median variance, which is expensive to find.
    """
    region = _make_region(radius, config)
    clipping = Clipping(config.bg_sigma_clip_sigma, config.bg_sigma_clip_maxiters)

    def sum_some(some: np.ndarray, median: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        order = some[np.lexsort((x[some], y[some] // STRIP_ROWS))]
        conversion = Conversion(zodi.scale, UJY_PER_ARCSEC2, median)
        sums, flag, repaired = measure_sources(
            planes, conversion, masks, region, clipping, radius, x[order], y[order]
        )
        back = np.argsort(order)
        return sums[back], flag[back], repaired[back]

    sums, flag, repaired = sum_some(np.arange(len(x)), math.nan)
    if repaired.any():
        again = np.flatnonzero(repaired)
        sums[again] = sum_some(again, zodi.median_variance())[0]
    return sums, flag


def _make_region(radius: float, config: PhotometryConfig) -> Region:
    """Return where the background is taken from about an aperture of this radius, pixels."""
    if config.background_method == "annulus":
        return _make_annulus(radius, config)
    height, width = config.window_shape
    beyond = radius + WINDOW_GAP_PIXELS
    return Region(
        height=float(height),
        width=float(width),
        beyond_squared=beyond * beyond,
        outer_radius=math.inf,
        max_outer_radius=math.inf,
        growth=0.0,
        max_growths=0,
        min_pixels=config.min_usable_pixels,
    )


def _make_annulus(radius: float, config: PhotometryConfig) -> Region:
    """Return an annulus of the least area, which may grow."""
    inner = radius + config.annulus_inner_offset
    outer = math.sqrt(config.min_annulus_area / math.pi + inner**2)
    return Region(
        height=2.0 * config.max_outer_radius,
        width=2.0 * config.max_outer_radius,
        # The inner edge belongs to an annulus, the outer edge does not, as in photutils.
        beyond_squared=math.nextafter(inner * inner, 0.0),
        outer_radius=min(outer, config.max_outer_radius),
        max_outer_radius=config.max_outer_radius,
        growth=config.annulus_expansion_step,
        max_growths=config.max_annulus_attempts,
        min_pixels=config.min_usable_pixels,
    )
