"""What has been received of a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from spxdask.errors import ArchiveError, FrameError


@dataclass(frozen=True, slots=True)
class FileVersion:
    """By what an archive tells one content of a file from another.

    Attributes
    ----------
    etag : str or None
        The ETag, weak or strong, None if there is none.
    modified : str or None
        The time of the last change, as the archive writes it.
    """

    etag: str | None = None
    modified: str | None = None

    @classmethod
    def of_headers(cls, headers: Mapping[str, str]) -> FileVersion:
        """Return the version that the headers of an HTTP response state.

        Parameters
        ----------
        headers : mapping of str to str
            The headers; their names in any case.

        Returns
        -------
        FileVersion
        """
        return cls(headers.get("ETag"), headers.get("Last-Modified"))

    @classmethod
    def of_object(cls, response: Mapping[str, Any]) -> FileVersion:
        """Return the version that a response of S3 states.

        Parameters
        ----------
        response : mapping of str to object
            To a GetObject or HeadObject request, as botocore has it.

        Returns
        -------
        FileVersion
        """
        modified = response.get("LastModified")
        return cls(response.get("ETag"), modified.isoformat() if modified is not None else None)

    @classmethod
    def of_file(cls, status: os.stat_result) -> FileVersion:
        """Return the version of a file on disk, which another replaces at another time.

        Parameters
        ----------
        status : os.stat_result
            Of the file.

        Returns
        -------
        FileVersion
        """
        return cls(modified=str(status.st_mtime_ns))

    @property
    def modified_at(self) -> datetime | None:
        """The time of the last change, None where none is stated that can be read.

        Returns
        -------
        datetime or None
            In UTC.
        """
        text = self.modified or ""
        # Nanoseconds of a disk, the form of HTTP, ISO 8601.
        for read in (_read_nanoseconds, parsedate_to_datetime, datetime.fromisoformat):
            with suppress(ValueError, OverflowError, OSError):
                when = read(text)
                return when if when.tzinfo else when.replace(tzinfo=UTC)
        return None

    def differs(self, other: FileVersion) -> bool | None:
        """Return whether another version is of another content.

        Parameters
        ----------
        other : FileVersion
            As the same archive stated it at another time.

        Returns
        -------
        bool or None
            None where the two have nothing in common that could be compared.
        """
        if self.etag and other.etag:
            return self.etag.removeprefix("W/") != other.etag.removeprefix("W/")
        if self.modified and other.modified:
            return self.modified != other.modified
        return None


def _read_nanoseconds(text: str) -> datetime:
    return datetime.fromtimestamp(int(text) / 1e9, UTC)


@dataclass
class ReceivedFile:
    """The beginning of a file, in memory leased for the whole of it.

    Attributes
    ----------
    memory : memoryview
        Room for the longest file that is acceptable.
    expected_size : int or None
        Length of the whole file in bytes, None if it is not known.
    size : int
        Number of bytes received so far.
    etag : str or None
        Strong ETag of the version of the file that they belong to, None if the server
        gave none. Without it a transfer cannot be resumed.
    attempts : int
        Number of requests made.
    version : FileVersion
        What the server said of the file in the last response.
    """

    memory: memoryview
    expected_size: int | None = None
    size: int = 0
    etag: str | None = None
    attempts: int = 0
    version: FileVersion = FileVersion()

    @property
    def content(self) -> memoryview:
        """The bytes received so far.

        Returns
        -------
        memoryview
            A view of the memory, of `size` bytes.
        """
        return self.memory[: self.size]

    @property
    def can_resume(self) -> bool:
        """Whether a server can be asked for the rest of the same version.

        Returns
        -------
        bool
            True if there are bytes, and it is known which version they belong to.
        """
        return bool(self.size and self.etag)

    def append(self, chunk: bytes) -> None:
        """Add the next bytes of the file.

        Parameters
        ----------
        chunk : bytes
            The bytes that follow those received so far.

        Raises
        ------
        FrameError
            If the file becomes longer than the memory.
        """
        size = self.size + len(chunk)
        if size > len(self.memory):
            raise FrameError(f"received more than {len(self.memory)} bytes")
        self.memory[self.size : size] = chunk
        self.size = size

    def discard(self) -> None:
        """Drop the bytes received so far, so that the next transfer starts over."""
        self.size = 0

    def check_size(self, size: int) -> None:
        """Raise an error unless the whole file may have a certain length.

        Parameters
        ----------
        size : int
            Length in bytes, as a server announces it or as it was received.

        Raises
        ------
        FrameError
            If it is not the length that the archive states, which may pass.
        ArchiveError
            If the file is too long to be a frame.
        """
        if self.expected_size not in (None, size):
            raise FrameError(f"the file has {size} bytes, the archive lists {self.expected_size}")
        if size > len(self.memory):
            raise ArchiveError(f"{size} bytes is too long for a frame")
