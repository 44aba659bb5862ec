"""Transfers from a mirror of the archive on a disk of this machine."""

from __future__ import annotations

import asyncio
import os

from spxdask.archive.received import ReceivedFile
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
        size = os.fstat(file.fileno()).st_size
        received.check_size(size)
        while received.size < size:
            count = file.readinto(received.memory[received.size : size])
            if not count:
                raise FrameError(f"the file ended after {received.size} of {size} bytes")
            received.size += count
