"""What only an object store does: many requests at once, conditions, copies, errors of its own."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from fsspec.config import conf as fsspec_settings
from objectstore import BUCKET, serving

from spxdask.errors import StoreError
from spxdask.storage import ObjectStore, open_store, s3_options, shared_copy


@pytest.fixture(scope="module")
def s3():
    with serving() as filesystem:
        yield filesystem


@pytest.fixture
def store(s3, tmp_path):
    """A folder of the test's own."""
    return open_store(f"s3://{BUCKET}/{tmp_path.name}")


def test_the_object_that_stands_for_a_folder_is_no_file_of_it(s3, store):
    s3.pipe_file(f"{str(store).removeprefix('s3://')}/", b"")
    store.put("a.csv", b"a")
    assert store.list_names() == {"a.csv"}


@pytest.mark.parametrize("count", [1, 4, 9])
def test_so_many_requests_at_once(store, count, monkeypatch):
    few = ObjectStore(str(store), max_concurrent_requests=4)
    files = [(f"{i}.csv", b"x" * i) for i in range(count)]
    gathered = []
    call_each = few._call_each

    def count_calls(method, calls):
        gathered.append(len(calls))
        return call_each(method, calls)

    monkeypatch.setattr(few, "_call_each", count_calls)
    few.put_many(iter(files))
    assert list(few.get_many(name for name, _ in files)) == [data for _, data in files]
    few.delete_many(name for name, _ in files)
    assert max(gathered) <= 4
    assert sum(gathered) == 3 * count
    assert store.list_names() == set()


def test_no_more_than_a_version_is_replaced(store):
    store.put("a", b"first")
    version = store.get_version("a")
    assert store.put_if_unchanged("a", b"second", version)
    assert not store.put_if_unchanged("a", b"third", version)
    assert store.get("a") == b"second"
    store.delete_many(["a"])
    assert not store.put_if_unchanged("a", b"third", version)


def test_of_many_that_replace_a_version_one_succeeds(store):
    store.put("a", b"first")
    version, count = store.get_version("a"), 6
    begin = Barrier(count)

    def write(number: int) -> bool:
        begin.wait(60)
        return store.put_if_unchanged("a", str(number).encode(), version)

    with ThreadPoolExecutor(count) as pool:
        assert sum(pool.map(write, range(count))) == 1


def test_settings_of_the_user_take_precedence(monkeypatch):
    user = {"config_kwargs": {"max_pool_connections": 3}}
    monkeypatch.setitem(fsspec_settings, "s3", user)
    found = s3_options(max_pool_connections=64, connect_timeout=5.0)
    assert found == {"config_kwargs": {"max_pool_connections": 3, "connect_timeout": 5.0}}


def test_a_kind_of_store_that_nobody_knows():
    store = open_store("nonsense://a/b")
    with pytest.raises(StoreError, match="Protocol not known"):
        store.list_sizes()


def test_an_error_is_raised_when_no_request_is_under_way_any_more(store, monkeypatch):
    ended = []

    async def pipe_file(path, data):
        if path.endswith("/1.csv"):
            raise PermissionError("Access Denied")
        ended.append(path)

    monkeypatch.setattr(store.filesystem, "_pipe_file", pipe_file)
    with pytest.raises(StoreError) as error:
        store.put_many((f"{i}.csv", b"") for i in range(10))
    assert (error.value.path, error.value.reason) == (str(store), "PermissionError: Access Denied")
    assert len(ended) == 9


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shared_copy, "_files_in_use", files := [])
    yield tmp_path
    for file in files:
        os.close(file)


def test_a_copy_that_the_processes_of_a_machine_share(store, temporary):
    store.put_many([("one.arrow", b"1"), ("two.arrow", b"2")])
    copy = store.local_copy("one.arrow")
    assert copy.read_bytes() == b"1"
    assert copy.parent == temporary / f"spxdask-{os.getuid()}"
    assert copy.parent.stat().st_mode & 0o777 == 0o700
    # It is not fetched again.
    store.delete_many(["one.arrow"])
    assert store.local_copy("one.arrow") == copy
    # Another takes its place when nobody uses it any more.
    two = store.local_copy("two.arrow")
    assert (copy.read_bytes(), two.read_bytes()) == (b"1", b"2")
    while shared_copy._files_in_use:
        os.close(shared_copy._files_in_use.pop())
    store.local_copy("two.arrow")
    assert [path.name for path in copy.parent.glob("*.arrow")] == ["two.arrow"]
    assert {path.name for path in temporary.iterdir()} == {copy.parent.name}


@pytest.mark.parametrize("there", ["writable", "file", "link"])
def test_a_copy_is_not_kept_where_others_write(store, temporary, there):
    folder = temporary / f"spxdask-{os.getuid()}"
    if there == "file":
        folder.touch()
    else:
        folder_of_others = temporary / "others"
        folder_of_others.mkdir()
        if there == "link":
            folder.symlink_to(folder_of_others)
        else:
            folder_of_others.rename(folder)
            folder.chmod(0o777)
        (folder / "one.arrow").write_bytes(b"another")
    store.put("one.arrow", b"1")
    copy = store.local_copy("one.arrow")
    assert copy.read_bytes() == b"1"
    assert folder not in copy.parents
    assert copy.parent.stat().st_mode & 0o777 == 0o700
