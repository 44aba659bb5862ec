"""Holding back what new processes write to their standard error until it is known to matter."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class HeldOutput:
    """What the processes have written while it was held back.

    Parameters
    ----------
    target : int
        File descriptor that it is passed on to.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._held = bytearray()
        self._is_open = False
        self._lock = threading.Lock()

    @property
    def text(self) -> str:
        """What is held."""
        with self._lock:
            return self._held.decode("utf-8", "replace")

    def add(self, content: bytes) -> None:
        """Hold content back, or pass it on if it is not to be held any more.

        Parameters
        ----------
        content : bytes
            What a process has written.
        """
        with self._lock:
            if self._is_open:
                _write(self._target, content)
            else:
                self._held += content

    def pass_on(self) -> None:
        """Pass on what is held, and from now on what follows."""
        with self._lock:
            self._is_open = True
            _write(self._target, self._held)
            self._held.clear()


@contextmanager
def hold_stderr_back() -> Iterator[HeldOutput]:
    """Hold back what is written to the standard error, also by processes that the block starts.

    When the block ends without an error, all of it is passed on, and what those processes
    write from then on. After an error, it is left in the object that the block got.

    Yields
    ------
    HeldOutput
    """
    try:
        target = os.dup(2)
    except OSError:
        # There is none.
        yield HeldOutput(-1)
        return
    held = HeldOutput(target)
    source, sink = os.pipe()
    os.dup2(sink, 2)
    os.close(sink)

    def read() -> None:
        # It ends when no process can write to the pipe any more.
        while content := os.read(source, 1 << 16):
            held.add(content)
        os.close(source)
        os.close(target)

    reader = threading.Thread(target=read, name="spxdask-stderr", daemon=True)
    reader.start()
    try:
        yield held
    except BaseException:
        os.dup2(target, 2)
        # Processes that failed have ended, or are about to.
        reader.join(1.0)
        raise
    os.dup2(target, 2)
    held.pass_on()


def _write(target: int, content: bytes | bytearray) -> None:
    """Write to a file descriptor, unless nobody reads it any more."""
    left = memoryview(bytes(content))
    try:
        while left:
            left = left[os.write(target, left) :]
    except OSError:
        return
