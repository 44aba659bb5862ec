"""What a run folder keeps of its calibration products, and the command that lists them."""

from __future__ import annotations

import pytest

from spxdask import BatchConfig
from spxdask.archive.observation import Observation
from spxdask.cli import main
from spxdask.errors import InputError
from spxdask.run.calibration import load_calibration, survey_products
from spxdask.run.folder import OBSERVATIONS_NAME, RunFolder, _query_options
from spxdask.run.observations import save_observations
from spxdask.run.status import read_status
from spxdask.run.summary import StageReport
from spxdask.science.families import EPSF
from spxdask.simulate.archive import Fault, SimulatedArchive, make_mirror
from spxdask.simulate.products import make_products
from spxdask.stages.calibration import prepare_calibration

V1, V2 = "cal-epsf-v1-2026-191", "cal-epsf-v2-2026-191"


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    return make_products(tmp_path_factory.mktemp("products"), detectors=(1, 3), families=[EPSF])


@pytest.fixture
def archive(products, tmp_path, monkeypatch):
    monkeypatch.setenv("SPXDASK_CACHE", str(tmp_path / "cache"))
    with SimulatedArchive([], products=products) as archive:
        monkeypatch.setenv("SPXDASK_ARCHIVE_URL", archive.archive_url)
        yield archive


@pytest.fixture
def make_config(tmp_path):
    def make(**options) -> BatchConfig:
        defaults = {"target": "10.0 20.0", "output_dir": str(tmp_path / "out"), "max_retries": 0}
        return BatchConfig(**(defaults | options))

    return make


def observation(detector: int, release: str = "qr3") -> Observation:
    name = f"level2_2025W51_1A_0001_1D{detector}_spx_l2b-v30-2026-090.fits"
    return Observation(
        obs_id="2025W51_1A_0001_1",
        band=f"D{detector}",
        mjd=61000.0,
        wavelength_um=1.0,
        uri=f"ibe/data/spherex/{release}/level2/{name}",
        download_url="",
        size_bytes=None,
    )


def prepare(config, detectors=(1, 3), *, is_new=True):
    frames = [observation(detector) for detector in detectors]
    folder = RunFolder(config.output_dir)
    folder.state.make()
    return prepare_calibration(
        folder, config, frames, StageReport(stage="query") if is_new else None
    )


def test_products_are_recorded_with_the_run(archive, make_config):
    config = make_config()
    found = prepare(config)
    n_requests = len(archive.requests)
    assert found.tokens == {EPSF: f"{V1} (D3: {V2})"}
    assert prepare(config, is_new=False) == found
    assert len(archive.requests) == n_requests
    state = RunFolder(config.output_dir).state
    assert load_calibration(state, make_config(calibration_pins={EPSF: V1})) is None
    assert load_calibration(state, make_config(calibration="frame")).products == ()


def test_the_status_says_what_a_run_uses(archive, make_config):
    config = make_config(bands=["D3"])
    folder = RunFolder(config.output_dir)
    folder.state.make()
    frames = [observation(3)]
    save_observations(folder.state, OBSERVATIONS_NAME, frames, _query_options(config))
    folder.save_config(config)
    prepare_calibration(folder, config, frames, StageReport(stage="query"))
    text = str(read_status(config.output_dir))
    assert f"calibrated with {V2}" in text
    assert "not calibrated with spectral_wcs: there is no product for D3" in text


def test_products_of_a_query_that_was_killed_are_chosen_again(archive, make_config):
    """The frames of the new query are there, and the products are those of the one before."""
    config = make_config()
    assert {product.band for product in prepare(config, [1]).products} == {"D1"}
    folder = RunFolder(config.output_dir)
    frames = [observation(detector) for detector in (1, 3)]
    save_observations(folder.state, OBSERVATIONS_NAME, frames, _query_options(config))
    found = prepare(config, is_new=False)
    assert {product.band for product in found.products} == {"D1", "D3"}


def test_an_outage_does_not_change_the_products_of_a_run(archive, make_config, caplog):
    config = make_config()
    found = prepare(config)
    archive.stop()
    assert prepare(config).products == found.products
    assert "used again" in caplog.text
    # Nor does the next query, of which the record was written in the outage.
    assert prepare(config).products == found.products
    caplog.clear()
    assert prepare(make_config(output_dir=f"{config.output_dir}2")).products == ()
    assert "epsf: the frames' own values are used" in caplog.text


@pytest.mark.parametrize("as_url", [False, True])
@pytest.mark.parametrize("prefix", ["", "ibe/data/spherex"])
def test_a_tree_of_products(products, tmp_path, make_config, monkeypatch, as_url, prefix):
    monkeypatch.setenv("SPXDASK_CACHE", str(tmp_path / "cache"))
    tree = tmp_path / "a tree"
    make_mirror(tree / prefix, products=products)
    where = tree.as_uri() if as_url else str(tree)
    assert prepare(make_config(calibration=where)).tokens == {EPSF: f"{V1} (D3: {V2})"}
    mirror = make_config(archive_url=tree.as_uri(), output_dir=str(tmp_path / "out2"))
    assert prepare(mirror).tokens == {EPSF: f"{V1} (D3: {V2})"}


def test_a_tree_that_is_not_there(make_config, tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        prepare(make_config(calibration=str(tmp_path / "nowhere")))


def test_the_end_point_is_that_of_the_archive(make_config, archive, tmp_path, monkeypatch):
    config = make_config(
        archive_url="s3://nasa-irsa-spherex", archive_endpoint=archive.url, bands=["D3"]
    )
    statuses = {status.family: status for status in survey_products(config, None, fetch=True)}
    assert statuses[EPSF].newest == V2
    assert statuses[EPSF].is_cached


def test_the_command_lists_and_fetches(archive, make_config, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = ["calibration", "--bands", "D1", "D3"]
    # Other families are not at this archive.
    assert main(arguments) == 1
    before = capsys.readouterr().out
    assert not any(r.path.endswith(".fits") for r in archive.requests)
    assert main([*arguments, "--fetch"]) == 1
    after = capsys.readouterr().out
    lines = [line.split() for line in before.splitlines()]
    assert [EPSF, "D1", "-", V1, "not", "in", "the", "cache"] in lines
    assert [EPSF, "D3", "-", V2, "in", "the", "cache"] in [x.split() for x in after.splitlines()]
    config = make_config()
    prepare(config)
    RunFolder(config.output_dir).save_config(config)
    main([*arguments, "--output", config.output_dir])
    assert [EPSF, "D1", V1, V1, "in", "the", "cache"] in [
        line.split() for line in capsys.readouterr().out.splitlines()
    ]


def test_the_command_says_what_is_wrong(archive, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["calibration", "--output", "nothing"]) == 2
    assert "not the output folder of a run" in capsys.readouterr().err
    assert main(["calibration", "--calibration", "frame"]) == 0
    archive.add_faults("ibe/dir/list/spherex/", [Fault(html=True)])
    assert main(["calibration", "--max-retries", "0"]) == 1
    out = capsys.readouterr().out
    assert out.count("cannot be listed") == 1
    monkeypatch.setenv("SPXDASK_CACHE", "/dev/null/x")
    assert main(["calibration", "--fetch", "--bands", "D3"]) == 2
    assert "SPXDASK_CACHE" in capsys.readouterr().err
