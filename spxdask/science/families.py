"""The families of calibration products that change what is measured, as the archive names them."""

from __future__ import annotations

__all__ = ["CHANNELS", "EPSF", "FAMILIES", "FLUX_CORRECTION", "SOLID_ANGLE", "SPECTRAL_WCS"]

SPECTRAL_WCS = "spectral_wcs"
SOLID_ANGLE = "solid_angle_pixel_map"
EPSF = "epsf"
FLUX_CORRECTION = "l3_flux_corrections"
# Edges of spectral channels, for all detectors in one file; nothing is measured with them.
CHANNELS = "spectral_channels"
FAMILIES = (SPECTRAL_WCS, SOLID_ANGLE, EPSF, FLUX_CORRECTION)
