"""Progress of the stages, reported to an object that may draw it."""

from __future__ import annotations

import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import Protocol, TextIO

with warnings.catch_warnings():
    # In a notebook without ipywidgets; the bar is of text, then.
    warnings.filterwarnings("ignore", message="IProgress not found")
    from tqdm.auto import tqdm

from spxdask.text import format_duration

# Rates are averages over this many seconds.
RATE_WINDOW_S = 120.0
# Where no terminal shows a bar, lines are at least this many seconds apart.
LINE_INTERVAL_S = 60.0
# That of tqdm, but slow rates are per second, too.
BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


class Progress(Protocol):
    """What a pipeline reports while it works.

    An object may also have a method ``connect(links: str)``. It is called when there is a
    cluster, with lines for people that name the pages of the cluster. With a method
    ``wait(reason: str | None)`` it is told that the stage waits, and for what, and with None that
    it goes on; with ``receive(n_bytes: int)`` how much was fetched for the unit that is about to
    be reported; with ``note(text: str)`` what is being done before the first unit.
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
        """See `Progress.start`."""

    def advance(self, *, failed: bool = False) -> None:
        """See `Progress.advance`."""

    def finish(self) -> None:
        """See `Progress.finish`."""


def make_progress() -> Bars | Lines:
    """Return what shows the progress of a run: bars, or lines where no terminal draws them.

    Returns
    -------
    Bars or Lines
    """
    return Bars() if is_interactive() else Lines()


def is_interactive() -> bool:
    """Return whether standard error can draw a bar: a terminal, or a notebook.

    Returns
    -------
    bool
    """
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    # That of a terminal has no kernel.
    if hasattr(shell, "kernel"):
        return True
    return sys.stderr is not None and sys.stderr.isatty()


class Lines:
    """Lines on standard error, at most one a minute, for logs of batch jobs.

    Parameters
    ----------
    file : text file, optional
        Where they are written; default: standard error.
    interval_s : float
        Lines of a stage are at least this many seconds apart.
    clock : callable
        Returns the time in seconds.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        *,
        interval_s: float = LINE_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file, self._interval_s, self._clock = file, interval_s, clock
        self._stage, self._unit, self._total = "", "", 0
        self._ended = self._failed = self._bytes = 0
        self._written_at = 0.0
        self._history: deque[tuple[float, int]] = deque()

    def connect(self, links: str) -> None:
        """Print the links.

        Parameters
        ----------
        links : str
            Lines that name the pages of the cluster.
        """
        self._write(links)

    def note(self, text: str) -> None:
        """Print a line.

        Parameters
        ----------
        text : str
            What is being done.
        """
        self._write(text)

    def start(self, stage: str, total: int, unit: str) -> None:
        """See `Progress.start`."""
        self._stage, self._unit, self._total = stage, unit, total
        self._ended = self._failed = self._bytes = 0
        self._written_at = self._clock()
        self._history = deque([(self._written_at, 0)])

    def receive(self, n_bytes: int) -> None:
        """Count what was fetched.

        Parameters
        ----------
        n_bytes : int
            Number of bytes.
        """
        self._bytes += n_bytes

    def advance(self, *, failed: bool = False) -> None:
        """See `Progress.advance`."""
        self._ended += 1
        self._failed += failed
        if self._ended == 1:
            # The first one may have waited for loops to be compiled.
            self._history = deque([(self._clock(), 1)])
        if self._clock() - self._written_at >= self._interval_s:
            self._write_counts()

    def wait(self, reason: str | None) -> None:
        """Print what the stage waits for, in place of a line with counts.

        Parameters
        ----------
        reason : str or None
            None when it goes on.
        """
        if reason is not None and self._clock() - self._written_at >= self._interval_s:
            self._written_at = self._clock()
            self._write(f"{self._stage}: waiting: {reason}")

    def finish(self) -> None:
        """Print nothing: the summary has the results, and an error its own line."""

    def _write_counts(self) -> None:
        now = self._written_at = self._clock()
        self._history.append((now, self._ended))
        while len(self._history) > 2 and now - self._history[0][0] > RATE_WINDOW_S:
            self._history.popleft()
        begin, before = self._history[0]
        rate = (self._ended - before) / (now - begin) if now > begin else 0.0
        words = [f"{self._stage}: {self._ended:,} of {self._total:,} {self._unit}"]
        words += [f"{self._failed:,} failed"] if self._failed else []
        words += [f"{rate:.3g}/s"] if rate else []
        words += [f"{self._bytes / 1e9:.3g} GB"] if self._bytes else []
        left = self._total - self._ended
        words += [f"{format_duration(left / rate)} left"] if rate and left > 0 else []
        self._write(", ".join(words))

    def _write(self, text: str) -> None:
        print(text, file=self._file or sys.stderr, flush=True)


class Bars:
    """One bar per stage on standard error, with rate and time left.

    Bars are drawn on terminals only; links are printed wherever standard error leads.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._failed = self._bytes = 0
        self._is_waiting = False

    def connect(self, links: str) -> None:
        """Print the links.

        Parameters
        ----------
        links : str
            Lines that name the pages of the cluster.
        """
        tqdm.write(links, file=sys.stderr)

    def note(self, text: str) -> None:
        """Print a line above the bar.

        Parameters
        ----------
        text : str
            What is being done.
        """
        tqdm.write(text, file=sys.stderr)

    def receive(self, n_bytes: int) -> None:
        """Count what was fetched.

        Parameters
        ----------
        n_bytes : int
            Number of bytes.
        """
        self._bytes += n_bytes

    def start(self, stage: str, total: int, unit: str) -> None:
        """See `Progress.start`."""
        self._failed = self._bytes = 0
        self._is_waiting = False
        self._bar = tqdm(
            desc=f"{stage:<10}",
            total=total,
            unit=f" {unit}",
            bar_format=BAR_FORMAT,
            disable=not is_interactive(),
            dynamic_ncols=True,
        )

    def advance(self, *, failed: bool = False) -> None:
        """See `Progress.advance`."""
        if self._bar is None:
            return
        self._failed += failed
        self._bar.set_postfix_str(self._describe(), refresh=False)
        self._bar.update()

    def wait(self, reason: str | None) -> None:
        """Show on the bar that the stage waits.

        Parameters
        ----------
        reason : str or None
            None when it goes on.
        """
        self._is_waiting = reason is not None
        if self._bar is not None:
            self._bar.set_postfix_str(self._describe())

    def _describe(self) -> str:
        if self._is_waiting:
            return "waiting for the archive"
        fetched = [f"{self._bytes / 1e9:.3g} GB"] if self._bytes else []
        return ", ".join(fetched + ([f"{self._failed:,} failed"] if self._failed else []))

    def finish(self) -> None:
        """Close the bar; it stays on the terminal."""
        if self._bar is not None:
            self._bar.close()
