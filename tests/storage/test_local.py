"""Files on disk are whole or not there, and none is written halfway, whatever disks do."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier

import pytest

from spxdask.archive.buffer_pool import BufferPool
from spxdask.errors import DiskFullError
from spxdask.storage import LocalStore, open_store, raise_disk_full
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


def test_a_link_to_itself_is_no_folder(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    store = LocalStore(tmp_path / "loop")
    assert not store.contains(f"{tmp_path}/a.csv")
    with pytest.raises(OSError, match="exists"):
        store.make()


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


# Names in every locale


LOCALES = [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONUTF8": "1"},
]
USE_STORE = """
import sys
from spxdask.storage import LocalStore
names = ["\\xe9t\\xe9.csv", "\\u65e5\\u672c.csv", "\\U0001f52d.csv", "plain.csv"]
for folder in ("out", "\\xe9t\\xe9"):
    store = LocalStore(folder)
    store.make()
    store.put_many((name, b"small") for name in names)
    for name in names:
        store.put(name, name.encode())
        assert store.get(name) == name.encode() and store.exists(name)
        assert store.get_version(name)
    with store.atomic_path("\\u65e5") as part:
        part.write_bytes(b"")
    store.rename("\\u65e5", "\\xe8")
    assert store.list_names() == set(store.list_sizes()) == {*names, "\\xe8"}
    assert store.find_starting_with(names, b"plain") == {"plain.csv"}
    assert store.find_refused_characters("".join(map(chr, range(0xa0, 0x180)))) == ""
    store.delete_many(["\\xe8"])
print(sys.getfilesystemencoding())
"""


@pytest.fixture(scope="session")
def locale_path(tmp_path_factory):
    """A folder with a locale whose encoding is Latin-1, which few systems still have."""
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef") is None:
        pytest.skip("localedef makes the locale")
    target = folder / "en_US.ISO-8859-1"
    subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", target], capture_output=True)
    if not target.exists():
        pytest.skip("the system has no sources of locales")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("variables", LOCALES, ids=lambda variables: variables.get("LC_ALL"))
def test_names_are_utf8_in_every_locale(tmp_path, locale_path, variables):
    ran = subprocess.run(
        [sys.executable, "-c", USE_STORE],
        env=os.environ | variables | {"LOCPATH": str(locale_path)},
        cwd=tmp_path,
        capture_output=True,
    )
    assert ran.returncode == 0, ran.stderr.decode()
    encoding = {"C": "ascii", "en_US.ISO-8859-1": "iso8859-1"}.get(variables.get("LC_ALL"), "utf-8")
    assert ran.stdout.decode().strip() == encoding
    names = {"\xe9t\xe9.csv", "\u65e5\u672c.csv", "\U0001f52d.csv", "plain.csv"}
    assert {os.fsdecode(name) for name in os.listdir(os.fsencode(tmp_path / "out"))} == names


def test_a_path_that_the_locale_decoded_is_shown_as_text(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", "import sys; from spxdask.storage import LocalStore as s; "
         "print(ascii(str(s(sys.argv[1]))))", "/d\xe9"],
        env=os.environ | LOCALES[0],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert ran.stdout.strip() == r"'/d\xe9'"


# File systems that refuse


@pytest.fixture
def refuse(monkeypatch):
    """Return a function that lets the system refuse to create files."""
    open_file = os.open

    def refuse(is_refused, code):
        def open_some(path, flags, *mode, **how):
            if flags & os.O_CREAT and is_refused(os.path.basename(os.fspath(path))):
                raise OSError(code, os.strerror(code), path)
            return open_file(path, flags, *mode, **how)

        monkeypatch.setattr(os, "open", open_some)

    return refuse


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOENT, errno.EILSEQ, errno.EACCES])
def test_refused_characters_are_found(tmp_path, refuse, code):
    refuse(lambda name: set(name) & set('"*:<>?|\u65e5'), code)
    store = LocalStore(tmp_path)
    tried = "".join(map(chr, range(0xA0, 0x120)))
    assert store.find_refused_characters(f'{tried} \u65e5!"#$*:?') == '\u65e5"*:?'
    assert store.find_refused_characters("") == ""
    assert os.listdir(tmp_path) == []


def test_nothing_is_refused_on_an_ordinary_disk(tmp_path):
    assert LocalStore(tmp_path).find_refused_characters(' "*:<>?|' + "\u65e5" * 200) == ""


def test_a_full_disk_is_not_taken_for_a_refusal(tmp_path, refuse):
    refuse(lambda name: True, errno.ENOSPC)
    with pytest.raises(DiskFullError, match=str(tmp_path)):
        LocalStore(tmp_path).find_refused_characters(":")
    with pytest.raises(DiskFullError, match=str(tmp_path)):
        LocalStore(tmp_path).require_writable()


def test_a_folder_that_can_be_written_to_stays_empty(tmp_path):
    LocalStore(tmp_path).require_writable()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_to(tmp_path, refuse, code):
    refuse(lambda name: True, code)
    with pytest.raises(OSError, match=os.strerror(code)):
        LocalStore(tmp_path).require_writable()


@pytest.mark.parametrize("call", ["write", "mkdtemp"])
def test_a_full_folder_for_temporary_files_is_named(tmp_path, monkeypatch, call):
    store = open_store(f"memory://{tmp_path.name}")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_, **__):
        raise full

    if call == "mkdtemp":
        monkeypatch.setattr(tempfile, "mkdtemp", fail)
    with pytest.raises(DiskFullError) as raised, store.atomic_path("a") as _:
        fail()
    assert f"in {tempfile.gettempdir()} (temporary files; TMPDIR" in str(raised.value)
    assert store.list_names() == set()
