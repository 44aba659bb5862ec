"""Commands to be killed, and ways to have a worker of theirs die or wait at a chosen point.

Named as a Dask preload (`PRELOAD`), this module also lets the workers of a whole command wait.
"""

from __future__ import annotations

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

# Where a worker can be made to die or wait: module, name in it, what to look at.
POINTS = {
    "begin": ("spxdask.stages.stream", "fetch_frame"),
    "fetch": ("spxdask.stages.download", "_open_verified"),
    "extract": ("spxdask.stages.extract", "measure_catalogue"),
    "read": ("spxdask.stages.aggregate", "read_lines"),
    "transfer": ("distributed.shuffle._shuffle", "DataFrameShuffleRun.add_partition"),
    "receive": ("distributed.shuffle._shuffle", "DataFrameShuffleRun._receive"),
    "unpack": ("distributed.shuffle._shuffle", "DataFrameShuffleRun.get_output_partition"),
    "write": ("spxdask.storage.local", "_write_small"),
    # Between a whole temporary file and its name.
    "name": ("os", "replace"),
}
HOLD, HELD = "SPXDASK_TEST_HOLD", "SPXDASK_TEST_HELD"


class Command:
    """A command in a session of its own, as in a terminal of its own."""

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
        for other in self.others():
            with suppress(psutil.NoSuchProcess):
                other.kill()

    @property
    def said(self) -> str:
        return self.err.read_text(encoding="utf-8", errors="replace")

    def others(self) -> list[psutil.Process]:
        """Return the processes of the session but the first."""
        found = []
        for pid in psutil.pids():
            with suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
                if pid != self.pid and os.getsid(pid) == self.pid:
                    found.append(psutil.Process(pid))
        return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def workers(self) -> list[psutil.Process]:
        """Return the Dask workers that the command started."""
        found = []
        for other in self.others():
            with suppress(psutil.NoSuchProcess):
                if "spawn_main" in " ".join(other.cmdline()):
                    found.append(other)
        return sorted(found, key=lambda worker: worker.pid)

    def interrupt(self) -> None:
        """Send what a terminal sends to all when somebody types Ctrl-C."""
        os.killpg(self.pid, signal.SIGINT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self, timeout: float) -> int | None:
        """Return the exit status, None when it runs on."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def left_behind(self, timeout: float = 10.0) -> list[psutil.Process]:
        """Return the processes of the session that do not go away by themselves."""
        return psutil.wait_procs(self.others(), timeout)[1]


def patch(point: str, make: Callable[[Callable], Callable]) -> None:
    """Replace a function of this process by what `make` makes of it."""
    module, name = POINTS[point]
    home: object = import_module(module)
    *outer, name = name.split(".")
    for part in outer:
        home = getattr(home, part)
    setattr(home, name, make(getattr(home, name)))


def die_once(point: str, marker: str, calls: int, inside: str = "") -> None:
    """Have this process kill itself at the n-th call of a function, if none has yet.

    Only calls with `inside` in an argument's text count.
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
                            os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    patch(point, make)


class Deadly(WorkerPlugin):
    """Have every worker die of a frame, whoever tries."""

    name = "deadly"

    def __init__(self, point: str, filename: str) -> None:
        self.point, self.filename = point, filename

    def setup(self, worker) -> None:
        def make(function: Callable) -> Callable:
            def call(first, *arguments):
                if first.filename == self.filename:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(first, *arguments)

            return call

        patch(self.point, make)


class Fetches(WorkerPlugin):
    """Notes when each fetch of a worker begins and ends, on the clock of the machine."""

    name = "fetches"

    def __init__(self, path: Path) -> None:
        self.path = path

    def setup(self, worker) -> None:
        from spxdask.stages import download

        fetch, path = download.fetch_file, self.path

        def noted(url, *arguments, **options):
            # One write each, so that lines of two processes do not mix.
            log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            name = f"{os.getpid()} {url.rpartition('/')[2]}"
            try:
                os.write(log, f"begin {time.monotonic()} {name}\n".encode())
                return fetch(url, *arguments, **options)
            finally:
                os.write(log, f"end {time.monotonic()} {name}\n".encode())
                os.close(log)

        if fetch.__name__ != "noted":
            download.fetch_file = noted


def hold(point: str, held: Path) -> dict[str, str]:
    """Return the environment in which workers wait at a point for ever, and say so."""
    return {
        "DASK_DISTRIBUTED__WORKER__PRELOAD": json.dumps([__name__]),
        "PYTHONPATH": str(Path(__file__).parent),
        HOLD: point,
        HELD: str(held),
    }


def dask_setup(worker) -> None:
    """Prepare a worker as `hold` says; Dask calls it."""

    def make(function: Callable) -> Callable:
        def call(*arguments, **options):
            # A pipe that the test reads: it knows without looking again and again.
            with open(os.environ[HELD], "wb") as held:
                held.write(b".")
            threading.Event().wait()

        return call

    patch(os.environ[HOLD], make)


@contextmanager
def held(path: Path) -> Iterator[Callable[[], None]]:
    """Give a function that returns when the first worker waits."""
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR)
    try:
        yield lambda: _read(pipe)
    finally:
        os.close(pipe)


def _read(pipe: int) -> None:
    assert os.read(pipe, 1) == b"."
