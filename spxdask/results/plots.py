"""Plots of spectra and light curves: matplotlib's Axes in and out."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from spxdask.extras import import_extra
from spxdask.science.channels import BANDS
from spxdask.tables.fluxes import Flux

if TYPE_CHECKING:
    from spxdask.results.detrended import Detrended
    from spxdask.results.spectrum import Spectrum

__all__ = ["BAND_COLOURS", "plot_detrended", "plot_light_curve", "plot_spectrum"]

# Colours that people with any colour vision can tell apart (Okabe and Ito).
BAND_COLOURS = {
    "D1": "#0072B2",
    "D2": "#56B4E9",
    "D3": "#009E73",
    "D4": "#E69F00",
    "D5": "#D55E00",
    "D6": "#CC79A7",
}
# Of epochs, one after the other.
MARKERS = "osD^v<>Pp*"


def plot_spectrum(spectra: Spectrum | list[Spectrum], ax: Any = None, **style: Any) -> Any:
    """Plot spectra of one source, bands by colour, epochs by marker.

    Parameters
    ----------
    spectra : Spectrum or list of Spectrum
        Channels without a point are left out.
    ax : matplotlib.axes.Axes, optional
        Where to plot; by default, in a new figure.
    **style
        For `matplotlib.axes.Axes.errorbar`.

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = _make_axes(ax)
    several = isinstance(spectra, list)
    for number, spectrum in enumerate(spectra if isinstance(spectra, list) else [spectra]):
        table = spectrum.table
        centre = table["wavelength_mean" if spectrum.is_binned else "wavelength"].value
        half = table["bandwidth"].value / 2
        if spectrum.is_binned:
            # The bar of a channel reaches from edge to edge, wherever its points are.
            low, high = table["wavelength_min"].value, table["wavelength_max"].value
            half = np.stack([centre - low, high - centre]).clip(0)
        look = {"marker": MARKERS[number % len(MARKERS)]} | style if several else style
        _draw(ax, centre, table["flux"].value, table["flux_error"].value, table["band"], half, look)
        if several and "first_mjd" in table.meta:
            first, last = table.meta["first_mjd"], table.meta["last_mjd"]
            label = f"MJD {first:.1f} to {last:.1f}"
            ax.plot([], [], look["marker"], color="0.3", markersize=4, label=label)
    first_table = (spectra[0] if isinstance(spectra, list) else spectra).table
    _finish(ax, first_table.meta.get("id"), "wavelength [µm]", _name_flux(first_table.meta["flux"]))
    return ax


def plot_light_curve(
    target_id: str, mjd: np.ndarray, band: np.ndarray, flux: Flux, ax: Any = None, **style: Any
) -> Any:
    """Plot flux against time, bands by colour.

    Parameters
    ----------
    target_id : str
        The title.
    mjd : (n,) float array
        Times, UTC.
    band : (n,) int array
        0 for D1 to 5 for D6.
    flux : Flux
        Of each point.
    ax : matplotlib.axes.Axes, optional
        Where to plot; by default, in a new figure.
    **style
        For `matplotlib.axes.Axes.errorbar`.

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = _make_axes(ax)
    _draw(ax, mjd, flux.value, flux.error, np.array([*BANDS, ""])[band], None, style)
    _finish(ax, target_id, "MJD [d, UTC]", _name_flux(flux.name))
    return ax


def plot_detrended(detrended: Detrended, ax: Any = None, **style: Any) -> Any:
    """Plot the flux over the smooth spectrum against time, bands by colour.

    Parameters
    ----------
    detrended : Detrended
        Points without a ratio are left out.
    ax : matplotlib.axes.Axes, optional
        Where to plot; by default, in a new figure.
    **style
        For `matplotlib.axes.Axes.errorbar`.

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = _make_axes(ax)
    table = detrended.table
    ratio, error = np.asarray(table["ratio"]), np.asarray(table["ratio_error"])
    sparse = {fit.band: "few points" for fit in detrended.fits if fit.is_sparse}
    _draw(ax, table["mjd"].value, ratio, error, table["band"], None, style, sparse)
    ax.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
    _finish(ax, table.meta.get("id"), "MJD [d, UTC]", "flux / smooth spectrum of the band")
    return ax


def _make_axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    pyplot: Any = import_extra("matplotlib.pyplot", "plot", "a plot")
    _, ax = pyplot.subplots(figsize=(7.0, 4.2), layout="constrained")
    return ax


def _draw(
    ax: Any,
    x: np.ndarray,
    y: np.ndarray,
    error: np.ndarray,
    band: np.ndarray,
    x_error: np.ndarray | None,
    style: dict[str, Any],
    notes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Draw the points of each band that are finite in its colour; notes go to the legend."""
    defaults = {"fmt": "o", "markersize": 3, "elinewidth": 0.8, "linestyle": "none"}
    if "marker" in style:
        del defaults["fmt"]
    labelled = {
        text.get_text() for text in (ax.get_legend().get_texts() if ax.get_legend() else [])
    }
    labelled |= set(ax.get_legend_handles_labels()[1])
    is_drawn = np.isfinite(x) & np.isfinite(y)
    for name, colour in BAND_COLOURS.items():
        mine = is_drawn & (np.asarray(band) == name)
        if not mine.any():
            continue
        wide = None if x_error is None else x_error[..., mine]
        label = f"{name} ({notes[name]})" if name in notes else name
        look = {"color": colour, "label": None if label in labelled else label} | defaults | style
        ax.errorbar(x[mine], y[mine], error[mine], wide, **look)


def _finish(ax: Any, title: Any, x_label: str, y_label: str) -> None:
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    # Ids are the user's, and no formulae.
    text = str(title)
    ax.set_title(text if text.isprintable() else repr(text), parse_math=False, fontsize="medium")
    low, high = ax.get_ylim()
    if low < 0 < high:
        ax.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize="small", ncols=2)


def _name_flux(name: str) -> str:
    """Return the label of an axis for a flux."""
    is_total = not name.endswith("aperture")
    return f"total flux ({name}) [µJy]" if is_total else f"{name} [µJy]"
