"""A PSF that is no Gaussian and varies smoothly over the detector, and the models of it in files.

The PSF is a sum of elongated Gaussians with different centres, which follows a Moffat profile with
a halo, within a square. So its share in any pixel is known exactly. Its peak is at the position of
the source. Positions on the detector are 0-based pixels of the full frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from astropy.io import fits
from astropy.table import Table
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import make_interp_spline
from scipy.special import erf

from spxdask.simulate.detector import FRAME_SIZE
from spxdask.simulate.scene import SIGMA_PER_FWHM

__all__ = [
    "CUBE_OVERSAMPLING",
    "CUBE_SIZE",
    "CUBE_ZONES",
    "EPSF_OVERSAMPLING",
    "EPSF_SIZE",
    "VaryingPsf",
    "Zones",
    "cube_hdu",
    "epsf_mosaic_hdu",
    "epsf_table_hdu",
    "epsf_zones",
    "is_listing_transposed",
    "make_zones",
    "sum_in_circles",
]

CUBE_ZONES, CUBE_SIZE, CUBE_OVERSAMPLING = 11, 101, 10
EPSF_SIZE, EPSF_OVERSAMPLING = 33, 5

_PIXEL_SCALE_ARCSEC = 6.153
# Flux of the components, and their standard deviations relative to that of a Gaussian with the full
# width at half maximum of the sum.
_SHARES = np.array([0.58, 0.33, 0.08, 0.01])
_WIDTHS = np.array([0.91, 1.325, 2.2, 0.0])
# Standard deviation of the halo in pixels, the same for all detectors.
_HALO_PIXELS = 1.2
# Where light does not end, all but 1e-9 of it is so near, in pixels.
_FARTHEST = 8.0
# Centres of the components from that of the first one, in units of `VaryingPsf.lopsidedness`.
_LEANS = np.array([0.0, 0.6, 2.0, 3.0])
_PEAK_ROUNDS = 8
# Places at which the spline through an EPSF is fitted to the response, for each of its samples.
_FINE_STEPS = 4
# A cube's core is off the middle of its plane by this many pixels, the same in x for all zones, and
# in y from the lowest row of zones to the highest.
_CUBE_OFFSET_X, _CUBE_OFFSETS_Y = -0.05, (0.01, -0.11)


class _Components(NamedTuple):
    """Share, centre from the source's position, and standard deviations of each Gaussian."""

    share: NDArray[np.float64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    sigma_x: NDArray[np.float64]
    sigma_y: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class VaryingPsf:
    """The true PSF of the six detectors.

    Attributes
    ----------
    fwhm_arcsec : (6,) tuple of float
        Full width at half maximum in the middle of each detector, before the light is summed over
        pixels. The default values are those of the cards PSF_FWHM of real frames.
    variation : float
        Largest relative change of the width over the detector.
    elongation : float
        Largest relative difference of the width in x, and in y, from their mean.
    lopsidedness : float
        Distance, in pixels, of the centre of the shoulder from that of the core.
    reach : float
        Distance along x, and along y, in pixels, at which the light ends before it is summed over
        pixels. The default makes an EPSF, which ends half a pixel farther, hold all light. With
        infinity it does not end, and about 1e-4 of it, 3e-4 in D6, is beyond any EPSF.

    Raises
    ------
    ValueError
        If `fwhm_arcsec` has not six values above 0, or `reach` is not above 0.
    """

    fwhm_arcsec: tuple[float, ...] = (5.03, 4.84, 4.92, 6.02, 6.12, 6.56)
    variation: float = 0.06
    elongation: float = 0.06
    lopsidedness: float = 0.06
    reach: float = 0.5 * (EPSF_SIZE / EPSF_OVERSAMPLING - 1.0)

    def __post_init__(self) -> None:
        if len(self.fwhm_arcsec) != 6 or not min(self.fwhm_arcsec) > 0.0:
            raise ValueError(f"fwhm_arcsec must be 6 values > 0, got {self.fwhm_arcsec}")
        if not self.reach > 0.0:
            raise ValueError(f"reach must be > 0 pixels, got {self.reach}")

    @property
    def stamp_half_size(self) -> int:
        """Half-width in pixels of the stamp that takes all light of a source."""
        # The source is up to half a pixel from the centre of the middle one.
        return math.ceil(min(self.reach, _FARTHEST))

    def stamps(self, detector: int, x: ArrayLike, y: ArrayLike, size: int) -> NDArray[np.float64]:
        """Integrate the PSF over the pixels of a stamp around each position.

        Parameters
        ----------
        detector : int
            1 to 6.
        x, y : float or (n,) float array
            Positions of the sources on the full frame.
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
        x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        edges = np.arange(size + 1) - 0.5 * size
        return self._integrate(
            detector,
            x,
            y,
            (np.rint(x) - x)[..., np.newaxis] + edges,
            (np.rint(y) - y)[..., np.newaxis] + edges,
        )

    def response(
        self, detector: int, x: ArrayLike, y: ArrayLike, offset: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return the fraction of the flux in a pixel, by the pixel's distance from the source.

        Parameters
        ----------
        detector : int
            1 to 6.
        x, y : float or (n,) float array
            Places on the full frame whose PSF is meant.
        offset : (m,) float array
            Distance of the pixel's centre from the source along each axis, in pixels.

        Returns
        -------
        (m, m) or (n, m, m) float array
            Fractions, indexed ``[..., y, x]``.
        """
        # Pairs of edges: the integrals between pixels are computed, too, and left out.
        edges = (offset[:, np.newaxis] + (-0.5, 0.5)).ravel()
        return self._integrate(detector, x, y, edges, edges)[..., ::2, ::2]

    def density(
        self, detector: int, x: ArrayLike, y: ArrayLike, dx: ArrayLike, dy: ArrayLike
    ) -> NDArray[np.float64]:
        """Return the optical PSF, before light is summed over pixels.

        Parameters
        ----------
        detector : int
            1 to 6.
        x, y : float or (n,) float array
            Places on the full frame whose PSF is meant.
        dx, dy : (k,) or (n, k) float array
            Distances from the source along x, and along y, in pixels; all pairs are computed.

        Returns
        -------
        (k, k) or (n, k, k) float array
            Fraction of the flux per square pixel, indexed ``[..., y, x]``.
        """
        dx, dy = np.asarray(dx, dtype=float), np.asarray(dy, dtype=float)
        parts = self._components(detector, x, y)
        along_x = _gaussian(dx, parts.x, parts.sigma_x)
        along_y = _gaussian(dy, parts.y, parts.sigma_y)
        density = _combine(parts.share, along_x, along_y)
        has_x, has_y = np.abs(dx) <= self.reach, np.abs(dy) <= self.reach
        return density * (has_y[..., :, np.newaxis] & has_x[..., np.newaxis, :])

    def _integrate(
        self,
        detector: int,
        x: ArrayLike,
        y: ArrayLike,
        edges_x: NDArray[np.float64],
        edges_y: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Return the flux between each two edges, given as distances from the source."""
        parts = self._components(detector, x, y)
        edges_x, edges_y = (np.clip(e, -self.reach, self.reach) for e in (edges_x, edges_y))
        along_x = np.diff(_cumulative(edges_x, parts.x, parts.sigma_x))
        along_y = np.diff(_cumulative(edges_y, parts.y, parts.sigma_y))
        return _combine(parts.share, along_x, along_y)

    def _components(self, detector: int, x: ArrayLike, y: ArrayLike) -> _Components:
        """Return arrays of shape (..., 4): the Gaussians at positions on the detector."""
        u, v = ((np.asarray(z, dtype=float) / (FRAME_SIZE - 1) * 2.0 - 1.0) for z in (x, y))
        u, v = u[..., np.newaxis], v[..., np.newaxis]
        core = self.fwhm_arcsec[detector - 1] / _PIXEL_SCALE_ARCSEC * SIGMA_PER_FWHM
        width = core * (1.0 + self.variation * (0.4 * u - 0.3 * v + 0.3 * (u**2 + v**2) - 0.1))
        sigma = np.where(_WIDTHS > 0.0, _WIDTHS * width, _HALO_PIXELS)
        stretch = self.elongation * (0.3 + 0.5 * u * v + 0.2 * v)
        sigma_x, sigma_y = sigma * (1.0 + stretch), sigma * (1.0 - stretch)
        lean_x = self.lopsidedness * _LEANS * (0.7 + 0.3 * u)
        lean_y = self.lopsidedness * _LEANS * (0.2 - 0.5 * v)
        share = np.broadcast_to(_SHARES, sigma.shape)
        peak_x, peak_y = _find_peak(_Components(share, lean_x, lean_y, sigma_x, sigma_y))
        center_x, center_y = lean_x - peak_x, lean_y - peak_y
        ends = np.array([-self.reach, self.reach])
        inside = np.diff(_cumulative(ends, center_x, sigma_x))[..., 0]
        inside *= np.diff(_cumulative(ends, center_y, sigma_y))[..., 0]
        share = share / np.sum(share * inside, axis=-1, keepdims=True)
        return _Components(share, center_x, center_y, sigma_x, sigma_y)


def _find_peak(parts: _Components) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the place of the largest density, of shape (..., 1), by a fixed-point iteration."""
    x = y = np.zeros((*parts.share.shape[:-1], 1))
    for _ in range(_PEAK_ROUNDS):
        dx, dy = parts.x - x, parts.y - y
        height = parts.share / (parts.sigma_x * parts.sigma_y)
        height = height * np.exp(-0.5 * ((dx / parts.sigma_x) ** 2 + (dy / parts.sigma_y) ** 2))
        # The gradient vanishes at the mean of the centres with these weights.
        weight_x, weight_y = height / parts.sigma_x**2, height / parts.sigma_y**2
        x = np.sum(weight_x * parts.x, -1, keepdims=True) / weight_x.sum(-1, keepdims=True)
        y = np.sum(weight_y * parts.y, -1, keepdims=True) / weight_y.sum(-1, keepdims=True)
    return x, y


def _cumulative(
    place: NDArray[np.float64], center: NDArray[np.float64], sigma: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return half the error function of each component, of shape (..., 4, number of places)."""
    offset = place[..., np.newaxis, :] - center[..., np.newaxis]
    return 0.5 * erf(offset / (np.sqrt(2.0) * sigma[..., np.newaxis]))


def _gaussian(
    place: NDArray[np.float64], center: NDArray[np.float64], sigma: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the density of each component along one axis, of shape (..., 4, places)."""
    sigma = sigma[..., np.newaxis]
    offset = (place[..., np.newaxis, :] - center[..., np.newaxis]) / sigma
    return np.exp(-0.5 * offset**2) / (np.sqrt(2.0 * np.pi) * sigma)


def _combine(
    share: NDArray[np.float64], along_x: NDArray[np.float64], along_y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the sum of the products of the components' profiles, indexed [..., y, x]."""
    return np.swapaxes(share[..., np.newaxis] * along_y, -1, -2) @ along_x


def sum_in_circles(
    stamps: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64], radius: float
) -> NDArray[np.float64]:
    """Sum stamps over circles with the exact fraction of each pixel, by photutils.

    Parameters
    ----------
    stamps : (n, size, size) float array
        One for each position; the middle pixel is ``(np.rint(x), np.rint(y))``.
    x, y : (n,) float array
        Centres of the circles.
    radius : float
        Radius in pixels.

    Returns
    -------
    (n,) float array
        The sums.

    Raises
    ------
    ValueError
        If a circle is larger than the stamps.
    """
    # Its import takes half a second, and simulating frames does not need it.
    from photutils.aperture import CircularAperture

    half = stamps.shape[-1] // 2
    if not 0.0 < radius <= half:
        raise ValueError(f"radius must be > 0 and <= {half} pixels, got {radius}")
    centers = np.column_stack([x - np.rint(x) + half, y - np.rint(y) + half])
    sums = [
        CircularAperture(center, r=radius).do_photometry(stamp, method="exact")[0][0]
        for center, stamp in zip(centers, stamps, strict=True)
    ]
    return np.array(sums, dtype=float)


class Zones(NamedTuple):
    """Equal zones of the detector, row by row: indices, 0-based centres and widths in pixels."""

    x_bin: NDArray[np.int32]
    y_bin: NDArray[np.int32]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    x_width: float
    y_width: float


def make_zones(nx: int, ny: int) -> Zones:
    """Divide the detector.

    Parameters
    ----------
    nx, ny : int
        Number of zones along x and y.

    Returns
    -------
    Zones
        Arrays of length nx * ny; zone ``iy * nx + ix`` is the one with indices ix and iy.
    """
    y_bin, x_bin = (index.ravel().astype(np.int32) for index in np.indices((ny, nx)))
    x_width, y_width = FRAME_SIZE / nx, FRAME_SIZE / ny
    x = (x_bin.astype(np.float64) + 0.5) * x_width - 0.5
    y = (y_bin.astype(np.float64) + 0.5) * y_width - 0.5
    return Zones(x_bin, y_bin, x, y, x_width, y_width)


def epsf_zones(detector: int) -> Zones:
    """Return the zones of a detector's EPSF table.

    Parameters
    ----------
    detector : int
        1 to 6.

    Returns
    -------
    Zones
        21 x 21 zones, for detector 3 11 x 41.
    """
    return make_zones(11, 41) if detector == 3 else make_zones(21, 21)


def is_listing_transposed(version: str) -> bool:
    """Return whether a pipeline version lists the zones of the cube in the wrong order.

    Parameters
    ----------
    version : str
        The card VERSION, such as ``6.5.5+psffix1``.

    Returns
    -------
    bool
        True up to 6.5.5, unless the version carries ``+psffix1``.
    """
    numbers, _, tag = version.partition("+")
    return tuple(map(int, numbers.split("."))) <= (6, 5, 5) and "psffix1" not in tag


def cube_hdu(psf: VaryingPsf, detector: int, *, is_transposed: bool = False) -> fits.ImageHDU:
    """Return the PSF extension of QR2: the optical PSF of each zone, not integrated over pixels.

    Parameters
    ----------
    psf : VaryingPsf
        The true PSF.
    detector : int
        1 to 6.
    is_transposed : bool
        Whether the header lists the zones with y fastest, while planes have x fastest, as in files
        of old pipelines.

    Returns
    -------
    astropy.io.fits.ImageHDU
        A cube of 121 x 101 x 101 samples, 10 a pixel. Each plane has the sum 1 and its peak off
        the middle by the offsets that real cubes have.
    """
    zones = make_zones(CUBE_ZONES, CUBE_ZONES)
    steps = (np.arange(CUBE_SIZE) - CUBE_SIZE // 2) / CUBE_OVERSAMPLING
    offset_y = np.linspace(*_CUBE_OFFSETS_Y, CUBE_ZONES)[zones.y_bin]
    cube = psf.density(
        detector, zones.x, zones.y, steps - _CUBE_OFFSET_X, steps - offset_y[:, np.newaxis]
    )
    cube /= cube.sum(axis=(1, 2), keepdims=True)
    listed_x, listed_y = (zones.y, zones.x) if is_transposed else (zones.x, zones.y)
    lines = [f"OVERSAMP= {CUBE_OVERSAMPLING:20d} / PSF samples per pixel, each axis"]
    for i, (x, y) in enumerate(zip(listed_x.tolist(), listed_y.tolist(), strict=True), start=1):
        values = {"XCTR": x, "YCTR": y, "XWID": zones.x_width, "YWID": zones.y_width}
        lines += [f"{f'{name}_{i}':8}= {value:20.13f}" for name, value in values.items()]
    # From a text it is made 20 times faster than from cards.
    header = fits.Header.fromstring("\n".join(lines), sep="\n")
    return fits.ImageHDU(cube.astype(np.float32), header, name="PSF")


def epsf_table_hdu(
    psf: VaryingPsf,
    detector: int,
    wavelength_um: NDArray[np.float64],
    bandwidth_um: NDArray[np.float64],
) -> fits.BinTableHDU:
    """Return the EPSF extension of QR3: the pixel's response is in it, and each row's sum is 1.

    EPSFs are built from pixels of stars at all phases. So the samples are those whose cubic spline
    is nearest to the true response, by least squares, and not that response at their places: its
    spline would be too low at the peak by a few 1e-4.

    Parameters
    ----------
    psf : VaryingPsf
        The true PSF.
    detector : int
        1 to 6.
    wavelength_um, bandwidth_um : (n,) float array
        Central wavelength and bandwidth at the centres of `epsf_zones`.

    Returns
    -------
    astropy.io.fits.BinTableHDU
        One row a zone.
    """
    zones = epsf_zones(detector)
    steps = (np.arange(EPSF_SIZE) - EPSF_SIZE // 2) / EPSF_OVERSAMPLING
    fine = np.linspace(steps[0], steps[-1], _FINE_STEPS * (EPSF_SIZE - 1) + 1)
    fit = np.linalg.pinv(make_interp_spline(steps, np.eye(EPSF_SIZE))(fine))
    epsf = fit @ psf.response(detector, zones.x, zones.y, fine) @ fit.T
    epsf /= epsf.sum(axis=(1, 2), keepdims=True)
    n = len(zones.x)
    table = Table(
        {
            "BINX": zones.x_bin,
            "BINY": zones.y_bin,
            "XCENTER": zones.x,
            "YCENTER": zones.y,
            "XWIDTH": np.full(n, zones.x_width),
            "YWIDTH": np.full(n, zones.y_width),
            "NSTAR": np.full(n, 1000, dtype=np.int32),
            "NEFF_MEAN": 1.0 / (EPSF_OVERSAMPLING**2 * np.sum(epsf**2, axis=(1, 2))),
            "CWAVE": wavelength_um,
            "CBAND": bandwidth_um,
            "EPSF": epsf.astype(np.float32),
        }
    )
    hdu = fits.BinTableHDU(table, name="EPSF")
    hdu.header["OVSMPX"] = hdu.header["OVSMPY"] = EPSF_OVERSAMPLING
    hdu.header["DETCOORD"] = "sky"
    return hdu


def epsf_mosaic_hdu(table: fits.BinTableHDU) -> fits.ImageHDU:
    """Return the EPSF_MOSAIC extension of the product: all rows of the table side by side.

    Parameters
    ----------
    table : astropy.io.fits.BinTableHDU
        The EPSF extension.

    Returns
    -------
    astropy.io.fits.ImageHDU
        The zones at their places on the detector.
    """
    rows = table.data
    nx, ny = int(rows["BINX"].max()) + 1, int(rows["BINY"].max()) + 1
    blocks = rows["EPSF"].reshape(ny, nx, EPSF_SIZE, EPSF_SIZE).swapaxes(1, 2)
    mosaic = blocks.reshape(ny * EPSF_SIZE, nx * EPSF_SIZE)
    return fits.ImageHDU(np.ascontiguousarray(mosaic), name="EPSF_MOSAIC")
