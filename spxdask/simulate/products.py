"""Calibration products of the simulated detectors, as files in the layout of the archive's bucket.

The tokens are those seen at the archive. The products of QR3 hold what frames of
`spxdask.simulate.frames.CALIBRATED_SCENE` are simulated with.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import Table
from numpy.typing import NDArray

from spxdask.simulate.detector import (
    FRAME_SIZE,
    RESOLVING_POWER,
    WAVELENGTH_SHIFT_UM,
    make_gain_map,
    make_solid_angle_map,
    smooth_wavelength,
)
from spxdask.simulate.frames import Exposure, VaryingPsf, wave_hdu
from spxdask.simulate.psf import cube_hdu, epsf_mosaic_hdu, epsf_table_hdu, epsf_zones

__all__ = ["CATALOG", "SERVICE_PREFIX", "ArchivedProduct", "make_products"]

# The start of every URI at the archive; below it, its bucket has the same folders.
SERVICE_PREFIX = "ibe/data/spherex/"
# What the archive has: release, family, token, and detectors; None is a file for all detectors.
CATALOG: tuple[tuple[str, str, str, tuple[int | None, ...]], ...] = (
    ("qr2", "solid_angle_pixel_map", "cal-sapm-v2-2025-164", (1, 2, 3, 4, 5, 6)),
    ("qr3", "solid_angle_pixel_map", "cal-sapm-v3-2026-191", (1, 2, 3, 4, 5, 6)),
    ("qr2", "spectral_wcs", "cal-wcs-v4-2025-254", (1, 2, 3, 4, 5, 6)),
    ("qr3", "spectral_wcs", "cal-swcs-v5-2026-191", (1, 2, 3, 4, 5, 6)),
    ("qr2", "average_psf", "cal-psf-v4-2025-161", (1, 2, 3, 4, 5, 6)),
    ("qr2", "average_psf", "cal-psf-v5-2025-206", (1, 2, 3, 4, 5, 6)),
    ("qr2", "average_psf", "cal-psf-v5-2026-082", (1, 2, 3, 4, 5, 6)),
    ("qr3", "epsf", "cal-epsf-v1-2026-191", (1, 2, 4, 5, 6)),
    ("qr3", "epsf", "cal-epsf-v2-2026-191", (3,)),
    ("qr3", "l3_flux_corrections", "cal-flxc-v1-2026-191", (1, 2, 3, 4, 5, 6)),
    ("qr2", "spectral_channels", "cal-sch-v1-2026-106", (None,)),
)

# Fraction of the flux corrections that are wild, their limits, and how many of those are NaN.
_WILD_FRACTION, _WILD_LIMITS, _WILD_NAN_SHARE = 3e-4, (0.011, 3653.0), 0.1
# The solid angles of before QR3 differ by this factor.
_OLD_SOLID_ANGLE = 1.0005
# Cubes up to this date list their zones in the wrong order.
_LAST_TRANSPOSED_DATE = "2025-206"
_N_CHANNELS = 17


@dataclass(frozen=True, kw_only=True)
class ArchivedProduct:
    """One calibration product as the archive names it.

    Attributes
    ----------
    release, family, token : str
        Such as ``qr3``, ``epsf`` and ``cal-epsf-v1-2026-191``.
    detector : int or None
        1 to 6; None for a product of all detectors.
    path : Path
        File on disk.
    """

    release: str
    family: str
    token: str
    detector: int | None
    path: Path

    @property
    def key(self) -> str:
        """Path of the file in the archive's bucket, and in a mirror.

        Returns
        -------
        str
            Release, family, token, detector and file name.
        """
        folder = f"{self.release}/{self.family}/{self.token}"
        if self.detector is None:
            return f"{folder}/{self.family}_spx_{self.token}.fits.gz"
        return f"{folder}/{self.detector}/{self.family}_D{self.detector}_spx_{self.token}.fits"

    @property
    def uri(self) -> str:
        """Path of the file below the archive's base URL.

        Returns
        -------
        str
            As the archive's tables would give it.
        """
        return SERVICE_PREFIX + self.key


def make_products(
    folder: str | os.PathLike[str],
    *,
    detectors: Collection[int] = (1, 2, 3, 4, 5, 6),
    families: Collection[str] | None = None,
    tokens: Collection[str] | None = None,
    psf: VaryingPsf | None = None,
    wavelength_shift: bool = True,
    size: int = FRAME_SIZE,
) -> list[ArchivedProduct]:
    """Write calibration products.

    Parameters
    ----------
    folder : path-like
        Receives the tree ``release/family/token/detector/file``, as the archive's bucket has it.
    detectors : collection of int
        1 to 6.
    families : collection of str, optional
        Those of `CATALOG` by default.
    tokens : collection of str, optional
        Those of `CATALOG` by default.
    psf : VaryingPsf, optional
        The true PSF; by default that of ``CALIBRATED_SCENE``.
    wavelength_shift : bool
        Whether version 5 of the wavelengths differs from version 4, and from WCS-WAVE of frames
        before QR3, by ``WAVELENGTH_SHIFT_UM``.
    size : int
        Maps have size x size pixels, from the first pixel of the detector. Real ones have 2040;
        less saves time where a test is about transfers.

    Returns
    -------
    list of ArchivedProduct
        In the order of `CATALOG`.

    Raises
    ------
    ValueError
        If a family or token is not in `CATALOG`.
    """
    for kind, asked, known in (
        ("family", families, {family for _, family, _, _ in CATALOG}),
        ("token", tokens, {token for _, _, token, _ in CATALOG}),
    ):
        if unknown := sorted(set(asked or ()) - known):
            raise ValueError(f"unknown {kind} {unknown[0]!r}, must be one of {sorted(known)}")
    products = [
        ArchivedProduct(
            release=release, family=family, token=token, detector=detector, path=Path(folder)
        )
        for release, family, token, made_for in CATALOG
        if (families is None or family in families) and (tokens is None or token in tokens)
        for detector in made_for
        if detector is None or detector in detectors
    ]
    maker = _Maker(VaryingPsf() if psf is None else psf, wavelength_shift, size)
    return [_write(product, maker) for product in products]


def _write(product: ArchivedProduct, maker: _Maker) -> ArchivedProduct:
    """Write one product below the folder that it names as its path, and return it with its file."""
    path = product.path / product.key
    path.parent.mkdir(parents=True, exist_ok=True)
    hdus = fits.HDUList([fits.PrimaryHDU(), *maker.extensions(product)])
    hdus[0].header["TELESCOP"] = "SPHEREx"
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        hdus.writeto(partial, overwrite=True)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return ArchivedProduct(
        release=product.release,
        family=product.family,
        token=product.token,
        detector=product.detector,
        path=path,
    )


@dataclass(frozen=True)
class _Maker:
    """Makes the content of products."""

    psf: VaryingPsf
    wavelength_shift: bool
    size: int

    def extensions(self, product: ArchivedProduct) -> Iterator[fits.hdu.base.ExtensionHDU]:
        """Yield the extensions of a product."""
        detector = product.detector
        if detector is None:
            yield from self._spectral_channels()
            return
        hdus: Iterable[fits.hdu.base.ExtensionHDU]
        match product.family:
            case "solid_angle_pixel_map":
                hdus = self._solid_angles(is_old=product.release == "qr2")
            case "spectral_wcs":
                hdus = self._wavelengths(detector, is_old=product.release == "qr2")
            case "average_psf":
                is_transposed = product.token[-8:] <= _LAST_TRANSPOSED_DATE
                hdus = [cube_hdu(self.psf, detector, is_transposed=is_transposed)]
            case "epsf":
                zones = epsf_zones(detector)
                values = smooth_wavelength(detector, zones.x + 1.0, zones.y + 1.0)
                wavelength = values[0] + self._shift_um(detector)
                table = epsf_table_hdu(self.psf, detector, wavelength, values[1])
                hdus = [table, epsf_mosaic_hdu(table)]
            case _:
                hdus = self._flux_corrections(detector)
        for hdu in hdus:
            hdu.header["DETECTOR"] = (detector, "1-3: SWIR, 4-6: MWIR")
            hdu.header["DETCOORD"] = "sky"
            yield hdu

    def _shift_um(self, detector: int) -> float:
        return WAVELENGTH_SHIFT_UM[detector] if self.wavelength_shift else 0.0

    def _solid_angles(self, *, is_old: bool) -> list[fits.ImageHDU]:
        factor = _OLD_SOLID_ANGLE if is_old else 1.0
        return [_map_hdu("IMAGE", factor * self._solid_angle_map, "arcsec2")]

    @cached_property
    def _solid_angle_map(self) -> NDArray[np.float64]:
        # Simulated detectors differ in their wavelengths and PSF, but not in their WCS.
        return make_solid_angle_map(_any_exposure(1, "qr3").wcs(), (self.size, self.size))

    def _wavelength_map(self, detector: int) -> NDArray[np.float64]:
        """Return wavelengths in um, which are a function of y times one of x."""
        pixel = np.arange(1.0, self.size + 1.0)
        along_x, _ = smooth_wavelength(detector, pixel, 1.0)
        along_y, _ = smooth_wavelength(detector, 1.0, pixel)
        return np.outer(along_y / along_y[0], along_x)

    def _wavelengths(
        self, detector: int, *, is_old: bool
    ) -> Iterator[fits.ImageHDU | fits.BinTableHDU]:
        wavelength = self._wavelength_map(detector)
        shift_um = 0.0 if is_old else self._shift_um(detector)
        yield _map_hdu("CWAVE", wavelength + shift_um, "um")
        yield _map_hdu("CBAND", wavelength / RESOLVING_POWER[detector], "um")
        yield wave_hdu(_any_exposure(detector, "qr2" if is_old else "qr3"), shift_um)

    def _flux_corrections(self, detector: int) -> list[fits.ImageHDU]:
        gain = make_gain_map(detector)[: self.size, : self.size].copy()
        rng = np.random.default_rng([detector, 1])
        n = round(_WILD_FRACTION * gain.size) + 2
        lowest, highest = np.log(_WILD_LIMITS)
        wild = np.exp(rng.uniform(lowest, highest, n))
        wild[rng.uniform(size=n) < _WILD_NAN_SHARE] = np.nan
        # Some are moderate, so the extremes are there in any case.
        wild[:2] = _WILD_LIMITS
        gain.reshape(-1)[rng.choice(gain.size, n, replace=False)] = wild
        return [_map_hdu("IMAGE", gain, "")]

    def _spectral_channels(self) -> Iterator[fits.ImageHDU | fits.BinTableHDU]:
        text = resources.files("spxdask.simulate").joinpath("cards", "channels.csv").read_text()
        rows = Table.read(text, format="ascii.csv")
        channels = np.empty((6, self.size, self.size), dtype=np.uint8)
        for detector, plane in enumerate(channels, start=1):
            lowest = rows["min_um"][rows["detector"] == detector][1:]
            plane[:] = np.searchsorted(lowest, self._wavelength_map(detector), side="right") + 1
        yield fits.ImageHDU(channels, name="CHANNEL_MAP")
        yield fits.BinTableHDU(
            Table(
                {
                    "DETECTOR": rows["detector"].astype(np.int32),
                    "SUBCHAN": rows["subchannel"].astype(np.int32),
                    "WAVELENGTH": rows["wavelength_um"],
                    "WL_MIN": rows["min_um"],
                    "WL_MAX": rows["max_um"],
                    "R": rows["resolving_power"].astype(float),
                    "R_STD": np.zeros(6 * _N_CHANNELS),
                    "BANDWIDTH": rows["bandwidth_um"],
                }
            ),
            name="SPECTRAL_CHANNELS",
        )


def _map_hdu(name: str, values: NDArray[np.floating], unit: str) -> fits.ImageHDU:
    """Return a map as an extension."""
    header = fits.Header([("BUNIT", unit, "Unit of pixel value")] if unit else [])
    return fits.ImageHDU(values.astype(np.float32), header, name=name)


def _any_exposure(detector: int, release: str) -> Exposure:
    """Return an exposure of a detector, as products do not depend on where it points."""
    return Exposure(
        obs_id="2025W01_1A_0001_1",
        detector=detector,
        ra=0.0,
        dec=0.0,
        roll_deg=0.0,
        mjd_begin=60676.0,
        release=release,
    )
