"""One run at a time: locks on disk, and leases in an object store."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from objectstore import BUCKET, serving

from spxdask.errors import RunFolderError
from spxdask.run.lock import LeaseLock, LocalLock, name_host, open_lock
from spxdask.storage import ObjectStore, open_store

LEASE_S = 20.0
ME = f"process {os.getpid()} on {socket.gethostname()}"
OTHER = "process 12 on node7"


class Clock:
    """Time that passes when somebody sleeps; `then` is called after each sleep."""

    def __init__(self) -> None:
        self.now, self.then = 0.0, lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.then()


class HookedStore(ObjectStore):
    """A store in which something happens before, or after, a write with a condition."""

    conditional = True

    def before(self) -> None:
        """Do nothing, unless a test has it otherwise."""

    def after(self) -> None:
        """Do nothing, unless a test has it otherwise."""

    def put_if_absent(self, name, data):
        self.before()
        written = super().put_if_absent(name, data) if self.conditional else self._put(name, data)
        self.after()
        return written

    def put_if_unchanged(self, name, data, version):
        self.before()
        written = (
            super().put_if_unchanged(name, data, version)
            if self.conditional
            else self._put(name, data)
        )
        self.after()
        return written

    def _put(self, name, data) -> bool:
        self.put(name, data)
        return True


@pytest.fixture(scope="module")
def s3():
    with serving() as filesystem:
        yield filesystem


@pytest.fixture
def state(s3, tmp_path):
    """A folder of the test's own."""
    return HookedStore(f"s3://{BUCKET}/{tmp_path.name}/state")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lease(state, clock):
    """A lock for which waiting takes no time."""
    return LeaseLock(state, "the/run", lease_s=LEASE_S, clock=clock)


def held_by(state, **holder) -> bytes:
    """Write the lock that another process would hold, one of this host by default."""
    record = {"who": OTHER, "host": name_host(), "pid": 12, "run": "r", "beat": 3}
    text = json.dumps(record | holder).encode()
    state.put("lock", text)
    return text


def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def assert_refused(lock, holder=OTHER) -> None:
    with pytest.raises(RunFolderError, match=holder) as error, lock.hold():
        pass
    assert error.value.path == "the/run"


# Both kinds


@pytest.fixture(params=["disk", "store"])
def any_state(request, tmp_path, state):
    return open_store(tmp_path) if request.param == "disk" else state


def test_a_lock_keeps_others_out(any_state):
    lock, other = (open_lock(any_state, "the/run") for _ in range(2))
    assert isinstance(lock, LocalLock if any_state.local_path else LeaseLock)
    assert lock.find_holder() is None
    with lock.hold():
        assert lock.find_holder() == other.find_holder() == ME
        assert not lock.is_lost
    assert lock.find_holder() is None
    with pytest.raises(KeyError), lock.hold():
        raise KeyError
    assert other.find_holder() is None
    with other.hold():
        assert lock.find_holder() == ME


# On disk


def test_another_run_on_disk(tmp_path):
    lock, other = (LocalLock(tmp_path / "lock", "the/run", pause_s=0.0) for _ in range(2))
    with lock.hold():
        assert_refused(other, ME)
        assert_refused(other, ME)
    with other.hold():
        pass


def test_one_who_asks_for_the_holder_is_waited_for(tmp_path):
    lock = LocalLock(tmp_path / "lock", "the/run", attempts=100, pause_s=0.05)
    with lock.hold():
        pass
    with open(tmp_path / "lock") as file, ThreadPoolExecutor(1) as pool:
        fcntl.flock(file, fcntl.LOCK_SH)
        entered = threading.Event()

        def run() -> None:
            with lock.hold():
                entered.set()

        running = pool.submit(run)
        assert not entered.is_set()
        fcntl.flock(file, fcntl.LOCK_UN)
        running.result(60)
        assert entered.is_set()


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = LocalLock(tmp_path / "lock", "the/run")
    with lock.hold():
        assert lock.find_holder() is None
    assert len(caplog.records) == 2
    assert "cannot be locked: Operation not supported" in caplog.text


# In a store


def test_a_free_lock_leaves_no_object(state, lease):
    with lease.hold():
        assert state.exists("lock")
    assert not state.exists("lock")


def test_a_run_renews_its_lease(state):
    options = {"renewal_interval_s": 0.02, "lease_s": 1.0}
    lock, other = (LeaseLock(state, "the/run", **options) for _ in range(2))
    with lock.hold():
        for _ in range(2):
            assert_refused(other, ME)
        assert lock.find_holder() == ME
    with other.hold():
        pass


def test_one_that_died_on_this_host_is_not_waited_for(state, lease, clock):
    held_by(state, pid=ended_pid())
    assert lease.find_holder() is None
    with lease.hold():
        assert clock.now == 0
    # Of this process, too, which has the number of one that ran before it in a container.
    held_by(state, pid=os.getpid())
    with lease.hold():
        assert clock.now == 0


@pytest.mark.parametrize(
    "holder",
    [
        {"host": "node7"},
        # There is a process of that number, whatever it is.
        {"pid": os.getppid()},
        {"pid": None},
    ],
    ids=str,
)
def test_one_that_does_not_renew_its_lease_is_waited_for(state, lease, clock, holder):
    held_by(state, **holder)
    assert lease.find_holder() == OTHER
    with lease.hold():
        assert LEASE_S <= clock.now <= 2 * LEASE_S
    assert not state.exists("lock")


def test_one_that_ends_meanwhile_is_waited_for_no_longer(state, lease, clock):
    held_by(state, host="node7")
    clock.then = lambda: state.delete_many(["lock"]) if clock.now < LEASE_S / 5 else None
    with lease.hold():
        assert clock.now < LEASE_S / 2


@pytest.mark.parametrize("sleeps", [1, 9])
def test_one_of_another_host_that_renews_its_lease_is_left_alone(state, lease, clock, sleeps):
    held_by(state, host="node7")

    def renew():
        if clock.now >= sleeps * LEASE_S / 10:
            held_by(state, host="node7", beat=4)

    clock.then = renew
    assert_refused(lease)
    assert json.loads(state.get("lock"))["beat"] == 4


def test_an_unreadable_lock_is_waited_for(state, lease, clock):
    state.put("lock", b"{")
    with lease.hold():
        assert clock.now >= LEASE_S


@pytest.mark.parametrize("left_behind", [False, True])
def test_of_many_that_begin_at_once_one_is_let_in(state, left_behind):
    if left_behind:
        held_by(state, pid=ended_pid())
    count = 6
    begin, end = threading.Barrier(count), threading.Barrier(count)

    def run(_) -> bool:
        lock = LeaseLock(state, "the/run", renewal_interval_s=0.02, lease_s=2.0)
        begin.wait()
        try:
            with lock.hold():
                end.wait()
                return True
        except RunFolderError:
            end.wait()
            return False

    with ThreadPoolExecutor(count) as pool:
        assert sum(pool.map(run, range(count))) == 1


@pytest.mark.parametrize("found", [False, True])
def test_stores_without_conditions(state, lease, clock, found):
    """The last one that writes has the lock."""
    state.conditional = False
    if found:
        held_by(state, host="node7")
        clock.then = lambda: held_by(state, host="node8") if clock.now > LEASE_S else None
    else:
        state.after = lambda: held_by(state, host="node7")
    assert_refused(lease)
    assert state.exists("lock")


@pytest.mark.parametrize("left_behind", [False, True])
def test_one_that_is_quicker_by_a_moment(state, lease, left_behind):
    theirs = []
    if left_behind:
        held_by(state, pid=ended_pid())
    state.before = lambda: theirs.append(held_by(state, host="node7"))
    assert_refused(lease)
    assert [state.get("lock")] == theirs


def test_a_lock_is_alive_as_soon_as_it_is_written(state, lease):
    """To the other runs of its process, which otherwise would take it over."""
    seen = []
    state.after = lambda: seen.append(lease.find_holder())
    with lease.hold():
        assert seen == [ME]


def test_an_answer_that_was_lost(state, lease, monkeypatch):
    """A request that is sent again finds the lock of its own run."""
    pipe_file = state.filesystem.pipe_file

    def send_twice(path, data, **options):
        pipe_file(path, data, **options)
        pipe_file(path, data, **options)

    monkeypatch.setattr(state.filesystem, "pipe_file", send_twice)
    with lease.hold():
        assert lease.find_holder() == ME


def test_a_lock_that_was_lost_is_not_taken_back(state):
    lock = LeaseLock(state, "the/run", renewal_interval_s=0.02)
    with lock.hold():
        assert not lock.is_lost
        (renewal,) = [t for t in threading.enumerate() if t.name == "spxdask-lock"]
        # Reading and writing are two steps of a renewal, and this may come between them.
        while renewal.is_alive():
            theirs = held_by(state, host="node7")
            renewal.join(0.1)
    assert state.get("lock") == theirs
    assert lock.is_lost
