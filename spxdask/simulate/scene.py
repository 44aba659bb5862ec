"""The scene that a simulated detector observes: sources with known spectra, and their pixels.

Pixel coordinates are 0-based; the centre of the first pixel is (0, 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from astropy import units as u
from astropy.coordinates import SkyCoord
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree
from scipy.special import erf

SIGMA_PER_FWHM = 1.0 / (2.0 * np.sqrt(2.0 * np.log(2.0)))
# Attempts to place all sources at the required distance from each other.
_PLACEMENT_ROUNDS = 100
# Number of sources rendered at a time, which limits the memory of their stamps.
_RENDER_CHUNK = 16384

# Returns the fractions of the flux in the pixels of a stamp around each position.
StampMaker = Callable[[NDArray[np.float64], NDArray[np.float64], int], NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Sky:
    """Point sources with known spectra: a power law times one Gaussian feature.

    Attributes
    ----------
    ra, dec : (n,) float array
        ICRS position in degrees.
    amplitude : (n,) float array
        Flux density of the power law at 2 um, in uJy.
    slope : (n,) float array
        Exponent of the power law in wavelength.
    line_strength : (n,) float array
        Peak of the feature relative to the power law; values from -1 to 0 are absorption.
    line_center_um, line_width_um : (n,) float array
        Centre and standard deviation of the feature.

    Raises
    ------
    ValueError
        If the arrays are not all one-dimensional and of equal length.
    """

    ra: NDArray[np.float64]
    dec: NDArray[np.float64]
    amplitude: NDArray[np.float64]
    slope: NDArray[np.float64]
    line_strength: NDArray[np.float64]
    line_center_um: NDArray[np.float64]
    line_width_um: NDArray[np.float64]

    def __post_init__(self) -> None:
        shapes = {field.name: np.shape(getattr(self, field.name)) for field in fields(self)}
        if len(set(shapes.values())) != 1 or len(shapes["ra"]) != 1:
            raise ValueError(f"a sky needs one-dimensional arrays of equal length, got {shapes}")

    def __len__(self) -> int:
        return len(self.ra)

    def take(self, index: ArrayLike) -> Sky:
        """Return some of the sources.

        Parameters
        ----------
        index : array_like
            Integer indices, or a boolean array.

        Returns
        -------
        Sky
            The selected sources, in the order of the indices.
        """
        return Sky(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def flux(self, wavelength_um: ArrayLike) -> NDArray[np.float64]:
        """Return the flux densities of the sources.

        Parameters
        ----------
        wavelength_um : float or (n,) float array
            Wavelength in um, the same for all or one for each source.

        Returns
        -------
        (n,) float array
            Flux densities in uJy.
        """
        wavelength_um = np.asarray(wavelength_um, dtype=float)
        offset = (wavelength_um - self.line_center_um) / self.line_width_um
        feature = 1.0 + self.line_strength * np.exp(-0.5 * offset**2)
        return self.amplitude * (wavelength_um / 2.0) ** self.slope * feature


def make_sky(
    center_ra: float,
    center_dec: float,
    radius_deg: float,
    *,
    n_sources: int,
    min_separation_arcsec: float,
    seed: int,
    amplitude_ujy: tuple[float, float] = (300.0, 30000.0),
) -> Sky:
    """Distribute isolated sources uniformly over a circle on the sphere.

    Parameters
    ----------
    center_ra, center_dec : float
        ICRS centre of the circle in degrees.
    radius_deg : float
        Radius of the circle in degrees.
    n_sources : int
        Number of sources.
    min_separation_arcsec : float
        Smallest distance between any two sources, in arcsec.
    seed : int
        Seed of the random generator; equal arguments give equal skies.
    amplitude_ujy : (float, float)
        Limits of the log-uniform flux densities at 2 um.

    Returns
    -------
    Sky
        The sources, with random spectra.

    Raises
    ------
    ValueError
        If the circle has no room for that many sources at that distance.
    """
    rng = np.random.default_rng(seed)
    center = SkyCoord(center_ra, center_dec, unit="deg")
    # Distances are compared as chords between unit vectors, which is right at any declination.
    min_chord = 2.0 * np.sin(np.radians(min_separation_arcsec / 3600.0) / 2.0)
    kept = SkyCoord([], [], unit="deg")
    for _ in range(_PLACEMENT_ROUNDS):
        missing = n_sources - len(kept)
        if missing == 0:
            break
        distance = 2.0 * np.arcsin(
            np.sqrt(rng.uniform(size=missing)) * np.sin(np.radians(radius_deg) / 2.0)
        )
        angle = rng.uniform(0.0, 2.0 * np.pi, missing)
        fresh = center.directional_offset_by(angle * u.rad, distance * u.rad)
        ra = np.concatenate([kept.ra.deg, fresh.ra.deg])
        dec = np.concatenate([kept.dec.deg, fresh.dec.deg])
        candidates = SkyCoord(ra, dec, unit="deg")
        tree = cKDTree(candidates.cartesian.xyz.value.T)
        pairs = tree.query_pairs(min_chord, output_type="ndarray")
        isolated = np.ones(n_sources, dtype=bool)
        # Of each close pair the source that was added later is removed.
        isolated[pairs.max(axis=1)] = False
        kept = candidates[isolated]
    else:
        raise ValueError(
            f"no room for {n_sources} sources {min_separation_arcsec} arcsec apart "
            f"within {radius_deg} deg"
        )
    n = n_sources
    faintest, brightest = np.log(amplitude_ujy)
    shortest, longest = np.log((0.75, 5.0))
    return Sky(
        ra=kept.ra.deg,
        dec=kept.dec.deg,
        amplitude=np.exp(rng.uniform(faintest, brightest, n)),
        slope=rng.uniform(-2.0, 1.0, n),
        line_strength=rng.uniform(-0.5, 1.0, n),
        line_center_um=np.exp(rng.uniform(shortest, longest, n)),
        line_width_um=rng.uniform(0.02, 0.1, n),
    )


def add_neighbours(
    sky: Sky,
    separation_arcsec: tuple[float, float],
    *,
    flux_ratio: tuple[float, float] = (0.2, 1.0),
    seed: int = 0,
) -> Sky:
    """Give each source a neighbour, which makes a blended pair of it.

    Parameters
    ----------
    sky : Sky
        The sources.
    separation_arcsec : (float, float)
        Limits of the uniform distances from the sources, in arcsec.
    flux_ratio : (float, float)
        Limits of the uniform ratios of the neighbour's flux to that of its source. Both have the
        same spectrum otherwise.
    seed : int
        Seed of the random generator.

    Returns
    -------
    Sky
        The sources, and behind them their neighbours in the same order.
    """
    rng = np.random.default_rng(seed)
    n = len(sky)
    distance, angle = rng.uniform(*separation_arcsec, n), rng.uniform(0.0, 2.0 * np.pi, n)
    places = SkyCoord(sky.ra, sky.dec, unit="deg").directional_offset_by(
        angle * u.rad, distance * u.arcsec
    )
    changed = {
        "ra": places.ra.deg,
        "dec": places.dec.deg,
        "amplitude": sky.amplitude * rng.uniform(*flux_ratio, n),
    }
    return Sky(
        **{
            field.name: np.concatenate(
                [getattr(sky, field.name), changed.get(field.name, getattr(sky, field.name))]
            )
            for field in fields(sky)
        }
    )


def psf_half_size(fwhm_pixels: float) -> int:
    """Return the half-width of a stamp that contains the PSF to 5 sigma.

    Parameters
    ----------
    fwhm_pixels : float
        Full width at half maximum of the PSF in pixels.

    Returns
    -------
    int
        Number of pixels on each side of the middle one, enough for any position of the source
        within its pixel.
    """
    return int(np.ceil(5.0 * SIGMA_PER_FWHM * fwhm_pixels + 0.5))


def pixel_response(offset: ArrayLike, fwhm_pixels: float) -> NDArray[np.float64]:
    """Return the fraction of a one-dimensional Gaussian that falls into a pixel.

    Parameters
    ----------
    offset : array_like
        Distance of the pixel's centre from the Gaussian's, in pixels.
    fwhm_pixels : float
        Full width at half maximum in pixels.

    Returns
    -------
    float array
        Fractions, of the shape of `offset`.
    """
    offset = np.asarray(offset, dtype=float)
    scale = np.sqrt(2.0) * SIGMA_PER_FWHM * fwhm_pixels
    return 0.5 * (erf((offset + 0.5) / scale) - erf((offset - 0.5) / scale))


def pixel_integrated_psf(
    x: ArrayLike, y: ArrayLike, fwhm_pixels: float, size: int
) -> NDArray[np.float64]:
    """Integrate a round Gaussian over the pixels of a stamp around each position.

    Parameters
    ----------
    x, y : float or (n,) float array
        0-based positions of the sources.
    fwhm_pixels : float
        Full width at half maximum in pixels.
    size : int
        Width of the stamp, odd. Its middle pixel is ``(np.rint(x), np.rint(y))``.

    Returns
    -------
    (size, size) or (n, size, size) float array
        The fraction of the flux in each pixel, indexed ``[..., y, x]``.

    Raises
    ------
    ValueError
        If `size` is even.
    """
    if size % 2 == 0:
        raise ValueError(f"a stamp has an odd size, got {size}")
    steps = np.arange(size) - size // 2
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    along_x = pixel_response((np.rint(x) - x)[..., np.newaxis] + steps, fwhm_pixels)
    along_y = pixel_response((np.rint(y) - y)[..., np.newaxis] + steps, fwhm_pixels)
    return along_y[..., :, np.newaxis] * along_x[..., np.newaxis, :]


def reaches(
    x: NDArray[np.float64], y: NDArray[np.float64], half: int, shape: tuple[int, int]
) -> NDArray[np.bool_]:
    """Return whether a stamp around each position touches the image.

    Parameters
    ----------
    x, y : (n,) float array
        0-based positions.
    half : int
        Half-width of the stamp: pixels on each side of the middle one.
    shape : (int, int)
        Shape (ny, nx) of the image.

    Returns
    -------
    (n,) bool array
        True for positions whose stamp shares a pixel with the image.
    """
    column, row = np.rint(x), np.rint(y)
    ny, nx = shape
    return (column >= -half) & (column < nx + half) & (row >= -half) & (row < ny + half)


def render_sources(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    flux: NDArray[np.float64],
    *,
    make_stamps: StampMaker,
    half: int,
    shape: tuple[int, int],
) -> NDArray[np.float64]:
    """Return an image of point sources.

    Parameters
    ----------
    x, y, flux : (n,) float array
        0-based positions, which may lie off the image, and fluxes.
    make_stamps : callable
        Takes x, y and an odd size, and returns the fractions of the flux in the pixels of a stamp
        of that size around each position, as `pixel_integrated_psf` does.
    half : int
        Half-width of the stamps: pixels on each side of the middle one.
    shape : (int, int)
        Shape (ny, nx) of the image.

    Returns
    -------
    (ny, nx) float array
        The flux in each pixel, in the unit of `flux`.
    """
    padded, pad = _padded(shape, half, float)
    width, size = padded.shape[1], 2 * half + 1
    stamp = (np.arange(size)[:, np.newaxis] * width + np.arange(size)).ravel()
    near = np.flatnonzero(reaches(x, y, half, shape))
    for start in range(0, near.size, _RENDER_CHUNK):
        part = near[start : start + _RENDER_CHUNK]
        corner = _corner(x[part], y[part], pad - half, width)
        light = make_stamps(x[part], y[part], size)
        light *= flux[part, np.newaxis, np.newaxis]
        np.add.at(padded.reshape(-1), (corner[:, np.newaxis] + stamp).ravel(), light.ravel())
    return padded[pad:-pad, pad:-pad]


def disc_mask(
    x: NDArray[np.float64], y: NDArray[np.float64], radius: float, shape: tuple[int, int]
) -> NDArray[np.bool_]:
    """Mark the pixels whose centre lies within a distance of any position.

    Parameters
    ----------
    x, y : (n,) float array
        0-based positions, which may lie off the image.
    radius : float
        Radius of the discs in pixels.
    shape : (int, int)
        Shape (ny, nx) of the mask.

    Returns
    -------
    (ny, nx) bool array
        True within the discs.
    """
    half = int(np.floor(radius + 0.5))
    padded, pad = _padded(shape, half, bool)
    flat, width = padded.reshape(-1), padded.shape[1]
    near = reaches(x, y, half, shape)
    x, y = x[near], y[near]
    corner = _corner(x, y, pad - half, width)
    steps = np.arange(2 * half + 1)
    distance_x2 = ((np.rint(x) - x)[:, np.newaxis] + steps - half) ** 2
    for step in steps:
        distance_y2 = (np.rint(y) - y + step - half) ** 2
        inside = distance_x2 + distance_y2[:, np.newaxis] <= radius**2
        flat[((corner + step * width)[:, np.newaxis] + steps)[inside]] = True
    return padded[pad:-pad, pad:-pad]


def _padded(shape: tuple[int, int], half: int, dtype: type) -> tuple[np.ndarray, int]:
    """Return zeros with room for every stamp that touches the image, and the width of the rim."""
    pad = 2 * half + 1
    return np.zeros((shape[0] + 2 * pad, shape[1] + 2 * pad), dtype=dtype), pad


def _corner(x: np.ndarray, y: np.ndarray, shift: int, width: int) -> NDArray[np.int64]:
    """Return the flat index of each stamp's first pixel in a padded image."""
    column, row = np.rint(x).astype(np.int64), np.rint(y).astype(np.int64)
    return (row + shift) * width + column + shift
