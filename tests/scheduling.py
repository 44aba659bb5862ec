"""How tests are shared out under ``pytest -n 3``.

Tests that start clusters, kill processes or submit jobs would disturb each other's timing. They
are in groups, each run one by one by one process of pytest-xdist; the rest is shared out file by
file. Three processes keep two cores busy, as tests of jobs mostly wait for Slurm. Markers are not
known where xdist shares tests out, and `--dist loadgroup` of pytest-xdist 3.8 has no effect with
pytest 9.2, so the files are named here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

# Within a group, tests run one by one. Of two that have the same beginning, the first is meant.
GROUPS = {
    "jobs": ("tests/cluster/test_slurm.py",),
    "clusters and kills": ("tests/cluster/", "tests/test_kills.py", "tests/test_streaming.py"),
    "whole runs": ("tests/pipeline/",),
    "other runs": (
        "tests/run/test_status.py",
        "tests/stages/test_light_curves.py",
        "tests/stages/test_sources.py",
        "tests/test_cli.py",
    ),
    "demonstrations": ("tests/test_afternoon.py", "tests/test_demo.py", "tests/test_notebook.py"),
}


def find_group(nodeid: str) -> str:
    """Return the group of a test: those of one group are run by one process, in order."""
    file = nodeid.partition("::")[0]
    found = (name for name, files in GROUPS.items() if file.startswith(files))
    return next(found, file)


def put_groups_first(items: list[pytest.Item]) -> None:
    """Sort tests so that the groups, which take longest, begin first."""
    order = {name: number for number, name in enumerate(GROUPS)}
    items.sort(key=lambda item: order.get(find_group(item.nodeid), len(GROUPS)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> LoadScopeScheduling | None:
    if config.getoption("dist") != "load":
        return None
    # Imported here, as pytest-xdist need not be installed.
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return find_group(nodeid)

    # The order of the files is kept; see `put_groups_first`.
    config.option.loadscopereorder = False
    return Scheduling(config, log)
