"""Fixtures of the tests of clusters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import simulated
import yaml
from distributed import Client, LocalCluster

ON_LOOPBACK = {"interface": "lo", "scheduler-options": {"dashboard_address": "127.0.0.1:0"}}
# Frames of `survey`.
N_FRAMES = 6


@pytest.fixture(scope="session")
def survey(tmp_path_factory):
    """A catalogue, and some frames as the archive has them."""
    return simulated.small_survey(tmp_path_factory.mktemp("survey"), N_FRAMES)


@pytest.fixture
def in_process():
    """A client of a cluster of one worker that is a thread of this process."""
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def client_with_pages():
    """A client of a scheduler with Dask's pages, and without workers."""
    options = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    with (
        LocalCluster(n_workers=0, **options) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def write_settings(tmp_path) -> Callable[..., Path]:
    """Give a function that writes a file of a batch system with these options."""

    def write(system: str = "slurm", *, minimum: int = 0, maximum: int = 2, **options) -> Path:
        options = {"cores": 2, "memory": "1GB"} | options
        section = ON_LOOPBACK | {key.replace("_", "-"): value for key, value in options.items()}
        content = {
            "jobqueue": {system: {key: value for key, value in section.items() if value != ""}},
            "adapt": {"minimum_jobs": minimum, "maximum_jobs": maximum},
        }
        path = tmp_path / "jobqueue.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write
