"""How the inner loops are compiled: once, for all processes that share a disk.

Compiled code is cached beside the package, in the user's cache folder where the package
cannot be written, or in the folder that the environment variable NUMBA_CACHE_DIR names.

Numba reuses a cached function as long as the file of this function is unchanged, although
functions of other files may have been compiled into it. Therefore the name of each cache
file here contains a hash of all sources of the folder, and a compiled function may only
call compiled functions of its own folder.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numba import njit

__all__ = ["compiled", "compiled_helper", "compiled_inline"]

logger = logging.getLogger(__name__)

# Loops release the GIL, and divide and index as C does.
OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False}

compiled_helper = njit(**OPTIONS)
"""Compile a function that only compiled functions call; it is part of their cached code."""

compiled_inline = njit(inline="always", **OPTIONS)
"""Compile a short function into the body of each compiled function that calls it."""


def compiled(function: Callable) -> Callable:
    """Compile a function that is called from Python, and cache the result on disk.

    The first call in a process holds a lock, so that of many workers that start at the
    same time one compiles and the others load the result.

    Parameters
    ----------
    function : callable
        A function that numba can compile. The compiled functions that it calls are
        defined in the same folder.

    Returns
    -------
    callable
        The same function, compiled for the types of the arguments at each first call. Its
        attribute ``dispatcher`` is numba's object.
    """
    name = function.__qualname__
    # Numba names the cache file after the function.
    function.__qualname__ = f"{name}-{_hash_sources(Path(inspect.getfile(function)).parent)}"
    dispatcher = njit(cache=True, **OPTIONS)(function)
    function.__qualname__ = name

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if dispatcher.signatures:
            return dispatcher(*arguments)
        with _exclusive_lock(Path(dispatcher.stats.cache_path) / "compiling.lock"):
            return dispatcher(*arguments)

    call.dispatcher = dispatcher  # type: ignore[attr-defined]
    return call


@functools.cache
def _hash_sources(folder: Path) -> str:
    """Hash the Python files of a folder, and this one, which holds the compiler's options."""
    digest = hashlib.blake2b(digest_size=8)
    for path in (Path(__file__), *sorted(folder.glob("*.py"))):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


@contextmanager
def _exclusive_lock(path: Path) -> Iterator[None]:
    """Keep other processes out; without a lock, where there is no locking, each compiles."""
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
