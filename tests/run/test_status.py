"""`spxdask status` reports what the run itself reports, and changes no file."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import shutil

import pytest
import simulated
from outputs import output_of

from spxdask.cli import main
from spxdask.errors import RunFolderError
from spxdask.pipeline import BatchPipeline
from spxdask.progress import Silent
from spxdask.run.plan import table_name
from spxdask.run.status import read_status, watch_status
from spxdask.science.options import PhotometryConfig
from spxdask.simulate.archive import Fault, SimulatedArchive


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    exposures = [simulated.exposure(number) for number in range(4)]
    return simulated.make_survey(tmp_path_factory.mktemp("survey"), exposures, n_sources=20)


@pytest.fixture
def archive(survey):
    """An archive of the test's own, for which it may plan faults."""
    with SimulatedArchive(survey.archived) as archive:
        yield archive


@pytest.fixture
def pipeline(make_config, client):
    return BatchPipeline(make_config(num_buckets=2), client=client)


def list_files(folder):
    paths = [folder, *folder.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def checked_status(pipeline):
    """Return the status, and check that it can be printed and that asking changed no file."""
    before = list_files(output_of(pipeline).path)
    found = read_status(output_of(pipeline).path)
    assert str(found)
    assert list_files(output_of(pipeline).path) == before
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
    assert found.running is None


@pytest.mark.parametrize("exists", [True, False])
def test_folder_without_a_run(tmp_path, capsys, exists):
    folder = tmp_path / "none"
    if exists:
        folder.mkdir()
    before = list_files(tmp_path)
    with pytest.raises(RunFolderError, match="not the output folder of a run"):
        read_status(folder)
    assert main(["status", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert str(folder) in err
    assert list_files(tmp_path) == before


def test_after_a_query_all_frames_are_pending(pipeline):
    pipeline.run_query()
    found = checked_status(pipeline)
    assert (found.n_frames, found.pending) == (4, 4)
    assert found.frame_bytes == pipeline.reports["query"].bytes > 0
    assert (found.fetched, found.measured, found.rows, found.lightcurves) == (0, 0, 0, 0)
    assert (found.failed, found.last, found.running) == ({}, None, None)


def test_status_agrees_with_the_summary(pipeline, archive, survey, capsys, monkeypatch):
    folder = output_of(pipeline)
    lost, unread, unmeasured, _ = [frame.exposure for frame in survey.frames]
    archive.add_faults(lost.uri, [Fault(status=404)])
    summary = pipeline.run_all()
    first = checked_status(pipeline)
    assert_agrees(first, summary)
    assert list(first.failed) == [lost.filename]

    # One frame is removed with its table, and the end of another table is cut off.
    (folder.images / unread.filename).unlink()
    (folder.per_image / table_name(unread.filename, "csv")).unlink()
    table = folder.per_image / table_name(unmeasured.filename, "csv")
    table.write_bytes(table.read_bytes()[:-100])
    found = checked_status(pipeline)
    assert (found.fetched, found.measured, found.pending) == (2, 1, 2)
    assert found.failed == first.failed
    assert 0 < found.rows < first.rows
    report = pipeline.run_extract()
    found = checked_status(pipeline)
    assert (found.fetched, found.measured, found.pending) == (2, 2, 0)
    assert found.failed == report.failed | {
        lost.filename: first.failed[lost.filename],
        unread.filename: "extract: not downloaded: run download first",
    }

    # A line that a crash cut off is ignored.
    ledger = folder.state / "ledger.jsonl"
    whole = ledger.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    ledger.write_bytes(whole + last.replace(b'"failed"', b'"done"')[:-2])
    assert checked_status(pipeline) == found

    # While a run is at work, other processes and threads can ask who it is.
    with pipeline.folder.locked():
        assert f"process {os.getpid()} on " in checked_status(pipeline).running
    assert checked_status(pipeline) == found

    summary = pipeline.run_all()
    assert summary.failed == {}
    assert_agrees(checked_status(pipeline), summary)
    monkeypatch.chdir(folder.path.parent)
    assert main(["status", "out"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"{checked_status(pipeline)}\n", "")
    for text in (
        "4 frames",
        f"{summary.n_measured} light curves",
        "running     no",
        str(folder.path),
    ):
        assert text in out


@pytest.mark.parametrize("how", ["csv", "parquet"])
def test_light_curves_are_counted_in_either_format(pipeline, client, how):
    formats = {"per_image_format": how, "lightcurve_format": how}
    pipeline = BatchPipeline(dataclasses.replace(pipeline.config, **formats), client=client)
    summary = pipeline.run_all()
    assert_agrees(checked_status(pipeline), summary)
    # Files of the user beside them are not counted.
    if how == "parquet":
        for name in ("mine.parquet", "bucket.parquet", "mine.csv", ".hidden.parquet"):
            (output_of(pipeline).lightcurves / name).write_bytes(b"PAR1, or not")
        assert_agrees(checked_status(pipeline), summary)


@pytest.fixture
def not_kept(pipeline, client):
    """A run without images/, in which some sources have no background."""
    crowded = PhotometryConfig(background_method="annulus", min_usable_pixels=58)
    config = dataclasses.replace(pipeline.config, keep_images=False, photometry=crowded)
    pipeline = BatchPipeline(config, client=client)
    pipeline.run_all()
    return pipeline


def test_frames_that_are_not_kept_count_as_measured(not_kept):
    found, extracted = checked_status(not_kept), not_kept.reports["extract"]
    assert (found.fetched, found.measured, found.pending) == (0, 4, 0)
    assert (found.rows, found.skipped) == (extracted.rows, extracted.skipped)
    assert found.rows > 0 < found.skipped.total()
    assert f"{found.skipped.total()} measurements: " in str(found)


def test_measured_frame_whose_image_could_not_be_fetched(not_kept, archive, survey, client):
    archive.add_faults(survey.frames[0].exposure.uri, [Fault(status=404)])
    config = dataclasses.replace(not_kept.config, keep_images=True)
    summary = BatchPipeline(config, client=client).run_all()
    assert len(summary.failed) == 1
    assert_agrees(checked_status(not_kept), summary)


def test_failed_download_is_forgotten_when_the_user_adds_the_frame(
    pipeline, archive, survey, client
):
    lost = survey.frames[0]
    archive.add_faults(lost.exposure.uri, [Fault(status=404)])
    summary = pipeline.run_all()
    assert list(checked_status(pipeline).failed) == list(summary.failed) == [lost.exposure.filename]
    shutil.copy(lost.archived.path, output_of(pipeline).images)
    # It counts as failed until it is measured.
    assert list(checked_status(pipeline).failed) == [lost.exposure.filename]
    pipeline.run_extract()
    found = checked_status(pipeline)
    assert (found.failed, found.fetched, found.measured, found.pending) == ({}, 4, 4, 0)


def test_failed_download_is_forgotten_when_images_are_not_kept(not_kept, archive, survey, client):
    archive.add_faults(survey.frames[0].exposure.uri, [Fault(status=404)])
    kept = BatchPipeline(dataclasses.replace(not_kept.config, keep_images=True), client=client)
    summary = kept.run_all()
    assert (
        list(checked_status(kept).failed)
        == list(summary.failed)
        == [survey.frames[0].exposure.filename]
    )
    again = BatchPipeline(not_kept.config, client=client)
    assert again.run_all().failed == checked_status(again).failed == {}


def test_a_query_with_other_options_makes_all_frames_pending(pipeline, client):
    pipeline.run_all()
    other = dataclasses.replace(pipeline.config, photometry=PhotometryConfig(fwhm_multiplier=3.0))
    again = BatchPipeline(other, client=client)
    again.run_query()
    found = checked_status(again)
    assert (found.fetched, found.measured, found.pending) == (4, 0, 4)
    with pytest.raises(RunFolderError, match=r"fwhm_multiplier was 2\.5, is 3\.0"):
        again.run_aggregate()


def test_pending_never_grows_while_all_is_measured_again(pipeline, client):
    pipeline.run_all()
    pending = []

    class Recorder(Silent):
        def advance(self, *, failed=False):
            pending.append(read_status(output_of(pipeline).path).pending)

    other = dataclasses.replace(pipeline.config, photometry=PhotometryConfig(fwhm_multiplier=3.0))
    BatchPipeline(other, client=client, progress=Recorder()).run_extract()
    assert pending == [3, 2, 1, 0]


def test_watching_a_finished_run(pipeline, capsys):
    pipeline.run_all()
    [found] = watch_status(output_of(pipeline).path)
    assert (found.running, found.pending) == (None, 0)
    assert main(["status", str(output_of(pipeline).path), "--watch"]) == 0
    assert capsys.readouterr().out.count("running     no") == 1


def test_watching_a_run_that_may_be_starting(pipeline):
    pipeline.run_query()
    statuses = watch_status(output_of(pipeline).path, interval_s=0.01)
    assert [next(statuses).pending for _ in range(3)] == [4] * 3
    with pipeline.folder.locked():
        assert next(statuses).running is not None
    assert next(statuses).running is None
    assert list(statuses) == []


def test_file_system_without_locks(pipeline, monkeypatch):
    pipeline.run_query()

    def raise_no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", raise_no_locks)
    assert checked_status(pipeline).running is None
