"""Holding back what new processes write to their standard error until it is known to matter."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class HeldOutput:
    """What is written to a pipe: held back at first, passed on later.

    Parameters
    ----------
    source : int
        File descriptor of the end of the pipe that is read from.
    target : int
        File descriptor that the output is passed on to.
    """

    def __init__(self, source: int, target: int) -> None:
        self._source, self._target = source, target
        self._held = bytearray()
        self._is_held, self._has_ended = True, False
        self._lock = threading.Lock()
        os.set_blocking(source, False)

    @property
    def text(self) -> str:
        """What is held."""
        with self._lock:
            self._receive()
            return self._held.decode("utf-8", "replace")

    def pass_on(self) -> None:
        """Pass on what is held, and from now on what follows."""
        with self._lock:
            self._receive()
            self._is_held = False
            self._write()

    def run(self) -> None:
        """Read until no process can write to the pipe any more."""
        while not self._has_ended:
            select.select([self._source], [], [])
            with self._lock:
                self._receive()
                if not self._is_held:
                    self._write()
        with self._lock:
            os.close(self._source)
            os.close(self._target)

    def _receive(self) -> None:
        """Read what is in the pipe."""
        try:
            while not self._has_ended:
                content = os.read(self._source, 1 << 16)
                self._held += content
                self._has_ended = not content
        except BlockingIOError:
            # There is no more at present.
            return

    def _write(self) -> None:
        """Write what is held to the target, unless nobody reads it any more."""
        left = memoryview(bytes(self._held))
        self._held.clear()
        try:
            while left:
                left = left[os.write(self._target, left) :]
        except OSError:
            return


@contextmanager
def hold_stderr_back() -> Iterator[HeldOutput | None]:
    """Hold back what is written to the standard error, also by processes that the block starts.

    When the block ends without an error, all of it is passed on, and what those processes
    write from then on. After an error, it is left in the object that the block got.

    Yields
    ------
    HeldOutput or None
        None where there is no standard error.
    """
    try:
        target = os.dup(2)
    except OSError:
        yield None
        return
    source, sink = os.pipe()
    os.dup2(sink, 2)
    os.close(sink)
    held = HeldOutput(source, target)
    reader = threading.Thread(target=held.run, name="spxdask-stderr", daemon=True)
    reader.start()
    try:
        yield held
    except BaseException:
        os.dup2(target, 2)
        # Processes that failed have ended, or are about to.
        reader.join(1.0)
        raise
    # In this order, as the target is closed when nothing can write to the pipe any more.
    held.pass_on()
    os.dup2(target, 2)
