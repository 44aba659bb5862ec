"""Tasks on a cluster: one, or many with a bound on how many are in flight."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from dask import delayed
from dask.delayed import Delayed
from distributed import CancelledError, Client, Future, KilledWorker, as_completed, get_worker

from spxdask import __version__
from spxdask.cluster.connect import scheduler_lost_error, version_mismatch_error
from spxdask.cluster.stalls import StallTimes, watch_stalls
from spxdask.errors import ClusterError, SpxdaskError

# A window is filled up when this part of it is free, as each call costs the scheduler as
# much as some tasks.
REFILL_PART = 1 / 16
# After an interrupt, results are accepted for this many seconds. A client that closes its
# cluster needs some seconds more, and a user who pressed Ctrl-C waits.
INTERRUPT_GRACE_S = 2.5
# The scheduler is asked for its number of threads once in this many seconds at most.
THREAD_COUNT_INTERVAL_S = 1.0
# While nothing is in flight, the source of tasks is asked after pauses of this length, in seconds.
LEAST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 1.0


def as_task(key: Any, function: Callable, *arguments: Any) -> Delayed:
    """Return a delayed call whose result is its error if that is a SpxdaskError.

    Parameters
    ----------
    key : str or tuple
        Key of the task; the dashboard shows its first item.
    function : callable
        What the worker calls.
    *arguments
        With these arguments.

    Returns
    -------
    Delayed
    """
    call = delayed(error_as_value, pure=False)
    return call(function, *arguments, version=__version__, dask_key_name=key)


def error_as_value(function: Callable, *arguments: Any, version: str = __version__) -> Any:
    """Call a function, and return the error if it raises a SpxdaskError.

    An error that is raised would be logged by Dask, with a traceback, where the user sees it.

    Parameters
    ----------
    function : callable
        What is called.
    *arguments
        Its arguments.
    version : str
        Version of spxdask at the client. If the worker has another one, nothing is called.

    Returns
    -------
    object
        What the function returned, the SpxdaskError that it raised, or a ClusterError that
        names both versions.
    """
    if version != __version__:
        return version_mismatch_error(get_worker().address, __version__, version)
    try:
        return function(*arguments)
    except SpxdaskError as error:
        return error


def run_one(client: Client, function: Callable, *arguments: Any, key: Any) -> Any:
    """Run one call on the cluster.

    Parameters
    ----------
    client : Client
        Of the cluster.
    function : callable
        What a worker calls.
    *arguments
        With these arguments.
    key : tuple
        Key of the task; its first item names the task in messages.

    Returns
    -------
    object
        What the call returned.

    Raises
    ------
    SpxdaskError
        The error that the call raised.
    ClusterError
        If the scheduler is gone, or every worker that began the task died.
    """
    task = as_task(key, function, *arguments)
    try:
        result = client.compute(task, optimize_graph=False).result()
    except CancelledError:
        raise scheduler_lost_error(client) from None
    except KilledWorker:
        raise ClusterError(
            f"every worker that began the task {key[0]} died or hung, perhaps for lack of memory"
        ) from None
    if isinstance(result, SpxdaskError):
        raise result
    return result


def is_killed_worker(result: object) -> bool:
    """Return whether a task has no result because every worker that began it died.

    Parameters
    ----------
    result : object
        As `run_window` yields it.

    Returns
    -------
    bool
    """
    return isinstance(result, KilledWorker)


def run_window(
    client: Client,
    tasks: Iterator[tuple[Any, Delayed] | None],
    window: Callable[[], int],
    *,
    settle: Callable[[Any, Any], None] = lambda item, result: None,
    pause: Callable[[], float | None] = lambda: None,
    interrupt_grace_s: float = INTERRUPT_GRACE_S,
    stall_times: StallTimes | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Run delayed tasks, at most as many at the same time as `window` returns.

    The client counts the tasks in flight, so the bound holds however many workers join or
    leave. Results are released as soon as they have arrived.

    Parameters
    ----------
    client : Client
        Of the cluster.
    tasks : iterator of (item, Delayed) or None
        It is read only as fast as tasks end. None means that there is nothing to start now, but
        there may be later.
    window : callable
        Returns the bound; called whenever tasks have ended, as a cluster may grow.
    settle : callable
        Called with each item and its result before further tasks are read.
    pause : callable
        Returns for how many seconds there is nothing to start, None if nothing is held back.
    interrupt_grace_s : float
        After an interrupt, results are accepted for this many seconds.
    stall_times : StallTimes, optional
        After what time without progress something is done.

    Yields
    ------
    item, result
        In the order in which tasks end. The result of a task that raised an exception, or
        returned one, is that exception.

    Raises
    ------
    ClusterError
        If the scheduler is gone, or workers have too little memory.
    KeyboardInterrupt
        After an interrupt: no further task is submitted, and those that end within
        `interrupt_grace_s` are still yielded.
    """
    items: dict[Any, Any] = {}
    in_flight: dict[Any, Future] = {}
    running = as_completed(loop=client.loop)
    is_exhausted = False

    def read(number: int) -> Iterator[tuple[Any, Delayed]]:
        nonlocal is_exhausted
        for _ in range(number):
            try:
                task = next(tasks)
            except StopIteration:
                is_exhausted = True
                return
            if task is None:
                return
            yield task

    def list_in_flight() -> list[Future]:
        return list(in_flight.copy().values())

    def fill() -> None:
        size = window()
        free = size - len(in_flight)
        if in_flight and free < max(1, int(size * REFILL_PART)):
            return
        submitted = list(read(max(free, 0)))
        futures = client.compute([task for _, task in submitted], optimize_graph=False)
        for (item, _), future in zip(submitted, futures, strict=True):
            items[future.key] = item
            in_flight[future.key] = future
            running.add(future)

    def collect(futures: list[Future]) -> list[tuple[Any, Any]]:
        if any(future.status == "cancelled" for future in futures):
            raise scheduler_lost_error(client)
        # One request for all. It waits for results that were lost with their worker since.
        try:
            results = client.gather(dict(enumerate(futures)), errors="skip")
        except OSError:
            raise scheduler_lost_error(client) from None
        pairs = []
        for number, future in enumerate(futures):
            if future.status == "cancelled":
                raise scheduler_lost_error(client)
            result = future.exception() if future.status == "error" else results[number]
            del in_flight[future.key]
            pairs.append((items.pop(future.key), result))
            settle(*pairs[-1])
            future.release()
        return pairs

    try:
        with watch_stalls(
            client, "frame", lambda: in_flight.copy().values(), stall_times
        ) as advance:
            fill()
            try:
                while in_flight or not is_exhausted:
                    if not in_flight:
                        time.sleep(min(pause() or LEAST_PAUSE_S, LONGEST_PAUSE_S))
                        fill()
                        continue
                    futures = next(running.batches(), None)
                    if futures is None:
                        return
                    advance()
                    pairs = collect(futures)
                    # Workers are kept busy while results are processed, unless what they are to
                    # do depends on these.
                    if pause() is None:
                        fill()
                    yield from pairs
                    fill()
            except KeyboardInterrupt:
                rest = list(in_flight.values())
                last = as_completed(rest, loop=client.loop, timeout=interrupt_grace_s)
                with suppress(TimeoutError):
                    for futures in last.batches():
                        yield from collect(futures)
                raise
    finally:
        for future in in_flight.values():
            if future.status != "cancelled":
                future.cancel()


def make_thread_window(
    client: Client, *, interval_s: float = THREAD_COUNT_INTERVAL_S
) -> Callable[[], int]:
    """Return a window for `run_window` that keeps every thread of a cluster busy.

    Parameters
    ----------
    client : Client
        Of the cluster.
    interval_s : float
        The scheduler is asked for its threads once in this many seconds at most.

    Returns
    -------
    callable
        Returns twice the number of threads, so that each has its next task at hand.
    """
    ask = _ask_threads(client, interval_s)
    return lambda: 2 * max(1, sum(ask()))


def make_share(
    client: Client, total: int, *, interval_s: float = THREAD_COUNT_INTERVAL_S
) -> Callable[[], int]:
    """Return what tells the part of a number that each worker of a cluster may use.

    Parameters
    ----------
    client : Client
        Of the cluster.
    total : int
        What there is for the whole cluster.
    interval_s : float
        The scheduler is asked for its workers once in this many seconds at most.

    Returns
    -------
    callable
        Returns an equal part, at least 1.
    """
    ask = _ask_threads(client, interval_s)
    return lambda: max(1, total // max(1, len(ask())))


def _ask_threads(client: Client, interval_s: float) -> Callable[[], list[int]]:
    """Return what tells the number of threads of each worker, as it was a moment ago."""
    asked_at: float | None = None
    threads: list[int] = []

    def ask() -> list[int]:
        nonlocal asked_at, threads
        now = time.monotonic()
        if asked_at is None or now - asked_at > interval_s:
            threads = [*client.nthreads().values()]
            asked_at = now
        return threads

    return ask
