"""Progress of the stages, reported to an object that may draw it."""

from __future__ import annotations

import sys
from typing import Protocol

from tqdm.auto import tqdm

# Rates are averages over this many seconds.
RATE_WINDOW_S = 120.0


class Progress(Protocol):
    """What a pipeline reports while it works.

    An object may also have a method ``connect(links: str)``. It is called when there is a
    cluster, with lines for people that name the pages of the cluster. With a method
    ``wait(reason: str | None)`` it is told that the stage waits, and for what, and with None that
    it goes on.
    """

    def start(self, stage: str, total: int, unit: str) -> None:
        """Report that a stage begins.

        Parameters
        ----------
        stage : str
            Name of the stage.
        total : int
            Number of its units.
        unit : str
            What they are, in the plural.
        """

    def advance(self, *, failed: bool = False) -> None:
        """Report that one more unit of the stage has ended.

        Parameters
        ----------
        failed : bool
            Whether it failed.
        """

    def finish(self) -> None:
        """Report that the stage has ended."""


class Silent:
    """A progress that ignores every report."""

    def connect(self, links: str) -> None:
        """Ignore the report.

        Parameters
        ----------
        links : str
            Lines that name the pages of the cluster.
        """

    def start(self, stage: str, total: int, unit: str) -> None:
        """Ignore the report.

        Parameters
        ----------
        stage : str
            Name of the stage.
        total : int
            Number of its units.
        unit : str
            What they are, in the plural.
        """

    def advance(self, *, failed: bool = False) -> None:
        """Ignore the report.

        Parameters
        ----------
        failed : bool
            Whether the unit failed.
        """

    def finish(self) -> None:
        """Ignore the report."""


class Bars:
    """One bar per stage on standard error, with rate and time left.

    Bars are drawn on terminals only; links are printed wherever standard error leads.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._failed = 0

    def connect(self, links: str) -> None:
        """Print the links.

        Parameters
        ----------
        links : str
            Lines that name the pages of the cluster.
        """
        tqdm.write(links, file=sys.stderr)

    def start(self, stage: str, total: int, unit: str) -> None:
        """Draw an empty bar.

        Parameters
        ----------
        stage : str
            Name of the stage.
        total : int
            Number of its units.
        unit : str
            What they are, in the plural.
        """
        self._failed = 0
        self._bar = tqdm(
            desc=f"{stage:<10}", total=total, unit=f" {unit}", disable=None, dynamic_ncols=True
        )

    def advance(self, *, failed: bool = False) -> None:
        """Move the bar by one unit.

        Parameters
        ----------
        failed : bool
            Whether the unit failed.
        """
        if self._bar is None:
            return
        if failed:
            self._failed += 1
            self._bar.set_postfix_str(f"{self._failed} failed", refresh=False)
        self._bar.update()

    def wait(self, reason: str | None) -> None:
        """Show on the bar that the stage waits.

        Parameters
        ----------
        reason : str or None
            None when it goes on.
        """
        if self._bar is not None:
            failed = f"{self._failed} failed" if self._failed else ""
            self._bar.set_postfix_str("waiting for the archive" if reason else failed)

    def finish(self) -> None:
        """Close the bar; it stays on the terminal."""
        if self._bar is not None:
            self._bar.close()
