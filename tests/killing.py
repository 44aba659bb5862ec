"""Commands that a test can kill, and ways to let a worker die or wait at a chosen point.

As a Dask preload (see `hold`), this module also lets the workers of a whole command wait.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path

import psutil
from distributed import WorkerPlugin

# Where a worker can be made to die or wait: a module, and a function in it.
POINTS = {
    "begin": ("spxdask.stages.stream", "fetch_frame"),
    "fetch": ("spxdask.stages.download", "verify"),
    "extract": ("spxdask.stages.extract", "measure_catalogue"),
    "read": ("spxdask.stages.light_curves", "read_lines"),
    "transfer": ("distributed.shuffle._shuffle", "DataFrameShuffleRun.add_partition"),
    "receive": ("distributed.shuffle._shuffle", "DataFrameShuffleRun._receive"),
    "unpack": ("distributed.shuffle._shuffle", "DataFrameShuffleRun.get_output_partition"),
    "write": ("spxdask.storage.local", "_write_small"),
    # Between a whole temporary file and its name.
    "name": ("os", "replace"),
}
HOLD, HELD = "SPXDASK_TEST_HOLD", "SPXDASK_TEST_HELD"


class Command:
    """A command in a session of its own, as if started from another terminal."""

    def __init__(self, *arguments: str, log: Path, **environment: str) -> None:
        self.out, self.err = log.with_suffix(".out"), log.with_suffix(".err")
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=os.environ | environment,
                start_new_session=True,
            )
        self.pid = self.process.pid

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        for process in self.other_processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    @property
    def stderr(self) -> str:
        """What the command has written to its standard error."""
        return self.err.read_text(encoding="utf-8", errors="replace")

    def other_processes(self) -> list[psutil.Process]:
        """Return the processes of the session except the command itself."""
        found = []
        for pid in psutil.pids():
            with suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
                if pid != self.pid and os.getsid(pid) == self.pid:
                    found.append(psutil.Process(pid))
        return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def workers(self) -> list[psutil.Process]:
        """Return the processes of Dask workers and nannies that the command started."""
        found = []
        for process in self.other_processes():
            with suppress(psutil.NoSuchProcess):
                if "spawn_main" in " ".join(process.cmdline()):
                    found.append(process)
        return sorted(found, key=lambda worker: worker.pid)

    def interrupt(self) -> None:
        """Send SIGINT to all processes of the session, as a terminal does upon Ctrl-C."""
        os.killpg(self.pid, signal.SIGINT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self, timeout: float) -> int | None:
        """Return the exit status, or None if the command still runs after `timeout` seconds."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def left_behind(self, timeout: float = 10.0) -> list[psutil.Process]:
        """Return the processes of the session that still run after `timeout` seconds."""
        return psutil.wait_procs(self.other_processes(), timeout)[1]


def patch(point: str, make: Callable[[Callable], Callable]) -> None:
    """Replace the function at a point of this process by what `make` returns for it."""
    module, name = POINTS[point]
    home: object = import_module(module)
    *outer, name = name.split(".")
    for part in outer:
        home = getattr(home, part)
    setattr(home, name, make(getattr(home, name)))


def harm(how: str) -> None:
    """Do to this process, in the calling thread, what a run must survive."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "gil":
        # Functions that are called in this way keep the GIL.
        ctypes.PyDLL(None).sleep(100_000)
    else:
        assert how == "hang"
        threading.Event().wait()


def die_once(point: str, marker: str, calls: int, inside: str = "", how: str = "kill") -> None:
    """Let this process kill itself at the n-th call of a function, unless another already did.

    The first process creates the file `marker`. Only calls count that have `inside` in the text
    of their arguments. In place of being killed, it may come to another harm.
    """
    lock = threading.Lock()
    left = calls

    def make(function: Callable) -> Callable:
        def call(*arguments, **options):
            nonlocal left
            if inside in str(arguments):
                with lock:
                    left -= 1
                    if left == 0:
                        with suppress(FileExistsError):
                            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                            harm(how)
            return function(*arguments, **options)

        return call

    patch(point, make)


class DieOfFrame(WorkerPlugin):
    """Kills every worker that reaches a point with a certain frame."""

    name = "die-of-frame"

    def __init__(self, point: str, filename: str) -> None:
        self.point, self.filename = point, filename

    def setup(self, worker) -> None:
        def make(function: Callable) -> Callable:
            def call(first, *arguments, **options):
                if first.filename == self.filename:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(first, *arguments, **options)

            return call

        patch(self.point, make)


class RecordFetches(WorkerPlugin):
    """Appends a line to a file when a fetch begins and when it ends, with the monotonic time."""

    name = "record-fetches"

    def __init__(self, path: Path) -> None:
        self.path = path

    def setup(self, worker) -> None:
        from spxdask.stages import download

        fetch, path = download.fetch_file, self.path

        def recorded(url, *arguments, **options):
            # Each line is a single write, so that lines of two processes do not mix.
            log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            name = f"{os.getpid()} {url.rpartition('/')[2]}"
            try:
                os.write(log, f"begin {time.monotonic()} {name}\n".encode())
                return fetch(url, *arguments, **options)
            finally:
                os.write(log, f"end {time.monotonic()} {name}\n".encode())
                os.close(log)

        if fetch.__name__ != "recorded":
            download.fetch_file = recorded


def hold(point: str, held: Path) -> dict[str, str]:
    """Return the environment in which workers report that they reached a point, and wait there.

    They report by a byte to the named pipe `held`.
    """
    return {
        "DASK_DISTRIBUTED__WORKER__PRELOAD": json.dumps([__name__]),
        "PYTHONPATH": str(Path(__file__).parent),
        HOLD: point,
        HELD: str(held),
    }


def dask_setup(worker) -> None:
    """Let a worker wait as `hold` describes. Dask calls this function by its name."""

    def make(function: Callable) -> Callable:
        def call(*arguments, **options):
            with open(os.environ[HELD], "wb") as held:
                held.write(b".")
            threading.Event().wait()

        return call

    patch(os.environ[HOLD], make)


@contextmanager
def held(path: Path) -> Iterator[Callable[[], None]]:
    """Make the pipe of `hold`; yield a function that returns when the first worker waits."""
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR)
    try:
        yield lambda: _read(pipe)
    finally:
        os.close(pipe)


def _read(pipe: int) -> None:
    assert os.read(pipe, 1) == b"."
