"""Workers that are frozen, or whose tasks hang, are reported and replaced; nothing is lost."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import dask
import killing
import pytest
import simulated
from distributed import Client, LocalCluster, WorkerPlugin
from outputs import output_of, read_files

from spxdask import BatchConfig, BatchPipeline
from spxdask.archive import transfer
from spxdask.cluster import tasks
from spxdask.cluster.frozen import FrozenTimes, FrozenWatch
from spxdask.cluster.stacks import FILE_NAME, METRIC, Look, Place, StackKeeper, keep_stacks, look
from spxdask.run.folder import RunFolder

# Watches


def worker(nanny="tcp://127.0.0.1:2", still_s=0.0, longest_s=0.0, pid=1 << 30) -> dict:
    said = {"host": socket.gethostname(), "pid": pid, "still_s": still_s, "longest_s": longest_s}
    return {
        "last_seen": 0.0,
        "nanny": nanny,
        "host": "127.0.0.1",
        "local_directory": "/nowhere",
        "metrics": {METRIC: said},
    }


class Cluster:
    """What a watch asks a client for, and a clock."""

    def __init__(self, **workers: dict) -> None:
        self.workers = workers
        self.now_s = 0.0
        self.saved: dict[str, str] = {}
        self.restarted: list[str] = []
        times = FrozenTimes(silent_s=60, still_s=180, still_factor=3, poll_interval_s=5)
        self.watch = FrozenWatch(self, times, self.save, clock=lambda: self.now_s)

    def scheduler_info(self, n_workers: int) -> dict:
        # The scheduler's own clock is another one.
        for info in self.workers.values():
            info["last_seen"] += 1000 if not info.get("is_frozen") else 0
        return {"workers": {name: dict(info) for name, info in self.workers.items()}}

    def restart_workers(self, workers: list[str], **_) -> None:
        self.restarted += workers
        for name in workers:
            del self.workers[name]

    def run(self, function: Callable, *arguments, workers: list[str], **_) -> dict:
        raise TimeoutError

    def save(self, name: str, stacks: str) -> str:
        self.saved[name] = stacks
        return f"state/{name}"

    def wait(self, seconds: float, step: float = 5) -> None:
        for _ in range(int(seconds / step)):
            self.now_s += step
            self.watch.poll()


def test_a_silent_worker_is_replaced_and_reported_once(caplog):
    cluster = Cluster(a=worker(), b=worker())
    cluster.wait(100)
    cluster.workers["a"]["is_frozen"] = True
    cluster.wait(55)
    assert (cluster.restarted, cluster.saved) == ([], {})
    cluster.wait(200)
    assert (cluster.restarted, cluster.watch.n_replaced) == (["a"], 1)
    [message] = caplog.messages
    assert "has not answered for 60 s: it is replaced" in message
    [stacks] = cluster.saved.values()
    assert "has not answered" in stacks


def test_a_worker_that_starts_has_more_time():
    cluster = Cluster(a=worker() | {"metrics": {}, "is_frozen": True})
    cluster.wait(180)
    assert cluster.restarted == []
    cluster.wait(5)
    assert cluster.restarted == ["a"]


def test_a_worker_that_answers_again_in_time_is_kept(caplog):
    cluster = Cluster(a=worker())
    for _ in range(5):
        cluster.workers["a"]["is_frozen"] = True
        cluster.wait(55)
        cluster.workers["a"]["is_frozen"] = False
        cluster.wait(5)
    assert (cluster.restarted, cluster.saved, caplog.messages) == ([], {}, [])


def test_time_in_which_the_watch_did_not_run_does_not_count():
    """As after Ctrl-Z, which stops the workers, too, or when the machine slept."""
    cluster = Cluster(a=worker(), b=worker())
    cluster.workers["a"]["is_frozen"] = cluster.workers["b"]["is_frozen"] = True
    cluster.wait(3600, step=3600)
    assert cluster.restarted == []


def test_a_worker_without_nanny_is_reported_with_what_to_do(caplog):
    cluster = Cluster(a=worker(nanny=None, pid=None) | {"is_frozen": True})
    cluster.workers["b"] = worker(nanny=None, still_s=500)
    cluster.wait(300)
    assert (cluster.restarted, cluster.watch.n_replaced) == ([], 0)
    assert len(caplog.messages) == 2
    assert all("no nanny that could replace it: end it" in text for text in caplog.messages)


def test_a_worker_that_the_scheduler_replaced_first_is_reported(caplog):
    cluster = Cluster(a=worker(), b=worker())
    cluster.wait(5)
    cluster.workers["a"]["is_frozen"] = True
    cluster.wait(40)
    del cluster.workers["a"]
    # One that answered until then has died of something else.
    del cluster.workers["b"]
    cluster.wait(5)
    assert cluster.watch.n_replaced == 1
    [message] = caplog.messages
    assert "has not answered for 40 s" in message


@pytest.mark.parametrize(("longest_s", "limit_s"), [(0.0, 180), (10.0, 180), (100.0, 300)])
def test_tasks_hang_after_a_multiple_of_the_longest_so_far(caplog, longest_s, limit_s):
    cluster = Cluster(a=worker(), b=worker(longest_s=longest_s))
    cluster.workers["a"]["metrics"][METRIC]["still_s"] = limit_s - 1
    cluster.wait(5)
    assert cluster.restarted == []
    cluster.workers["a"]["metrics"][METRIC]["still_s"] = limit_s
    cluster.wait(5)
    assert cluster.restarted == ["a"]
    assert "has tasks that hang" in caplog.text


def test_a_restart_that_fails_is_tried_again(caplog):
    cluster = Cluster(a=worker() | {"is_frozen": True})
    restart, cluster.restart_workers = cluster.restart_workers, raise_lost
    cluster.wait(60)
    with pytest.raises(OSError, match="gone"):
        cluster.wait(5)
    cluster.restart_workers = restart
    cluster.wait(60)
    assert (cluster.restarted, cluster.watch.n_replaced) == (["a"], 1)
    assert len(caplog.messages) == 1


def raise_lost(*_, **__) -> None:
    raise OSError("gone")


def test_stacks_are_saved_under_a_safe_name(tmp_path):
    folder = RunFolder(tmp_path / "out")
    path = Path(folder.save_stacks("../../evil/\x00-7", "text"))
    assert path.parent == tmp_path / "out" / "state" / "stacks"
    assert path.read_text() == "text"


# What tasks are doing

RUN = Place(tasks.__file__, "error_as_value", 1)
HELD = (Place(threading.__file__, "wait", 1), RUN)
SOCKET = (Place(socket.__file__, "readinto", 1), RUN)
SELECT = (Place("/x/selectors.py", "select", 1),)
FETCH = (
    Place(threading.__file__, "wait", 1),
    Place("/x/fsspec/asyn.py", "sync", 1),
    Place(transfer.__file__, "fetch_file", 1),
    RUN,
)
STORE = (*FETCH[:2], RUN)
SHUFFLE = (
    Place("/x/distributed/utils.py", "sync", 1),
    Place("/x/distributed/shuffle/a.py", "b", 1),
)
OTHERS_TASK = HELD[:1]


@pytest.mark.parametrize(
    ("still", "now"),
    [
        (True, Look({"a": HELD})),
        (True, Look({"a": HELD, "b": HELD}, cpu_s=0.1)),
        # The transfer is over, and the file is being checked.
        (True, Look({"a": FETCH}, sender=SELECT)),
        (True, Look({"a": FETCH}, sender=HELD, n_requests=1)),
        (False, Look({})),
        (False, Look({"a": FETCH}, sender=SELECT, n_requests=1)),
        (False, Look({"a": HELD, "b": FETCH}, sender=SELECT, n_requests=1)),
        (False, Look({"a": HELD}, others=(STORE,))),
        (False, Look({"a": SOCKET})),
        (False, Look({"a": SHUFFLE})),
        (False, Look({"a": OTHERS_TASK, "b": HELD})),
        (False, Look({"a": HELD}, cpu_s=2.0)),
        (False, Look({"a": HELD}, is_at_disk=True)),
    ],
)
def test_tasks_are_still(still, now):
    before = now._replace(cpu_s=0.0)
    assert now.has_moved(before, 5.0) is not still


def test_all_tasks_of_a_cluster_that_is_not_shared_are_those_of_a_run():
    now = Look({"a": OTHERS_TASK})
    assert not now.has_moved(now, 5.0, is_shared=False)


def test_tasks_that_change_have_moved():
    assert Look({"a": HELD}).has_moved(Look({"b": HELD}), 5.0)
    assert Look({"a": HELD}).has_moved(Look({"a": SOCKET}), 5.0)


def test_threads_are_looked_at(tmp_path):
    """One waits for nothing, and one for a lock that another process could hold."""
    lock = tmp_path / "lock"
    over = threading.Event()
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def ask() -> None:
            with open(lock) as file:
                fcntl.flock(file, fcntl.LOCK_EX)

        thread = threading.Thread(target=over.wait)
        thread.start()
        try:
            found = look({thread.ident: "a"})
            assert found.tasks["a"][0].function == "wait"
            asking = threading.Thread(target=ask)
            asking.start()
            while not (found := look({asking.ident: "a"})).is_waiting:
                assert asking.is_alive()
            assert found.tasks["a"][0].function == "ask"
        finally:
            over.set()
            fcntl.flock(held, fcntl.LOCK_UN)
            asking.join()
            thread.join()


# Runs on a cluster

SOON = FrozenTimes(silent_s=12.0, still_s=10.0, poll_interval_s=0.25)


@pytest.fixture(scope="module")
def cluster():
    with (
        # A busy machine may freeze workers as well.
        dask.config.set({"distributed.scheduler.allowed-failures": 10}),
        LocalCluster(
            n_workers=2,
            threads_per_worker=2,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def workers(cluster):
    """The client of two workers, of whatever processes."""
    cluster.wait_for_workers(2, timeout=60)
    return cluster


def get_last_seen(client: Client, address: str, after_s: float = 0.0) -> float:
    time.sleep(after_s)
    return client.scheduler_info(n_workers=-1)["workers"][address]["last_seen"]


def get_stacks(dask_worker) -> bytes:
    return Path(dask_worker.local_directory, FILE_NAME).read_bytes()


def block(dask_worker) -> bytes:
    """Keep the event loop busy until the stacks are there."""
    while b"most recent call first" not in (stacks := get_stacks(dask_worker)):
        time.sleep(0.01)
    return stacks


def disarm(client: Client) -> None:
    """Have the workers keep no stacks, so that they have just been started for a watch."""
    # There are none to keep where no run has used the workers.
    with suppress(ValueError):
        client.unregister_worker_plugin(StackKeeper.name)
    # The scheduler learns it by heartbeats.
    while any(METRIC in w["metrics"] for w in client.scheduler_info(-1)["workers"].values()):
        client.run(send_heartbeat)


async def send_heartbeat(dask_worker) -> None:
    await dask_worker.heartbeat()


def test_an_event_loop_that_does_not_run_leaves_the_stacks(workers):
    keep_stacks(workers, 0.1, 0.3, is_shared=True)
    assert len(workers.run(block)) == 2
    # They are gone when it runs again.
    while any(workers.run(get_stacks).values()):
        time.sleep(0.01)
    disarm(workers)
    assert not any(METRIC in w["metrics"] for w in workers.run(get_metrics).values())


async def get_metrics(dask_worker) -> dict:
    return {"metrics": await dask_worker.get_metrics()}


def test_a_worker_in_the_process_of_the_client_is_left_alone(in_process):
    keep_stacks(in_process, 0.1, 0.3, is_shared=True)
    [worker] = in_process.cluster.workers.values()
    assert METRIC not in worker.metrics
    assert not Path(worker.local_directory, FILE_NAME).exists()


def test_a_stopped_worker_that_goes_on_is_kept(workers):
    now_s, saved = 0.0, []
    disarm(workers)
    times = FrozenTimes(silent_s=60, poll_interval_s=1000)
    watch = FrozenWatch(workers, times, lambda *text: saved.append(text), clock=lambda: now_s)
    address, pid = next(iter(workers.run(os.getpid).items()))

    def poll_after(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds
        watch.poll()

    watch.poll()
    os.kill(pid, signal.SIGSTOP)
    try:
        # A heartbeat may be on its way.
        while get_last_seen(workers, address) != get_last_seen(workers, address, 1.0):
            pass
        watch.poll()
        poll_after(100)
        description = watch.find_description(address)
        assert (description.pid, description.is_stopped) == (pid, True)
        assert f"{pid} " in description.text
    finally:
        os.kill(pid, signal.SIGCONT)
    assert workers.run(os.getpid)[address] == pid
    last_seen = get_last_seen(workers, address)
    while get_last_seen(workers, address) == last_seen:
        time.sleep(0.01)
    poll_after(10)
    assert watch.find_description(address) is None
    assert (saved, watch.n_replaced) == ([], 0)


@pytest.fixture(scope="module")
def survey(tmp_path_factory) -> simulated.Survey:
    exposures = [simulated.exposure(number, 1 + number) for number in range(4)]
    return simulated.make_survey(tmp_path_factory.mktemp("survey"), exposures, n_sources=20)


@pytest.fixture(scope="module")
def undisturbed(cluster, survey, archive, tmp_path_factory):
    home = tmp_path_factory.mktemp("undisturbed")
    catalogue = survey.write_catalogue(home / "sources.csv")
    options = simulated.run_options(catalogue, archive, home / "out")
    config = BatchConfig(**options)
    pipeline = BatchPipeline(config, client=cluster)
    assert pipeline.run_all().replaced_workers == 0
    assert not (home / "out" / "state" / "stacks").exists()
    return output_of(pipeline)


class Harm(WorkerPlugin):
    """Lets workers come to harm at some points, one worker at each."""

    name = "harm"

    def __init__(self, home: Path, points: dict[str, str]) -> None:
        self.home, self.points = home, points

    def setup(self, worker) -> None:
        for point, how in self.points.items():
            killing.die_once(point, str(self.home / point), 1, how=how)


# In one run, as each costs a new process: frames are fetched and measured in one task, and it is
# another worker that comes to harm at each of the points.
POINTS = {"begin": "stop", "fetch": "gil", "extract": "hang", "receive": "stop"}


@pytest.mark.timeout(300)
def test_a_run_replaces_workers_that_do_not_get_on(
    workers, make_config, undisturbed, tmp_path, caplog
):
    workers.register_plugin(Harm(tmp_path, POINTS))
    try:
        pipeline = BatchPipeline(make_config(), client=workers, frozen_times=SOON)
        summary = pipeline.run_all()
    finally:
        workers.unregister_worker_plugin(Harm.name)
    assert all((tmp_path / point).exists() for point in POINTS)
    assert summary.failed == {}
    output = output_of(pipeline)
    for name in ("images", "per_image", "lightcurves"):
        assert read_files(output.path / name) == read_files(undisturbed.path / name)
    stacks = [path.read_text() for path in (output.state / "stacks").iterdir()]
    assert len(POINTS) <= len(stacks) <= summary.replaced_workers
    assert f"{summary.replaced_workers} frozen ones replaced" in str(summary)
    for wanted in ("T (stopped)", "in harm", "in extract_frame"):
        assert any(wanted in text for text in stacks)
    for path in (output.state / "stacks").iterdir():
        assert str(path) in caplog.text
