"""Copies on disk of files in object stores, shared by the processes of a machine."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from spxdask.storage.local import LocalStore, describe_temporary_folder, raise_disk_full

# Files that this process has open, so that others do not delete them while it runs.
_files_in_use: list[int] = []


def share_copy(name: str, fetch: Callable[[Path], None]) -> Path:
    """Return a copy of a file, and fetch it if no process of this machine has done so.

    Parameters
    ----------
    name : str
        Name of a file that never changes under its name.
    fetch : callable
        Writes the file to a path.

    Returns
    -------
    Path
        Below the folder for temporary files. It stays until another copy is asked for and no
        process uses it any more.
    """
    with raise_disk_full(describe_temporary_folder()):
        return _share_copy(name, fetch)


def _share_copy(name: str, fetch: Callable[[Path], None]) -> Path:
    """Do what `share_copy` says; a full disk raises OSError."""
    folder = Path(tempfile.gettempdir(), f"spxdask-{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        # Another user could replace the copy.
        folder = Path(tempfile.mkdtemp(prefix="spxdask-"))
    copy = folder / name
    with open(folder / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for other in folder.glob("[!.]*"):
            if other != copy:
                _delete_unused(other)
        if not copy.exists():
            with LocalStore(folder).atomic_path(name) as part:
                fetch(part)
        file = os.open(copy, os.O_RDONLY)
        fcntl.flock(file, fcntl.LOCK_SH)
    _files_in_use.append(file)
    return copy


def _delete_unused(path: Path) -> None:
    """Delete a copy unless a process uses it."""
    with suppress(BlockingIOError, FileNotFoundError), open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
