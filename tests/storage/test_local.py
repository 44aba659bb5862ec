"""Files on disk are whole or not there, and none is written halfway, whatever disks do."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier

import pytest

from spxdask.archive.buffer_pool import BufferPool
from spxdask.errors import DiskFullError
from spxdask.storage import LocalStore, raise_disk_full
from spxdask.storage.local import part_path


@pytest.mark.parametrize("durable", [True, False])
def test_whole_file_replaces(tmp_path, durable):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with LocalStore(tmp_path).atomic_path(path.name, durable=durable) as part:
        part.write_text("new")
        assert path.read_text() == "old"
        assert part.parent == path.parent
        assert part.name.startswith(".")
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("before", ["old", None])
def test_an_error_leaves_everything_as_it_was(tmp_path, error, before):
    path = tmp_path / "table.csv"
    if before is not None:
        path.write_text(before)

    def write():
        with LocalStore(tmp_path).atomic_path(path.name) as part:
            part.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if before is None else [before])


def test_a_name_taken_by_a_folder_leaves_no_part(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"), LocalStore(tmp_path).atomic_path("taken") as part:
        part.write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_concurrent_writers_end_with_one_whole_file(tmp_path):
    path, store = tmp_path / "table.csv", LocalStore(tmp_path)
    writers = 8
    barrier = Barrier(writers)

    def write(k):
        with store.atomic_path(path.name, durable=False) as part, open(part, "w") as file:
            file.write(str(k) * 50_000)
            file.flush()
            # All are in the middle of it at once.
            barrier.wait(timeout=60)
            file.write(str(k) * 50_000)

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, range(writers)))
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
    text = path.read_text()
    assert len(text) == 100_000
    assert len(set(text)) == 1


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    code = (
        "import sys\n"
        "from spxdask.storage import locate_file\n"
        "store, name = locate_file(sys.argv[1])\n"
        "with store.atomic_path(name) as part, open(part, 'w') as file:\n"
        "    file.write('half')\n"
        "    file.flush()\n"
        "    print('writing', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    source = os.fspath(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", code, os.fspath(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": source},
    ) as process:
        assert process.stdout.readline() == b"writing\n"
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert path.read_text() == "old"
    left = [p for p in tmp_path.iterdir() if p != path]
    assert [p.read_text() for p in left] == ["half"]
    LocalStore(tmp_path).delete_partial_files()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_nothing_but_partial_files_is_deleted(tmp_path):
    kept = ["a.csv", ".hidden", "a.part", ".download.part", ".x.y.part", ".table.csv"]
    for name in kept:
        (tmp_path / name).write_text(name)
    part_path(tmp_path / "table.csv").write_text("half")
    LocalStore(tmp_path).delete_partial_files()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)


def test_partial_files_of_a_folder_that_is_not_there(tmp_path):
    LocalStore(tmp_path / "absent").delete_partial_files()
    assert list(tmp_path.iterdir()) == []


# Listings


def test_links_and_folders(tmp_path):
    store = LocalStore(tmp_path)
    store.put_many([("a.csv", b"1234"), (".hidden", b"x")])
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("a.csv")
    (tmp_path / "broken").symlink_to("nowhere")
    assert store.list_sizes() == {"a.csv": 4, ".hidden": 1, "link": 4}
    # The files of a run are no links.
    assert store.list_names() == {"a.csv", ".hidden"}


def test_a_folder_is_found_through_links(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    assert LocalStore(tmp_path / "link").contains(f"{tmp_path}/out/a.csv")
    assert LocalStore(tmp_path / "out").contains(f"{tmp_path}/link/../link/a.csv")
    assert not LocalStore(tmp_path / "out").contains(f"s3:/{tmp_path}/out/a.csv")


def test_a_file_that_goes_while_others_are_listed(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    scandir = os.scandir

    @contextmanager
    def then_gone(folder):
        with scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
            (tmp_path / "b").unlink()
            yield iter(found)

    monkeypatch.setattr(os, "scandir", then_gone)
    assert LocalStore(tmp_path).list_sizes() == {"a": 1, "c": 1}


def test_a_file_to_be_deleted_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        LocalStore(tmp_path).delete_many(["absent"])


def test_folders_are_made_with_those_above(tmp_path):
    store = LocalStore(tmp_path / "a" / "b")
    store.make()
    store.make()
    assert (tmp_path / "a" / "b").is_dir()


# Large files


@pytest.fixture
def page_aligned():
    with BufferPool().lease(10 << 20) as block:
        for i in range(0, len(block), 1000):
            block[i] = i % 251
        yield block


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 5_000_000])
def test_a_large_file_is_what_was_given(tmp_path, page_aligned, size):
    path = tmp_path / "frame.fits"
    LocalStore(tmp_path).direct_write(path.name, page_aligned[:size])
    assert path.read_bytes() == page_aligned[:size]
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("refused", ["the flag", "the first write", "a later write"])
def test_a_system_that_insists_on_its_page_cache(tmp_path, page_aligned, monkeypatch, refused):
    direct, written = False, 0
    write, control = os.write, fcntl.fcntl

    def set_flags(file, command, *flags):
        nonlocal direct
        if command == fcntl.F_SETFL:
            direct = bool(flags[0] & os.O_DIRECT)
            if direct and refused == "the flag":
                raise OSError(errno.EINVAL, "Invalid argument")
            return None
        return control(file, command, *flags)

    def write_some(file, data):
        nonlocal written
        if direct and (refused == "the first write" or written):
            raise OSError(errno.EINVAL, "Invalid argument")
        written += write(file, data[:100_001])
        return min(len(data), 100_001)

    monkeypatch.setattr(fcntl, "fcntl", set_flags)
    monkeypatch.setattr(os, "write", write_some)
    LocalStore(tmp_path).direct_write("frame.fits", page_aligned)
    assert (tmp_path / "frame.fits").read_bytes() == page_aligned


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_a_write_may_come_in_pieces(tmp_path, page_aligned, monkeypatch, size):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:30_001]))
    (tmp_path / "curve.csv").write_text("old")
    LocalStore(tmp_path).put_many([("curve.csv", page_aligned[:size])])
    assert (tmp_path / "curve.csv").read_bytes() == page_aligned[:size]
    assert os.listdir(tmp_path) == ["curve.csv"]


# Full disks


def put_quickly(store, name, data):
    store.put_many([(name, data)])


@pytest.mark.parametrize(
    ("writer", "call"),
    [(put_quickly, call) for call in ("write", "replace")]
    + [(LocalStore.direct_write, call) for call in ("write", "fsync", "replace")]
    + [(LocalStore.put, call) for call in ("fsync", "replace")]
    + [(LocalStore.put_if_absent, call) for call in ("fsync", "link")],
)
@pytest.mark.parametrize("before", [None, "old"])
def test_what_cannot_be_written_leaves_nothing(
    tmp_path, page_aligned, monkeypatch, writer, call, before
):
    path = tmp_path / "frame.fits"
    if before is not None:
        path.write_text(before)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(DiskFullError, match=f"No space left on device in {tmp_path}: "):
            writer(LocalStore(tmp_path), path.name, page_aligned)
    assert [p.read_text() for p in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_by_its_folder(code):
    with pytest.raises(DiskFullError) as error, raise_disk_full(Path("/some/where")):
        raise OSError(code, os.strerror(code))
    said = f"{os.strerror(code)} in /some/where: make room, then the same command resumes the run"
    assert str(error.value) == said


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), ValueError("x")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, raise_disk_full("/some/where"):
        raise error
    assert raised.value is error
