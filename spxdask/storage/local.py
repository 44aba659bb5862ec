"""A store on disk."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from spxdask.errors import DiskFullError
from spxdask.storage.store import Content, Store

# Characters that are tried at once; each has up to four bytes, of the 255 that a name has.
CHARACTERS_PER_NAME = 40


class LocalStore(Store):
    """A folder on disk.

    Parameters
    ----------
    path : path
        The folder. It is made absolute, as workers may have another working folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(_decode_path(os.fspath(Path(_encode_path(os.fspath(path))).absolute())))

    @property
    def _folder(self) -> str:
        """The folder as this system has to be given it."""
        return _encode_path(self._location)

    @property
    def local_path(self) -> Path:
        """The folder."""
        return Path(self._folder)

    def __truediv__(self, name: str) -> LocalStore:
        return LocalStore(self.path_to(name))

    def _path(self, name: str) -> str:
        """Return the path of a file as this system has to be given it."""
        return f"{self._folder}/{encode_name(name)}"

    def contains(self, path: str) -> bool:
        """See `Store.contains`."""
        if "://" in path:
            return False
        # Not Path.resolve, which raises where a link leads to itself.
        folder, resolved = (
            Path(os.path.realpath(name)) for name in (self._folder, _encode_path(path))
        )
        return folder == resolved or folder in resolved.parents

    def make(self) -> None:
        """See `Store.make`."""
        with raise_disk_full(self._location):
            os.makedirs(self._folder, exist_ok=True)

    def list_sizes(self) -> dict[str, int]:
        """See `Store.list_sizes`."""
        sizes: dict[str, int] = {}
        with suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            for entry in entries:
                # A file that is renamed just now must not hide the others.
                with suppress(FileNotFoundError):
                    if entry.is_file():
                        sizes[_decode_name(entry.name)] = entry.stat().st_size
        return sizes

    def list_names(self) -> set[str]:
        """See `Store.list_names`."""
        try:
            with os.scandir(self._folder) as entries:
                files = (entry for entry in entries if entry.is_file(follow_symlinks=False))
                return {_decode_name(entry.name) for entry in files}
        except FileNotFoundError:
            return set()

    def exists(self, name: str) -> bool:
        """See `Store.exists`."""
        return os.path.isfile(self._path(name))

    def get_version(self, name: str) -> str | None:
        """See `Store.get_version`."""
        try:
            status = os.stat(self._path(name))
        except FileNotFoundError:
            return None
        return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"

    def get(self, name: str) -> bytes:
        """See `Store.get`."""
        with open(self._path(name), "rb") as file:
            return file.read()

    def get_many(self, names: Iterable[str]) -> Iterator[bytearray]:
        """See `Store.get_many`."""
        return (bytearray(self.get(name)) for name in names)

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See `Store.get_ranges`."""
        with open(self._path(name), "rb") as file:
            return [_read_range(file, start, stop) for start, stop in ranges]

    def open_seekable(self, name: str) -> BinaryIO:
        """See `Store.open_seekable`."""
        return open(self._path(name), "rb")

    def find_starting_with(self, names: Iterable[str], content: bytes) -> set[str]:
        """See `Store.find_starting_with`."""
        found = set()
        for name in names:
            with open(self._path(name), "rb") as file:
                if file.read(len(content)) == content:
                    found.add(name)
        return found

    def local_copy(self, name: str) -> Path:
        """See `Store.local_copy`."""
        return Path(self._path(name))

    def put(self, name: str, data: Content, *, durable: bool = True) -> None:
        """See `Store.put`."""
        write = _write_durable if durable else _write_small
        with raise_disk_full(self._location):
            write(self._path(name), data)

    def put_many(self, files: Iterable[tuple[str, Content]]) -> None:
        """See `Store.put_many`."""
        with raise_disk_full(self._location):
            for name, data in files:
                _write_small(self._path(name), data)

    def put_if_absent(self, name: str, data: Content) -> bool:
        """See `Store.put_if_absent`."""
        path = Path(self._path(name))
        part = part_path(path)
        with raise_disk_full(self._location):
            try:
                part.write_bytes(data)
                _flush_to_disk(part)
                # Unlike `rename`, this fails where there is one.
                os.link(part, path)
            except FileExistsError:
                return False
            finally:
                part.unlink(missing_ok=True)
        return True

    def direct_write(self, name: str, data: memoryview) -> None:
        """See `Store.direct_write`."""
        with raise_disk_full(self._location):
            _write_direct(self._path(name), data)

    @contextmanager
    def atomic_path(self, name: str, *, durable: bool = True) -> Iterator[Path]:
        """See `Store.atomic_path`."""
        with (
            raise_disk_full(self._location),
            _atomic_path(Path(self._path(name)), durable=durable) as part,
        ):
            yield part

    def rename(self, name: str, new_name: str) -> None:
        """See `Store.rename`."""
        os.replace(self._path(name), self._path(new_name))

    def delete_many(self, names: Iterable[str]) -> None:
        """See `Store.delete_many`."""
        for name in names:
            os.unlink(self._path(name))

    def delete_partial_files(self) -> None:
        """See `Store.delete_partial_files`."""
        for part in self.local_path.glob(f".*.{'[0-9a-f]' * 12}.part"):
            part.unlink(missing_ok=True)

    def free_bytes(self) -> float:
        """See `Store.free_bytes`."""
        return shutil.disk_usage(self._folder).free

    def require_writable(self) -> None:
        """See `Store.require_writable`."""
        self._try_name("writable")

    def find_refused_characters(self, characters: str) -> str:
        """See `Store.find_refused_characters`."""
        refused = ""
        for first in range(0, len(characters), CHARACTERS_PER_NAME):
            group = characters[first : first + CHARACTERS_PER_NAME]
            if not self._accepts(group):
                refused += "".join(c for c in group if not self._accepts(c))
        return refused

    def _accepts(self, text: str) -> bool:
        try:
            self._try_name(text)
        except OSError:
            return False
        return True

    def _try_name(self, text: str) -> None:
        """Create a partial file whose name holds a text, and delete it."""
        part = os.fspath(part_path(Path(self._path(text))))
        with raise_disk_full(self._location):
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            os.unlink(part)


def encode_name(name: str) -> str:
    """Return a file's name as this system has to be given it.

    Parameters
    ----------
    name : str
        Any text; surrogates stand for bytes that are not UTF-8.

    Returns
    -------
    str
        The name of the file is UTF-8 on disk, whatever encoding Python takes the locale's
        names to have: without this, ids could not be written under some locales, and
        machines of a cluster that have different ones would not find each other's files.
    """
    if sys.getfilesystemencoding() == "utf-8":
        return name
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def _decode_name(name: str) -> str:
    """Return the name of a file that the system has listed; the inverse of `encode_name`."""
    if sys.getfilesystemencoding() == "utf-8":
        return name
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def _encode_path(path: str) -> str:
    """Return a path of the user's, as UTF-8 if the locale has no bytes for it."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return encode_name(path)
    return path


def _decode_path(path: str) -> str:
    """Return a path as text that can be sent, without surrogates if its bytes are UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        with suppress(UnicodeDecodeError):
            return os.fsencode(path).decode()
    return path


@contextmanager
def raise_disk_full(folder: object) -> Iterator[None]:
    """Raise DiskFullError when the system reports a full disk or quota.

    Parameters
    ----------
    folder : object
        The folder that is written to, or its text.

    Raises
    ------
    DiskFullError
        With the message of the system and the folder.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"{error.strerror} in {folder}: make room, then the same command resumes the run"
        ) from error


def describe_temporary_folder() -> str:
    """Name the folder for temporary files, for an error that it is full.

    Returns
    -------
    str
        With the way to choose another.
    """
    return f"{tempfile.gettempdir()} (temporary files; TMPDIR names another folder)"


def part_path(path: Path) -> Path:
    """Return a neighbour of a file, unique to this call, to write to before it is whole.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    Path
        A hidden file of the same folder, which `LocalStore.delete_partial_files` knows.
    """
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")


@contextmanager
def _atomic_path(path: Path, *, durable: bool) -> Iterator[Path]:
    """Yield a neighbour of a file that replaces it when the block ends without an error."""
    part = part_path(path)
    try:
        yield part
        if durable:
            _flush_to_disk(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    """Return when the content of a file is on disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write_durable(path: str, data: Content) -> None:
    """Write a file that survives a crash of the system."""
    with _atomic_path(Path(path), durable=True) as part:
        part.write_bytes(data)


def _write_small(path: str, data: Content) -> None:
    """Write a small file that need not survive a crash of the system, quick for thousands."""
    folder, name = os.path.split(path)
    part = f"{folder}/.{name}.{uuid.uuid4().hex[:12]}.part"
    try:
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(file, left) :]
        finally:
            os.close(file)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _write_direct(path: str, data: memoryview) -> None:
    """Write a large file past the page cache, as far as the system allows it."""
    with _atomic_path(Path(path), durable=True) as part:
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
        # Some file systems do not support it, or cannot continue after a short write.
        if error.errno != errno.EINVAL:
            raise
    fcntl.fcntl(file, fcntl.F_SETFL, flags)
    return written


def _read_range(file: BinaryIO, start: int, stop: int) -> bytes:
    """Return the bytes from `start` to before `stop`."""
    file.seek(start)
    return file.read(stop - start)
