"""How soon Dask's profiler freezes a worker, and that a prepared worker is not frozen.

``python benchmarks/frozen_worker.py [ROUNDS]`` starts workers with as many threads as wait for
downloads. Four of them do what tasks do, but more often: they start threads, and leave garbage that
holds files. Python before 3.11.12 then waits for ever, in a minute or less, if a garbage collection
begins within `sys._current_frames`; see `spxdask.cluster.workers`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from itertools import count

from distributed import Client, LocalCluster

from spxdask.cluster.workers import prepare_workers

N_THREADS, N_BUSY = 24, 4
TASK_S, LATE_S = 30, 30


def main(rounds: int) -> None:
    """Print what became of each worker, without and with the preparation."""
    for is_prepared in (False, True):
        frozen = sum(_is_frozen(is_prepared) for _ in range(rounds))
        print(f"{'prepared' if is_prepared else 'unprepared'}: {frozen} of {rounds} were frozen")


def _is_frozen(is_prepared: bool) -> bool:
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=N_THREADS,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        if is_prepared:
            prepare_workers(client)
        tasks = client.map(_work, [TASK_S] * N_BUSY, pure=False)
        tasks += client.map(_wait, [TASK_S] * (N_THREADS - N_BUSY), pure=False)
        is_done = _are_done(tasks)
        if not is_done:
            # It would not end by itself.
            for worker in cluster.workers.values():
                os.kill(worker.pid, signal.SIGKILL)
        client.cancel(tasks)
        return not is_done


def _are_done(tasks: list) -> bool:
    """Wait for tasks as long as they may take, and say whether all have ended."""
    end = time.monotonic() + TASK_S + LATE_S
    while time.monotonic() < end and not all(task.done() for task in tasks):
        time.sleep(0.2)
    return all(task.done() for task in tasks)


def _until(seconds: float) -> Iterator[int]:
    end = time.monotonic() + seconds
    for number in count():
        if time.monotonic() > end:
            return
        yield number


def _work(seconds: float) -> None:
    warnings.simplefilter("ignore", ResourceWarning)
    kept = []
    for number in _until(seconds):
        kept.append([{key: [key]} for key in range(20)])
        if number % 500 == 0:
            kept.clear()
        cycle: list = [open("/dev/null", "rb", buffering=0)]  # noqa: SIM115
        cycle.append(cycle)
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()


def _wait(seconds: float) -> None:
    for _ in _until(seconds):
        time.sleep(0.002)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
