"""A row a source: points, fluxes by band and constancy, from one pass over the light curves."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from spxdask.results.curves import Curves
from spxdask.science.channels import BANDS, Channels
from spxdask.science.spectra import average_in_bins, sum_differences
from spxdask.tables.fluxes import choose_flux
from spxdask.tables.quantities import ROW_MEANINGS, Meaning
from spxdask.tables.selection import find_good_rows

__all__ = ["SOURCE_MEANINGS", "summarise_part", "summarise_sources"]

# What the summary reads of the light curves.
COLUMNS_READ = (
    "band",
    "mjd",
    "flux",
    "flux_error",
    "wavelength",
    "flag",
    "aperture_correction",
    "psf_flux",
    "psf_flux_error",
    "neighbour_flux",
)
# Parts of the light curves in memory at once; more threads than cores wait for an object store.
PARTS_AT_ONCE = 4

_FLUX = ROW_MEANINGS["flux"].ucd
SOURCE_MEANINGS = {
    "id": Meaning("", "id of the source as in the catalogue", "meta.id;meta.main"),
    "ra": Meaning("deg", "right ascension in the catalogue, ICRS", "pos.eq.ra;meta.main"),
    "dec": Meaning("deg", "declination in the catalogue, ICRS", "pos.eq.dec;meta.main"),
    "points": Meaning("", "rows of the light curve", "meta.number"),
    "good": Meaning("", "rows that `select_good_rows` selects and that have a flux", "meta.number"),
    "chi2": Meaning(
        "",
        "of constancy at fixed wavelength: squared differences of good points from the mean of "
        "their channel, its slope taken out, in units of their errors",
        "stat.fit.chi2",
    ),
    "dof": Meaning("", "degrees of freedom of chi2", "stat.fit.dof"),
    "first_mjd": Meaning("d", "first point, modified Julian date, UTC", "time.start"),
    "last_mjd": Meaning("d", "last point, modified Julian date, UTC", "time.end"),
}
for _band in BANDS:
    SOURCE_MEANINGS |= {
        f"flux_{_band}": Meaning(
            "uJy", f"mean total flux of the good points in {_band}, by inverse variance", _FLUX
        ),
        f"flux_error_{_band}": Meaning("uJy", f"error of flux_{_band}", f"stat.error;{_FLUX}"),
        f"n_{_band}": Meaning("", f"good points in {_band}", "meta.number"),
    }


def summarise_sources(curves: Curves, channels: Channels) -> pa.Table:
    """Return a row for each source with a light curve, from one pass over all of them.

    Parameters
    ----------
    curves : Curves
        The light curves.
    channels : Channels
        Wavelengths within one of which count as the same.

    Returns
    -------
    pyarrow.Table
        ``id`` and the columns of `summarise_part`, in the order of the files.
    """

    def summarise(part: Any) -> pa.Table:
        return summarise_part(curves.read_part(part, COLUMNS_READ), channels)

    parts = curves.parts

    def run() -> Iterator[pa.Table]:
        with ThreadPoolExecutor(PARTS_AT_ONCE) as threads:
            # As many are under way as threads, and none waits in memory for its turn.
            yield from threads.map(summarise, parts)

    found = list(run())
    return pa.concat_tables(found) if found else summarise_part(_EMPTY, channels)


def summarise_part(rows: pa.Table, channels: Channels) -> pa.Table:
    """Return a row for each source of some rows.

    Parameters
    ----------
    rows : pyarrow.Table
        ``target_id`` and `COLUMNS_READ`, all rows of a source one after the other.
    channels : Channels
        Wavelengths within one of which count as the same.

    Returns
    -------
    pyarrow.Table
        The columns of `SOURCE_MEANINGS` without the positions; ``is_psf`` and ``is_corrected``
        say whether any flux is that.
    """
    encoded = rows.column("target_id").combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    source = np.cumsum(np.diff(codes, prepend=-1) != 0) - 1
    n = len(starts)
    names = rows.column("band").combine_chunks()
    band = np.asarray(names.dictionary_encode().indices.to_numpy(zero_copy_only=False), np.int64)
    numbers = {name: number for number, name in enumerate(BANDS)}
    known = [numbers.get(name, -1) for name in names.dictionary_encode().dictionary.to_pylist()]
    band = np.array(known, np.int64)[band] if known else band
    columns = {name: rows.column(name) for name in COLUMNS_READ}
    if columns["psf_flux"].null_count == len(rows) == columns["aperture_correction"].null_count:
        # Of a run without PSF photometry.
        columns = {k: v for k, v in columns.items() if k not in _WITH_PSF}
    flux = choose_flux(columns)
    wavelength = _read(rows, "wavelength")
    good = find_good_rows(rows) & np.isfinite(flux.value) & (flux.error > 0)
    good &= np.isfinite(flux.error) & np.isfinite(wavelength)
    place, wave = source[good], wavelength[good]
    value, error, of_band = flux.value[good], flux.error[good], band[good]
    found: dict[str, Any] = {
        "id": encoded.dictionary.take(pa.array(codes[starts])),
        "points": np.diff(np.append(starts, len(codes))),
        "good": np.bincount(place, minlength=n),
    }
    bins = np.where(of_band >= 0, place * len(BANDS) + of_band, -1)
    means = average_in_bins(bins, wave, value, error, n * len(BANDS))
    for number, name in enumerate(BANDS):
        found[f"flux_{name}"] = means.value[number :: len(BANDS)]
        found[f"flux_error_{name}"] = means.error[number :: len(BANDS)]
        found[f"n_{name}"] = means.n[number :: len(BANDS)]
    chi2, dof = sum_differences(place, of_band, wave, value, error, n, channels)
    found |= {"chi2": chi2, "dof": dof}
    mjd = _read(rows, "mjd")
    found["first_mjd"] = np.fmin.reduceat(mjd, starts) if n else mjd
    found["last_mjd"] = np.fmax.reduceat(mjd, starts) if n else mjd
    found["is_psf"] = np.full(n, bool(flux.is_psf.any()))
    found["is_corrected"] = np.full(n, flux.is_total and not flux.is_psf[good].all())
    return pa.table(found)


_WITH_PSF = ("psf_flux", "psf_flux_error", "aperture_correction", "neighbour_flux")
_EMPTY = pa.table(
    {
        "target_id": pa.array([], pa.large_string()),
        "band": pa.array([], pa.string()),
        "flag": pa.array([], pa.int64()),
        **{n: pa.array([], pa.float64()) for n in COLUMNS_READ if n not in ("band", "flag")},
    }
)


def _read(rows: pa.Table, name: str) -> np.ndarray:
    return np.asarray(rows.column(name).to_numpy(), float)
