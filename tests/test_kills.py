"""Runs whose processes are killed at any moment are resumed and end in the same files."""

from __future__ import annotations

import os
import random
import shutil
import socket
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import dask
import killing
import psutil
import pyarrow.parquet as pq
import pytest
import simulated
from distributed import Client, LocalCluster
from killing import Command
from outputs import read_files

from spxdask import BatchConfig, BatchPipeline
from spxdask.errors import RunFolderError
from spxdask.run.folder import RunFolder
from spxdask.run.frame_table import FRAMES_NAME
from spxdask.run.status import read_status
from spxdask.simulate.archive import ArchivedFrame, Fault, SimulatedArchive

pytestmark = [pytest.mark.kill, pytest.mark.cluster]

N_FRAMES = 10
LONG = os.environ.get("SPXDASK_TESTS") == "long"
KILLS = int(os.environ.get("SPXDASK_KILLS", 200 if LONG else 2))
ONLY_LONG = pytest.mark.skipif(not LONG, reason="a similar case runs; SPXDASK_TESTS=long runs all")
# A long run tries other moments each time; a short one repeats the same.
SEED = None if LONG else 20261122


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def survey(home) -> list[ArchivedFrame]:
    (home / "archive").mkdir()
    exposures = [simulated.exposure(i % 5, 1 + i % 6) for i in range(N_FRAMES)]
    survey = simulated.make_survey(home / "archive", exposures)
    survey.write_catalogue(home / "sources.csv")
    return survey.archived


def total_size(survey: list[ArchivedFrame]) -> int:
    return sum(frame.path.stat().st_size for frame in survey)


@pytest.fixture(scope="module")
def archive(survey):
    """An archive that needs more than a second for all frames."""
    with SimulatedArchive(survey, bandwidth=total_size(survey) / 1.2) as archive:
        yield archive


@contextmanager
def two_workers():
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=3, host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def mortal_cluster():
    with two_workers() as client:
        yield client


@pytest.fixture
def mortal_client(mortal_cluster):
    """A cluster whose workers each die once at most; as many are there when a test begins."""
    mortal_cluster.wait_for_workers(2, timeout=60)
    return mortal_cluster


@pytest.fixture
def make_config(home, archive, tmp_path):
    def make(**options) -> BatchConfig:
        defaults = simulated.run_options(home / "sources.csv", archive, tmp_path / "out")
        del defaults["max_retries"]
        defaults["keep_bucket_files"] = True
        return BatchConfig(**(defaults | options))

    return make


def run_command(home: Path, archive: SimulatedArchive, output: Path, *more: str) -> list[str]:
    ra, dec = map(str, simulated.CENTER)
    return [
        *("spxdask", "run", "--ra", ra, "--dec", dec, "--radius", "0.05"),
        *("--catalog", str(home / "sources.csv"), "--output", str(output)),
        *("--num-buckets", "5", "--keep-bucket-files", "--max-extract-workers", "2"),
        *("--calibration", "frame"),
        *("--tap-url", archive.tap_url, "--archive-url", archive.archive_url),
        *more,
    ]


@dataclass(frozen=True)
class Undisturbed:
    """A run of which no process was killed: its output folder, and its time in seconds."""

    output: Path
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(home, archive, survey) -> Undisturbed:
    output = home / "undisturbed"
    started = time.monotonic()
    with Command(*run_command(home, archive, output), log=home / "undisturbed.log") as command:
        assert command.wait(100) == 0, command.stderr
        assert command.left_behind() == []
    seconds = time.monotonic() - started
    for frame in survey:
        assert (output / "images" / frame.path.name).read_bytes() == frame.path.read_bytes()
    assert len(list((output / "per_image").iterdir())) == N_FRAMES
    assert len(list((output / "lightcurves").iterdir())) > 20
    return Undisturbed(output, seconds)


def assert_like_undisturbed(output: Path, undisturbed: Undisturbed) -> None:
    """Assert that the output folder equals that of the undisturbed run."""
    expected = undisturbed.output
    assert [p for p in output.rglob("*") if p.name.endswith(".part")] == []
    for name in ("images", "per_image", "lightcurves"):
        assert read_files(output / name) == read_files(expected / name)
    buckets = {path.name: pq.read_table(path) for path in (output / "buckets").iterdir()}
    assert buckets == {p.name: pq.read_table(p) for p in (expected / "buckets").iterdir()}
    frames = [pq.read_table(each / "state" / FRAMES_NAME) for each in (output, expected)]
    # A frame that was written when its worker died is not fetched again.
    how = ["seconds", "bytes", "read", "requests"]
    assert frames[0].drop_columns(how).equals(frames[1].drop_columns(how))
    found, other = read_status(output), read_status(expected)
    assert (found.measured, found.pending, found.failed) == (N_FRAMES, 0, {})
    assert (found.fetched, found.running) == (N_FRAMES, None)
    assert (found.rows, found.lightcurves) == (other.rows, other.lightcurves)


def stage_of(command: Command, output: Path, began: float) -> str:
    """Return the stage that a run has reached, by the files written since it began."""
    if command.wait(0) is not None:
        return "ended"
    folder = RunFolder(output)
    new = {
        path.name
        for each in (folder.state.local_path, folder.root.local_path)
        for path in (each.iterdir() if each.exists() else ())
        if path.exists() and path.stat().st_mtime >= began
    }
    if "lock" not in new:
        return "start"
    if "query_summary.yaml" not in new:
        return "query"
    if len(list(folder.per_image.local_path.glob("*.csv"))) < N_FRAMES:
        return "frames"
    curves = [p for p in folder.lightcurves.local_path.iterdir() if p.stat().st_mtime >= began]
    return "writing" if curves else "between frames and writing"


@pytest.mark.timeout(6 * 3600 if LONG else 400)
def test_kills_at_random_moments(home, archive, undisturbed, tmp_path, capsys):
    dice = random.Random(SEED)
    tried, unfinished = Counter(), []
    number, began_all = 0, time.monotonic()
    while sum(tried.values()) < KILLS:
        output = tmp_path / f"out{number}"
        arguments = run_command(home, archive, output)
        for n in range(dice.randint(1, 3) if LONG else 2):
            victim = dice.choice(["client", "worker"]) if LONG else ("client", "worker")[n % 2]
            began = time.time()
            with Command(*arguments, log=tmp_path / f"run{number}-{n}") as command:
                command.wait(dice.uniform(0, undisturbed.seconds))
                stage = stage_of(command, output, began)
                workers = command.workers()
                if victim == "worker" and workers:
                    with suppress(psutil.NoSuchProcess):
                        dice.choice(workers).kill()
                    if (ended := command.wait(100)) != 0:
                        unfinished.append((number, n, stage, ended, command.stderr))
                else:
                    victim = "client"
                    command.kill()
                assert command.left_behind() == []
            tried[victim, stage] += 1
        with Command(*arguments, log=tmp_path / f"run{number}-last") as command:
            assert command.wait(100) == 0, command.stderr
            assert command.left_behind() == []
        assert_like_undisturbed(output, undisturbed)
        number += 1
        if LONG:
            shutil.rmtree(output)
            with capsys.disabled():
                took = time.monotonic() - began_all
                print(f"\n{sum(tried.values())} kills in {took:.0f} s: {dict(tried)}", flush=True)
    if LONG:
        with capsys.disabled():
            print(*unfinished, sep="\n")
    # No run failed because it lost a worker.
    assert unfinished == []


def test_worker_killed_during_downloads(make_config, survey, mortal_client, undisturbed):
    victim = min(mortal_client.run(os.getpid).values())
    lock, asked = threading.Lock(), 0

    def plan():
        nonlocal asked
        with lock:
            asked += 1
            kill = asked == 4
        if kill:
            os.kill(victim, 9)
        # The other transfers are then under way with certainty.
        yield Fault(stall=100_000)

    with SimulatedArchive(survey, faults={f.uri: plan() for f in survey}) as archive:
        config = make_config(
            tap_url=archive.tap_url, archive_url=archive.archive_url, stall_timeout=1.0
        )
        summary = BatchPipeline(config, client=mortal_client).run_all()
        assert asked == N_FRAMES
    assert summary.failed == {}
    assert_like_undisturbed(Path(config.output_dir), undisturbed)


@pytest.mark.parametrize(
    ("point", "calls", "inside"),
    [
        ("extract", 2, ""),
        ("transfer", 1, ""),
        ("unpack", 1, ""),
        ("write", 7, ""),
        ("name", 5, "lightcurves/"),
        ("name", 1, "buckets/"),
        pytest.param("fetch", 2, "", marks=ONLY_LONG),
        pytest.param("name", 2, "images/", marks=ONLY_LONG),
        pytest.param("name", 2, "per_image/", marks=ONLY_LONG),
        pytest.param("read", 4, "", marks=ONLY_LONG),
        pytest.param("receive", 1, "", marks=ONLY_LONG),
        pytest.param("unpack", 2, "", marks=ONLY_LONG),
    ],
)
def test_worker_killed_at_a_point(
    make_config, mortal_client, undisturbed, tmp_path, point, calls, inside
):
    marker = tmp_path / "killed"
    # What remains of earlier tests kills none, as their markers are there.
    mortal_client.run(killing.die_once, point, str(marker), calls, inside)
    config = make_config()
    summary = BatchPipeline(config, client=mortal_client).run_all()
    assert marker.exists()
    assert summary.failed == {}
    assert summary.stages["aggregate"].rows == read_status(undisturbed.output).rows
    assert_like_undisturbed(Path(config.output_dir), undisturbed)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("point", ["extract", pytest.param("begin", marks=ONLY_LONG)])
def test_frame_that_kills_its_worker(make_config, survey, client, undisturbed, point):
    deadly = survey[4].path.name
    # Transfers are so slow that other frames are in flight each time a worker dies.
    size = survey[0].path.stat().st_size
    with (
        SimulatedArchive(survey, bandwidth=size) as archive,
        # Four workers die, and as many are started; by default it would be eight.
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        two_workers() as mortal,
    ):
        mortal.register_plugin(killing.DieOfFrame(point, deadly))
        config = make_config(tap_url=archive.tap_url, archive_url=archive.archive_url)
        summary = BatchPipeline(config, client=mortal).run_all()
    assert list(summary.failed) == [deadly]
    assert "KilledWorker" in summary.failed[deadly]
    assert summary.stages["extract"].done == N_FRAMES - 1
    # Other workers can measure it.
    assert BatchPipeline(make_config(), client=client).run_all().failed == {}
    assert_like_undisturbed(Path(config.output_dir), undisturbed)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def scheduler_and_workers(folder: Path, port: int, environment: dict[str, str]):
    """A scheduler and two workers as separate commands, as if on separate machines."""
    address = f"tcp://127.0.0.1:{port}"
    with ExitStack() as stack:
        arguments = ("--host", "127.0.0.1", "--port", str(port), "--no-dashboard")
        scheduler = Command(
            "distributed.cli.dask_scheduler", *arguments, log=folder / f"scheduler{port}"
        )
        stack.enter_context(scheduler)
        for n in range(2):
            worker = Command(
                *("distributed.cli.dask_worker", address, "--host", "127.0.0.1"),
                *("--nthreads", "2", "--no-dashboard", "--death-timeout", "30"),
                *("--local-directory", str(folder)),
                log=folder / f"worker{port}-{n}",
                **environment,
            )
            stack.enter_context(worker)
        yield scheduler, address


@contextmanager
def stalling(moment: str, survey: list[ArchivedFrame], folder: Path):
    """Yield an archive, an environment for workers, and a function that returns at a moment.

    The run stays at that moment until the block ends.
    """
    faults: dict = {}
    if moment == "query":
        faults = {"TAP/sync": repeat(Fault(stall=0))}
    elif moment == "download":
        faults = {frame.uri: repeat(Fault(stall=100_000)) for frame in survey[3:]}
    with SimulatedArchive(survey, faults=faults) as archive, killing.held(folder / "held") as held:
        environment = killing.hold("write", folder / "held") if moment == "writing" else {}

        def reached() -> None:
            if moment == "query":
                archive.wait_for(lambda a: len(a.requests) == 1, timeout_s=60)
            elif moment == "download":
                archive.wait_for(lambda a: a.open_connections == 4, timeout_s=60)
            else:
                held()

        yield archive, environment, reached


@dataclass
class Ended:
    """How a command ended that was stopped, and its output folder.

    `stderr` holds the lines it wrote but those with the addresses of its pages.
    """

    status: int | None
    stderr: list[str]
    left_behind: list[psutil.Process]
    output: Path


def messages_of(command: Command) -> list[str]:
    lines = command.stderr.splitlines()
    return [line for line in lines if not line.startswith(("dashboard ", "frames      "))]


MOMENTS = [pytest.param("query", marks=ONLY_LONG), "download", "writing"]
# A process that ends at once does so at any moment alike.
ONCE = ["download", *(pytest.param(moment, marks=ONLY_LONG) for moment in ("query", "writing"))]


@pytest.fixture(scope="module", params=MOMENTS)
def without_scheduler(request, home, survey):
    """A run whose scheduler was killed."""
    folder = home / f"lost-{request.param}"
    folder.mkdir()
    with (
        stalling(request.param, survey, folder) as (archive, environment, reached),
        scheduler_and_workers(folder, free_port(), environment) as (scheduler, address),
    ):
        arguments = run_command(home, archive, folder / "out", "--scheduler", address)
        with Command(*arguments, log=folder / "run") as command:
            reached()
            scheduler.kill()
            status = command.wait(60)
            return Ended(status, messages_of(command), command.left_behind(), folder / "out")


def assert_resumes(ended: Ended, make_config, client: Client, undisturbed: Undisturbed) -> None:
    """Assert that a run goes on with other processes; commands are resumed at random moments."""
    config = make_config(output_dir=str(ended.output))
    assert BatchPipeline(config, client=client).run_all().failed == {}
    assert_like_undisturbed(ended.output, undisturbed)


def test_run_whose_scheduler_was_killed_is_resumed(
    make_config, without_scheduler, client, undisturbed
):
    assert without_scheduler.status not in (None, 0)
    assert without_scheduler.left_behind == []
    assert_resumes(without_scheduler, make_config, client, undisturbed)


def test_killed_scheduler_is_reported_in_one_sentence(without_scheduler):
    ended = without_scheduler
    assert ended.status == 1
    (message,) = ended.stderr
    assert message.startswith("spxdask: ")
    assert "scheduler" in message


@pytest.fixture(scope="module", params=MOMENTS)
def interrupted(request, home, survey):
    """A run that was stopped by one Ctrl-C."""
    folder = home / f"interrupted-{request.param}"
    folder.mkdir()
    return interrupt(1, request.param, home, survey, folder)


@pytest.fixture(scope="module", params=ONCE)
def interrupted_twice(request, home, survey):
    """A run that was stopped by two."""
    folder = home / f"interrupted-twice-{request.param}"
    folder.mkdir()
    return interrupt(2, request.param, home, survey, folder)


def interrupt(times: int, moment: str, home: Path, survey: list, folder: Path) -> Ended:
    output = folder / "out"
    with stalling(moment, survey, folder) as (archive, environment, reached):
        # One worker at the later moment: there, more of them would do the same.
        n_workers = "2" if moment == "download" else "1"
        arguments = run_command(home, archive, output, "--max-extract-workers", n_workers)
        with Command(*arguments, log=folder / "run", **environment) as command:
            reached()
            # Another run is refused before the interrupt, which only the command receives.
            config = RunFolder(output).saved_config() if moment != "query" else None
            if config is not None:
                holder = f"another run is at work .*process {command.pid}"
                with pytest.raises(RunFolderError, match=holder):
                    BatchPipeline(config).run_query()
            command.interrupt()
            if times == 2:
                while "again stops at once" not in command.stderr:
                    assert command.wait(0.01) is None
                command.interrupt()
            # The task at the point never ends by itself.
            status = command.wait(60)
            left_behind = command.left_behind()
            return Ended(status, messages_of(command), left_behind, output)


def test_interrupt(make_config, interrupted, client, undisturbed):
    assert interrupted.status == 130
    assert interrupted.left_behind == []
    assert "spxdask: stopping; Ctrl-C again stops at once" in interrupted.stderr
    assert interrupted.stderr[-1] == "spxdask: stopped; the same command resumes the run"
    assert_resumes(interrupted, make_config, client, undisturbed)


def test_interrupt_twice(make_config, interrupted_twice, client, undisturbed):
    assert interrupted_twice.status == 130
    assert interrupted_twice.left_behind == []
    assert "spxdask: stopped at once" in interrupted_twice.stderr
    assert_resumes(interrupted_twice, make_config, client, undisturbed)


def test_interrupt_writes_two_lines(interrupted):
    assert [line for line in interrupted.stderr if line] == [
        "spxdask: stopping; Ctrl-C again stops at once",
        "spxdask: stopped; the same command resumes the run",
    ]
