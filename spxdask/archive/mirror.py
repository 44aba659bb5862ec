"""Transfers from a mirror of the archive on a disk of this machine."""

from __future__ import annotations

import asyncio
import os

from spxdask.archive.received import Answer, FileVersion, Reception
from spxdask.errors import FileChangedError, FrameError
from spxdask.storage import local_path


async def receive_from_mirror(url: str, received: Reception, stall_timeout_s: float) -> None:
    """Receive a file from its beginning, or a range of it.

    Parameters
    ----------
    url : str
        Where the file is: ``file:///...``.
    received : Reception
        Names the bytes, and takes them.
    stall_timeout_s : float
        Not used, as reads of a disk cannot be interrupted.

    Raises
    ------
    ArchiveError, FrameError, OSError
        If the file is not received; see `spxdask.archive.transfer.classify_failure`.
    """
    await asyncio.to_thread(_read, url, received)


def _read(url: str, received: Reception) -> None:
    """Read a whole file, or a range of it, into memory."""
    path = local_path(url)
    assert path is not None, "file: URLs are paths on disk"
    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        size, version = status.st_size, FileVersion.of_file(status)
        if received.span is None:
            start, stop = 0, size
            taking = received.begin(Answer(version=version, total=size))
        else:
            start, stop = received.span[0], min(received.span[1] or size, size)
            if start >= stop:
                raise FrameError(f"the file has {size} bytes, none at {start}")
            taking = received.begin(Answer(version=version, span=(start, stop), total=size))
        try:
            file.seek(start)
            while start < stop:
                count = file.readinto(taking.room[: stop - start])
                if not count:
                    raise FrameError(f"the file ended after {start} of {size} bytes")
                taking.advance(count)
                start += count
        finally:
            taking.end()
        if FileVersion.of_file(os.fstat(file.fileno())) != version:
            raise FileChangedError("the file changed during the transfer")


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
