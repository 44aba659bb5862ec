"""``python -m spxdask``, and the command ``spxdask``."""

import gc
import io
import os
import sys
from typing import Any, NoReturn

from spxdask.cli import main


class _Messages(io.FileIO):
    """Standard error, which nobody has to read: no run ends because a message was not written."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError:
            # Its reader or its terminal has ended, such as that of "2>&1 | tee log" by the same
            # Ctrl-C, or its disk is full. There is nowhere left to say so.
            return len(content)


def _open_missing_descriptors() -> None:
    """Open the null device in place of standard streams that are closed, as by "2>&-".

    Otherwise a file of the run, such as its lock, would take the number of one, and be held open by
    every process that inherits it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest number that is free.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def run() -> NoReturn:
    """Run the command line as a program of its own, and end it."""
    # Most objects are of modules, and stay. To look through them many times while they are made,
    # and once more at the end, would take a fifth of the time of a short command.
    gc.set_threshold(50_000)
    _open_missing_descriptors()
    encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
    messages = io.BufferedWriter(_Messages(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(messages, encoding, line_buffering=True)
    status = main()
    gc.freeze()
    sys.exit(status)


if __name__ == "__main__":
    run()
