"""Fixtures, markers and the tiers of the whole suite.

A test belongs to the quick tier (``pytest -m quick``) unless it carries one of the markers of
`EXPENSIVE`. It uses no cluster, and only ports that the system chooses, and so may run in parallel:
``pytest -m quick -n 2``. Markers that follow from a fixture or an import are added
here, so that nobody has to remember them; a test that starts a cluster in another way without the
marker fails.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import dask
import pytest
import simulated
from distributed import Client, LocalCluster
from distributed.utils import get_mp_context
from hypothesis import settings
from scheduling import put_groups_first, pytest_xdist_make_scheduler  # noqa: F401

from spxdask import BatchConfig
from spxdask.simulate.archive import SimulatedArchive

# What is imported and collected stays; see `pytest_collection_finish`.
gc.disable()

# Workers import functions that tests send them from `tests`. Appended, so that the spxdask that is
# installed is the one that is tested.
sys.path.append(str(Path(__file__).parents[1]))

# CI repeats the same examples, so that a failure there means a change; other runs search further.
settings.register_profile("ci", derandomize=True, max_examples=50, deadline=None)
settings.register_profile("local", max_examples=50, deadline=None)
settings.register_profile("long", max_examples=20000, deadline=None)
if os.environ.get("SPXDASK_TESTS") == "long":
    settings.load_profile("long")
else:
    settings.load_profile("ci" if os.environ.get("CI") else "local")

# With SPXDASK_TESTS=short, so many parameters of each test are run, but all of these folders and
# files, where parameters choose libraries: to see whether other versions of them have what is used.
SHORT_PARAMETERS = 1
NEVER_SHORT = ("tests/storage/", "tests/tables/", "tests/test_config.py")

# What workers, their tasks and compiled functions import.
WORKER_MODULES = [
    "distributed.nanny",
    "distributed.shuffle._shuffle",
    "distributed.worker",
    "numba.cpython.builtins",
    "numba.misc.cffiimpl",
    "numba.np.arraymath",
    "numba.np.npyimpl",
    "spxdask.cluster.stacks",
    "spxdask.simulate.frames",
    "spxdask.stages.light_curves",
    "spxdask.stages.query",
    "spxdask.stages.stream",
]

CURRENT_ITEM = pytest.StashKey[pytest.Item]()
EXPENSIVE = ("cluster", "kill", "slurm", "s3", "slow")
# The marker that a test receives because it uses a fixture.
MARKER_OF_FIXTURE = {
    "client": "cluster",
    "client_with_pages": "cluster",
    "in_process": "cluster",
    "workers": "cluster",
    "object_store": "s3",
    "s3": "s3",
    "slurm": "slurm",
    "thread_client": "cluster",
}
# The marker that the tests of a module receive because it imports a name.
MARKER_OF_IMPORT = {"LocalCluster": "cluster", "serving": "s3"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("SPXDASK_TESTS") == "short":
        leave_out_parameters(config, items)
    if getattr(config.option, "dist", "no") != "no" or hasattr(config, "workerinput"):
        put_groups_first(items)
    for item in items:
        for fixture, marker in MARKER_OF_FIXTURE.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)
        for name, marker in MARKER_OF_IMPORT.items():
            if hasattr(getattr(item, "module", None), name):
                item.add_marker(marker)
        if not any(item.get_closest_marker(name) for name in EXPENSIVE):
            item.add_marker("quick")


def pytest_collection_finish() -> None:
    # Garbage collections, which take a tenth of the time, look through no modules and tests.
    gc.freeze()
    gc.enable()


def leave_out_parameters(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect all but the first parameters of each test."""
    seen, left_out = Counter(), []
    for item in items:
        name = item.nodeid.partition("[")[0]
        seen[name] += 1
        if seen[name] > SHORT_PARAMETERS and not name.startswith(NEVER_SHORT):
            left_out.append(item)
    config.hook.pytest_deselected(items=left_out)
    deselected = set(left_out)
    items[:] = [item for item in items if item not in deselected]


@pytest.fixture(scope="session", autouse=True)
def _clusters_are_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that starts a Dask cluster in this process without the marker for it."""
    start = LocalCluster.__init__

    def start_if_marked(cluster: LocalCluster, *arguments, **options) -> None:
        item = request.session.stash.get(CURRENT_ITEM, None)
        if item is not None and item.get_closest_marker("quick"):
            pytest.fail(f"{item.nodeid} starts a Dask cluster: mark it with pytest.mark.cluster")
        start(cluster, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalCluster, "__init__", start_if_marked)
        yield


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set variables for the processes of tests, and for this one."""
    with pytest.MonkeyPatch.context() as patch:
        # Keep calibration products out of the user's cache.
        patch.setenv("SPXDASK_CACHE", str(tmp_path_factory.mktemp("cache")))
        # Import the spxdask that is installed, not that of the working directory, whose loops are
        # not compiled.
        patch.setenv("PYTHONSAFEPATH", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def _clusters_take_little() -> Iterator[None]:
    """Fork the workers of clusters that tests start from a process that has imported everything.

    They have no profiler, as it can freeze those that no run has prepared. Clusters of whole
    modules are idle most of the time, and would look at themselves fifty times a second.
    """
    settings = {
        "distributed.admin.system-monitor.interval": "10s",
        "distributed.admin.tick.interval": "1s",
        "distributed.worker.memory.monitor-interval": "5s",
        "distributed.worker.multiprocessing-method": "forkserver",
        "distributed.worker.profile.enabled": False,
    }
    with dask.config.set(settings):
        # Dask sets what is imported beforehand once, here at the latest.
        get_mp_context()
        get_context("forkserver").set_forkserver_preload(WORKER_MODULES)
        yield


@pytest.fixture(autouse=True)
def _records_reach_caplog(caplog: pytest.LogCaptureFixture) -> None:
    """Undo what clusters of earlier tests did to pytest's handler: Dask raises its level."""
    caplog.handler.setLevel(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.session.stash[CURRENT_ITEM] = item


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    """A cluster of two processes; tests share it, and must leave nothing on it."""
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=3,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            # Dask's pages take a second to import.
            scheduler_kwargs={"dashboard": False},
        ) as cluster,
        # Not the default, on which tests that say nothing of a cluster would compute.
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def thread_client() -> Iterator[Client]:
    """A cluster of one worker, whose threads are those of this process."""
    with Client(
        processes=False,
        n_workers=1,
        threads_per_worker=3,
        dashboard_address="127.0.0.1:0",
        set_as_default=False,
    ) as client:
        yield client


@pytest.fixture(scope="module")
def object_store() -> Iterator:
    """An S3 of moto on 127.0.0.1 with an empty bucket `objectstore.BUCKET`."""
    from objectstore import serving

    with serving() as store:
        yield store


# A survey, its archive and the configuration of a run over it. A module that needs another sky
# overrides `survey`; one that plans faults for single tests overrides `archive`.


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> simulated.Survey:
    """Four frames of one field in four bands, and its twenty sources."""
    exposures = [simulated.exposure(number, 1 + number) for number in range(4)]
    return simulated.make_survey(tmp_path_factory.mktemp("survey"), exposures, n_sources=20)


@pytest.fixture(scope="module")
def archive(survey: simulated.Survey) -> Iterator[SimulatedArchive]:
    with SimulatedArchive(survey.archived) as archive:
        yield archive


@pytest.fixture
def make_config(
    survey: simulated.Survey, archive: SimulatedArchive, tmp_path: Path
) -> Callable[..., BatchConfig]:
    """Return a function that makes the configuration of a run into ``tmp_path / "out"``."""
    catalogue = survey.write_catalogue(tmp_path / "sources.csv")

    def make(**options) -> BatchConfig:
        defaults = simulated.run_options(catalogue, archive, tmp_path / "out")
        return BatchConfig(**(defaults | options))

    return make
