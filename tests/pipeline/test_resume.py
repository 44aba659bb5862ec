"""Runs that continue where an earlier one, or another process, stopped."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from outputs import output_of, read_files

from spxdask import BatchPipeline
from spxdask.errors import ConfigError
from spxdask.simulate.archive import Fault


def test_second_run_repeats_no_work(finished, client, archive, tmp_path):
    output = shutil.copytree(output_of(finished).path, tmp_path / "out")
    tables = {path: path.stat().st_mtime_ns for path in (output / "per_image").iterdir()}
    n_requests = len(archive.requests)
    summary = BatchPipeline(replace(finished.config, output_dir=output), client=client).run_all()
    assert summary.stages["download"].reused == 6
    assert summary.stages["extract"].reused == 6
    assert summary.stages["extract"].done == 0
    assert summary.stages["extract"].rows == finished.summary.stages["extract"].rows
    assert {path: path.stat().st_mtime_ns for path in (output / "per_image").iterdir()} == tables
    assert read_files(output / "lightcurves") == read_files(output_of(finished).lightcurves)
    assert [request.path for request in archive.requests[n_requests:]] == ["/TAP/sync"]


@pytest.fixture
def no_cluster(monkeypatch):
    """Fail a test that starts a cluster."""

    def fail(*_, **__):
        pytest.fail("a cluster was started")

    monkeypatch.setattr("spxdask.cluster.session.embedded_client", fail)


def test_nothing_left_to_do_needs_no_cluster(finished, no_cluster, tmp_path):
    output = shutil.copytree(output_of(finished).path, tmp_path / "out")
    curves = {path: path.stat().st_mtime_ns for path in (output / "lightcurves").iterdir()}
    summary = BatchPipeline(replace(finished.config, output_dir=output)).run_all()
    aggregated = summary.stages["aggregate"]
    assert (aggregated.done, aggregated.reused) == (0, finished.summary.n_measured)
    assert aggregated.rows == finished.summary.stages["aggregate"].rows
    assert summary.n_measured == finished.summary.n_measured
    assert "already there" in str(summary)
    assert {path: path.stat().st_mtime_ns for path in (output / "lightcurves").iterdir()} == curves


@pytest.mark.parametrize("change", ["removed", "cut short", "record damaged", "other options"])
def test_light_curves_that_are_not_as_they_were_are_made_again(finished, client, tmp_path, change):
    output = shutil.copytree(output_of(finished).path, tmp_path / "out")
    config = replace(finished.config, output_dir=output)
    one = min((output / "lightcurves").iterdir())
    if change == "removed":
        one.unlink()
    elif change == "cut short":
        one.write_bytes(one.read_bytes()[:-1])
    elif change == "record damaged":
        (output / "state" / "aggregation.json").write_bytes(b"{")
    else:
        config = replace(config, num_buckets=config.num_buckets + 1)
    report = BatchPipeline(config, client=client).run_aggregate()
    assert (report.done, report.reused) == (finished.summary.n_measured, 0)
    assert read_files(output / "lightcurves") == read_files(output_of(finished).lightcurves)
    again = BatchPipeline(config, client=client).run_aggregate()
    assert (again.done, again.reused) == (0, finished.summary.n_measured)


def test_measuring_again_outdates_the_light_curves(finished, client, tmp_path):
    output = shutil.copytree(output_of(finished).path, tmp_path / "out")
    pipeline = BatchPipeline(replace(finished.config, output_dir=output), client=client)
    pipeline.run_extract(skip_existing=False)
    assert not (output / "state" / "aggregation.json").exists()
    assert pipeline.run_aggregate().done == finished.summary.n_measured


def test_images_that_are_not_kept_are_fetched_only_for_measuring(
    finished, make_config, client, archive
):
    pipeline = BatchPipeline(make_config(keep_images=False), client=client)
    with pytest.raises(ConfigError, match="keep_images is false"):
        pipeline.run_download()
    n_requests = len(archive.requests)
    summary = pipeline.run_all()
    assert not summary.failed
    assert len(archive.requests) - n_requests == 1 + 6
    assert summary.stages["download"].bytes == finished.summary.stages["download"].bytes
    assert read_files(output_of(pipeline).lightcurves) == read_files(
        output_of(finished).lightcurves
    )
    assert list(output_of(pipeline).images.iterdir()) == []
    # A measured frame is fetched again only if its image is to be kept.
    summary = pipeline.run_all()
    assert (summary.stages["download"].done, summary.stages["extract"].reused) == (0, 6)
    kept = BatchPipeline(make_config(), client=client).run_all()
    assert (kept.stages["download"].done, kept.stages["extract"].reused) == (6, 6)
    assert read_files(output_of(pipeline).images) == read_files(output_of(finished).images)
    # Images that an earlier run kept are used, and stay.
    tables = sorted(output_of(pipeline).per_image.iterdir())
    tables[0].unlink()
    n_requests = len(archive.requests)
    summary = BatchPipeline(make_config(keep_images=False), client=client).run_all()
    assert (summary.stages["download"].reused, summary.stages["extract"].done) == (6, 1)
    assert len(archive.requests) - n_requests == 1
    assert len(list(output_of(pipeline).images.iterdir())) == 6


def test_skip_existing_can_be_turned_off(make_config, client):
    pipeline = BatchPipeline(make_config(bands=["D1"]), client=client)
    pipeline.run_all()
    before = read_files(output_of(pipeline).per_image)
    assert pipeline.run_extract(skip_existing=False).done == 1
    assert read_files(output_of(pipeline).per_image) == before


def test_stage_sees_what_another_pipeline_recorded(make_config, client, survey, archive):
    lost = survey.frames[0].exposure
    archive.add_faults(lost.uri, [Fault(status=404)])
    one = BatchPipeline(make_config(), client=client)
    assert set(one.run_all().failed) == {lost.filename}
    other = BatchPipeline(make_config(), client=client)
    assert other.run_all(retry_failed=True).failed == {}
    rows = other.reports["aggregate"].rows
    curves = read_files(output_of(one).lightcurves)
    # The first pipeline had recorded the frame as failed.
    assert one.run_aggregate().rows == rows
    assert read_files(output_of(one).lightcurves) == curves


def test_removed_output_folder_is_made_anew(make_config, client, survey, archive):
    lost = survey.frames[0].exposure
    archive.add_faults(lost.uri, [Fault(status=404)])
    pipeline = BatchPipeline(make_config(), client=client)
    assert len(pipeline.run_all().failed) == 1
    shutil.rmtree(output_of(pipeline).path)
    summary = pipeline.run_all()
    assert summary.failed == {}
    assert summary.stages["aggregate"].rows == summary.stages["extract"].rows
    assert summary.stages["extract"].done == 6


def test_per_image_tables_alone_can_be_aggregated(finished, make_config, client, tmp_path):
    config = make_config(output_dir=tmp_path / "tables")
    folder = tmp_path / "tables" / "per_image"
    folder.mkdir(parents=True)
    for path in output_of(finished).per_image.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    BatchPipeline(config, client=client).run_aggregate()
    # But for the releases, which only the query knows.
    curves = read_files(output_of(finished).lightcurves)
    unknown = {name: re.sub(rb",qr[23]\n", b",\n", text) for name, text in curves.items()}
    assert read_files(tmp_path / "tables" / "lightcurves") == unknown


def test_download_needs_no_catalogue(make_config, client):
    pipeline = BatchPipeline(make_config(bands=["D1"]), client=client)
    pipeline.run_query()
    Path(pipeline.config.catalog_path).unlink()
    assert BatchPipeline(pipeline.config, client=client).run_download().done == 1
