"""A run that is opened: what there is of it, its sources, frames and light curves."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import dask
import numpy as np
import pytest
from astropy import units as u
from made_run import CENTER, make_observation, make_points, make_rows, make_run
from objectstore import BUCKET, serving
from simulated import AWKWARD_IDS

import spxdask
from spxdask.errors import ConfigError, NoSuchSourceError, RunFolderError
from spxdask.run.aggregation import discard_aggregation
from spxdask.science.channels import PUBLISHED_CHANNELS
from spxdask.simulate.products import make_products
from spxdask.tables.schema import COLUMNS, WITH_PSF

FORMATS = ["csv", "parquet"]


def steep(wavelength):
    return 2000.0 * wavelength**-2.5


def make_curves(ids, n=20, **options):
    rng = np.random.default_rng(1)
    return {one: make_rows(make_points(rng, n, steep), **options) for one in ids}


@pytest.fixture(params=FORMATS, name="format")
def _format(request):
    return request.param


def test_light_curves_are_those_of_the_files_to_the_last_digit(tmp_path, format):
    curves = make_curves(AWKWARD_IDS)
    make_run(tmp_path, curves, format=format)
    run = spxdask.open_run(tmp_path)
    assert set(run) == set(AWKWARD_IDS)
    assert len(run) == len(AWKWARD_IDS)
    for target_id, rows in curves.items():
        assert target_id in run
        lc = run[target_id]
        assert lc.id == target_id
        assert lc.colnames == list(WITH_PSF.light_curve)
        np.testing.assert_array_equal(lc["psf_flux"].value, rows["psf_flux"].to_numpy())
        assert list(lc["obs_id"]) == rows["obs_id"].to_pylist()


def test_tables_know_units_descriptions_ucds_and_their_origin(tmp_path, format):
    make_run(tmp_path, make_curves(["a"]), format=format)
    lc = spxdask.open_run(tmp_path)["a"]
    for column in (c for c in COLUMNS if c.in_light_curve):
        made = lc.table[column.name]
        assert (made.unit or u.one) == (u.Unit(column.unit) if column.unit else u.one)
        assert made.info.description == column.description
        assert made.info.meta["ucd"] == column.ucd
    assert lc["flux"].to("Jy")[0].value == pytest.approx(lc["flux"][0].value * 1e-6)
    meta = lc.table.meta
    assert (meta["id"], meta["ra"], meta["dec"]) == ("a", *CENTER)
    assert meta["software"] == f"spxdask {spxdask.__version__}"
    assert meta["releases"] == ["qr3"]
    assert len(meta["configuration_digest"]) == 32
    assert any("IRSA662" in text for text in meta["citation"])


def test_ids_are_text_and_integers_name_the_same(tmp_path, format):
    make_run(tmp_path, make_curves(["39633458707826492", "007", "7"]), format=format)
    run = spxdask.open_run(tmp_path)
    assert run[39633458707826492].id == "39633458707826492"
    assert run[np.int64(7)].id == "7"
    assert 8 not in run
    assert 7.0 not in run
    with pytest.raises(KeyError, match="did you mean '39633458707826492'"):
        run["39633458707826493"]
    with pytest.raises(NoSuchSourceError, match="ids are text, to the last digit") as caught:
        run[39633458707826492.0]
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), NoSuchSourceError)


def test_positions_find_the_nearest_light_curve(tmp_path, format):
    arcsec = 1 / 3600
    positions = {
        "far": (CENTER[0], CENTER[1] + 4 * arcsec),
        "near": (CENTER[0], CENTER[1] + 1 * arcsec),
        "without a row": CENTER,
    }
    make_run(tmp_path, make_curves(["far", "near"]), positions=positions, format=format)
    run = spxdask.open_run(tmp_path)
    assert run.light_curve(*CENTER).id == "near"
    assert run.light_curve(ra=CENTER[0] * u.deg, dec=(CENTER[1] + 5 * arcsec) * u.deg).id == "far"
    assert run.light_curve(CENTER[0] - 360, CENTER[1]).id == "near"
    with pytest.raises(NoSuchSourceError, match=r"'far', is 36\.00 arcsec away"):
        run.light_curve(CENTER[0], CENTER[1] + 40 * arcsec)
    with pytest.raises(KeyError, match="has no row"):
        run["without a row"]
    for ra, dec in [(0.0, 91.0), (float("nan"), 0.0), ("x", 0.0)]:
        with pytest.raises(ConfigError):
            run.light_curve(ra, dec)


def test_sources_have_a_row_each_in_the_order_of_the_catalogue(tmp_path, format):
    rng = np.random.default_rng(2)
    flags = np.zeros(400, int)
    flags[:100] = 1 << 26  # BLOOM, with which a row is not good.
    flags[100:200] = 1 << 21  # SOURCE, with which it is.
    points = {
        "constant": make_points(rng, 400, steep, flag=flags),
        "variable": make_points(
            rng, 400, steep, variability=lambda mjd: 1 + 0.1 * np.sign(np.sin(mjd))
        ),
        "of D2 alone": make_points(rng, 5, steep, bands=(1,)),
    }
    curves = {one: make_rows(made) for one, made in points.items()}
    make_run(tmp_path, curves, format=format)
    sources = spxdask.open_run(tmp_path).sources
    assert list(sources["id"]) == list(points)
    assert list(sources["points"]) == [400, 400, 5]
    assert list(sources["good"]) == [300, 400, 5]
    np.testing.assert_allclose(sources["dec"].to_value("deg"), CENTER[1] + np.arange(3) * 0.01)
    reduced = np.asarray(sources["chi2"] / sources["dof"])
    assert reduced[0] == pytest.approx(1.0, abs=4 * np.sqrt(2 / sources["dof"][0]))
    # 10 % at a signal-to-noise ratio of 30.
    assert reduced[1] == pytest.approx(1 + 3.0**2, rel=0.15)
    assert list(sources["n_D1"])[2] == 0
    assert np.isnan(sources["flux_D1"][2])
    d2 = points["of D2 alone"]
    expected = np.average(d2.flux, weights=d2.error**-2)
    assert sources["flux_D2"][2].to_value("uJy") == pytest.approx(expected, rel=1e-12)
    assert sources["first_mjd"][2].value == d2.mjd[0]
    assert sources["last_mjd"][2].value == d2.mjd[-1]
    assert sources.meta["flux"] == "psf_flux"


def test_tables_without_psf_photometry_work_all_through(tmp_path, format):
    make_run(
        tmp_path, make_curves(["a"], 200, with_psf=False), format=format, photometry={"psf": "none"}
    )
    run = spxdask.open_run(tmp_path)
    lc = run["a"]
    assert "psf_flux" not in lc.colnames
    assert lc.spectrum().flux_name == run.sources.meta["flux"] == "flux in the aperture"
    assert lc.detrended().reduced_chi2 == pytest.approx(1.0, abs=0.4)
    assert lc.to_timeseries().time.scale == "utc"
    assert "flux in the aperture" in lc.plot_spectrum().get_ylabel()
    with pytest.raises(ConfigError, match="needs the column psf_flux"):
        lc.spectrum(flux="psf")
    with pytest.raises(ConfigError, match="a cut in psf_chi2 needs that column"):
        lc.good(psf_chi2=3)


def test_light_curves_of_earlier_versions_are_read(tmp_path, format):
    curves = {k: t.drop_columns(["filename", "release"]) for k, t in make_curves(["a"]).items()}
    make_run(tmp_path, curves, format=format)
    run = spxdask.open_run(tmp_path)
    assert run["a"].colnames == curves["a"].column_names
    assert run.sources["points"][0] == 20
    assert len(run.to_dask()) == 20


def test_frames_say_what_became_of_each(tmp_path):
    make_run(tmp_path, make_curves(["a"]), failed={2: "FITS: no IMAGE"}, pending=(5,))
    frames = spxdask.open_run(tmp_path).frames
    assert list(frames["status"]) == ["measured"] * 2 + ["failed"] + ["measured"] * 2 + ["pending"]
    assert frames["reason"][2] == "FITS: no IMAGE"
    assert frames["reason"].mask[0]
    assert frames["mjd"].unit == u.day
    assert frames["background"].info.description


def test_missing_sources_are_named_with_the_reason(tmp_path):
    frames = [make_observation(0), make_observation(1, shift_deg=4.0)]
    frames += [make_observation(2, shift_deg=-4.0)]
    positions = {
        "measured": CENTER,
        "on no frame": (CENTER[0] + 180, CENTER[1]),
        "at the edge": (CENTER[0], CENTER[1] + 1.74),
        "on a failed frame": (CENTER[0], CENTER[1] + 4.0),
        "not yet": (CENTER[0], CENTER[1] - 4.0),
    }
    run = make_run(
        tmp_path,
        make_curves(["measured"]),
        positions=positions,
        observations=frames,
        failed={1: "damaged"},
        pending=(2,),
    )
    run.root.put("skipped_rows.csv", b"row,line,reason,target_id,ra,dec\n7,8,no dec,b,1.5,\n")
    found = spxdask.open_run(tmp_path)
    with pytest.raises(NoSuchSourceError, match="'b' was skipped: no dec in the catalogue"):
        found["b"]
    missing = found.missing_sources
    reasons = dict(zip(missing["id"], missing["reason"], strict=True))
    assert list(reasons) == [*list(positions)[1:], "b"]
    assert reasons["on no frame"] == "on no frame of the query"
    assert reasons["at the edge"].startswith("at the edge of 1 measured frame")
    assert reasons["on a failed frame"] == "1 frame failed"
    assert reasons["not yet"] == "1 frame not measured yet"
    assert reasons["b"] == "skipped row 7 of the catalogue: no dec"


def test_light_curves_that_are_not_complete_are_no_reason(tmp_path):
    """As where the run was killed while it wrote them."""
    positions = {"written": CENTER, "missing": CENTER, "on no frame": (CENTER[0] + 180, CENTER[1])}
    run = make_run(tmp_path, make_curves(["written"]), positions=positions)
    discard_aggregation(run.state)
    missing = spxdask.open_run(tmp_path).missing_sources
    assert list(missing["reason"]) == [
        "not known: the light curves are not up to date, resume the run",
        "on no frame of the query",
    ]


def test_a_folder_without_a_run_is_one_sentence(tmp_path):
    with pytest.raises(RunFolderError, match="there is no such folder"):
        spxdask.open_run(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match="is not the output folder of a run"):
        spxdask.open_run(tmp_path)


def test_a_half_done_run_gives_what_there_is(tmp_path):
    make_run(tmp_path, {}, positions={"a": CENTER}, pending=(3, 4, 5))
    run = spxdask.open_run(tmp_path)
    with pytest.raises(RunFolderError, match="no light curves yet: 3 of 6 frames are measured"):
        run["a"]
    assert list(run.missing_sources["id"]) == ["a"]
    assert len(run.frames) == run.summary.n_frames == 6
    assert "no light curves yet" in repr(run)
    assert "pending" in run._repr_html_()


def test_light_curves_alone_are_opened(tmp_path, format):
    run = make_run(tmp_path / "out", make_curves(["a", "b/c"]), format=format)
    (tmp_path / "copy").mkdir()
    run.lightcurves.local_path.rename(tmp_path / "copy" / "lightcurves")
    alone = spxdask.open_run(tmp_path / "copy")
    assert set(alone) == {"a", "b/c"}
    assert len(alone["b/c"]) == 20
    assert alone["a"].ra is None
    assert len(alone.sources) == 2
    assert "2 light curves" in repr(alone) or "light curves" in repr(alone)
    with pytest.raises(RunFolderError, match="positions of sources are not known"):
        alone.light_curve(*CENTER)
    with pytest.raises(RunFolderError):
        _ = alone.frames


def test_channels_are_those_of_the_runs_own_products(tmp_path):
    make_products(tmp_path / "products", families=["spectral_channels"], size=8)
    products = tmp_path / "products" / "qr2" / "spectral_channels"
    (products / "cal-sch-v1-2026-106").rename(products / "cal-sch-v2-2027-001")
    [file] = (products / "cal-sch-v2-2027-001").iterdir()
    file.rename(file.with_name("spectral_channels_spx_cal-sch-v2-2027-001.fits.gz"))
    make_run(tmp_path / "out", make_curves(["a"]), calibration=str(tmp_path / "products"))
    run = spxdask.open_run(tmp_path / "out")
    spectrum = run["a"].spectrum()
    assert spectrum.table.meta["channels"] == "cal-sch-v2-2027-001"
    # The simulator has the archive's table from another file.
    expected = run["a"].spectrum(channels=PUBLISHED_CHANNELS)
    for name in ("wavelength", "wavelength_min", "wavelength_max", "bandwidth", "flux"):
        np.testing.assert_allclose(spectrum[name].value, expected[name].value, rtol=1e-9)


@pytest.fixture(scope="module")
def s3():
    with serving():
        yield


def test_a_run_in_an_object_store_is_opened(s3, tmp_path, format):
    url = f"s3://{BUCKET}/{tmp_path.name}"
    make_run(url, make_curves(AWKWARD_IDS), format=format, failed={1: "damaged"})
    run = spxdask.open_run(url)
    assert set(run) == set(run.sources["id"]) == set(AWKWARD_IDS)
    assert len(run["../../etc/passwd"]) == 20
    assert run.light_curve(*CENTER).id == AWKWARD_IDS[0]
    assert len(run.frames) == 6
    assert len(run.missing_sources) == 0
    # Not on the cluster that another test's client made the default: its workers have neither
    # the keys of this store nor its address.
    with dask.config.set(scheduler="synchronous"):
        assert len(run.to_dask()) == 20 * len(AWKWARD_IDS)
    with pytest.raises(RunFolderError, match="is not the output folder of a run"):
        spxdask.open_run(f"{url}/nowhere")


def test_representations_say_what_the_run_is(tmp_path):
    make_run(tmp_path, make_curves(["a", "<b>"]), failed={0: "damaged"})
    run = spxdask.open_run(tmp_path)
    assert repr(run) == (
        f"<Run {tmp_path}: 6 frames, 1 failed, 2 sources, 2 light curves, 40 rows>"
    )
    page = run._repr_html_()
    for text in ("circle of 1 deg", "D1", "failed", "2 light curves", "40 rows", "qr3"):
        assert text in page
    assert "&lt;b&gt;" in run["<b>"]._repr_html_()
    assert repr(run["a"]).startswith("<LightCurve 'a': 20 rows, 20 good, D1")


def test_dask_reads_the_columns_that_are_asked_for(tmp_path, format):
    curves = make_curves(AWKWARD_IDS)
    make_run(tmp_path, curves, format=format)
    frame = spxdask.open_run(tmp_path).to_dask()
    assert list(frame.columns) == ["target_id", *WITH_PSF.light_curve]
    means = frame.groupby("target_id")["psf_flux"].mean().compute(scheduler="synchronous")
    for target_id, rows in curves.items():
        assert means[target_id] == pytest.approx(rows["psf_flux"].to_numpy().mean())


EXAMPLES = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def list_examples() -> list[str]:
    pages = (
        Path(__file__).parents[2] / "docs" / "results.md",
        Path(__file__).parents[2] / "README.md",
    )
    found = [code for page in pages for code in EXAMPLES.findall(page.read_text())]
    return [code for code in found if "open_run" in code]


@pytest.mark.parametrize("code", list_examples())
def test_examples_of_the_documentation_run(tmp_path, monkeypatch, code):
    ids = ["39633458707826492", "arm 3"]
    make_run(tmp_path / "batch_output", make_curves(ids, 300))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
