"""How the inner loops are compiled: once, for all processes that share a disk.

Compiled code is cached beside the package, in the user's cache folder where the package
cannot be written, or in the folder that the environment variable NUMBA_CACHE_DIR names. Where
none of them can be written, it is cached in the folder for temporary files, and where that is
not possible either, each process compiles for itself.

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
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numba.core import config
from numba.core.caching import FunctionCache

__all__ = ["compiled", "compiled_helper", "compiled_inline", "is_cached", "prepare_cache"]

logger = logging.getLogger(__name__)

# Loops release the GIL, and divide and index as C does.
OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False}
# A cache that has room for this many bytes has room for all compiled functions.
CACHE_BYTES = 3_000_000

# The functions that `compiled` has returned, as they were written.
_functions: list[Callable] = []
# Held while a cache is opened, as that may change numba's configuration for a moment.
_opening = threading.Lock()

compiled_helper = njit(**OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Compile a function that only compiled functions call; it is part of their cached code.

It cannot be called from Python, which would end the process: what such calls need takes a fifth of
the time to compile.
"""

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
    if config.DISABLE_JIT:
        # Compiled code does not warn of numbers that overflow, either.
        return np.errstate(all="ignore")(function)
    dispatcher = njit(**OPTIONS, no_cfunc_wrapper=True)(function)
    _functions.append(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if dispatcher.signatures:
            return dispatcher(*arguments)
        cache = _get_cache(function)
        if cache is None:
            return dispatcher(*arguments)
        dispatcher._cache = cache
        with _exclusive_lock(Path(cache.cache_path) / "compiling.lock"):
            return dispatcher(*arguments)

    call.dispatcher = dispatcher  # type: ignore[attr-defined]
    return call


@functools.cache
def prepare_cache() -> dict[str, str]:
    """Find a place for the cache, and warn, once, if it is not where it should be.

    To be called before the worker processes of a run start: they do not warn.

    Returns
    -------
    dict of str to str
        Environment variables with which a new process of this machine uses the same place.
    """
    problem = _find_cache_problem()
    if problem is None:
        return {}
    folder = _make_temporary_folder()
    if folder is None or _find_write_problem(folder) is not None:
        logger.warning(
            "compiled code cannot be cached (%s), so that each process compiles for itself, "
            "which takes half a minute: set NUMBA_CACHE_DIR to a folder that can be written",
            problem,
        )
        return {}
    logger.warning(
        "compiled code cannot be cached in its place (%s), and is cached in %s: set "
        "NUMBA_CACHE_DIR to a folder that can be written",
        problem,
        folder,
    )
    return {
        "NUMBA_CACHE_DIR": str(folder),
        "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator",
    }


def is_cached() -> bool:
    """Return whether this machine has compiled the functions that are imported before.

    Returns
    -------
    bool
        False also where there is no cache.
    """
    for function in _functions:
        try:
            with _opening:
                folder = Path(_open_cache(function).cache_path)
        except (OSError, RuntimeError) as error:
            logger.debug("no cache for compiled code: %s", error)
            return False
        if not _is_in_use(folder, function):
            return False
    return True


def _is_in_use(folder: Path, function: Callable) -> bool:
    """Return whether a cache has anything compiled from the present sources of a function."""
    return any(folder.glob(f"*-{_hash_folder(function)}-*.nbc"))


class _Cache(FunctionCache):
    """Numba's cache of one function; if it fails, the function is compiled without it."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:
            # Files that are damaged raise whatever error unpickling them does.
            logger.info("compiled code in %s cannot be read: %s", self.cache_path, error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            try:
                super().save_overload(sig, data)
            except OSError:
                raise
            except Exception:
                # The index is damaged.
                self.flush()
                super().save_overload(sig, data)
        except Exception as error:
            logger.info("compiled code cannot be cached in %s: %s", self.cache_path, error)
            self.disable()


@functools.cache
def _get_cache(function: Callable) -> _Cache | None:
    """Return the cache of a function, None if there is no place for it."""
    with _opening:
        try:
            return _open_cache(function)
        except (OSError, RuntimeError) as error:
            problem = error
        folder = _make_temporary_folder()
        logger.info("%s; using %s instead", problem, folder)
        if folder is None:
            return None
        before = config.CACHE_DIR, getattr(config, "CACHE_LOCATOR_CLASSES", "")
        config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES = str(folder), "UserProvidedCacheLocator"
        try:
            return _open_cache(function)
        except (OSError, RuntimeError) as error:
            logger.info("%s", error)
            return None
        finally:
            config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES = before


def _open_cache(function: Callable) -> _Cache:
    """Open the cache of a function at the first place that numba finds to be writable."""
    name = function.__qualname__
    # Numba names the cache file after the function.
    function.__qualname__ = f"{name}-{_hash_folder(function)}"
    try:
        return _Cache(function)
    finally:
        function.__qualname__ = name


def _find_cache_problem() -> str | None:
    """Return why the functions cannot be cached where numba would do so, None if they can."""
    folders = set()
    for function in _functions:
        try:
            with _opening:
                folder = Path(_open_cache(function).cache_path)
        except (OSError, RuntimeError) as error:
            # Numba's sentence names the function, and the next one what can be done.
            is_without_place = "no locator available" in str(error)
            return "no folder for it can be written" if is_without_place else str(error)
        if not _is_in_use(folder, function):
            folders.add(folder)
    return next((p for p in map(_find_write_problem, sorted(folders)) if p is not None), None)


def _find_write_problem(folder: Path) -> str | None:
    """Return why a folder has no room for the cache, None if it has."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            left = CACHE_BYTES
            while left:
                left -= file.write(bytes(left))
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return None


def _make_temporary_folder() -> Path | None:
    """Return a folder for the cache that no other user can write to, None if there is none."""
    try:
        folder = Path(tempfile.gettempdir(), f"spxdask-numba-{os.getuid()}")
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError as error:
        logger.info("no folder for compiled code: %s", error)
        return None
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return folder if is_ours and not found.st_mode & 0o022 else None


def _hash_folder(function: Callable) -> str:
    """Return a hash of the sources that a function may be compiled from."""
    return _hash_sources(Path(inspect.getfile(function)).parent)


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
