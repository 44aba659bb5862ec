"""The errors spxdask raises, by who can act on them.

Each carries one sentence for a person: what is wrong, where, and what to do. All take
that sentence as their only argument, so they survive the way between processes.
"""

from __future__ import annotations

__all__ = [
    "ArchiveError",
    "CatalogueError",
    "ClusterError",
    "ConfigError",
    "DiskFullError",
    "FrameError",
    "InputError",
    "RunFolderError",
    "SpxdaskError",
    "StoreError",
    "TruncatedAnswerError",
]


class SpxdaskError(Exception):
    """Base of every error that spxdask raises on purpose."""


class InputError(SpxdaskError):
    """Something the user gave cannot be used; the command line exits with 2."""


class ConfigError(InputError, ValueError):
    """An option has a value that is not allowed."""


class CatalogueError(InputError, ValueError):
    """The catalogue file cannot be used."""


class RunFolderError(InputError):
    """The output folder lacks what a stage needs, or belongs to something else."""


class ArchiveError(SpxdaskError):
    """The archive did not give what was asked for, retries included."""


class TruncatedAnswerError(ArchiveError):
    """The archive answered a query only in part."""


class ClusterError(SpxdaskError):
    """The Dask cluster that does the work is gone."""


class DiskFullError(SpxdaskError):
    """There is no room left for what a run writes."""


class StoreError(SpxdaskError):
    """An object store cannot be read or written."""


class FrameError(SpxdaskError):
    """A file is not a readable SPHEREx Level 2 frame."""
