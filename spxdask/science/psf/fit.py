"""PSF photometry: total fluxes of all sources of a frame, from one solution for all of them.

With P_s the PSF of source s on its stamp and M the usable pixels, the fluxes f solve

    sum_t f_t sum_p M P_s P_t = sum_p M P_s (I' - level_s)    for each s,

in units of brightness, times the solid angle of a pixel at the source. Weights are uniform:
1/VARIANCE follows the data, and would make faint sources too faint.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy import uint32

from spxdask.science.kernels.pixels import Conversion, Planes
from spxdask.science.kernels.psf_fit import (
    examine_pairs,
    find_linked,
    fit_stamps,
    read_stamps,
)
from spxdask.science.psf.model import PsfModel
from spxdask.science.psf.offsets import NO_STARS, Offsets, measure_star_offsets

__all__ = ["Contaminants", "PsfPhotometry", "choose_linked", "measure_psf_fluxes"]

# A PSF with less than this share of its square on usable pixels gives no flux.
LEAST_FRACTION = 0.3
# Two sources that are closer cannot be told apart, pixels.
LEAST_SEPARATION = 0.5
# A contaminant this close to a source of the catalogue is that source: about one arcsecond.
SAME_SOURCE_PIXELS = 0.16
# The normal equations of this many pairs take 400 MB.
MOST_PAIRS = 10_000_000

TOO_CLOSE = "closer than half a pixel to another source"
TOO_MASKED = "less than 30 % of the PSF on usable pixels"
TOO_CROWDED = f"more than {MOST_PAIRS:,} pairs of overlapping sources on the frame"


@dataclass(frozen=True, kw_only=True)
class Contaminants:
    """Sources that take part in the solution, and get no rows.

    Attributes
    ----------
    x, y : (m,) float array
        0-based pixel positions; they may lie beyond the edges.
    level, level_error : (m,) float array
        Background, uJy/arcsec^2, and its error; NaN where there is none: the median of the
        others is taken.
    """

    x: np.ndarray
    y: np.ndarray
    level: np.ndarray
    level_error: np.ndarray


@dataclass(frozen=True, kw_only=True)
class PsfPhotometry:
    """What the PSF says of each source.

    Attributes
    ----------
    flux, flux_error : (n,) float array
        Total, uJy; NaN where it is empty.
    chi2 : (n,) float array
        Reduced, over the stamp, of all sources together; NaN where the flux is.
    fraction : (n,) float array
        Share of the square of the PSF on usable pixels, 0 to 1.
    neighbour_flux : (n,) float array
        Light of the other sources in the aperture, uJy.
    bad_fraction : (n,) float array
        Share of the PSF's light in the aperture on pixels with a bad flag.
    aperture_correction : (n,) float array
        Total light of a point source, as a multiple of that in the aperture.
    empty : dict of str to int
        Sources without a PSF flux, by reason.
    same_contaminants : int
        Contaminants that were left out, because they are sources of the catalogue.
    offsets : Offsets
        Where bright isolated stars among those that may be used are.
    """

    flux: np.ndarray
    flux_error: np.ndarray
    chi2: np.ndarray
    fraction: np.ndarray
    neighbour_flux: np.ndarray
    bad_fraction: np.ndarray
    aperture_correction: np.ndarray
    empty: dict[str, int] = field(default_factory=dict)
    same_contaminants: int = 0
    offsets: Offsets = NO_STARS


def measure_psf_fluxes(
    planes: Planes,
    conversion: Conversion,
    model: PsfModel,
    x: np.ndarray,
    y: np.ndarray,
    *,
    level: np.ndarray,
    level_error: np.ndarray,
    radius: float,
    solid_angle: np.ndarray,
    bad: int,
    psf_bad: int,
    is_star: np.ndarray | None = None,
    contaminants: Contaminants | None = None,
    origin: tuple[float, float] = (0.0, 0.0),
) -> PsfPhotometry:
    """Measure the total flux of every source with the PSF.

    Parameters
    ----------
    planes : Planes
        The frame.
    conversion : Conversion
        From its pixels to brightness without zodiacal light, uJy/arcsec^2, and variance.
    model : PsfModel
        The PSF.
    x, y : (n,) float array
        0-based pixel positions of the sources.
    level, level_error : (n,) float array
        Background of each source, uJy/arcsec^2, and its error.
    radius : float
        Of the aperture, pixels.
    solid_angle : (n,) float array
        Of the pixel at each source, arcsec^2.
    bad, psf_bad : int
        Masks of flag bits: of bad pixels in the aperture, and of those that are left out of
        the fit, as are all that are not finite or have no valid variance.
    is_star : (n,) bool array, optional
        Which sources may tell by their light how good the positions are; by default none.
    contaminants : Contaminants, optional
        More sources of the solution.
    origin : (float, float)
        Full-frame 0-based pixel of the pixel (0, 0) of the planes.

    Returns
    -------
    PsfPhotometry
        One row a source, in the order given.
    """
    n = len(x)
    if contaminants is not None:
        x, y = np.append(x, contaminants.x), np.append(y, contaminants.y)
        level = np.append(level, contaminants.level)
        level_error = np.append(level_error, contaminants.level_error)
    level, level_error = _fill_gaps(level), _fill_gaps(level_error)
    is_contaminant = np.arange(len(x)) >= n

    # By the first row of the stamp, and along it: neighbours need the same pixels.
    order = np.lexsort((x, np.floor(y + 0.5)))
    stamps, corners, enclosed = model.render(x[order], y[order], radius, origin)
    pairs, is_double = examine_pairs(
        corners, x[order], y[order], is_contaminant[order], model.size, radius, SAME_SOURCE_PIXELS
    )
    columns = np.full((6, len(x)), np.nan)
    offsets = NO_STARS
    if pairs <= MOST_PAIRS:
        kept = ~is_double
        if is_double.any():
            order, stamps, corners = order[kept], stamps[kept], corners[kept]
            enclosed = enclosed[kept]
        pixels = read_stamps(planes, conversion, uint32(psf_bad), corners, model.size)
        fit = fit_stamps(
            *pixels, uint32(bad), stamps, corners, x[order], y[order], radius,
            level[order], level_error[order],
        )  # fmt: skip
        columns[:, order] = fit[:6]
        separation = np.full(len(x), np.inf)
        separation[order] = fit.separation
        if is_star is not None:
            is_usable = ~is_contaminant
            is_usable[:n] &= is_star
            found = measure_star_offsets(
                model, fit, is_usable[order], pixels[0], pixels[1], stamps, corners, x[order],
                y[order], level[order], origin,
            )  # fmt: skip
            offsets = replace(found, index=order[found.index])
    shares = np.full(len(x), np.nan)
    shares[order] = enclosed
    flux, flux_error, chi2, fraction, neighbours, bad_fraction = columns[:, :n]

    empty: dict[str, int] = {}
    if pairs > MOST_PAIRS:
        empty[TOO_CROWDED] = n
    else:
        is_close = separation[:n] < LEAST_SEPARATION
        is_masked = ~is_close & ~(fraction >= LEAST_FRACTION)
        for reason, where in ((TOO_CLOSE, is_close), (TOO_MASKED, is_masked)):
            if where.any():
                empty[reason] = int(where.sum())
            for column in (flux, flux_error, chi2):
                column[where] = np.nan
        # Of such a pair, only the sum is determined.
        neighbours[is_close] = np.nan
    shares = shares[:n]
    return PsfPhotometry(
        flux=flux * solid_angle,
        flux_error=flux_error * solid_angle,
        chi2=chi2,
        fraction=fraction,
        neighbour_flux=neighbours * solid_angle,
        bad_fraction=bad_fraction,
        aperture_correction=1.0 / np.where(shares > 0, shares, np.nan),
        empty=empty,
        same_contaminants=int(is_double.sum()),
        offsets=offsets,
    )


def choose_linked(
    x: np.ndarray,
    y: np.ndarray,
    other_x: np.ndarray,
    other_y: np.ndarray,
    size: int,
    radius: float,
) -> np.ndarray:
    """Choose the sources without which the fluxes of some others would not be the same.

    Groups of sources whose stamps do not overlap are solved apart, so that those that are in no
    group with a source that gets a row can be left out, and their pixels need not be read.

    Parameters
    ----------
    x, y : (n,) float array
        0-based pixel positions of the sources that get rows.
    other_x, other_y : (m,) float array
        Those of all others.
    size : int
        Rows and columns of a stamp, or more.
    radius : float
        Of the aperture, pixels.

    Returns
    -------
    (m,) bool array
        Which of the others are linked with a source that gets a row, by overlapping stamps and
        apertures, directly or through others.
    """
    n = len(x)
    if n == 0 or len(other_x) == 0:
        return np.zeros(len(other_x), bool)
    both = np.append(y, other_y), np.append(x, other_x)
    corners = np.floor(np.stack(both, axis=1) + 0.5).astype(np.int64)
    order = np.argsort(corners[:, 0], kind="stable")
    linked = np.empty(len(corners), bool)
    linked[order] = find_linked(corners[order], order < n, size, radius)
    return linked[n:]


def _fill_gaps(values: np.ndarray) -> np.ndarray:
    """Replace what is not finite by the median of the rest."""
    values = np.asarray(values, float)
    is_finite = np.isfinite(values)
    if is_finite.all():
        return values
    return np.where(is_finite, values, np.median(values[is_finite]) if is_finite.any() else 0.0)
