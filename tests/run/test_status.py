"""`spxdask status` says of a run what the run says of itself, and touches nothing."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import shutil

import pytest
import simulated

from spxdask.cli import main
from spxdask.config import BatchConfig, PhotometryConfig
from spxdask.errors import RunFolderError
from spxdask.pipeline import BatchPipeline
from spxdask.run.status import status, watch
from spxdask.simulate.archive import Fault, SimulatedArchive
from spxdask.stages.extract import table_name


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    sky = simulated.field_sky(20)
    exposures = [simulated.exposure(number) for number in range(4)]
    return sky, simulated.simulate(tmp_path_factory.mktemp("archive"), exposures, sky)


@pytest.fixture
def archive(frames):
    with SimulatedArchive([frame.archived for frame in frames[1]]) as archive:
        yield archive


@pytest.fixture
def pipeline(frames, archive, client, tmp_path):
    sky = frames[0]
    ids = [f"s{i}" for i in range(len(sky))]
    config = BatchConfig(
        catalog_path=simulated.write_catalogue(tmp_path / "sources.csv", ids, sky.ra, sky.dec),
        center_ra=simulated.CENTER[0],
        center_dec=simulated.CENTER[1],
        radius=0.05,
        output_dir=tmp_path / "out",
        num_buckets=2,
        max_retries=0,
        tap_url=archive.tap_url,
        archive_url=archive.archive_url,
    )
    return BatchPipeline(config, client=client)


def listing(folder):
    paths = [folder, *folder.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def look(pipeline):
    """Return the status, having seen that nothing changed and that it can be printed."""
    before = listing(pipeline.folder.root.local_path)
    found = status(pipeline.folder.path)
    assert str(found)
    assert listing(pipeline.folder.root.local_path) == before
    return found


def assert_agrees(found, summary):
    stages = summary.stages
    assert found.output == summary.output
    assert (found.n_frames, found.frame_bytes) == (stages["query"].total, stages["query"].bytes)
    assert found.fetched == stages["download"].done + stages["download"].reused
    assert found.measured == stages["extract"].done + stages["extract"].reused
    assert (found.rows, found.lightcurves) == (stages["extract"].rows, summary.n_measured)
    assert found.skipped == stages["extract"].skipped
    assert sum(found.warnings.values()) == sum(map(len, stages["extract"].warnings.values()))
    assert found.failed == summary.failed
    assert found.pending == 0
    assert found.at_work is None


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_of_no_run(tmp_path, capsys, there):
    folder = tmp_path / "none"
    if there:
        folder.mkdir()
    before = listing(tmp_path)
    with pytest.raises(RunFolderError, match="not the output folder of a run"):
        status(folder)
    assert main(["status", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert str(folder) in err
    assert listing(tmp_path) == before


def test_after_a_query_nothing_is_there_yet(pipeline):
    pipeline.run_query()
    found = look(pipeline)
    assert (found.n_frames, found.pending) == (4, 4)
    assert found.frame_bytes == pipeline.reports["query"].bytes > 0
    assert (found.fetched, found.measured, found.rows, found.lightcurves) == (0, 0, 0, 0)
    assert (found.failed, found.last, found.at_work) == ({}, None, None)


def test_it_agrees_with_the_summary(pipeline, archive, frames, capsys, monkeypatch):
    folder = pipeline.folder
    lost, unread, unmeasured, _ = [frame.exposure for frame in frames[1]]
    archive.add_faults(lost.uri, [Fault(status=404)])
    summary = pipeline.run_all()
    first = look(pipeline)
    assert_agrees(first, summary)
    assert list(first.failed) == [lost.filename]

    # Half way: a frame gone with its table, and half a table.
    (folder.images.local_path / unread.filename).unlink()
    (folder.per_image.local_path / table_name(unread.filename)).unlink()
    table = folder.per_image.local_path / table_name(unmeasured.filename)
    table.write_bytes(table.read_bytes()[:-100])
    found = look(pipeline)
    assert (found.fetched, found.measured, found.pending) == (2, 1, 2)
    assert found.failed == first.failed
    assert 0 < found.rows < first.rows
    report = pipeline.run_extract()
    found = look(pipeline)
    assert (found.fetched, found.measured, found.pending) == (2, 2, 0)
    assert found.failed == report.failed | {
        lost.filename: first.failed[lost.filename],
        unread.filename: "extract: not downloaded: run download first",
    }

    # What a crash leaves of a line is no line.
    ledger = folder.state.local_path / "ledger.jsonl"
    whole = ledger.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    ledger.write_bytes(whole + last.replace(b'"failed"', b'"done"')[:-2])
    assert look(pipeline) == found

    # Also to another process, or to a thread of this one, that asks while it works.
    with folder.locked():
        assert f"process {os.getpid()} on " in look(pipeline).at_work
    assert look(pipeline) == found

    summary = pipeline.run_all()
    assert summary.failed == {}
    assert_agrees(look(pipeline), summary)
    monkeypatch.chdir(folder.root.local_path.parent)
    assert main(["status", "out"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"{look(pipeline)}\n", "")
    for text in ("4 frames", f"{summary.n_measured} light curves", "nobody", str(folder.path)):
        assert text in out


@pytest.mark.parametrize("how", ["csv", "parquet"])
def test_light_curves_are_counted_in_either_format(pipeline, client, how):
    formats = {"per_image_format": how, "lightcurve_format": how}
    pipeline = BatchPipeline(dataclasses.replace(pipeline.config, **formats), client=client)
    summary = pipeline.run_all()
    assert_agrees(look(pipeline), summary)
    # What the user keeps beside them is none, whatever is in it.
    if how == "parquet":
        for name in ("mine.parquet", "bucket.parquet", "mine.csv", ".hidden.parquet"):
            (pipeline.folder.lightcurves.local_path / name).write_bytes(b"PAR1, or not")
        assert_agrees(look(pipeline), summary)


@pytest.fixture
def not_kept(pipeline, client):
    """A run without images/, in which some sources have no background."""
    crowded = PhotometryConfig(background_method="annulus", min_usable_pixels=58)
    config = dataclasses.replace(pipeline.config, keep_images=False, photometry=crowded)
    pipeline = BatchPipeline(config, client=client)
    pipeline.run_all()
    return pipeline


def test_frames_that_are_not_kept_are_measured_all_the_same(not_kept):
    found, extracted = look(not_kept), not_kept.reports["extract"]
    assert (found.fetched, found.measured, found.pending) == (0, 4, 0)
    assert (found.rows, found.skipped) == (extracted.rows, extracted.skipped)
    assert found.rows > 0 < found.skipped.total()
    assert f"{found.skipped.total()} measurements: " in str(found)


def test_a_measured_frame_that_could_not_be_kept(not_kept, archive, frames, client):
    archive.add_faults(frames[1][0].exposure.uri, [Fault(status=404)])
    config = dataclasses.replace(not_kept.config, keep_images=True)
    summary = BatchPipeline(config, client=client).run_all()
    assert len(summary.failed) == 1
    assert_agrees(look(not_kept), summary)


def test_a_failed_download_is_over_when_the_frame_came_otherwise(pipeline, archive, frames, client):
    lost = frames[1][0]
    archive.add_faults(lost.exposure.uri, [Fault(status=404)])
    summary = pipeline.run_all()
    assert list(look(pipeline).failed) == list(summary.failed) == [lost.exposure.filename]
    shutil.copy(lost.archived.path, pipeline.folder.images.local_path)
    # Not yet: it was not there when it was to be measured.
    assert list(look(pipeline).failed) == [lost.exposure.filename]
    pipeline.run_extract()
    found = look(pipeline)
    assert (found.failed, found.fetched, found.measured, found.pending) == ({}, 4, 4, 0)


def test_a_failed_download_is_over_when_the_frame_is_not_wanted_any_more(
    not_kept, archive, frames, client
):
    archive.add_faults(frames[1][0].exposure.uri, [Fault(status=404)])
    kept = BatchPipeline(dataclasses.replace(not_kept.config, keep_images=True), client=client)
    summary = kept.run_all()
    assert list(look(kept).failed) == list(summary.failed) == [frames[1][0].exposure.filename]
    again = BatchPipeline(not_kept.config, client=client)
    assert again.run_all().failed == look(again).failed == {}


def test_watching_a_run_that_is_over(pipeline, capsys):
    pipeline.run_all()
    [found] = watch(pipeline.folder.path)
    assert (found.at_work, found.pending) == (None, 0)
    assert main(["status", str(pipeline.folder.path), "--watch"]) == 0
    assert capsys.readouterr().out.count("at work     nobody") == 1


def test_watching_a_run_that_may_be_about_to_start(pipeline):
    pipeline.run_query()
    looks = watch(pipeline.folder.path, every=0.01)
    assert [next(looks).pending for _ in range(3)] == [4] * 3
    with pipeline.folder.locked():
        assert next(looks).at_work is not None
    assert next(looks).at_work is None
    assert list(looks) == []


def test_a_file_system_without_locks(pipeline, monkeypatch):
    pipeline.run_query()

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert look(pipeline).at_work is None
