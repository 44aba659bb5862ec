"""Each private or undocumented attribute that spxdask uses is still there, by name."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import inspect
import threading
from operator import attrgetter
from pathlib import Path

import dask
import pytest
from distributed import Client, LocalCluster, Nanny
from distributed.scheduler import WorkerState
from distributed.shuffle import _core, _scheduler_plugin

import spxdask
from spxdask.cluster import dask_internals

CLUSTER = Path(spxdask.__file__).parent / "cluster"
MODULES = sorted(p for p in CLUSTER.rglob("*.py") if p.name != "dask_internals.py")


@pytest.fixture(scope="module")
def instances():
    """One of each, at work."""
    with (
        dask.config.set({"distributed.worker.profile.enabled": True}),
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        cluster.adapt(minimum=1, maximum=1, interval="1h")
        assert client.submit(abs, -1, key=("negate", 1)).result() == 1
        scheduler = cluster.scheduler
        yield {
            "cluster": cluster,
            "client": client,
            "worker": next(iter(cluster.workers.values())),
            "scheduler": scheduler,
            "worker_state": next(iter(scheduler.workers.values())),
        }


@pytest.mark.parametrize(
    "name",
    [
        "cluster._adaptive.adapt",
        "cluster._adaptive.maximum",
        "cluster._adaptive.minimum",
        "cluster._adaptive.state",
        "cluster._loop_runner.stop",
        "cluster.loop.add_callback",
        "cluster.plan",
        "cluster.scheduler",
        "cluster.status",
        "cluster.sync",
        "cluster.worker_spec",
        "cluster.workers",
        "client.cluster",
        "client.futures",
        "scheduler.clients",
        "scheduler.http_application.add_handlers",
        "scheduler.task_prefixes",
        "scheduler.total_nthreads",
        "scheduler.worker_plugins",
        "scheduler.workers",
        "worker.active_threads",
        "worker.active_threads_lock",
        "worker.executors",
        "worker.id",
        "worker.memory_manager.memory_limit",
        "worker.metrics",
        "worker.periodic_callbacks",
        "worker.state.nthreads",
        "worker_state.name",
    ],
)
def test_attribute_is_there(instances, name):
    kind, _, attribute = name.partition(".")
    attrgetter(attribute)(instances[kind])


def test_worker_executors_default(instances):
    assert "default" in instances["worker"].executors


def test_adaptive_state(instances):
    assert instances["cluster"]._adaptive.state in ("starting", "running")


def test_the_numbers_are_those_of_the_cluster(instances):
    cluster, scheduler = instances["cluster"], instances["scheduler"]
    assert dask_internals.get_adapt_limits(cluster) == (1, 1)
    assert dask_internals.count_planned_workers(cluster) == 1
    assert dask_internals.count_threads(scheduler) == 1
    assert instances["client"].id in dask_internals.get_client_ids(scheduler)
    assert isinstance(instances["worker_state"], WorkerState)
    assert dask_internals.get_web_application(scheduler) is not None
    threads = dask_internals.get_threads(instances["worker"])
    assert threads.n_threads == 1
    dask_internals.set_threads(instances["worker"], threads)


def test_profiler(instances):
    worker = instances["worker"]
    callbacks = [worker.periodic_callbacks[name] for name in ("profile", "profile-cycle")]
    for _ in range(2):
        dask_internals.stop_profiler(worker)
    assert not any(callback.is_running() for callback in callbacks)
    assert worker.periodic_callbacks.keys().isdisjoint({"profile", "profile-cycle"})


def test_a_call_that_is_not_answered_in_time(instances):
    client, [address] = instances["client"], instances["client"].nthreads()
    assert dask_internals.run_in_time(client, abs, -1, worker=address, timeout_s=30.0) == 1
    with pytest.raises(TimeoutError):
        dask_internals.run_in_time(client, asyncio.sleep, 60, worker=address, timeout_s=0.01)


def test_the_process_of_a_nanny_and_the_frames_of_threads():
    assert isinstance(inspect.getattr_static(Nanny, "pid"), property)
    assert dask_internals.get_frames()[threading.get_ident()].f_code.co_name == "get_frames"


def test_task_states(instances):
    states = dask_internals.count_task_states(instances["scheduler"], "negate")
    assert {"processing", "queued", "waiting", "no-worker"} <= set(states)
    assert dask_internals.count_task_states(instances["scheduler"], "unknown") == {}


@pytest.mark.parametrize(
    "message",
    ["P2P {id} failed during", "No active shuffle", "left during shuffle", "left during active"],
)
def test_messages_of_lost_shuffles(message):
    sources = inspect.getsource(_core) + inspect.getsource(_scheduler_plugin)
    assert message in sources


@pytest.mark.skipif(
    importlib.util.find_spec("dask_jobqueue") is None, reason="dask-jobqueue is not installed"
)
@pytest.mark.parametrize(
    "name",
    [
        "SLURMCluster.job_cls._call",
        "SLURMCluster.job_cls.close",
        "SLURMCluster.job_cls.start",
        "SLURMCluster.job_cls.submit_command",
    ],
)
def test_attribute_of_dask_jobqueue_is_there(name):
    from spxdask.cluster.jobqueue.settings import _import_dask_jobqueue

    attrgetter(name)(_import_dask_jobqueue())


@pytest.mark.skipif(
    importlib.util.find_spec("dask_jobqueue") is None, reason="dask-jobqueue is not installed"
)
def test_keywords_of_dask_jobqueue():
    from spxdask.cluster.jobqueue.settings import _import_dask_jobqueue

    keywords = dask_internals.get_keywords(_import_dask_jobqueue().SLURMCluster)
    assert {"cores", "memory", "processes", "job_cls", "walltime", "queue"} <= keywords


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_other_module_uses_private_attributes(path):
    tree = ast.parse(path.read_text())
    private = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }
    # `_asdict` is the documented way to have a named tuple as a dict.
    assert private <= {"_asdict"}
