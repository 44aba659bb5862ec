"""The Dask side: an embedded cluster when none is given, and tasks a window at a time."""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dask.delayed import Delayed
from distributed import Client, LocalCluster, as_completed

from spxdask.config import BatchConfig
from spxdask.errors import InputError

DASHBOARD_PORT = 8787
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
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise InputError(_NEEDS_GUARD)
    processes = max(1, min(config.max_extract_workers, available_cores()))
    try:
        cluster = LocalCluster(
            n_workers=processes,
            threads_per_worker=1 + math.ceil(config.max_download_workers / processes),
            processes=True,
            host="127.0.0.1",
            dashboard_address=f"127.0.0.1:{_free_port(DASHBOARD_PORT)}",
        )
    except RuntimeError as error:
        raise InputError(f"the worker processes did not start ({error}); {_NEEDS_GUARD}") from error
    with cluster, Client(cluster) as client:
        yield client


def available_cores() -> int:
    """Return the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def connect(address: str) -> Client:
    """Connect to the scheduler at an address.

    Raises
    ------
    InputError
        If there is none.
    """
    try:
        return Client(address, timeout="20s")
    except (OSError, ValueError, TimeoutError) as error:
        raise InputError(f"no Dask scheduler at {address!r}: {error}") from error


def run_window(
    client: Client, tasks: Iterator[tuple[Any, Delayed]], window: int
) -> Iterator[tuple[Any, Any]]:
    """Run delayed tasks, at most `window` of them at once.

    The bound is kept on this side, so it holds however many workers come and go, and
    results are let go as soon as they are here.

    Parameters
    ----------
    client : Client
    tasks : iterator of (item, Delayed)
        Taken from only as fast as tasks end.
    window : int

    Yields
    ------
    item, result
        As tasks end. The result is the exception of a task that raised one.
    """
    tasks = iter(tasks)
    items = {}
    running = as_completed(loop=client.loop)

    def submit() -> None:
        for item, task in tasks:
            future = client.compute(task, optimize_graph=False)
            items[future.key] = item
            running.add(future)
            return

    try:
        for _ in range(window):
            submit()
        for future in running:
            item = items.pop(future.key)
            failed = future.status != "finished"
            result = future.exception() if failed else future.result()
            future.release()
            submit()
            yield item, result
    finally:
        for future in list(running.futures):
            future.cancel()


def run_one(client: Client, task: Delayed) -> Any:
    """Run one delayed task and return its result."""
    return client.compute(task, optimize_graph=False).result()


def _free_port(port: int) -> int:
    """Return `port` if nothing listens on it, else 0 for any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return 0
    return port
