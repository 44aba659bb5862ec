"""Runs in an object store, and what they are made of: files, the ledger, the lock."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from objectstore import BUCKET, contents

from spxdask.errors import RunFolderError, StoreError
from spxdask.run import lock
from spxdask.run.ledger import Ledger, Outcome
from spxdask.storage import files as storage
from spxdask.storage.files import (
    as_path,
    atomic_path,
    direct_write,
    is_local,
    local_copy,
    move,
    names_in,
    open_seekable,
    read_bytes,
    read_each,
    remove,
    sizes,
    starts_with,
    write_each,
)


@pytest.fixture
def store(object_store):
    return object_store


@pytest.fixture
def url(store, request):
    """A folder of the test's own."""
    return f"s3://{BUCKET}/{request.node.name.partition('[')[0]}"


# Files

# Names of light curves that mean something to one who looks for files, or reads URLs.
NAMES = ["a.csv", "a[1].csv", "*.csv", "?.csv", "b?c#d&e=f.csv", "100%25.csv", "é + ü.csv", " .csv"]


def test_places(url):
    assert as_path("s3://bucket/a/") == as_path("s3://bucket/a")
    assert str(as_path("s3://bucket/a") / "b?c#d [1]") == "s3://bucket/a/b?c#d [1]"
    assert not is_local(as_path("s3://bucket/a"))
    assert as_path("file:///a/b%20c") == as_path("local:///a/b%20c") == Path("/a/b c")
    assert is_local(as_path("a:b"))


def test_files_in_a_store(store, url):
    folder = as_path(url)
    assert (sizes(folder), names_in(folder)) == ({}, set())
    written = {name: name.encode() for name in NAMES}
    write_each(folder, written.items())
    assert sizes(folder) == {name: len(data) for name, data in written.items()}
    assert contents(store, folder.path) == written
    assert list(read_each(folder, NAMES)) == list(written.values())
    for name, data in written.items():
        assert read_bytes(folder / name) == data
        assert starts_with(folder / name, data[:3])
        assert not starts_with(folder / name, data + b".")
    # What is in a folder of it is not in it.
    store.pipe_file(f"{folder.path}/other/b.csv", b"")
    store.pipe_file(f"{folder.path}/", b"")
    assert names_in(folder) == set(NAMES)
    for name in NAMES:
        remove(folder, [name])
        del written[name]
        assert names_in(folder) == written.keys()
    assert read_bytes(folder / "other" / "b.csv") == b""


@pytest.mark.parametrize("count", [1, 4, 9])
def test_many_files(url, count, monkeypatch):
    monkeypatch.setattr(storage, "MAX_CONCURRENT_REQUESTS", 4)
    folder = as_path(f"{url}/{count}")
    files = [(f"{i}.csv", b"x" * i) for i in range(count)]
    write_each(folder, iter(files))
    assert sizes(folder) == {f"{i}.csv": i for i in range(count)}
    found = read_each(folder, (name for name, _ in files))
    assert [(name, next(found)) for name, _ in files] == files
    remove(folder, iter(names_in(folder) - {"0.csv"}))
    assert names_in(folder) == {"0.csv"}


def test_a_folder_with_any_name(store, url):
    folder = as_path(f"{url}/run [1] *?")
    store.pipe_file(f"{BUCKET}/{url.rpartition('/')[2]}/run 1 xy/a.csv", b"not ours")
    write_each(folder, [("a.csv", b"a"), ("b.csv", b"b")])
    assert list(read_each(folder, ["b.csv", "a.csv"])) == [b"b", b"a"]
    move(folder / "a.csv", "c.csv")
    remove(folder, ["b.csv"])
    assert contents(store, folder.path) == {"c.csv": b"a"}


def test_a_missing_file(url):
    folder = as_path(url)
    write_each(folder, [("a.csv", b"a")])
    for read in (read_bytes, open_seekable, local_copy):
        with pytest.raises(FileNotFoundError) as raised:
            read(folder / "b.csv")
        assert raised.value.strerror
        assert raised.value.filename == f"{url}/b.csv"
    with pytest.raises(FileNotFoundError):
        list(read_each(folder, ["a.csv", "b.csv"]))
    with pytest.raises(FileNotFoundError):
        move(folder / "b.csv", "c.csv")


def test_a_file_appears_when_it_is_whole(store, url):
    path = as_path(url) / "a"
    with atomic_path(path) as part:
        part.write_bytes(b"first")
        assert names_in(as_path(url)) == set()
    assert read_bytes(path) == b"first"
    with pytest.raises(FileNotFoundError), atomic_path(str(path)) as part:
        part.write_bytes(b"second").to_bytes(Path("/nowhere").stat().st_size)
    assert read_bytes(path) == b"first"
    assert not part.parent.exists()


def test_a_large_file(store, url):
    data = memoryview(os.urandom(200_000))
    direct_write(f"{url}/a", data[:150_000])
    assert read_bytes(as_path(url) / "a") == data[:150_000]
    with open_seekable(as_path(url) / "a") as file:
        file.seek(100_000)
        assert file.read(10) == data[100_000:100_010]


def test_one_that_fails_is_told_of_when_none_is_at_work_any_more(store, url, monkeypatch):
    folder = as_path(url)
    ended = []

    async def pipe_file(path, data):
        if path.endswith("/1.csv"):
            raise PermissionError("Access Denied")
        ended.append(path)

    monkeypatch.setattr(folder.fs, "_pipe_file", pipe_file)
    said = f"^{url}: PermissionError: Access Denied$"
    with pytest.raises(StoreError, match=said):
        write_each(folder, ((f"{i}.csv", b"") for i in range(10)))
    assert len(ended) == 9


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(storage, "_in_use", in_use := [])
    yield tmp_path
    for file in in_use:
        os.close(file)


def test_a_copy_that_the_processes_of_a_machine_share(store, url, temporary):
    folder = as_path(url)
    write_each(folder, [("one.arrow", b"1"), ("two.arrow", b"2")])
    copy = local_copy(folder / "one.arrow")
    assert copy.read_bytes() == b"1"
    assert copy.parent == temporary / f"spxdask-{os.getuid()}"
    assert copy.parent.stat().st_mode & 0o777 == 0o700
    # It is not fetched again.
    remove(folder, ["one.arrow"])
    assert local_copy(folder / "one.arrow") == copy
    # Another takes its place when nobody uses it any more.
    two = local_copy(folder / "two.arrow")
    assert (copy.read_bytes(), two.read_bytes()) == (b"1", b"2")
    while storage._in_use:
        os.close(storage._in_use.pop())
    local_copy(folder / "two.arrow")
    assert [path.name for path in copy.parent.glob("*.arrow")] == ["two.arrow"]
    assert {path.name for path in temporary.iterdir()} == {copy.parent.name}


@pytest.mark.parametrize("there", ["writable", "file", "link"])
def test_a_copy_is_not_kept_where_others_write(url, temporary, there):
    folder = temporary / f"spxdask-{os.getuid()}"
    if there == "file":
        folder.touch()
    else:
        place_of_others = temporary / "others"
        place_of_others.mkdir()
        if there == "link":
            folder.symlink_to(place_of_others)
        else:
            place_of_others.rename(folder)
            folder.chmod(0o777)
        (folder / "one.arrow").write_bytes(b"another")
    write_each(as_path(url), [("one.arrow", b"1")])
    copy = local_copy(as_path(url) / "one.arrow")
    assert copy.read_bytes() == b"1"
    assert folder not in copy.parents
    assert copy.parent.stat().st_mode & 0o777 == 0o700


# The lock


class Clock:
    """Time that passes when somebody sleeps; `then` is called after each sleep."""

    def __init__(self) -> None:
        self.now, self.then = 0.0, lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.then()


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(lock, "time", clock := Clock())
    return clock


@pytest.fixture
def locked_path(url):
    return as_path(url) / "state" / "lock"


def held_by(path, **holder) -> bytes:
    """Write the lock that another process would hold; one of this host, unless told."""
    there = {"who": "process 12 on node7", "host": lock._here(), "pid": 12, "run": "r", "beat": 3}
    text = json.dumps(there | holder).encode()
    path.fs.pipe_file(path.path, text)
    return text


def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_in_a_store(store, locked_path):
    me = f"process {os.getpid()} on {socket.gethostname()}"
    assert lock.holder(locked_path) is None
    with lock.locked(locked_path):
        assert lock.holder(locked_path) == me
    assert lock.holder(locked_path) is None
    with pytest.raises(KeyError), lock.locked(locked_path):
        raise KeyError
    assert not store.exists(locked_path.path)


def test_a_run_at_work_says_so_again_and_again(locked_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    monkeypatch.setattr(lock, "LEASE_S", 1.0)
    said = f"another run is at work in {locked_path.parent.parent} .process {os.getpid()} on"
    with lock.locked(locked_path):
        for _ in range(2):
            with pytest.raises(RunFolderError, match=said), lock.locked(locked_path):
                pass
        assert lock.holder(locked_path)
    with lock.locked(locked_path):
        pass


def test_one_that_died_on_this_host_is_not_waited_for(locked_path, clock):
    held_by(locked_path, pid=ended_pid())
    assert lock.holder(locked_path) is None
    with lock.locked(locked_path):
        assert clock.now == 0
    # Of this process, too, which has the number of one that ran before it in a container.
    held_by(locked_path, pid=os.getpid())
    with lock.locked(locked_path):
        assert clock.now == 0


@pytest.mark.parametrize(
    "holder",
    [
        {"host": "node7"},
        # Of that number there is one, whatever it is.
        {"pid": os.getppid()},
        {"pid": None},
    ],
    ids=str,
)
def test_one_that_is_silent_is_waited_for(store, locked_path, clock, holder):
    held_by(locked_path, **holder)
    assert lock.holder(locked_path) == "process 12 on node7"
    with lock.locked(locked_path):
        assert lock.LEASE_S <= clock.now <= 2 * lock.LEASE_S
    assert not store.exists(locked_path.path)


def test_one_that_ends_meanwhile_is_waited_for_no_longer(store, locked_path, clock):
    held_by(locked_path, host="node7")
    clock.then = lambda: store.rm_file(locked_path.path) if clock.now < lock.LEASE_S / 5 else None
    with lock.locked(locked_path):
        assert clock.now < lock.LEASE_S / 2


@pytest.mark.parametrize("sleeps", [1, 9])
def test_one_of_another_host_that_is_heard_of_is_left_alone(store, locked_path, clock, sleeps):
    held_by(locked_path, host="node7")

    def beat():
        if clock.now >= sleeps * lock.LEASE_S / 10:
            held_by(locked_path, host="node7", beat=4)

    clock.then = beat
    with pytest.raises(RunFolderError, match="process 12 on node7"), lock.locked(locked_path):
        pass
    assert json.loads(store.cat_file(locked_path.path))["beat"] == 4


def test_what_is_no_lock_is_waited_for(store, locked_path, clock):
    store.pipe_file(locked_path.path, b"{")
    with lock.locked(locked_path):
        assert clock.now >= lock.LEASE_S


@pytest.mark.parametrize("left_behind", [False, True])
def test_of_many_that_begin_at_once_one_is_let_in(locked_path, monkeypatch, left_behind):
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    monkeypatch.setattr(lock, "LEASE_S", 2.0)
    if left_behind:
        held_by(locked_path, pid=ended_pid())
    count = 6
    begin, end = threading.Barrier(count), threading.Barrier(count)

    def run(_) -> bool:
        begin.wait()
        try:
            with lock.locked(locked_path):
                end.wait()
                return True
        except RunFolderError:
            end.wait()
            return False

    with ThreadPoolExecutor(count) as pool:
        assert sum(pool.map(run, range(count))) == 1


@pytest.mark.parametrize("there", [False, True])
def test_stores_without_conditions(store, locked_path, clock, monkeypatch, there):
    """The last one that writes has it."""
    write = lock._write

    def write_anyway(path, mine, **how):
        write(path, mine)
        if not there:
            held_by(path, host="node7")

    monkeypatch.setattr(lock, "_write", write_anyway)
    if there:
        held_by(locked_path, host="node7")
        clock.then = lambda: held_by(locked_path, host="node8") if clock.now > lock.LEASE_S else 0
    with pytest.raises(RunFolderError, match="process 12 on node7"), lock.locked(locked_path):
        pass
    assert store.exists(locked_path.path)


@pytest.mark.parametrize("left_behind", [False, True])
def test_one_that_is_quicker_by_a_moment(store, locked_path, monkeypatch, left_behind):
    write, theirs = lock._write, []
    if left_behind:
        held_by(locked_path, pid=ended_pid())

    def write_later(path, mine, **how):
        theirs.append(held_by(path, host="node7"))
        write(path, mine, **how)

    monkeypatch.setattr(lock, "_write", write_later)
    with pytest.raises(RunFolderError, match="process 12 on node7"), lock.locked(locked_path):
        pass
    assert [store.cat_file(locked_path.path)] == theirs


def test_a_lock_is_alive_as_soon_as_it_is_written(locked_path, monkeypatch):
    """To the other runs of its process, which otherwise would take it over."""
    write, seen = lock._write, []

    def write_and_look(path, mine, **how):
        write(path, mine, **how)
        seen.append(lock.holder(path))

    monkeypatch.setattr(lock, "_write", write_and_look)
    with lock.locked(locked_path):
        assert len(seen) == 1
        assert None not in seen


def test_an_answer_that_was_lost(locked_path, monkeypatch):
    """Whoever asks again finds its own lock."""
    pipe_file = locked_path.fs.pipe_file

    def ask_again(path, data, **how):
        pipe_file(path, data, **how)
        pipe_file(path, data, **how)

    monkeypatch.setattr(locked_path.fs, "pipe_file", ask_again)
    with lock.locked(locked_path):
        assert lock.holder(locked_path)


def test_a_lock_that_was_lost_is_not_taken_back(store, locked_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    with lock.locked(locked_path) as taken:
        assert not taken.is_set()
        (keeper,) = [t for t in threading.enumerate() if t.name == "spxdask-lock"]
        # As `_read` and `_write` are two steps, this may come between them.
        while keeper.is_alive():
            theirs = held_by(locked_path, host="node7")
            keeper.join(0.1)
    assert store.cat_file(locked_path.path) == theirs
    assert taken.is_set()


# The ledger


def outcome(filename="a.fits", **values) -> Outcome:
    return Outcome(**({"stage": "download", "filename": filename, "status": "done"} | values))


@pytest.fixture
def never(monkeypatch):
    """Nothing but a ledger's first line is sent before it has to be."""
    monkeypatch.setattr("spxdask.run.ledger.FLUSH_S", math.inf)


def test_a_ledger_in_a_store(store, url, never):
    ledger, other = Ledger(f"{url}/ledger"), Ledger(f"{url}/ledger")
    ledger.flush()
    assert contents(store, ledger.path.path) == {}
    for rows in range(3):
        ledger.add(outcome(rows=rows))
        ledger.add(outcome(f"{rows}.fits", cap=(1.0, 2.0, 3.0), warnings=("w",)))
    assert ledger.get("download", "a.fits") == outcome(rows=2)
    # What is not yet in the store is nowhere for others.
    for found in (other, Ledger(f"{url}/ledger")):
        found.refresh()
        assert found.get("download", "a.fits") == outcome(rows=0)
        assert found.get("download", "0.fits") is None
    ledger.flush()
    for found in (other, Ledger(f"{url}/ledger")):
        found.refresh()
        assert found.get("download", "a.fits") == outcome(rows=2)
        assert found.get("download", "1.fits") == ledger.get("download", "1.fits")
        assert found.last_time == ledger.last_time
    assert len(contents(store, ledger.path.path)) == 1


def test_lines_are_sent_while_more_come(store, url, monkeypatch):
    monkeypatch.setattr("spxdask.run.ledger.FLUSH_S", 0.0)
    ledger, other = Ledger(f"{url}/ledger"), Ledger(f"{url}/ledger")
    for rows in range(1, 5):
        ledger.add(outcome(rows=rows))
        ledger.add(outcome(f"{rows}.fits"))
        other.refresh()
        assert other.get("download", "a.fits") == outcome(rows=rows)
        assert other.get("download", f"{rows}.fits") == outcome(f"{rows}.fits")
        assert list(contents(store, ledger.path.path)) == ["00000001.jsonl"]


def test_a_crash_costs_the_last_lines_only(url, monkeypatch):
    ledger = Ledger(f"{url}/ledger")
    ledger.add(outcome(rows=1))
    monkeypatch.setattr("spxdask.run.ledger.FLUSH_S", math.inf)
    ledger.add(outcome(rows=2))
    ledger.add(outcome("b.fits"))
    del ledger
    after = Ledger(f"{url}/ledger")
    assert after.get("download", "a.fits") == outcome(rows=1)
    assert after.get("download", "b.fits") is None
    after.add(outcome("b.fits"))
    after.flush()
    again = Ledger(f"{url}/ledger")
    assert again.get("download", "a.fits") == outcome(rows=1)
    assert again.get("download", "b.fits") == outcome("b.fits")


def test_full_files_are_not_sent_again(store, url, never, monkeypatch):
    monkeypatch.setattr("spxdask.run.ledger.SEGMENT_BYTES", 1000)
    ledger, other = Ledger(f"{url}/ledger"), Ledger(f"{url}/ledger")
    for number in range(100):
        ledger.add(outcome(f"{number}.fits", rows=number + 1))
        if number == 50:
            before = contents(store, ledger.path.path)
            other.refresh()
    ledger.flush()
    after = contents(store, ledger.path.path)
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before) > 1
    assert all(1000 <= len(text) < 1200 for text in list(after.values())[:-1])
    other.refresh()
    for found in (ledger, other, Ledger(f"{url}/ledger")):
        for number in range(100):
            assert found.get("download", f"{number}.fits").rows == number + 1


def test_runs_that_take_turns_have_the_last_word_in_turn(url, never):
    """Each with a ledger that it opened before the others wrote."""
    ledgers = [Ledger(f"{url}/ledger") for _ in range(3)]
    for rows, ledger in enumerate(ledgers * 2, 1):
        ledger.add(outcome(rows=rows))
        ledger.add(outcome(f"{rows}.fits"))
        ledger.flush()
        for one in (ledger, Ledger(f"{url}/ledger")):
            assert one.get("download", "a.fits").rows == rows
            assert all(one.get("download", f"{n}.fits") for n in range(1, rows + 1))
    for ledger in ledgers:
        ledger.refresh()
        assert ledger.get("download", "a.fits").rows == 6


def test_what_is_not_of_the_ledger_is_let_alone(store, url):
    store.pipe_file(f"{as_path(url).path}/ledger/notes.txt", b"mine")
    store.pipe_file(f"{as_path(url).path}/ledger/00000007.jsonl", b"{}\n[1]\nnonsense\n")
    ledger = Ledger(f"{url}/ledger")
    ledger.add(outcome())
    ledger.flush()
    assert contents(store, ledger.path.path).keys() == {
        *("notes.txt", "00000007.jsonl", "00000008.jsonl")
    }
    assert Ledger(f"{url}/ledger").get("download", "a.fits") == outcome()
