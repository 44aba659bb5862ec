"""What a run leaves for its user: summaries, bags, task names, and files that are not its own."""

from __future__ import annotations

from pathlib import Path

import dask.bag
import dask.dataframe
import pytest
import yaml
from outputs import output_of, read_files

from spxdask import BatchPipeline, load_query_summary
from spxdask.archive.observation import Observation
from spxdask.errors import RunFolderError


def test_query_summary(finished):
    summary = load_query_summary(finished.config.output_dir)
    assert summary == load_query_summary(output_of(finished).path / "query_summary.yaml")
    assert summary["region"] == {
        "mode": "circle",
        "center_ra": 270.0,
        "center_dec": 66.56,
        "radius_deg": 0.05,
        "coverage_mode": "any",
    }
    assert summary["filters"]["bands"] is None
    assert summary["n_observations"] == 6
    assert summary["band_counts"] == {"D1": 1, "D3": 3, "D4": 1, "D6": 1}
    assert summary["time_span_days"] == pytest.approx(4.0)
    one = summary["observations"][0]
    assert list(one) == ["obs_id", "band", "mjd", "wavelength_um", "download_url"]
    assert one["mjd"] == round(one["mjd"], 6)
    assert {o["wavelength_um"] for o in summary["observations"] if o["band"] == "D3"} == {2.02}
    assert one["download_url"].startswith(finished.config.archive_url + "/ibe/data/spherex/")
    with pytest.raises(RunFolderError, match="no readable query summary"):
        load_query_summary("/nowhere/at/all")


def test_observations_are_a_bag(finished):
    assert isinstance(finished.observations, dask.bag.Bag)
    found = finished.observations.compute(scheduler="sync")
    assert all(isinstance(o, Observation) for o in found)
    assert len(found) == 6
    assert finished.images.count().compute(scheduler="sync") == 6


def test_task_names_on_the_dashboard_are_those_of_the_stages(finished, client):
    prefixes = client.run_on_scheduler(lambda dask_scheduler: set(dask_scheduler.task_prefixes))
    assert {"query", "download-extract", "write-lightcurves"} <= prefixes
    assert any(prefix.startswith("shuffle") for prefix in prefixes)
    tasks = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
    assert tasks == 0


def test_saved_configuration_is_that_of_the_run(finished):
    assert finished.folder.saved_config() == finished.config
    assert yaml.safe_load((output_of(finished).state / "config.yaml").read_text())["radius"] == 0.05


def test_passwords_are_written_to_the_configuration_only(make_config, client, archive):
    url = archive.archive_url.replace("//", "//me:secret@")
    pipeline = BatchPipeline(make_config(bands=["D1"], archive_url=url), client=client)
    assert pipeline.run_all().failed == {}
    files = [p for p in output_of(pipeline).path.rglob("*") if p.is_file()]
    assert [p for p in files if b"secret" in p.read_bytes()] == [
        (output_of(pipeline).state / "config.yaml")
    ]


def test_files_of_the_user_are_not_removed(make_config, client):
    pipeline = BatchPipeline(make_config(bands=["D1"]), client=client)
    pipeline.run_all()
    (output_of(pipeline).lightcurves / "notes.txt").write_text("mine")
    (output_of(pipeline).lightcurves / "star.csv").write_text("a,b\n1,2\n")
    curves = read_files(output_of(pipeline).lightcurves)
    pipeline.run_aggregate()
    assert read_files(output_of(pipeline).lightcurves) == curves
    # A query that finds no frame is more often a mistake than a wish to remove light curves.
    BatchPipeline(make_config(center_dec=-60.0), client=client).run_all()
    assert read_files(output_of(pipeline).lightcurves) == curves


@pytest.mark.parametrize(
    "path_inside",
    ["lightcurves/s1.csv", "query_summary.yaml", "state/x/../a.csv", "images/link.csv"],
)
def test_catalogue_inside_the_output_folders_is_refused(make_config, client, path_inside, archive):
    config = make_config()
    path = Path(config.output_dir) / path_inside
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "x").mkdir(exist_ok=True)
    text = Path(config.catalog_path).read_bytes()
    path.write_bytes(text)
    n_requests = len(archive.requests)
    with pytest.raises(RunFolderError, match="lies where the run writes"):
        BatchPipeline(make_config(catalog_path=path), client=client).run_all()
    assert path.read_bytes() == text
    assert len(archive.requests) == n_requests
