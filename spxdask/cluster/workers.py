"""The environment that workers are started in, and what their tasks may ask of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context

import dask
from distributed import LocalCluster, get_worker
from distributed.deploy import Cluster
from distributed.utils import get_mp_context

from spxdask.cluster.dask_internals import get_memory_limit

# Environment of the workers, in bytes. Dask has its workers return freed memory to the
# system at once, so that every buffer of a transfer consists of fresh pages; to map them
# takes longer than the transfer.
MALLOC_ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": 32 << 20,
    "MALLOC_MMAP_THRESHOLD_": 4 << 20,
}

# What a worker and its tasks import.
WORKER_MODULES = (
    "distributed.nanny",
    "distributed.shuffle",
    "distributed.worker",
    "spxdask.stages.extract",
    "spxdask.stages.light_curves",
)


@contextmanager
def fork_workers() -> Iterator[None]:
    """Let the worker processes of this machine be forked from one that has imported everything.

    It is a process without threads of Python, so that no two threads of a worker are the first to
    import something. All workers start in the time in which one would start by itself, one that
    has died is replaced in some tenths of a second, and the memory of what is imported is theirs
    in common. Only on Linux: libraries of macOS do not bear to be forked.

    Yields
    ------
    None
        While the setting of Dask is changed; workers may be started and restarted.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        # Dask sets what is imported beforehand once, here at the latest.
        get_mp_context()
        get_context("forkserver").set_forkserver_preload(list(WORKER_MODULES))
        yield


def worker_memory_limit() -> float:
    """Return the memory that the worker running this task may use.

    Returns
    -------
    float
        Bytes; infinity where there is no limit, and outside a worker.
    """
    try:
        worker = get_worker()
    except ValueError:
        return math.inf
    return get_memory_limit(worker)


@contextmanager
def keep_local_workers(cluster: Cluster | None) -> Iterator[None]:
    """Let the workers of a LocalCluster restart as often as they die.

    A worker that dies is restarted at once. But Dask asks once more
    `distributed.deploy.lost-worker-timeout` after each death, and closes the worker for good if
    it has died again since and is just then starting: a frame that kills its workers every few
    seconds could leave a cluster with none.

    Parameters
    ----------
    cluster : Cluster or None
        The cluster; one that is not local is not changed.

    Yields
    ------
    None
    """
    if not isinstance(cluster, LocalCluster):
        yield
        return
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "365 days"}):
        yield
