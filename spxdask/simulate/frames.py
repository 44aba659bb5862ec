"""SPHEREx Level 2 frames with known truth and the header cards of a real frame.

The cards come from `2025W51_1A_0684_2`, detector 3; pointing, times and identity are replaced.
Pixel coordinates are 0-based. A window ``(x0, y0, nx, ny)`` is a cut-out of the full frame, and
positions on it are relative to its first pixel.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache, partial
from importlib import resources
from pathlib import Path

import numpy as np
from astropy import units as u
from astropy.coordinates import angular_separation
from astropy.io import fits
from astropy.table import Table
from astropy.time import Time
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_area
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import RegularGridInterpolator
from scipy.spatial import cKDTree

from spxdask.simulate.detector import (
    BAND_LIMITS_UM,
    FRAME_SIZE,
    WAVELENGTH_SHIFT_UM,
    make_gain_map,
    make_solid_angle_map,
    smooth_wavelength,
)
from spxdask.simulate.psf import (
    CUBE_OVERSAMPLING,
    CUBE_SIZE,
    CUBE_ZONES,
    EPSF_OVERSAMPLING,
    EPSF_SIZE,
    VaryingPsf,
    cube_hdu,
    epsf_table_hdu,
    epsf_zones,
    is_listing_transposed,
    sum_in_circles,
)
from spxdask.simulate.scene import (
    Sky,
    StampMaker,
    add_neighbours,
    disc_mask,
    make_sky,
    pixel_integrated_psf,
    pixel_response,
    psf_half_size,
    reaches,
    render_sources,
)

__all__ = [
    "BAND_LIMITS_UM",
    "CALIBRATED_SCENE",
    "FRAME_SIZE",
    "Exposure",
    "Planes",
    "SceneOptions",
    "Sky",
    "VaryingPsf",
    "add_neighbours",
    "aperture_shares",
    "make_planes",
    "make_sky",
    "pixel_integrated_psf",
    "wave_hdu",
    "write_frame",
]

# After 6.5.5, or with this tag, the zone centres in the PSF header are in the order of the planes.
_PIPELINE_VERSION = {"qr2": "6.5.5+psffix1", "qr3": "7.1.0"}
# Releases of pipeline 6.
_EARLY_RELEASES = {"qr1", "qr2"}
# The beam splitter's edge at 2.42 um is the last rows of detector 3 and the first of detector 4.
_DICHROIC_ROWS = {3: range(FRAME_SIZE - 12, FRAME_SIZE), 4: range(12)}
# Half-width in pixels of the largest stamps that field stars have.
_STAR_HALF_SIZE = 4
# Length of the longest cosmic-ray streak, in pixels.
_STREAK_PIXELS = 16
# Bad pixels keep this distance from the sky's sources, in pixels.
_CLEAN_RADIUS = 4.5
# Fraction of the harmless flags that come with a NaN variance.
_NAN_VARIANCE_SHARE = 0.25

_MJY_SR_PER_UJY_ARCSEC2 = (1.0 * u.uJy / u.arcsec**2).to_value(u.MJy / u.sr)

_OBS_ID = re.compile(r"(\d{4}W\d{2}_\d)([A-Z])(_\d{4}_\d)")

Window = tuple[int, int, int, int]


@cache
def _cards(name: str) -> fits.Header:
    """Return the real cards of one extension; callers must copy them before changing them."""
    text = resources.files("spxdask.simulate").joinpath("cards", f"{name}.txt").read_text("ascii")
    return fits.Header.fromstring(text, sep="\n")


@cache
def _bits() -> dict[str, int]:
    """Return the flag bit numbers by name."""
    return {key[3:]: bit for key, bit in _cards("flags").items() if key.startswith("MP_")}


def _mask(name: str) -> np.int32:
    """Return the flag value in which only the named bit is set."""
    return np.int32(1 << _bits()[name])


def _checked_window(window: Window | None) -> Window:
    """Return the window, or the full frame for None; raise ValueError if it is not within it."""
    if window is None:
        return (0, 0, FRAME_SIZE, FRAME_SIZE)
    x0, y0, nx, ny = window
    if min(x0, y0) < 0 or min(nx, ny) < 1 or max(x0 + nx, y0 + ny) > FRAME_SIZE:
        raise ValueError(f"window {window} is not within {FRAME_SIZE} x {FRAME_SIZE} pixels")
    return window


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """One detector of one pointing, as the archive names it.

    Attributes
    ----------
    obs_id : str
        Planning period, large and small slew, such as ``2025W51_1A_0684_2``.
    detector : int
        1 to 6.
    ra, dec : float
        ICRS position in degrees of the reference pixel (CRVAL).
    roll_deg : float
        Rotation of the sky coordinates relative to the real header's PC matrix.
    mjd_begin : float
        Start of the exposure, UTC.
    release : str
        Such as ``qr2``; it determines the file layout and the pipeline version.
    version, year, day : int
        Version and date of the processing, as in the file name.

    Raises
    ------
    ValueError
        If `obs_id` or `detector` is not of that form.
    """

    obs_id: str
    detector: int
    ra: float
    dec: float
    roll_deg: float
    mjd_begin: float
    release: str = "qr2"
    version: int = 21
    year: int = 2025
    day: int = 354

    def __post_init__(self) -> None:
        if not _OBS_ID.fullmatch(self.obs_id):
            raise ValueError(f"not a SPHEREx obs_id: {self.obs_id!r}")
        if self.detector not in BAND_LIMITS_UM:
            raise ValueError(f"detector must be 1 to 6, got {self.detector}")

    @property
    def band(self) -> str:
        """Name of the band.

        Returns
        -------
        str
            ``D1`` to ``D6``.
        """
        return f"D{self.detector}"

    @property
    def layout(self) -> str:
        """File layout of the release.

        Returns
        -------
        str
            ``qr2``, or ``qr3`` for that release and later ones.
        """
        return "qr2" if self.release in _EARLY_RELEASES else "qr3"

    @property
    def collection(self) -> str:
        """Name of the archive's collection.

        Returns
        -------
        str
            Such as ``spherex_qr2``.
        """
        return f"spherex_{self.release}"

    @property
    def filename(self) -> str:
        """Name of the archive file.

        Returns
        -------
        str
            The last part of the URI.
        """
        return f"level2_{self.obs_id}{self.band}_spx_{self._processing}.fits"

    @property
    def uri(self) -> str:
        """Path of the file below the archive's base URL.

        Returns
        -------
        str
            As the archive's tables give it.
        """
        planning_period = self.obs_id.rsplit("_", 2)[0]
        return (
            f"ibe/data/spherex/{self.release}/level2/{planning_period}/{self._processing}/"
            f"{self.detector}/{self.filename}"
        )

    @property
    def _processing(self) -> str:
        return f"l2b-v{self.version}-{self.year}-{self.day:03d}"

    @property
    def mjd_end(self) -> float:
        """End of the exposure.

        Returns
        -------
        float
            MJD, UTC.
        """
        return self.mjd_begin + _cards("image")["TELAPSE"] / 86400.0

    @property
    def wavelength_limits_um(self) -> tuple[float, float]:
        """Range of wavelengths over the whole detector.

        Returns
        -------
        tuple of float
            Shortest and longest wavelength in um.
        """
        return BAND_LIMITS_UM[self.detector]

    @cached_property
    def pixel_area_arcsec2(self) -> float:
        """Area of the reference pixel.

        Returns
        -------
        float
            Area in arcsec^2.
        """
        return proj_plane_pixel_area(self.wcs()) * 3600.0**2

    @property
    def fwhm_pixels(self) -> float:
        """Full width at half maximum of the Gaussian PSF.

        Returns
        -------
        float
            Width in pixels.
        """
        return _cards("image")["PSF_FWHM"] / np.sqrt(self.pixel_area_arcsec2)

    def image_header(self, window: Window | None = None) -> fits.Header:
        """Return the cards of the IMAGE extension, without those that describe the array.

        Parameters
        ----------
        window : (x0, y0, nx, ny), optional
            Cut-out of the frame; the full frame by default.

        Returns
        -------
        astropy.io.fits.Header
            A new header.
        """
        x0, y0, _, _ = _checked_window(window)
        header = _cards("image").copy()
        header["OBSID"] = self.obs_id
        header["DETECTOR"] = self.detector
        match = _OBS_ID.fullmatch(self.obs_id)
        assert match is not None, "checked when the exposure was made"
        plan, part, slews = match.groups()
        digits = re.sub(r"\D", "", f"{plan}{ord(part) - ord('A') + 1:02d}{slews}{self.detector}")
        header["EXPIDN"] = int(digits)

        header["CRVAL1"], header["CRVAL2"], header["LATPOLE"] = self.ra, self.dec, self.dec
        roll = np.radians(self.roll_deg)
        rotation = np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
        pc = np.array([[header[f"PC{i}_{j}"] for j in (1, 2)] for i in (1, 2)])
        for (i, j), value in np.ndenumerate(rotation @ pc):
            header[f"PC{i + 1}_{j + 1}"] = float(value)
        for axis, first in ((1, x0), (2, y0)):
            for alternate in ("", "A", "W"):
                header[f"CRPIX{axis}{alternate}"] -= first

        middle = 0.5 * (self.mjd_begin + self.mjd_end)
        moments = {"OBS": self.mjd_begin, "BEG": self.mjd_begin, "AVG": middle, "END": self.mjd_end}
        for name, mjd in moments.items():
            header[f"MJD-{name}"] = mjd
            header[f"DATE-{name}"] = Time(mjd, format="mjd", scale="utc", precision=3).isot
        return header

    def wcs(self, window: Window | None = None) -> WCS:
        """Return the celestial WCS of the frame or of a cut-out, with SIP distortions.

        Parameters
        ----------
        window : (x0, y0, nx, ny), optional
            Cut-out of the frame; the full frame by default.

        Returns
        -------
        astropy.wcs.WCS
            The WCS for 0-based positions on the cut-out.
        """
        return _make_wcs(self, window)

    def footprint(self, window: Window | None = None) -> tuple[tuple[float, float], ...]:
        """Return the outer corners of the four corner pixels.

        Parameters
        ----------
        window : (x0, y0, nx, ny), optional
            Cut-out of the frame; the full frame by default.

        Returns
        -------
        tuple of (float, float)
            ICRS right ascension and declination of each corner, in degrees.
        """
        _, _, nx, ny = _checked_window(window)
        x = np.array([0, nx, nx, 0]) - 0.5
        y = np.array([0, 0, ny, ny]) - 0.5
        ra, dec = self.wcs(window).all_pix2world(x, y, 0)
        return tuple(zip(ra.tolist(), dec.tolist(), strict=True))

    def wave_table(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64]]:
        """Return the control points and values of the WCS-WAVE extension.

        Returns
        -------
        x : (nx,) int array
            Control points in 1-based pixels of the full frame.
        y : (ny,) int array
            Control points along y.
        values : (ny, nx, 2) float array
            Central wavelength and bandwidth in um.
        """
        if self.layout == "qr3":
            nx, ny = 9, 9
        elif self.detector <= 4:
            nx, ny = 11, 11
        else:
            nx, ny = 9, 14
        x, y = (np.rint(np.linspace(1, FRAME_SIZE, n)).astype(np.int32) for n in (nx, ny))
        values = smooth_wavelength(self.detector, x, y[:, np.newaxis])
        return x, y, np.stack(values, axis=-1)

    def wavelength(
        self, x: ArrayLike, y: ArrayLike, *, window: Window | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return central wavelength and bandwidth at positions on the frame or a cut-out.

        Parameters
        ----------
        x, y : array_like
            0-based pixel positions.
        window : (x0, y0, nx, ny), optional
            Cut-out that the positions are on; the full frame by default.

        Returns
        -------
        wavelength_um : float array
            Central wavelength in um, of the positions' shape.
        bandwidth_um : float array
            Bandwidth in um.
        """
        x0, y0, _, _ = _checked_window(window)
        columns, rows, values = self.wave_table()
        # Extrapolated beyond the last control points, to the outer half pixels and to sources
        # just outside the frame.
        table = RegularGridInterpolator(
            (rows, columns), values, bounds_error=False, fill_value=None
        )
        found = table((np.asarray(y) + y0 + 1.0, np.asarray(x) + x0 + 1.0))
        return found[..., 0], found[..., 1]


@lru_cache(maxsize=64)
def _make_wcs(exposure: Exposure, window: Window | None) -> WCS:
    """Return the WCS of a frame, which is asked for several times and takes long to make."""
    return WCS(exposure.image_header(window))


@dataclass(frozen=True, kw_only=True)
class SceneOptions:
    """Everything on a frame except the sources of the sky.

    Attributes
    ----------
    zodi_scale : float
        Ratio of the zodiacal light in IMAGE to that in ZODI.
    zodi_level : (6,) tuple of float
        Mean of ZODI in MJy/sr, by detector.
    zodi_gradient : float
        Relative change of ZODI from the middle of the frame to an edge.
    diffuse_amplitude : float
        Largest value in MJy/sr of a linear gradient, zero in the middle, that is not in ZODI.
    read_noise : float
        Standard deviation in MJy/sr of a pixel without light.
    shot_noise : float
        Variance in (MJy/sr)^2 that 1 MJy/sr of light adds.
    crowding : float
        Fraction of the pixels, away from the sky's sources, near a faint field star.
    field_star_ujy : (float, float)
        Limits of the log-uniform flux densities of field stars.
    clear_radius : float
        Smallest distance in pixels of field stars from the sky's sources.
    source_radius : float
        Pixels whose centre is within this distance, in pixels, of a star or source have the
        flag SOURCE.
    bad_pixel_fraction : float
        Fraction of NONFUNC, HOT, COLD and OUTLIER pixels together. With 0 there are no DICHROIC
        rows either.
    cosmic_ray_density : float
        Number of TRANSIENT streaks per pixel of the frame.
    harmless_fraction : float
        Fraction of good pixels with FULLSAMPLE or PHANTOM; some of them have NaN variance.
    bad_pixels_on_sources : bool
        Whether bad pixels and NaN variances may lie near the sky's sources.
    psf : VaryingPsf, optional
        The true PSF; by default a round Gaussian, the same everywhere, of the width in PSF_FWHM.
    local_solid_angles : bool
        Whether a pixel's brightness is the flux in it divided by the pixel's own solid angle,
        instead of that of the reference pixel.
    early_gains : bool
        Whether IMAGE of releases before QR3 is on the gain scale of that time: divided by the
        good factors of the product l3_flux_corrections, and VARIANCE by their square.
    wavelength_maps : bool
        Whether the true wavelengths are those of version 5 of the product spectral_wcs. WCS-WAVE
        approximates them from QR3 on, and those of version 4 before.
    seed : int
        Combined with the exposure's obs_id and band into the seed of the random generator.

    Raises
    ------
    ValueError
        If a fraction is outside [0, 1).
    """

    zodi_scale: float = 1.08
    zodi_level: tuple[float, ...] = (0.25, 0.20, 0.17, 0.13, 0.30, 0.55)
    zodi_gradient: float = 0.05
    diffuse_amplitude: float = 0.01
    read_noise: float = 0.003
    shot_noise: float = 9e-5
    crowding: float = 0.55
    field_star_ujy: tuple[float, float] = (3.0, 300.0)
    clear_radius: float = 12.0
    source_radius: float = 3.0
    bad_pixel_fraction: float = 0.01
    cosmic_ray_density: float = 1e-4
    harmless_fraction: float = 0.004
    bad_pixels_on_sources: bool = False
    psf: VaryingPsf | None = None
    local_solid_angles: bool = False
    early_gains: bool = False
    wavelength_maps: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("crowding", "bad_pixel_fraction", "harmless_fraction"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


# What the calibration products are for: everything by which frames differ from the plain scene.
CALIBRATED_SCENE = SceneOptions(
    psf=VaryingPsf(), local_solid_angles=True, early_gains=True, wavelength_maps=True
)


@dataclass(frozen=True, kw_only=True)
class Planes:
    """The pixels of a frame, and the true values they were made from.

    Attributes
    ----------
    image, zodi : (ny, nx) float32 array
        In MJy/sr. `image` is NaN at NONFUNC pixels.
    variance : (ny, nx) float32 array
        In (MJy/sr)^2. NaN at NONFUNC pixels and at some good ones with a harmless flag.
    flags : (ny, nx) int32 array
        Bits as the cards of the FLAGS extension name them.
    source : (m,) int array
        Indices into the sky of the sources whose light reaches the frame; their centres may lie
        a few pixels off it.
    x, y : (m,) float array
        Their 0-based positions.
    wavelength_um, bandwidth_um : (m,) float array
        Central wavelength and bandwidth at their positions.
    flux_ujy : (m,) float array
        Their flux densities at that wavelength; all of their light.
    zodi_scale : float
        Ratio of the zodiacal light in `image` to `zodi`.
    options : SceneOptions
        What the planes were made with.
    """

    image: NDArray[np.float32]
    variance: NDArray[np.float32]
    zodi: NDArray[np.float32]
    flags: NDArray[np.int32]
    source: NDArray[np.int64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    wavelength_um: NDArray[np.float64]
    bandwidth_um: NDArray[np.float64]
    flux_ujy: NDArray[np.float64]
    zodi_scale: float
    options: SceneOptions = field(default_factory=SceneOptions)


def make_planes(
    exposure: Exposure, sky: Sky, options: SceneOptions, *, window: Window | None = None
) -> Planes:
    """Simulate the pixels of a frame.

    Parameters
    ----------
    exposure : Exposure
        Pointing and identity of the frame.
    sky : Sky
        Sources anywhere on the sphere.
    options : SceneOptions
        Background, noise, field stars and bad pixels.
    window : (x0, y0, nx, ny), optional
        Cut-out of the frame; the full frame by default. Smooth light and the sky's sources
        are those of the full frame, while field stars, noise and bad pixels are different.

    Returns
    -------
    Planes
        Equal arguments give equal planes.

    Raises
    ------
    ValueError
        If the window is not within the frame.
    """
    x0, y0, nx, ny = _checked_window(window)
    shape = (ny, nx)
    identity = hashlib.blake2b(f"{exposure.obs_id}{exposure.band}".encode(), digest_size=8)
    rng = np.random.default_rng([options.seed, int.from_bytes(identity.digest())])

    make_stamps, half = _stamp_maker(exposure, options, window)
    source, x, y = _sources_on_frame(exposure, sky, window, half)
    if options.wavelength_maps:
        wavelength_um, bandwidth_um = smooth_wavelength(
            exposure.detector, x + x0 + 1.0, y + y0 + 1.0
        )
        wavelength_um += WAVELENGTH_SHIFT_UM[exposure.detector]
    else:
        wavelength_um, bandwidth_um = exposure.wavelength(x, y, window=window)
    flux_ujy = sky.take(source).flux(wavelength_um)

    across = ((np.arange(nx) + x0) / (FRAME_SIZE - 1) * 2.0 - 1.0)[np.newaxis]
    along = ((np.arange(ny) + y0) / (FRAME_SIZE - 1) * 2.0 - 1.0)[:, np.newaxis]
    slope_angle = rng.uniform(0.0, 2.0 * np.pi)
    diffuse = np.cos(slope_angle) * across + np.sin(slope_angle) * along
    tilt = options.zodi_gradient * (0.8 * along + 0.6 * across + 0.3 * (along**2 - 1.0 / 3.0))
    zodi = (options.zodi_level[exposure.detector - 1] * (1.0 + tilt)).astype(np.float32)

    star_x, star_y, star_ujy = _field_stars(rng, options, x, y, shape)
    all_x, all_y = np.concatenate([x, star_x]), np.concatenate([y, star_y])
    brightness = np.concatenate([flux_ujy, star_ujy])
    if options.local_solid_angles:
        brightness *= _MJY_SR_PER_UJY_ARCSEC2
    else:
        brightness *= _MJY_SR_PER_UJY_ARCSEC2 / exposure.pixel_area_arcsec2
    render = partial(render_sources, make_stamps=make_stamps, shape=shape)
    if half <= _STAR_HALF_SIZE:
        light = render(all_x, all_y, brightness, half=half)
    else:
        # Field stars are many, and so faint that their outer light does not show.
        light = render(x, y, brightness[: len(x)], half=half)
        light += render(star_x, star_y, brightness[len(x) :], half=_STAR_HALF_SIZE)
    if options.local_solid_angles:
        light /= make_solid_angle_map(exposure.wcs(window), shape)
    light += options.zodi_scale * zodi
    light += options.diffuse_amplitude / np.sqrt(2.0) * diffuse

    variance = (options.read_noise**2 + options.shot_noise * light.clip(min=0.0)).astype(np.float32)
    noise = rng.standard_normal(shape, dtype=np.float32)
    noise *= np.sqrt(variance)
    image = (light + noise).astype(np.float32)
    if options.early_gains and exposure.layout == "qr2":
        gain = make_gain_map(exposure.detector)[y0 : y0 + ny, x0 : x0 + nx]
        image /= gain
        variance /= gain**2

    flags = np.zeros(shape, dtype=np.int32)
    flags[disc_mask(all_x, all_y, options.source_radius, shape)] = _mask("SOURCE")
    if options.bad_pixels_on_sources:
        spared = np.zeros(shape, dtype=bool)
    else:
        spared = disc_mask(x, y, _CLEAN_RADIUS, shape)
    if options.bad_pixel_fraction > 0.0 and exposure.detector in _DICHROIC_ROWS:
        dichroic = np.isin(np.arange(ny) + y0, _DICHROIC_ROWS[exposure.detector])
        flags[dichroic[:, np.newaxis] & ~spared] |= _mask("DICHROIC")
    _spoil_pixels(rng, image, variance, flags, spared, options)
    _streak_pixels(rng, image, flags, spared, options.cosmic_ray_density)
    return Planes(
        image=image,
        variance=variance,
        zodi=zodi,
        flags=flags,
        source=source,
        x=x,
        y=y,
        wavelength_um=wavelength_um,
        bandwidth_um=bandwidth_um,
        flux_ujy=flux_ujy,
        zodi_scale=options.zodi_scale,
        options=options,
    )


def aperture_shares(
    exposure: Exposure, planes: Planes, radius: float, *, window: Window | None = None
) -> NDArray[np.float64]:
    """Return the share of each source's light within a circle around its true position.

    Parameters
    ----------
    exposure : Exposure
        The exposure of the planes.
    planes : Planes
        The sources and the scene.
    radius : float
        Radius of the circle in pixels.
    window : (x0, y0, nx, ny), optional
        The cut-out that `planes` was made for; the full frame by default.

    Returns
    -------
    (m,) float array
        Sums over the pixels with the exact fraction of each within the circle, by photutils.

    Raises
    ------
    ValueError
        If the circle is larger than the PSF's stamps.
    """
    make_stamps, half = _stamp_maker(exposure, planes.options, window)
    stamps = make_stamps(planes.x, planes.y, 2 * max(half, math.ceil(radius + 0.5)) + 1)
    return sum_in_circles(stamps, planes.x, planes.y, radius)


def _stamp_maker(
    exposure: Exposure, options: SceneOptions, window: Window | None
) -> tuple[StampMaker, int]:
    """Return what makes the stamps of sources, and their half-width in pixels."""
    if options.psf is None:
        fwhm_pixels = exposure.fwhm_pixels

        def round_stamps(
            x: NDArray[np.float64], y: NDArray[np.float64], size: int
        ) -> NDArray[np.float64]:
            return pixel_integrated_psf(x, y, fwhm_pixels, size)

        return round_stamps, psf_half_size(fwhm_pixels)

    psf = options.psf
    x0, y0, _, _ = _checked_window(window)

    def varying_stamps(
        x: NDArray[np.float64], y: NDArray[np.float64], size: int
    ) -> NDArray[np.float64]:
        return psf.stamps(exposure.detector, x + x0, y + y0, size)

    return varying_stamps, psf.stamp_half_size


def _sources_on_frame(
    exposure: Exposure, sky: Sky, window: Window | None, half: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return indices and positions of the sky's sources whose PSF touches the frame."""
    _, _, nx, ny = _checked_window(window)
    wcs = exposure.wcs(window)
    center = wcs.all_pix2world(0.5 * (nx - 1), 0.5 * (ny - 1), 0)
    # Far from the frame the distortion diverges, and the projection also maps the opposite side
    # of the sky onto the frame. So only sources near the frame are projected.
    corner_distance = max(float(_distance(center, c)) for c in exposure.footprint(window))
    margin = np.radians((half + 1) * np.sqrt(2.0 * exposure.pixel_area_arcsec2) / 3600.0)
    near = np.flatnonzero(_distance(center, (sky.ra, sky.dec)) <= corner_distance + margin)
    x, y = wcs.all_world2pix(sky.ra[near], sky.dec[near], 0, tolerance=1e-8)
    touching = reaches(x, y, half, (ny, nx))
    return near[touching], x[touching], y[touching]


def _distance(
    first: tuple[ArrayLike, ArrayLike], second: tuple[ArrayLike, ArrayLike]
) -> NDArray[np.float64]:
    """Return the angular distance in radians between positions (ra, dec) in degrees."""
    return angular_separation(*map(np.radians, (*first, *second)))


def _field_stars(
    rng: np.random.Generator,
    options: SceneOptions,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    shape: tuple[int, int],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return positions and fluxes (uJy) of faint stars that are not near the positions x, y."""
    rim = np.ceil(options.source_radius)
    ny, nx = shape
    # Randomly placed discs leave exp(-density x area) of the pixels uncovered.
    density = -np.log1p(-options.crowding) / (np.pi * options.source_radius**2)
    n = rng.poisson(density * (nx + 2.0 * rim) * (ny + 2.0 * rim))
    star_x = rng.uniform(-0.5 - rim, nx - 0.5 + rim, n)
    star_y = rng.uniform(-0.5 - rim, ny - 0.5 + rim, n)
    faintest, brightest = np.log(options.field_star_ujy)
    flux_ujy = np.exp(rng.uniform(faintest, brightest, n))
    distance, _ = cKDTree(np.column_stack([x, y])).query(
        np.column_stack([star_x, star_y]), distance_upper_bound=options.clear_radius
    )
    clear = np.isinf(distance)
    return star_x[clear], star_y[clear], flux_ujy[clear]


def _spoil_pixels(
    rng: np.random.Generator,
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    flags: NDArray[np.int32],
    spared: NDArray[np.bool_],
    options: SceneOptions,
) -> None:
    """Change single pixels in place: dead, hot, cold and outlying ones, and harmless flags."""

    def pick(fraction: float) -> tuple[NDArray[np.intp], ...]:
        n = rng.poisson(fraction * image.size)
        return np.unravel_index(rng.integers(image.size, size=n), image.shape)

    def pick_allowed(fraction: float) -> tuple[NDArray[np.intp], ...]:
        picked = pick(fraction)
        return tuple(index[~spared[picked]] for index in picked)

    for name in ("FULLSAMPLE", "PHANTOM"):
        flags[pick(0.5 * options.harmless_fraction)] |= _mask(name)
    unknown = pick_allowed(_NAN_VARIANCE_SHARE * options.harmless_fraction)
    flags[unknown] |= _mask("FULLSAMPLE")
    variance[unknown] = np.nan

    bad = options.bad_pixel_fraction
    hot = pick_allowed(0.1 * bad)
    image[hot] += rng.lognormal(1.0, 1.0, hot[0].size)
    flags[hot] |= _mask("HOT")
    cold = pick_allowed(0.1 * bad)
    image[cold] *= 0.2
    flags[cold] |= _mask("COLD")
    outlier = pick_allowed(0.5 * bad)
    image[outlier] += rng.choice([-1.0, 1.0], outlier[0].size) * rng.uniform(
        0.05, 0.5, outlier[0].size
    )
    flags[outlier] |= _mask("OUTLIER")
    dead = pick_allowed(0.3 * bad)
    image[dead] = variance[dead] = np.nan
    flags[dead] |= _mask("NONFUNC")


def _streak_pixels(
    rng: np.random.Generator,
    image: NDArray[np.float32],
    flags: NDArray[np.int32],
    spared: NDArray[np.bool_],
    density: float,
) -> None:
    """Add cosmic-ray streaks of up to `_STREAK_PIXELS` pixels in place."""
    ny, nx = image.shape
    n = rng.poisson(density * image.size)
    angle = rng.uniform(0.0, 2.0 * np.pi, (n, 1))
    step = np.arange(_STREAK_PIXELS)
    column = np.rint(rng.uniform(0, nx, (n, 1)) + step * np.cos(angle)).astype(np.int64)
    row = np.rint(rng.uniform(0, ny, (n, 1)) + step * np.sin(angle)).astype(np.int64)
    energy = np.broadcast_to(rng.lognormal(0.0, 1.0, (n, 1)), row.shape)
    hit = step < rng.integers(1, _STREAK_PIXELS + 1, (n, 1))
    hit &= (column >= 0) & (column < nx) & (row >= 0) & (row < ny)
    row, column, energy = row[hit], column[hit], energy[hit]
    allowed = ~spared[row, column]
    row, column = row[allowed], column[allowed]
    image[row, column] += energy[allowed]
    flags[row, column] |= _mask("TRANSIENT")


def write_frame(
    path: str | os.PathLike[str],
    exposure: Exposure,
    planes: Planes,
    *,
    window: Window | None = None,
    layout: str | None = None,
    pipeline_version: str | None = None,
) -> None:
    """Write a Level 2 multi-extension FITS file.

    The file gets its name only when it is complete.

    Parameters
    ----------
    path : path-like
        File to write; an existing one is replaced.
    exposure : Exposure
        Pointing and identity of the frame.
    planes : Planes
        The pixels.
    window : (x0, y0, nx, ny), optional
        The cut-out that `planes` was made for; the full frame by default.
    layout : {"qr2", "qr3"}, optional
        File layout; by default that of the exposure's release.
    pipeline_version : str, optional
        The card VERSION; by default one of that layout. Up to ``6.5.5``, without ``+psffix1``, the
        header of a varying PSF lists the zones in the wrong order, as real ones do.

    Raises
    ------
    ValueError
        If `planes` does not have the shape of the window, or the layout is unknown.
    """
    options = planes.options
    layout = exposure.layout if layout is None else layout
    if layout not in _PIPELINE_VERSION:
        raise ValueError(f"layout must be one of {sorted(_PIPELINE_VERSION)}, got {layout!r}")
    _, _, nx, ny = _checked_window(window)
    if planes.image.shape != (ny, nx):
        raise ValueError(f"planes of shape {planes.image.shape} do not fill a {ny} x {nx} window")

    primary = fits.PrimaryHDU()
    primary.header["TELESCOP"] = "SPHEREx"
    version = _PIPELINE_VERSION[layout] if pipeline_version is None else pipeline_version
    primary.header["VERSION"] = (version, "Version of the Level 2 pipeline")
    image_header = exposure.image_header(window)
    _count_flags(image_header, planes.flags)
    if options.psf is not None:
        image_header["PSF_FWHM"] = options.psf.fwhm_arcsec[exposure.detector - 1]
    if options.local_solid_angles:
        # Also in cut-outs, these are those of the whole detector.
        median, scatter = _solid_angle_statistics()
        image_header["OMEGA_MEDIAN"], image_header["OMEGA_STDDEV"] = median, scatter
    has_new_wavelengths = options.wavelength_maps and layout != "qr2"
    shift_um = WAVELENGTH_SHIFT_UM[exposure.detector] if has_new_wavelengths else 0.0
    hdus = fits.HDUList(
        [
            primary,
            fits.ImageHDU(planes.image, image_header, name="IMAGE"),
            _flags_hdu(planes.flags, layout),
            fits.ImageHDU(planes.variance, _unit_header("MJy2 / sr2"), name="VARIANCE"),
            fits.ImageHDU(planes.zodi, _unit_header("MJy / sr"), name="ZODI"),
            _psf_model_hdu(exposure, options.psf, layout, version),
            wave_hdu(exposure, shift_um),
        ]
    )
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        hdus.writeto(partial, overwrite=True)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _unit_header(unit: str) -> fits.Header:
    return fits.Header([("BUNIT", unit, "Unit of pixel value")])


def _count_flags(header: fits.Header, flags: NDArray[np.int32]) -> None:
    """Set the numbers of flagged pixels in a header."""
    for key in header["L2 N_*"]:
        header[key] = np.count_nonzero(flags & _mask(key.removeprefix("L2 N_")))
    if "PXSRCMSK" in header:
        header["PXSRCMSK"] = round(100.0 * header["L2 N_SOURCE"] / flags.size, 2)


def _flags_hdu(flags: NDArray[np.int32], layout: str) -> fits.ImageHDU | fits.CompImageHDU:
    """Return the FLAGS extension: plain with MP_ cards, or compressed with MSKN cards."""
    header = _cards("flags").copy()
    _count_flags(header, flags)
    if layout == "qr2":
        return fits.ImageHDU(flags, header, name="FLAGS")
    del header["MP_*"]
    for name, bit in _bits().items():
        header[f"MSKN{bit:04d}"] = name
    return fits.CompImageHDU(
        flags, header, name="FLAGS", compression_type="RICE_1", tile_shape=(1, flags.shape[1])
    )


@lru_cache(maxsize=1)
def _solid_angle_statistics() -> tuple[float, float]:
    """Return median and standard deviation of the pixels' solid angles, in arcsec^2."""
    # They are the same for all exposures, as these differ by a rotation of the sky alone.
    exposure = Exposure(
        obs_id="2025W01_1A_0001_1", detector=1, ra=0.0, dec=0.0, roll_deg=0.0, mjd_begin=60676.0
    )
    areas = make_solid_angle_map(exposure.wcs(), (FRAME_SIZE, FRAME_SIZE))
    return float(np.median(areas)), float(np.std(areas))


def _psf_model_hdu(
    exposure: Exposure, psf: VaryingPsf | None, layout: str, version: str
) -> fits.ImageHDU | fits.BinTableHDU:
    """Return the PSF extension of a layout, or its EPSF extension."""
    detector = exposure.detector
    if layout == "qr2":
        if psf is None:
            return _psf_hdu(exposure)
        return cube_hdu(psf, detector, is_transposed=is_listing_transposed(version))
    if psf is None:
        return _epsf_hdu(exposure)
    zones = epsf_zones(detector)
    wavelength, bandwidth = smooth_wavelength(detector, zones.x + 1.0, zones.y + 1.0)
    return epsf_table_hdu(psf, detector, wavelength + WAVELENGTH_SHIFT_UM[detector], bandwidth)


def _zones(n: int) -> tuple[NDArray[np.float64], float]:
    """Return the centres in 1-based pixels, and the width, of n equal zones along an axis."""
    return (2 * np.arange(n) + 1) * FRAME_SIZE / (2 * n) + 0.5, FRAME_SIZE / n


def _psf_hdu(exposure: Exposure) -> fits.ImageHDU:
    """Return the PSF extension: an oversampled plane of unit sum for each zone, x fastest."""
    fwhm = exposure.fwhm_pixels * CUBE_OVERSAMPLING
    plane = pixel_integrated_psf(0.0, 0.0, fwhm, CUBE_SIZE).astype(np.float32)
    centers, width = _zones(CUBE_ZONES)
    header = fits.Header([("OVERSAMP", CUBE_OVERSAMPLING, "PSF samples per pixel, each axis")])
    for i, (y, x) in enumerate(itertools.product(centers, centers), start=1):
        header.extend(
            [(f"XCTR_{i}", x), (f"YCTR_{i}", y), (f"XWID_{i}", width), (f"YWID_{i}", width)]
        )
    return fits.ImageHDU(np.tile(plane, (CUBE_ZONES**2, 1, 1)), header, name="PSF")


def _epsf_hdu(exposure: Exposure) -> fits.BinTableHDU:
    """Return the EPSF extension: the fraction of the flux in a pixel, by offset from the source."""
    steps = (np.arange(EPSF_SIZE) - EPSF_SIZE // 2) / EPSF_OVERSAMPLING
    fwhm_pixels = exposure.fwhm_pixels
    response = pixel_response(steps, fwhm_pixels)
    epsf = np.outer(response, response).astype(np.float32)
    nx, ny = (11, 41) if exposure.detector == 3 else (21, 21)
    (x_centers, x_width), (y_centers, y_width) = _zones(nx), _zones(ny)
    y_bin, x_bin = (index.ravel().astype(np.int32) for index in np.indices((ny, nx)))
    x, y = x_centers[x_bin], y_centers[y_bin]
    wavelength_um, bandwidth_um = exposure.wavelength(x - 1.0, y - 1.0)
    centered = pixel_integrated_psf(0.0, 0.0, fwhm_pixels, 2 * psf_half_size(fwhm_pixels) + 1)
    n = nx * ny
    table = Table(
        {
            "BINX": x_bin,
            "BINY": y_bin,
            "XCENTER": x,
            "YCENTER": y,
            "XWIDTH": np.full(n, x_width),
            "YWIDTH": np.full(n, y_width),
            "NSTAR": np.full(n, 1000, dtype=np.int32),
            "NEFF_MEAN": np.full(n, 1.0 / np.sum(centered**2)),
            "CWAVE": wavelength_um,
            "CBAND": bandwidth_um,
            "EPSF": np.tile(epsf, (n, 1, 1)),
        }
    )
    hdu = fits.BinTableHDU(table, name="EPSF")
    hdu.header["OVSMPX"] = hdu.header["OVSMPY"] = EPSF_OVERSAMPLING
    hdu.header["DETCOORD"] = _cards("image")["DETCOORD"]
    return hdu


def wave_hdu(exposure: Exposure, shift_um: float = 0.0) -> fits.BinTableHDU:
    """Return the WCS-WAVE extension.

    Parameters
    ----------
    exposure : Exposure
        The exposure, of which detector and release matter.
    shift_um : float
        Added to the wavelengths, in um.

    Returns
    -------
    astropy.io.fits.BinTableHDU
        A table of one row.
    """
    x, y, values = exposure.wave_table()
    values[..., 0] += shift_um
    ny, nx, _ = values.shape
    return fits.BinTableHDU.from_columns(
        [
            fits.Column("X", f"{nx}J", array=x[np.newaxis]),
            fits.Column("Y", f"{ny}J", array=y[np.newaxis]),
            fits.Column(
                "VALUES", f"{values.size}D", dim=f"(2,{nx},{ny})", array=values[np.newaxis]
            ),
        ],
        name="WCS-WAVE",
    )
