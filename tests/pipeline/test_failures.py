"""Frames, transfers and workers that fail, and runs that try them again."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import pytest
from distributed import Future, KilledWorker
from outputs import output_of, read_files

from spxdask import BatchPipeline, PhotometryConfig
from spxdask.archive.retry import RetryPolicy
from spxdask.errors import ClusterError, FrameError, RunFolderError
from spxdask.run.folder import RunFolder
from spxdask.simulate.archive import Fault, SimulatedArchive


def test_bad_frames_do_not_stop_the_run(make_config, client, survey):
    lost, broken = survey.frames[0].exposure, survey.frames[2].exposure
    with SimulatedArchive(survey.archived, faults={lost.uri: [Fault(status=404)]}) as archive:
        config = make_config(tap_url=archive.tap_url, archive_url=archive.archive_url)
        pipeline = BatchPipeline(config, client=client)
        pipeline.run_query()
        pipeline.run_download()
        path = output_of(pipeline).images / broken.filename
        data = bytearray(path.read_bytes())
        start = data.index(b"CTYPE1  = 'RA---TAN")
        data[start : start + 25] = b"CTYPE1  = 'GLON-TAN-SIP' "
        path.write_bytes(data)
        with pipeline:
            extracted = pipeline.run_extract()
        assert extracted.done == 4
        assert set(extracted.failed) == {lost.filename, broken.filename}
        assert "404" in extracted.failed[lost.filename]
        assert "celestial WCS" in extracted.failed[broken.filename]
        aggregated = pipeline.run_aggregate()
        assert aggregated.rows == extracted.rows > 0

        # The next run fetches both: the frame that the archive lacked, and the broken one.
        assert not path.exists()
        assert path.with_name(f"{path.name}.unreadable").exists()
        summary = BatchPipeline(config, client=client).run_all()
    assert summary.failed == {}
    assert summary.stages["download"].done == 2
    assert summary.stages["extract"].done == 2


def test_aggregate_counts_frames_without_a_table(make_config, client, survey, archive):
    lost = survey.frames[0].exposure
    archive.add_faults(lost.uri, [Fault(status=404)])
    pipeline = BatchPipeline(make_config(), client=client)
    summary = pipeline.run_all()
    assert summary.stages["aggregate"].left_out == 1


def test_light_curves_stay_when_all_frames_fail(make_config, client, archive, survey):
    pipeline = BatchPipeline(make_config(keep_images=False), client=client)
    pipeline.run_all()
    curves = read_files(output_of(pipeline).lightcurves)
    for frame in survey.frames[:6]:
        archive.add_faults(frame.exposure.uri, [Fault(status=404)])
    photometry = PhotometryConfig(fwhm_multiplier=3.0)
    config = make_config(keep_images=False, photometry=photometry)
    summary = BatchPipeline(config, client=client).run_all()
    assert len(summary.failed) == 6
    assert "aggregate" not in summary.stages
    assert read_files(output_of(pipeline).lightcurves) == curves


def test_query_whose_workers_die_is_a_cluster_error(make_config, client, monkeypatch):
    def raise_killed_worker(*_, **__):
        raise KilledWorker("query", None, 3)

    monkeypatch.setattr(Future, "result", raise_killed_worker)
    with pytest.raises(ClusterError, match="every worker that began the task query died"):
        BatchPipeline(make_config(), client=client).run_query()


FAULTS = [
    *(Fault(status=status) for status in (408, 429, 500, 502, 503, 504)),
    Fault(status=503, retry_after_s=0),
    *(Fault(truncate=n) for n in (0, 1, 100_000, 2_000_000)),
    *(Fault(short=n) for n in (0, 2880, 1_000_000)),
    *(Fault(stall=n) for n in (0, 500_000)),
    Fault(html=True),
    Fault(garbage=True),
]


@pytest.mark.parametrize("keep_images", [True, False])
def test_many_faults_of_the_archive_change_no_result(
    finished, make_config, client, survey, monkeypatch, keep_images
):
    """Every frame meets several faults, and the run gives the bytes of one without faults."""

    rng = random.Random(20261122)
    frames = survey.archived
    faults = {frame.uri: rng.choices(FAULTS, k=5) for frame in frames}
    quick = functools.partial(RetryPolicy, first_delay_s=0.001)
    monkeypatch.setattr("spxdask.stages.frames.RetryPolicy", quick)
    with SimulatedArchive(frames, faults=faults) as archive:
        config = make_config(
            max_retries=5,
            stall_timeout=3.0,
            keep_images=keep_images,
            tap_url=archive.tap_url,
            archive_url=archive.archive_url,
        )
        summary = BatchPipeline(config, client=client).run_all()
        assert len(archive.requests) == 1 + 6 * (5 + 1)
    assert not summary.failed
    for folder in ("per_image", "lightcurves"):
        made, expected = (Path(c.output_dir) / folder for c in (config, finished.config))
        assert read_files(made) == read_files(expected), folder


@pytest.mark.parametrize("keep", [True, False])
def test_retry_failed_works_on_failed_frames_only(
    finished, make_config, client, survey, fail_in_workers, tmp_path, keep
):
    lost, unlucky = survey.frames[0].exposure, survey.frames[2].exposure
    with SimulatedArchive(survey.archived, faults={lost.uri: [Fault(status=404)]}) as archive:
        config = make_config(
            tap_url=archive.tap_url, archive_url=archive.archive_url, keep_images=keep
        )
        fail_in_workers(
            "spxdask.stages.extract",
            "measure_catalogue",
            lambda call, frame, *_: frame.filename == unlucky.filename,
            FrameError("bad luck"),
        )
        summary = BatchPipeline(config, client=client).run_all()
        assert summary.failed.keys() == {lost.filename, unlucky.filename}
        fail_in_workers.stop()
        incomplete = read_files(Path(config.output_dir, "lightcurves"))
        n_requests = len(archive.requests)
        config = RunFolder(config.output_dir).saved_config()
        for wanted in ([lost.uri] if keep else [lost.uri, unlucky.uri]), []:
            summary = BatchPipeline(config, client=client).run_all(retry_failed=True)
            requested = sorted(request.path for request in archive.requests[n_requests:])
            assert requested == [f"/{uri}" for uri in wanted]
            n_requests = len(archive.requests)
            assert list(summary.stages) == ["download", "extract", "aggregate"]
            for stage in ("download", "extract"):
                assert summary.stages[stage].total == (2 if wanted else 0)
            assert summary.stages["download"].done == len(wanted)
            assert summary.stages["extract"].done == (2 if wanted else 0)
            assert summary.failed == {}
            curves = read_files(Path(config.output_dir, "lightcurves"))
            assert curves == read_files(output_of(finished).lightcurves) != incomplete


def test_retry_failed_needs_an_earlier_run(make_config, client):
    with pytest.raises(RunFolderError, match="no query was made in"):
        BatchPipeline(make_config(), client=client).run_all(retry_failed=True)


def test_retry_failed_after_a_query_without_frames(make_config, client):
    pipeline = BatchPipeline(make_config(bands=["D1"]), client=client)
    pipeline.run_all()
    curves = read_files(output_of(pipeline).lightcurves)
    nowhere = BatchPipeline(make_config(center_dec=-60.0), client=client)
    nowhere.run_all()
    nowhere.run_all(retry_failed=True)
    assert read_files(output_of(pipeline).lightcurves) == curves
