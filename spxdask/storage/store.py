"""The contract of a store: a folder of files, on disk or in an object store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

Content = bytes | bytearray | memoryview


class Store(ABC):
    """A folder of files, on disk or in an object store.

    A file is named by its name in the folder; a folder below is a store again,
    ``store / "images"``. Each file is whole or not there: no reader ever sees a part of one,
    and a write that fails leaves what was there before. Making a store touches nothing; it is
    equal to others of the same folder, and can be pickled.

    A file that is not there raises FileNotFoundError, an object store that cannot be used
    StoreError, and a disk without room DiskFullError.

    Parameters
    ----------
    location : str
        The folder: an absolute path on disk, or a URL.
    """

    def __init__(self, location: str) -> None:
        self._location = location

    def __str__(self) -> str:
        return self._location

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._location!r})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and str(other) == self._location

    def __hash__(self) -> int:
        return hash(self._location)

    @property
    @abstractmethod
    def local_path(self) -> Path | None:
        """The folder where it is on a disk of this machine, None otherwise."""

    @abstractmethod
    def __truediv__(self, name: str) -> Store:
        """Return a folder below this one."""

    def path_to(self, name: str) -> str:
        """Return where a file is, as text: for messages, and for `locate_file` elsewhere.

        Parameters
        ----------
        name : str
            Name of the file.

        Returns
        -------
        str
            A path on disk, or a URL.
        """
        return f"{self._location.removesuffix('/')}/{name}"

    @abstractmethod
    def contains(self, path: str) -> bool:
        """Return whether a path is that of this folder, or lies below it.

        Parameters
        ----------
        path : str
            A path on disk, or a URL.

        Returns
        -------
        bool
            Links on disk are followed.
        """

    @abstractmethod
    def make(self) -> None:
        """Make the folder, and those above it, where folders have to be made."""

    @abstractmethod
    def list_sizes(self) -> dict[str, int]:
        """List the files of the folder.

        Returns
        -------
        dict of str to int
            Bytes by name; empty when there is no folder. Folders below are left out.
        """

    @abstractmethod
    def list_names(self) -> set[str]:
        """List the files of the folder by name alone, which on disk is quicker.

        Returns
        -------
        set of str
            Symbolic links are left out.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Return whether there is a file.

        Parameters
        ----------
        name : str
            Name of the file.

        Returns
        -------
        bool
        """

    @abstractmethod
    def get_version(self, name: str) -> str | None:
        """Return a text that changes whenever a file is replaced.

        Parameters
        ----------
        name : str
            Name of the file.

        Returns
        -------
        str or None
            None when there is no such file, or the store knows no versions.
        """

    @abstractmethod
    def get(self, name: str) -> bytes:
        """Read a file.

        Parameters
        ----------
        name : str
            Name of the file.

        Returns
        -------
        bytes
        """

    @abstractmethod
    def get_many(self, names: Iterable[str]) -> Iterator[bytearray]:
        """Read files; from an object store, many at once.

        Parameters
        ----------
        names : iterable of str
            Names of the files.

        Yields
        ------
        bytearray
            The content of each, in order.
        """

    @abstractmethod
    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read ranges of one file; from an object store, many at once.

        Parameters
        ----------
        name : str
            Name of the file.
        ranges : sequence of (int, int)
            First byte, and the byte after the last. Each must begin within the file; one that
            reaches past its end is cut short there.

        Returns
        -------
        list of bytes
            The content of each range, in order.
        """

    @abstractmethod
    def open_seekable(self, name: str) -> BinaryIO:
        """Open a file to read pieces of it.

        Parameters
        ----------
        name : str
            Name of the file.

        Returns
        -------
        binary file
            Closed by the caller.
        """

    @abstractmethod
    def find_starting_with(self, names: Iterable[str], content: bytes) -> set[str]:
        """Find those of some files that begin with certain bytes.

        Parameters
        ----------
        names : iterable of str
            Names of the files.
        content : bytes
            What they are to begin with.

        Returns
        -------
        set of str
            Names of those that do.
        """

    @abstractmethod
    def local_copy(self, name: str) -> Path:
        """Return a file on a disk of this machine, for what has to be mapped.

        A file on disk is returned itself. Of another, the processes of this machine share one
        copy in the folder for temporary files, which stays until another file is asked for
        and no process uses it any more.

        Parameters
        ----------
        name : str
            Name of a file that never changes under its name.

        Returns
        -------
        Path
            Not to be written to.
        """

    @abstractmethod
    def put(self, name: str, data: Content, *, durable: bool = True) -> None:
        """Write a file.

        Parameters
        ----------
        name : str
            Name of the file.
        data : bytes, bytearray or memoryview
            Its content.
        durable : bool
            Whether the file survives a crash of the system once this returns. Files in object
            stores always do.
        """

    @abstractmethod
    def put_many(self, files: Iterable[tuple[str, Content]]) -> None:
        """Write small files; to an object store, many at once.

        On disk they are not durable, which is quick for thousands of files.

        Parameters
        ----------
        files : iterable of (str, bytes)
            Name and content of each.
        """

    @abstractmethod
    def put_if_absent(self, name: str, data: Content) -> bool:
        """Write a file unless there is one of its name.

        Parameters
        ----------
        name : str
            Name of the file.
        data : bytes, bytearray or memoryview
            Its content.

        Returns
        -------
        bool
            Whether it was written. This can be wrong for an object store: a repeated request
            fails if the first one succeeded but its response was lost, and a store without
            conditional writes always writes. Only the content of the file is certain.
        """

    @abstractmethod
    def direct_write(self, name: str, data: memoryview) -> None:
        """Write a large block of page-aligned memory, durable.

        On disk, it goes past the page cache where the system allows it: what is not read again
        soon need not be there, and filling fresh pages takes longer than a good disk does.

        Parameters
        ----------
        name : str
            Name of the file.
        data : memoryview
            Its content, beginning at a page of memory.
        """

    @abstractmethod
    def atomic_path(self, name: str, *, durable: bool = True) -> AbstractContextManager[Path]:
        """Yield a temporary file on disk that becomes a file of the store when the block ends.

        Parameters
        ----------
        name : str
            Name of the file.
        durable : bool
            As for `put`.

        Returns
        -------
        context manager of Path
            A path where the block is to write. When the block raises, the store stays as it
            was.
        """

    @abstractmethod
    def rename(self, name: str, new_name: str) -> None:
        """Give a file another name in the folder.

        Parameters
        ----------
        name, new_name : str
            A file of the new name is replaced.
        """

    @abstractmethod
    def delete_many(self, names: Iterable[str]) -> None:
        """Delete files of the folder.

        Parameters
        ----------
        names : iterable of str
            Names of the files, which must be there on disk.
        """

    @abstractmethod
    def delete_partial_files(self) -> None:
        """Delete the partial files of killed writers; only to be called while none writes."""

    @abstractmethod
    def require_writable(self) -> None:
        """Raise the error that writing a file to the folder would meet.

        Raises
        ------
        OSError
            If the folder is not there, or cannot be written to. Object stores are not asked.
        """

    @abstractmethod
    def find_refused_characters(self, characters: str) -> str:
        """Find characters that names of files in the folder cannot have.

        Parameters
        ----------
        characters : str
            What to try, each once.

        Returns
        -------
        str
            Those that are refused, in order. Files can be written to the folder as such.
        """

    @abstractmethod
    def free_bytes(self) -> float:
        """Return how many bytes there is room for.

        Returns
        -------
        float
            Infinite for an object store.
        """
