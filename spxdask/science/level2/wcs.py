"""From the sky to the detector and back: the TAN-SIP projection of a Level 2 frame.

Formulae: Calabretta & Greisen (2002, A&A 395, 1077) for the gnomonic projection, Shupe
et al. (2005, ADASS XIV, 491) for SIP. Pixel coordinates are 0-based, the centre of the
first pixel is (0, 0); angles are ICRS degrees.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.polynomial.polynomial import polyder, polyval2d
from numpy.typing import ArrayLike

from spxdask.errors import FrameError
from spxdask.science.kernels.projection import distort, project_to_pixels
from spxdask.science.level2.fits import Header

_MATRIX_OR_PARAMETER = re.compile(r"(CD|PC)[12]_[12]|PV[12]_\d+|CROTA[12]")


@dataclass(frozen=True, kw_only=True)
class TanSip:
    """A gnomonic projection with SIP distortion.

    Attributes
    ----------
    crpix : (2,) float array
        Reference pixel, 0-based (x, y).
    crval : (2,) float array
        ICRS position of the reference pixel, deg.
    matrix : (2, 2) float array
        Pixels to projection plane, deg a pixel.
    lonpole : float
        Native longitude of the celestial pole, deg.
    a, b : (n, n) float array
        SIP coefficients of u^p v^q at [p, q].
    """

    crpix: np.ndarray
    crval: np.ndarray
    matrix: np.ndarray
    lonpole: float
    a: np.ndarray
    b: np.ndarray

    @classmethod
    def from_header(cls, header: Header) -> TanSip:
        """Read the projection from the cards of an image extension.

        Parameters
        ----------
        header : Header
            Of IMAGE.

        Returns
        -------
        TanSip
            The projection.

        Raises
        ------
        FrameError
            If the header has no usable RA---TAN or RA---TAN-SIP projection.
        """
        types = (header.get("CTYPE1"), header.get("CTYPE2"))
        if types not in (("RA---TAN-SIP", "DEC--TAN-SIP"), ("RA---TAN", "DEC--TAN")):
            raise FrameError(f"no usable celestial WCS: CTYPE1, CTYPE2 are {types}")
        if not any(name in header for name in ("CD1_1", "PC1_1", "CDELT1")):
            raise FrameError("no usable celestial WCS: it has none of CD1_1, PC1_1 and CDELT1")
        units = tuple(header.get(name, "deg") for name in ("CUNIT1", "CUNIT2"))
        if units != ("deg", "deg"):
            raise FrameError(f"no usable celestial WCS: CUNIT1, CUNIT2 are {units}")
        kinds = {
            name.rstrip("_0123456789") for name in header if _MATRIX_OR_PARAMETER.fullmatch(name)
        }
        if not kinds <= {"CD"} and not kinds <= {"PC"}:
            raise FrameError(f"no usable celestial WCS: it has {' and '.join(sorted(kinds))} cards")
        if "CD" in kinds:
            matrix = [[header.number(f"CD{i}_{j}", 0.0) for j in (1, 2)] for i in (1, 2)]
        else:
            matrix = [
                [
                    header.number(f"CDELT{i}", 1.0) * header.number(f"PC{i}_{j}", float(i == j))
                    for j in (1, 2)
                ]
                for i in (1, 2)
            ]
        sip = types[0].endswith("SIP")
        wcs = cls(
            crpix=np.array([header.number(f"CRPIX{i}") - 1.0 for i in (1, 2)]),
            crval=np.array([header.number(f"CRVAL{i}") for i in (1, 2)]),
            matrix=np.array(matrix),
            # The default is 0 where the native pole is the celestial one (Paper II, 2.2).
            lonpole=header.number("LONPOLE", 0.0 if header.get("CRVAL2") == 90 else 180.0),
            a=_coefficients(header, "A") if sip else np.zeros((1, 1)),
            b=_coefficients(header, "B") if sip else np.zeros((1, 1)),
        )
        if not 0 < wcs.pixel_area_arcsec2 < np.inf:
            raise FrameError("no usable celestial WCS: its matrix is singular")
        longitudes = abs(wcs.crval[0]), abs(wcs.lonpole)
        if not abs(wcs.crval[1]) <= 90 or not max(longitudes) <= 360:
            raise FrameError("no usable celestial WCS: CRVAL1, CRVAL2 or LONPOLE is off the sky")
        return wcs

    @property
    def pixel_area_arcsec2(self) -> float:
        """Area of the reference pixel on the projection plane, arcsec^2."""
        return abs(float(np.linalg.det(self.matrix))) * 3600.0**2

    def solid_angle_at(self, x: ArrayLike, y: ArrayLike) -> np.ndarray:
        """Return the solid angle of a pixel at given places, |d(sky)/d(pixel)|.

        This is the Jacobian of the whole projection: of the matrix, of the distortion, and of
        the gnomonic projection, on which an area is larger than on the sky by the cube of the
        secant of the distance from the reference point.

        Parameters
        ----------
        x, y : float or float array
            0-based pixels; shapes are broadcast.

        Returns
        -------
        float array
            In arcsec^2.
        """
        u, v = np.asarray(x, float) - self.crpix[0], np.asarray(y, float) - self.crpix[1]
        u, v = np.broadcast_arrays(u, v)
        a_u, a_v, b_u, b_v = (
            polyval2d(u, v, polyder(coefficients, axis=axis))
            for coefficients in (self.a, self.b)
            for axis in (0, 1)
        )
        distorted = np.stack([u + polyval2d(u, v, self.a), v + polyval2d(u, v, self.b)])
        xi, eta = np.deg2rad(np.tensordot(self.matrix, distorted, axes=1))
        stretch = (1.0 + a_u) * (1.0 + b_v) - a_v * b_u
        return self.pixel_area_arcsec2 * np.abs(stretch) / (1.0 + xi * xi + eta * eta) ** 1.5

    def pixel_to_sky(self, x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of pixel coordinates.

        Parameters
        ----------
        x, y : float or float array
            0-based pixels; shapes are broadcast.

        Returns
        -------
        ra, dec : float array
            ICRS, deg.
        """
        u = np.asarray(x, float) - self.crpix[0]
        v = np.asarray(y, float) - self.crpix[1]
        shape = np.broadcast_shapes(u.shape, v.shape)
        u, v = (np.broadcast_to(offset, shape).ravel() for offset in (u, v))
        u, v = (offset.reshape(shape) for offset in distort(u, v, self.a, self.b))
        xi, eta = np.deg2rad(np.tensordot(self.matrix, np.stack([u, v]), axes=1))
        direction = np.tensordot(self._rotation().T, np.stack([-eta, xi, np.ones_like(xi)]), axes=1)
        return (
            np.rad2deg(np.arctan2(direction[1], direction[0])) % 360.0,
            np.rad2deg(np.arctan2(direction[2], np.hypot(direction[0], direction[1]))),
        )

    def sky_to_pixel(self, ra: ArrayLike, dec: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Return the 0-based pixel coordinates of ICRS positions.

        The forward distortion is inverted by fixed-point iteration, as astropy's
        ``all_world2pix`` does, but separately for each source, so that the result does not
        depend on the other sources.

        Parameters
        ----------
        ra, dec : (n,) float array
            ICRS, deg. They should lie near the frame: far outside, the distortion
            polynomials diverge.

        Returns
        -------
        x, y : (n,) float array
            NaN for what lies 90 deg or more from the reference point, or where the
            inversion does not converge.
        """
        return project_to_pixels(
            np.asarray(ra, float),
            np.asarray(dec, float),
            self._rotation(),
            np.linalg.inv(self.matrix),
            self.crpix,
            self.a,
            self.b,
        )

    def _rotation(self) -> np.ndarray:
        """Rotation of celestial unit vectors into the native system, whose pole is CRVAL."""
        ra, dec = np.deg2rad(self.crval)
        pole = np.deg2rad(self.lonpole)
        # Rows: the native axes for LONPOLE = 0, in celestial coordinates.
        axes = np.array(
            [
                [-np.sin(dec) * np.cos(ra), -np.sin(dec) * np.sin(ra), np.cos(dec)],
                [np.sin(ra), -np.cos(ra), 0.0],
                [np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)],
            ]
        )
        turn = np.array(
            [[np.cos(pole), np.sin(pole), 0], [-np.sin(pole), np.cos(pole), 0], [0, 0, 1]]
        )
        return turn.T @ axes


def _coefficients(header: Header, name: str) -> np.ndarray:
    order = header.integer(f"{name}_ORDER")
    if not 2 <= order <= 9:
        raise FrameError(f"header keyword {name}_ORDER must be 2 to 9, got {order}")
    matrix = np.zeros((order + 1, order + 1))
    for p in range(order + 1):
        for q in range(order + 1 - p):
            matrix[p, q] = header.number(f"{name}_{p}_{q}", 0.0)
    return matrix
