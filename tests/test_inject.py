"""Injection and recovery in the folder of a run."""

from __future__ import annotations

import hashlib
import shutil

import numpy as np
import pandas as pd
import pytest
import simulated
from PIL import Image

from spxdask import BatchConfig
from spxdask.archive.observation import Observation
from spxdask.cli import main
from spxdask.errors import ConfigError, InputError, RunFolderError
from spxdask.inject import run_injection, summarize_injections
from spxdask.run.folder import RunFolder
from spxdask.run.query_summary import Field
from spxdask.science.footprint import Circle

pytestmark = pytest.mark.slow


def as_observation(frame: simulated.SimulatedFrame) -> Observation:
    archived = frame.archived
    return Observation(
        obs_id=archived.obs_id,
        band=f"D{archived.detector}",
        mjd=archived.mjd_begin,
        wavelength_um=2.0,
        uri=archived.uri,
        download_url=f"https://127.0.0.1/{archived.uri}",
        size_bytes=frame.path.stat().st_size,
    )


def make_folder(path, survey, **options) -> RunFolder:
    """Make a folder as a query and a download leave it."""
    path.mkdir()
    config = BatchConfig(
        catalog_path=str(survey.write_catalogue(path / "sources.csv")),
        center_ra=simulated.CENTER[0],
        center_dec=simulated.CENTER[1],
        radius=0.05,
        output_dir=str(path / "out"),
        **({"calibration": "frame"} | options),
    )
    folder = RunFolder(config.output_dir)
    observations = [as_observation(frame) for frame in survey.frames]
    with folder.locked():
        circle = Circle(*simulated.CENTER, 0.05)
        field = Field(mode="circle", circles=[circle], n_sources=len(survey.ids))
        empty = [False] * len(observations)
        folder.save_query(observations, config, field, "0", empty)
        folder.save_config(config)
        for frame in survey.frames:
            folder.images.put(frame.path.name, frame.path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    exposures = [simulated.exposure(0, 3), simulated.exposure(1, 4), simulated.exposure(2, 3)]
    return simulated.make_survey(tmp_path_factory.mktemp("frames"), exposures)


@pytest.fixture(scope="module")
def folder(survey, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("run") / "a", survey)


@pytest.fixture
def copied(folder, tmp_path) -> str:
    """A copy of the folder, in which other injections may be made."""
    return shutil.copytree(folder.path, str(tmp_path / "copy"))


@pytest.fixture(scope="module")
def report(folder):
    return run_injection(folder.path, per_frame=150, magnitudes=(13.0, 19.0))


def hash_files(folder: RunFolder) -> dict[str, str]:
    files = [p for p in folder.root.local_path.rglob("*") if p.is_file()]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_fluxes_are_unbiased_and_errors_are_right(report):
    assert report.n_frames == 3
    found = summarize_injections(report.rows, pd.Series("all", report.rows.index)).loc["all"]
    assert found["n"] == len(report.rows) > 200
    for name in ("psf", "total"):
        assert abs(found[f"bias_{name}"]) < 0.01
        assert abs(found[f"pull_{name}"]) < 0.3
        assert 0.8 < found[f"scatter_{name}"] < 1.25
    bright = report.rows[report.rows["magnitude"] < 17]
    assert bright["is_detected"].mean() > 0.9
    assert report.rows["magnitude"].between(13, 19).all()


def test_table_figure_and_text_are_there(folder, report):
    path = folder.root.local_path
    table = pd.read_csv(path / "injection.csv")
    assert len(table) == len(report.rows)
    # Older versions of pandas do not read the last bit of a double.
    np.testing.assert_allclose(table["injected_flux"], report.rows["injected_flux"], rtol=1e-15)
    assert set(table["band"]) == {"D3", "D4"}
    with Image.open(path / "injection.png") as image:
        assert min(image.size) > 300
    for text in ("D3", "D4", "13.0 - 14.0", "injection.csv", "injection.png"):
        assert text in str(report)


def test_the_same_again_changes_no_other_file(folder, report):
    before = hash_files(folder)
    again = run_injection(folder.path, per_frame=150, magnitudes=(13.0, 19.0))
    assert hash_files(folder) == before
    pd.testing.assert_frame_equal(again.rows, report.rows)


def test_frames_are_spread_over_bands_and_independent_of_one_another(copied, report):
    rows = run_injection(copied, frames=2, per_frame=150, magnitudes=(13.0, 19.0)).rows
    assert sorted(rows.groupby("filename")["band"].first()) == ["D3", "D4"]
    for name, of_frame in rows.groupby("filename"):
        same = report.rows[report.rows["filename"] == name]
        np.testing.assert_array_equal(of_frame["psf_flux"], same["psf_flux"])


def test_a_bad_frame_costs_itself_only(survey, tmp_path):
    folder = make_folder(tmp_path / "a", survey)
    name = survey.frames[0].path.name
    folder.images.put(name, bytes(survey.frames[0].path.stat().st_size))
    report = run_injection(folder.path, per_frame=20)
    assert list(report.failed) == [name]
    assert report.n_frames == 2
    assert name in str(report)


def test_a_run_without_psf_fluxes_is_compared_in_total_flux(survey, tmp_path):
    folder = make_folder(tmp_path / "a", survey, photometry={"psf": "none"})
    rows = run_injection(folder.path, frames=1, per_frame=20, magnitudes=(13, 14)).rows
    assert abs((rows["total_flux"] / rows["injected_flux"]).median() - 1) < 0.02


def test_a_catalogue_of_the_same_name_is_not_overwritten(folder):
    for name in ("injection.csv", "injection.png"):
        with pytest.raises(RunFolderError):
            folder.refuse_within(folder.root.path_to(name))


def test_a_run_at_work_is_not_disturbed(survey, tmp_path):
    folder = make_folder(tmp_path / "a", survey)
    with folder.locked(), pytest.raises(RunFolderError):
        run_injection(folder.path)
    assert not folder.root.exists("injection.csv")


def test_without_a_source_on_any_frame_it_is_one_sentence(survey, tmp_path):
    folder = make_folder(tmp_path / "a", survey)
    simulated.write_catalogue(tmp_path / "a" / "sources.csv", ["far"], [10.0], [-30.0])
    with pytest.raises(InputError, match="no source of the catalogue on the frame"):
        run_injection(folder.path)
    assert not folder.root.exists("injection.csv")


def test_groups_of_two_keys(report):
    found = summarize_injections(report.rows, ["band", report.rows["magnitude"].round()])
    assert found["n"].sum() == len(report.rows)
    assert found.loc[("D3", 14.0), "completeness"] > 0.8


def test_without_frames_it_is_one_sentence(survey, tmp_path):
    folder = make_folder(tmp_path / "a", survey)
    folder.images.delete_many([frame.path.name for frame in survey.frames])
    with pytest.raises(RunFolderError, match="none of the frames of the last query"):
        run_injection(folder.path)


@pytest.mark.parametrize(
    "options",
    [
        {"frames": 0},
        {"per_frame": 1.5},
        {"seed": -1},
        {"min_snr": 0},
        {"magnitudes": (20, 13)},
        {"magnitudes": (13, float("nan"))},
        {"magnitudes": "ab"},
    ],
)
def test_wrong_arguments_are_named(folder, options):
    with pytest.raises(ConfigError) as error:
        run_injection(folder.path, **options)
    assert error.value.option == next(iter(options))


def test_command_line(copied, capsys, tmp_path):
    arguments = ["inject", "--output", copied, "--frames", "1", "--per-frame", "10"]
    assert main([*arguments, "--magnitudes", "14", "18", "--seed", "3"]) == 0
    assert "10 artificial sources on 1 frame" in capsys.readouterr().out
    assert main(["inject", "--output", str(tmp_path / "none")]) == 2
    assert "is not the output folder of a run" in capsys.readouterr().err
    assert main([*arguments, "--magnitudes", "faint", "18"]) == 2
    assert capsys.readouterr().err.startswith("spxdask: magnitudes must be two numbers")
