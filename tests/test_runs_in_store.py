"""Runs in an object store, and what they are made of: files, the ledger, the lock."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import killing
import pandas as pd
import pytest
import simulated
from distributed import Client
from moto.s3.exceptions import S3AccessDeniedError
from moto.s3.models import S3Backend
from objectstore import BUCKET, contents, serving
from s3fs import S3FileSystem

from spxdask import BatchConfig, BatchPipeline, load_query_summary
from spxdask.cli import main
from spxdask.errors import RunFolderError, StoreError
from spxdask.run import lock
from spxdask.run.ledger import Ledger, Outcome
from spxdask.run.status import status
from spxdask.simulate.archive import SimulatedArchive
from spxdask.stages.aggregate import light_curve_name
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


@pytest.fixture(scope="module")
def store():
    with serving() as store:
        yield store


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


# Runs

N_FRAMES = 4


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    sky = simulated.field_sky(20)
    exposures = [simulated.exposure(i, 1 + i) for i in range(N_FRAMES)]
    return sky, simulated.simulate(tmp_path_factory.mktemp("archive"), exposures, sky)


@pytest.fixture(scope="module")
def archive(survey):
    with SimulatedArchive([frame.archived for frame in survey[1]]) as archive:
        yield archive


@pytest.fixture(scope="module")
def catalogue(survey, store, tmp_path_factory):
    """The path of a catalogue, and the URL of another of the same content."""
    sky, _ = survey
    ids = ["a/b", "a*", "a[1]", "a?versionId=1", "a?b#c", "\u00e9" * 150]
    ids += [f"s{i}" for i in range(len(sky) - len(ids))]
    path = tmp_path_factory.mktemp("catalogue") / "sources.csv"
    simulated.write_catalogue(path, ids, sky.ra, sky.dec)
    store.put_file(str(path), f"{BUCKET}/catalogues/sources 1.csv")
    return path, f"s3://{BUCKET}/catalogues/sources 1.csv"


@pytest.fixture(scope="module")
def make_config(archive, catalogue):
    def make(output, **options) -> BatchConfig:
        defaults = simulated.run_options(catalogue[1], archive, output)
        return BatchConfig(**(defaults | options))

    return make


class Machine:
    """Folders that a process of its own machine would have, empty to begin with."""

    def __init__(self, path: Path) -> None:
        self.path, self.work, self.home = path, path / "work", path / "home"
        self.temporary, self.scratch = path / "temporary", path / "scratch"
        for folder in (self.work, self.home, self.temporary, self.scratch):
            folder.mkdir(parents=True)

    def start(self, *arguments: str) -> subprocess.Popen:
        places = {"HOME": str(self.home), "TMPDIR": str(self.temporary)}
        with open(self.path / "log", "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dask", *arguments],
                cwd=self.work,
                env=os.environ | places,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def files(self) -> set[str]:
        """Return the files that are there but for Dask's own."""
        folders = (self.work, self.home, self.temporary)
        found = (path for folder in folders for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.path)) for path in found}


@pytest.fixture(scope="module")
def machines(store, tmp_path_factory):
    """A scheduler and two workers that share no folder, and a client of theirs."""
    home = tmp_path_factory.mktemp("machines")
    scheduler = home / "scheduler.json"
    with ExitStack() as stack:
        machines = [Machine(home / name) for name in ("scheduler", "one", "two")]
        head, *workers = machines
        where = ["--host", "127.0.0.1", "--scheduler-file", str(scheduler)]
        where += ["--dashboard-address", "127.0.0.1:0"]
        commands = [(head, ["scheduler", *where, "--port", "0"])]
        for worker in workers:
            more = ["--no-nanny", "--nthreads", "3", "--local-directory", str(worker.scratch)]
            commands.append((worker, ["worker", *where, *more]))
        for machine, command in commands:
            process = stack.enter_context(machine.start(*command))
            stack.callback(process.kill)
        client = stack.enter_context(
            Client(scheduler_file=str(scheduler), set_as_default=False, timeout="60s")
        )
        client.wait_for_workers(2, timeout=60)
        yield client, workers


@pytest.fixture(scope="module")
def client(machines):
    return machines[0]


@pytest.fixture(scope="module")
def on_disk(make_config, catalogue, client, tmp_path_factory):
    """A run to a folder on disk."""
    output = tmp_path_factory.mktemp("disk") / "out"
    config = make_config(output, catalog_path=catalogue[0])
    with BatchPipeline(config, client=client) as pipeline:
        pipeline.run_all()
    return pipeline


@pytest.fixture(scope="module")
def in_store(make_config, machines, tmp_path_factory):
    """A run to a store, the folders of its client, and what was in those of the workers."""
    client, workers = machines
    home = Machine(tmp_path_factory.mktemp("client"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home.work)
        patch.setenv("HOME", str(home.home))
        patch.setattr(tempfile, "tempdir", str(home.temporary))
        with BatchPipeline(make_config(f"s3://{BUCKET}/runs/first"), client=client) as pipeline:
            pipeline.run_all()
    return pipeline, home, [worker.files() for worker in workers]


FOLDERS = ("images", "per_image", "lightcurves")


def in_folder(store, pipeline, name) -> dict[str, bytes]:
    folder = getattr(pipeline.folder, name)
    if is_local(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}
    return contents(store, folder.path)


def test_a_run_in_a_store_is_that_on_disk(store, on_disk, in_store):
    pipeline, *_ = in_store
    assert pipeline.summary.failed == {}
    for name in FOLDERS:
        found = in_folder(store, pipeline, name)
        assert found == in_folder(store, on_disk, name)
        assert len(found) >= N_FRAMES
    curves = in_folder(store, pipeline, "lightcurves")
    assert {"a*.csv", "a[1].csv", "a?b#c.csv"} & curves.keys()
    assert str(pipeline.summary.output) == f"s3://{BUCKET}/runs/first"


def test_nothing_is_written_elsewhere(in_store):
    _, home, of_workers = in_store
    assert home.files() == set()
    for found in of_workers:
        mine = f"temporary/spxdask-{os.getuid()}/"
        assert {name for name in found if not name.startswith(mine)} == set()
        assert {Path(name).suffix for name in found} == {".arrow", ""}
        assert len(found) == 2


def test_status_of_a_run_in_a_store(on_disk, in_store, capsys):
    pipeline, *_ = in_store
    found, other = status(f"s3://{BUCKET}/runs/first"), status(on_disk.folder.path)
    for name in ("n_frames", "fetched", "measured", "pending", "rows", "lightcurves", "failed"):
        assert getattr(found, name) == getattr(other, name), name
    assert (found.measured, found.at_work) == (N_FRAMES, None)
    assert found.rows == pipeline.summary.stages["extract"].rows > 0
    assert main(["status", f"s3://{BUCKET}/runs/first"]) == 0
    assert f"output      s3://{BUCKET}/runs/first" in capsys.readouterr().out


def test_the_same_again_does_nothing(store, in_store, client):
    pipeline, *_ = in_store
    before = store.find(f"{BUCKET}/runs/first/images", detail=True)
    before |= store.find(f"{BUCKET}/runs/first/per_image", detail=True)
    curves = in_folder(store, pipeline, "lightcurves")
    summary = BatchPipeline(pipeline.config, client=client).run_all()
    for stage in ("download", "extract"):
        report = summary.stages[stage]
        assert (report.total, report.reused, report.done) == (N_FRAMES, N_FRAMES, 0)
    assert summary.stages["extract"].rows == pipeline.summary.stages["extract"].rows
    after = store.find(f"{BUCKET}/runs/first/images", detail=True)
    after |= store.find(f"{BUCKET}/runs/first/per_image", detail=True)
    # Not even with the same content.
    assert {n: f["LastModified"] for n, f in after.items()} == {
        n: f["LastModified"] for n, f in before.items()
    }
    assert in_folder(store, pipeline, "lightcurves") == curves


def test_stage_by_stage_in_a_store(store, on_disk, make_config, client, archive):
    config = make_config(f"s3://{BUCKET}/runs/stages", keep_bucket_files=True)
    stages = [BatchPipeline(config, client=client) for _ in range(4)]
    stages[0].run_query()
    assert stages[1].run_download().done == N_FRAMES
    asked = len(archive.requests)
    # The images are read from the store.
    assert stages[2].run_extract().done == N_FRAMES
    assert len(archive.requests) == asked
    assert stages[3].run_aggregate().total == len(in_folder(store, on_disk, "lightcurves"))
    for name in FOLDERS:
        assert in_folder(store, stages[3], name) == in_folder(store, on_disk, name)
    assert len(in_folder(store, stages[3], "buckets")) == 5
    assert stages[3].images.count().compute(scheduler="sync") == N_FRAMES
    summary = load_query_summary(f"s3://{BUCKET}/runs/stages")
    assert summary["n_observations"] == N_FRAMES


def test_an_image_that_went_bad_is_set_aside(store, make_config, client):
    config = make_config(f"s3://{BUCKET}/runs/bad", bands=["D3"])
    pipeline = BatchPipeline(config, client=client)
    pipeline.run_query()
    assert pipeline.run_download().done == 1
    ((name, data),) = in_folder(store, pipeline, "images").items()
    write_each(pipeline.folder.images, [(name, bytes(2880) + data[2880:])])
    report = pipeline.run_extract()
    assert list(report.failed) == [name]
    assert report.failed[name].endswith(f"; set aside as {name}.unreadable")
    assert in_folder(store, pipeline, "images").keys() == {f"{name}.unreadable"}
    assert BatchPipeline(config, client=client).run_all().failed == {}


def test_images_that_are_not_kept(store, on_disk, make_config, client):
    config = make_config(f"s3://{BUCKET}/runs/lean", keep_images=False)
    summary = BatchPipeline(config, client=client).run_all()
    assert summary.stages["download"].done == N_FRAMES
    again = BatchPipeline(config, client=client)
    summary = again.run_all()
    assert (summary.stages["download"].done, summary.stages["extract"].reused) == (0, N_FRAMES)
    assert in_folder(store, again, "images") == {}
    for name in ("per_image", "lightcurves"):
        assert in_folder(store, again, name) == in_folder(store, on_disk, name)


def test_parquet_in_a_store(store, on_disk, make_config, client):
    formats = {"per_image_format": "parquet", "lightcurve_format": "parquet"}
    config = make_config(f"s3://{BUCKET}/runs/parquet", keep_images=False, **formats)
    pipeline = BatchPipeline(config, client=client)
    assert pipeline.run_all().failed == {}
    assert {name.rpartition(".")[2] for name in in_folder(store, pipeline, "per_image")} == {
        "parquet"
    }
    curves = pd.read_parquet(str(pipeline.folder.lightcurves))
    found = 0
    for target, rows in curves.groupby("target_id"):
        expected = pd.read_csv(on_disk.folder.lightcurves / light_curve_name(target))
        pd.testing.assert_frame_equal(
            rows.drop(columns="target_id").reset_index(drop=True), expected, check_dtype=False
        )
        found += 1
    assert found == len(in_folder(store, on_disk, "lightcurves"))
    stood = status(pipeline.folder.path)
    assert (stood.lightcurves, stood.measured, stood.rows) == (found, N_FRAMES, len(curves))
    # With light curves of the other format, these are gone, and a user's file is not.
    write_each(pipeline.folder.lightcurves, [("notes.csv", b"a,b\n"), ("notes.txt", b"")])
    other = make_config(
        f"s3://{BUCKET}/runs/parquet", keep_images=False, per_image_format="parquet"
    )
    again = BatchPipeline(other, client=client)
    again.run_all()
    found = in_folder(store, again, "lightcurves")
    assert (found.pop("notes.csv"), found.pop("notes.txt")) == (b"a,b\n", b"")
    assert found == in_folder(store, on_disk, "lightcurves")


def test_light_curves_of_sources_that_are_gone(store, survey, make_config, client, tmp_path):
    sky, _ = survey
    curves = []
    # What is left of a name may be the name of another.
    for ids in (["a[1]", "a*", "a?", "a", "a1"], ["a*", "a1"], ["a", "a1"]):
        path = tmp_path / "sources.csv"
        simulated.write_catalogue(path, ids, sky.ra[: len(ids)], sky.dec[: len(ids)])
        config = make_config(
            f"s3://{BUCKET}/runs/gone", catalog_path=path, bands=["D1", "D2"], keep_images=False
        )
        pipeline = BatchPipeline(config, client=client)
        pipeline.run_all()
        curves.append(in_folder(store, pipeline, "lightcurves").keys())
    assert curves == [
        {"a[1].csv", "a*.csv", "a?.csv", "a.csv", "a1.csv"},
        {"a*.csv", "a1.csv"},
        {"a.csv", "a1.csv"},
    ]


# A client that is killed


@contextmanager
def store_holds(folder: str, number: int) -> Iterator[threading.Event]:
    """Have the store hold the n-th object that comes to a folder; yield when it has come."""
    came, over, left, one_at_a_time = threading.Event(), threading.Event(), number, threading.Lock()
    put = S3Backend.put_object

    def put_object(backend, bucket_name, key_name, *arguments, **options):
        nonlocal left
        if f"/{folder}/" in key_name:
            with one_at_a_time:
                left -= 1
                held = left == 0
            if held:
                came.set()
                assert over.wait(100)
        return put(backend, bucket_name, key_name, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Backend, "put_object", put_object)
        try:
            yield came
        finally:
            over.set()


def test_a_run_that_is_killed(store, on_disk, make_config, client, clock, tmp_path):
    url = f"s3://{BUCKET}/runs/killed"
    config = make_config(url)
    config.to_yaml(tmp_path / "run.yaml")
    arguments = ["run", "--config", str(tmp_path / "run.yaml")]
    arguments += ["--scheduler", client.scheduler.address]
    expected = {name: in_folder(store, on_disk, name) for name in FOLDERS}
    pipeline = BatchPipeline(config, client=client)
    for folder, number in (("images", 3), ("lightcurves", 10)):
        log = tmp_path / folder
        with (
            store_holds(folder, number) as came,
            killing.Command("spxdask", *arguments, log=log) as command,
        ):
            assert came.wait(60), command.said
            command.kill()
            # What is there is whole.
            for name in FOLDERS:
                found = in_folder(store, pipeline, name)
                assert found.items() <= expected[name].items()
            stood = status(url)
            assert (stood.at_work, stood.failed) == (None, {})
            assert store.exists(f"{url}/state/lock")
    summary = pipeline.run_all()
    # It does not wait for one that is dead.
    assert clock.now == 0
    assert summary.failed == {}
    for name in FOLDERS:
        assert in_folder(store, pipeline, name) == expected[name]
    stood = status(url)
    assert (stood.measured, stood.pending, stood.at_work) == (N_FRAMES, 0, None)
    assert not store.exists(f"{url}/state/lock")


def test_two_runs_in_one_folder(make_config, client, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    monkeypatch.setattr(lock, "LEASE_S", 2.0)
    config = make_config(f"s3://{BUCKET}/runs/two", bands=["D1"], keep_images=False)
    said = f"another run is at work in {config.output_dir} .process {os.getpid()} on"
    first, second = (BatchPipeline(config, client=client) for _ in range(2))
    with ThreadPoolExecutor(1) as pool, store_holds("per_image", 1) as came:
        running = pool.submit(first.run_all)
        assert came.wait(60)
        assert status(config.output_dir).at_work
        for work in (second.run_query, second.run_extract, second.run_aggregate):
            with pytest.raises(RunFolderError, match=said):
                work()
    assert running.result().failed == {}
    third = BatchPipeline(config, client=client)
    assert third.run_all().stages["extract"].reused == 1


@pytest.mark.parametrize("part", ["images", "lightcurves", "state/ledger"])
def test_a_store_that_refuses(part, store, on_disk, make_config, client, tmp_path, capsys):
    """With credentials that may not, or may no longer, write to a part of the folder."""
    url = f"s3://{BUCKET}/runs/refused/{part}"
    config = make_config(url, bands=["D3"])
    config.to_yaml(tmp_path / "run.yaml")
    command = ["run", "--config", str(tmp_path / "run.yaml")]
    command += ["--scheduler", client.scheduler.address]
    put = S3Backend.put_object

    def put_object(backend, bucket_name, key_name, *arguments, **options):
        if f"/{part}/" in key_name.removeprefix("runs/refused/" + part):
            raise S3AccessDeniedError()
        return put(backend, bucket_name, key_name, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Backend, "put_object", put_object)
        assert main(command) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert re.search(rf"{url}/{part}\S*: PermissionError: Access Denied", said.out + said.err)
    assert not store.exists(f"{url}/state/lock")
    assert main(command) == 0
    pipeline = BatchPipeline(config)
    for name in ("images", "per_image"):
        found = in_folder(store, pipeline, name)
        assert len(found) == 1
        assert found.items() <= in_folder(store, on_disk, name).items()
    assert in_folder(store, pipeline, "lightcurves")


# What a user gets wrong


def no_bucket(monkeypatch, store) -> str:
    return "s3://nobucket/here"


def no_file(monkeypatch, store) -> str:
    return f"s3://{BUCKET}/not/here"


def no_credentials(monkeypatch, store) -> str:
    S3FileSystem.clear_instance_cache()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    return f"s3://{BUCKET}/here"


def no_permission(monkeypatch, store) -> str:
    async def refuse(self, method, *arguments, **options):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(S3FileSystem, "_call_s3", refuse)
    return f"s3://{BUCKET}/here"


def nobody_listens(monkeypatch, store) -> str:
    S3FileSystem.clear_instance_cache()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    return f"s3://{BUCKET}/here"


def no_library(monkeypatch, store) -> str:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3")
    return f"s3://{BUCKET}/here"


MISTAKES = {
    no_bucket: "The specified bucket does not exist",
    no_file: "No such file or directory|The specified key does not exist",
    no_credentials: "NoCredentialsError: Unable to locate credentials",
    no_permission: "PermissionError: Access Denied",
    nobody_listens: "Could not connect to the endpoint URL",
    no_library: "Install s3fs to access S3",
}


@pytest.mark.parametrize(
    ("what", "mistake"),
    [
        (what, mistake)
        for what in ("output", "catalogue", "status")
        for mistake in MISTAKES
        # To write, as good a place as any.
        if (what, mistake) != ("output", no_file)
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_mistakes_are_told_in_a_sentence(
    what, mistake, store, archive, catalogue, client, capsys, tmp_path
):
    ra, dec = map(str, simulated.CENTER)
    with pytest.MonkeyPatch.context() as patch:
        url = mistake(patch, store)
        catalog, output = catalogue[0], url
        if what == "catalogue":
            catalog, output = f"{url}/a.csv", tmp_path
        command = ["status", url]
        if what != "status":
            command = ["run", "--ra", ra, "--dec", dec, "--radius", "0.05"]
            command += ["--tap-url", archive.tap_url, "--archive-url", archive.archive_url]
            command += ["--catalog", str(catalog), "--output", str(output)]
            command += ["--scheduler", client.scheduler.address]
        answer = main(command)
    if mistake in (no_credentials, nobody_listens):
        # Connections keep what the environment was.
        S3FileSystem.clear_instance_cache()
    assert answer == 2
    said = capsys.readouterr()
    links = re.compile(r"(dashboard|frames) +http://127\.0\.0\.1:\d+/\w+")
    lines = [line for line in said.err.splitlines() if not links.fullmatch(line)]
    assert len(lines) == 1
    assert lines[0].startswith("spxdask: ")
    if mistake in (no_bucket, no_file) and what == "status":
        assert f"{url} is not the output folder of a run" in lines[0]
    else:
        assert url in lines[0]
        assert re.search(MISTAKES[mistake], lines[0])
    assert said.out == ""


def test_a_catalogue_where_the_run_writes_is_refused(make_config, catalogue):
    folder = f"s3://{BUCKET}/catalogues"
    for name, inside in (("sources 1.csv", False), ("state/a.csv", True), ("images/a/b.csv", True)):
        pipeline = BatchPipeline(make_config(folder, catalog_path=f"{folder}/{name}"))
        if inside:
            with pytest.raises(RunFolderError, match="lies where the run writes"):
                _ = pipeline.catalogue
        else:
            assert len(pipeline.catalogue) > 0


def test_a_catalogue_by_the_url_of_a_file(make_config, tmp_path):
    path = simulated.write_catalogue(tmp_path / "a 100%.csv", ["a"], [1.0], [2.0])
    pipeline = BatchPipeline(make_config(tmp_path.as_uri() + "/out", catalog_path=path.as_uri()))
    assert pipeline.catalogue.target_id.to_pylist() == ["a"]
    assert pipeline.folder.path == tmp_path / "out"
