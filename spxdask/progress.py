"""Progress of the stages, told to whoever wants to draw it."""

from __future__ import annotations

from typing import Protocol

from tqdm.auto import tqdm

# Rates are those of the last so many seconds.
RATE_S = 120.0


class Progress(Protocol):
    """What a pipeline tells while it works."""

    def start(self, stage: str, total: int, unit: str) -> None:
        """Say that a stage of `total` units begins."""

    def advance(self, *, failed: bool = False) -> None:
        """Say that one more unit of the stage has ended."""

    def finish(self) -> None:
        """Say that the stage is over."""


class Silent:
    """Tells nobody."""

    def start(self, stage: str, total: int, unit: str) -> None:
        """Ignore it."""

    def advance(self, *, failed: bool = False) -> None:
        """Ignore it."""

    def finish(self) -> None:
        """Ignore it."""


class Bars:
    """A bar a stage with rate and time left; nothing when standard error is no terminal."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._failed = 0

    def start(self, stage: str, total: int, unit: str) -> None:
        """Draw an empty bar."""
        self._failed = 0
        self._bar = tqdm(
            desc=f"{stage:<10}", total=total, unit=f" {unit}", disable=None, dynamic_ncols=True
        )

    def advance(self, *, failed: bool = False) -> None:
        """Move the bar by one."""
        if failed:
            self._failed += 1
            self._bar.set_postfix_str(f"{self._failed} failed", refresh=False)
        self._bar.update()

    def finish(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def duration(seconds: float) -> str:
    """Return a time as a person says it: 42 s, 12 min, 3 h 5 min, 2 d 4 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 2:
        return f"{60 * hours + minutes} min"
    days, rest = divmod(round(seconds / 3600), 24)
    return f"{hours} h {minutes} min" if hours < 48 else f"{days} d {rest} h"
