"""Workers prepared for a shuffle, and shuffles that are lost with a worker."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack

import dask.dataframe as dd
import pandas as pd
import psutil
import pytest
from distributed import Client, LocalCluster
from distributed.shuffle._exceptions import P2POutOfDiskError

from spxdask.cluster.dask_internals import (
    count_planned_workers,
    get_adapt_limits,
    get_threads,
)
from spxdask.cluster.shuffle import (
    compute_shuffle,
    hold_worker_count,
    limit_shuffle_threads,
    unregister_stale_plugins,
)
from spxdask.errors import DiskFullError, FrameError


@pytest.fixture(scope="module")
def small_cluster():
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=20,
            memory_limit="1.3GB",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=50,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def small(small_cluster):
    """A worker of many threads and little memory."""
    small_cluster.wait_for_workers(1, timeout=30)
    return small_cluster


def threads(client) -> tuple[int, int]:
    def count(dask_worker):
        threads = get_threads(dask_worker)
        return threads.n_threads, threads.pool._max_workers

    return next(iter(client.run(count).values()))


def test_a_shuffle_uses_as_many_threads_as_memory_allows(small):
    before = threads(small)
    assert before == (20, 20)
    with limit_shuffle_threads(small):
        assert threads(small) == (2, 2)
        # Two threads run fifty tasks.
        assert small.gather(small.map(abs, range(50))) == list(range(50))
    assert threads(small) == before
    assert small.submit(abs, -1).result() == 1


def test_two_shuffles_at_once(small):
    before = threads(small)
    with Client(small.scheduler.address, set_as_default=False) as other:
        with ExitStack() as second:
            with limit_shuffle_threads(small):
                second.enter_context(limit_shuffle_threads(other))
            # The first has ended, the second still needs the limit.
            assert threads(small) == (2, 2)
        assert threads(small) == before


def test_the_plugin_of_a_killed_client_is_unregistered(small):
    before = threads(small)
    code = f"""
import os
from distributed import Client
from spxdask.cluster.shuffle import limit_shuffle_threads
shuffle = limit_shuffle_threads(Client({small.scheduler.address!r}))
shuffle.__enter__()
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert threads(small) == (2, 2)
    with limit_shuffle_threads(small):
        small.run_on_scheduler(until_clients_are_gone, 1)
        unregister_stale_plugins(small)
        # A plugin that is in use stays.
        assert threads(small) == (2, 2)
    assert threads(small) == before


async def until_clients_are_gone(but, dask_scheduler):
    def others():
        return [c for c in dask_scheduler.clients if c.startswith("Client-") and "worker" not in c]

    # The scheduler notices when the connection breaks.
    while len(others()) > but:
        await asyncio.sleep(0.01)


def test_a_worker_that_dies_as_a_shuffle_begins_is_replaced(small):
    process = psutil.Process(next(iter(small.run(os.getpid).values())))
    process.send_signal(signal.SIGKILL)
    with limit_shuffle_threads(small):
        # The worker that replaces it is prepared, too.
        small.wait_for_workers(1, timeout=30)
        assert small.submit(abs, -1).result() == 1
        assert threads(small) == (2, 2)


# Clusters that keep their size


def adapt(cluster) -> int:
    """Have a cluster adapt its size several times; return the size."""
    for _ in range(5):
        cluster.sync(cluster._adaptive.adapt)
    return count_planned_workers(cluster)


def test_a_cluster_whose_worker_count_is_held_does_not_shrink():
    with (
        LocalCluster(
            n_workers=3, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        # It adapts only when the test has it do so.
        cluster.adapt(minimum=1, maximum=4, interval="1h", wait_count=1)
        with hold_worker_count(client):
            assert adapt(cluster) == 3
        assert adapt(cluster) == 1


def test_a_cluster_that_does_not_adapt_is_left_alone(client):
    with hold_worker_count(client):
        assert get_adapt_limits(client.cluster) is None
    with (
        Client(client.scheduler.address, set_as_default=False) as other,
        hold_worker_count(other),
    ):
        assert len(other.nthreads()) == 2


# Shuffles


META = pd.DataFrame({"x": pd.Series(dtype="int64")})
LOST = RuntimeError("P2P 0a failed during barrier phase")


def read(number: int, run: str, error: Exception | None) -> pd.DataFrame:
    if error is not None:
        raise error
    return pd.DataFrame({"x": [number, number + 10]})


class Shuffle:
    """Builds frames whose tasks raise the errors, one each time, until there are none left."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.runs: list[str] = []

    def __call__(self, run: str) -> dd.DataFrame:
        self.runs.append(run)
        error = self.errors.pop(0) if self.errors else None
        frame = dd.from_map(read, range(3), run=run, error=error, meta=META)
        return frame.shuffle(on="x", npartitions=4, shuffle_method="p2p")


def rows(parts: list[pd.DataFrame]) -> list[int]:
    return sorted(pd.concat(parts)["x"])


def raising(error: Exception) -> Callable[[], None]:
    def check() -> None:
        raise error

    return check


def test_a_shuffle_reports_its_partitions(client):
    build, results, restarts = Shuffle(), [], []
    parts = compute_shuffle(
        client, build, on_result=results.append, on_restart=lambda: restarts.append(1)
    )
    assert rows(parts) == [0, 1, 2, 10, 11, 12]
    assert len(parts) == 4
    assert [id(part) for part in results] == [id(part) for part in parts]
    assert restarts == []


@pytest.mark.parametrize(
    "error", [LOST, RuntimeError("No active shuffle with id='0a' found")], ids=["p2p", "inactive"]
)
def test_a_shuffle_that_is_lost_with_a_worker_is_computed_again(client, error):
    build, restarts = Shuffle(error), []
    parts = compute_shuffle(client, build, on_restart=lambda: restarts.append(1))
    assert rows(parts) == [0, 1, 2, 10, 11, 12]
    assert len(set(build.runs)) == 2
    assert restarts == [1]


def test_a_shuffle_that_is_lost_again_and_again_is_an_error(client):
    build = Shuffle(LOST, LOST, LOST)
    with pytest.raises(RuntimeError, match="P2P"):
        compute_shuffle(client, build, attempts=2)
    assert len(build.runs) == 2


@pytest.mark.parametrize("error", [FrameError("bad", path="a.csv"), OSError(28, "full")])
def test_the_error_of_a_task_is_not_that_of_the_shuffle(client, error):
    build = Shuffle(error)
    with pytest.raises(type(error)) as caught:
        compute_shuffle(client, build)
    assert str(caught.value) == str(error)
    assert len(build.runs) == 1


def test_a_check_ends_a_shuffle(client):
    with pytest.raises(ZeroDivisionError):
        compute_shuffle(client, Shuffle(), check=raising(ZeroDivisionError()))
    assert client.futures == {}


def test_a_full_disk_of_a_worker_is_named(client):
    folders = {os.path.dirname(path) for path in client.run(get_local_directory).values()}
    with pytest.raises(DiskFullError) as raised:
        compute_shuffle(client, Shuffle(P2POutOfDiskError()))
    assert all(folder in str(raised.value) for folder in folders)
    assert "TMPDIR" in str(raised.value)


def get_local_directory(dask_worker) -> str:
    return dask_worker.local_directory
