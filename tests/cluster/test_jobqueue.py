"""Workers in jobs: what the file may say, and whole runs on a Slurm of this machine."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import dask
import pytest
import simulated
import yaml
from distributed import Client, Event, LocalCluster, Status, as_completed
from killing import Command

from spxdask import BatchConfig, BatchPipeline
from spxdask.cluster import jobqueue
from spxdask.cluster.jobqueue import hold_worker_count, jobqueue_client
from spxdask.config import read_options
from spxdask.errors import ClusterError, ConfigError, InputError
from spxdask.simulate.archive import Fault, SimulatedArchive

HERE = Path(__file__).parent
DEPLOY = HERE.parent / "deploy" / "slurm"
NEEDED = {"cores": 2, "memory": "1GB"}
ON_LOOPBACK = {"interface": "lo", "scheduler-options": {"dashboard_address": "127.0.0.1:0"}}
TIDIED = "export MALLOC_TRIM_THRESHOLD_=33554432"

# Not by import, as that takes Ctrl-C from pytest.
needs_dask_jobqueue = pytest.mark.skipif(
    importlib.util.find_spec("dask_jobqueue") is None, reason="dask-jobqueue is not installed"
)


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """Give a function that writes a file of a batch system with these options."""

    def write(system: str = "slurm", *, minimum: int = 0, maximum: int = 2, **options) -> Path:
        section = {key.replace("_", "-"): value for key, value in (NEEDED | options).items()}
        content = {
            "jobqueue": {system: {k: v for k, v in (ON_LOOPBACK | section).items() if v != ""}},
            "adapt": {"minimum_jobs": minimum, "maximum_jobs": maximum},
        }
        path = tmp_path / "jobqueue.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def script(path: Path) -> str:
    """Return what would be submitted for a job."""
    with jobqueue_client(path) as client:
        return client.cluster.job_script()


# The file


def test_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "none.yaml"
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}: No such file"):
        script(path)


@needs_dask_jobqueue
@pytest.mark.parametrize(
    "text, said",
    [
        ("- 1", "a mapping of options is needed"),
        ("queue: {}", "unknown key queue"),
        ("jobqeue: {}", "unknown key jobqeue; did you mean jobqueue?"),
        ("adapt: {}", "jobqueue has none"),
        ("jobqueue: 4", "jobqueue is 4; allowed is a mapping"),
        ("jobqueue: {slurm: , pbs: }", "jobqueue has slurm, pbs; allowed is one of"),
        ("jobqueue: {slrum: }", "unknown key jobqueue.slrum; did you mean slurm?"),
        ("jobqueue: {slurm: [1]}", r"jobqueue.slurm is \[1\]; allowed is a mapping"),
        ("jobqueue: {slurm: {memory: 1GB}}", "jobqueue.slurm.cores is missing"),
        ("jobqueue: {slurm: {cores: 1}}", "jobqueue.slurm.memory is missing"),
        ("adapt: {minimum_jobs: -1}", "adapt.minimum_jobs is -1; allowed is"),
        ("adapt: {maximum_jobs: 0}", "adapt.maximum_jobs is 0; allowed is 1 or more"),
        ("adapt: {minimum_jobs: 9, maximum_jobs: 8}", "maximum_jobs is 8; allowed is 9 or more"),
        ("adapt: {maximum: 2}", "unknown key adapt.maximum; did you mean maximum_jobs?"),
        ("adapt: 3", "adapt is 3; allowed is a mapping"),
    ],
)
def test_a_file_that_says_what_it_may_not(tmp_path, text, said):
    path = tmp_path / "jobqueue.yaml"
    more = "" if text.startswith(("-", "jobq")) else "\njobqueue: {slurm: {cores: 1, memory: 1GB}}"
    path.write_text(text if text == "adapt: {}" else text + more)
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}: .*{said}") as caught:
        script(path)
    assert "\n" not in str(caught.value)


@needs_dask_jobqueue
@pytest.mark.parametrize(
    "options, said",
    [
        ({"core": 4}, "unknown key jobqueue.slurm.core; did you mean cores?"),
        ({"n_workers": 4}, "unknown key jobqueue.slurm.n-workers"),
        ({"disk": "1GB"}, "unknown key jobqueue.slurm.disk"),
        ({"host": "login1"}, "jobqueue.slurm.host belongs into jobqueue.slurm.scheduler_options"),
        ({"cores": "four"}, "jobqueue.slurm.cores is 'four'; allowed is a whole number from 1"),
        ({"cores": True}, "jobqueue.slurm.cores is True"),
        ({"cores": 0}, "jobqueue.slurm.cores is 0"),
        ({"processes": 3}, "jobqueue.slurm.processes is 3; allowed is at most cores, 2"),
        ({"memory": 8}, "jobqueue.slurm.memory is 8; allowed is an amount with its unit"),
        ({"memory": "much"}, "jobqueue.slurm.memory is 'much'"),
        # What YAML makes of `queue: no`.
        ({"queue": False}, "jobqueue.slurm.queue is False; allowed is a text"),
        ({"walltime": ["1"]}, r"jobqueue.slurm.walltime is \['1'\]; allowed is a text"),
        ({"nanny": "no"}, "jobqueue.slurm.nanny is 'no'; allowed is true or false"),
        ({"job_script_prologue": "module load a"}, "job-script-prologue is .* a list of texts"),
        ({"worker_extra_args": [1]}, "worker-extra-args is .* a list of texts"),
        ({"scheduler-options": ["a"]}, "scheduler-options is .* a mapping"),
        (
            {"env_extra": ["a"], "job_script_prologue": ["b"]},
            "is given twice, as job_script_prologue",
        ),
        ({"interface": "nonsense0"}, "jobqueue.slurm cannot be used: .*nonsense0"),
        ({"scheduler-options": {"prot": 1}}, "jobqueue.slurm cannot be used: .*prot"),
        ({"log_directory": "/proc/none"}, "jobqueue.slurm cannot be used: .*No such file"),
    ],
)
def test_options_that_cannot_be(write, options, said):
    path = write(**options)
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}: .*{said}") as caught:
        script(path)
    assert "\n" not in str(caught.value)


@needs_dask_jobqueue
def test_a_port_that_is_taken(write):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = {"port": taken.getsockname()[1], "dashboard_address": "127.0.0.1:0"}
        with pytest.raises(ConfigError, match=r"cannot be used: .*Address already in use"):
            script(write(scheduler_options=options))


def test_dask_jobqueue_is_not_installed(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(InputError, match=r"need dask-jobqueue .*pip install"):
        script(write())


@needs_dask_jobqueue
def test_a_sites_file_works_as_it_is(tmp_path):
    # Every key of the file that dask-jobqueue comes with, and old names.
    default = Path(importlib.util.find_spec("dask_jobqueue").origin).with_name("jobqueue.yaml")
    section = yaml.safe_load(default.read_text())["jobqueue"]["slurm"]
    section |= ON_LOOPBACK | {
        "name": "photometry",
        "cores": 4,
        "processes": 2,
        "memory": "6GB",
        "account": 4711,
        "queue": "regular",
        "env-extra": ["module load python"],
        "job-extra": ["--qos=low"],
        "walltime": "01:00:00",
    }
    path = tmp_path / "jobqueue.yaml"
    path.write_text(yaml.safe_dump({"jobqueue": {"slurm": section}, "adapt": {"minimum_jobs": 0}}))
    said = script(path)
    for line in ("-J photometry", "-A 4711", "-p regular", "--qos=low", "-t 01:00:00"):
        assert f"#SBATCH {line}\n" in said
    for argument in ("--nworkers 2", "--nthreads 2", "--interface lo", "--death-timeout 60"):
        assert re.search(rf" {argument}\s", said)
    # The user's word is the last.
    assert said.index(TIDIED) < said.index("module load python") < said.index("dask_worker")


@needs_dask_jobqueue
def test_what_a_file_leaves_out_is_as_dask_is_configured(write):
    of_site = {
        "jobqueue.slurm.queue": "of-site",
        "jobqueue.slurm.walltime": "02:00:00",
        "jobqueue.slurm.job-script-prologue": ["module load of-site"],
    }
    with dask.config.set(of_site):
        # The defaults come with the import, and leave alone what is set.
        said = script(write(queue="of-file"))
    assert "-p of-file\n" in said
    assert "-t 02:00:00\n" in said
    assert "\nmodule load of-site\n" in said


@needs_dask_jobqueue
def test_the_file_that_is_given_away(tmp_path):
    options = read_options(DEPLOY / "jobqueue.yaml")
    assert options["adapt"] == jobqueue.SCALE
    options["adapt"]["minimum_jobs"] = 0
    options["jobqueue"]["slurm"] |= ON_LOOPBACK | {"log-directory": str(tmp_path / "logs")}
    path = tmp_path / "jobqueue.yaml"
    path.write_text(yaml.safe_dump(options))
    assert "--nthreads 4 --memory-limit 7.45GiB" in script(path)


@needs_dask_jobqueue
@pytest.mark.parametrize("system", jobqueue.SYSTEMS)
def test_each_system_tells_its_workers_how_to_live(write, system):
    more = {"htcondor": {"disk": "1GB"}, "oar": {"memory_per_core_property_name": "memcore"}}
    said = script(write(system, **more.get(system, {})))
    assert TIDIED in said
    assert ("--lifetime " in said) == (system != "htcondor")


@needs_dask_jobqueue
@pytest.mark.parametrize(
    "system, walltime, lifetime",
    [
        ("slurm", "04:00:00", "13500s --lifetime-stagger 450s"),
        ("slurm", "00:10:00", "540s --lifetime-stagger 30s"),
        ("slurm", "2-00:00:00", "171900s --lifetime-stagger 450s"),
        ("slurm", "1-12", "128700s --lifetime-stagger 450s"),
        ("slurm", 60, "3240s --lifetime-stagger 180s"),
        ("slurm", "60:30", "3267s --lifetime-stagger 182s"),
        ("lsf", "01:00", "3240s --lifetime-stagger 180s"),
        ("slurm", "UNLIMITED", None),
        ("slurm", "0", None),
        ("pbs", "90", None),
    ],
)
def test_workers_leave_before_the_time_is_over(write, system, walltime, lifetime):
    said = script(write(system, walltime=walltime))
    found = re.search(r"--lifetime (\S+ --lifetime-stagger \S+)", said)
    assert (found and found[1]) == lifetime


@needs_dask_jobqueue
def test_a_lifetime_of_the_users_stays(write):
    said = script(write(worker_extra_args=["--lifetime 2h"], walltime="04:00:00"))
    assert re.findall("--lifetime[^ ]* [^ ]+", said) == ["--lifetime 2h"]


@needs_dask_jobqueue
def test_the_dashboard_is_where_the_user_wants_it(write):
    with jobqueue_client(write()) as client:
        assert client.dashboard_link.startswith("http://127.0.0.1:")
        assert client.dashboard_link != "http://127.0.0.1:0/status"


@needs_dask_jobqueue
def test_no_batch_system_here(write, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=r"jobqueue.yaml: there is no sbatch on this machine"):
        script(write(minimum=1))


# A cluster that keeps its size


def adapt(cluster) -> int:
    """Let a cluster look at its size often; return it."""
    for _ in range(5):
        cluster.sync(cluster._adaptive.adapt)
    return len(cluster.plan)


def test_a_steady_cluster_does_not_shrink():
    with (
        LocalCluster(
            n_workers=3, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        # At the test's word alone.
        cluster.adapt(minimum=1, maximum=4, interval="1h", wait_count=1)
        with hold_worker_count(client):
            assert adapt(cluster) == 3
        assert adapt(cluster) == 1


def test_a_cluster_that_does_not_adapt_is_left_alone(client):
    with hold_worker_count(client):
        assert client.cluster._adaptive is None
    with (
        Client(client.scheduler.address, set_as_default=False) as stranger,
        hold_worker_count(stranger),
    ):
        assert len(stranger.nthreads()) == 2


# The thread that looks after the jobs


@needs_dask_jobqueue
def test_a_look_that_fails_is_not_the_last(write, monkeypatch):
    error, looks, said, again = ZeroDivisionError(), [], [], threading.Event()
    look = jobqueue._Watch.look

    def failing(watch):
        if threading.current_thread() is threading.main_thread():
            look(watch)
            return
        looks.append(watch)
        if len(looks) == 1:
            raise error
        again.set()

    monkeypatch.setattr(jobqueue, "LOOK_S", 0.01)
    monkeypatch.setattr(jobqueue._Watch, "look", failing)
    # Not by caplog, whose handler a cluster of jobs keeps to errors.
    monkeypatch.setattr(
        jobqueue.logger, "warning", lambda *_, exc_info: said.append(sys.exc_info()[1])
    )
    with jobqueue_client(write()):
        assert again.wait(60)
    assert said == [error]


@pytest.fixture
def watched():
    """A watch over a cluster of one worker, which is no job of a batch system."""
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        settings = SimpleNamespace(path="x", system="slurm", keywords={"processes": 1})
        yield jobqueue._Watch(settings, cluster, client)


def test_jobs_and_workers_are_counted_where_they_change(watched):
    async def loop() -> int:
        return threading.get_ident()

    job_of, threads = watched.job_of, set()

    def noting(worker):
        threads.add(threading.get_ident())
        return job_of(worker)

    watched.job_of = noting
    jobs, there = watched._present()
    assert set(jobs) == there == {0}
    assert threads == {watched._cluster.sync(loop)}


def test_jobs_are_asked_for_without_a_name_of_the_user(watched, monkeypatch, tmp_path):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def getpwuid(_):
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", getpwuid)
    stub = tmp_path / "squeue"
    stub.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho 12\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    queued, ended = (
        SimpleNamespace(job_id="12", came=False),
        SimpleNamespace(job_id="13", came=False),
    )
    monkeypatch.setitem(watched._cluster.worker_spec, 1, {})
    assert watched._ended({0: queued, 1: ended}) == {1: ended}
    assert f"--user={os.getuid()}" in (tmp_path / "asked").read_text()


def test_a_job_that_cannot_be_cancelled(monkeypatch):
    said = []
    # Not by caplog, whose handler a cluster of jobs keeps to errors.
    monkeypatch.setattr(jobqueue.logger, "warning", lambda text, *of: said.append(text % of))

    class Base:
        job_id = "12"

        async def close(self):
            raise FileNotFoundError("scancel")

    job = jobqueue._job_class(Base)()
    asyncio.run(job.close())
    assert job.status == Status.closed
    assert said == ["job 12 could not be cancelled: scancel"]


# On Slurm


def queued(*options: str) -> list[str]:
    """Return the jobs that Slurm knows, those that are about to end included."""
    command = ["squeue", "--noheader", "--format=%A", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def until(reached: Callable[[], object], timeout: float = 60.0) -> None:
    """Wait for a state that nobody tells of."""
    deadline = time.monotonic() + timeout
    while not reached():
        assert time.monotonic() < deadline, "it does not come to this"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def slurm():
    """A Slurm of one node, with nothing of ours in its queue."""
    if importlib.util.find_spec("dask_jobqueue") is None:
        pytest.skip("dask-jobqueue is not installed")
    home = Path(tempfile.mkdtemp(prefix="spxdask-slurm-"))
    command = [HERE / "slurm" / "local.sh"]
    log = home / "local.log"
    with pytest.MonkeyPatch.context() as patch:
        try:
            with open(log, "w") as out:
                started = subprocess.run([*command, "start", home], stdout=out, stderr=out)
            if started.returncode == 3:
                pytest.skip(f"no Slurm: {log.read_text().strip()}")
            assert started.returncode == 0, log.read_text()
            patch.setenv("SLURM_CONF", str(home / "slurm.conf"))
            patch.setattr(jobqueue, "LOOK_S", 0.5)
            with dask.config.set({"distributed.deploy.lost-worker-timeout": "1s"}):
                yield
        finally:
            subprocess.run([*command, "stop", home], check=True)
            shutil.rmtree(home)


@pytest.fixture
def jobs(slurm, write, tmp_path):
    """Give a function that writes a file for a Slurm whose queue is empty."""
    until(lambda: not queued())

    def jobs(*, minimum: int = 1, **options) -> Path:
        options = {"processes": 1, "log_directory": str(tmp_path / "logs")} | options
        return write(minimum=minimum, **options)

    yield jobs
    # Jobs that were given back need a moment to end.
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
    with jobqueue_client(jobs()) as client:
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

    with ThreadPoolExecutor(1) as other, jobqueue_client(jobs(maximum=1)) as client:
        cancelling = other.submit(cancel)
        # Gives up no transfer by itself.
        config = make_config(output, stall_timeout=600, max_retries=0)
        summary = BatchPipeline(config, client=client).run_all()
        [cancelled] = cancelling.result()
        assert cancelled not in queued("--states=RUNNING")
    assert summary.failed == {}
    assert contents(output) == expected
    requests = [request.path for request in archive.requests[before:]]
    assert requests.count(f"/{archive.uris[2]}") == 2


def test_a_lost_job_is_replaced_in_a_steady_cluster(jobs):
    # Dask by itself replaces only jobs of one worker.
    path = jobs(minimum=1, maximum=2, cores=2, processes=2)
    with jobqueue_client(path) as client:
        client.wait_for_workers(2)
        [first] = queued()
        with hold_worker_count(client):
            subprocess.run(["scancel", first], check=True)
            until(lambda: set(queued("--states=RUNNING")) - {first})
            client.wait_for_workers(2)
            assert client.submit(len, "abc").result() == 3
            assert len(client.cluster.plan) == 2
        adaptive = client.cluster._adaptive
        assert (adaptive.minimum, adaptive.maximum) == (2, 4)


def test_jobs_are_as_many_as_there_is_work_for(jobs, monkeypatch):
    monkeypatch.setitem(jobqueue._ADAPT, "wait_count", 1)
    with jobqueue_client(jobs(minimum=0, maximum=2, cores=1)) as client:
        assert queued() == []
        # A run's tasks are few at a time and short, which by Dask's own reckoning is work
        # for one job.
        tasks = as_completed(client.submit(time.sleep, 0.02, pure=False) for _ in range(2))
        for n, _ in enumerate(tasks):
            if len(client.cluster.plan) == 2 or n == 500:
                break
            tasks.add(client.submit(time.sleep, 0.02, pure=False))
        assert len(client.cluster.plan) == 2
        del tasks, _
        until(lambda: not client.cluster.plan)


def test_a_job_that_slurm_refuses(jobs):
    said = (
        "jobqueue.yaml: sbatch refused a job: Memory specification can not be satisfied; "
        "Batch job submission failed: Requested node configuration is not available"
    )
    with pytest.raises(ClusterError, match=said), jobqueue_client(jobs(memory="900TB")):
        pytest.fail("it has no jobs")
    # The same when jobs are asked for once there is work.
    with (
        pytest.raises(ClusterError, match=said),
        jobqueue_client(jobs(minimum=0, memory="900TB")) as client,
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


def test_refusals_on_the_way_are_not_the_end_at_once(
    jobs, monkeypatch, in_place_of_sbatch, tmp_path
):
    monkeypatch.setattr(jobqueue, "AGAIN_S", 0.1)
    # It refuses as many jobs as this file has lines.
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
        refusals.write_text("once\n" * (jobqueue.TRIES - 1))
        subprocess.run(["scancel", first], check=True)
        until(lambda: set(queued("--states=RUNNING")) - {first})
        client.wait_for_workers(1)
        assert refusals.read_text() == ""
        refusals.write_text("again\n" * 99)
        subprocess.run(["scancel", *queued()], check=True)
        client.submit(Event(client=client).wait).result()

    with (
        pytest.raises(ClusterError, match=r"jobqueue.yaml: sbatch refused a job: out of order$"),
        jobqueue_client(jobs(maximum=1)) as client,
    ):
        lose_jobs(client)


def test_jobs_that_end_before_they_bring_a_worker(jobs, make_config, tmp_path):
    path = jobs(job_script_prologue=["exit 7"])
    log = re.escape(str(tmp_path / "logs" / "dask-worker-"))
    with (
        pytest.raises(ClusterError, match=rf"3 jobs in a row ended .* see {log}\d+\.err$"),
        jobqueue_client(path) as client,
    ):
        BatchPipeline(make_config(tmp_path / "out"), client=client).run_all()


def test_an_error_gives_the_jobs_back(jobs):
    def fail() -> None:
        with jobqueue_client(jobs(minimum=2)):
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
        assert run.wait(30) == 130, run.said
        assert run.left_behind() == []
    assert queued("--states=PENDING,RUNNING") == []


def test_an_interrupt_while_a_job_is_submitted(
    jobs, make_config, archive, in_place_of_sbatch, tmp_path
):
    make_config(tmp_path / "out").to_yaml(tmp_path / "run.yaml")
    # Ctrl-C comes when there is a job, and its number has not been told.
    in_place_of_sbatch('job=$($sbatch "$@"); kill -s INT -- -$PPID; echo $job')
    command = ("spxdask", "run", "--config", str(tmp_path / "run.yaml"))
    with Command(*command, "--jobqueue", str(jobs()), log=tmp_path / "run") as run:
        assert run.wait(60) == 130, run.said
    assert queued("--states=PENDING,RUNNING") == []


def test_the_batch_script(jobs, make_config, expected, tmp_path):
    output = tmp_path / "out"
    make_config(output).to_yaml(tmp_path / "run.yaml")
    size = ("--ntasks=2", "--cpus-per-task=2", "--mem-per-cpu=1G")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # Not with --wait, which looks after 2, 8 and 32 seconds.
    submitted = subprocess.run(
        [*("sbatch", "--parsable"), *size, DEPLOY / "spxdask.sbatch", "--config", "run.yaml"],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "INTERFACE": "lo"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    job = submitted.stdout.strip()
    until(lambda: not queued())
    command = ["scontrol", "--oneliner", "show", "job", job]
    became = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    said = "".join(log.read_text() for log in tmp_path.glob(f"spxdask-{job}.*log"))
    assert " JobState=COMPLETED " in became, said
    assert "light curves, " in (tmp_path / f"spxdask-{job}.log").read_text()
    assert contents(output) == expected
    assert list(tmp_path.glob("scheduler-*.json")) == []
