"""What a run asks of a Dask cluster."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import ExitStack

import psutil
import pytest
from distributed import Client, LocalCluster

from spxdask import BatchConfig
from spxdask.cluster import client as cluster
from spxdask.errors import InputError


@pytest.fixture
def small():
    """A worker of many threads and little memory."""
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=20,
            memory_limit="1.3GB",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=50,
        ) as cluster_,
        Client(cluster_) as client,
    ):
        yield client


def threads(client) -> tuple[int, int]:
    def count(dask_worker):
        return dask_worker.state.nthreads, dask_worker.executors["default"]._max_workers

    return next(iter(client.run(count).values()))


def test_a_shuffle_takes_the_threads_that_memory_bears(small):
    before = threads(small)
    assert before == (20, 20)
    with cluster.limit_shuffle_threads(small):
        assert threads(small) == (2, 2)
        # Its threads are enough for more tasks than there are of them.
        assert small.gather(small.map(abs, range(50))) == list(range(50))
    assert threads(small) == before
    assert small.submit(abs, -1).result() == 1


def test_two_shuffles_at_once(small):
    before = threads(small)
    with Client(small.scheduler.address, set_as_default=False) as other:
        with ExitStack() as second:
            with cluster.limit_shuffle_threads(small):
                second.enter_context(cluster.limit_shuffle_threads(other))
            # The first has ended, the second needs it still.
            assert threads(small) == (2, 2)
        assert threads(small) == before


def test_what_a_killed_client_left_is_tidied(small):
    before = threads(small)
    code = f"""
import os
from distributed import Client
from spxdask.cluster.client import limit_shuffle_threads
shuffle = limit_shuffle_threads(Client({small.scheduler.address!r}))
shuffle.__enter__()
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert threads(small) == (2, 2)
    with cluster.limit_shuffle_threads(small):
        small.run_on_scheduler(until_clients_are_gone, 1)
        cluster.unregister_stale_plugins(small)
        # Not what is in use.
        assert threads(small) == (2, 2)
    assert threads(small) == before


async def until_clients_are_gone(but, dask_scheduler):
    def others():
        return [c for c in dask_scheduler.clients if c.startswith("Client-") and "worker" not in c]

    # It hears of it from a connection that breaks.
    while len(others()) > but:
        await asyncio.sleep(0.01)


def test_a_worker_that_dies_as_a_shuffle_begins_is_no_matter(small):
    process = psutil.Process(next(iter(small.run(os.getpid).values())))
    process.send_signal(signal.SIGKILL)
    with cluster.limit_shuffle_threads(small):
        # Of the worker that came in its place.
        small.wait_for_workers(1, timeout=30)
        assert small.submit(abs, -1).result() == 1
        assert threads(small) == (2, 2)


def test_a_worker_that_dies_as_versions_are_compared_is_no_matter(small):
    process = psutil.Process(next(iter(small.run(os.getpid).values())))
    process.send_signal(signal.SIGKILL)
    cluster.check_versions(small)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_worker_that_dies_as_it_begins(monkeypatch, failures):
    """Others are started once more; that it happens again is no accident."""
    left = [RuntimeError("Nanny failed to start.")] * failures

    def start(**options):
        if left:
            raise left.pop()
        return LocalCluster(**options)

    monkeypatch.setattr(cluster, "LocalCluster", start)
    config = BatchConfig(catalog_path="a.csv", center_ra=0, center_dec=0, radius=1)
    if failures == 1:
        with cluster.embedded_client(config) as client:
            assert client.submit(abs, -1).result() == 1
    else:
        with (
            pytest.raises(InputError, match=r"did not start \(Nanny failed"),
            cluster.embedded_client(config),
        ):
            pytest.fail("there is no cluster")
