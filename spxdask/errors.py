"""The errors spxdask raises, by who can act on them.

The text of each is one sentence for a person: what is wrong, where, and what to do. The
values behind it are attributes, so that programs need not take the sentence apart. All
of them survive the way between processes.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "ArchiveError",
    "CatalogueError",
    "ClusterError",
    "ConfigError",
    "DiskFullError",
    "FileChangedError",
    "FrameError",
    "InputError",
    "MissingBytesError",
    "MissingExtraError",
    "MissingRowsError",
    "NoSuchSourceError",
    "RangesRefusedError",
    "RunFolderError",
    "SpxdaskError",
    "StoreError",
    "TruncatedAnswerError",
    "UnreachableError",
]

Location = str | os.PathLike[str] | None


# Limit for a value within a sentence, characters; the attribute `value` has the whole value.
MAX_VALUE_CHARACTERS = 100


def _shorten(value: Any) -> str:
    """Return a value as Python writes it, without its middle if it is long."""
    kind = f"a value of type {type(value).__name__}"
    try:
        text = repr(value)
    except Exception:  # Such as an integer of more digits than Python converts.
        return kind
    if "\n" in text:
        # Tables write their rows.
        return kind
    if len(text) <= MAX_VALUE_CHARACTERS:
        return text
    return f"{text[: MAX_VALUE_CHARACTERS * 2 // 3]}...{text[-MAX_VALUE_CHARACTERS // 3 + 3 :]}"


class SpxdaskError(Exception):
    """Base of every error that spxdask raises on purpose.

    Parameters
    ----------
    reason : str
        What is wrong, in words.
    path : path, optional
        The file, folder or URL that it is wrong with. The text begins with it.

    Attributes
    ----------
    reason : str
    path : str or None
    """

    def __init__(self, reason: str = "", *, path: Location = None) -> None:
        # There is one positional argument only, because pickle creates the error from `args`
        # and then sets the attributes.
        super().__init__(reason)
        self.reason = reason
        self.path = None if path is None else os.fspath(path)

    def __str__(self) -> str:
        return self.reason if self.path is None else f"{self.path}: {self.reason}"


class InputError(SpxdaskError):
    """An input of the user cannot be used; the command line exits with 2."""


class ConfigError(InputError, ValueError):
    """An option has a value that is not allowed.

    Parameters
    ----------
    reason : str
        What is wrong, where no single value is.
    option : str, optional
        Name of the option; dots lead into groups, as in ``photometry.window_size``.
    value : object, optional
        What it was given.
    rule : str, optional
        What it must be, such as ``"> 0 and <= 90"``.
    path : path, optional
        The file that it came from.

    Attributes
    ----------
    option, value, rule, path
        As given.
    """

    def __init__(
        self,
        reason: str = "",
        *,
        option: str | None = None,
        value: Any = None,
        rule: str | None = None,
        path: Location = None,
    ) -> None:
        if not reason:
            reason = f"{option} must be {rule}, got {_shorten(value)}"
        super().__init__(reason, path=path)
        self.option = option
        self.value = value
        self.rule = rule

    def __reduce__(self) -> tuple[Any, ...]:
        # The error must arrive even if its value cannot be pickled.
        try:
            pickle.dumps(self.value)
            value = self.value
        except Exception:  # Whatever the value's own code raises.
            value = _shorten(self.value)
        return type(self), self.args, self.__dict__ | {"value": value}


class CatalogueError(InputError, ValueError):
    """The catalogue file cannot be used.

    Parameters
    ----------
    reason : str
        What is wrong.
    path : path, optional
        The file.
    rows : tuple of int
        Data rows concerned, 1 for the first below the header.

    Attributes
    ----------
    path, rows
        As given.
    """

    def __init__(
        self, reason: str = "", *, path: Location = None, rows: tuple[int, ...] = ()
    ) -> None:
        super().__init__(reason, path=path)
        self.rows = rows


class RunFolderError(InputError):
    """The output folder lacks what a stage needs, or belongs to something else."""


class MissingExtraError(InputError, ImportError):
    """A library is not installed that only one thing needs.

    Parameters
    ----------
    reason : str
        What needs which library.
    library : str
        The library.
    extra : str
        The extra of spxdask that brings it.
    path : path, optional
        A file that it concerns.

    Attributes
    ----------
    library, extra
        As given.
    """

    def __init__(
        self, reason: str = "", *, library: str = "", extra: str = "", path: Location = None
    ) -> None:
        super().__init__(reason, path=path)
        self.library = library
        self.extra = extra


class NoSuchSourceError(InputError, KeyError):
    """A run has no light curve of the source that is asked for.

    Parameters
    ----------
    reason : str
        What is wrong.
    source : str
        The id that was asked for, or that of the source nearest to a position.
    path : path, optional
        The output folder.

    Attributes
    ----------
    source, path
        As given.
    """

    def __init__(self, reason: str = "", *, source: str = "", path: Location = None) -> None:
        super().__init__(reason, path=path)
        self.source = source


class ArchiveError(SpxdaskError):
    """The archive did not answer a request as expected, after all retries.

    Parameters
    ----------
    reason : str
        What is wrong.
    path : str, optional
        The URL, without a user's name and password.
    attempts : int, optional
        How often it was tried.
    blame : {"frame", "archive", "access"}
        What the reason lies in: the file or query itself, so that others may succeed; the
        archive, which may answer later; or the way to it, such as a certificate that is not
        trusted, which stays as it is until somebody changes it.

    Attributes
    ----------
    path, attempts, blame
        As given.
    """

    def __init__(
        self,
        reason: str = "",
        *,
        path: Location = None,
        attempts: int | None = None,
        blame: Literal["frame", "archive", "access"] = "frame",
    ) -> None:
        super().__init__(reason, path=path)
        self.attempts = attempts
        self.blame = blame

    def __str__(self) -> str:
        if self.attempts is None:
            return super().__str__()
        return f"{super().__str__()} (after {self.attempts} attempt{'s' * (self.attempts != 1)})"


class UnreachableError(ArchiveError):
    """There was no connection to the archive."""


class TruncatedAnswerError(ArchiveError):
    """The archive answered a query only in part."""


class ClusterError(SpxdaskError):
    """The Dask cluster is gone, or cannot run the tasks of spxdask."""


class DiskFullError(SpxdaskError):
    """A disk or quota has no room left for the files of a run."""


class StoreError(SpxdaskError):
    """An object store cannot be read or written."""


class FrameError(SpxdaskError):
    """A file is not a readable SPHEREx Level 2 frame."""


class FileChangedError(FrameError):
    """The archive has replaced a file while it was transferred, so that it is to be read anew."""


class RangesRefusedError(SpxdaskError):
    """A server does not serve parts of files as it should, so that they are to be fetched whole."""


class MissingBytesError(FrameError):
    """Bytes of a frame are needed that are not held, of one that is read in parts.

    Parameters
    ----------
    reason : str
        What is wrong.
    path : path, optional
        The file.
    spans : iterable of (int, int), optional
        First byte of each part that is missing, and the one after its last.

    Attributes
    ----------
    path, spans
        As given.
    """

    def __init__(
        self, reason: str = "", *, path: Location = None, spans: Iterable[tuple[int, int]] = ()
    ) -> None:
        super().__init__(reason, path=path)
        self.spans = tuple(spans)


class MissingRowsError(FrameError):
    """Rows of a frame are needed that are not held, of one that is read in parts.

    Parameters
    ----------
    reason : str
        What is wrong.
    path : path, optional
        The file.
    rows : (ny,) bool array, optional
        The rows that are missing.

    Attributes
    ----------
    path, rows
        As given.
    """

    def __init__(
        self, reason: str = "", *, path: Location = None, rows: np.ndarray | None = None
    ) -> None:
        super().__init__(reason, path=path)
        self.rows = rows
