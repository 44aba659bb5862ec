"""The figures of the demo: what was recovered against what was injected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from spxdask.extras import import_extra
from spxdask.results.light_curve import LightCurve
from spxdask.results.plots import BAND_COLOURS
from spxdask.science.channels import BANDS, PUBLISHED_CHANNELS

__all__ = ["Chosen", "plot_checks", "plot_spectra"]

# Wavelengths at which true spectra are drawn, um.
_FINE = np.geomspace(0.74, 5.02, 700)
_TICKS_UM = (0.75, 1, 1.5, 2, 3, 4, 5)
_TRUTH = {"color": "0.25", "linewidth": 1.0, "zorder": 1}
# Half of the range of light curves, which leaves room for the legend.
_AMPLITUDE_SHOWN = 0.25


class Chosen(NamedTuple):
    """A source that is plotted: its light curve, and what gives its true flux at wavelengths."""

    light_curve: LightCurve
    true_flux: Callable[[np.ndarray], np.ndarray]


def plot_spectra(
    path: Path, measured: pd.DataFrame, chosen: Mapping[str, Chosen], pair: list[Chosen]
) -> None:
    """Plot spectra of a bright source, one with a line, a faint one and a blended pair.

    Parameters
    ----------
    path : Path
        The picture.
    measured : DataFrame
        A row a source and frame, with ``injected``, ``psf_flux`` and pulls.
    chosen : mapping of str to Chosen
        ``bright``, ``emission`` and ``faint``.
    pair : list of Chosen
        The two sources of the pair.
    """
    figure, panels = _make_panels("Spectra of simulated sources: injected and recovered")
    for panel, name, title in (
        (panels[0], "bright", "a bright star"),
        (panels[1], "emission", "a line in emission"),
        (panels[2], "faint", "a faint source"),
    ):
        one = chosen[name]
        rows = _take(measured, one)
        _draw_spectrum(panel, one, rows, 1e-3 if name != "faint" else 1.0)
        n = int(np.count_nonzero(one.light_curve.spectrum()["n"]))
        panel[0].set_title(f"{title}: {n} of {len(PUBLISHED_CHANNELS)} channels", fontsize=10)
    panels[0][0].legend(fontsize=7.5, ncols=2, loc="upper right", framealpha=0.9)
    _describe_faint(panels[2][0], _take(measured, chosen["faint"]))
    for number, one in enumerate(pair):
        rows = _take(measured, one)
        _draw_spectrum(panels[3], one, rows, 1e-3, "os"[number], is_blended=True)
    panels[3][0].set_title('a blended pair, 2 pixels (12") apart', fontsize=10)
    for panel in panels:
        _finish_wavelengths(panel)
    figure.savefig(path, dpi=130)


def _draw_spectrum(
    panel: tuple[Any, Any],
    one: Chosen,
    rows: pd.DataFrame,
    scale: float,
    marker: str = "o",
    *,
    is_blended: bool = False,
) -> None:
    """Draw truth, both total fluxes, and their pulls; an aperture has the light of neighbours."""
    main, below = panel
    main.plot(_FINE, one.true_flux(_FINE) * scale, label="injected", **_TRUTH)
    main.plot(
        rows["wavelength"],
        rows["aperture_flux"] * scale,
        "+",
        color="0.6",
        markersize=5,
        zorder=2,
        label="flux x aperture_correction",
    )
    look = {"fmt": marker, "markersize": 3, "elinewidth": 0.8, "zorder": 3}
    for band in BANDS:
        mine = rows[rows["band"] == band]
        flux, error = mine["psf_flux"] * scale, mine["psf_flux_error"] * scale
        label = "psf_flux" if band == BANDS[0] else None
        main.errorbar(
            mine["wavelength"], flux, error, color=BAND_COLOURS[band], label=label, **look
        )
        pulls = mine["psf_pull"]
        below.plot(mine["wavelength"], pulls, marker, color=BAND_COLOURS[band], markersize=2.5)
    if not is_blended:
        below.plot(rows["wavelength"], rows["aperture_pull"], "+", color="0.7", zorder=0)
    main.set_ylabel("total flux [mJy]" if scale != 1.0 else "total flux [µJy]")


def _describe_faint(axes: Any, rows: pd.DataFrame) -> None:
    """Say how many fluxes are negative, and what their mean is."""
    weight = rows["psf_flux_error"] ** -2.0
    mean, error = (weight * rows["psf_flux"]).sum() / weight.sum(), weight.sum() ** -0.5
    true = (weight * rows["injected"]).sum() / weight.sum()
    negative = int((rows["psf_flux"] < 0).sum())
    axes.axhline(0.0, color="0.7", linewidth=0.8, zorder=0)
    # The longest wavelengths are so noisy that they would hide the rest.
    low, high = np.nanpercentile(rows["psf_flux"], [2, 98])
    axes.set_ylim(1.6 * min(low, -10.0), 1.9 * high)
    axes.text(
        0.03,
        0.95,
        f"{negative} of {len(rows)} fluxes are negative\n"
        f"mean {mean:.1f} ± {error:.1f} µJy, injected {true:.1f}",
        transform=axes.transAxes,
        va="top",
        fontsize=8,
    )


def plot_checks(
    path: Path,
    measured: pd.DataFrame,
    chosen: Mapping[str, Chosen],
    variability: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Plot light curves, the ratio of recovered to injected in all channels, and pulls.

    Parameters
    ----------
    path : Path
        The picture.
    measured : DataFrame
        A row a source and frame, with ``injected``, fluxes and pulls.
    chosen : mapping of str to Chosen
        ``variable`` and ``constant``.
    variability : callable
        True flux of the variable source over its mean, at times.
    """
    figure, panels = _make_panels("Recovered over injected, in time and wavelength")
    truths = {"variable": variability, "constant": lambda mjd: np.ones(len(mjd))}
    for panel, (name, truth) in zip(panels, truths.items(), strict=False):
        one = chosen[name]
        _draw_light_curve(panel, one, _take(measured, one), truth)
        panel[0].set_title(f"a {name} star", fontsize=10)
        panel[1].set_xlabel("MJD [d]")
    _draw_channels(panels[2], measured)
    _finish_wavelengths(panels[2])
    _draw_pulls(figure, panels[3], measured)
    figure.savefig(path, dpi=130)


def _draw_light_curve(
    panel: tuple[Any, Any],
    one: Chosen,
    rows: pd.DataFrame,
    truth: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Draw the flux over the mean spectrum against time, and the true variability."""
    main, below = panel
    days = np.linspace(rows["mjd"].min() - 3, rows["mjd"].max() + 3, 400)
    main.plot(days, truth(days), label="injected", **_TRUTH)
    mean = one.true_flux(rows["true_wavelength"].to_numpy())
    ratio, error = rows["psf_flux"] / mean, rows["psf_flux_error"] / mean
    for number, name in enumerate(BANDS):
        mine = rows["band"] == name
        # Detectors see a source at the same time; beside one another, they can be told apart.
        shown = rows["mjd"][mine] + 0.7 * (number - 2.5)
        look = {"fmt": "o", "markersize": 3, "elinewidth": 0.8, "color": BAND_COLOURS[name]}
        main.errorbar(shown, ratio[mine], error[mine], label=name, **look)
        below.plot(shown, rows["psf_pull"][mine], "o", markersize=2.5, **_colour(name))
    main.text(
        0.03,
        0.05,
        f"reduced $\\chi^2$ of detrended(): {one.light_curve.detrended().reduced_chi2:,.1f}",
        transform=main.transAxes,
        fontsize=8,
    )
    main.set_ylim(1 - 1.6 * _AMPLITUDE_SHOWN, 1 + 1.9 * _AMPLITUDE_SHOWN)
    main.set_ylabel("psf_flux / mean spectrum")
    main.legend(fontsize=7, ncols=7, loc="upper center", columnspacing=0.7, handletextpad=0.2)


def _colour(band: str) -> dict[str, str]:
    return {"color": BAND_COLOURS[band]}


def _draw_channels(panel: tuple[Any, Any], measured: pd.DataFrame) -> None:
    """Draw the weighted mean of recovered over injected in each channel, of all sources."""
    main, below = panel
    band = measured["band"].map(BANDS.index).to_numpy()
    channel = PUBLISHED_CHANNELS.assign(band, measured["wavelength"].to_numpy())
    ratio = (measured["psf_flux"] / measured["injected"]).to_numpy()
    error = (measured["psf_flux_error"] / measured["injected"]).to_numpy()
    is_used = (channel >= 0) & np.isfinite(ratio) & np.isfinite(error)
    number = len(PUBLISHED_CHANNELS)
    weight = np.bincount(channel[is_used], error[is_used] ** -2.0, number)
    total = np.bincount(channel[is_used], ratio[is_used] * error[is_used] ** -2.0, number)
    seen = np.flatnonzero(weight)
    mean, sigma = total[seen] / weight[seen], weight[seen] ** -0.5
    for place, name in enumerate(BANDS):
        mine = PUBLISHED_CHANNELS.band[seen] == place
        centre = PUBLISHED_CHANNELS.wavelength[seen][mine]
        look = {"fmt": "o", "markersize": 3, "elinewidth": 0.8, "color": BAND_COLOURS[name]}
        main.errorbar(centre, 100 * (mean[mine] - 1), 100 * sigma[mine], label=name, **look)
        below.plot(centre, (mean[mine] - 1) / sigma[mine], "o", markersize=2.5, **_colour(name))
    # A channel at the edge of the detectors, with few points, may be off the plot.
    limit = 130 * np.percentile(np.abs(mean - 1) + sigma, 96)
    main.set_ylim(-limit, limit)
    main.axhline(0.0, **_TRUTH)
    main.set_ylabel("recovered / injected - 1 [%]")
    sources = measured["target_id"].nunique()
    main.set_title(
        f"{len(seen)} of {number} channels, mean of {sources} sources (psf_flux)", fontsize=10
    )


def _draw_pulls(figure: Any, panel: tuple[Any, Any], measured: pd.DataFrame) -> None:
    """Draw the distribution of all pulls over one panel, with a Gaussian of unit width."""
    main, below = panel
    space = main.get_subplotspec().get_gridspec()
    row, column = main.get_subplotspec().rowspan.start, main.get_subplotspec().colspan.start
    main.remove()
    below.remove()
    axes = figure.add_subplot(space[row : row + 2, column])
    edges = np.linspace(-5, 5, 61)
    for name, label, look in (
        ("psf", "psf_flux", {"color": "#0072B2", "alpha": 0.45, "histtype": "stepfilled"}),
        (
            "aperture",
            "flux x aperture_correction",
            {"color": "#D55E00", "histtype": "step", "linewidth": 1.2},
        ),
    ):
        pulls = measured[f"{name}_pull"].dropna()
        axes.hist(pulls, edges, density=True, label=label, **look)
    x = np.linspace(-5, 5, 300)
    axes.plot(
        x, np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi), label=r"Gaussian, $\sigma$ = 1", **_TRUTH
    )
    axes.set(xlabel="(recovered - injected) / error", ylabel="density", xlim=(-5, 5))
    axes.set_title(f"errors of {len(measured):,} measurements", fontsize=10)
    axes.legend(fontsize=7.5)


def _take(measured: pd.DataFrame, one: Chosen) -> pd.DataFrame:
    rows = measured[measured["target_id"] == one.light_curve.id]
    return rows.sort_values("wavelength")


def _make_panels(title: str) -> tuple[Any, list[tuple[Any, Any]]]:
    """Return a figure of two by two panels, each of a plot and one of residuals below it."""
    drawing: Any = import_extra("matplotlib.figure", "plot", "spxdask demo")
    figure = drawing.Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(f"spxdask demo — {title}", fontsize=12)
    grid = figure.add_gridspec(4, 2, height_ratios=(3, 1, 3, 1))
    panels = []
    for number in range(4):
        row, column = 2 * (number // 2), number % 2
        main = figure.add_subplot(grid[row, column])
        below = figure.add_subplot(grid[row + 1, column], sharex=main)
        main.tick_params(labelbottom=False)
        for line in (-1, 0, 1):
            below.axhline(line, color="0.7", linewidth=0.8 if not line else 0.5, zorder=0)
        below.set(ylim=(-5, 5), ylabel=r"residual [$\sigma$]", yticks=(-3, 0, 3))
        panels.append((main, below))
    return figure, panels


def _finish_wavelengths(panel: tuple[Any, Any]) -> None:
    main, below = panel
    main.set_xscale("log")
    main.set_xlim(_FINE[0], _FINE[-1])
    below.set_xticks(_TICKS_UM, [f"{tick:g}" for tick in _TICKS_UM])
    below.set_xticks([], minor=True)
    below.set_xlabel("wavelength [µm]")
