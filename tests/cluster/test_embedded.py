"""The cluster of this machine."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import time
import warnings

import dask
import pytest
from distributed import LocalCluster, WorkerPlugin

from spxdask.cluster.embedded import embedded_client
from spxdask.cluster.held_stderr import hold_stderr_back
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
        assert client.cluster.scheduler.worker_ttl == 60


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
        assert client.submit(abs, -1).result(timeout=60) == 1
        assert deaths.read_text() == ""


def test_a_port_that_is_taken_meanwhile_is_no_warning():
    taken = socket.socket()

    def start(**options) -> LocalCluster:
        host, _, port = options["dashboard_address"].partition(":")
        taken.bind((host, int(port)))
        taken.listen()
        return LocalCluster(**options)

    with (
        taken,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        with embedded_client(max_processes=1, n_downloads=1, make_cluster=start) as client:
            assert f":{taken.getsockname()[1]}/" not in client.dashboard_link
        # Dask leaves the socket open with which it tried.
        gc.collect()
    assert [each for each in caught if each.category is not ResourceWarning] == []


def test_failures_to_start_have_one_cause():
    def start(**_) -> LocalCluster:
        try:
            raise OSError(24, "Too many open files")
        except OSError as error:
            raise RuntimeError("Nanny failed to start.") from error

    with (
        pytest.raises(InputError) as caught,
        embedded_client(max_processes=1, n_downloads=1, make_cluster=start),
    ):
        pytest.fail("there is no cluster")
    assert str(caught.value) == (
        "the worker processes did not start (OSError: [Errno 24] Too many open files)"
    )
    assert caught.value.__suppress_context__


WRITE = "import os, sys; os.write(2, b'in time '); sys.stdin.read(); os.write(2, b'later ')"


def start_writing() -> subprocess.Popen:
    """Start a process that writes to its standard error, and again when its input ends."""
    return subprocess.Popen([sys.executable, "-c", WRITE], stdin=subprocess.PIPE)


def test_output_that_is_held_back_is_passed_on(capfd):
    with hold_stderr_back() as held:
        process = start_writing()
        while "in time" not in held.text:
            time.sleep(0.01)
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "in time "
    process.communicate()
    while "later" not in (found := capfd.readouterr().err):
        time.sleep(0.01)
    assert found == "later "


def test_output_that_is_held_back_is_dropped_after_an_error(capfd):
    def fail():
        with hold_stderr_back() as held:
            yield held
            start_writing().communicate()
            raise ZeroDivisionError

    failing = fail()
    held = next(failing)
    with pytest.raises(ZeroDivisionError):
        next(failing)
    assert held.text == "in time later "
    assert capfd.readouterr().err == ""


def test_output_of_this_process_alone_is_passed_on(capfd):
    with hold_stderr_back():
        os.write(2, b"here ")
    os.write(2, b"there")
    assert capfd.readouterr().err == "here there"
