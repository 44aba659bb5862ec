"""How workers are started and prepared, and what their tasks may ask of them."""

from __future__ import annotations

import gc
import importlib
import inspect
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dask
from distributed import Client, LocalCluster, Status, WorkerPlugin, get_worker
from distributed.deploy import Cluster

from spxdask.cluster.dask_internals import get_memory_limit, stop_profiler

logger = logging.getLogger(__name__)

# Environment of the workers, in bytes. Dask has its workers return freed memory to the
# system at once, so that every buffer of a transfer consists of fresh pages; to map them
# takes longer than the transfer.
MALLOC_ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": 32 << 20,
    "MALLOC_MMAP_THRESHOLD_": 4 << 20,
}
# From the one version of Python on, and before the other, Dask's profiler can freeze a worker for
# good: sys._current_frames() holds a lock of the interpreter while it allocates, which may start a
# garbage collection, which may release the GIL to a thread that, holding it, waits for this lock,
# as each thread does that starts another or ends (python/cpython#106883).
PROFILER_FREEZES_FROM, PROFILER_FREEZES_BEFORE = (3, 11), (3, 11, 12)
# What the threads of a worker would import first, several at the same time: Arrow imports pandas
# with its first conversion of an array.
FIRST_IMPORTS = ("pandas",)


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


def prepare_workers(client: Client) -> None:
    """Prepare the workers of a cluster for tasks, those that join later included.

    Parameters
    ----------
    client : Client
        Of the cluster.
    """
    try:
        client.register_plugin(WorkerPreparation())
    except OSError as error:
        logger.debug("a worker has just died, another will be prepared in its place: %s", error)
    except Exception as error:
        # A scheduler that accepts no plugins answers with whatever error its Python raises. The
        # run works without this, but for a rare chance that a worker freezes.
        logger.warning("the workers are not prepared: %s", error)


class WorkerPreparation(WorkerPlugin):
    """Worker plugin without which threads of a worker could block each other.

    Its profiler is stopped where that can freeze it, and modules are imported while it has no
    task. Garbage collections then leave out what modules hold, if the worker is alone in its
    process, as one with a nanny is.
    """

    name = "spxdask-preparation"

    def setup(self, worker: Any) -> None:
        """Prepare a worker.

        Parameters
        ----------
        worker : distributed.Worker
            The worker that the plugin is registered on.
        """
        if PROFILER_FREEZES_FROM <= sys.version_info < PROFILER_FREEZES_BEFORE:
            stop_profiler(worker)
        for module in FIRST_IMPORTS:
            importlib.import_module(module)
        # It looks through all modules once, which pickling an error would make it do. A thread that
        # asks meanwhile may get no answer, on which astropy's modules cannot be imported.
        inspect.getmodule(inspect.currentframe())
        if worker.nanny and not gc.get_freeze_count():
            gc.freeze()

    def teardown(self, worker: Any) -> None:
        """Let the process of a worker that is closed end at once.

        Parameters
        ----------
        worker : distributed.Worker
            The worker.
        """
        # Otherwise, Python would look through all that has been imported since, which takes a
        # second.
        if worker.nanny and worker.status is Status.closing:
            gc.freeze()


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
