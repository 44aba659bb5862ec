"""Which flux of a row is meant: total, by PSF or aperture correction, or in the aperture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from spxdask.errors import ConfigError

__all__ = ["FLUX_CHOICES", "Flux", "FluxChoice", "choose_flux"]

FluxChoice = Literal["total", "psf", "corrected", "aperture"]
FLUX_CHOICES: tuple[FluxChoice, ...] = get_args(FluxChoice)
PSF_NAME = "psf_flux"
CORRECTED_NAME = "flux x aperture_correction"
APERTURE_NAME = "flux in the aperture"
NEEDED = {"psf": ("psf_flux",), "corrected": ("aperture_correction",)}


@dataclass(frozen=True, eq=False, kw_only=True)
class Flux:
    """A flux of each row.

    Attributes
    ----------
    value, error : (n,) float array
        In uJy; NaN where there is none.
    name : str
        Which it is, in words, such as ``psf_flux``.
    is_total : bool
        Whether it is all light of a point source.
    is_psf : (n,) bool array
        Of which rows it is ``psf_flux``.
    """

    value: np.ndarray
    error: np.ndarray
    name: str
    is_total: bool
    is_psf: np.ndarray


def choose_flux(columns: Mapping[str, Any], choice: FluxChoice = "total") -> Flux:
    """Return a flux of each row of a table.

    Parameters
    ----------
    columns : mapping of str to (n,) array
        A table of spxdask, or columns of one by name; values without a unit are in uJy.
    choice : {"total", "psf", "corrected", "aperture"}
        ``total`` is ``psf_flux`` in the rows that have it, and ``flux`` x
        ``aperture_correction`` in others with a ``neighbour_flux``: without one, as of a source
        that cannot be told from its neighbour, the aperture holds an unknown share of both. In
        tables without PSF photometry, which know no total flux, it is ``flux``. The other three
        are one of these in all rows.

    Returns
    -------
    Flux

    Raises
    ------
    ConfigError
        If there is no such choice, or the table lacks its columns.
    """
    if choice not in FLUX_CHOICES:
        raise ConfigError(option="flux", value=choice, rule="one of " + ", ".join(FLUX_CHOICES))
    names = columns.colnames if hasattr(columns, "colnames") else columns.keys()
    for name in NEEDED.get(choice, ()):
        if name not in names:
            raise ConfigError(
                f"flux={choice!r} needs the column {name}, which the tables of a run with psf: "
                "none do not have: use flux='aperture'",
                option="flux",
                value=choice,
            )
    flux, error = _read(columns["flux"]), _read(columns["flux_error"])
    none = np.zeros(len(flux), bool)
    if choice == "aperture" or "psf_flux" not in names:
        return Flux(value=flux, error=error, name=APERTURE_NAME, is_total=False, is_psf=none)
    factor = _read(columns["aperture_correction"])
    corrected = Flux(
        value=flux * factor,
        error=error * factor,
        name=CORRECTED_NAME,
        is_total=True,
        is_psf=none,
    )
    if choice == "corrected":
        return corrected
    value, psf_error = _read(columns["psf_flux"]), _read(columns["psf_flux_error"])
    is_psf = np.isfinite(value) & np.isfinite(psf_error)
    if choice == "psf" or is_psf.all():
        return Flux(value=value, error=psf_error, name=PSF_NAME, is_total=True, is_psf=is_psf)
    is_apart = np.ones(len(flux), bool)
    if "neighbour_flux" in names:
        is_apart = np.isfinite(_read(columns["neighbour_flux"]))
    return Flux(
        value=np.where(is_psf, value, np.where(is_apart, corrected.value, np.nan)),
        error=np.where(is_psf, psf_error, np.where(is_apart, corrected.error, np.nan)),
        name=f"{PSF_NAME}, else {CORRECTED_NAME}" if is_psf.any() else CORRECTED_NAME,
        is_total=True,
        is_psf=is_psf,
    )


def _read(column: Any) -> np.ndarray:
    """Return a column as numbers in its own unit, NaN where a value is missing."""
    values = getattr(column, "value", column)
    return np.ma.filled(np.ma.asarray(values, float), np.nan)
