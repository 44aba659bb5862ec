"""What has been received of a file."""

from __future__ import annotations

from dataclasses import dataclass

from spxdask.errors import ArchiveError, FrameError


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
    """

    memory: memoryview
    expected_size: int | None = None
    size: int = 0
    etag: str | None = None
    attempts: int = 0

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
