"""Files that appear whole or not at all, and names that cannot leave their folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from spxdask.errors import DiskFullError

# A directory entry holds 255 bytes on common file systems, the suffix included.
MAX_NAME_BYTES = 200
_UNSAFE = re.compile(r"[/\\%\x00-\x1f\x7f-\x9f\ud800-\udfff]|^\.|\.\.")


@contextmanager
def told_when_full(folder: str | os.PathLike) -> Iterator[None]:
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
def whole_file(path: str | os.PathLike, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary neighbour of `path` that takes its name when the block ends well.

    With `durable`, the bytes are on disk before the name is; on an error the neighbour
    is removed and `path` is as it was.
    """
    path = Path(path)
    part = part_path(path)
    try:
        yield part
        if durable:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str, data) -> None:
    """Write a small file as `whole_file` does, not durable: the quick form for thousands."""
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


def write_large(path: str | os.PathLike, data: memoryview) -> None:
    """Write a large block of page-aligned memory as `whole_file` does, durable.

    Past the page cache where the system can: what is not read soon need not be there, and
    to fill it with fresh pages takes longer than a good disk.
    """
    with whole_file(path) as part:
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


def remove_parts(folder: Path) -> None:
    """Remove what writers that were killed left in a folder."""
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
