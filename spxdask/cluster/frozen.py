"""Worker processes that are frozen, or whose tasks hang: they are reported and replaced."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from distributed import Client

from spxdask.cluster.dask_internals import run_in_time
from spxdask.cluster.stacks import (
    METRIC,
    Description,
    describe_process,
    describe_threads,
    keep_stacks,
)
from spxdask.errors import SpxdaskError
from spxdask.text import format_duration

logger = logging.getLogger(__name__)

# Parts of `FrozenTimes.silent_s`: an event loop that does not run leaves the stacks, and a worker
# that is silent is described, before it is replaced.
DUMP_PART, DESCRIBE_PART = 1 / 3, 1 / 2
# A worker that has not said anything of itself yet may be without a heartbeat so many times as
# long: it is still importing, be it from a slow disk that many others read at the same time.
STARTING_FACTOR = 3.0
# A nanny, or a worker whose heartbeats come, answers within this time, s.
ANSWER_S = 10.0
# A nanny waits for 4 s before it kills; a new process takes some seconds to start.
RESTART_S = 60.0


class FrozenTimes(NamedTuple):
    """After how many seconds a worker counts as frozen, or its tasks as hanging.

    Attributes
    ----------
    silent_s : float
        Without a heartbeat; three times as long if it has just been started.
    still_s : float
        In which no task of the worker has done anything, and none may have been waiting.
    still_factor : float
        So many times as long as the longest task so far, if that is more.
    poll_interval_s : float
        The cluster is looked at each time that this time has passed; the tasks, too.
    """

    silent_s: float = 180.0
    still_s: float = 180.0
    still_factor: float = 3.0
    poll_interval_s: float = 5.0


@dataclass
class _Heartbeats:
    """What is known of a worker.

    Attributes
    ----------
    last_seen : float
        When its last heartbeat came, by the clock of the scheduler.
    info : mapping
        What the scheduler knows of it.
    silent_s : float
        For how long there was none, s.
    is_described : bool
        Whether somebody was asked what its process looks like.
    description : Description or None
        The answer.
    is_reported : bool
        Whether the user was told.
    """

    last_seen: float
    info: Mapping[str, Any]
    silent_s: float = 0.0
    is_described: bool = False
    description: Description | None = None
    is_reported: bool = False


class FrozenWatch:
    """Looks for workers that do not answer or whose tasks hang, and has them replaced.

    Parameters
    ----------
    client : Client
        Of the cluster.
    times : FrozenTimes
        When something is done.
    save : callable
        Takes a name and a text, the stacks of a worker; saves it and returns where.
    clock : callable
        Returns the time in seconds.

    Attributes
    ----------
    n_replaced : int
        Number of workers that were.
    """

    def __init__(
        self,
        client: Client,
        times: FrozenTimes,
        save: Callable[[str, str], str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.n_replaced = 0
        self._client, self._times, self._save, self._clock = client, times, save, clock
        self._workers: dict[str, _Heartbeats] = {}
        self._polled_s = clock()

    def poll(self) -> None:
        """Look at the workers, and have those replaced that need it."""
        workers = self._client.scheduler_info(n_workers=-1)["workers"]
        now_s = self._clock()
        # In a longer time it was this process, or the scheduler, that did not run.
        elapsed_s = min(now_s - self._polled_s, 2 * self._times.poll_interval_s)
        self._polled_s = now_s
        for address in self._workers.keys() - workers.keys():
            self._report_gone(self._workers.pop(address))
        for address, info in workers.items():
            known = self._workers.get(address)
            if known is None or known.last_seen != info["last_seen"]:
                was_reported = known is not None and known.is_reported
                known = self._workers[address] = _Heartbeats(info["last_seen"], info)
                known.is_reported = was_reported and bool(_get_metric(info, "still_s"))
            else:
                known.silent_s += elapsed_s
        bad = [address for address in list(self._workers) if self._judge(address)]
        if bad:
            # Tried again at the next poll if the scheduler cannot be asked now.
            self._client.restart_workers(bad, timeout=RESTART_S, raise_for_error=False)

    def arm_workers(self, *, is_shared: bool) -> None:
        """Have the workers, now and in future, keep ready what is wanted when one is frozen.

        Parameters
        ----------
        is_shared : bool
            Whether others use the cluster, too; a worker that runs a task of theirs is not judged
            by its tasks.
        """
        interval_s, dump_s = self._times.poll_interval_s, DUMP_PART * self._times.silent_s
        keep_stacks(self._client, interval_s, dump_s, is_shared=is_shared)

    def find_description(self, address: str) -> Description | None:
        """Return what the process of a silent worker looks like.

        Parameters
        ----------
        address : str
            The worker.

        Returns
        -------
        Description or None
            None for a worker that is not silent, or not for long.
        """
        return self._workers[address].description

    def _judge(self, address: str) -> bool:
        """Describe and report a worker that is frozen; return whether it is to be replaced."""
        known, times, still_s = self._workers[address], self._times, self._find_longest_still()
        silent_s = times.silent_s * (1.0 if METRIC in known.info["metrics"] else STARTING_FACTOR)
        is_silent = known.silent_s >= DESCRIBE_PART * silent_s
        if is_silent and not known.is_described:
            known.is_described, known.description = True, self._describe(address, known.info)
        is_frozen = known.silent_s >= silent_s
        if not is_frozen and (is_silent or _get_metric(known.info, "still_s") < still_s):
            return False
        has_nanny = bool(known.info.get("nanny"))
        if not known.is_reported:
            known.is_reported = True
            self.n_replaced += has_nanny
            if is_frozen:
                problem, stacks = _describe_silence(known), _get_stacks(known)
            else:
                stacks = self._ask_for_stacks(address)
                problem = (
                    f"has tasks that hang: for {format_duration(still_s)} they have neither "
                    "computed nor waited for a server or a disk"
                )
            self._report(known, problem, stacks, has_nanny)
        return has_nanny

    def _find_longest_still(self) -> float:
        """Return for how long a worker's tasks may do nothing, by those that have ended."""
        longest = [_get_metric(known.info, "longest_s") for known in self._workers.values()]
        return max(self._times.still_s, self._times.still_factor * max(longest, default=0.0))

    def _describe(self, address: str, info: Mapping[str, Any]) -> Description | None:
        """Describe the process of a worker that does not answer."""
        folder = info["local_directory"]
        if info.get("nanny"):
            try:
                return run_in_time(
                    self._client,
                    describe_process,
                    folder,
                    worker=address,
                    timeout_s=ANSWER_S,
                    on_nanny=True,
                )
            except Exception as error:
                # The nanny may be frozen, too, or have ended, or its machine be gone.
                logger.debug("the nanny of %s does not answer: %s", address, error)
                return None
        said = info["metrics"].get(METRIC, {})
        is_here = said.get("host") == socket.gethostname()
        return describe_process(folder, said["pid"]) if is_here else None

    def _ask_for_stacks(self, address: str) -> str:
        try:
            return run_in_time(self._client, describe_threads, worker=address, timeout_s=ANSWER_S)
        except Exception as error:
            # It may have ended, or not answer any more.
            logger.debug("%s does not answer: %s", address, error)
            return f"the worker did not say what it does ({type(error).__name__})"

    def _report_gone(self, known: _Heartbeats) -> None:
        """Tell the user of a silent worker that the scheduler has had replaced, or removed."""
        if known.is_described and not known.is_reported:
            self.n_replaced += 1
            self._report(known, _describe_silence(known), _get_stacks(known), True)

    def _report(self, known: _Heartbeats, problem: str, stacks: str, is_replaced: bool) -> None:
        """Save the stacks of a worker, and tell the user about it."""
        said = known.info["metrics"].get(METRIC, {})
        pid = known.description.pid if known.description else said.get("pid")
        host = said.get("host") or known.info.get("host", "an unknown host")
        who = f"worker process {'' if pid is None else f'{pid} '}on {host}"
        title = f"{time.strftime('%Y-%m-%d %H:%M:%S')}: the {who} {problem}"
        try:
            where = self._save(f"{host}-{pid}", f"{title}\n\n{stacks}\n")
        except (OSError, SpxdaskError) as error:
            where = f"not saved ({error})"
        remedy = "it is replaced"
        if not is_replaced:
            remedy = "it has no nanny that could replace it: end it, and start another in its place"
        logger.warning("the %s %s: %s; what it was doing: %s", who, problem, remedy, where)

    def run(self, is_over: threading.Event) -> None:
        """Look again and again.

        Parameters
        ----------
        is_over : threading.Event
            Set when the cluster is not used any more.
        """
        while not is_over.wait(self._times.poll_interval_s):
            try:
                self.poll()
            except Exception as error:
                # The scheduler may be gone, which those who wait for results find out, too.
                logger.debug("the workers cannot be looked at: %s", error)


def _describe_silence(known: _Heartbeats) -> str:
    is_stopped = known.description is not None and known.description.is_stopped
    cause = ", as a signal has stopped it" if is_stopped else ""
    return f"has not answered for {format_duration(known.silent_s)}{cause}"


def _get_stacks(known: _Heartbeats) -> str:
    return "nothing is known of it" if known.description is None else known.description.text


def _get_metric(info: Mapping[str, Any], name: str) -> float:
    """Return a number that a worker has said of itself, 0 if it has not."""
    return float(info["metrics"].get(METRIC, {}).get(name, 0.0))


@contextmanager
def watch_frozen(
    client: Client, times: FrozenTimes, save: Callable[[str, str], str]
) -> Iterator[FrozenWatch]:
    """Have a thread look for frozen workers, tell the user of them, and have them replaced.

    Parameters
    ----------
    client : Client
        Of the cluster.
    times : FrozenTimes
        When something is done.
    save : callable
        As that of `FrozenWatch`.

    Yields
    ------
    FrozenWatch
    """
    watch, is_over = FrozenWatch(client, times, save), threading.Event()
    thread = threading.Thread(target=watch.run, args=(is_over,), name="spxdask-frozen", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        is_over.set()
