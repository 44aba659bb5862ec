"""The Dask side: an embedded cluster when none is given, and tasks a window at a time."""

from __future__ import annotations

import importlib
import json
import logging
import math
import multiprocessing
import os
import pydoc
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, ClassVar

import dask
from dask import delayed
from dask.delayed import Delayed
from distributed import (
    CancelledError,
    Client,
    Future,
    KilledWorker,
    LocalCluster,
    WorkerPlugin,
    as_completed,
    get_worker,
)
from distributed.threadpoolexecutor import ThreadPoolExecutor

from spxdask import __version__
from spxdask.config import BatchConfig
from spxdask.errors import ClusterError, InputError, SpxdaskError

logger = logging.getLogger(__name__)

DASHBOARD_PORT = 8787
CONNECT_TIMEOUT = "20s"
REGISTER_ATTEMPTS = 5
# Memory that a thread needs at the most to read tables for a shuffle, or to write light
# curves, with what the shuffle itself has.
SHUFFLE_BYTES = 600_000_000
# How the names of plugins for it begin.
READY = "spxdask-ready-"
# A window is refilled when such a part of it is free.
BATCHES = 16
# What is in flight when a run is stopped is waited for this long; a client that closes
# its cluster needs some seconds more.
LAST_SECONDS = 2.5
# Dask has its workers give freed memory back at once, so that every buffer of a transfer
# comes as fresh pages, which takes longer than the transfer.
KEEP_FREED_MEMORY = {
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": 32 << 20,
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": 4 << 20,
}
_NEEDS_GUARD = (
    "worker processes import the script that starts them: in a script, put what it does under "
    "if __name__ == '__main__':"
)


@contextmanager
def embedded_client(config: BatchConfig) -> Iterator[Client]:
    """Start a cluster of this machine's size, and close it when the block ends.

    One process a core, as extraction holds a core; each with threads to spare for its
    share of the downloads, which only wait.
    """
    require_main_guard()
    processes = max(1, min(config.max_extract_workers, available_cores()))
    environment = dict(os.environ)

    def start() -> LocalCluster:
        return LocalCluster(
            n_workers=processes,
            threads_per_worker=1 + math.ceil(config.max_download_workers / processes),
            processes=True,
            silence_logs=logging.ERROR,
            host="127.0.0.1",
            dashboard_address=f"127.0.0.1:{free_port(DASHBOARD_PORT)}",
        )

    try:
        with dask.config.set(KEEP_FREED_MEMORY), _out_of_reach_of_interrupts():
            try:
                cluster = start()
            except RuntimeError:
                # A worker may have died as it began.
                cluster = start()
    except RuntimeError as error:
        raise InputError(f"the worker processes did not start ({error}); {_NEEDS_GUARD}") from error
    finally:
        # Dask sets thread counts for its workers, and leaves them set for this process.
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
    with cluster, Client(cluster) as client:
        yield client


def require_main_guard() -> None:
    """Raise InputError in a worker process that has yet to import the script behind it."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise InputError(_NEEDS_GUARD)


@contextmanager
def _out_of_reach_of_interrupts() -> Iterator[None]:
    """Let what is started meanwhile, and what that starts, never see a Ctrl-C.

    It goes to every process of a terminal; this one decides what becomes of the others.
    """
    # When it is started, this lets interrupts through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def available_cores() -> int:
    """Return the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def connect(scheduler: str) -> Client:
    """Connect to a scheduler.

    Parameters
    ----------
    scheduler : str
        Its address, such as ``tcp://10.0.0.5:8786``, or the file that it writes when it is
        started with ``--scheduler-file``.

    Raises
    ------
    InputError
        If there is none.
    """
    try:
        address = scheduler
        if "://" not in scheduler and os.path.isfile(scheduler):
            address = str(json.loads(Path(scheduler).read_text(encoding="utf-8"))["address"])
        return Client(address, timeout=CONNECT_TIMEOUT)
    except (OSError, ValueError, TypeError, KeyError, TimeoutError) as error:
        raise InputError(
            f"no Dask scheduler at {scheduler!r}, which is neither the address of one nor its "
            f"scheduler file: {error or type(error).__name__}"
        ) from error


def check_versions(client: Client) -> int:
    """Raise ClusterError unless every worker has the spxdask that this process has.

    Workers that come later are looked at by their tasks; see `error_as_value`.

    Returns
    -------
    int
        How many workers there are.
    """
    # A function of Python's own, which a worker without spxdask can run.
    found = client.run(pydoc.locate, "spxdask.__version__", on_error="return")
    for address, version in found.items():
        # One that died just now is no matter.
        if version != __version__ and not isinstance(version, OSError):
            raise _other_version(address, version)
    return len(found)


def _other_version(address: str, version: Any) -> ClusterError:
    has = f"spxdask {version}" if isinstance(version, str) else "no spxdask"
    return ClusterError(
        f"the worker {address} has {has}, this process spxdask {__version__}: install the same "
        "version for both"
    )


def run_window(
    client: Client, tasks: Iterator[tuple[Any, Delayed]], window: Callable[[], int]
) -> Iterator[tuple[Any, Any]]:
    """Run delayed tasks, so many of them at once as `window` says.

    The bound is kept on this side, so it holds however many workers come and go, and
    results are let go as soon as they are here.

    Parameters
    ----------
    client : Client
    tasks : iterator of (item, Delayed)
        Taken from only as fast as tasks end.
    window : callable
        Asked again each time a task ends, as a cluster may grow.

    Yields
    ------
    item, result
        As tasks end. The result is the exception of a task that raised one, or that it
        returned.

    Raises
    ------
    KeyboardInterrupt
        After one came: no task is begun any more, and those that end within
        `LAST_SECONDS` are still yielded.
    """
    items = {}
    running = as_completed(loop=client.loop)

    def fill() -> None:
        size = window()
        free = size - len(items)
        # Each call costs the scheduler as much as some tasks.
        if free < max(1, size // BATCHES) and items:
            return
        taken = list(islice(tasks, max(free, 0)))
        futures = client.compute([task for _, task in taken], optimize_graph=False)
        for (item, _), future in zip(taken, futures, strict=True):
            items[future.key] = item
            running.add(future)

    def ended(futures: list[Future]) -> list[tuple[Any, Any]]:
        if any(future.status == "cancelled" for future in futures):
            raise scheduler_lost_error(client)
        # All in one request, which waits for those that were lost with their worker since.
        try:
            results = client.gather(dict(enumerate(futures)), errors="skip")
        except OSError:
            raise scheduler_lost_error(client) from None
        pairs = []
        for number, future in enumerate(futures):
            if future.status == "cancelled":
                raise scheduler_lost_error(client)
            result = future.exception() if future.status == "error" else results[number]
            pairs.append((items.pop(future.key), result))
            future.release()
        return pairs

    try:
        fill()
        try:
            for futures in running.batches():
                pairs = ended(futures)
                fill()
                yield from pairs
        except KeyboardInterrupt:
            last = as_completed(list(running.futures), loop=client.loop, timeout=LAST_SECONDS)
            with suppress(TimeoutError):
                for futures in last.batches():
                    yield from ended(futures)
            raise
    finally:
        for future in list(running.futures):
            future.cancel()


def as_task(key: Any, function: Callable, *arguments: Any) -> Delayed:
    """Return a delayed call whose result is its error if it is one of ours."""
    call = delayed(error_as_value, pure=False)
    return call(function, *arguments, version=__version__, dask_key_name=key)


def run_one(client: Client, function: Callable, *arguments: Any, key: Any) -> Any:
    """Run one call on the cluster and return its result or raise its error."""
    task = as_task(key, function, *arguments)
    try:
        result = client.compute(task, optimize_graph=False).result()
    except CancelledError:
        raise scheduler_lost_error(client) from None
    except KilledWorker:
        raise ClusterError(
            "each worker that was to ask the archive died, of too little memory perhaps"
        ) from None
    if isinstance(result, SpxdaskError):
        raise result
    return result


def scheduler_lost_error(client: Client) -> ClusterError:
    """Return the error that says that a scheduler has left its client."""
    return ClusterError(
        f"the Dask scheduler at {client.scheduler.address} is gone; the same command goes on "
        "where this one was"
    )


def error_as_value(function: Callable, *arguments: Any, version: str = __version__) -> Any:
    """Call a function, and return the error if it raises one of ours.

    So errors travel: Dask would log them, with a traceback, where the user sees it. A client
    of another `version` than the worker's gets a ClusterError.
    """
    if version != __version__:
        return _other_version(get_worker().address, __version__)
    try:
        return function(*arguments)
    except SpxdaskError as error:
        return error


class ShuffleThreadLimit(WorkerPlugin):
    """Prepares a worker for a shuffle of a client.

    It imports what several threads would import at once; one could find dask.dataframe half
    imported by another, and fail. And it has the worker take up as few tasks at a time as its
    memory bears: it may have a hundred threads, to wait for downloads.
    """

    # Of workers that are prepared: what they had before, and for which plugins they are.
    _prepared: ClassVar[dict[str, tuple[tuple, set[str]]]] = {}

    def __init__(self, client: str) -> None:
        self.name = f"{READY}{client}-{uuid.uuid4().hex}"

    def setup(self, worker: Any) -> None:
        importlib.import_module("dask.dataframe")
        if worker.id in self._prepared:
            self._prepared[worker.id][1].add(self.name)
            return
        memory = worker.memory_manager.memory_limit or math.inf
        threads = int(max(1, min(worker.state.nthreads, memory // SHUFFLE_BYTES)))
        before = worker.state.nthreads, worker.executors["default"]
        self._prepared[worker.id] = before, {self.name}
        # A pool of its own, as memory that a thread has freed is there for this thread only.
        pool = ThreadPoolExecutor(threads, thread_name_prefix="Dask-Shuffle-Threads")
        worker.state.nthreads, worker.executors["default"] = threads, pool

    def teardown(self, worker: Any) -> None:
        before, users = self._prepared[worker.id]
        users.discard(self.name)
        if users:
            return
        del self._prepared[worker.id]
        pool = worker.executors["default"]
        worker.state.nthreads, worker.executors["default"] = before
        pool.shutdown(wait=False)


@contextmanager
def limit_shuffle_threads(client: Client) -> Iterator[None]:
    """Keep the workers ready for a shuffle, those that come meanwhile included."""
    plugin = ShuffleThreadLimit(client.id)
    for left in reversed(range(REGISTER_ATTEMPTS)):
        try:
            client.register_plugin(plugin)
            break
        except OSError:
            # A worker died just now.
            if not left:
                raise
    try:
        yield
    finally:
        # A scheduler that is gone needs no tidying, and would be waited for.
        if client.status == "running":
            client.unregister_worker_plugin(plugin.name)


def unregister_stale_plugins(client: Client) -> None:
    """Let workers have all their threads again that a client, killed in a shuffle, left ready."""
    try:
        names = client.run_on_scheduler(_left_ready)
    except Exception as error:
        # A scheduler may lack spxdask; the run does without.
        logger.debug("plugins of the scheduler are not known: %s", error)
        return
    for name in names:
        # Another run may have seen to it.
        with suppress(ValueError):
            client.unregister_worker_plugin(name)


def _left_ready(dask_scheduler: Any) -> list[str]:
    ready = [name for name in dask_scheduler.worker_plugins if name.startswith(READY)]
    return [n for n in ready if not any(n.startswith(READY + c) for c in dask_scheduler.clients)]


def busy_threads(client: Client) -> Callable[[], int]:
    """Return a window that keeps every thread of a cluster busy, and the next task at hand.

    The scheduler is asked at most once a second.
    """
    asked, window = -math.inf, 0

    def look() -> int:
        nonlocal asked, window
        if time.monotonic() - asked > 1.0:
            window = 2 * max(1, sum(client.nthreads().values()))
            asked = time.monotonic()
        return window

    return look


def free_port(port: int) -> int:
    """Return `port` if nothing listens on it, else 0 for any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return 0
    return port
