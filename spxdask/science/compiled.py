"""How the inner loops are compiled: once, for all processes that share a disk."""

from __future__ import annotations

import fcntl
import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from numba import njit

logger = logging.getLogger(__name__)

# What is compiled is kept beside the package, or in the user's cache where that cannot be
# written; NUMBA_CACHE_DIR names another place.
OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy", "boundscheck": False}

inner = njit(**OPTIONS)
"""Compile a function that is called by compiled ones only."""


def compiled(function: Callable) -> Callable:
    """Compile a function that is called from Python.

    Its first call in a process happens behind a lock, so that of many workers that start
    at once one compiles, and the others load what it compiled.
    """
    dispatcher = njit(**OPTIONS)(function)

    @functools.wraps(function)
    def call(*arguments):
        if dispatcher.signatures:
            return dispatcher(*arguments)
        with _alone(Path(dispatcher.stats.cache_path) / "compiling.lock"):
            return dispatcher(*arguments)

    call.dispatcher = dispatcher
    return call


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes out; where there is no locking, they compile on their own."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        logger.debug("no lock on %s: %s", path, error)
        yield
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            logger.debug("no lock on %s: %s", path, error)
        yield
    finally:
        os.close(lock)
