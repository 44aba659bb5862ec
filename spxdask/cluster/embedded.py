"""A cluster of this machine's size, started when the user gives none."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

import dask
from distributed import Client, LocalCluster

from spxdask.cluster.held_stderr import hold_stderr_back
from spxdask.cluster.limits import (
    count_cores,
    count_fitting_workers,
    read_cpu_quota,
    read_memory_limit,
)
from spxdask.cluster.page import choose_dashboard_port, ignore_taken_port
from spxdask.cluster.workers import MALLOC_ENVIRONMENT, keep_local_workers
from spxdask.errors import InputError
from spxdask.science.compiled import prepare_cache

logger = logging.getLogger(__name__)

# A worker without a heartbeat for this time is replaced, s. Where a cluster is not of one machine,
# the network may be to blame for it.
WORKER_TTL_S = 60.0

_GUARD_ADVICE = (
    "worker processes import the script that starts them: in a script, put what it does under "
    "if __name__ == '__main__':"
)
_COMMAND_ADVICE = (
    "start workers with the commands dask scheduler and dask worker, and name the scheduler with "
    "--scheduler"
)
_SESSION_ADVICE = "start a cluster, and pass its distributed.Client as client"


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
        If the workers do not start, or could not import the program that starts them.
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
    settings["distributed.scheduler.worker-ttl"] = f"{WORKER_TTL_S} s"
    # A process that is forked, as Dask may be configured, would not have this environment.
    settings["distributed.worker.multiprocessing-method"] = "spawn"

    def start() -> LocalCluster:
        return make_cluster(
            n_workers=processes,
            threads_per_worker=1 + math.ceil(n_downloads / processes),
            processes=True,
            memory_limit=int(memory_bytes / processes),
            # What goes wrong on workers is reported by the run.
            silence_logs=logging.ERROR if logger.isEnabledFor(logging.INFO) else logging.CRITICAL,
            host="127.0.0.1",
            dashboard_address=f"127.0.0.1:{choose_dashboard_port()}",
        )

    held = None
    try:
        with dask.config.set(settings), _block_interrupts(), ignore_taken_port():
            try:
                with hold_stderr_back() as held:
                    cluster = start()
            except RuntimeError as error:
                logger.debug("the worker processes did not start: %r", error)
                # Without a guard, they would fail again.
                if held is not None and _GUARD_ADVICE in held.text:
                    raise
                # A worker may have died while it started; a second failure is no accident.
                with hold_stderr_back() as held:
                    cluster = start()
    except RuntimeError as error:
        logger.debug("the worker processes did not start", exc_info=True)
        raise InputError(_describe_failure(error, held.text if held else "")) from None
    finally:
        # Dask sets thread counts for its workers, and leaves them set in this process.
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
    with (
        cluster,
        Client(cluster, set_as_default=False) as client,
        keep_local_workers(cluster),
    ):
        yield client


def require_main_guard() -> None:
    """Raise InputError where worker processes could not import the program that starts them.

    That is so in a worker process that is itself importing it, and for a program that is not in
    a file.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise InputError(_GUARD_ADVICE)
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    # What was started with -m is imported by name.
    if path is not None and getattr(main, "__spec__", None) is None and not os.path.exists(path):
        raise InputError(
            f"worker processes import the program that starts them, and {os.path.basename(path)} "
            "is not a file: save it as a script, with what it does under "
            "if __name__ == '__main__':"
        )


def _describe_failure(error: BaseException, stderr: str) -> str:
    """Return in a sentence why the workers did not start, with advice for whoever started them."""
    cause = error
    while (earlier := cause.__cause__ or cause.__context__) is not None:
        cause = earlier
    reason = str(cause) if isinstance(cause, RuntimeError) else f"{type(cause).__name__}: {cause}"
    advice = ""
    if reason.startswith("Nanny failed"):
        # The process has ended without a word to this one; what it wrote last is the reason.
        advice = f"; {_choose_advice()}"
        lines = [line.strip() for line in stderr.splitlines() if "error" in line.lower()]
        if lines and _GUARD_ADVICE not in lines[-1]:
            reason = lines[-1]
    return f"the worker processes did not start ({reason}){advice}"


def _choose_advice() -> str:
    """Return what can be done where this process was started as it was."""
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", None) or ""
    path = getattr(main, "__file__", None)
    if name.partition(".")[0] == "spxdask" or Path(path or "").stem == "spxdask":
        return _COMMAND_ADVICE
    return _SESSION_ADVICE if path is None else _GUARD_ADVICE


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
