"""One run at a time in an output folder, on disk or in an object store."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO

from upath import UPath

from spxdask.errors import RunFolderError, StoreError
from spxdask.storage.files import is_local, read_each, translate_store_errors

logger = logging.getLogger(__name__)

ATTEMPTS = 3
PAUSE_S = 0.05
# In a store, who holds the lock says so again and again; after this long in silence it is
# free for others.
BEAT_S = 5.0
LEASE_S = 20.0

# The runs of this process that hold a lock.
_held: set[str] = set()


@contextmanager
def locked(path: Path | UPath) -> Iterator[threading.Event]:
    """Keep other runs out for as long as the block lasts.

    Parameters
    ----------
    path : Path or UPath
        The file that stands for the lock.

    Yields
    ------
    threading.Event
        Set when another run has taken over, which in a store it can from one that was asleep
        or cut off for longer than `LEASE_S`.

    Raises
    ------
    RunFolderError
        If another run is at work.
    """
    with (_on_disk if is_local(path) else _in_store)(path) as taken:
        yield taken


def holder(path: Path | UPath) -> str | None:
    """Return which process holds a lock, None when there is none."""
    try:
        if not is_local(path):
            found = _read(path)
            return None if found is None or _has_died(found) else found.get("who", "?")
        lock = open(path, encoding="utf-8")  # noqa: SIM115
    except FileNotFoundError:
        return None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock.read().strip()
        except OSError as error:
            logger.warning("%s cannot be locked: %s", path, error.strerror)
        return None


def _refusal(path: Path | UPath, holder: dict | str) -> RunFolderError:
    who = holder if isinstance(holder, str) else holder.get("who", "it began just now")
    return RunFolderError(
        f"another run is at work in {path.parent.parent} ({who}); wait for its end, or give this "
        "one another output_dir"
    )


@contextmanager
def _on_disk(path: Path) -> Iterator[threading.Event]:
    with open(path, "a+", encoding="utf-8") as lock:
        try:
            _lock(lock)
        except BlockingIOError as error:
            lock.seek(0)
            raise _refusal(path, lock.read().strip()) from error
        except OSError as error:
            # Some network file systems have no locks.
            logger.warning("%s cannot be locked: %s", path, error.strerror)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        # The system sees to it that nobody takes it over.
        yield threading.Event()


def _lock(file: IO) -> None:
    """Lock a file for ourselves; one who looks whether it is locked is waited for."""
    for _ in range(ATTEMPTS - 1):
        with suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(PAUSE_S)
    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def _in_store(path: UPath) -> Iterator[threading.Event]:
    """Hold an object that is written anew every `BEAT_S`."""
    mine = {
        "who": f"process {os.getpid()} on {socket.gethostname()}",
        "host": _here(),
        "pid": os.getpid(),
        "run": uuid.uuid4().hex,
    }
    over, taken = threading.Event(), threading.Event()
    keeper = threading.Thread(
        target=_keep, args=(path, mine, over, taken), name="spxdask-lock", daemon=True
    )
    # Before it is written: others of this process take it for one that died otherwise.
    _held.add(mine["run"])
    try:
        _acquire(path, mine)
        keeper.start()
        yield taken
    finally:
        over.set()
        if keeper.ident is not None:
            keeper.join()
            _release(path, mine)
        _held.discard(mine["run"])


def _acquire(path: UPath, mine: dict) -> None:
    """Write the lock if nobody has it, or whoever had it is no more."""
    before = _read(path)
    waited = before is not None and not _has_died(before)
    if waited:
        logger.warning(
            "%s: %s was at work here; to see whether it still is takes %g s",
            path.parent.parent,
            before.get("who", "somebody"),
            LEASE_S,
        )
        deadline = time.monotonic() + LEASE_S
        while before is not None and time.monotonic() < deadline:
            time.sleep(LEASE_S / 10)
            before = _unless_changed(path, before)
    how = {"mode": "create"}
    if before is not None:
        tag = _tag(path)
        how = {"IfMatch": tag} if tag and _unless_changed(path, before) else {}
    try:
        _write(path, mine | {"beat": 0}, **how)
    except (OSError, StoreError) as error:
        # Stores differ in how they say that it is another's now. It is ours when the answer
        # to a first request was lost.
        now = _read(path)
        if now in (None, before):
            raise
        if now.get("run") != mine["run"]:
            raise _refusal(path, now) from error
    # A store that knows no conditions lets two of them write: the last one has it.
    if waited:
        time.sleep(LEASE_S / 5)
    found = _read(path) or {}
    if found.get("run") != mine["run"]:
        raise _refusal(path, found)


def _unless_changed(path: UPath, before: dict) -> dict | None:
    """Return what a lock says, None when it is gone; refuse to go on if it was written."""
    now = _read(path)
    if now not in (None, before):
        raise _refusal(path, now)
    return now


def _release(path: UPath, mine: dict) -> None:
    try:
        if (_read(path) or {}).get("run") == mine["run"]:
            with translate_store_errors(path):
                path.fs.rm_file(path.path)
    except (OSError, StoreError) as error:
        logger.warning("%s: the lock was not removed: %s", path, error)


def _keep(path: UPath, mine: dict, over: threading.Event, taken: threading.Event) -> None:
    """Write the lock again and again, as long as it is ours; set `taken` when it is not."""
    for beat in count(1):
        if over.wait(BEAT_S):
            return
        try:
            if (_read(path) or mine).get("run") != mine["run"]:
                # We were asleep, or cut off, for so long that another run began.
                taken.set()
                return
            _write(path, mine | {"beat": beat})
        # A store that is away for a while comes back, or the run fails of it elsewhere.
        except (OSError, StoreError) as error:
            logger.warning("%s: the lock was not written: %s", path, error)


def _write(path: UPath, lock: dict, **how: str) -> None:
    with translate_store_errors(path):
        path.fs.pipe_file(path.path, json.dumps(lock).encode(), **how)


def _read(path: UPath) -> dict | None:
    """Return what a lock says, None when there is none."""
    try:
        (text,) = read_each(path.parent, [path.name])
        found = json.loads(text)
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _tag(path: UPath) -> str | None:
    """Return a tag of what a lock says now, if the store has any that conditions can name."""
    try:
        with translate_store_errors(path):
            return path.fs.info(path.path).get("ETag")
    except FileNotFoundError:
        return None


def _has_died(lock: dict) -> bool:
    """Tell whether the process that held a lock is known to be no more."""
    if lock.get("host") != _here() or not isinstance(lock.get("pid"), int):
        return False
    try:
        os.kill(lock["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return lock["pid"] == os.getpid() and lock.get("run") not in _held


def _here() -> str:
    """Name what the number of a process belongs to: a host since its start, or a container."""
    name = socket.gethostname()
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{name} {boot} {os.readlink('/proc/self/ns/pid')}"
    return name
