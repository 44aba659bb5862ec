"""Runs over an archive that does not answer for a while."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from outputs import output_of, read_files

from spxdask import BatchPipeline
from spxdask.errors import ArchiveError, ConfigError
from spxdask.run.status import read_status
from spxdask.simulate.archive import Fault, SimulatedArchive

DOWN = [
    Fault(status=502),
    Fault(status=503),
    Fault(html=True),
    Fault(truncate=1000),
    Fault(redirect="http://127.0.0.1:9/"),
]


class Recorder:
    """A progress that keeps what the run waited for."""

    def __init__(self) -> None:
        self.waits = []

    def start(self, stage, total, unit):
        pass

    def advance(self, *, failed=False):
        pass

    def finish(self):
        pass

    def wait(self, reason):
        self.waits.append(reason)


def make_pipeline(config, client, **pauses):
    progress = Recorder()
    pipeline = BatchPipeline(config, client=client, progress=progress)
    pauses = {"first_pause_s": 0.02, "longest_pause_s": 0.02} | pauses
    pipeline._outage_policy = replace(pipeline._outage_policy, **pauses)
    return pipeline, progress


@pytest.fixture
def serve(survey, make_config):
    """Return a function that makes an archive and the configuration of a run over it."""

    def serve(faults, **options):
        archive = SimulatedArchive(survey.archived, faults=faults)
        archive.start()
        urls = {"tap_url": archive.tap_url, "archive_url": archive.archive_url}
        archives.append(archive)
        return archive, make_config(**urls | options)

    archives = []
    yield serve
    for archive in archives:
        archive.stop()


@pytest.mark.parametrize("fault", DOWN, ids=repr)
def test_an_outage_costs_no_frame(finished, serve, client, survey, caplog, fault):
    caplog.set_level(logging.WARNING)
    n_faults = 0

    def go_down():
        nonlocal n_faults
        yield Fault()
        for _ in range(6):
            n_faults += 1
            yield fault

    # All paths share the faults: the query and one frame are served before.
    shared = go_down()
    frames = [frame.archived for frame in survey.frames]
    _, config = serve({frame.uri: shared for frame in frames}, max_download_workers=2)
    pipeline, progress = make_pipeline(config, client)
    summary = pipeline.run_all()
    assert n_faults == 6
    assert summary.failed == {}
    assert summary.stages["download"].done == summary.stages["extract"].done == 6
    for folder in ("per_image", "lightcurves"):
        assert read_files(Path(config.output_dir) / folder) == read_files(
            Path(finished.config.output_dir) / folder
        )
    # Nothing of it is in the ledger.
    assert "failed" not in (output_of(pipeline).state / "ledger.jsonl").read_text()
    said = [r.getMessage() for r in caplog.records if r.name.startswith("spxdask.stages")]
    assert len(said) == 2
    assert said[0].startswith("the archive does not answer since ")
    assert said[1] == "the archive answers again"
    assert progress.waits[0] == said[0]
    assert progress.waits[-1] is None


def test_patience_ends_and_the_run_resumes(finished, serve, client, survey):
    lasting = itertools.repeat(Fault(status=502))
    faults = {frame.archived.uri: lasting for frame in survey.frames}
    first = min(survey.frames, key=lambda frame: frame.exposure.mjd_begin).exposure.uri
    faults[first] = itertools.chain([Fault()], lasting)
    archive, config = serve(faults, outage_patience=0.2, max_download_workers=1)
    pipeline, progress = make_pipeline(config, client)
    with pytest.raises(ArchiveError, match="HTTP 502 Bad Gateway") as caught:
        pipeline.run_all()
    assert caught.value.blame == "archive"
    assert progress.waits[-1] is None
    status = read_status(config.output_dir)
    assert (status.failed, status.waiting) == ({}, None)
    assert (status.measured, status.pending) == (1, 5)
    archive.stop()
    # The folder's configuration names the port.
    with SimulatedArchive(survey.archived, port=int(archive.url.rpartition(":")[2])):
        assert BatchPipeline(config, client=client).run_all().failed == {}
    assert read_files(Path(config.output_dir, "lightcurves")) == read_files(
        output_of(finished).lightcurves
    )


def test_a_broken_frame_is_no_outage(serve, client, survey, caplog):
    broken = survey.frames[2].exposure
    faults = {broken.uri: itertools.repeat(Fault(status=503))}
    archive, config = serve(faults)
    pipeline, progress = make_pipeline(config, client)
    summary = pipeline.run_all()
    assert list(summary.failed) == [broken.filename]
    assert summary.failed[broken.filename].endswith(
        "HTTP 503 Service Unavailable (after 1 attempt)"
    )
    assert progress.waits == []
    # Alone in the next run, it is told from an outage by a frame that was served before.
    for max_retries, statuses in [(0, [503]), (1, [503, 503, 200] * 2)]:
        n_requests = len(archive.requests)
        pipeline, progress = make_pipeline(replace(config, max_retries=max_retries), client)
        assert list(pipeline.run_all(retry_failed=True).failed) == [broken.filename]
        assert progress.waits == []
        assert [request.status for request in archive.requests[n_requests:]] == statuses


def test_status_says_that_the_run_waits(serve, client, survey):
    seen = []

    class Watching(Recorder):
        def wait(self, reason):
            if reason:
                seen.append(read_status(config.output_dir))

    lasting = itertools.repeat(Fault(status=500))
    _, config = serve({f.exposure.uri: lasting for f in survey.frames}, outage_patience=0.1)
    pipeline, _ = make_pipeline(config, client)
    pipeline._progress._progress = Watching()
    with pytest.raises(ArchiveError):
        pipeline.run_all()
    # What is drawn first is recorded next.
    status = seen[-1]
    assert status.waiting.startswith("the archive does not answer since ")
    assert f"waiting     {status.waiting}" in str(status)
    assert (status.failed, status.pending) == ({}, 6)


def test_the_query_waits_too(serve, client, caplog):
    caplog.set_level(logging.WARNING)
    faults = {"TAP/sync": [Fault(status=503)] * 3, "TAP/async": [Fault(status=503)] * 3}
    _, config = serve(faults)
    pipeline, progress = make_pipeline(config, client)
    assert len(pipeline.run_query()) == 6
    assert [wait is None for wait in progress.waits] == [False] * 3 + [True]
    assert "the TAP service's job gave no valid answer" in progress.waits[0]
    said = [r.getMessage() for r in caplog.records if r.name == "spxdask.archive.outage"]
    assert len(said) == 2


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("frames cannot be fetched through the proxy socks5://p"),
        ArchiveError("the certificate of host is not accepted", blame="access"),
    ],
    ids=["proxy", "certificate"],
)
def test_what_concerns_all_frames_ends_the_run_in_a_sentence(
    make_config, client, fail_in_workers, error
):
    config = make_config()
    pipeline, _ = make_pipeline(config, client)
    pipeline.run_query()
    fail_in_workers("spxdask.stages.download", "fetch_file", lambda *_: True, error)
    with pytest.raises(type(error)) as caught:
        pipeline.run_download()
    assert caught.value.reason == error.reason
    status = read_status(config.output_dir)
    assert (status.failed, status.pending) == ({}, 6)
