"""A light curve: cuts, spectra, variability, plots and conversions, against injected truth."""

from __future__ import annotations

import sys

import matplotlib as mpl
import numpy as np
import pytest
from astropy import units as u
from astropy.io import fits
from astropy.time import Time
from made_run import MJD, Points, make_points, make_rows

from spxdask.errors import ConfigError, InputError, MissingExtraError
from spxdask.results import LightCurve
from spxdask.science.channels import PUBLISHED_CHANNELS, Channels
from spxdask.science.flags import FLAG_BITS
from spxdask.tables.fluxes import choose_flux


def with_lines(wavelength):
    """A steep spectrum with lines as narrow as the filters show them."""
    flux = 20000.0 * (wavelength / 2) ** -2.5
    for centre, depth in [(0.85, -0.3), (1.0, 0.5), (1.28, -0.2), (1.9, 0.4), (2.3, -0.3)]:
        flux = flux * (1 + depth * np.exp(-0.5 * ((wavelength / centre - 1) * 95) ** 2))
    return flux


def curve_of(points: Points, **options) -> LightCurve:
    return LightCurve("a", make_rows(points, **options), ra=10.0, dec=-3.0)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def test_cuts_are_by_name_and_the_default_is_that_of_the_package(rng):
    names = ["SOURCE", "BLOOM", "GHOST", "OUTLIER"]
    flag = np.array([1 << FLAG_BITS[name] for name in names])
    lc = curve_of(make_points(rng, 4, with_lines, flag=flag))

    def kept(cut: LightCurve) -> list[str]:
        return [names[list(flag).index(bit)] for bit in cut["flag"]]

    assert kept(lc.good()) == ["SOURCE", "OUTLIER"]
    assert kept(lc.good(flags=["bloom", 19])) == ["SOURCE", "GHOST"]
    assert kept(lc.good(flags="BLOOM")) == ["SOURCE", "GHOST", "OUTLIER"]
    assert len(lc.good(flags=())) == 4
    assert len(lc.good(flags=(), psf_chi2=1.0)) == len(lc.good(flags=(), psf_fraction=1.1)) == 0
    assert len(lc.good(flags=(), bad_fraction=0.0)) == 4
    assert len(lc.good(flags=(), mjd_range=(lc.mjd[1], Time(lc.mjd[2], format="mjd")))) == 2
    assert set(lc.good(flags=(), bands=[lc["band"][0]])["band"]) == {lc["band"][0]}
    with pytest.raises(ConfigError, match="'BLOM' is no flag: did you mean BLOOM"):
        lc.good(flags=["BLOM"])
    with pytest.raises(ConfigError, match="bands must be some of D1 to D6"):
        lc.good(bands=["D7"])
    band = lc["band"][0]
    for same in (band, band.lower(), int(band[1]), [int(band[1])]):
        assert len(lc.good(flags=(), bands=same)) == len(lc.good(flags=(), bands=[band])) > 0


def test_the_total_flux_is_that_of_the_psf_where_there_is_one(rng):
    points = make_points(rng, 30, with_lines)
    rows = make_rows(points)
    some = np.where(np.arange(30) < 10, np.nan, rows["psf_flux"].to_numpy())
    columns = {name: rows[name].to_numpy() for name in rows.column_names} | {"psf_flux": some}
    total = choose_flux(columns)
    np.testing.assert_allclose(total.value, points.flux, rtol=1e-12)
    assert total.name == "psf_flux, else flux x aperture_correction"
    np.testing.assert_array_equal(total.is_psf, np.arange(30) >= 10)
    assert choose_flux(columns, "corrected").name == "flux x aperture_correction"
    aperture = choose_flux(columns, "aperture")
    np.testing.assert_array_equal(aperture.value, columns["flux"])
    assert not aperture.is_total
    assert np.isnan(choose_flux(columns, "psf").value[:10]).all()
    # Without a neighbour_flux, the aperture may hold the light of a source beside it.
    unknown = np.where(np.arange(30) < 4, np.nan, 0.0)
    total = choose_flux(columns | {"neighbour_flux": unknown})
    np.testing.assert_array_equal(np.isnan(total.value), np.arange(30) < 4)
    np.testing.assert_array_equal(np.isnan(total.error), np.arange(30) < 4)
    with pytest.raises(ConfigError, match="one of total, psf, corrected, aperture"):
        choose_flux(columns, "magic")


def test_a_spectrum_is_the_inverse_variance_mean_of_each_of_102_channels(rng):
    points = make_points(rng, 600, with_lines)
    spectrum = curve_of(points).spectrum()
    assert len(spectrum) == 102
    assert spectrum.flux_name == "psf_flux"
    assert spectrum.table.meta["channels"] == "cal-sch-v1-2026-106"
    assert spectrum["n"].sum() == 600
    weights = points.error**-2.0
    channel = PUBLISHED_CHANNELS.assign(points.band, points.wavelength)
    for row in range(102):
        mine = channel == row
        if not mine.any():
            assert np.isnan(spectrum.flux[row].value)
            continue
        mean = np.average(points.flux[mine], weights=weights[mine])
        assert spectrum.flux[row].value == pytest.approx(mean, rel=1e-12)
        assert spectrum.flux_error[row].to_value(u.uJy) == pytest.approx(
            weights[mine].sum() ** -0.5, rel=1e-12
        )
        if mine.sum() > 1:
            pulls = (points.flux[mine] - mean) / points.error[mine]
            assert spectrum["chi2"][row] == pytest.approx((pulls**2).sum(), rel=1e-9)


def test_channels_do_not_overlap_and_detectors_are_kept_apart():
    channels = PUBLISHED_CHANNELS
    assert len(channels) == 102
    # In the overlap of D1 and D2, the detector decides; beyond the edges there is none.
    found = channels.assign([0, 1, 0, 5, 0, -1], [1.105, 1.105, 0.74, 5.003, np.nan, 1.0])
    assert found.tolist() == [16, 17, -1, 101, -1, -1]
    inner = (channels.wavelength_max[0] + channels.wavelength_min[1]) / 2
    assert channels.assign([0, 0], [inner - 1e-6, inner + 1e-6]).tolist() == [0, 1]


def test_points_in_no_channel_are_counted(rng):
    points = make_points(rng, 20, with_lines)
    points.wavelength[:2] = 0.5
    spectrum = curve_of(points).spectrum()
    assert spectrum.n_outside == 2
    assert "2 in no channel" in repr(spectrum)


def test_a_product_of_channels_has_precedence(tmp_path, rng):
    names = ["DETECTOR", "SUBCHAN", "WAVELENGTH", "WL_MIN", "WL_MAX", "R", "R_STD", "BANDWIDTH"]
    rows = [(1, 1, 0.85, 0.74, 0.95, 4, 1, 0.2), (1, 2, 1.0, 0.95, 1.12, 4, 1, 0.2)]
    formats = ["i4", "i4", *["f4"] * 6]
    table = fits.BinTableHDU(np.array(rows, dtype=list(zip(names, formats, strict=True))))
    table.name = "SPECTRAL_CHANNELS"
    path = tmp_path / "cal-sch-v9-2027-001.fits.gz"
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(path)
    points = make_points(rng, 50, with_lines, bands=(0,))
    spectrum = curve_of(points).spectrum(channels=path)
    assert spectrum["n"].tolist() == [
        np.count_nonzero(points.wavelength < np.float32(0.95)),
        np.count_nonzero(points.wavelength >= np.float32(0.95)),
    ]
    (tmp_path / "bad.fits").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no product of spectral channels"):
        curve_of(points).spectrum(channels=tmp_path / "bad.fits")


def test_without_channels_every_point_is_listed_by_wavelength(rng):
    points = make_points(rng, 40, with_lines, flag=np.array([1 << 26] + [0] * 39))
    spectrum = curve_of(points).spectrum(channels=False)
    order = np.argsort(points.wavelength[1:])
    np.testing.assert_array_equal(spectrum.wavelength.value, points.wavelength[1:][order])
    np.testing.assert_array_equal(spectrum.flux.value, points.flux[1:][order])
    assert len(spectrum) == 39


def test_epochs_are_parts_of_the_time(rng):
    lc = curve_of(make_points(rng, 300, with_lines))
    halves = lc.spectrum(epochs=2)
    middle = (lc.mjd.min() + lc.mjd.max()) / 2
    assert [int(s["n"].sum()) for s in halves] == [
        (lc.mjd < middle).sum(),
        (lc.mjd >= middle).sum(),
    ]
    one = lc.spectrum(epochs=(MJD, Time(middle, format="mjd")))
    np.testing.assert_array_equal(one["n"], halves[0]["n"])
    some = lc.spectrum(epochs=[(MJD, middle), (middle, MJD + 500)])
    assert sum(int(s["n"].sum()) for s in some) == 300
    for epochs in (0, True, (2, 1), [(1, 2, 3)], ("x", "y")):
        with pytest.raises(ConfigError):
            lc.spectrum(epochs=epochs)


@pytest.mark.parametrize("snr", [5.0, 300.0])
def test_a_constant_source_of_any_spectrum_has_a_chi2_of_about_1(snr):
    chi2 = n = 0.0
    for seed in range(4):
        points = make_points(np.random.default_rng(seed), 3000, with_lines, snr=snr)
        found = curve_of(points).detrended()
        assert len(found) == found.n == 3000
        chi2, n = chi2 + found.chi2, n + found.n
        assert found.notes == []
    assert chi2 / n == pytest.approx(1.0, abs=0.04)
    # Its ratios are told from 1 by their errors alone.
    pulls = (found["ratio"] - 1) / found["ratio_error"]
    assert np.nanstd(pulls) == pytest.approx(1.0, abs=0.05)
    assert np.nanmean(found["ratio"]) == pytest.approx(1.0, abs=0.01)


def test_the_amplitude_of_a_variable_source_is_recovered(rng):
    period = 17.3

    def vary(mjd):
        return 1 + 0.2 * np.sin(2 * np.pi * mjd / period)

    found = curve_of(make_points(rng, 1200, with_lines, snr=100, variability=vary)).detrended()
    phase = 2 * np.pi * found["mjd"].value / period
    shape = np.stack([np.ones(len(phase)), np.sin(phase), np.cos(phase)], axis=1)
    level, sine, cosine = np.linalg.lstsq(shape, np.asarray(found["ratio"]), rcond=None)[0]
    # Errors grow with the flux, which must not draw the curve to the faint points.
    assert level == pytest.approx(1.0, abs=0.01)
    assert sine == pytest.approx(0.2, rel=0.05)
    assert abs(cosine / level) < 0.01
    assert found.reduced_chi2 > 50


def test_outliers_do_not_bend_the_spectrum(rng):
    points = make_points(rng, 1000, with_lines, snr=50)
    points.flux[::50] *= 3
    found = curve_of(points).detrended()
    others = np.arange(1000) % 50 != 0
    pulls = ((found["ratio"] - 1) / found["ratio_error"])[others]
    assert np.std(pulls) == pytest.approx(1.0, abs=0.15)
    assert np.median(found["ratio"][~others]) == pytest.approx(3.0, rel=0.05)


def test_few_points_are_said_to_be_few(rng):
    points = make_points(rng, 5, with_lines, bands=(0,))
    found = curve_of(points).detrended()
    assert np.isnan(found["ratio"]).all()
    assert found.n == 0
    assert np.isnan(found.reduced_chi2)
    assert found.notes == ["too few points for a spectrum: 5 in D1"]
    sparse = curve_of(make_points(rng, 20, with_lines, bands=(1,))).detrended()
    assert sparse.notes == ["too few points to tell variability from spectral lines: 20 in D2"]
    assert len(curve_of(make_points(rng, 0, with_lines)).detrended()) == 0


def test_a_source_without_light_has_no_ratio(rng):
    points = make_points(rng, 300, np.ones_like)
    points.flux[:] = rng.standard_normal(300)
    points.error[:] = 1.0
    found = curve_of(points).detrended()
    assert np.isnan(found["ratio"]).mean() > 0.9
    assert found.reduced_chi2 == pytest.approx(1.0, abs=0.25)


def test_plots_are_axes_with_units_and_a_legend(rng, tmp_path):
    from matplotlib import pyplot

    lc = curve_of(make_points(rng, 200, with_lines, bands=(0, 3)))
    lc.id = "price $1 and $2"
    figure, (one, two, three) = pyplot.subplots(3)
    assert lc.plot_spectrum(one) is one
    assert lc.plot_light_curve(two, color="black") is two
    assert lc.plot_light_curve(three, detrended=True) is three
    assert one.get_xlabel() == "wavelength [µm]"
    assert one.get_ylabel() == "total flux (psf_flux) [µJy]"
    assert two.get_xlabel() == "MJD [d, UTC]"
    assert [text.get_text() for text in one.get_legend().get_texts()] == ["D1", "D4"]
    figure.savefig(tmp_path / "plot.png")
    assert lc.plot_spectrum(epochs=2, flux="aperture").get_ylabel() == "flux in the aperture [µJy]"
    assert lc.spectrum(False).plot() is not one
    pyplot.close("all")
    assert mpl.get_backend().lower() == "agg"


def test_times_have_their_scales(rng):
    lc = curve_of(make_points(rng, 20, with_lines))
    series = lc.to_timeseries()
    assert series.time.scale == "tdb"
    np.testing.assert_allclose(series.time.jd, lc["bjd_tdb"].value, rtol=0, atol=1e-9)
    assert series["psf_flux"].unit == u.uJy
    assert series.meta["id"] == "a"
    utc = lc.to_timeseries("mjd")
    assert utc.time.scale == "utc"
    np.testing.assert_allclose(utc.time.mjd, lc.mjd, rtol=0, atol=1e-9)
    assert "bjd_tdb" in utc.colnames
    with pytest.raises(ConfigError, match="time must be bjd_tdb or mjd"):
        lc.to_timeseries("hjd")


def test_specutils_gets_the_channels_that_have_a_point(rng):
    specutils = pytest.importorskip("specutils")
    lc = curve_of(make_points(rng, 60, with_lines))
    made, spectrum = lc.to_specutils(), lc.spectrum()
    has_points = spectrum["n"] > 0
    assert isinstance(made, getattr(specutils, "Spectrum", None) or specutils.Spectrum1D)
    np.testing.assert_allclose(made.flux.to_value("uJy"), spectrum.flux[has_points].value)
    np.testing.assert_allclose(
        made.wavelength.to_value("um"), spectrum.wavelength[has_points].value
    )
    np.testing.assert_allclose(made.uncertainty.array, spectrum.flux_error[has_points].value)
    assert made.meta["flux"] == "psf_flux"
    # Points at the very same wavelength become one.
    points = make_points(rng, 10, with_lines)
    points.wavelength[:] = np.repeat(np.arange(1.0, 6.0), 2)
    assert len(curve_of(points).to_specutils(channels=False).flux) == 5
    assert len(lc.to_specutils(epochs=2)) == 2


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_lightkurve_gets_total_fluxes_in_barycentric_time(rng):
    lightkurve = pytest.importorskip("lightkurve")
    lc = curve_of(make_points(rng, 200, with_lines))
    made = lc.to_lightkurve()
    assert isinstance(made, lightkurve.LightCurve)
    assert made.time.scale == "tdb"
    np.testing.assert_allclose(made.flux.to_value("uJy"), lc["psf_flux"].value)
    assert made.meta["LABEL"] == "a"
    ratio = lc.to_lightkurve(detrended=True)
    np.testing.assert_allclose(ratio.flux.value, np.asarray(lc.detrended()["ratio"]))
    assert ratio.time.scale == "tdb"


@pytest.mark.parametrize(
    ("library", "use"),
    [
        ("specutils", lambda lc: lc.to_specutils()),
        ("lightkurve", lambda lc: lc.to_lightkurve()),
        ("matplotlib", lambda lc: lc.plot_spectrum()),
    ],
)
def test_a_library_that_is_not_there_is_named_with_the_line_for_pip(library, use, rng, monkeypatch):
    for name in [m for m in sys.modules if m.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=f"pip install {library}") as caught:
        use(curve_of(make_points(rng, 20, with_lines)))
    assert caught.value.library == library
    assert isinstance(caught.value, ImportError)


def test_an_empty_light_curve_is_one_too(rng):
    lc = curve_of(make_points(rng, 10, with_lines, flag=1 << 26))
    assert len(lc.good()) == 0
    assert lc.spectrum()["n"].sum() == 0
    assert len(lc.spectrum(False)) == 0
    assert lc.plot_spectrum().get_xlabel()
    assert lc.plot_light_curve(detrended=True).get_xlabel()
    assert [s["n"].sum() for s in lc.spectrum(epochs=3)] == [0, 0, 0]
    with pytest.raises(ConfigError, match="has no point"):
        lc.to_specutils()
    assert isinstance(lc.channels, Channels)
