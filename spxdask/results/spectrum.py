"""A spectrum of one source, averaged in channels or point by point."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import numpy as np

from spxdask.results import conversions, plots
from spxdask.science.channels import BANDS, Channels
from spxdask.science.spectra import average_in_bins
from spxdask.tables.fluxes import Flux
from spxdask.tables.quantities import ROW_MEANINGS, Meaning, make_qtable
from spxdask.text import format_count

if TYPE_CHECKING:
    from astropy.table import QTable

__all__ = ["Spectrum", "bin_spectrum", "list_spectrum"]

_FLUX_UCD = ROW_MEANINGS["flux"].ucd
MEANINGS = {
    "channel": Meaning("", "number of the channel, 1 to 102"),
    "band": ROW_MEANINGS["band"],
    "subchannel": Meaning("", "number of the channel on its detector, 1 to 17"),
    "wavelength": Meaning(
        "um", "centre of the channel, or wavelength of the point", "em.wl.central"
    ),
    "wavelength_min": Meaning("um", "lower edge of the channel", "em.wl;stat.min"),
    "wavelength_max": Meaning("um", "upper edge of the channel", "em.wl;stat.max"),
    "wavelength_mean": Meaning("um", "mean of the points, weighted as the flux", "em.wl;stat.mean"),
    "bandwidth": ROW_MEANINGS["bandwidth"],
    "flux": Meaning("uJy", "", _FLUX_UCD),
    "flux_error": Meaning("uJy", "error of flux", f"stat.error;{_FLUX_UCD}"),
    "n": Meaning("", "number of points", "meta.number"),
    "chi2": Meaning(
        "", "squared differences from flux in units of their errors, for n - 1", "stat.fit.chi2"
    ),
    "mjd": ROW_MEANINGS["mjd"],
}


class Spectrum:
    """A spectrum of one source.

    Parameters
    ----------
    table : astropy.table.QTable
        A row a channel, or a row a point.
    is_binned : bool
        Whether it has a row a channel.
    n_outside : int
        Points whose wavelengths are in no channel.

    Attributes
    ----------
    table : astropy.table.QTable
        ``band``, ``wavelength``, ``bandwidth``, ``flux``, ``flux_error``; a row a channel also has
        ``channel``, ``subchannel``, the edges, ``n`` and ``chi2``, and NaN as flux where there is
        no point. ``meta["flux"]`` says which flux it is.
    is_binned, n_outside
        As given.
    """

    def __init__(self, table: QTable, *, is_binned: bool, n_outside: int = 0) -> None:
        self.table = table
        self.is_binned = is_binned
        self.n_outside = n_outside

    def __getitem__(self, name: str) -> Any:
        return self.table[name]

    def __len__(self) -> int:
        return len(self.table)

    @property
    def wavelength(self) -> Any:
        """Wavelength of each row, a quantity in um."""
        return self.table["wavelength"]

    @property
    def flux(self) -> Any:
        """Flux of each row, a quantity in uJy."""
        return self.table["flux"]

    @property
    def flux_error(self) -> Any:
        """Error of each flux, a quantity in uJy."""
        return self.table["flux_error"]

    @property
    def flux_name(self) -> str:
        """Which flux it is, such as ``psf_flux``."""
        return str(self.table.meta["flux"])

    def __repr__(self) -> str:
        return f"<Spectrum {self.table.meta.get('id')!r}: {self._describe()}>"

    def _repr_html_(self) -> str:
        name = html.escape(str(self.table.meta.get("id")))
        return f"<p><b>{name}</b>: {self._describe()}</p>{self.table._repr_html_()}"

    def _describe(self) -> str:
        if not self.is_binned:
            return f"{format_count(len(self), 'point')}, {self.flux_name}"
        n = np.asarray(self.table["n"])
        text = f"{np.count_nonzero(n)} of {len(self)} channels, {format_count(n.sum(), 'point')}"
        if self.n_outside:
            text += f" and {self.n_outside:,} in no channel"
        return f"{text}, {self.flux_name}"

    def plot(self, ax: Any = None, **style: Any) -> Any:
        """Plot it, bands by colour.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to plot; by default, in a new figure.
        **style
            For `matplotlib.axes.Axes.errorbar`.

        Returns
        -------
        matplotlib.axes.Axes
        """
        return plots.plot_spectrum(self, ax, **style)

    def to_specutils(self) -> Any:
        """Return it as a `specutils.Spectrum`, in order of wavelength, without empty channels.

        Returns
        -------
        specutils.Spectrum
            Points of the same wavelength are averaged, which specutils asks for.

        Raises
        ------
        MissingExtraError
            If specutils is not installed.
        """
        return conversions.make_specutils(self)


def bin_spectrum(
    band: np.ndarray,
    wavelength: np.ndarray,
    mjd: np.ndarray,
    flux: Flux,
    channels: Channels,
    meta: dict[str, Any],
) -> Spectrum:
    """Average points in channels.

    Parameters
    ----------
    band : (n,) int array
        0 for D1 to 5 for D6.
    wavelength, mjd : (n,) float array
        In um, and MJD.
    flux : Flux
        Of each point.
    channels : Channels
        The bins.
    meta : dict
        Of the table.

    Returns
    -------
    Spectrum
    """
    place = channels.assign(band, wavelength)
    has_flux = np.isfinite(flux.value) & np.isfinite(flux.error)
    found = average_in_bins(place, wavelength, flux.value, flux.error, len(channels))
    names = np.array(BANDS)
    columns = {
        "channel": np.arange(1, len(channels) + 1),
        "band": names[channels.band],
        "subchannel": channels.subchannel,
        "wavelength": channels.wavelength,
        "wavelength_min": channels.wavelength_min,
        "wavelength_max": channels.wavelength_max,
        "wavelength_mean": found.wavelength,
        "bandwidth": channels.bandwidth,
        "flux": found.value,
        "flux_error": found.error,
        "n": found.n,
        "chi2": found.chi2,
    }
    meta = {**meta, "channels": channels.token, **_describe_times(mjd[has_flux])}
    return Spectrum(
        _make_table(columns, flux, meta),
        is_binned=True,
        n_outside=int(np.count_nonzero(has_flux & (place < 0))),
    )


def list_spectrum(
    band: np.ndarray,
    wavelength: np.ndarray,
    bandwidth: np.ndarray,
    mjd: np.ndarray,
    flux: Flux,
    meta: dict[str, Any],
) -> Spectrum:
    """List points by wavelength.

    Parameters
    ----------
    band : (n,) int array
        0 for D1 to 5 for D6.
    wavelength, bandwidth, mjd : (n,) float array
        In um, and MJD.
    flux : Flux
        Of each point; those without one are left out.
    meta : dict
        Of the table.

    Returns
    -------
    Spectrum
    """
    order = np.argsort(wavelength, kind="stable")
    order = order[np.isfinite(flux.value[order]) & np.isfinite(flux.error[order])]
    columns = {
        "band": np.array([*BANDS, ""])[band[order]],
        "wavelength": wavelength[order],
        "bandwidth": bandwidth[order],
        "flux": flux.value[order],
        "flux_error": flux.error[order],
        "mjd": mjd[order],
    }
    meta = {**meta, **_describe_times(mjd[order])}
    return Spectrum(_make_table(columns, flux, meta), is_binned=False)


def _make_table(columns: dict[str, np.ndarray], flux: Flux, meta: dict[str, Any]) -> QTable:
    what = MEANINGS["flux"]._replace(description=flux.name)
    return make_qtable(columns, MEANINGS | {"flux": what}, meta)


def _describe_times(mjd: np.ndarray) -> dict[str, float]:
    if not len(mjd):
        return {}
    return {"first_mjd": float(np.nanmin(mjd)), "last_mjd": float(np.nanmax(mjd))}
