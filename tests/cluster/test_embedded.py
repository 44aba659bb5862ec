"""The cluster of this machine."""

from __future__ import annotations

import os
import signal

import dask
import pytest
from distributed import LocalCluster, WorkerPlugin, wait

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


class DieAtFirst(WorkerPlugin):
    """Has a worker die as often as the file has lines, at a time when it is starting."""

    name = "die-at-first"

    def __init__(self, path) -> None:
        self.path = path

    def setup(self, worker) -> None:
        *left, _ = self.path.read_text().splitlines() or [None]
        if self.path.stat().st_size:
            self.path.write_text("".join(f"{line}\n" for line in left))
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_again_and_again_is_restarted_each_time(tmp_path):
    """Dask by itself gives it up if it is not there some seconds after it died."""
    deaths = tmp_path / "deaths"
    deaths.touch()
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "10ms"}),
        embedded_client(max_processes=1, n_downloads=1) as client,
    ):
        client.register_plugin(DieAtFirst(deaths))
        deaths.write_text("once\nagain\n")
        client.submit(os.getpid).result()
        [pid] = client.run(os.getpid).values()
        os.kill(pid, signal.SIGKILL)
        later = client.submit(abs, -1)
        wait(later, timeout=60)
        assert later.result() == 1
        assert deaths.read_text() == ""
