"""What this process may use of its machine, and how many workers fit into that."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

from distributed import Client
from distributed.system import MEMORY_LIMIT

logger = logging.getLogger(__name__)

# What a worker needs to measure frames and to write light curves. Of less, its own libraries and
# the frame that it measures leave too little for the shuffle.
WORKER_BYTES = 1_500_000_000

PROCESS_GROUPS = Path("/proc/self/cgroup")
GROUP_FILES = Path("/sys/fs/cgroup")


def count_fitting_workers(cores: int, quota: float, memory_bytes: float) -> int:
    """Return how many workers fit into the limits of this process, and warn if none does.

    Parameters
    ----------
    cores : int
        Cores that it may run on.
    quota : float
        Cores whose time it may use; infinity if that is not limited.
    memory_bytes : float
        Memory that it may use.

    Returns
    -------
    int
        At least one.
    """
    if quota < 1:
        logger.warning(
            "a CPU quota allows %.2g of a core, and a worker needs 1: one is started, and is slow",
            quota,
        )
    if memory_bytes < WORKER_BYTES:
        logger.warning(
            "%.2g GB of memory are allowed, and a worker needs %.2g GB: one is started, and may "
            "run out of memory",
            memory_bytes / 1e9,
            WORKER_BYTES / 1e9,
        )
    return max(1, int(min(cores, quota, memory_bytes // WORKER_BYTES)))


def count_cores() -> int:
    """Return the number of cores that this process may run on.

    Returns
    -------
    int
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_cpu_quota(groups: Path = PROCESS_GROUPS, files: Path = GROUP_FILES) -> float:
    """Return the cores whose time the control groups of this process allow.

    Parameters
    ----------
    groups : Path
        Where the kernel lists the groups.
    files : Path
        Where the file systems of the groups are mounted.

    Returns
    -------
    float
        Infinity if there is no limit.
    """
    quota = math.inf
    for folder in _list_folders("cpu", groups, files):
        # Version 2 of control groups, then version 1.
        texts = _read_words(folder / "cpu.max") or [
            *_read_words(folder / "cpu.cfs_quota_us"),
            *_read_words(folder / "cpu.cfs_period_us"),
        ]
        allowed, period = map(_parse_limit, texts) if len(texts) == 2 else (math.inf, 1.0)
        quota = min(quota, allowed / period)
    return quota


def read_memory_limit(groups: Path = PROCESS_GROUPS, files: Path = GROUP_FILES) -> float:
    """Return how much memory this process may use.

    Parameters
    ----------
    groups : Path
        Where the kernel lists its control groups.
    files : Path
        Where the file systems of the groups are mounted.

    Returns
    -------
    float
        Bytes: the memory of the machine, or what its control groups allow if that is less.
    """
    limit = float(MEMORY_LIMIT)
    for folder in _list_folders("memory", groups, files):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limit = min([limit, *map(_parse_limit, _read_words(folder / name))])
    return limit


def warn_of_small_workers(client: Client) -> None:
    """Warn if a worker of a cluster has less memory than it needs.

    Parameters
    ----------
    client : Client
        Of the cluster.
    """
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    # Without a limit, it is 0.
    limits = [worker["memory_limit"] for worker in workers if worker["memory_limit"]]
    if limits and min(limits) < WORKER_BYTES:
        logger.warning(
            "a worker of the cluster may use %.2g GB of memory, and needs %.2g GB: with less, Dask "
            "may pause it for good, and the run ends with an error",
            min(limits) / 1e9,
            WORKER_BYTES / 1e9,
        )


def _list_folders(controller: str, groups: Path, files: Path) -> Iterator[Path]:
    """Yield the folders of the groups that limit this process: its own, and those above it.

    In a container, they may be listed under the names that they have outside of it; then the
    topmost folder is that of the container.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        mounts = ["", "unified"] if not names else [names, controller, _reverse(names)]
        for mount in mounts:
            top = files / mount
            folder = top / path.lstrip("/")
            yield from (each for each in (folder, *folder.parents) if each.is_relative_to(top))


def _reverse(names: str) -> str:
    return ",".join(reversed(names.split(",")))


def _read_words(path: Path) -> list[str]:
    """Return the words of a file, none if it cannot be read."""
    try:
        return path.read_text().split()
    except OSError:
        return []


def _parse_limit(text: str) -> float:
    """Return the number that a limit is, infinity for ``max`` and for -1."""
    try:
        value = float(text)
    except ValueError:
        return math.inf
    return value if value > 0 else math.inf
