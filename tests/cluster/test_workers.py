"""What tasks may ask of their worker."""

from __future__ import annotations

import math

from distributed import Client, LocalCluster

from spxdask.cluster.workers import worker_memory_limit


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
