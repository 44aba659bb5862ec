"""What is killed, at whatever moment, ends in the same light curves: with real processes."""

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

import killing
import psutil
import pyarrow.parquet as pq
import pytest
import simulated
from distributed import Client, LocalCluster
from killing import Command

from spxdask import BatchConfig, BatchPipeline
from spxdask.errors import RunFolderError
from spxdask.run.folder import RunFolder
from spxdask.run.status import status
from spxdask.simulate.archive import ArchivedFrame, Fault, SimulatedArchive

N_FRAMES = 10
LONG = os.environ.get("SPXDASK_TESTS") == "long"
KILLS = int(os.environ.get("SPXDASK_KILLS", 200 if LONG else 6))
ONLY_LONG = pytest.mark.skipif(not LONG, reason="one like it runs; SPXDASK_TESTS=long has all")
# Others each time where nobody waits for the same colour.
SEED = None if LONG else 20261122


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def survey(home) -> list[ArchivedFrame]:
    sky = simulated.field_sky()
    ids = [f"s{i}" for i in range(len(sky))]
    simulated.write_catalogue(home / "sources.csv", ids, sky.ra, sky.dec)
    exposures = [simulated.exposure(i % 5, 1 + i % 6) for i in range(N_FRAMES)]
    (home / "archive").mkdir()
    return [f.archived for f in simulated.simulate(home / "archive", exposures, sky)]


@pytest.fixture(scope="module")
def archive(survey):
    """All frames together take more than a second."""
    size = sum(frame.path.stat().st_size for frame in survey)
    with SimulatedArchive(survey, bandwidth=size / 1.2) as archive:
        yield archive


@pytest.fixture
def client():
    """A cluster of processes that a test may kill, each its own: patches stay in workers."""
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=3, host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def make_config(home, archive, tmp_path):
    def make(**options) -> BatchConfig:
        defaults = {
            "catalog_path": home / "sources.csv",
            "center_ra": simulated.CENTER[0],
            "center_dec": simulated.CENTER[1],
            "radius": 0.05,
            "output_dir": tmp_path / "out",
            "num_buckets": 5,
            "keep_bucket_files": True,
            "tap_url": archive.tap_url,
            "archive_url": archive.archive_url,
        }
        return BatchConfig(**(defaults | options))

    return make


def run_command(home: Path, archive: SimulatedArchive, output: Path, *more: str) -> list[str]:
    ra, dec = map(str, simulated.CENTER)
    return [
        *("spxdask", "run", "--ra", ra, "--dec", dec, "--radius", "0.05"),
        *("--catalog", str(home / "sources.csv"), "--output", str(output)),
        *("--num-buckets", "5", "--keep-bucket-files", "--max-extract-workers", "2"),
        *("--tap-url", archive.tap_url, "--archive-url", archive.archive_url),
        *more,
    ]


@pytest.fixture(scope="module")
def undisturbed(home, archive, survey):
    """The folder of a run that nobody disturbed, and how long it took."""
    output = home / "undisturbed"
    started = time.monotonic()
    with Command(*run_command(home, archive, output), log=home / "undisturbed.log") as command:
        assert command.wait(100) == 0, command.said
        assert command.left_behind() == []
    span = time.monotonic() - started
    for frame in survey:
        assert (output / "images" / frame.path.name).read_bytes() == frame.path.read_bytes()
    assert len(list((output / "per_image").iterdir())) == N_FRAMES
    assert len(list((output / "lightcurves").iterdir())) > 20
    return output, span


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_whole(output: Path, undisturbed: tuple[Path, float]) -> None:
    """See that nobody can tell the folder of a disturbed run from that of another."""
    expected, _ = undisturbed
    assert [p for p in output.rglob("*") if p.name.endswith(".part")] == []
    for name in ("images", "per_image", "lightcurves"):
        assert contents(output / name) == contents(expected / name)
    buckets = {path.name: pq.read_table(path) for path in (output / "buckets").iterdir()}
    assert buckets == {p.name: pq.read_table(p) for p in (expected / "buckets").iterdir()}
    found, other = status(output), status(expected)
    assert (found.measured, found.pending, found.failed) == (N_FRAMES, 0, {})
    assert (found.fetched, found.at_work) == (N_FRAMES, None)
    assert (found.rows, found.lightcurves) == (other.rows, other.lightcurves)


def stage_of(command: Command, output: Path, began: float) -> str:
    """Read from disk how far a run is; `began` is when it did."""
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


@pytest.mark.timeout(6 * 3600 if LONG else 180)
def test_random_kills(home, archive, undisturbed, tmp_path, capsys):
    _, span = undisturbed
    dice = random.Random(SEED)
    tried, unfinished = Counter(), []
    number, began_all = 0, time.monotonic()
    while sum(tried.values()) < KILLS:
        output = tmp_path / f"out{number}"
        arguments = run_command(home, archive, output)
        for n in range(dice.randint(1, 3) if LONG else 3):
            victim = dice.choice(["client", "worker"]) if LONG else ("client", "worker")[n % 2]
            began = time.time()
            with Command(*arguments, log=tmp_path / f"run{number}-{n}") as command:
                command.wait(dice.uniform(0, span))
                stage = stage_of(command, output, began)
                workers = command.workers()
                if victim == "worker" and workers:
                    with suppress(psutil.NoSuchProcess):
                        dice.choice(workers).kill()
                    if (ended := command.wait(100)) != 0:
                        unfinished.append((number, n, stage, ended, command.said))
                else:
                    victim = "client"
                    command.kill()
                assert command.left_behind() == []
            tried[victim, stage] += 1
        with Command(*arguments, log=tmp_path / f"run{number}-last") as command:
            assert command.wait(100) == 0, command.said
            assert command.left_behind() == []
        check_whole(output, undisturbed)
        number += 1
        if LONG:
            shutil.rmtree(output)
            with capsys.disabled():
                took = time.monotonic() - began_all
                print(f"\n{sum(tried.values())} kills in {took:.0f} s: {dict(tried)}", flush=True)
    if LONG:
        with capsys.disabled():
            print(*unfinished, sep="\n")
    # A worker that is lost costs the run nothing.
    assert unfinished == []


def test_worker_killed_in_download(make_config, survey, client, undisturbed):
    victim = min(client.run(os.getpid).values())
    lock, asked = threading.Lock(), 0

    def plan():
        nonlocal asked
        with lock:
            asked += 1
            kill = asked == 4
        if kill:
            os.kill(victim, 9)
        # So that the others are under way for certain.
        yield Fault(stall=100_000)

    with SimulatedArchive(survey, faults={f.uri: plan() for f in survey}) as archive:
        config = make_config(
            tap_url=archive.tap_url, archive_url=archive.archive_url, stall_timeout=1.0
        )
        summary = BatchPipeline(config, client=client).run_all()
        assert asked == N_FRAMES
    assert summary.failed == {}
    check_whole(Path(config.output_dir), undisturbed)


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
def test_worker_killed_at_a_point(make_config, client, undisturbed, tmp_path, point, calls, inside):
    marker = tmp_path / "killed"
    client.run(killing.die_once, point, str(marker), calls, inside)
    config = make_config()
    summary = BatchPipeline(config, client=client).run_all()
    assert marker.exists()
    assert summary.failed == {}
    assert summary.stages["aggregate"].rows == status(undisturbed[0]).rows
    check_whole(Path(config.output_dir), undisturbed)


@pytest.mark.parametrize("point", ["extract", pytest.param("begin", marks=ONLY_LONG)])
def test_frame_that_kills_its_worker(make_config, survey, client, undisturbed, point):
    deadly = survey[4].path.name
    client.register_plugin(killing.Deadly(point, deadly))
    # The others are in flight for long enough to be there each time a worker dies.
    size = survey[0].path.stat().st_size
    with SimulatedArchive(survey, bandwidth=size) as archive:
        config = make_config(tap_url=archive.tap_url, archive_url=archive.archive_url)
        summary = BatchPipeline(config, client=client).run_all()
    print(summary.failed)
    assert list(summary.failed) == [deadly]
    assert "KilledWorker" in summary.failed[deadly]
    assert summary.stages["extract"].done == N_FRAMES - 1
    # Other workers can measure it.
    assert BatchPipeline(make_config()).run_all().failed == {}
    check_whole(Path(config.output_dir), undisturbed)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def scheduler_and_workers(folder: Path, port: int, environment: dict[str, str]):
    """A cluster of separate processes, as on machines of their own."""
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
    """Give an archive, an environment for workers, and a function that returns in a stage.

    Then the run stays there for as long as the block lasts.
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
    """How a command ended that was stopped, and the folder it worked in.

    What it said is without the addresses of its pages.
    """

    status: int | None
    seconds: float
    said: list[str]
    left_behind: list[psutil.Process]
    output: Path


def said_by(command: Command) -> list[str]:
    lines = command.said.splitlines()
    return [line for line in lines if not line.startswith(("dashboard ", "frames      "))]


MOMENTS = [pytest.param("query", marks=ONLY_LONG), "download", "writing"]


@pytest.fixture(scope="module", params=MOMENTS)
def without_scheduler(request, home, survey):
    """A run that lost its scheduler."""
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
            started = time.monotonic()
            status = command.wait(60)
            seconds = time.monotonic() - started
            said = said_by(command)
            return Ended(status, seconds, said, command.left_behind(), folder / "out")


def test_scheduler_killed(home, archive, without_scheduler, undisturbed, tmp_path):
    ended = without_scheduler
    assert ended.status not in (None, 0)
    assert ended.left_behind == []
    with scheduler_and_workers(tmp_path, free_port(), {}) as (_, address):
        arguments = run_command(home, archive, ended.output, "--scheduler", address)
        with Command(*arguments, log=tmp_path / "again") as command:
            assert command.wait(100) == 0, command.said
    check_whole(ended.output, undisturbed)


def test_scheduler_killed_is_told_in_a_sentence(without_scheduler):
    ended = without_scheduler
    print(*ended.said, sep="\n")
    assert ended.status == 1
    (said,) = ended.said
    assert said.startswith("spxdask: ")
    assert "scheduler" in said


@pytest.fixture(scope="module", params=MOMENTS)
def interrupted(request, home, survey):
    """A run that was stopped by Ctrl-C."""
    folder = home / f"interrupted-{request.param}"
    folder.mkdir()
    return interrupt(1, request.param, home, survey, folder)


@pytest.fixture(scope="module", params=MOMENTS)
def interrupted_twice(request, home, survey):
    folder = home / f"interrupted-twice-{request.param}"
    folder.mkdir()
    return interrupt(2, request.param, home, survey, folder)


def interrupt(times: int, moment: str, home: Path, survey: list, folder: Path) -> Ended:
    output = folder / "out"
    with stalling(moment, survey, folder) as (archive, environment, reached):
        arguments = run_command(home, archive, output)
        with Command(*arguments, log=folder / "run", **environment) as command:
            reached()
            # Ctrl-C goes to one run only; another in the same folder is kept out.
            config = RunFolder(output).saved_config() if moment != "query" else None
            if config is not None:
                said = f"another run is at work .*process {command.pid}"
                with pytest.raises(RunFolderError, match=said):
                    BatchPipeline(config).run_query()
            command.interrupt()
            if times == 2:
                while "again stops at once" not in command.said:
                    assert command.wait(0.01) is None
                command.interrupt()
            started = time.monotonic()
            status = command.wait(30)
            seconds = time.monotonic() - started
            left_behind = command.left_behind(2.0)
            return Ended(status, seconds, said_by(command), left_behind, output)


def check_resumes(ended: Ended, home, archive, undisturbed, tmp_path) -> None:
    with Command(*run_command(home, archive, ended.output), log=tmp_path / "again") as command:
        assert command.wait(100) == 0, command.said
    check_whole(ended.output, undisturbed)


def test_interrupt(home, archive, interrupted, undisturbed, tmp_path):
    print(interrupted.seconds, *interrupted.said, sep="\n")
    assert interrupted.status == 130
    assert interrupted.seconds < 10
    assert interrupted.left_behind == []
    assert "spxdask: stopping; Ctrl-C again stops at once" in interrupted.said
    assert interrupted.said[-1] == "spxdask: stopped; the same command goes on where it was"
    check_resumes(interrupted, home, archive, undisturbed, tmp_path)


def test_interrupt_twice(home, archive, interrupted_twice, undisturbed, tmp_path):
    print(interrupted_twice.seconds, *interrupted_twice.said, sep="\n")
    assert interrupted_twice.status == 130
    assert interrupted_twice.seconds < 2
    assert interrupted_twice.left_behind == []
    assert "spxdask: stopped at once" in interrupted_twice.said
    check_resumes(interrupted_twice, home, archive, undisturbed, tmp_path)


def test_interrupt_makes_no_noise(interrupted):
    assert [line for line in interrupted.said if line] == [
        "spxdask: stopping; Ctrl-C again stops at once",
        "spxdask: stopped; the same command goes on where it was",
    ]
