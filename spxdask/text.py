"""Numbers and times as text for people."""

from __future__ import annotations


def format_count(number: int, noun: str, plural: str | None = None) -> str:
    """Format a number with its noun.

    Parameters
    ----------
    number : int
        How many.
    noun : str
        The noun in the singular.
    plural : str, optional
        The plural, if it is not the noun with an s.

    Returns
    -------
    str
        Such as ``1 frame`` or ``2,000 frames``.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def format_duration(seconds: float) -> str:
    """Format a duration.

    Parameters
    ----------
    seconds : float
        The duration, s.

    Returns
    -------
    str
        Such as ``42 s``, ``12 min``, ``3 h 5 min`` or ``2 d 4 h``.
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 2:
        return f"{60 * hours + minutes} min"
    days, rest = divmod(round(seconds / 3600), 24)
    return f"{hours} h {minutes} min" if hours < 48 else f"{days} d {rest} h"
