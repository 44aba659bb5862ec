"""Frames that go from the archive to their table without a disk, and how many at a time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import simulated
from distributed import Client, LocalCluster
from killing import RecordFetches

from spxdask import BatchConfig, BatchPipeline
from spxdask.progress import Silent
from spxdask.simulate.archive import SimulatedArchive

N_FRAMES = 10


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    exposures = [simulated.exposure(i % 5, 1 + i % 6) for i in range(N_FRAMES)]
    return simulated.make_survey(tmp_path_factory.mktemp("survey"), exposures)


@pytest.fixture
def workers():
    """Two workers, which their nannies replace when they die."""
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=4,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=50,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def make_config(survey, archive, folder, **options) -> BatchConfig:
    catalogue = survey.write_catalogue(folder / "sources.csv")
    defaults = simulated.run_options(catalogue, archive, folder / "out")
    return BatchConfig(**(defaults | {"keep_images": False} | options))


def count_concurrent(log: Path, died: dict[int, float]) -> int:
    """Return the largest number of concurrent fetches; those of a killed process end with it."""
    events, begun = [], {}
    for line in log.read_text().splitlines():
        what, at, pid, filename = line.split()
        events.append((float(at), 1 if what == "begin" else -1))
        begun[pid, filename] = what == "begin"
    events += [(died[int(pid)], -1) for (pid, _), open_ in begun.items() if open_]
    most = now = 0
    # Of events at the same time, ends come first.
    for _, change in sorted(events):
        now += change
        most = max(most, now)
    assert now == 0
    return most


class WorkerKiller(Silent):
    """Kills a worker process each time that one of some numbers of frames has ended."""

    def __init__(self, client: Client, after: set[int]) -> None:
        self._client, self._after, self._ended = client, after, 0
        self.died: dict[int, float] = {}

    def advance(self, *, failed: bool = False) -> None:
        self._ended += 1
        if self._ended in self._after:
            pid = min(self._client.run(os.getpid).values())
            process = psutil.Process(pid)
            os.kill(pid, signal.SIGKILL)
            self.died[pid] = time.monotonic()
            psutil.wait_procs([process], timeout=10)


@pytest.mark.kill
def test_limit_of_fetches_holds_while_workers_die(survey, workers, tmp_path):
    workers.register_plugin(RecordFetches(tmp_path / "log"))
    # Transfers are so slow that others are under way whenever one ends.
    with SimulatedArchive(survey.archived, bandwidth=survey.size_bytes / 4) as archive:
        config = make_config(survey, archive, tmp_path, max_download_workers=3)
        killer = WorkerKiller(workers, {3, 6})
        summary = BatchPipeline(config, client=workers, progress=killer).run_all()
    assert len(killer.died) == 2
    assert not summary.failed
    assert summary.stages["extract"].done == N_FRAMES
    assert count_concurrent(tmp_path / "log", killer.died) == 3


def test_worker_holds_no_more_frames_than_its_scratch_allows(survey, client, tmp_path):
    """With scratch for less than a frame, each worker has one frame at a time."""
    with SimulatedArchive(survey.archived, bandwidth=survey.size_bytes / 2) as archive:
        config = make_config(survey, archive, tmp_path, max_download_workers=8, scratch_gb=1e-6)
        summary = BatchPipeline(config, client=client).run_all()
        assert archive.peak_connections == 2
    assert summary.stages["extract"].done == N_FRAMES


def test_nothing_is_left_on_disk(survey, client, tmp_path):
    with SimulatedArchive(survey.archived) as archive:
        BatchPipeline(make_config(survey, archive, tmp_path), client=client).run_all()
    assert list((tmp_path / "out/images").iterdir()) == []
    scratch = set(client.run(lambda dask_worker: dask_worker.local_directory).values())
    left = [path for folder in scratch for path in Path(folder).rglob("*.fits")]
    assert left == []
