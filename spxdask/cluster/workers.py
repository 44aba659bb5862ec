"""The environment that workers are started in, and what their tasks may ask of them."""

from __future__ import annotations

import math

from distributed import get_worker

from spxdask.cluster.dask_internals import get_memory_limit

# Environment of the workers, in bytes. Dask has its workers return freed memory to the
# system at once, so that every buffer of a transfer consists of fresh pages; to map them
# takes longer than the transfer.
MALLOC_ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": 32 << 20,
    "MALLOC_MMAP_THRESHOLD_": 4 << 20,
}


def worker_memory_limit() -> float:
    """Return the memory that the worker running this task may use.

    Returns
    -------
    float
        Bytes; infinity where there is no limit, and outside a worker.
    """
    try:
        worker = get_worker()
    except ValueError:
        return math.inf
    return get_memory_limit(worker)
