"""The light curve of one source: its rows, cuts, spectra, variability, plots and conversions."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from spxdask.config import sort_bands
from spxdask.errors import ConfigError
from spxdask.results import conversions, plots
from spxdask.results.detrended import Detrended, detrend
from spxdask.results.spectrum import Spectrum, bin_spectrum, list_spectrum
from spxdask.science.channels import BANDS, PUBLISHED_CHANNELS, Channels, read_channels
from spxdask.science.flags import REJECTING_FLAGS
from spxdask.tables.fluxes import Flux, FluxChoice, choose_flux
from spxdask.tables.quantities import ROW_MEANINGS, make_qtable
from spxdask.tables.selection import find_good_rows
from spxdask.text import format_count

if TYPE_CHECKING:
    from astropy.table import QTable
    from astropy.time import Time
    from astropy.timeseries import TimeSeries

__all__ = ["LightCurve"]

# Where spectra or light curves are divided: a part of the time, first and last day (MJD).
Epoch = tuple[Any, Any]


class LightCurve:
    """All rows of one source, ordered by time.

    Parameters
    ----------
    id : str
        Of the source.
    rows : pyarrow.Table
        Columns of a light curve.
    ra, dec : float or None
        Position in the catalogue, ICRS, deg; None where it is not known.
    meta : mapping
        What the rows were made with and of.
    channels : Channels
        That spectra are averaged in.
    is_cut : bool
        Whether rows that are not fit were taken out: then all are used.

    Attributes
    ----------
    id, ra, dec, meta, channels
        As given.
    """

    def __init__(
        self,
        id: str,
        rows: pa.Table,
        *,
        ra: float | None = None,
        dec: float | None = None,
        meta: Mapping[str, Any] | None = None,
        channels: Channels = PUBLISHED_CHANNELS,
        is_cut: bool = False,
    ) -> None:
        self.id, self.ra, self.dec = id, ra, dec
        self.meta = dict(meta or {})
        self.channels = channels
        self._rows, self._is_cut = rows, is_cut

    @cached_property
    def table(self) -> QTable:
        """The rows as an `astropy.table.QTable`: units, descriptions, UCDs; origin in ``meta``."""
        position = {"ra": self.ra, "dec": self.dec}
        return make_qtable(self._rows, ROW_MEANINGS, {"id": self.id, **position, **self.meta})

    @property
    def colnames(self) -> list[str]:
        """Names of the columns."""
        return list(self._rows.column_names)

    def __getitem__(self, name: str) -> Any:
        return self.table[name]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"<LightCurve {self.id!r}: {self._describe()}>"

    def _repr_html_(self) -> str:
        head = f"<p><b>{html.escape(self.id)}</b>: {html.escape(self._describe())}</p>"
        return head + str(self.table._repr_html_())

    def _describe(self) -> str:
        parts = [format_count(len(self), "row")]
        if not self._is_cut:
            parts.append(f"{np.count_nonzero(find_good_rows(self._rows)):,} good")
        if len(self):
            found = set(self._rows.column("band").to_pylist())
            parts.append(" ".join(band for band in BANDS if band in found))
            mjd = self.mjd
            parts.append(f"MJD {np.nanmin(mjd):.1f} to {np.nanmax(mjd):.1f}")
        return ", ".join(parts)

    @property
    def mjd(self) -> np.ndarray:
        """Middle of each exposure, (n,) float array, MJD, UTC."""
        return self._read("mjd")

    @cached_property
    def band(self) -> np.ndarray:
        """Detector of each row, (n,) int array: 0 for D1 to 5 for D6."""
        numbers = {name: number for number, name in enumerate(BANDS)}
        names = self._rows.column("band").to_pylist()
        return np.array([numbers.get(name, -1) for name in names], np.int64)

    def _read(self, name: str) -> np.ndarray:
        column = self._rows.column(name)
        return np.asarray(column.to_numpy(), float)

    def _take(self, rows: pa.Table, is_cut: bool) -> LightCurve:
        return LightCurve(
            self.id,
            rows,
            ra=self.ra,
            dec=self.dec,
            meta=self.meta,
            channels=self.channels,
            is_cut=is_cut,
        )

    def good(
        self,
        *,
        flags: Iterable[str | int] = REJECTING_FLAGS,
        psf_fraction: float | None = None,
        psf_chi2: float | None = None,
        bad_fraction: float | None = None,
        snr: float | None = None,
        bands: Iterable[str | int] | str | int | None = None,
        mjd_range: Epoch | None = None,
    ) -> LightCurve:
        """Return the light curve without rows that are not fit for science.

        Spectra, variability and plots of a light curve that was not cut use ``good()``.

        Parameters
        ----------
        flags : iterable of str or int
            Flags that speak against a row, by name or bit; the default are those that
            `spxdask.select_good_rows` has. ``()`` is none.
        psf_fraction, psf_chi2, bad_fraction : float, optional
            See `spxdask.select_good_rows`; by default, none of them is a cut.
        snr : float, optional
            Lowest total flux in units of its error; by default, any. Such a cut biases faint
            fluxes.
        bands : str, int, or iterable of them, optional
            Detectors by name or number, such as ``["D1", "D2"]`` or ``1``; default: all.
        mjd_range : (float or Time, float or Time), optional
            First and last day, MJD.

        Returns
        -------
        LightCurve
            Rows with a finite ``flux`` that pass all of these, in order.

        Raises
        ------
        ConfigError
            If there is no such flag or band, or the table lacks a column.
        """
        good = find_good_rows(
            self._rows,
            flags=flags,
            psf_fraction=psf_fraction,
            psf_chi2=psf_chi2,
            bad_fraction=bad_fraction,
        )
        if snr is not None:
            flux = self.flux()
            good &= flux.value >= snr * flux.error
        if bands is not None:
            given = [bands] if isinstance(bands, str | int) else bands
            names = sort_bands(" ".join(map(str, given)))
            for name in names:
                if name not in BANDS:
                    raise ConfigError(option="bands", value=name, rule="some of D1 to D6")
            good &= np.isin(self.band, [BANDS.index(name) for name in names])
        if mjd_range is not None:
            good &= self._find_epoch(mjd_range)
        return self._take(self._rows.filter(pa.array(good)), is_cut=True)

    def flux(self, choice: FluxChoice = "total") -> Flux:
        """Return a flux of each row.

        Parameters
        ----------
        choice : {"total", "psf", "corrected", "aperture"}
            See `spxdask.tables.fluxes.choose_flux`.

        Returns
        -------
        Flux
        """
        return choose_flux({n: self._rows.column(n) for n in self.colnames}, choice)

    @property
    def _fit_for_use(self) -> LightCurve:
        return self if self._is_cut else self.good()

    def _find_epoch(self, epoch: Epoch) -> np.ndarray:
        """Return which rows lie in a part of the time."""
        if not (isinstance(epoch, tuple | list) and len(epoch) == 2):
            raise ConfigError(option="epochs", value=epoch, rule="pairs of first and last MJD")
        first, last = map(_to_mjd, epoch)
        if not first <= last:
            raise ConfigError(
                option="epochs", value=epoch, rule="pairs of first and last MJD, in this order"
            )
        return np.asarray((self.mjd >= first) & (self.mjd <= last))

    def spectrum(
        self,
        channels: bool | Channels | str | Path = True,
        epochs: int | Epoch | Sequence[Epoch] | None = None,
        *,
        flux: FluxChoice = "total",
    ) -> Any:
        """Return the spectrum of the source.

        Parameters
        ----------
        channels : bool, Channels or path
            True averages points in SPHEREx's 102 channels, by inverse variance; False lists every
            point at its own wavelength. A path is a spectral_channels product, to use its edges.
        epochs : None, int, (first, last), or a list of these pairs
            The times: all of them; so many parts of equal length of the time from the first to
            the last row; from first to last (MJD or Time).
        flux : {"total", "psf", "corrected", "aperture"}
            Which flux; ``total`` is ``psf_flux`` where a row has it, else ``flux`` x
            ``aperture_correction`` if its neighbours are known.

        Returns
        -------
        Spectrum, or list of Spectrum
            A list with a number, or a list, of epochs.

        Raises
        ------
        ConfigError
            If an argument has no such value.
        """
        used = self._fit_for_use
        if epochs is None:
            return used._make_spectrum(channels, flux)
        if isinstance(epochs, bool):
            raise ConfigError(option="epochs", value=epochs, rule="a number, or pairs of MJD")
        if isinstance(epochs, int | np.integer):
            return [
                used._take(used._rows.filter(pa.array(part)), True)._make_spectrum(channels, flux)
                for part in used._divide(int(epochs))
            ]
        is_one = len(epochs) == 2 and not isinstance(epochs[0], tuple | list)
        pairs: list[Any] = [epochs] if is_one else list(epochs)
        found = [
            used._take(used._rows.filter(pa.array(used._find_epoch(pair))), True)._make_spectrum(
                channels, flux
            )
            for pair in pairs
        ]
        return found[0] if is_one else found

    def _divide(self, number: int) -> list[np.ndarray]:
        """Return which rows are in each of some equal parts of the time."""
        if number < 1:
            raise ConfigError(option="epochs", value=number, rule=">= 1")
        mjd = self.mjd
        if not len(mjd):
            return [np.zeros(0, bool)] * number
        edges = np.linspace(np.nanmin(mjd), np.nanmax(mjd), number + 1)
        part = np.clip(np.searchsorted(edges, mjd, side="right") - 1, 0, number - 1)
        return [part == i for i in range(number)]

    def _make_spectrum(
        self, channels: bool | Channels | str | Path, choice: FluxChoice
    ) -> Spectrum:
        flux = self.flux(choice)
        wavelength = self._read("wavelength")
        meta = {"id": self.id, "ra": self.ra, "dec": self.dec, **self.meta, "flux": flux.name}
        if channels is False:
            return list_spectrum(
                self.band, wavelength, self._read("bandwidth"), self.mjd, flux, meta
            )
        if channels is True:
            channels = self.channels
        elif not isinstance(channels, Channels):
            channels = read_channels(channels, Path(channels).name)
        return bin_spectrum(self.band, wavelength, self.mjd, flux, channels, meta)

    def detrended(self, *, flux: FluxChoice = "total") -> Detrended:
        """Return the flux over a smooth spectrum: variability that is not colour.

        Each row is divided by what the other rows of its band say of its wavelength: a penalised
        cubic spline in the logarithm of wavelength, which outliers weigh little in. So a
        variation is not damped (with few points in a band it is overestimated, by 5 % with 17),
        and the errors contain that of the spectrum.

        Parameters
        ----------
        flux : {"total", "psf", "corrected", "aperture"}
            Which flux.

        Returns
        -------
        Detrended
            With a table, its chi-squared, and how well each band is determined.
        """
        used = self._fit_for_use
        times = {"mjd": used.mjd}
        if "bjd_tdb" in used.colnames:
            times["bjd_tdb"] = used._read("bjd_tdb")
        meta = {"id": self.id, "ra": self.ra, "dec": self.dec, **self.meta}
        return detrend(
            used.band, used._read("wavelength"), times, used.flux(flux), meta, self.channels
        )

    def plot_spectrum(
        self,
        ax: Any = None,
        *,
        channels: bool | Channels | str | Path = True,
        epochs: int | Epoch | Sequence[Epoch] | None = None,
        flux: FluxChoice = "total",
        **style: Any,
    ) -> Any:
        """Plot the spectrum, bands by colour.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to plot; by default, in a new figure.
        channels : bool, Channels or path
            See `spectrum`.
        epochs : None, int, (first, last), or a list of these pairs
            See `spectrum`; several get a marker each.
        flux : {"total", "psf", "corrected", "aperture"}
            See `spectrum`.
        **style
            For `matplotlib.axes.Axes.errorbar`.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        MissingExtraError
            If matplotlib is not installed.
        """
        return plots.plot_spectrum(self.spectrum(channels, epochs, flux=flux), ax, **style)

    def plot_light_curve(
        self,
        ax: Any = None,
        *,
        detrended: bool = False,
        flux: FluxChoice = "total",
        **style: Any,
    ) -> Any:
        """Plot the flux against time, bands by colour.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to plot; by default, in a new figure.
        detrended : bool
            Whether to plot the flux over the smooth spectrum; see `detrended`.
        flux : {"total", "psf", "corrected", "aperture"}
            Which flux.
        **style
            For `matplotlib.axes.Axes.errorbar`.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        MissingExtraError
            If matplotlib is not installed.
        """
        used = self._fit_for_use
        if detrended:
            return plots.plot_detrended(used.detrended(flux=flux), ax, **style)
        return plots.plot_light_curve(self.id, used.mjd, used.band, used.flux(flux), ax, **style)

    @property
    def time(self) -> Time:
        """Time of each row: `astropy.time.Time`, barycentric TDB, or UTC without ``bjd_tdb``."""
        return conversions.make_time(self)

    def to_timeseries(self, time: str | None = None) -> TimeSeries:
        """Return all rows as an `astropy.timeseries.TimeSeries`.

        Parameters
        ----------
        time : {"bjd_tdb", "mjd"}, optional
            Barycentric time of scale TDB, or time at the telescope of scale UTC; by default, the
            first of them that the rows have.

        Returns
        -------
        astropy.timeseries.TimeSeries
            With a column ``time`` of that scale, and all other columns.

        Raises
        ------
        ConfigError
            If there is no such time.
        """
        return conversions.make_timeseries(self, time)

    def to_specutils(self, **options: Any) -> Any:
        """Return the spectrum as a `specutils.Spectrum`.

        Parameters
        ----------
        **options
            See `spectrum`.

        Returns
        -------
        specutils.Spectrum, or list of them

        Raises
        ------
        MissingExtraError
            If specutils is not installed.
        """
        found = self.spectrum(**options)
        if isinstance(found, list):
            return [one.to_specutils() for one in found]
        return found.to_specutils()

    def to_lightkurve(self, *, detrended: bool = False, flux: FluxChoice = "total") -> Any:
        """Return the good rows as a `lightkurve.LightCurve`.

        Parameters
        ----------
        detrended : bool
            Whether its flux is that over the smooth spectrum; see `detrended`.
        flux : {"total", "psf", "corrected", "aperture"}
            Which flux.

        Returns
        -------
        lightkurve.LightCurve

        Raises
        ------
        MissingExtraError
            If lightkurve is not installed.
        """
        return conversions.make_lightkurve(self._fit_for_use, detrended, flux)


def _to_mjd(time: Any) -> float:
    """Return a time as MJD, UTC."""
    try:
        return float(time.utc.mjd if hasattr(time, "utc") else time)
    except (TypeError, ValueError):
        raise ConfigError(
            option="epochs", value=time, rule="times: MJD as numbers, or astropy's Time"
        ) from None
