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
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Protocol, TextIO

from spxdask.errors import RunFolderError, StoreError
from spxdask.storage import LocalStore, ObjectStore, Store

logger = logging.getLogger(__name__)

# The runs of this process that hold a lease.
_runs_with_lease: set[str] = set()


class Clock(Protocol):
    """What a lock needs of the `time` module."""

    def monotonic(self) -> float:
        """Return the time, s."""

    def sleep(self, seconds: float, /) -> None:
        """Wait.

        Parameters
        ----------
        seconds : float
            How long, s.
        """


class RunLock(ABC):
    """Keeps other runs out of an output folder.

    Parameters
    ----------
    run_folder : str
        The output folder, for messages.
    """

    def __init__(self, run_folder: str) -> None:
        self._run_folder = run_folder
        self._lost = threading.Event()

    @property
    def is_lost(self) -> bool:
        """Whether another run has taken over from the one that held the lock last."""
        return self._lost.is_set()

    @abstractmethod
    def hold(self) -> AbstractContextManager[None]:
        """Keep other runs out for as long as the block lasts.

        Returns
        -------
        context manager

        Raises
        ------
        RunFolderError
            If another run holds the lock.
        """

    @abstractmethod
    def find_holder(self) -> str | None:
        """Return which process holds the lock.

        Returns
        -------
        str or None
            Its number and its host; None when no process does.
        """

    def _refusal(self, holder: str) -> RunFolderError:
        """Return the error for a run that finds another one at work."""
        return RunFolderError(
            f"another run is at work here ({holder}): wait for it to end, or choose another "
            "output_dir",
            path=self._run_folder,
        )


def open_lock(state: Store, run_folder: str) -> RunLock:
    """Return the lock of an output folder.

    Parameters
    ----------
    state : Store
        Where the file of the lock is.
    run_folder : str
        The output folder, for messages.

    Returns
    -------
    RunLock
        `LocalLock` on disk, `LeaseLock` in an object store.
    """
    if isinstance(state, ObjectStore):
        return LeaseLock(state, run_folder)
    assert isinstance(state, LocalStore)
    return LocalLock(state.local_path / "lock", run_folder)


class LocalLock(RunLock):
    """A file that is locked by the system, which frees it when the process ends.

    Parameters
    ----------
    path : Path
        The file; it stays when the lock is free.
    run_folder : str
        The output folder, for messages.
    attempts : int
        How often the lock is tried. Another process that only asks who holds the lock has it
        for a moment.
    pause_s : float
        Time between two attempts, s.
    """

    def __init__(
        self, path: Path, run_folder: str, *, attempts: int = 3, pause_s: float = 0.05
    ) -> None:
        super().__init__(run_folder)
        self._path = path
        self._attempts = attempts
        self._pause_s = pause_s

    @contextmanager
    def hold(self) -> Iterator[None]:
        """See `RunLock.hold`."""
        self._lost.clear()
        with open(self._path, "a+", encoding="utf-8") as file:
            try:
                self._acquire(file)
            except BlockingIOError as error:
                file.seek(0)
                raise self._refusal(file.read().strip()) from error
            except OSError as error:
                # Some network file systems have no locks.
                logger.warning("%s cannot be locked: %s", self._path, error.strerror)
            file.truncate(0)
            file.write(_name_process())
            file.flush()
            yield

    def _acquire(self, file: TextIO) -> None:
        """Lock the file."""
        for _ in range(self._attempts - 1):
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(self._pause_s)
        return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def find_holder(self) -> str | None:
        """See `RunLock.find_holder`."""
        try:
            file = open(self._path, encoding="utf-8")  # noqa: SIM115
        except FileNotFoundError:
            return None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip()
            except OSError as error:
                logger.warning("%s cannot be locked: %s", self._path, error.strerror)
            return None


class LeaseLock(RunLock):
    """An object that its holder writes again and again, and that is free when this stops.

    Parameters
    ----------
    store : ObjectStore
        Where the object is.
    run_folder : str
        The output folder, for messages.
    name : str
        Name of the object.
    renewal_interval_s : float
        Time between two writes of the holder, s.
    lease_s : float
        Time without a write after which another run may take the lock over, s.
    clock : Clock
        How time passes for one who waits for a lease to end.
    """

    def __init__(
        self,
        store: ObjectStore,
        run_folder: str,
        *,
        name: str = "lock",
        renewal_interval_s: float = 5.0,
        lease_s: float = 20.0,
        clock: Clock = time,
    ) -> None:
        super().__init__(run_folder)
        self._store = store
        self._name = name
        self._renewal_interval_s = renewal_interval_s
        self._lease_s = lease_s
        self._clock = clock

    @contextmanager
    def hold(self) -> Iterator[None]:
        """See `RunLock.hold`."""
        self._lost.clear()
        run = uuid.uuid4().hex
        record = {"who": _name_process(), "host": name_host(), "pid": os.getpid(), "run": run}
        ended = threading.Event()
        renewal = threading.Thread(
            target=self._renew, args=(record, ended), name="spxdask-lock", daemon=True
        )
        # Before it is written, as other runs of this process would take it for a dead one's.
        _runs_with_lease.add(run)
        try:
            self._acquire(record)
            renewal.start()
            yield
        finally:
            ended.set()
            if renewal.ident is not None:
                renewal.join()
                self._release(record)
            _runs_with_lease.discard(run)

    def find_holder(self) -> str | None:
        """See `RunLock.find_holder`."""
        found = self._read()
        return None if found is None or _has_holder_died(found) else found.get("who", "?")

    def _acquire(self, record: dict[str, Any]) -> None:
        """Write the lock if no run holds it, or the one that held it has died."""
        found = self._read()
        waited = found is not None and not _has_holder_died(found)
        if found is not None and waited:
            found = self._wait_for_end(found)
        if not self._write_first(found, record):
            self._raise_unless_held(record)
        # A store that knows no conditions lets two runs write; the last one holds the lock.
        if waited:
            self._clock.sleep(self._lease_s / 5)
        self._raise_unless_held(record)

    def _wait_for_end(self, found: dict[str, Any]) -> dict[str, Any] | None:
        """Return what is left of a lock when its lease has ended, None when it is gone."""
        logger.warning(
            "%s: %s was at work here; waiting %g s to see whether it still is",
            self._run_folder,
            found.get("who", "another run"),
            self._lease_s,
        )
        deadline = self._clock.monotonic() + self._lease_s
        left: dict[str, Any] | None = found
        while left is not None and self._clock.monotonic() < deadline:
            self._clock.sleep(self._lease_s / 10)
            left = self._read_unchanged(found)
        return left

    def _write_first(self, found: dict[str, Any] | None, record: dict[str, Any]) -> bool:
        """Write the lock in the place of the one that was found; return whether it worked."""
        content = json.dumps(record | {"beat": 0}).encode()
        version = None
        if found is not None:
            version = self._store.get_version(self._name)
            found = self._read_unchanged(found)
        if found is None:
            return self._store.put_if_absent(self._name, content)
        if version is not None:
            return self._store.put_if_unchanged(self._name, content, version)
        self._store.put(self._name, content)
        return True

    def _raise_unless_held(self, record: dict[str, Any]) -> None:
        """Raise RunFolderError if the lock is not that of a run."""
        found = self._read() or {}
        if found.get("run") != record["run"]:
            raise self._refusal(found.get("who", "it began just now"))

    def _read_unchanged(self, before: dict[str, Any]) -> dict[str, Any] | None:
        """Return the content of the lock, None if it was deleted; raise if it has changed."""
        now = self._read()
        if now is not None and now != before:
            raise self._refusal(now.get("who", "it began just now"))
        return now

    def _release(self, record: dict[str, Any]) -> None:
        """Delete the lock if it is still that of a run."""
        try:
            if (self._read() or {}).get("run") == record["run"]:
                self._store.delete_many([self._name])
        except (OSError, StoreError) as error:
            logger.warning("%s: the lock was not deleted: %s", self._run_folder, error)

    def _renew(self, record: dict[str, Any], ended: threading.Event) -> None:
        """Write the lock again and again until the run has ended or another has the lock."""
        for beat in count(1):
            if ended.wait(self._renewal_interval_s):
                return
            try:
                if (self._read() or record).get("run") != record["run"]:
                    # This run was suspended, or cut off, for longer than its lease.
                    self._lost.set()
                    return
                self._store.put(self._name, json.dumps(record | {"beat": beat}).encode())
            # The store may be back for the next attempt; otherwise the run fails elsewhere.
            except (OSError, StoreError) as error:
                logger.warning("%s: the lock was not renewed: %s", self._run_folder, error)

    def _read(self) -> dict[str, Any] | None:
        """Return the content of the lock, None without a lock, empty if it is unreadable."""
        try:
            found = json.loads(self._store.get(self._name))
        except FileNotFoundError:
            return None
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {}


def _name_process() -> str:
    """Name this process for people."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def _has_holder_died(lock: dict[str, Any]) -> bool:
    """Return whether the process that held a lock is known to have ended."""
    pid = lock.get("pid")
    if lock.get("host") != name_host() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return pid == os.getpid() and lock.get("run") not in _runs_with_lease


def name_host() -> str:
    """Name what the number of a process belongs to: a host since its start, or a container.

    Returns
    -------
    str
        Equal in two processes only if they see each other's numbers.
    """
    name = socket.gethostname()
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{name} {boot} {os.readlink('/proc/self/ns/pid')}"
    return name
