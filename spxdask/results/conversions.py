"""Light curves and spectra as objects of other libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spxdask.errors import ConfigError
from spxdask.extras import import_extra
from spxdask.science.spectra import average_in_bins

if TYPE_CHECKING:
    from astropy.time import Time
    from astropy.timeseries import TimeSeries

    from spxdask.results.light_curve import LightCurve
    from spxdask.results.spectrum import Spectrum
    from spxdask.tables.fluxes import FluxChoice

__all__ = ["make_lightkurve", "make_specutils", "make_time", "make_timeseries"]

# Format and scale of `astropy.time.Time` by column, the best first.
TIMES = {"bjd_tdb": ("jd", "tdb"), "mjd": ("mjd", "utc")}


def make_time(curve: LightCurve, column: str | None = None) -> Time:
    """Return the time of each row with its scale.

    Parameters
    ----------
    curve : LightCurve
        The rows.
    column : {"bjd_tdb", "mjd"}, optional
        Default: the first of them that the rows have.

    Returns
    -------
    astropy.time.Time
        Barycentric, of scale TDB; or at the telescope, of scale UTC.

    Raises
    ------
    ConfigError
        If there is no such time.
    """
    from astropy.time import Time

    names = [name for name in TIMES if name in curve.colnames]
    column = names[0] if column is None else column
    if column not in names:
        raise ConfigError(option="time", value=column, rule=" or ".join(names))
    kind, scale = TIMES[column]
    values = curve.table[column].value
    if kind == "jd":
        # In two parts, as a Julian date has few digits left for seconds.
        day = np.floor(values)
        return Time(day, values - day, format=kind, scale=scale)
    return Time(values, format=kind, scale=scale)


def make_timeseries(curve: LightCurve, column: str | None = None) -> TimeSeries:
    """Return all rows as an `astropy.timeseries.TimeSeries`.

    Parameters
    ----------
    curve : LightCurve
        The rows.
    column : {"bjd_tdb", "mjd"}, optional
        See `make_time`.

    Returns
    -------
    astropy.timeseries.TimeSeries
        The column ``time`` in place of that one.
    """
    from astropy.timeseries import TimeSeries

    time = make_time(curve, column)
    name = "bjd_tdb" if time.scale == "tdb" else "mjd"
    rest = curve.table.copy()
    rest.remove_column(name)
    series = TimeSeries(rest, time=time)
    series.meta["time"] = name
    return series


def make_lightkurve(curve: LightCurve, detrended: bool, flux: FluxChoice) -> Any:
    """Return rows as a `lightkurve.LightCurve`.

    Parameters
    ----------
    curve : LightCurve
        The rows.
    detrended : bool
        Whether its flux is that over the smooth spectrum.
    flux : {"total", "psf", "corrected", "aperture"}
        Which flux.

    Returns
    -------
    lightkurve.LightCurve
        With columns ``wavelength`` and ``band``, too; ``meta["LABEL"]`` is the id.
    """
    lightkurve = import_extra("lightkurve", "results", "to_lightkurve")
    from astropy import units

    meta = {"LABEL": curve.id, "RA": curve.ra, "DEC": curve.dec, **curve.meta}
    time = make_time(curve)
    if detrended:
        found = curve.detrended(flux=flux)
        from astropy.time import Time

        name = "bjd_tdb" if time.scale == "tdb" else "mjd"
        kind, scale = TIMES[name]
        time = Time(found[name].value, format=kind, scale=scale)
        value, error = np.asarray(found["ratio"]), np.asarray(found["ratio_error"])
        wavelength, band = found["wavelength"], np.asarray(found["band"])
        meta["flux"] = f"{found.table.meta['flux']} over the smooth spectrum of its band"
        scaled = value * units.dimensionless_unscaled, error * units.dimensionless_unscaled
    else:
        chosen = curve.flux(flux)
        scaled = chosen.value * units.uJy, chosen.error * units.uJy
        wavelength, band = curve.table["wavelength"], np.asarray(curve.table["band"])
        meta["flux"] = chosen.name
    made = lightkurve.LightCurve(time=time, flux=scaled[0], flux_err=scaled[1], meta=meta)
    made["wavelength"] = wavelength
    made["band"] = band
    return made


def make_specutils(spectrum: Spectrum) -> Any:
    """Return a spectrum as a `specutils.Spectrum`.

    Parameters
    ----------
    spectrum : Spectrum
        Channels without a point are left out.

    Returns
    -------
    specutils.Spectrum
        In order of wavelength, with standard deviations.
    """
    specutils = import_extra("specutils", "results", "to_specutils")
    from astropy import units
    from astropy.nddata import StdDevUncertainty

    wavelength, flux = spectrum.wavelength.value, spectrum.flux.value
    # Its axis must increase, so that points of one wavelength become one.
    places, bins = np.unique(wavelength, return_inverse=True)
    found = average_in_bins(bins, wavelength, flux, spectrum.flux_error.value, len(places))
    has_flux = found.n > 0
    if not has_flux.any():
        raise ConfigError(
            f"the spectrum of {spectrum.table.meta.get('id')!r} has no point: nothing for specutils"
        )
    # Older versions have another name for it.
    make = getattr(specutils, "Spectrum", None) or specutils.Spectrum1D
    return make(
        flux=found.value[has_flux] * units.uJy,
        spectral_axis=places[has_flux] * units.um,
        uncertainty=StdDevUncertainty(found.error[has_flux] * units.uJy),
        meta=dict(spectrum.table.meta),
    )
