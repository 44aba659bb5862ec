"""Threads of fresh worker processes use everything for the first time at once.

``SPXDASK_TESTS=long`` makes 200 such runs with compiled code in the cache, and ten in which two
processes compile at the same time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import dask
import pytest
import simulated
from distributed import Client, LocalCluster
from first_use import RecordFirstUse, get_events
from outputs import output_of, read_files

from spxdask import BatchConfig, BatchPipeline
from spxdask.cluster.workers import FIRST_IMPORTS, PROFILER_FREEZES_BEFORE, PROFILER_FREEZES_FROM
from spxdask.simulate.archive import SimulatedArchive

LONG = os.environ.get("SPXDASK_TESTS") == "long"
WARM_ROUNDS, COLD_ROUNDS = (200, 10) if LONG else (2, 0)
# The stacks of workers are dumped after this time; a round takes a tenth of it.
LATE_S = 120
FORMATS = ("csv", "parquet")


@pytest.fixture(scope="module")
def archive(survey) -> Iterator[SimulatedArchive]:
    with SimulatedArchive(survey[1]) as archive:
        yield archive


@pytest.fixture(scope="module")
def first_results() -> dict[str, dict]:
    """The files that the first run with each format has made."""
    return {}


@contextmanager
def fresh_workers(folder: Path, n_workers: int) -> Iterator[Client]:
    """Start workers, print their stacks if the block takes long, and see what they did."""
    with (
        # As Dask has them by default; those of other tests are forked, and have no profiler.
        dask.config.set(
            {
                "distributed.worker.multiprocessing-method": "spawn",
                "distributed.worker.profile.enabled": True,
            }
        ),
        LocalCluster(
            n_workers=n_workers,
            threads_per_worker=3,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.register_plugin(RecordFirstUse(folder))
        processes = client.run(os.getpid).values()

        def dump_stacks() -> None:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGUSR1)

        timer = threading.Timer(LATE_S, dump_stacks)
        timer.start()
        try:
            yield client
        finally:
            timer.cancel()
            # Pytest shows it if the test fails.
            for file in folder.glob("*.stacks"):
                print(file.read_text())
        for events in client.run(get_events).values():
            if PROFILER_FREEZES_FROM <= sys.version_info < PROFILER_FREEZES_BEFORE:
                assert "sys._current_frames" not in events
            assert events.keys().isdisjoint(FIRST_IMPORTS)


def run_for_the_first_time(
    folder: Path, survey, archive, first_results, how: str, n_workers: int = 1
) -> None:
    """Make a whole run on fresh workers; its files are those of the first with this format."""
    options = simulated.run_options(survey[0], archive, folder / "out")
    formats = {"per_image_format": how, "lightcurve_format": how}
    with fresh_workers(folder, n_workers) as client:
        pipeline = BatchPipeline(BatchConfig(**options, **formats), client=client)
        summary = pipeline.run_all()
    assert (summary.failed, summary.stages["extract"].done) == ({}, len(survey[1]))
    output = output_of(pipeline)
    made = read_files(output.lightcurves) | read_files(output.per_image)
    assert len(made) > len(survey[1])
    assert made == first_results.setdefault(how, made)


@pytest.mark.parametrize("number", range(WARM_ROUNDS))
def test_first_use_by_three_threads(tmp_path, survey, archive, first_results, number):
    how = FORMATS[number % 2]
    run_for_the_first_time(tmp_path, survey, archive, first_results, how)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(COLD_ROUNDS))
def test_first_use_while_two_processes_compile(
    tmp_path, survey, archive, first_results, number, monkeypatch
):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "compiled"))
    how = FORMATS[number % 2]
    run_for_the_first_time(tmp_path, survey, archive, first_results, how, n_workers=2)
