"""Clusters that make no progress."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import dask
import dask.dataframe as dd
import pandas as pd
import pytest
from distributed import Client, LocalCluster

from spxdask.cluster.dask_internals import replace_closed_workers, run_coroutine
from spxdask.cluster.shuffle import compute_shuffle
from spxdask.cluster.stalls import StallTimes, StallWatch
from spxdask.cluster.tasks import as_task, run_window
from spxdask.errors import ClusterError

GB = 10**9


def worker(status="running", executing=0, memory_limit=600_000_000) -> dict:
    metrics = {"task_counts": {"executing": executing}}
    return {"status": status, "metrics": metrics, "memory_limit": memory_limit}


class Cluster:
    """What a watch asks a client for, and a clock."""

    cluster = None

    def __init__(self, *workers: dict) -> None:
        self.workers = list(workers)
        self.events: list = []
        self.now_s = 0.0
        self.watch = StallWatch(
            self,
            "partition",
            list,
            StallTimes(poll_interval_s=5, report_s=60, paused_s=30),
            clock=self,
        )

    def __call__(self) -> float:
        return self.now_s

    def scheduler_info(self, n_workers: int) -> dict:
        return {"workers": dict(enumerate(self.workers))}

    def get_events(self, topic: str) -> list:
        assert topic == "all"
        return self.events

    def lose(self, n: int, **how) -> None:
        self.events += [(time.time(), {"action": "add-worker"})]
        self.events += [(time.time(), {"action": "remove-worker"} | how)] * n

    def wait(self, seconds: float) -> None:
        """Let time pass, and have the watch look as often as its thread would."""
        for _ in range(int(seconds / 5)):
            self.now_s += 5
            self.watch.poll()


def test_lost_workers_are_reported_once_then_seldom(caplog):
    cluster = Cluster(worker(executing=1))
    cluster.lose(12)
    cluster.lose(3, expected=True)
    cluster.wait(55)
    assert caplog.messages == []
    cluster.wait(60)
    assert caplog.messages == ["no partition has ended for 60 s: 12 workers were lost"]
    cluster.lose(1)
    cluster.wait(120)
    assert caplog.messages[1:] == ["no partition has ended for 120 s: 13 workers were lost"]
    cluster.wait(600)
    assert len(caplog.messages) == 4


def test_progress_is_not_reported(caplog):
    cluster = Cluster(worker(executing=1))
    for _ in range(20):
        cluster.lose(1)
        cluster.wait(50)
        cluster.watch.advance()
    assert caplog.messages == []


def test_long_tasks_are_not_reported(caplog):
    cluster = Cluster(worker(executing=1))
    cluster.wait(3600)
    assert (caplog.messages, cluster.watch.failure) == ([], None)


@pytest.mark.parametrize(
    ("workers", "says"),
    [
        ([], "the cluster has no workers"),
        ([worker("paused"), worker(executing=1)], "1 of 2 workers paused for lack of memory"),
    ],
)
def test_what_is_missing_is_reported(caplog, workers, says):
    cluster = Cluster(*workers)
    cluster.wait(60)
    assert caplog.messages == [f"no partition has ended for 60 s: {says}"]
    assert cluster.watch.failure is None


@pytest.mark.parametrize(
    ("workers", "says"),
    [
        ([worker("paused")] * 2, "all 2 workers are paused for lack of memory; one may use 0.6 GB"),
        ([worker("paused"), worker()], "1 of 2 workers is paused"),
    ],
)
def test_paused_workers_are_a_failure_when_nothing_runs(workers, says):
    cluster = Cluster(*workers)
    cluster.wait(30)
    assert cluster.watch.failure is None
    cluster.wait(5)
    assert says in cluster.watch.failure
    assert "give each worker 1.5 GB or more" in cluster.watch.failure


def test_workers_that_go_on_after_a_pause_are_no_failure():
    cluster = Cluster(worker("paused"))
    for _ in range(10):
        cluster.wait(25)
        cluster.workers = [worker("paused", executing=1)]
        cluster.wait(5)
        cluster.workers = [worker("paused")]
    assert cluster.watch.failure is None


# With a cluster


SOON = StallTimes(poll_interval_s=0.1, report_s=60, paused_s=0.5)


@pytest.fixture
def paused():
    """A client of a cluster whose only worker pauses as soon as it has started."""
    with (
        dask.config.set({"distributed.worker.memory.pause": 1e-6}),
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=False,
            memory_limit="600MB",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        while "paused" not in [w.status.name for w in cluster.workers.values()]:
            time.sleep(0.01)
        yield client


def test_a_shuffle_on_paused_workers_ends_with_an_error(paused):
    frame = dd.from_pandas(pd.DataFrame({"x": [1, 2]}), npartitions=2)
    with pytest.raises(ClusterError, match=r"the only worker is paused .* use 0\.6 GB"):
        compute_shuffle(
            paused,
            lambda run: frame.shuffle(on="x", npartitions=2, shuffle_method="p2p"),
            stall_times=SOON,
        )
    assert paused.futures == {}


def test_tasks_on_paused_workers_end_with_an_error(paused):
    tasks = ((n, as_task(("work", f"paused-{n}"), abs, n)) for n in range(3))
    with pytest.raises(ClusterError, match="paused"):
        list(run_window(paused, tasks, lambda: 2, stall_times=SOON))
    assert paused.futures == {}


def test_a_worker_that_its_cluster_gave_up_is_replaced():
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1ms"}),
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        cluster.sync(cluster.workers[0].close)
        while 0 in cluster.workers:
            time.sleep(0.01)
        run_coroutine(cluster, replace_closed_workers, cluster)
        client.wait_for_workers(2, timeout=30)
        assert client.submit(abs, -1).result() == 1


def test_the_watch_survives_a_scheduler_that_does_not_answer():
    cluster, is_over = Cluster(worker()), threading.Event()
    asked = []

    def fail(n_workers: int) -> dict:
        asked.append(n_workers)
        if len(asked) == 2:
            is_over.set()
        raise OSError("gone")

    client = SimpleNamespace(cluster=None, scheduler_info=fail)
    watch = StallWatch(client, "frame", list, StallTimes(poll_interval_s=0.001), clock=cluster)
    cluster.now_s = 10.0
    watch.run(is_over)
    assert (len(asked), watch.failure) == (2, None)
