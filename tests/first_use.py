"""What fresh workers do first, recorded in them. They import this module, so it imports little."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

from distributed import Worker, WorkerPlugin

# The same in one process for all plugins.
_events: Counter[str] = Counter()


class RecordFirstUse(WorkerPlugin):
    """Count what threads import, and how often Python is asked where its threads are.

    To ask is safe while no garbage collection can begin; see `spxdask.cluster.workers`.
    On SIGUSR1, a worker writes its stacks into a file of the folder, even if it is frozen.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def setup(self, worker: Worker) -> None:
        self._file = open(self._folder / f"{os.getpid()}.stacks", "w")  # noqa: SIM115
        faulthandler.register(signal.SIGUSR1, file=self._file, all_threads=True)
        loop_thread = threading.get_ident()

        def record(event: str, arguments: tuple) -> None:
            if event == "sys._current_frames" and gc.isenabled():
                _events[event] += 1
            elif event == "import" and threading.get_ident() != loop_thread:
                _events[arguments[0].partition(".")[0]] += 1

        sys.addaudithook(record)


def get_events() -> dict[str, int]:
    """Return how often each package was imported from by a thread, and each event occurred."""
    return dict(_events)
