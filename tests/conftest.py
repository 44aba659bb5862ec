"""What several test modules share."""

from __future__ import annotations

import os

import pytest
from distributed import Client, LocalCluster
from hypothesis import settings
from scheduling import pytest_xdist_make_scheduler  # noqa: F401

# The same examples each time where a red run must mean a change; new ones elsewhere.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("here", deadline=None)
# For an afternoon of fuzzing.
settings.register_profile("long", max_examples=20000, deadline=None)
if os.environ.get("SPXDASK_TESTS") == "long":
    settings.load_profile("long")
else:
    settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(scope="session")
def client():
    """A cluster of two processes, as a user's would be; shared, so leave nothing on it."""
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=3, host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client
