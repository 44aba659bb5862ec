"""What a task may ask of the Dask worker that runs it."""

from __future__ import annotations

import math

from distributed import get_worker


def worker_memory_limit() -> float:
    """Return the memory limit of the worker that runs the calling task.

    Returns
    -------
    float
        Limit in bytes, infinite outside a worker and for a worker without a limit.
    """
    try:
        worker = get_worker()
    except ValueError:
        return math.inf
    return worker.memory_manager.memory_limit or math.inf
