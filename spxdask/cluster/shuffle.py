"""Shuffles: workers prepared for them, and their results computed in spite of lost workers."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar

from distributed import CancelledError, Client, KilledWorker, Status, WorkerPlugin, as_completed
from distributed.comm import CommClosedError

from spxdask.cluster.connect import scheduler_lost_error
from spxdask.cluster.dask_internals import (
    WorkerThreads,
    count_planned_workers,
    get_adapt_limits,
    get_client_ids,
    get_memory_limit,
    get_threads,
    get_worker_plugin_names,
    is_shuffle_disk_full,
    is_shuffle_lost,
    make_threads,
    set_threads,
)
from spxdask.cluster.stalls import StallTimes, watch_stalls
from spxdask.errors import ClusterError, DiskFullError, SpxdaskError

if TYPE_CHECKING:
    # They are not imported at run time, because a scheduler imports this module without them.
    import dask.dataframe as dd
    import pandas as pd

logger = logging.getLogger(__name__)

# A shuffle is computed this many times before its loss is an error.
SHUFFLE_ATTEMPTS = 3
REGISTER_ATTEMPTS = 5
# Bytes that a thread needs at most to read or write a partition, together with what the
# shuffle itself keeps in memory.
BYTES_PER_THREAD = 600_000_000
# The names of the plugins that limit threads begin with this, then comes the client's id.
PLUGIN_PREFIX = "spxdask-shuffle-"


def compute_shuffle(
    client: Client,
    build_frame: Callable[[str], dd.DataFrame],
    *,
    attempts: int = SHUFFLE_ATTEMPTS,
    check: Callable[[], object] = lambda: None,
    on_result: Callable[[pd.DataFrame], object] = lambda _: None,
    on_restart: Callable[[], object] = lambda: None,
    stall_times: StallTimes | None = None,
) -> list[pd.DataFrame]:
    """Compute a data frame that contains a shuffle, again if it is lost with a worker.

    Dask repairs most shuffles itself, but there are moments when it does not. Meanwhile an
    adaptive cluster keeps its number of workers, and each worker runs as few tasks at the
    same time as its memory allows.

    Parameters
    ----------
    client : Client
        Of the cluster.
    build_frame : callable
        Called with a text that is new for each attempt, returns the data frame. All of its
        tasks must depend on that text, as Dask does not compute keys again that it knows.
        A partition may be a SpxdaskError in place of a pandas.DataFrame.
    attempts : int
        How many times the shuffle is computed at most.
    check : callable, optional
        Called when a partition has ended, before its result is looked at; may raise.
    on_result : callable, optional
        Called with each partition when it has ended.
    on_restart : callable, optional
        Called before each attempt but the first.
    stall_times : StallTimes, optional
        After what time without progress something is done.

    Returns
    -------
    list of pandas.DataFrame
        The partitions, in the order in which they ended.

    Raises
    ------
    SpxdaskError
        That a partition is, or that a task raised.
    DiskFullError
        If a worker has no room for what it receives.
    OSError
        Another that a task raised.
    ClusterError
        If the scheduler is gone, every worker that took one of the tasks died, or workers have
        too little memory.
    RuntimeError
        If the shuffle is lost at the last attempt.
    """
    # The graph of a shuffle is tied to the client that is current.
    with (
        client.as_current(),
        hold_worker_count(client),
        limit_shuffle_threads(client),
        _hide_announcements(),
    ):
        for attempt in range(1, attempts + 1):
            try:
                frame = build_frame(uuid.uuid4().hex)
                return _compute_partitions(client, frame, check, on_result, stall_times)
            except RuntimeError as error:
                if attempt == attempts or not is_shuffle_lost(error):
                    raise
                logger.warning("the shuffle was lost with a worker (%s); it starts again", error)
                on_restart()
            except OSError as error:
                if not is_shuffle_disk_full(error):
                    raise
                raise DiskFullError(
                    f"{os.strerror(errno.ENOSPC)} in {_list_worker_folders(client)}, where workers "
                    "keep temporary files: make room or set TMPDIR to another folder, then the "
                    "same command resumes the run"
                ) from error
    raise AssertionError


@contextmanager
def _hide_announcements() -> Iterator[None]:
    """Keep Dask, unless more is to be logged, from announcing each shuffle as a warning."""
    announcing = logging.getLogger("distributed.shuffle")
    level = announcing.level
    if not logger.isEnabledFor(logging.INFO):
        announcing.setLevel(logging.ERROR)
    try:
        yield
    finally:
        announcing.setLevel(level)


def _list_worker_folders(client: Client) -> str:
    """Name the folders of a cluster's workers for temporary files."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    folders = sorted({os.path.dirname(worker["local_directory"]) for worker in workers})
    return ", ".join(folders[:3]) or "the folders of the workers"


def _compute_partitions(
    client: Client,
    frame: dd.DataFrame,
    check: Callable[[], object],
    on_result: Callable[[pd.DataFrame], object],
    stall_times: StallTimes | None,
) -> list[pd.DataFrame]:
    """Compute a data frame once and return its partitions in the order in which they ended."""
    futures = client.compute(frame.to_delayed(optimize_graph=True), optimize_graph=False)
    results = []
    try:
        with watch_stalls(client, "partition", lambda: futures, stall_times) as advance:
            for _, result in as_completed(futures, with_results=True):
                check()
                if isinstance(result, SpxdaskError):
                    raise result
                if isinstance(result, CancelledError):
                    raise scheduler_lost_error(client)
                advance()
                results.append(result)
                on_result(result)
    except KilledWorker as error:
        raise ClusterError(
            "every worker that took one of the partitions died or hung, perhaps for lack of "
            "memory: run the same command again, with fewer threads or more memory per worker"
        ) from error
    except RuntimeError as error:
        # The error of a task is the cause of the error that the shuffle raises.
        cause = error.__cause__
        if isinstance(cause, SpxdaskError | OSError) and not isinstance(cause, CommClosedError):
            raise cause from None
        raise
    finally:
        client.cancel(futures)
    return results


@contextmanager
def hold_worker_count(client: Client) -> Iterator[None]:
    """Keep an adaptive cluster at its present number of workers, those still queued included.

    What a shuffle has brought to a worker is lost when the worker leaves, and must be
    brought again. Workers that are lost are replaced. Clusters that do not adapt are not
    changed.

    Parameters
    ----------
    client : Client
        Of the cluster.

    Yields
    ------
    None
    """
    cluster = client.cluster
    limits = get_adapt_limits(cluster)
    if limits is None:
        yield
        return
    count = max(count_planned_workers(cluster), 1)
    cluster.adapt(minimum=count, maximum=count)
    try:
        yield
    finally:
        if cluster.status == Status.running:
            cluster.adapt(**limits._asdict())


class ShuffleThreadLimit(WorkerPlugin):
    """Prepare a worker for a shuffle.

    The worker runs as few tasks at the same time as its memory allows; it may have a hundred
    threads that are there to wait for downloads. It also imports dask.dataframe, as one of
    several threads that import it at the same time may find it half imported, and fail.

    Parameters
    ----------
    client_id : str
        The client that computes the shuffle.
    """

    # By worker id: the threads before, and the names of the plugins that limit them.
    _limited: ClassVar[dict[str, tuple[WorkerThreads, set[str]]]] = {}

    def __init__(self, client_id: str) -> None:
        self.name = f"{PLUGIN_PREFIX}{client_id}-{uuid.uuid4().hex}"

    def setup(self, worker: Any) -> None:
        """Limit the threads of a worker, unless another shuffle has.

        Parameters
        ----------
        worker : distributed.Worker
            The worker.
        """
        importlib.import_module("dask.dataframe")
        if worker.id in self._limited:
            self._limited[worker.id][1].add(self.name)
            return
        before = get_threads(worker)
        self._limited[worker.id] = before, {self.name}
        fitting = get_memory_limit(worker) / BYTES_PER_THREAD
        n_threads = int(max(1, min(before.n_threads, fitting)))
        # New threads, as memory that a thread has freed is reused by that thread only.
        set_threads(worker, make_threads(n_threads, "Dask-Shuffle-Threads"))

    def teardown(self, worker: Any) -> None:
        """Give a worker its threads back after the last shuffle.

        Parameters
        ----------
        worker : distributed.Worker
            The worker.
        """
        before, plugins = self._limited[worker.id]
        plugins.discard(self.name)
        if plugins:
            return
        del self._limited[worker.id]
        limited = get_threads(worker)
        set_threads(worker, before)
        limited.pool.shutdown(wait=False)


@contextmanager
def limit_shuffle_threads(client: Client, *, attempts: int = REGISTER_ATTEMPTS) -> Iterator[None]:
    """Keep the workers prepared for a shuffle, those that join during the block included.

    Parameters
    ----------
    client : Client
        Of the cluster.
    attempts : int
        How many times to try, as a worker may die while it is prepared.

    Yields
    ------
    None
    """
    plugin = ShuffleThreadLimit(client.id)
    for attempt in range(1, attempts + 1):
        try:
            client.register_plugin(plugin)
            break
        except OSError:
            # A worker has just died; the scheduler soon knows.
            if attempt == attempts:
                raise
    try:
        yield
    finally:
        # Without a scheduler there is nothing to undo, and the call would wait for it.
        if client.status == "running":
            client.unregister_worker_plugin(plugin.name)


def unregister_stale_plugins(client: Client) -> None:
    """Give workers their threads back that a client took for a shuffle in which it was killed.

    Parameters
    ----------
    client : Client
        Of the cluster.
    """
    try:
        names = client.run_on_scheduler(_list_stale_plugins)
    except Exception as error:
        # A scheduler without spxdask answers with whatever error its Python raises on
        # unpickling the function. The run works without this.
        logger.debug("the scheduler's plugins cannot be listed: %s", error)
        return
    for name in names:
        # Another run may have unregistered it since.
        with suppress(ValueError):
            client.unregister_worker_plugin(name)


def _list_stale_plugins(dask_scheduler: Any) -> list[str]:
    """Return the plugins on a scheduler whose clients are not connected any more."""
    alive = tuple(PLUGIN_PREFIX + client for client in get_client_ids(dask_scheduler))
    names = get_worker_plugin_names(dask_scheduler)
    return [n for n in names if n.startswith(PLUGIN_PREFIX) and not n.startswith(alive)]
