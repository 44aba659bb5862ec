"""Clusters that make no progress: the user is told, and a run that cannot go on ends."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from distributed import CancelledError, Client, Future, Status

from spxdask.cluster.dask_internals import replace_closed_workers, run_coroutine
from spxdask.cluster.limits import WORKER_BYTES
from spxdask.errors import ClusterError
from spxdask.text import format_count

logger = logging.getLogger(__name__)


class StallTimes(NamedTuple):
    """After how many seconds without progress something is done.

    Attributes
    ----------
    poll_interval_s : float
        The cluster is looked at; again each time that this time has passed.
    report_s : float
        The user is told; again after twice that time, and so on.
    paused_s : float
        Workers that are paused are an error, if none runs a task.
    """

    poll_interval_s: float = 5.0
    report_s: float = 60.0
    paused_s: float = 30.0


class StallWatch:
    """Looks at a cluster whenever tasks have not made progress for some seconds.

    Parameters
    ----------
    client : Client
        Of the cluster.
    unit : str
        What the tasks make, in the singular.
    get_futures : callable
        Returns the futures to cancel when the run cannot go on.
    times : StallTimes
        When something is done.
    clock : callable
        Returns the time in seconds.

    Attributes
    ----------
    failure : str or None
        Why the run cannot go on.
    """

    def __init__(
        self,
        client: Client,
        unit: str,
        get_futures: Callable[[], Collection[Future]],
        times: StallTimes,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failure: str | None = None
        self._client, self._unit = client, unit
        self._get_futures = get_futures
        self._times, self._clock = times, clock
        self._advanced_s = clock()
        self._report_s = times.report_s
        self._paused_since_s: float | None = None

    def advance(self) -> None:
        """Note that there was progress."""
        self._advanced_s = self._clock()

    def poll(self) -> None:
        """Look at the cluster if there was no progress; set `failure` if it cannot go on."""
        stalled_s = self._clock() - self._advanced_s
        if stalled_s < self._times.poll_interval_s:
            self._paused_since_s = None
            return
        if self._client.cluster is not None and self._client.cluster.status == Status.running:
            run_coroutine(self._client.cluster, replace_closed_workers, self._client.cluster)
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        paused = [worker for worker in workers if worker["status"] == "paused"]
        self._check_paused(paused, len(workers), any(map(_is_busy, workers)))
        if self.failure is None and stalled_s >= self._report_s:
            self._report_s *= 2
            self._report(stalled_s, len(workers), len(paused))

    def _check_paused(self, paused: list[dict], n_workers: int, is_any_busy: bool) -> None:
        """Fail when no task has run for some time because workers are paused."""
        if not paused or is_any_busy:
            self._paused_since_s = None
            return
        now_s = self._clock()
        if self._paused_since_s is None:
            self._paused_since_s = now_s
        if now_s - self._paused_since_s < self._times.paused_s:
            return
        which = f"{len(paused)} of {n_workers} workers {'is' if len(paused) == 1 else 'are'}"
        if len(paused) == n_workers:
            which = f"all {n_workers} workers are" if n_workers > 1 else "the only worker is"
        limit = min(worker["memory_limit"] for worker in paused)
        self.failure = (
            f"no task runs any more, as {which} paused for lack of memory; one may use "
            f"{limit / 1e9:.2g} GB: give each worker {WORKER_BYTES / 1e9:.2g} GB or more, then "
            "run the same command again"
        )

    def _report(self, stalled_s: float, n_workers: int, n_paused: int) -> None:
        """Tell the user why there is no progress, if that is not just because tasks are long."""
        n_lost = self._count_lost(stalled_s)
        if n_lost:
            reason = f"{format_count(n_lost, 'worker')} {'was' if n_lost == 1 else 'were'} lost"
        elif not n_workers:
            reason = "the cluster has no workers"
        elif n_paused:
            reason = f"{n_paused} of {format_count(n_workers, 'worker')} paused for lack of memory"
        else:
            return
        logger.warning("no %s has ended for %.0f s: %s", self._unit, stalled_s, reason)

    def _count_lost(self, within_s: float) -> int:
        """Count the workers that the scheduler lost within the last seconds."""
        since = time.time() - within_s
        return sum(
            event.get("action") == "remove-worker" and not event.get("expected") and at >= since
            for at, event in self._client.get_events("all")
        )

    def run(self, is_over: threading.Event) -> None:
        """Look again and again, and cancel what the client waits for after a failure.

        Parameters
        ----------
        is_over : threading.Event
            Set when nobody waits any more.
        """
        while not is_over.wait(self._times.poll_interval_s):
            try:
                if self.failure is None:
                    self.poll()
                if self.failure is not None:
                    # The client may submit more tasks before it notices.
                    self._client.cancel(list(self._get_futures()))
            except Exception as error:
                # The scheduler may be gone, which those who wait for results find out, too.
                logger.debug("the cluster cannot be polled: %s", error)


def _is_busy(worker: dict) -> bool:
    """Return whether a worker runs a task."""
    counts = worker["metrics"].get("task_counts", {})
    return any(counts.get(state) for state in ("executing", "long-running"))


@contextmanager
def watch_stalls(
    client: Client,
    unit: str,
    get_futures: Callable[[], Collection[Future]],
    times: StallTimes | None = None,
) -> Iterator[Callable[[], None]]:
    """Have a thread tell the user when tasks make no progress, and why.

    Workers that a cluster of this process gave up are replaced.

    Parameters
    ----------
    client : Client
        Of the cluster.
    unit : str
        What the tasks make, in the singular.
    get_futures : callable
        Returns the futures that the block waits for, which are cancelled when it would wait
        without end.
    times : StallTimes, optional
        When something is done.

    Yields
    ------
    callable
        To be called when there was progress.

    Raises
    ------
    ClusterError
        In place of the error that futures are cancelled, if they were because workers have too
        little memory.
    """
    watch = StallWatch(client, unit, get_futures, times or StallTimes())
    is_over = threading.Event()
    thread = threading.Thread(target=watch.run, args=(is_over,), name="spxdask-stalls", daemon=True)
    thread.start()
    try:
        yield watch.advance
    except (ClusterError, CancelledError):
        if watch.failure is None:
            raise
        raise ClusterError(watch.failure) from None
    finally:
        is_over.set()
