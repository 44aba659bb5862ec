"""Files are whole or not there, and names stay in their folder, whatever ids and disks do."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import string
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from urllib.parse import quote, unquote

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from spxdask.archive.buffer_pool import BufferPool
from spxdask.errors import DiskFullError
from spxdask.storage.files import (
    as_path,
    atomic_path,
    atomic_write,
    direct_write,
    file_stem,
    is_local,
    move,
    names_in,
    part_path,
    raise_disk_full,
    read_bytes,
    read_each,
    remove,
    remove_parts,
    sizes,
    starts_with,
    translate_store_errors,
    write_each,
)

@pytest.mark.parametrize("durable", [True, False])
def test_whole_file_replaces(tmp_path, durable):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with atomic_path(path, durable=durable) as part:
        part.write_text("new")
        assert path.read_text() == "old"
        assert part.parent == path.parent
        assert part.name.startswith(".")
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
    assert path.read_text() == "new"


def test_whole_file_takes_text(tmp_path):
    with atomic_path(os.fspath(tmp_path / "a")) as part:
        part.write_bytes(b"")
    assert (tmp_path / "a").read_bytes() == b""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("before", ["old", None])
def test_an_error_leaves_everything_as_it_was(tmp_path, error, before):
    path = tmp_path / "table.csv"
    if before is not None:
        path.write_text(before)

    def write():
        with atomic_path(path) as part:
            part.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if before is None else [before])


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass
    assert path.read_text() == "old"


def test_a_name_taken_by_a_folder_leaves_no_part(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"), atomic_path(tmp_path / "taken") as part:
        part.write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_concurrent_writers_end_with_one_whole_file(tmp_path):
    path = tmp_path / "table.csv"
    writers = 8
    barrier = Barrier(writers)

    def write(k):
        with atomic_path(path, durable=False) as part, open(part, "w") as file:
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
        "from spxdask.storage.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as part, open(part, 'w') as file:\n"
        "    file.write('half')\n"
        "    file.flush()\n"
        "    print('writing', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    source = os.fspath(Path(__file__).parents[1])
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
    remove_parts(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_remove_parts_touches_nothing_else(tmp_path):
    kept = ["a.csv", ".hidden", "a.part", ".download.part", ".x.y.part", ".table.csv"]
    for name in kept:
        (tmp_path / name).write_text(name)
    part_path(tmp_path / "table.csv").write_text("half")
    remove_parts(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)


def test_remove_parts_of_a_folder_that_is_not_there(tmp_path):
    remove_parts(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


# Places; those in stores have tests of their own


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("out", "out"),
        ("/a b/c", "/a b/c"),
        ("a:b/c", "a:b/c"),
        ("s3:/bucket", "s3:/bucket"),
        ("file:///a%20b/c", "/a b/c"),
        ("file://host/a/b", "/a/b"),
    ],
)
def test_places_on_disk(text, path):
    found = as_path(text)
    assert found == Path(path)
    assert is_local(found)
    assert as_path(found) is found


def test_folders_and_their_files(tmp_path):
    written = {"a.csv": b"1234", "b c.csv": b"", ".hidden": b"x", "é": b"yz"}
    write_each(tmp_path, written.items())
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("a.csv")
    (tmp_path / "broken").symlink_to("nowhere")
    assert sizes(tmp_path) == {name: len(data) for name, data in written.items()} | {"link": 4}
    # What is ours is no link.
    assert names_in(tmp_path) == set(written)
    assert list(read_each(tmp_path, written)) == list(written.values())
    assert all(isinstance(data, bytearray) for data in read_each(tmp_path, written))
    assert read_bytes(tmp_path / "a.csv") == b"1234"
    assert [starts_with(tmp_path / "a.csv", b) for b in (b"", b"12", b"1234", b"12345", b"2")] == [
        *(True, True, True, False, False)
    ]
    move(tmp_path / "a.csv", "é")
    assert names_in(tmp_path) == {"b c.csv", ".hidden", "é"}
    assert read_bytes(tmp_path / "é") == b"1234"
    remove(tmp_path, {"b c.csv", "é"})
    assert names_in(tmp_path) == {".hidden"}
    remove(tmp_path, [])


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
    assert sizes(tmp_path) == {"a": 1, "c": 1}


def test_a_folder_that_is_not_there(tmp_path):
    assert sizes(tmp_path / "absent") == {}
    assert names_in(tmp_path / "absent") == set()
    with pytest.raises(FileNotFoundError):
        list(read_each(tmp_path / "absent", ["a"]))
    with pytest.raises(FileNotFoundError):
        remove(tmp_path, ["absent"])


@pytest.mark.parametrize("error", [OSError(errno.EIO, "x"), DiskFullError("x"), ValueError("x")])
def test_errors_of_a_disk_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as raised, translate_store_errors(tmp_path):
        raise error
    assert raised.value is error


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
    direct_write(path, page_aligned[:size])
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
    direct_write(tmp_path / "frame.fits", page_aligned)
    assert (tmp_path / "frame.fits").read_bytes() == page_aligned


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_a_write_may_come_in_pieces(tmp_path, page_aligned, monkeypatch, size):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:30_001]))
    (tmp_path / "curve.csv").write_text("old")
    atomic_write(f"{tmp_path}/curve.csv", page_aligned[:size])
    assert (tmp_path / "curve.csv").read_bytes() == page_aligned[:size]
    assert os.listdir(tmp_path) == ["curve.csv"]


# Full disks


@pytest.mark.parametrize(
    ("writer", "call"),
    [(atomic_write, call) for call in ("write", "replace")]
    + [(direct_write, call) for call in ("write", "fsync", "replace")],
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
        with pytest.raises(OSError, match="No space left"):
            writer(str(path), page_aligned)
    assert [p.read_text() for p in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_by_its_folder(code):
    with pytest.raises(DiskFullError) as error, raise_disk_full(Path("/some/where")):
        raise OSError(code, os.strerror(code))
    said = f"{os.strerror(code)} in /some/where: make room, then the same command goes on"
    assert str(error.value) == said


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), ValueError("x")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, raise_disk_full("/some/where"):
        raise error
    assert raised.value is error
