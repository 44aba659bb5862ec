"""What tasks may ask of their worker."""

from __future__ import annotations

import gc
import math
import os
import signal

import dask
from distributed import Client, LocalCluster

from spxdask.cluster.session import ClusterSession
from spxdask.cluster.workers import prepare_workers, worker_memory_limit


def test_memory_limit_outside_a_worker():
    assert worker_memory_limit() == math.inf


def test_memory_limit_of_a_worker():
    for limit, expected in (("1GB", 1e9), (0, math.inf)):
        with (
            LocalCluster(
                n_workers=1,
                processes=False,
                memory_limit=limit,
                dashboard_address="127.0.0.1:0",
            ) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            assert client.submit(worker_memory_limit).result() == expected


def test_only_processes_of_workers_alone_look_through_no_modules(client, in_process):
    prepare_workers(client)
    assert min(client.run(gc.get_freeze_count).values()) > 0
    # The worker of the other cluster is in the process of its user.
    gc.unfreeze()
    try:
        prepare_workers(in_process)
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()


def test_local_worker_that_starts_slowly_is_not_given_up():
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1ms"}),
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
        ClusterSession(max_processes=1, n_downloads=1, client=client).hold(),
    ):
        first = client.submit(os.getpid, pure=False).result(timeout=60)
        os.kill(first, signal.SIGKILL)
        second = client.submit(os.getpid, pure=False).result(timeout=60)
    assert second != first
