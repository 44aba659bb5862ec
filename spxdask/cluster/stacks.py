"""What a worker process is doing, kept ready for the moment when it cannot be asked any more."""

from __future__ import annotations

import faulthandler
import linecache
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distributed import Client, WorkerPlugin
from tornado.ioloop import PeriodicCallback

from spxdask.archive.limiter import REQUESTS
from spxdask.cluster.dask_internals import get_frames, get_process_id, get_task_threads

logger = logging.getLogger(__name__)

# What workers say of themselves in their heartbeats is under this name.
METRIC = "spxdask"
FILE_NAME = "spxdask-stacks.txt"
# A process that uses less than this part of a core does not compute; Dask's own threads need some.
# The system counts in hundredths of a second.
IDLE_CPU_PART, IDLE_CPU_S = 0.05, 0.02
# Where threads wait for a server that has time limits of its own.
SOCKET_FILES = ("/socket.py", "/ssl.py")
# Tasks in this code, or in that of spxdask, are those of a run.
SHUFFLE_CODE = os.path.join("distributed", "shuffle", "")
OWN_CODE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")
# Threads that wait here wait for requests, which are counted.
FETCHING_CODE = tuple(f"{OWN_CODE}archive/{name}.py" for name in ("transfer", "pieces"))


class Place(NamedTuple):
    """Where in the code a thread is."""

    file: str
    function: str
    line: int


# The innermost place comes first.
Stack = tuple[Place, ...]


class Look(NamedTuple):
    """What the threads of a process are doing at a moment.

    Attributes
    ----------
    tasks : dict of object to Stack
        By the key of each task that runs.
    sender : Stack
        The thread that makes the requests to the archive; empty if there is none.
    others : tuple of Stack
        The other threads.
    n_requests : int
        Requests to the archive that are under way or will be made.
    cpu_s : float
        What all threads but the event loop's have used of a core until now, s.
    is_at_disk : bool
        Whether a thread waits for a disk.
    """

    tasks: dict[Any, Stack]
    sender: Stack = ()
    others: tuple[Stack, ...] = ()
    n_requests: int = 0
    cpu_s: float = 0.0
    is_at_disk: bool = False

    @property
    def is_waiting(self) -> bool:
        """Whether a thread waits for a disk, a server, or another process.

        Returns
        -------
        bool
        """
        if self.is_at_disk or any(map(_waits_for_others, (*self.tasks.values(), *self.others))):
            return True
        # An event loop that is not in `select` does not notice what comes, nor when time is over.
        is_listening = not self.sender or self.sender[0].function == "select"
        return self.n_requests > 0 and is_listening

    def has_moved(self, since: Look, elapsed_s: float, *, is_shared: bool = True) -> bool:
        """Return whether the tasks have done something, or may be waiting, or are not to be judged.

        Parameters
        ----------
        since : Look
            The look before.
        elapsed_s : float
            How long ago that was, s.
        is_shared : bool
            Whether others use the cluster, too, whose tasks may wait for anything.

        Returns
        -------
        bool
        """
        return (
            not self.tasks
            or (self.tasks, self.sender) != (since.tasks, since.sender)
            or abs(self.cpu_s - since.cpu_s) > IDLE_CPU_PART * elapsed_s + IDLE_CPU_S
            or self.is_waiting
            or (is_shared and not all(map(_is_of_run, self.tasks.values())))
        )


def _waits_for_others(stack: Stack) -> bool:
    """Return whether a thread waits for what other processes do, requests of frames excepted."""
    if stack and (stack[0].file.endswith(SOCKET_FILES) or _asks_for_lock(stack[0])):
        return True
    waits = [place.file for place in stack if place.function == "sync"]
    if any(file.endswith("distributed/utils.py") for file in waits):
        return True
    is_fetching = any(place.file in FETCHING_CODE for place in stack)
    return not is_fetching and any(file.endswith("fsspec/asyn.py") for file in waits)


def _asks_for_lock(place: Place) -> bool:
    """Return whether a file is locked there, as by the process that compiles for all others."""
    line = linecache.getline(place.file, place.line)
    return "flock(" in line or "lockf(" in line


def _is_of_run(stack: Stack) -> bool:
    return any(place.file.startswith(OWN_CODE) or SHUFFLE_CODE in place.file for place in stack)


def look(tasks: Mapping[int, Any]) -> Look:
    """Look at the threads of this process.

    Parameters
    ----------
    tasks : mapping of int to object
        The keys of the tasks by the thread that runs each.

    Returns
    -------
    Look
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found: dict[Any, Stack] = {}
    sender: Stack = ()
    others: list[Stack] = []
    for ident, frame in get_frames().items():
        stack = tuple(
            Place(each.f_code.co_filename, each.f_code.co_name, line)
            for each, line in traceback.walk_stack(frame)
        )
        if ident in tasks:
            found[tasks[ident]] = stack
        elif names.get(ident) == "fsspecIO":
            sender = stack
        elif ident != threading.get_ident():
            others.append(stack)
    cpu_s, is_at_disk = _read_own_threads()
    return Look(found, sender, tuple(others), REQUESTS.n_expected, cpu_s, is_at_disk)


def _read_own_threads() -> tuple[float, bool]:
    """Return what other threads have used of a core, in s, and whether one waits for a disk."""
    ticks, is_at_disk = 0, False
    try:
        for path in Path("/proc/self/task").iterdir():
            if path.name == str(threading.get_native_id()):
                continue
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                # The thread has just ended.
                continue
            is_at_disk |= fields[0] == "D"
            ticks += int(fields[11]) + int(fields[12])
    except OSError:
        # Not Linux.
        return time.process_time(), False
    return ticks / os.sysconf("SC_CLK_TCK"), is_at_disk


class StackKeeper(WorkerPlugin):
    """Has a worker say in each heartbeat how long its tasks have not moved, and who it is.

    If its event loop does not run for some time, the stacks of all threads are written to a file
    in its folder, by a thread that needs neither the event loop nor Python's lock.

    Parameters
    ----------
    interval_s : float
        The tasks are looked at, and the time begins again, each time that this has passed, s.
    dump_s : float
        The time after which the stacks are written, s.
    is_shared : bool
        As that of `Look.has_moved`.
    """

    name = "spxdask-stacks"

    def __init__(self, interval_s: float, dump_s: float, is_shared: bool) -> None:
        self._interval_s, self._dump_s, self._is_shared = interval_s, dump_s, is_shared
        # A worker in the client's process could not be replaced.
        self._client_process = (socket.gethostname(), os.getpid())
        self._file: int | None = None
        self._beat: PeriodicCallback | None = None
        self._last = Look({})
        self._looked_s = 0.0
        self._still_s = 0.0
        self._longest_s = 0.0
        # How long each task has run so far, without the time in which it may have waited.
        self._run_s: dict[Any, float] = {}

    def setup(self, worker: Any) -> None:
        """Begin.

        Parameters
        ----------
        worker : distributed.Worker
            The worker that the plugin is registered on.
        """
        process = (socket.gethostname(), os.getpid())
        if process == self._client_process:
            return
        try:
            path = os.path.join(worker.local_directory, FILE_NAME)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            logger.debug("stacks cannot be written: %s", error)
        self._looked_s = time.monotonic()

        def beat() -> None:
            self._arm()
            self._note(look(get_task_threads(worker)), time.monotonic())

        beat()
        self._beat = PeriodicCallback(beat, 1000 * self._interval_s)
        self._beat.start()
        worker.metrics[METRIC] = lambda _: {
            "host": process[0],
            "pid": process[1],
            "still_s": self._still_s,
            "longest_s": self._longest_s,
        }

    def teardown(self, worker: Any) -> None:
        """End it.

        Parameters
        ----------
        worker : distributed.Worker
            The worker that the plugin is registered on.
        """
        if self._beat is not None:
            self._beat.stop()
            worker.metrics.pop(METRIC, None)
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            os.close(self._file)

    def _arm(self) -> None:
        """Have the stacks written if this is not called again in time."""
        if self._file is None:
            return
        if os.fstat(self._file).st_size:
            # It did not run for some time, but does now.
            os.ftruncate(self._file, 0)
        faulthandler.dump_traceback_later(self._dump_s, file=self._file)

    def _note(self, now: Look, now_s: float) -> None:
        """Take note of what the tasks are doing."""
        # What is longer was not time of this process: it was stopped, or the machine slept.
        elapsed_s = min(now_s - self._looked_s, 2 * self._interval_s)
        self._looked_s = now_s
        has_moved = now.has_moved(self._last, elapsed_s, is_shared=self._is_shared)
        self._still_s = 0.0 if has_moved else self._still_s + elapsed_s
        self._last = now
        ended = [run_s for key, run_s in self._run_s.items() if key not in now.tasks]
        self._longest_s = max((self._longest_s, *ended))
        self._run_s = {
            key: self._run_s.get(key, 0.0) + (0.0 if now.is_waiting else elapsed_s)
            for key in now.tasks
        }


def keep_stacks(client: Client, interval_s: float, dump_s: float, *, is_shared: bool) -> None:
    """Prepare the workers of a cluster, now and in future, for the moment when one does not answer.

    Parameters
    ----------
    client : Client
        Of the cluster.
    interval_s, dump_s : float
        As those of `StackKeeper`.
    is_shared : bool
        As that of `Look.has_moved`.
    """
    try:
        client.register_plugin(StackKeeper(interval_s, dump_s, is_shared))
    except Exception as error:
        # A scheduler that accepts no plugins answers with whatever error its Python raises, and a
        # worker may die just now. The run works without stacks.
        logger.debug("workers do not keep their stacks ready: %s", error)


class Description(NamedTuple):
    """What can be seen of a process from outside.

    Attributes
    ----------
    pid : int
        Its number.
    is_stopped : bool
        Whether a signal has stopped it.
    text : str
        Its threads, and the stacks that it has left.
    """

    pid: int
    is_stopped: bool
    text: str


def describe_process(
    folder: str, pid: int | None = None, dask_worker: Any = None
) -> Description | None:
    """Describe a worker process of this machine that does not answer.

    Parameters
    ----------
    folder : str
        The local directory of the worker.
    pid : int, optional
        The process.
    dask_worker : distributed.Nanny, optional
        The nanny that this is called on, which knows the process.

    Returns
    -------
    Description or None
        None where there is no such process.
    """
    pid = pid if dask_worker is None else get_process_id(dask_worker)
    if pid is None:
        return None
    lines = _describe_threads_of(pid)
    is_stopped = bool(lines) and all(state[:1] in "Tt" for _, state in lines)
    threads = [f"    {name}: {state}" for name, state in lines] or ["    unknown"]
    try:
        stacks = (Path(folder) / FILE_NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        stacks = ""
    text = "\n".join(["threads, with their states:", *threads, "", stacks or "no stacks were left"])
    return Description(pid, is_stopped, text)


def _describe_threads_of(pid: int) -> list[tuple[str, str]]:
    """Return the name and state of each thread of a process, where the system tells them."""
    found = []
    try:
        for path in sorted(Path(f"/proc/{int(pid)}/task").iterdir(), key=lambda p: int(p.name)):
            status = (path / "status").read_text(errors="replace").splitlines()
            values = dict(line.split(":\t", 1) for line in status if ":\t" in line)
            try:
                where = (path / "wchan").read_text().strip("0\n")
            except OSError:
                where = ""
            name = f"{path.name} {values.get('Name', '')}"
            found.append((name, f"{values.get('State', '?')} {where}".strip()))
    except OSError:
        # Not Linux, or a thread has just ended.
        pass
    return found


def describe_threads() -> str:
    """Describe the threads of this process.

    Returns
    -------
    str
        The name and the stack of each, the innermost call last.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in get_frames().items()
        if ident != threading.get_ident()
    )
