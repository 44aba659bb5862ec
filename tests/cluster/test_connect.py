"""Clusters that others have started, and a client that loses its connection."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import dask
import psutil
import pytest
import simulated
from distributed import Client, LocalCluster, WorkerPlugin, default_client

import spxdask
from spxdask import BatchConfig, BatchPipeline
from spxdask.cluster.connect import check_versions, connect
from spxdask.errors import ClusterError, ConfigError, InputError
from spxdask.progress import Silent
from spxdask.run.status import read_status
from spxdask.simulate.archive import SimulatedArchive


def config(survey, archive, folder, **options) -> BatchConfig:
    defaults = simulated.run_options(survey[0], archive, folder / "out")
    return BatchConfig(**(defaults | options))


def start_cluster(n_workers: int) -> LocalCluster:
    return LocalCluster(
        n_workers=n_workers,
        threads_per_worker=1,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
    )


class OtherVersion(WorkerPlugin):
    """Gives a worker process another version of spxdask."""

    def setup(self, worker) -> None:
        import spxdask.cluster.tasks

        spxdask.__version__ = spxdask.cluster.tasks.__version__ = "0.0.1"


MISMATCH = r"worker tcp://\S+ has spxdask 0\.0\.1, the client spxdask \S+: install"


def test_another_version_on_a_worker_is_an_error(survey, tmp_path):
    with (
        SimulatedArchive(survey[1]) as archive,
        start_cluster(1) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.register_plugin(OtherVersion())
        pipeline = BatchPipeline(config(survey, archive, tmp_path), client=client)
        with pytest.raises(ClusterError, match=MISMATCH):
            pipeline.run_all()
        assert not archive.requests


def test_a_worker_that_joins_later_is_checked_by_its_tasks(survey, tmp_path):
    with (
        SimulatedArchive(survey[1]) as archive,
        start_cluster(0) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.register_plugin(OtherVersion())
        # Adds a worker when there is a task.
        cluster.adapt(minimum=0, maximum=1, interval="50ms")
        pipeline = BatchPipeline(config(survey, archive, tmp_path), client=client)
        with pytest.raises(ClusterError, match=MISMATCH):
            pipeline.run_all()
        assert not archive.requests


def test_a_worker_without_spxdask_is_an_error():
    class Bare:
        def run(self, function, *arguments, on_error):
            assert function(*arguments) == spxdask.__version__
            assert function("spxdask_that_is_not_there.__version__") is None
            return {"tcp://10.0.0.7:1234": None}

    with pytest.raises(ClusterError, match=r"tcp://10\.0\.0\.7:1234 has no spxdask"):
        check_versions(Bare())


def test_a_worker_that_dies_while_versions_are_compared_is_tolerated():
    with start_cluster(1) as cluster, Client(cluster, set_as_default=False) as client:
        process = psutil.Process(next(iter(client.run(os.getpid).values())))
        process.send_signal(signal.SIGKILL)
        check_versions(client)


def test_a_scheduler_file(client, survey, tmp_path):
    file = tmp_path / "scheduler.json"
    client.write_scheduler_file(str(file))
    with SimulatedArchive(survey[1]) as archive:
        pipeline = BatchPipeline(config(survey, archive, tmp_path), scheduler=str(file))
        assert not pipeline.run_all().failed


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"address": 5}', "address: tcp"])
def test_a_file_that_is_not_a_scheduler_file(tmp_path, content):
    file = tmp_path / "scheduler.json"
    file.write_text(content)
    with pytest.raises(InputError, match="no Dask scheduler at") as raised:
        connect(str(file))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("banner", [b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", b"220 mail\r\n", b""])
def test_the_port_of_another_server(banner):
    """Of a server that speaks first, and of one that waits, as that of Dask's pages."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = "tcp://{}:{}".format(*server.getsockname())

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(banner)
                while connection.recv(1000):
                    pass

        with ThreadPoolExecutor(1) as other:
            answering = other.submit(answer)
            reason = "what answers is no server of Dask" if banner else "no answer in 0.5 s"
            with pytest.raises(InputError, match=f"no Dask scheduler at .*: {reason}"):
                connect(address, timeout_s=0.5)
            answering.result()


def test_a_mistyped_address_leaves_no_client():
    """One that is left would take over what is computed later, until it is collected."""
    with pytest.raises(InputError, match="unknown address scheme"):
        connect("not-an-address://x")
    assert dask.config.get("scheduler", None) is None
    with pytest.raises(ValueError, match="No clients found"):
        default_client()


def test_one_cluster_at_a_time(survey, tmp_path, client):
    with SimulatedArchive(survey[1]) as archive:
        options = config(survey, archive, tmp_path)
    with pytest.raises(ConfigError, match="not two of them"):
        BatchPipeline(options, client=client, jobqueue="slurm.yaml")


class CallAfter(Silent):
    """Calls a function once when so many units have ended."""

    def __init__(self, number: int, call) -> None:
        self._remaining, self._call = number, call

    def advance(self, *, failed: bool = False) -> None:
        self._remaining -= 1
        if not self._remaining:
            self._call()


def test_a_client_that_lost_its_connection_goes_on_where_it_was(survey, tmp_path):
    """The scheduler and its workers live on; frames that ended are not done again."""
    n_frames = len(survey[1])
    with SimulatedArchive(survey[1]) as archive, start_cluster(1) as cluster:
        options = config(survey, archive, tmp_path, max_download_workers=1)
        with Client(cluster, set_as_default=False) as first:

            def disconnect() -> None:
                is_disconnected = threading.Event()

                def abort() -> None:
                    first.scheduler_comm.comm.abort()
                    is_disconnected.set()

                first.loop.add_callback(abort)
                assert is_disconnected.wait(10)

            # The query is one of the four.
            pipeline = BatchPipeline(options, client=first, progress=CallAfter(4, disconnect))
            with pytest.raises(ClusterError, match="the same command resumes the run"):
                pipeline.run_all()
            before = read_status(options.output_dir)
            assert 3 <= before.measured < n_frames
        with Client(cluster, set_as_default=False) as second:
            summary = BatchPipeline(options, client=second).run_all()
        assert not summary.failed
        assert summary.stages["extract"].reused == before.measured
        fetched = Counter(r.path for r in archive.requests if r.path.endswith(".fits"))
        assert sum(fetched.values()) <= n_frames + 1
