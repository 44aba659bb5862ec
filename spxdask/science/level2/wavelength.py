"""The wavelength of each pixel, from the WCS-WAVE extension of a frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spxdask.errors import FrameError
from spxdask.science.level2.fits import Hdu

__all__ = ["WavelengthTable", "read_wavelength_table"]

# Forms of the columns of a FITS binary table that are numbers.
NUMBER_TYPES = {"J": ">i4", "I": ">i2", "K": ">i8", "E": ">f4", "D": ">f8"}


@dataclass(frozen=True, kw_only=True)
class WavelengthTable:
    """The lattice of WCS-WAVE.

    Attributes
    ----------
    x : (nx,) float array
        Control points, 1-based pixels of the full frame, increasing.
    y : (ny,) float array
        The same along y.
    values : (ny, nx, 2) float array
        Wavelength and bandwidth, um.
    """

    x: np.ndarray
    y: np.ndarray
    values: np.ndarray

    def at(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Interpolate wavelength and bandwidth, bilinearly.

        This is what the alternate WCS WAVE-TAB defines (FITS Paper III, section 6), without
        the SIP terms, which do not belong to it.

        Parameters
        ----------
        x, y : (n,) float array
            1-based pixels of the full frame.

        Returns
        -------
        wavelength, bandwidth : (n,) float array
            In um; extrapolated outside of the lattice.
        """
        i, fx = _find_cell(self.x, x)
        j, fy = _find_cell(self.y, y)
        fx, fy = fx[:, None], fy[:, None]
        below = (1 - fx) * self.values[j, i] + fx * self.values[j, i + 1]
        above = (1 - fx) * self.values[j + 1, i] + fx * self.values[j + 1, i + 1]
        wavelength, bandwidth = ((1 - fy) * below + fy * above).T
        return wavelength, bandwidth


def _find_cell(points: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lattice cell of each position and the fraction of the way through it."""
    index = np.clip(np.searchsorted(points, position, side="right") - 1, 0, len(points) - 2)
    return index, (position - points[index]) / (points[index + 1] - points[index])


def read_wavelength_table(buffer: memoryview, hdu: Hdu) -> WavelengthTable:
    """Read the WCS-WAVE extension.

    Parameters
    ----------
    buffer : memoryview
        The whole file.
    hdu : Hdu
        A table of one row: control points X and Y, VALUES (2, nx, ny).

    Returns
    -------
    WavelengthTable
        Its control points and values.

    Raises
    ------
    FrameError
        If a column is missing or cannot be read, or its numbers make no sense.
    """
    columns = _read_row(buffer, hdu)
    missing = [name for name in ("X", "Y", "VALUES") if name not in columns]
    if missing:
        raise FrameError(f"WCS-WAVE has no column {', '.join(missing)}")
    x, y, values = columns["X"], columns["Y"], columns["VALUES"]
    if len(x) < 2 or len(y) < 2 or len(values) != 2 * len(x) * len(y):
        raise FrameError(
            f"WCS-WAVE has {len(x)} x {len(y)} control points and {len(values)} values"
        )
    values = values.reshape(len(y), len(x), 2)
    finite = all(np.isfinite(column).all() for column in (x, y, values))
    if not finite or not (np.diff(x) > 0).all() or not (np.diff(y) > 0).all():
        raise FrameError("WCS-WAVE has control points out of order or values that are not finite")
    if not (values > 0).all():
        raise FrameError("WCS-WAVE has wavelengths or bandwidths that are not positive")
    return WavelengthTable(x=x, y=y, values=values)


def _read_row(buffer: memoryview, hdu: Hdu) -> dict[str, np.ndarray]:
    """Return the columns of a binary table of one row, as floats, by upper-case name."""
    header = hdu.header
    if header.get("XTENSION") != "BINTABLE" or header.get("NAXIS2") != 1:
        raise FrameError(f"WCS-WAVE must be a table of one row, got {header.get('NAXIS2')} rows")
    columns: dict[str, np.ndarray] = {}
    offset = hdu.data_start
    for number in range(1, header.integer("TFIELDS") + 1):
        form = str(header.get(f"TFORM{number}", "")).strip()
        if form[-1:] not in NUMBER_TYPES or not (form[:-1] or "1").isdecimal():
            raise FrameError(f"WCS-WAVE column {number} has the unreadable form {form!r}")
        count, dtype = int(form[:-1] or 1), np.dtype(NUMBER_TYPES[form[-1]])
        if offset + count * dtype.itemsize > hdu.data_start + hdu.data_size:
            raise FrameError(f"WCS-WAVE column {number} reaches beyond its row")
        if header.get(f"TSCAL{number}", 1) != 1 or header.get(f"TZERO{number}", 0) != 0:
            raise FrameError(f"WCS-WAVE column {number} is scaled by TSCAL and TZERO")
        name = str(header.get(f"TTYPE{number}", "")).strip().upper()
        columns[name] = np.frombuffer(buffer, dtype, count, offset).astype(float)
        offset += count * dtype.itemsize
    return columns
