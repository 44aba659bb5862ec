"""The cluster of this machine."""

from __future__ import annotations

import pytest
from distributed import LocalCluster

from spxdask.cluster.embedded import embedded_client
from spxdask.errors import InputError


class Failing:
    """Starts clusters, but for the first so many times."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def __call__(self, **options) -> LocalCluster:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("Nanny failed to start.")
        return LocalCluster(**options)


def test_one_failure_to_start_is_tolerated():
    with embedded_client(
        max_processes=1, n_downloads=4, make_cluster=Failing(failures=1)
    ) as client:
        assert client.submit(abs, -1).result() == 1
        assert list(client.nthreads().values()) == [5]


def test_two_failures_to_start_are_an_error():
    with (
        pytest.raises(InputError, match=r"did not start \(Nanny failed"),
        embedded_client(max_processes=1, n_downloads=4, make_cluster=Failing(failures=2)),
    ):
        pytest.fail("there is no cluster")
