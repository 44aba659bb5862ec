"""What spxdask uses of distributed and dask-jobqueue that is private or undocumented.

No other module touches it. tests/cluster/test_dask_internals.py names each attribute, and
fails by that name when a new version of the libraries lacks it.
"""

from __future__ import annotations

import gc
import inspect
import math
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any, NamedTuple

from distributed import Client, Future, LocalCluster, Status
from distributed.deploy.local import nprocesses_nthreads
from distributed.threadpoolexecutor import ThreadPoolExecutor

# How the messages begin that distributed raises as RuntimeError when a shuffle is lost.
_SHUFFLE_LOST = ("P2P ", "No active shuffle", "Worker ", "Shuffle ")
# Held while garbage is not collected.
_asking_for_frames = threading.Lock()


class AdaptLimits(NamedTuple):
    """The numbers of workers between which an adaptive cluster stays."""

    minimum: int
    maximum: float


class WorkerThreads(NamedTuple):
    """The threads of a worker: how many tasks it runs at once, and the pool that runs them."""

    n_threads: int
    pool: ThreadPoolExecutor


# Clusters and their clients


def get_adapt_limits(cluster: Any) -> AdaptLimits | None:
    """Return the limits of an adaptive cluster.

    Parameters
    ----------
    cluster : Cluster
        The cluster.

    Returns
    -------
    AdaptLimits or None
        None if the cluster does not adapt.
    """
    adaptive = getattr(cluster, "_adaptive", None)
    if adaptive is None or adaptive.state not in ("starting", "running"):
        return None
    return AdaptLimits(adaptive.minimum, adaptive.maximum)


def count_planned_workers(cluster: Any) -> int:
    """Return how many workers a cluster has or has asked for.

    Parameters
    ----------
    cluster : Cluster
        The cluster.

    Returns
    -------
    int
    """
    return len(cluster.plan)


def get_requested_jobs(cluster: Any) -> set[Any]:
    """Return the names of the jobs that a cluster wants to have.

    Parameters
    ----------
    cluster : Cluster
        The cluster.

    Returns
    -------
    set
        The names, which are integers or strings.
    """
    return set(cluster.worker_spec)


def get_jobs(cluster: Any) -> dict[Any, Any]:
    """Return the jobs of a cluster by name; only to be called on its event loop.

    Parameters
    ----------
    cluster : Cluster
        The cluster.

    Returns
    -------
    dict
        Job by name.
    """
    return dict(cluster.workers)


async def close_job(cluster: Any, name: Any, job: Any) -> None:
    """Close a job so that the cluster submits another; only to be called on its event loop.

    Parameters
    ----------
    cluster : Cluster
        The cluster.
    name : int or str
        Name of the job.
    job : Job
        The job; if the name belongs to another job by now, nothing is closed.
    """
    if cluster.workers.get(name) is job:
        del cluster.workers[name]
        await job.close()


async def replace_closed_workers(cluster: Any) -> None:
    """Start workers in place of those that a cluster has given up; only on its event loop.

    Parameters
    ----------
    cluster : Cluster
        The cluster. One that adapts, or is not of this machine, is not changed.
    """
    if get_adapt_limits(cluster) is not None or not isinstance(cluster, LocalCluster):
        return
    for name, worker in list(cluster.workers.items()):
        if worker.status in (Status.closed, Status.failed):
            del cluster.workers[name]
    if cluster.worker_spec.keys() - cluster.workers.keys():
        cluster.scale(len(cluster.worker_spec))


def abandon_cluster(cluster: Any) -> None:
    """Stop what the constructor of a cluster started before it failed.

    Parameters
    ----------
    cluster : Cluster
        The cluster.
    """
    cluster.status = Status.closed
    # The constructor may have failed before it made the loop.
    with suppress(AttributeError):
        cluster._loop_runner.stop()


def submit_coroutine(cluster: Any, function: Any) -> None:
    """Have the event loop of a cluster run a coroutine function, without waiting for it.

    Parameters
    ----------
    cluster : Cluster
        The cluster.
    function : coroutine function
        It is called without arguments.
    """
    cluster.loop.add_callback(function)


def run_coroutine(cluster: Any, function: Any, *arguments: Any) -> Any:
    """Run a coroutine function on the event loop of a cluster and wait for it.

    Parameters
    ----------
    cluster : Cluster
        The cluster.
    function : coroutine function
        The function.
    *arguments : object
        Its arguments.

    Returns
    -------
    object
        What the function returns.
    """
    return cluster.sync(function, *arguments)


def cancel_futures(client: Client, reason: str) -> None:
    """Cancel all futures that a client waits for.

    Parameters
    ----------
    client : Client
        The client.
    reason : str
        The reason that Dask logs.
    """
    client.cancel([Future(key, client) for key in list(client.futures)], reason=reason)


def run_in_time(
    client: Client,
    function: Callable,
    *arguments: Any,
    worker: str,
    timeout_s: float,
    on_nanny: bool = False,
) -> Any:
    """Call a function in the process of a worker, or of its nanny, that may never answer.

    Parameters
    ----------
    client : Client
        Of the cluster.
    function : callable
        What is called.
    *arguments : object
        With these arguments.
    worker : str
        Address of the worker.
    timeout_s : float
        How long to wait for the answer, s.
    on_nanny : bool
        Whether it is called in the process of the nanny.

    Returns
    -------
    object
        What the function returned.

    Raises
    ------
    TimeoutError
        If there is no answer in time.
    """
    options = {"workers": [worker], "nanny": on_nanny, "callback_timeout": timeout_s}
    [answer] = client.run(function, *arguments, **options).values()
    return answer


def get_default_processes(cores: int) -> int:
    """Return into how many processes Dask divides a worker.

    Parameters
    ----------
    cores : int
        Cores of the worker.

    Returns
    -------
    int
    """
    return nprocesses_nthreads(cores)[0]


# Workers


def get_memory_limit(worker: Any) -> float:
    """Return how much memory a worker may use.

    Parameters
    ----------
    worker : Worker
        The worker.

    Returns
    -------
    float
        The limit in bytes, infinity if there is none.
    """
    return worker.memory_manager.memory_limit or math.inf


def get_threads(worker: Any) -> WorkerThreads:
    """Return the threads that run the tasks of a worker.

    Parameters
    ----------
    worker : Worker
        The worker.

    Returns
    -------
    WorkerThreads
    """
    return WorkerThreads(worker.state.nthreads, worker.executors["default"])


def set_threads(worker: Any, threads: WorkerThreads) -> None:
    """Replace the threads that run the tasks of a worker.

    Parameters
    ----------
    worker : Worker
        The worker.
    threads : WorkerThreads
        The threads that run its tasks from now on.
    """
    worker.state.nthreads, worker.executors["default"] = threads


def make_threads(n_threads: int, name: str) -> WorkerThreads:
    """Make a new pool of threads for a worker.

    Parameters
    ----------
    n_threads : int
        Number of threads.
    name : str
        The names of the threads begin with it.

    Returns
    -------
    WorkerThreads
    """
    return WorkerThreads(n_threads, ThreadPoolExecutor(n_threads, thread_name_prefix=name))


def stop_profiler(worker: Any) -> None:
    """Stop a worker from looking, every 10 ms, at where its tasks are, for Dask's Profile page.

    Parameters
    ----------
    worker : Worker
        The worker. One that has no profiler is not changed.
    """
    for name in ("profile", "profile-cycle"):
        callback = worker.periodic_callbacks.pop(name, None)
        if callback is not None:
            callback.stop()


def get_task_threads(worker: Any) -> dict[int, Any]:
    """Return which thread of a worker runs which task.

    Parameters
    ----------
    worker : Worker
        The worker.

    Returns
    -------
    dict of int to object
        Key of the task by the number of the thread.
    """
    with worker.active_threads_lock:
        return dict(worker.active_threads)


def get_process_id(nanny: Any) -> int | None:
    """Return the process of the worker that a nanny has started.

    Parameters
    ----------
    nanny : Nanny
        The nanny.

    Returns
    -------
    int or None
        None if it does not run.
    """
    return nanny.pid


def get_frames() -> dict[int, FrameType]:
    """Return where each thread of this process is.

    Returns
    -------
    dict of int to frame
        The innermost frame by the number of the thread.
    """
    with _asking_for_frames:
        # A garbage collection within the call can freeze the process; see `workers.py`.
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames()
        finally:
            if was_enabled:
                gc.enable()


# Schedulers


def get_web_application(scheduler: Any) -> Any:
    """Return the application that serves the dashboard.

    Parameters
    ----------
    scheduler : Scheduler
        The scheduler.

    Returns
    -------
    tornado.web.Application or None
        None if the scheduler has no dashboard.
    """
    return getattr(scheduler, "http_application", None)


def get_workers(scheduler: Any) -> Mapping[str, Any]:
    """Return the workers of a scheduler by address; only to be called on its event loop.

    Parameters
    ----------
    scheduler : Scheduler
        The scheduler.

    Returns
    -------
    mapping of str to WorkerState
        Worker by address.
    """
    return scheduler.workers


def get_worker_name(worker: Any) -> Any:
    """Return the name of one of the workers of a scheduler.

    Parameters
    ----------
    worker : WorkerState
        The worker.

    Returns
    -------
    int or str
    """
    return worker.name


def count_threads(scheduler: Any) -> int:
    """Return how many threads the workers of a scheduler have.

    Parameters
    ----------
    scheduler : Scheduler
        The scheduler.

    Returns
    -------
    int
    """
    return scheduler.total_nthreads


def count_task_states(scheduler: Any, prefix: str) -> dict[str, int]:
    """Count the tasks of one kind in each of Dask's states.

    Parameters
    ----------
    scheduler : Scheduler
        The scheduler.
    prefix : str
        How the keys of the tasks begin.

    Returns
    -------
    dict of str to int
        Number of tasks by Dask's name of the state; empty if there was no such task yet.
    """
    found = scheduler.task_prefixes.get(prefix)
    return {} if found is None else dict(found.states)


def get_worker_plugin_names(scheduler: Any) -> list[str]:
    """Return the names of the plugins that a scheduler installs on its workers.

    Parameters
    ----------
    scheduler : Scheduler
        The scheduler.

    Returns
    -------
    list of str
    """
    return list(scheduler.worker_plugins)


def get_client_ids(scheduler: Any) -> list[str]:
    """Return the ids of the clients that are connected to a scheduler.

    Parameters
    ----------
    scheduler : Scheduler
        The scheduler.

    Returns
    -------
    list of str
    """
    return list(scheduler.clients)


# Shuffles


def is_shuffle_lost(error: RuntimeError) -> bool:
    """Return whether an error means that a shuffle did not survive the loss of a worker.

    Parameters
    ----------
    error : RuntimeError
        An error of a shuffle.

    Returns
    -------
    bool
    """
    return str(error).lstrip().startswith(_SHUFFLE_LOST)


def is_shuffle_disk_full(error: OSError) -> bool:
    """Return whether an error means that a worker's disk has no room for a shuffle.

    Parameters
    ----------
    error : OSError
        An error of a shuffle.

    Returns
    -------
    bool
    """
    from distributed.shuffle._exceptions import P2POutOfDiskError

    return isinstance(error, P2POutOfDiskError)


# dask-jobqueue


def get_job_class(cluster_class: Any) -> Any:
    """Return the class of the jobs that a class of clusters submits.

    Parameters
    ----------
    cluster_class : type
        A class of clusters.

    Returns
    -------
    type
    """
    return cluster_class.job_cls


def get_keywords(cluster_class: Any) -> set[str]:
    """Return the keywords that a class of clusters and its jobs accept.

    Parameters
    ----------
    cluster_class : type
        A class of clusters.

    Returns
    -------
    set of str
    """
    known: set[str] = set()
    for each in (*cluster_class.__mro__, *get_job_class(cluster_class).__mro__):
        if each.__module__.startswith("dask_jobqueue") and "__init__" in vars(each):
            known |= inspect.signature(each).parameters.keys()
    return known


def detach_commands(job_class: Any, make_environment: Callable[[list[str]], dict[str, str]]) -> Any:
    """Return a class of jobs whose commands do not receive a Ctrl-C from the terminal.

    If Ctrl-C ended a command that submits a job, the job would exist, but its number would be
    lost.

    Parameters
    ----------
    job_class : type
        A class of jobs of dask-jobqueue.
    make_environment : callable
        Returns the environment of a command.

    Returns
    -------
    type
        A subclass of it. Its method `note_answer` is called with what the batch system wrote
        when it accepted a job.
    """

    class DetachedJob(job_class):
        @staticmethod
        async def _call(command: list[str], **options: Any) -> str:
            options |= {"start_new_session": True, "env": make_environment(command)}
            return await job_class._call(command, **options)

        def _job_id_from_submit_output(self, out: str) -> str:
            self.note_answer(out)
            return super()._job_id_from_submit_output(out)

        def note_answer(self, answer: str) -> None:
            pass

    return DetachedJob
