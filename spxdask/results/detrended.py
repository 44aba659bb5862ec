"""The flux of a source over its smooth spectrum."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spxdask.results import plots
from spxdask.science.channels import BANDS, Channels
from spxdask.science.spectra import fit_smooth_flux
from spxdask.tables.fluxes import Flux
from spxdask.tables.quantities import ROW_MEANINGS, Meaning, make_qtable
from spxdask.text import format_count

if TYPE_CHECKING:
    from astropy.table import QTable

__all__ = ["BandFit", "Detrended", "detrend"]

# With fewer points a channel, a spectral line between two points looks like variability.
ENOUGH_PER_CHANNEL = 4.0
# A spectrum that is not this far above its error has no sensible quotient.
MIN_SNR = 3.0
MEANINGS = {
    "mjd": ROW_MEANINGS["mjd"],
    "bjd_tdb": ROW_MEANINGS["bjd_tdb"],
    "band": ROW_MEANINGS["band"],
    "wavelength": ROW_MEANINGS["wavelength"],
    "ratio": Meaning("", "flux over smooth_flux", "phot.flux.density;arith.ratio"),
    "ratio_error": Meaning("", "error of ratio, that of smooth_flux included", "stat.error"),
    "flux": Meaning("uJy", "", ROW_MEANINGS["flux"].ucd),
    "flux_error": Meaning("uJy", "error of flux", ROW_MEANINGS["flux_error"].ucd),
    "smooth_flux": Meaning(
        "uJy", "what the other points of the band say of this wavelength", "phot.flux.density"
    ),
    "smooth_flux_error": Meaning("uJy", "error of smooth_flux", "stat.error"),
}


@dataclass(frozen=True, kw_only=True)
class BandFit:
    """How the smooth spectrum of one band was determined.

    Attributes
    ----------
    band : str
        Such as ``D3``.
    n : int
        Points.
    degrees : float
        Effective number of parameters of the curve; 0 without one.
    chi2, n_compared : float, int
        Squared differences from the curve in units of their errors, and of how many points.
    is_sparse : bool
        Whether there are fewer than four points a channel, so that spectral lines and variability
        cannot be told apart.
    """

    band: str
    n: int
    degrees: float
    chi2: float
    n_compared: int
    is_sparse: bool


class Detrended:
    """The flux of a source over its smooth spectrum.

    Parameters
    ----------
    table : astropy.table.QTable
        A row a point, in order of time.
    fits : list of BandFit
        Of each band with a point.

    Attributes
    ----------
    table : astropy.table.QTable
        ``mjd``, ``bjd_tdb`` (if known), ``band``, ``wavelength``, ``ratio``, ``ratio_error``,
        ``flux``, ``flux_error``, ``smooth_flux``, ``smooth_flux_error``. A ratio is NaN where the
        other points of the band do not determine the spectrum, or it is below 3 of its errors.
    fits : list of BandFit
        As given.
    """

    def __init__(self, table: QTable, fits: list[BandFit]) -> None:
        self.table = table
        self.fits = fits

    def __getitem__(self, name: str) -> Any:
        return self.table[name]

    def __len__(self) -> int:
        return len(self.table)

    @property
    def chi2(self) -> float:
        """Squared differences of flux and smooth_flux in units of their errors, over all points."""
        return float(sum(fit.chi2 for fit in self.fits))

    @property
    def n(self) -> int:
        """Number of points in `chi2`. The chi2 of a constant source is about this."""
        return sum(fit.n_compared for fit in self.fits)

    @property
    def reduced_chi2(self) -> float:
        """`chi2` / `n`: about 1 for a constant source; NaN without a point."""
        return self.chi2 / self.n if self.n else float("nan")

    @property
    def notes(self) -> list[str]:
        """What to know of bands with few points, a sentence for each reason."""
        few = [fit for fit in self.fits if not fit.n_compared]
        sparse = [fit for fit in self.fits if fit.n_compared and fit.is_sparse]
        reasons = {"for a spectrum": few, "to tell variability from spectral lines": sparse}
        return [
            f"too few points {reason}: " + ", ".join(f"{fit.n:,} in {fit.band}" for fit in fits)
            for reason, fits in reasons.items()
            if fits
        ]

    def __repr__(self) -> str:
        return f"<Detrended {self.table.meta.get('id')!r}: {self._describe()}>"

    def _repr_html_(self) -> str:
        name = html.escape(str(self.table.meta.get("id")))
        return f"<p><b>{name}</b>: {self._describe()}</p>{self.table._repr_html_()}"

    def _describe(self) -> str:
        head = f"{format_count(len(self), 'point')}, chi2 {self.chi2:.1f} for {self.n:,}"
        return "; ".join([head, *self.notes])

    def plot(self, ax: Any = None, **style: Any) -> Any:
        """Plot the ratio against time, bands by colour.

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
        return plots.plot_detrended(self, ax, **style)


def detrend(
    band: np.ndarray,
    wavelength: np.ndarray,
    times: dict[str, np.ndarray],
    flux: Flux,
    meta: dict[str, Any],
    channels: Channels,
) -> Detrended:
    """Divide points by the smooth spectrum of their band.

    Parameters
    ----------
    band : (n,) int array
        0 for D1 to 5 for D6.
    wavelength : (n,) float array
        In um.
    times : dict of str to (n,) float array
        ``mjd`` and perhaps ``bjd_tdb``.
    flux : Flux
        Of each point; those without one are left out.
    meta : dict
        Of the table.
    channels : Channels
        To know how many points a channel has.

    Returns
    -------
    Detrended
    """
    is_used = (band >= 0) & np.isfinite(wavelength) & np.isfinite(flux.value)
    is_used &= np.isfinite(flux.error) & (flux.error > 0)
    band, wavelength = band[is_used], wavelength[is_used]
    value, error = flux.value[is_used], flux.error[is_used]
    place = channels.assign(band, wavelength)
    smooth, smooth_error = np.full(len(value), np.nan), np.full(len(value), np.nan)
    fits = []
    for number in np.unique(band).tolist():
        mine = np.flatnonzero(band == number)
        curve = fit_smooth_flux(wavelength[mine], value[mine], error[mine])
        if curve is not None:
            smooth[mine], smooth_error[mine] = curve.value, curve.error
        pull2 = (value[mine] - smooth[mine]) ** 2 / (error[mine] ** 2 + smooth_error[mine] ** 2)
        seen = place[mine][place[mine] >= 0]
        n_channels = np.ptp(seen) + 1 if len(seen) else 1
        fits.append(
            BandFit(
                band=BANDS[number],
                n=len(mine),
                degrees=0.0 if curve is None else curve.degrees,
                chi2=float(np.nansum(pull2)),
                n_compared=int(np.count_nonzero(np.isfinite(pull2))),
                is_sparse=bool(len(mine) < ENOUGH_PER_CHANNEL * n_channels),
            )
        )
    with np.errstate(invalid="ignore", divide="ignore"):
        is_clear = smooth > MIN_SNR * smooth_error
        ratio = np.where(is_clear, value / smooth, np.nan)
        # The point took no part in the curve, so that the two errors are independent.
        ratio_error = np.where(is_clear, np.hypot(error, ratio * smooth_error) / smooth, np.nan)
    columns = {
        **{name: column[is_used] for name, column in times.items()},
        "band": np.array(BANDS)[band],
        "wavelength": wavelength,
        "ratio": ratio,
        "ratio_error": ratio_error,
        "flux": value,
        "flux_error": error,
        "smooth_flux": smooth,
        "smooth_flux_error": smooth_error,
    }
    meanings = MEANINGS | {"flux": MEANINGS["flux"]._replace(description=flux.name)}
    return Detrended(make_qtable(columns, meanings, {**meta, "flux": flux.name}), fits)
