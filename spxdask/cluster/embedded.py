"""A cluster of this machine's size, started when the user gives none."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

import dask
from distributed import Client, LocalCluster

from spxdask.cluster.limits import (
    count_cores,
    count_fitting_workers,
    read_cpu_quota,
    read_memory_limit,
)
from spxdask.cluster.page import choose_dashboard_port
from spxdask.cluster.workers import MALLOC_ENVIRONMENT, keep_local_workers
from spxdask.errors import InputError
from spxdask.science.compiled import prepare_cache

_GUARD_ADVICE = (
    "worker processes import the script that starts them: in a script, put what it does under "
    "if __name__ == '__main__':"
)


@contextmanager
def embedded_client(
    *,
    max_processes: int,
    n_downloads: int,
    make_cluster: Callable[..., LocalCluster] = LocalCluster,
) -> Iterator[Client]:
    """Start a cluster on this machine, and close it when the block ends.

    It has one process per core, as extraction keeps a core busy, and no more than there is
    memory for. Each has as many more threads as are needed for its share of the downloads,
    which only wait.

    Parameters
    ----------
    max_processes : int
        Processes to start at most; there are never more than this process may use cores.
    n_downloads : int
        Frames that are downloaded at the same time in the whole cluster.
    make_cluster : callable, optional
        What starts the cluster; it is called with the keywords of `LocalCluster`.

    Yields
    ------
    Client

    Raises
    ------
    InputError
        If the workers do not start, or this process is itself a worker that imports the
        script of a user.
    """
    require_main_guard()
    memory_bytes = read_memory_limit()
    fitting = count_fitting_workers(count_cores(), read_cpu_quota(), memory_bytes)
    processes = min(max_processes, fitting)
    environment = dict(os.environ)
    settings = {
        f"distributed.nanny.pre-spawn-environ.{name}": value
        for name, value in (MALLOC_ENVIRONMENT | prepare_cache()).items()
    }

    def start() -> LocalCluster:
        return make_cluster(
            n_workers=processes,
            threads_per_worker=1 + math.ceil(n_downloads / processes),
            processes=True,
            memory_limit=int(memory_bytes / processes),
            silence_logs=logging.ERROR,
            host="127.0.0.1",
            dashboard_address=f"127.0.0.1:{choose_dashboard_port()}",
        )

    try:
        with dask.config.set(settings), _block_interrupts():
            try:
                cluster = start()
            except RuntimeError:
                # A worker may have died while it started; a second failure is no accident.
                cluster = start()
    except RuntimeError as error:
        raise InputError(
            f"the worker processes did not start ({error}); {_GUARD_ADVICE}"
        ) from error
    finally:
        # Dask sets thread counts for its workers, and leaves them set in this process.
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
    with cluster, Client(cluster) as client, keep_local_workers(cluster):
        yield client


def require_main_guard() -> None:
    """Raise InputError in a worker process that is still importing the script of a user."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise InputError(_GUARD_ADVICE)


@contextmanager
def _block_interrupts() -> Iterator[None]:
    """Start processes in the block that never receive a Ctrl-C.

    A terminal sends it to all of its processes; this one decides what happens to the others.
    """
    # The tracker unblocks interrupts when it starts, so it must be there before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
