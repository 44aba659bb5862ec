"""Whole runs whose workers are jobs of a Slurm on this machine."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask
import pytest
import simulated
from distributed import Client, Event, as_completed
from killing import Command

from spxdask import BatchConfig, BatchPipeline
from spxdask.cluster.dask_internals import count_planned_workers, get_adapt_limits
from spxdask.cluster.jobqueue import jobqueue_client
from spxdask.cluster.jobqueue.watchdog import MAX_CONSECUTIVE_FAILURES
from spxdask.cluster.shuffle import hold_worker_count
from spxdask.errors import ClusterError
from spxdask.simulate.archive import Fault, SimulatedArchive

LOCAL_SLURM = Path(__file__).parents[1] / "slurm" / "local.sh"
DEPLOY = Path(__file__).parents[2] / "deploy" / "slurm"

job_client = functools.partial(jobqueue_client, poll_interval_s=0.5)


def queued(*options: str) -> list[str]:
    """Return the jobs that Slurm knows, those that are about to end included."""
    command = ["squeue", "--noheader", "--format=%A", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def until(reached: Callable[[], object], timeout: float = 60.0) -> None:
    """Wait for a state by asking for it again and again."""
    deadline = time.monotonic() + timeout
    while not reached():
        assert time.monotonic() < deadline, "the state was not reached"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def slurm():
    """A Slurm of one node, with an empty queue."""
    if importlib.util.find_spec("dask_jobqueue") is None:
        pytest.skip("dask-jobqueue is not installed")
    home = Path(tempfile.mkdtemp(prefix="spxdask-slurm-"))
    command = [LOCAL_SLURM]
    log = home / "local.log"
    with pytest.MonkeyPatch.context() as patch:
        try:
            with open(log, "w") as out:
                started = subprocess.run([*command, "start", home], stdout=out, stderr=out)
            if started.returncode == 3:
                pytest.skip(f"no Slurm: {log.read_text().strip()}")
            assert started.returncode == 0, log.read_text()
            patch.setenv("SLURM_CONF", str(home / "slurm.conf"))
            with dask.config.set({"distributed.deploy.lost-worker-timeout": "1s"}):
                yield
        finally:
            subprocess.run([*command, "stop", home], check=True)
            shutil.rmtree(home)


@pytest.fixture
def jobs(slurm, write_settings, tmp_path):
    """Give a function that writes a file for a Slurm whose queue is empty."""
    until(lambda: not queued())

    def jobs(*, minimum: int = 1, **options) -> Path:
        options = {"processes": 1, "log_directory": str(tmp_path / "logs")} | options
        return write_settings(minimum=minimum, **options)

    yield jobs
    # Jobs that were given back may still be about to end, but none waits or runs.
    assert queued("--states=PENDING,RUNNING") == []


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    sky = simulated.field_sky()
    home = tmp_path_factory.mktemp("jobqueue")
    simulated.write_catalogue(
        home / "sources.csv", [f"s{i}" for i in range(len(sky))], sky.ra, sky.dec
    )
    exposures = [simulated.exposure(i, 1 + i) for i in range(4)]
    frames = simulated.simulate(home, exposures, sky)
    with SimulatedArchive([frame.archived for frame in frames]) as archive:
        archive.home, archive.uris = home, [exposure.uri for exposure in exposures]
        yield archive


@pytest.fixture(scope="module")
def make_config(archive):
    def make(output: Path, **options) -> BatchConfig:
        return BatchConfig(
            catalog_path=archive.home / "sources.csv",
            center_ra=simulated.CENTER[0],
            center_dec=simulated.CENTER[1],
            radius=0.05,
            output_dir=output,
            num_buckets=3,
            tap_url=archive.tap_url,
            archive_url=archive.archive_url,
            **options,
        )

    return make


def contents(output: Path) -> dict[str, bytes]:
    paths = [*(output / "lightcurves").iterdir(), *(output / "per_image").iterdir()]
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def expected(slurm, make_config, client, tmp_path_factory) -> dict[str, bytes]:
    """What a run on processes of this machine writes."""
    output = tmp_path_factory.mktemp("expected") / "out"
    BatchPipeline(make_config(output), client=client).run_all()
    found = contents(output)
    assert len(found) > 20
    return found


def stall(archive: SimulatedArchive) -> Callable[[], None]:
    """Have the archive send one frame in part; return what waits for that."""
    uri = archive.uris[2]
    archive.add_faults(uri, [Fault(stall=1000)])
    before = len(archive.requests)

    def begun(archive: SimulatedArchive) -> bool:
        return any(request.path == f"/{uri}" for request in archive.requests[before:])

    return lambda: archive.wait_for(begun, timeout_s=60)


def test_a_run_in_jobs(jobs, make_config, expected, tmp_path):
    output = tmp_path / "out"
    with job_client(jobs()) as client:
        summary = BatchPipeline(make_config(output), client=client).run_all()
        assert len(queued("--states=RUNNING")) > 0
    assert summary.failed == {}
    assert contents(output) == expected
    assert queued("--states=PENDING,RUNNING") == []
    until(lambda: not queued())


def test_a_run_one_of_whose_jobs_is_cancelled(jobs, make_config, expected, archive, tmp_path):
    output = tmp_path / "out"
    wait = stall(archive)
    before = len(archive.requests)

    def cancel() -> list[str]:
        wait()
        cancelled = queued()
        subprocess.run(["scancel", *cancelled], check=True)
        return cancelled

    with ThreadPoolExecutor(1) as other, job_client(jobs(maximum=1)) as client:
        cancelling = other.submit(cancel)
        # The transfer does not end by itself.
        config = make_config(output, stall_timeout=600, max_retries=0)
        summary = BatchPipeline(config, client=client).run_all()
        [cancelled] = cancelling.result()
        assert cancelled not in queued("--states=RUNNING")
    assert summary.failed == {}
    assert contents(output) == expected
    requests = [request.path for request in archive.requests[before:]]
    assert requests.count(f"/{archive.uris[2]}") == 2


def test_a_lost_job_is_replaced_while_the_count_is_held(jobs):
    # Dask by itself replaces only jobs of one worker.
    path = jobs(minimum=1, maximum=2, cores=2, processes=2)
    with job_client(path) as client:
        client.wait_for_workers(2)
        [first] = queued()
        with hold_worker_count(client):
            subprocess.run(["scancel", first], check=True)
            until(lambda: set(queued("--states=RUNNING")) - {first})
            client.wait_for_workers(2)
            assert client.submit(len, "abc").result() == 3
            assert count_planned_workers(client.cluster) == 2
        assert get_adapt_limits(client.cluster) == (2, 4)


def test_jobs_are_as_many_as_there_is_work_for(jobs):
    with job_client(jobs(minimum=0, maximum=2, cores=1), idle_time_s=1) as client:
        assert queued() == []
        # A run has few tasks at a time, and short ones, which for Dask's default settings is
        # work for one job.
        tasks = as_completed(loop=client.loop)
        tasks.update(client.submit(time.sleep, 0.02, pure=False) for _ in range(2))
        for n, _ in enumerate(tasks):
            if count_planned_workers(client.cluster) == 2 or n == 500:
                break
            tasks.add(client.submit(time.sleep, 0.02, pure=False))
        assert count_planned_workers(client.cluster) == 2
        del tasks, _
        until(lambda: not count_planned_workers(client.cluster))


def test_a_job_that_slurm_refuses(jobs):
    message = (
        "jobqueue.yaml: sbatch refused a job: Memory specification can not be satisfied; "
        "Batch job submission failed: Requested node configuration is not available"
    )
    with pytest.raises(ClusterError, match=message), job_client(jobs(memory="900TB")):
        pytest.fail("it has no jobs")
    # The same when jobs are asked for once there is work.
    with (
        pytest.raises(ClusterError, match=message),
        job_client(jobs(minimum=0, memory="900TB")) as client,
    ):
        client.submit(len, "abc").result()


@pytest.fixture
def in_place_of_sbatch(monkeypatch, tmp_path) -> Callable[[str], None]:
    """Give a function that puts a shell script before Slurm's, which it knows as $sbatch."""

    def put(lines: str) -> None:
        stub = tmp_path / "bin" / "sbatch"
        stub.parent.mkdir()
        stub.write_text(f"#!/bin/sh\nsbatch={shutil.which('sbatch')}\n{lines}")
        stub.chmod(0o755)
        monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")

    return put


def test_a_run_survives_some_refusals(jobs, in_place_of_sbatch, tmp_path):
    # sbatch refuses as many jobs as this file has lines.
    refusals = tmp_path / "refusals"
    in_place_of_sbatch(f"""
        [ -s {refusals} ] || exec $sbatch "$@"
        sed -i 1d {refusals}
        echo "sbatch: error: out of order" >&2
        exit 1
        """)

    def lose_jobs(client: Client) -> None:
        client.wait_for_workers(1)
        [first] = queued()
        refusals.write_text("once\n" * (MAX_CONSECUTIVE_FAILURES - 1))
        subprocess.run(["scancel", first], check=True)
        until(lambda: set(queued("--states=RUNNING")) - {first})
        client.wait_for_workers(1)
        assert refusals.read_text() == ""
        refusals.write_text("again\n" * 99)
        subprocess.run(["scancel", *queued()], check=True)
        client.submit(Event(client=client).wait).result()

    with (
        pytest.raises(ClusterError, match=r"jobqueue.yaml: sbatch refused a job: out of order$"),
        job_client(jobs(maximum=1), resubmit_delay_s=0.1) as client,
    ):
        lose_jobs(client)


def test_jobs_that_end_before_they_bring_a_worker(jobs, make_config, tmp_path):
    path = jobs(job_script_prologue=["exit 7"])
    log = re.escape(str(tmp_path / "logs" / "dask-worker-"))
    with (
        pytest.raises(ClusterError, match=rf"3 jobs in a row ended .* see {log}\d+\.err$"),
        job_client(path) as client,
    ):
        BatchPipeline(make_config(tmp_path / "out"), client=client).run_all()


def test_an_error_gives_the_jobs_back(jobs):
    def fail() -> None:
        with job_client(jobs(minimum=2)):
            assert len(queued()) == 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert queued("--states=PENDING,RUNNING") == []


def test_an_interrupt_gives_the_jobs_back(jobs, make_config, archive, tmp_path):
    wait = stall(archive)
    make_config(tmp_path / "out", stall_timeout=600).to_yaml(tmp_path / "run.yaml")
    command = ("spxdask", "run", "--config", str(tmp_path / "run.yaml"))
    with Command(*command, "--jobqueue", str(jobs()), log=tmp_path / "run") as run:
        wait()
        assert len(queued("--states=RUNNING")) > 0
        run.interrupt()
        assert run.wait(30) == 130, run.stderr
        assert run.left_behind() == []
    assert queued("--states=PENDING,RUNNING") == []


def test_an_interrupt_while_a_job_is_submitted(
    jobs, make_config, archive, in_place_of_sbatch, tmp_path
):
    make_config(tmp_path / "out").to_yaml(tmp_path / "run.yaml")
    # Ctrl-C comes when the job exists and its number is not known yet.
    in_place_of_sbatch('job=$($sbatch "$@"); kill -s INT -- -$PPID; echo $job')
    command = ("spxdask", "run", "--config", str(tmp_path / "run.yaml"))
    with Command(*command, "--jobqueue", str(jobs()), log=tmp_path / "run") as run:
        assert run.wait(60) == 130, run.stderr
    assert queued("--states=PENDING,RUNNING") == []


@pytest.mark.timeout(360)
def test_the_batch_script(jobs, make_config, expected, tmp_path):
    output = tmp_path / "out"
    make_config(output).to_yaml(tmp_path / "run.yaml")
    size = ("--ntasks=2", "--cpus-per-task=2", "--mem-per-cpu=1G")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # Not with --wait, which checks after 2, 8 and 32 seconds only.
    submitted = subprocess.run(
        [*("sbatch", "--parsable"), *size, DEPLOY / "spxdask.sbatch", "--config", "run.yaml"],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "INTERFACE": "lo"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    job = submitted.stdout.strip()
    until(lambda: not queued(), timeout=180)
    command = ["scontrol", "--oneliner", "show", "job", job]
    became = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    logs = "".join(log.read_text() for log in tmp_path.glob(f"spxdask-{job}.*log"))
    assert " JobState=COMPLETED " in became, logs
    assert "light curves, " in (tmp_path / f"spxdask-{job}.log").read_text()
    assert contents(output) == expected
    assert list(tmp_path.glob("scheduler-*.json")) == []
