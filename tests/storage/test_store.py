"""What every store does, whatever it is made of: one suite, run over each of them."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from urllib.parse import quote

import pytest
from objectstore import BUCKET, serving

from spxdask.storage import LocalStore, ObjectStore, locate_file, open_store, read_file

# Names of light curves that mean something to one who looks for files, or reads URLs.
NAMES = ["a.csv", "a[1].csv", "*.csv", "?.csv", "b?c#d&e=f.csv", "100%25.csv", "é + ü.csv", " .csv"]


@pytest.fixture(scope="module")
def s3():
    with serving() as filesystem:
        yield filesystem


class StoreTests:
    """The suite; a class for each kind of store gives the fixture `store`, an empty folder."""

    def test_an_empty_folder(self, store):
        assert (store.list_sizes(), store.list_names()) == ({}, set())
        assert not store.exists("a.csv")
        assert store.get_version("a.csv") is None
        assert list(store.get_many([])) == []
        store.put_many([])
        store.delete_many([])
        store.delete_partial_files()
        assert store.free_bytes() > 0

    def test_a_folder_that_is_not_there(self, store):
        absent = store / "absent"
        assert (absent.list_sizes(), absent.list_names()) == ({}, set())
        assert not absent.exists("a.csv")
        absent.delete_partial_files()
        with pytest.raises(FileNotFoundError):
            list(absent.get_many(["a.csv"]))

    def test_files_of_any_name(self, store):
        written = {name: name.encode() for name in NAMES}
        store.put_many(written.items())
        assert store.list_sizes() == {name: len(data) for name, data in written.items()}
        assert store.list_names() == set(NAMES)
        found = list(store.get_many(NAMES))
        assert found == list(written.values())
        assert all(type(data) is bytearray for data in found)
        for name, data in written.items():
            assert store.exists(name)
            assert store.get(name) == data
            assert store.get_ranges(name, [(0, 2), (1, 3)]) == [data[:2], data[1:3]]
            assert store.find_starting_with([name], data[:3]) == {name}
            assert store.find_starting_with([name], data + b".") == set()
            with store.open_seekable(name) as file:
                assert file.read() == data
        for name in NAMES:
            store.delete_many([name])
            del written[name]
            assert store.list_names() == written.keys()

    def test_a_folder_of_any_name(self, store):
        (store / "run 1 xy").make()
        (store / "run 1 xy").put("a.csv", b"of another")
        folder = store / "run [1] *?"
        folder.make()
        folder.put_many([("a.csv", b"a"), ("b.csv", b"b")])
        assert list(folder.get_many(["b.csv", "a.csv"])) == [b"b", b"a"]
        folder.rename("a.csv", "c.csv")
        folder.delete_many(["b.csv"])
        assert folder.list_sizes() == {"c.csv": 1}
        assert (store / "run 1 xy").get("a.csv") == b"of another"

    def test_what_is_in_a_folder_below_is_not_in_it(self, store):
        (store / "below").make()
        (store / "below").put("b.csv", b"b")
        store.put("a.csv", b"a")
        assert store.list_sizes() == {"a.csv": 1}
        assert store.list_names() == {"a.csv"}
        assert (store / "below").list_names() == {"b.csv"}
        assert not store.exists("below")

    @pytest.mark.parametrize("count", [1, 63, 64, 65, 130])
    def test_many_files(self, store, count):
        files = [(f"{i}.csv", b"x" * i) for i in range(count)]
        store.put_many(iter(files))
        assert store.list_sizes() == {f"{i}.csv": i for i in range(count)}
        found = store.get_many(name for name, _ in files)
        assert [(name, next(found)) for name, _ in files] == files
        assert store.find_starting_with(store.list_names(), b"x" * 60) == {
            f"{i}.csv" for i in range(60, count)
        }
        store.delete_many(iter(store.list_names() - {"0.csv"}))
        assert store.list_names() == {"0.csv"}

    @pytest.mark.parametrize("durable", [True, False])
    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_a_file_is_replaced(self, store, durable, kind):
        store.put("a", b"first", durable=durable)
        store.put("a", kind(b"second"), durable=durable)
        assert store.get("a") == b"second"
        assert store.list_sizes() == {"a": 6}

    def test_an_empty_file(self, store):
        store.put("a", b"")
        assert store.list_sizes() == {"a": 0}
        assert (store.get("a"), list(store.get_many(["a"]))) == (b"", [b""])
        assert store.find_starting_with(["a"], b"") == {"a"}
        assert store.find_starting_with(["a"], b"x") == set()
        assert store.get_ranges("a", [(0, 0)]) == [b""]

    def test_ranges_of_a_file(self, store):
        data = os.urandom(10_000)
        store.put("a", data)
        ranges = [(0, 10), (9_000, 10_000), (5, 6), (7, 7), (9_990, 20_000), (0, 10_000)]
        assert store.get_ranges("a", ranges) == [data[start:stop] for start, stop in ranges]
        many = [(i, i + 3) for i in range(150)]
        assert store.get_ranges("a", many) == [data[start:stop] for start, stop in many]
        assert store.get_ranges("a", []) == []

    def test_pieces_of_a_file(self, store):
        data = memoryview(os.urandom(200_000))
        store.direct_write("a", data[:150_000])
        assert store.get("a") == data[:150_000]
        with store.open_seekable("a") as file:
            file.seek(100_000)
            assert file.read(10) == data[100_000:100_010]
            file.seek(-10, os.SEEK_END)
            assert file.read() == data[149_990:150_000]

    def test_a_missing_file(self, store):
        store.put("a.csv", b"a")
        for read in (
            store.get,
            store.open_seekable,
            lambda name: list(store.get_many(["a.csv", name])),
            lambda name: store.get_ranges(name, [(0, 1)]),
            lambda name: store.find_starting_with(["a.csv", name], b"a"),
            lambda name: store.rename(name, "c.csv"),
        ):
            with pytest.raises(FileNotFoundError) as raised:
                read("b.csv")
            assert raised.value.strerror
        with pytest.raises(FileNotFoundError) as raised:
            store.get("b.csv")
        assert raised.value.filename == store.path_to("b.csv")
        assert store.list_names() == {"a.csv"}

    def test_only_the_first_is_written(self, store):
        assert store.put_if_absent("a", b"first")
        assert not store.put_if_absent("a", b"second")
        assert store.get("a") == b"first"
        store.delete_many(["a"])
        assert store.put_if_absent("a", b"third")
        assert store.list_sizes() == {"a": 5}

    def test_of_many_that_write_at_once_one_is_first(self, store):
        count = 6
        begin = Barrier(count)

        def write(number: int) -> bool:
            begin.wait(60)
            return store.put_if_absent("a", str(number).encode())

        with ThreadPoolExecutor(count) as pool:
            written = list(pool.map(write, range(count)))
        assert sum(written) == 1
        assert store.get("a") == str(written.index(True)).encode()
        assert store.list_names() == {"a"}

    def test_a_file_appears_when_it_is_whole(self, store):
        with store.atomic_path("a") as part:
            part.write_bytes(b"fir")
            assert store.list_sizes().get("a") is None
            part.write_bytes(b"first")
        assert store.list_sizes() == {"a": 5}

    def test_a_block_that_raises_changes_nothing(self, store):
        store.put("a", b"first")

        def write() -> None:
            with store.atomic_path("a") as part:
                parts.append(part)
                part.write_bytes(b"second")
                raise KeyError

        parts: list[Path] = []
        with pytest.raises(KeyError):
            write()
        assert store.get("a") == b"first"
        assert store.list_names() == {"a"}
        assert not parts[0].exists()

    def test_a_block_that_writes_nothing_is_an_error(self, store):
        store.put("a", b"old")
        with pytest.raises(FileNotFoundError), store.atomic_path("a"):
            pass
        assert store.get("a") == b"old"

    def test_another_name(self, store):
        store.put_many([("a", b"a"), ("b", b"b")])
        store.rename("a", "b")
        assert store.list_sizes() == {"b": 1}
        assert store.get("b") == b"a"

    def test_a_version_changes_with_the_file(self, store):
        store.put("a", b"first")
        version = store.get_version("a")
        assert store.get_version("a") == version
        if version is not None:
            store.put("a", b"second")
            assert store.get_version("a") not in (version, None)

    def test_a_local_copy(self, store, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        store.put("a.arrow", b"a")
        assert store.local_copy("a.arrow").read_bytes() == b"a"

    def test_stores_are_values(self, store):
        below = store / "a"
        assert below == store / "a" == open_store(str(below)) == open_store(below)
        assert len({below, store / "a", store}) == 2
        assert below != store
        store.put("x", b"x")
        other = pickle.loads(pickle.dumps(store))
        assert (other, str(other), other.get("x")) == (store, str(store), b"x")
        assert str(store) in repr(store)

    def test_from_paths_to_files(self, store):
        store.put("a [1].csv", b"a")
        path = store.path_to("a [1].csv")
        assert path == f"{store}/a [1].csv"
        assert locate_file(path) == (store, "a [1].csv")
        assert read_file(path) == b"a"

    def test_what_lies_in_a_folder(self, store):
        folder = store / "images"
        for path in (str(folder), f"{folder}/", f"{folder}/a.csv", f"{folder}/a/b.csv"):
            assert folder.contains(path)
        for path in (str(store), f"{folder}.csv", f"{folder}s/a.csv", f"{store}/state/images"):
            assert not folder.contains(path)


class TestLocalStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path):
        folder = tmp_path / "store"
        folder.mkdir()
        return open_store(folder)


class TestMemory(StoreTests):
    @pytest.fixture
    def store(self, tmp_path):
        store = open_store(f"memory://{quote(str(tmp_path))}")
        yield store
        store.filesystem.store.clear()
        store.filesystem.pseudo_dirs[:] = [""]


class TestS3(StoreTests):
    @pytest.fixture
    def store(self, s3, tmp_path):
        # Of a name of its own.
        return open_store(f"s3://{BUCKET}/{tmp_path.name}")

    @pytest.mark.parametrize("count", [65])
    def test_many_files(self, store, count):
        """More than one batch; `TestMemory` has the same code count by count, without a server."""
        super().test_many_files(store, count)


def test_the_kind_of_a_store_follows_from_its_path(tmp_path):
    assert isinstance(open_store(tmp_path), LocalStore)
    assert open_store(tmp_path).local_path == tmp_path
    assert isinstance(open_store("memory://a"), ObjectStore)
    assert open_store("memory://a").local_path is None


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/a b/c", "/a b/c"),
        ("/a/b/", "/a/b"),
        ("file:///a%20b/c", "/a b/c"),
        ("local:///a%20b/c", "/a b/c"),
        ("file://host/a/b", "/a/b"),
    ],
)
def test_folders_on_disk(text, path):
    assert open_store(text) == open_store(Path(path))
    assert str(open_store(text)) == path


@pytest.mark.parametrize("text", ["out", "a:b/c", "s3:/bucket", "."])
def test_folders_on_disk_are_absolute(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_store(text).local_path == tmp_path / text


def test_urls_of_stores():
    assert open_store("s3://bucket/a/") == open_store("s3://bucket/a")
    assert str(open_store("s3://bucket/a") / "b?c#d [1]") == "s3://bucket/a/b?c#d [1]"
    assert str(open_store("memory://")) == "memory://"
    assert locate_file("s3://bucket/a/b") == (open_store("s3://bucket/a"), "b")
    assert locate_file("s3://bucket/a/b/") == (open_store("s3://bucket/a"), "b")
