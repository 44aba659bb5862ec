"""``python -m spxdask``, and the command ``spxdask``."""

import gc
import sys
from typing import NoReturn

from spxdask.cli import main


def run() -> NoReturn:
    """Run the command line as a program of its own, and end it."""
    # Most objects are of modules, and stay. To look through them many times while they are made,
    # and once more at the end, would take a fifth of the time of a short command.
    gc.set_threshold(50_000)
    status = main()
    gc.freeze()
    sys.exit(status)


if __name__ == "__main__":
    run()
