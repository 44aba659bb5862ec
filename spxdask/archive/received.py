"""What has been received of a file."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from spxdask.archive.link import Timing
from spxdask.errors import ArchiveError, FrameError

WRONG_RANGE = "the server sent a range that was not requested"


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

    @property
    def strong_etag(self) -> str | None:
        """The ETag if it promises that the bytes are the same, which a weak one does not.

        Returns
        -------
        str or None
        """
        return None if (self.etag or "W/").startswith("W/") else self.etag

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a server says of the bytes that it is about to send.

    Attributes
    ----------
    version : FileVersion
        Of the file.
    span : (int, int) or None
        The first of the bytes and the one after the last, None if they are the whole file.
    total : int or None
        Length of the whole file in bytes, None if it is not said.
    is_encoded : bool
        Whether the bytes are encoded on the way. A range of them is one of encoded bytes.
    """

    version: FileVersion
    span: tuple[int, int] | None = None
    total: int | None = None
    is_encoded: bool = False


class Reception(ABC):
    """What takes the bytes of one answer, and knows which to ask for.

    Attributes
    ----------
    timing : Timing or None
        Measures the request.
    n_requests, n_bytes : int
        Number of requests, and of bytes that they brought, those that were dropped included.
    """

    timing: Timing | None = None
    n_requests: int = 0
    n_bytes: int = 0

    @property
    @abstractmethod
    def span(self) -> tuple[int, int | None] | None:
        """The bytes to ask for: the first, and the one after the last, None to the end.

        Returns
        -------
        (int, int or None) or None
            None for the whole file.
        """

    @property
    @abstractmethod
    def condition(self) -> FileVersion:
        """The version that they have to be of, empty if any will do.

        Returns
        -------
        FileVersion
        """

    @property
    @abstractmethod
    def room(self) -> memoryview:
        """Where the next bytes are put, before `advance` is called.

        Returns
        -------
        memoryview
            A view of all the memory that they may fill.
        """

    def begin(self, answer: Answer) -> Reception:
        """Take note of what the server says before the first byte.

        Parameters
        ----------
        answer : Answer
            What it says.

        Returns
        -------
        Reception
            Takes the bytes; another than this one if they are not what was asked for, but of use.

        Raises
        ------
        ArchiveError, FrameError
            If the bytes are not those that were asked for.
        """
        if self.timing is not None:
            self.timing.note_answer()
        return self._accept(answer)

    @abstractmethod
    def _accept(self, answer: Answer) -> Reception:
        """Check an answer, and return what takes its bytes."""

    def append(self, chunk: bytes) -> None:
        """Add the next bytes of the answer.

        Parameters
        ----------
        chunk : bytes
            The bytes that follow those received so far.

        Raises
        ------
        FrameError
            If there are more than there may be.
        """
        room = self.room
        if len(chunk) > len(room):
            raise FrameError(self._complain_of_length())
        room[: len(chunk)] = chunk
        self.advance(len(chunk))

    @abstractmethod
    def _complain_of_length(self) -> str:
        """Return what is wrong when there are too many bytes."""

    def advance(self, count: int) -> None:
        """Count bytes that were put into `room`.

        Parameters
        ----------
        count : int
            How many.
        """
        if self.timing is not None:
            self.timing.note_bytes(count)
        self.n_bytes += count
        self._move(count)

    @abstractmethod
    def _move(self, count: int) -> None:
        """Let `room` begin so many bytes later."""

    def end(self) -> None:
        """Take note that no more bytes will come of this answer, be it whole or not."""
        if self.timing is not None:
            self.timing.finish()


@dataclass
class ReceivedFile(Reception):
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
        Number of transfers that were begun.
    version : FileVersion
        What the server said of the file in the last response.
    is_complete : bool
        Whether a transfer has come to its end.
    n_requests, n_bytes : int
        As of `Reception`.
    """

    memory: memoryview
    expected_size: int | None = None
    size: int = 0
    etag: str | None = None
    attempts: int = 0
    version: FileVersion = FileVersion()
    is_complete: bool = False
    n_requests: int = 0
    n_bytes: int = 0
    _started_at: int = field(default=0, repr=False)

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

    @property
    def span(self) -> tuple[int, int | None] | None:
        """See `Reception.span`."""
        return (self.size, None) if self.can_resume else None

    @property
    def condition(self) -> FileVersion:
        """See `Reception.condition`."""
        return FileVersion(etag=self.etag)

    @property
    def room(self) -> memoryview:
        """See `Reception.room`."""
        return self.memory[self.size :]

    def _accept(self, answer: Answer) -> Reception:
        self.version = answer.version
        if answer.span is None:
            self.discard()
            if answer.total is not None:
                self.check_size(answer.total)
        else:
            start, stop = answer.span
            is_of_version = self.can_resume and answer.version.etag == self.etag
            if not is_of_version or answer.is_encoded or start != self.size:
                raise FrameError(WRONG_RANGE)
            self.check_size(stop)
            if answer.total not in (None, stop):
                raise FrameError(WRONG_RANGE)
        # A range of encoded bytes could not be appended to decoded ones.
        self.etag = None if answer.is_encoded else answer.version.strong_etag
        self._started_at = self.size
        return self

    def _complain_of_length(self) -> str:
        return f"received more than {len(self.memory)} bytes"

    def _move(self, count: int) -> None:
        self.size += count

    def end(self) -> None:
        """See `Reception.end`."""
        super().end()
        # A server that sends nothing of the range might do so for ever.
        if self.size == self._started_at:
            self.discard()

    def discard(self) -> None:
        """Drop the bytes received so far, so that the next transfer starts over."""
        self.size = 0
        self.is_complete = False

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
        check_size(size, self.expected_size, self.memory)


def check_size(size: int, expected_size: int | None, memory: memoryview) -> None:
    """Raise an error unless a whole file may have a certain length.

    Parameters
    ----------
    size : int
        Length in bytes, as a server announces it or as it was received.
    expected_size : int or None
        Length that the archive lists, None if it is not known.
    memory : memoryview
        Room for the longest file that is acceptable.

    Raises
    ------
    FrameError
        If it is not the length that the archive states, which may pass.
    ArchiveError
        If the file is too long to be a frame.
    """
    if expected_size not in (None, size):
        raise FrameError(f"the file has {size} bytes, the archive lists {expected_size}")
    if size > len(memory):
        raise ArchiveError(f"{size} bytes is too long for a frame")


def read_content_range(value: str | None) -> tuple[tuple[int, int], int | None]:
    """Return what a Content-Range header says.

    Parameters
    ----------
    value : str or None
        The header, None if there is none.

    Returns
    -------
    span : (int, int)
        The first byte of the range, and the one after the last.
    total : int or None
        Length of the whole file in bytes, None if it is not said.

    Raises
    ------
    FrameError
        If there is no header, or it names no range of one file.
    """
    # More digits than any file needs would be slow to read.
    pattern = r"\s*bytes\s+(\d{1,18})-(\d{1,18})/(\d{1,18}|\*)\s*"
    match = re.fullmatch(pattern, value or "", re.ASCII | re.IGNORECASE)
    if match is None:
        raise FrameError(WRONG_RANGE)
    start, stop = int(match[1]), int(match[2]) + 1
    total = None if match[3] == "*" else int(match[3])
    if start >= stop or (total is not None and stop > total):
        raise FrameError(WRONG_RANGE)
    return (start, stop), total
