"""Transfers from a mirror of the archive on a disk of this machine."""

from __future__ import annotations

import asyncio
import os

from spxdask.archive.received import FileVersion, ReceivedFile
from spxdask.errors import FrameError
from spxdask.storage import local_path


async def receive_from_mirror(url: str, received: ReceivedFile, stall_timeout_s: float) -> None:
    """Receive a file from its beginning.

    Parameters
    ----------
    url : str
        Where the file is: ``file:///...``.
    received : ReceivedFile
        Takes the file.
    stall_timeout_s : float
        Not used, as reads of a disk cannot be interrupted.

    Raises
    ------
    ArchiveError, FrameError, OSError
        If the file is not received; see `spxdask.archive.transfer.classify_failure`.
    """
    await asyncio.to_thread(_read, url, received)


def _read(url: str, received: ReceivedFile) -> None:
    """Read a whole file into memory."""
    received.discard()
    path = local_path(url)
    assert path is not None, "file: URLs are paths on disk"
    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        size, received.version = status.st_size, received.version.of_file(status)
        received.check_size(size)
        while received.size < size:
            count = file.readinto(received.memory[received.size : size])
            if not count:
                raise FrameError(f"the file ended after {received.size} of {size} bytes")
            received.size += count


async def ask_mirror_version(url: str, stall_timeout_s: float) -> FileVersion:
    """Return the version of a file, from the time of its last change.

    Parameters
    ----------
    url : str
        Where the file is: ``file:///...``.
    stall_timeout_s : float
        Not used.

    Returns
    -------
    FileVersion

    Raises
    ------
    OSError
        If there is no such file.
    """
    path = local_path(url)
    assert path is not None, "file: URLs are paths on disk"
    return FileVersion.of_file(await asyncio.to_thread(os.stat, path))
