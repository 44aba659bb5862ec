"""A store in an object store, or anywhere else that fsspec knows."""

from __future__ import annotations

import asyncio
import errno
import inspect
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.asyn import sync
from fsspec.config import conf as fsspec_settings
from fsspec.core import url_to_fs

from spxdask.errors import SpxdaskError, StoreError
from spxdask.storage.local import describe_temporary_folder, raise_disk_full
from spxdask.storage.shared_copy import share_copy
from spxdask.storage.store import Content, Store

# Files read, written or deleted at once.
MAX_CONCURRENT_REQUESTS = 64
# Bytes read of a file of which pieces are asked for, so that neighbours come together.
READ_AHEAD_BYTES = 1 << 20

# Positional and named arguments of a call.
_Call = tuple[tuple[Any, ...], dict[str, Any]]


class ObjectStore(Store):
    """A folder in an object store.

    Parameters
    ----------
    url : str
        Such as ``s3://bucket/folder``. Credentials and the like are those that fsspec finds
        in its configuration and in the environment.
    max_concurrent_requests : int
        Files read, written or deleted at once.
    """

    def __init__(self, url: str, *, max_concurrent_requests: int = MAX_CONCURRENT_REQUESTS) -> None:
        folder = url.rstrip("/")
        super().__init__(f"{folder}//" if folder.endswith(":") else folder)
        self._max_concurrent_requests = max_concurrent_requests

    def __reduce__(self) -> tuple[Any, ...]:
        # The connection is not pickled; the other process opens one.
        return _unpickle, (self._location, self._max_concurrent_requests)

    @property
    def local_path(self) -> None:
        """None."""
        return None

    def __truediv__(self, name: str) -> ObjectStore:
        return ObjectStore(
            self.path_to(name), max_concurrent_requests=self._max_concurrent_requests
        )

    @cached_property
    def _filesystem_and_folder(self) -> tuple[Any, str]:
        """The file system of fsspec, and the folder's path in it."""
        # Listings are not cached, because other processes write to the folder.
        options: dict[str, Any] = {"use_listings_cache": False}
        if self._location.startswith(("s3:", "s3a:")):
            options |= s3_options(max_pool_connections=MAX_CONCURRENT_REQUESTS)
        with _translate_errors(self._location):
            filesystem, folder = url_to_fs(self._location, **options)
        return filesystem, folder.rstrip("/")

    @property
    def filesystem(self) -> Any:
        """The file system of fsspec."""
        return self._filesystem_and_folder[0]

    def _key(self, name: str) -> str:
        """Return the path of a file in the file system."""
        return f"{self._filesystem_and_folder[1]}/{name}"

    def contains(self, path: str) -> bool:
        """See `Store.contains`."""
        return f"{path.rstrip('/')}/".startswith(f"{self._location}/")

    def make(self) -> None:
        """Do nothing, as folders are there with their files."""

    def list_sizes(self) -> dict[str, int]:
        """See `Store.list_sizes`."""
        filesystem, folder = self._filesystem_and_folder
        with _translate_errors(self._location):
            try:
                found = filesystem.ls(folder, detail=True)
            except FileNotFoundError:
                return {}
        files = {f["name"].rpartition("/")[2]: f["size"] for f in found if f["type"] == "file"}
        # The empty object that some programs make to stand for the folder.
        files.pop("", None)
        return files

    def list_names(self) -> set[str]:
        """See `Store.list_names`."""
        return set(self.list_sizes())

    def exists(self, name: str) -> bool:
        """See `Store.exists`."""
        # `exists` and `isfile` of fsspec return False when the store cannot be used.
        return self._describe(name).get("type") == "file"

    def get_version(self, name: str) -> str | None:
        """See `Store.get_version`."""
        version: str | None = self._describe(name).get("ETag")
        return version

    def _describe(self, name: str) -> dict[str, Any]:
        """Return what the file system reports about a file, nothing when it does not exist."""
        try:
            with _translate_errors(self.path_to(name)):
                found: dict[str, Any] = self.filesystem.info(self._key(name))
                return found
        except FileNotFoundError:
            return {}

    def get(self, name: str) -> bytes:
        """See `Store.get`."""
        with _translate_errors(self.path_to(name)):
            content: bytes = self.filesystem.cat_file(self._key(name))
            return content

    def get_many(self, names: Iterable[str]) -> Iterator[bytearray]:
        """See `Store.get_many`."""
        names = iter(names)
        while batch := list(islice(names, self._max_concurrent_requests)):
            # `cat` would interpret a * in a name as a pattern.
            calls = [((self._key(name),), self._one_connection) for name in batch]
            yield from map(bytearray, self._call_each("cat_file", calls))

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See `Store.get_ranges`."""
        contents: list[bytes] = []
        for first in range(0, len(ranges), self._max_concurrent_requests):
            batch = ranges[first : first + self._max_concurrent_requests]
            calls = [
                ((self._key(name),), {"start": start, "end": stop} | self._one_connection)
                for start, stop in batch
                # A range without a byte cannot be asked for.
                if start < stop
            ]
            found = iter(self._call_each("cat_file", calls))
            contents += [next(found) if start < stop else b"" for start, stop in batch]
        return contents

    @cached_property
    def _one_connection(self) -> dict[str, int]:
        """Options of `cat_file` that spare a request for the length of a file."""
        with _translate_errors(self._location):
            parameters = inspect.signature(self.filesystem.cat_file).parameters
        return {"max_concurrency": 1} if "max_concurrency" in parameters else {}

    def open_seekable(self, name: str) -> BinaryIO:
        """See `Store.open_seekable`."""
        with _translate_errors(self.path_to(name)):
            file: BinaryIO = self.filesystem.open(
                self._key(name), "rb", block_size=READ_AHEAD_BYTES, cache_type="readahead"
            )
            return file

    def find_starting_with(self, names: Iterable[str], content: bytes) -> set[str]:
        """See `Store.find_starting_with`."""

        def starts_with(name: str) -> bool:
            with (
                _translate_errors(self.path_to(name)),
                self.filesystem.open(self._key(name), "rb", cache_type="none") as file,
            ):
                return bool(file.read(len(content)) == content)

        names = list(names)
        with ThreadPoolExecutor(self._max_concurrent_requests) as pool:
            found = pool.map(starts_with, names)
            return {name for name, matches in zip(names, found, strict=True) if matches}

    def local_copy(self, name: str) -> Path:
        """See `Store.local_copy`."""

        def fetch(path: Path) -> None:
            with _translate_errors(self.path_to(name)):
                self.filesystem.get_file(self._key(name), str(path))

        return share_copy(name, fetch)

    def put(self, name: str, data: Content, *, durable: bool = True) -> None:
        """See `Store.put`."""
        with _translate_errors(self.path_to(name)):
            self.filesystem.pipe_file(self._key(name), bytes(data))

    def put_many(self, files: Iterable[tuple[str, Content]]) -> None:
        """See `Store.put_many`."""
        files = iter(files)
        while batch := list(islice(files, self._max_concurrent_requests)):
            calls: list[_Call] = [((self._key(name), bytes(data)), {}) for name, data in batch]
            self._call_each("pipe_file", calls)

    def put_if_absent(self, name: str, data: Content) -> bool:
        """See `Store.put_if_absent`."""
        try:
            with _translate_errors(self.path_to(name)):
                self.filesystem.pipe_file(self._key(name), bytes(data), mode="create")
        except (OSError, StoreError):
            # Stores report in different ways that the file exists.
            if not self.exists(name):
                raise
            return False
        return True

    def put_if_unchanged(self, name: str, data: Content, version: str) -> bool:
        """Write a file unless it was replaced since.

        Parameters
        ----------
        name : str
            Name of the file.
        data : bytes, bytearray or memoryview
            Its new content.
        version : str
            What `get_version` returned.

        Returns
        -------
        bool
            As for `put_if_absent`.
        """
        try:
            with _translate_errors(self.path_to(name)):
                self.filesystem.pipe_file(self._key(name), bytes(data), IfMatch=version)
        except (OSError, StoreError):
            if self.get_version(name) == version:
                raise
            return False
        return True

    def direct_write(self, name: str, data: memoryview) -> None:
        """See `Store.direct_write`."""
        self.put(name, data)

    @contextmanager
    def atomic_path(self, name: str, *, durable: bool = True) -> Iterator[Path]:
        """See `Store.atomic_path`."""
        with (
            raise_disk_full(describe_temporary_folder()),
            tempfile.TemporaryDirectory(prefix="spxdask-") as folder,
        ):
            part = Path(folder, "part")
            yield part
            with _translate_errors(self.path_to(name)):
                self.filesystem.put_file(str(part), self._key(name))

    def rename(self, name: str, new_name: str) -> None:
        """See `Store.rename`."""
        with _translate_errors(self.path_to(name)):
            self.filesystem.cp_file(self._key(name), self._key(new_name))
            self.filesystem.rm_file(self._key(name))

    def delete_many(self, names: Iterable[str]) -> None:
        """See `Store.delete_many`."""
        names = iter(names)
        while batch := list(islice(names, self._max_concurrent_requests)):
            # `rm` would interpret a * in a name as a pattern.
            self._call_each("rm_file", [((self._key(name),), {}) for name in batch])

    def delete_partial_files(self) -> None:
        """Do nothing, as a store shows no file before it is whole."""

    def require_writable(self) -> None:
        """Do nothing, as some stores let files be written that cannot be deleted again."""

    def find_refused_characters(self, characters: str) -> str:
        """See `Store.find_refused_characters`."""
        return ""

    def free_bytes(self) -> float:
        """See `Store.free_bytes`."""
        return math.inf

    def _call_each(self, method: str, calls: Sequence[_Call]) -> list[Any]:
        """Call a method of the file system again and again, at once where it can."""
        filesystem = self.filesystem
        with _translate_errors(self._location):
            if not filesystem.async_impl:
                return [getattr(filesystem, method)(*args, **options) for args, options in calls]

            async def run() -> list[Any]:
                requests = [
                    getattr(filesystem, f"_{method}")(*args, **options) for args, options in calls
                ]
                # So that no request is under way any more when the error of another is raised.
                results = await asyncio.gather(*requests, return_exceptions=True)
                for result in results:
                    if isinstance(result, BaseException):
                        raise result
                return results

            results: list[Any] = sync(filesystem.loop, run)
            return results


def s3_options(**config: Any) -> dict[str, Any]:
    """Return options of s3fs that add settings of botocore's to those that the user has made.

    Parameters
    ----------
    **config
        Settings of botocore's; those in the user's configuration of fsspec, which would be
        replaced otherwise, take precedence.

    Returns
    -------
    dict
        Keyword arguments of `s3fs.S3FileSystem`.
    """
    user = fsspec_settings.get("s3", {}).get("config_kwargs", {})
    return {"config_kwargs": config | user}


@contextmanager
def _translate_errors(path: str) -> Iterator[None]:
    """Raise StoreError where a store cannot be used.

    The libraries of stores have errors of their own, such as that of missing credentials, and
    raise OSError without a number or a name. A file that is not there, or is there already,
    remains a FileNotFoundError or FileExistsError.
    """
    try:
        yield
    except (FileExistsError, SpxdaskError):
        raise
    except FileNotFoundError as error:
        # The error of some stores has only the file's name, others report a missing bucket.
        names_file = not error.args or str(error.args[0]) in path
        reason = os.strerror(errno.ENOENT) if names_file else error.strerror or str(error)
        raise FileNotFoundError(errno.ENOENT, reason, path) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise StoreError(reason, path=path) from error


def _unpickle(url: str, max_concurrent_requests: int) -> ObjectStore:
    return ObjectStore(url, max_concurrent_requests=max_concurrent_requests)
