"""How many workers fit into the limits of a machine, a container or a job."""

from __future__ import annotations

import math

import pytest
from distributed.system import MEMORY_LIMIT

from spxdask.cluster.limits import count_fitting_workers, read_cpu_quota, read_memory_limit

GB = 10**9


@pytest.fixture
def machine(tmp_path):
    """Give a function that writes the kernel's files, and returns where they are."""

    def machine(groups: str, **files: str):
        (tmp_path / "cgroup").write_text(groups)
        for name, text in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "cgroup", tmp_path / "fs"

    return machine


V1 = "4:cpu,cpuacct:/docker/ab\n3:memory:/docker/ab\n2:cpuset:/\n"


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        # That of a group holds for all groups below it.
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", {"a/b/cpu.max": "100000 100000\n", "a/cpu.max": "300000 100000\n"}, 1),
        # A container, which sees its own group as the topmost.
        ("0::/../outside\n", {"cpu.max": "200000 100000\n"}, 2),
        (
            V1,
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "9"},
            math.inf,
        ),
        (V1, {"cpu/cpu.cfs_quota_us": "150", "cpu/cpu.cfs_period_us": "100"}, 1.5),
        (
            V1,
            {
                "cpuacct,cpu/docker/ab/cpu.cfs_quota_us": "30",
                "cpuacct,cpu/docker/ab/cpu.cfs_period_us": "10",
            },
            3,
        ),
        ("0::/\n", {"cpu.max": ""}, math.inf),
        ("", {}, math.inf),
    ],
)
def test_cpu_quota(machine, groups, files, quota):
    assert read_cpu_quota(*machine(groups, **files)) == quota


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "1000000000\n"}, GB),
        ("0::/\n", {"memory.max": "max\n", "memory.high": "700000000\n"}, 0.7 * GB),
        (
            "0::/slurm/job_1\n",
            {"slurm/memory.max": "2000000", "slurm/job_1/memory.max": "max"},
            2e6,
        ),
        (V1, {"memory/memory.limit_in_bytes": "600000000"}, 0.6 * GB),
        (V1, {"memory/docker/ab/memory.limit_in_bytes": "500000000"}, 0.5 * GB),
        (V1, {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("0::/\n", {"memory.max": "max\n"}, None),
    ],
)
def test_memory_limit(machine, groups, files, limit):
    expected = MEMORY_LIMIT if limit is None else limit
    assert read_memory_limit(*machine(groups, **files)) == expected


def test_limits_without_control_groups(tmp_path):
    assert read_cpu_quota(tmp_path / "none", tmp_path) == math.inf
    assert read_memory_limit(tmp_path / "none", tmp_path) == MEMORY_LIMIT


@pytest.mark.parametrize(
    ("cores", "quota", "memory", "workers"),
    [(8, math.inf, 64e9, 8), (8, 2.9, 64e9, 2), (8, math.inf, 6e9, 4), (8, 3, 3.1e9, 2)],
)
def test_workers_that_fit(caplog, cores, quota, memory, workers):
    assert count_fitting_workers(cores, quota, memory) == workers
    assert caplog.records == []


@pytest.mark.parametrize(
    ("quota", "memory", "says"),
    [
        (0.5, 64e9, "a CPU quota allows 0.5 of a core, and a worker needs 1"),
        (8, 0.6e9, "0.6 GB of memory are allowed, and a worker needs 1.5 GB"),
    ],
)
def test_less_than_a_worker_needs(caplog, quota, memory, says):
    assert count_fitting_workers(8, quota, memory) == 1
    [record] = caplog.records
    assert says in record.getMessage()
