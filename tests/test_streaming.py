"""Frames that go from the archive to their table without a disk, and how many at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import simulated
from distributed import Client, LocalCluster
from killing import Fetches

from spxdask import BatchConfig, BatchPipeline
from spxdask.progress import Silent
from spxdask.simulate.archive import SimulatedArchive

N_FRAMES = 10


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    return simulated.small_survey(tmp_path_factory.mktemp("streaming"), N_FRAMES)


@pytest.fixture
def workers():
    """Two workers, of which the nannies start others in the place of dead ones."""
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=4,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=50,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def config(survey, archive, folder, **options) -> BatchConfig:
    defaults = simulated.run_options(survey[0], archive, folder / "out")
    return BatchConfig(**(defaults | {"keep_images": False} | options))


def most_at_once(log: Path, died: dict[int, float]) -> int:
    """Return the most fetches at one time; those of a killed process ended with it."""
    events, begun = [], {}
    for line in log.read_text().splitlines():
        what, at, pid, filename = line.split()
        events.append((float(at), 1 if what == "begin" else -1))
        begun[pid, filename] = what == "begin"
    events += [(died[int(pid)], -1) for (pid, _), open_ in begun.items() if open_]
    most = now = 0
    # At the same time, what ends makes room for what begins.
    for _, change in sorted(events):
        now += change
        most = max(most, now)
    assert now == 0
    return most


class Killer(Silent):
    """Kills a worker process when each of some numbers of units have ended."""

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


def test_the_cap_holds_while_workers_die(survey, workers, tmp_path):
    workers.register_plugin(Fetches(tmp_path / "log"))
    size = sum(frame.path.stat().st_size for frame in survey[1])
    # So slow that others are on their way whenever one ends.
    with SimulatedArchive(survey[1], bandwidth=size / 4) as archive:
        options = config(survey, archive, tmp_path, max_download_workers=3)
        killer = Killer(workers, {3, 6})
        summary = BatchPipeline(options, client=workers, progress=killer).run_all()
    assert len(killer.died) == 2
    assert not summary.failed
    assert summary.stages["extract"].done == N_FRAMES
    assert most_at_once(tmp_path / "log", killer.died) == 3


def test_a_worker_holds_no_more_than_its_scratch(survey, workers, tmp_path):
    """Of which there is less than a frame, so that each has one at a time."""
    size = sum(frame.path.stat().st_size for frame in survey[1])
    with SimulatedArchive(survey[1], bandwidth=size / 2) as archive:
        options = config(survey, archive, tmp_path, max_download_workers=8, scratch_gb=1e-6)
        summary = BatchPipeline(options, client=workers).run_all()
        assert archive.peak_connections == 2
    assert summary.stages["extract"].done == N_FRAMES


def test_nothing_is_left_on_disk(survey, client, tmp_path):
    with SimulatedArchive(survey[1]) as archive:
        BatchPipeline(config(survey, archive, tmp_path), client=client).run_all()
    assert list((tmp_path / "out/images").iterdir()) == []
    scratch = set(client.run(lambda dask_worker: dask_worker.local_directory).values())
    left = [path for folder in scratch for path in Path(folder).rglob("*.fits")]
    assert left == []
