"""Files on disk or in an object store, whole or not at all, and names that stay in a folder.

A place on disk is a `pathlib.Path`, any other that fsspec knows a `upath.UPath`, which has
the same methods; what is quicker or safer done otherwise is below.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import inspect
import mmap
import os
import re
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit

from fsspec.asyn import sync
from fsspec.config import conf as fsspec_settings
from upath import UPath

from spxdask.errors import DiskFullError, SpxdaskError, StoreError

# A directory entry holds 255 bytes on common file systems, the suffix included.
MAX_NAME_BYTES = 200
# s3fs takes what comes after ?versionId= for no part of a name.
_UNSAFE = re.compile(r"[/\\%\x00-\x1f\x7f-\x9f\ud800-\udfff]|^\.|\.\.|\?versionId=")

# Objects read, written or removed at once.
MAX_CONCURRENT_REQUESTS = 64
# Read of an object whose pieces are asked for, so that neighbours come together.
PIECE_BYTES = 1 << 20


def as_path(path: str | os.PathLike) -> Path | UPath:
    """Return a path on disk, or a URL of a store, as something that can be read and written."""
    if isinstance(path, Path | UPath):
        return path
    text = os.fspath(path)
    if "://" not in text:
        return Path(text)
    if text.startswith(("file:", "local:")):
        return Path(unquote(urlsplit(text).path))
    # What others write meanwhile is to be seen.
    options: dict[str, Any] = {"use_listings_cache": False}
    if text.startswith(("s3:", "s3a:")):
        options |= s3_options(max_pool_connections=MAX_CONCURRENT_REQUESTS)
    return UPath(text, **options)


def s3_options(**config: Any) -> dict[str, Any]:
    """Return options of s3fs with some of botocore's, and those that the user has set.

    Without them, settings of the user's for fsspec would be replaced by ours.
    """
    user = fsspec_settings.get("s3", {}).get("config_kwargs", {})
    return {"config_kwargs": config | user}


def is_local(path: Path | UPath) -> bool:
    """Tell whether a place is on disk."""
    return isinstance(path, Path)


@contextmanager
def translate_store_errors(path: Path | UPath) -> Iterator[None]:
    """Raise StoreError, in one sentence, where a store cannot be used.

    Stores have errors of their own for it, such as that of missing credentials, and of the
    system's those without a number or a name. What is not there, or is there already,
    remains FileNotFoundError or FileExistsError.
    """
    try:
        yield
    except (FileExistsError, SpxdaskError):
        raise
    except Exception as error:
        if is_local(path):
            raise
        if isinstance(error, FileNotFoundError):
            # Some name only what is not there.
            named = not error.args or str(error.args[0]) in str(path)
            reason = os.strerror(errno.ENOENT) if named else error.strerror or str(error)
            raise FileNotFoundError(errno.ENOENT, reason, str(path)) from error
        what = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise StoreError(f"{path}: {what}") from error


def sizes(folder: Path | UPath) -> dict[str, int]:
    """Return the length of every file in a folder, by name; none when there is no folder."""
    if is_local(folder):
        found: dict[str, int] = {}
        with suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                # One that gets another name just now must not cost us the others.
                with suppress(FileNotFoundError):
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found
    with translate_store_errors(folder):
        try:
            found = folder.fs.ls(folder.path, detail=True)
        except FileNotFoundError:
            return {}
    files = {f["name"].rpartition("/")[2]: f["size"] for f in found if f["type"] == "file"}
    # Of the empty object that stands for the folder where somebody made one.
    files.pop("", None)
    return files


def names_in(folder: Path | UPath) -> set[str]:
    """Return the names of the files in a folder."""
    if not is_local(folder):
        return set(sizes(folder))
    try:
        with os.scandir(folder) as entries:
            return {e.name for e in entries if e.is_file(follow_symlinks=False)}
    except FileNotFoundError:
        return set()


def remove(folder: Path | UPath, names: Iterable[str]) -> None:
    """Remove files of a folder."""
    if is_local(folder):
        for name in names:
            os.unlink(folder / name)
        return
    names = iter(names)
    # Not `rm`, which takes a * in a name for any text.
    while some := list(islice(names, MAX_CONCURRENT_REQUESTS)):
        with translate_store_errors(folder):
            _each(folder.fs, "rm_file", ((f"{folder.path}/{name}",) for name in some))


def _each(fs: Any, method: str, calls: Iterable[tuple], **options: Any) -> list:
    """Call a method of a file system again and again, at once where it can."""
    if not fs.async_impl:
        return [getattr(fs, method)(*arguments, **options) for arguments in calls]

    async def run() -> list:
        tasks = [getattr(fs, f"_{method}")(*arguments, **options) for arguments in calls]
        # None is left at work behind the error of another.
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for error in filter(lambda result: isinstance(result, BaseException), ended):
            raise error
        return ended

    return sync(fs.loop, run)


def move(path: Path | UPath, name: str) -> None:
    """Give a file another name in its folder."""
    if is_local(path):
        os.replace(path, path.with_name(name))
    else:
        with translate_store_errors(path):
            path.fs.cp_file(path.path, path.with_name(name).path)
            path.fs.rm_file(path.path)


def read_bytes(path: Path | UPath) -> bytes:
    """Return what a file holds."""
    if is_local(path):
        return path.read_bytes()
    with translate_store_errors(path):
        return path.fs.cat_file(path.path)


def open_seekable(path: Path | UPath) -> Path | BinaryIO:
    """Return a file to read only pieces of, for pyarrow."""
    if is_local(path):
        return path
    with translate_store_errors(path):
        return path.fs.open(path.path, "rb", block_size=PIECE_BYTES, cache_type="readahead")


def starts_with(path: Path | UPath, content: bytes) -> bool:
    """Tell whether a file begins with some bytes."""
    if is_local(path):
        with open(path, "rb") as file:
            return file.read(len(content)) == content
    with translate_store_errors(path), path.fs.open(path.path, "rb", cache_type="none") as file:
        return file.read(len(content)) == content


def read_each(folder: Path | UPath, names: Iterable[str]) -> Iterator[bytearray]:
    """Read files of a folder one after the other, some at once where they are far away."""
    if is_local(folder):
        for name in names:
            with open(folder / name, "rb") as file:
                yield bytearray(file.read())
        return
    names, options = iter(names), {}
    with translate_store_errors(folder):
        if "max_concurrency" in inspect.signature(folder.fs.cat_file).parameters:
            # With one connection a file, s3fs does not ask for its length first.
            options["max_concurrency"] = 1
    while paths := [(f"{folder.path}/{name}",) for name in islice(names, MAX_CONCURRENT_REQUESTS)]:
        with translate_store_errors(folder):
            # Not `cat`, which takes a * in a name for any text.
            found = _each(folder.fs, "cat_file", paths, **options)
        yield from map(bytearray, found)


def local_copy(path: UPath) -> Path:
    """Return a copy on our own disk of a file that never changes under its name.

    The processes of a machine share it. It lies in the folder for temporary files until
    another is asked for and nobody uses it any more.
    """
    folder = Path(tempfile.gettempdir(), f"spxdask-{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        # Somebody else could give us other content.
        folder = Path(tempfile.mkdtemp(prefix="spxdask-"))
    copy = folder / path.name
    with open(folder / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for other in folder.glob("[!.]*"):
            if other != copy:
                _remove_unused(other)
        if not copy.exists():
            with translate_store_errors(path), atomic_path(copy) as part:
                path.fs.get_file(path.path, str(part))
        used = os.open(copy, os.O_RDONLY)
        fcntl.flock(used, fcntl.LOCK_SH)
    # Until this process ends, it is in use.
    _in_use.append(used)
    return copy


_in_use: list[int] = []


def _remove_unused(path: Path) -> None:
    with suppress(BlockingIOError, FileNotFoundError), open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()


def write_each(folder: Path | UPath, files: Iterable[tuple[str, bytes]]) -> None:
    """Write small files to a folder, each as `atomic_write` does."""
    if is_local(folder):
        for name, data in files:
            atomic_write(f"{folder}/{name}", data)
        return
    files = iter(files)
    while some := [
        (f"{folder.path}/{name}", bytes(d)) for name, d in islice(files, MAX_CONCURRENT_REQUESTS)
    ]:
        with translate_store_errors(folder):
            _each(folder.fs, "pipe_file", some)


@contextmanager
def raise_disk_full(folder: str | os.PathLike) -> Iterator[None]:
    """Raise DiskFullError where the system says that there is no room."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"{error.strerror} in {os.fspath(folder)}: make room, then the same command goes on"
        ) from error


def part_path(path: Path) -> Path:
    """Return a neighbour of `path`, unique to this call, to write to before it is whole."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")


@contextmanager
def atomic_path(path: str | os.PathLike, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary neighbour of `path` that takes its name when the block ends well.

    With `durable`, the bytes are on disk before the name is; on an error the neighbour
    is removed and `path` is as it was. For a store, it is a file on our own disk, and is
    sent when the block ends.
    """
    path = as_path(path)
    if not is_local(path):
        with tempfile.TemporaryDirectory(prefix="spxdask-") as folder:
            part = Path(folder, "part")
            yield part
            with translate_store_errors(path):
                path.fs.put_file(str(part), path.path)
        return
    part = part_path(path)
    try:
        yield part
        if durable:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def atomic_write(path: str, data) -> None:
    """Write a small file to disk as `atomic_path` does, not durable: quick, for thousands."""
    folder, name = os.path.split(path)
    part = f"{folder}/.{name}.{uuid.uuid4().hex[:12]}.part"
    try:
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            data = memoryview(data)
            while data:
                data = data[os.write(file, data) :]
        finally:
            os.close(file)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def direct_write(path: str | os.PathLike, data: memoryview) -> None:
    """Write a large block of page-aligned memory as `atomic_path` does, durable.

    Past the page cache where the system can: what is not read soon need not be there, and
    to fill it with fresh pages takes longer than a good disk.
    """
    path = as_path(path)
    if not is_local(path):
        with translate_store_errors(path):
            path.fs.pipe_file(path.path, bytes(data))
        return
    with atomic_path(path) as part:
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            written = _write_pages(file, data)
            while written < len(data):
                written += os.write(file, data[written:])
        finally:
            os.close(file)


def _write_pages(file: int, data: memoryview) -> int:
    """Write the whole pages of `data` past the page cache; return how much was written."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    pages = len(data) // mmap.PAGESIZE * mmap.PAGESIZE
    written = 0
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | getattr(os, "O_DIRECT", 0))
        while written < pages:
            written += os.write(file, data[written:pages])
    except OSError as error:
        # Not every file system can, nor go on from where a short write ended.
        if error.errno != errno.EINVAL:
            raise
    fcntl.fcntl(file, fcntl.F_SETFL, flags)
    return written


def remove_parts(folder: Path | UPath) -> None:
    """Remove what writers that were killed left in a folder; stores never show it."""
    if not is_local(folder):
        return
    for part in folder.glob(f".*.{'[0-9a-f]' * 12}.part"):
        part.unlink(missing_ok=True)


def file_stem(target_id: str) -> str:
    """Turn a target id into a file name without its suffix.

    An id that can be a file name is its own. One with a slash, a backslash, a control
    character, a surrogate, a percent sign, a leading dot or two dots in a row is
    percent-encoded, and one that is, or would become, longer than 200 bytes is cut and
    ends in the SHA-256 of the id after ``%~``, which no encoded name holds. An empty id
    becomes a bare ``%``. So two ids never share a name, and no name leaves its folder.
    """
    stem = target_id or "%"
    if _UNSAFE.search(target_id):
        stem = quote(target_id, safe=" +,=@:;()[]", errors="surrogatepass")
        if stem.startswith(".") or ".." in stem:
            stem = stem.replace(".", "%2E")
    encoded = stem.encode("utf-8")
    if len(encoded) <= MAX_NAME_BYTES:
        return stem
    digest = hashlib.sha256(target_id.encode("utf-8", "surrogatepass")).hexdigest()
    return encoded[:100].decode("utf-8", "ignore") + "%~" + digest
