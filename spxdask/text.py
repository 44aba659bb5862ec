"""Numbers and times as text for people."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable

# What a terminal shows in a line, unless its window was made wider.
TERMINAL_COLUMNS = 80


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


def wrap_report(text: str, indent: int = 12, width: int = TERMINAL_COLUMNS) -> str:
    """Break the lines of a report that are too long for a terminal.

    Parameters
    ----------
    text : str
        Lines, whose first `indent` characters are a heading.
    indent : int
        Where continued lines begin.
    width : int
        Longest line, in characters; only a word that is longer by itself makes a longer one.

    Returns
    -------
    str
        The same words.
    """
    wrapper = textwrap.TextWrapper(
        width - indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
    lines: list[str] = []
    for line in text.split("\n"):
        heading, parts = line[:indent], wrapper.wrap(line[indent:]) or [""]
        lines.append((heading + parts[0]).rstrip())
        lines += [" " * indent + part for part in parts[1:]]
    return "\n".join(lines)


def format_html_table(caption: str, rows: Iterable[tuple[object, object]]) -> str:
    """Format names and values as a table for a notebook.

    Parameters
    ----------
    caption : str
        What they are of.
    rows : iterable of (object, object)
        The names and the values; both are escaped.

    Returns
    -------
    str
        HTML.
    """
    cell = "<td style='text-align:left;vertical-align:top;white-space:pre-wrap'>"
    body = "".join(
        f"<tr>{cell}{html.escape(str(name))}</td>{cell}{html.escape(str(value))}</td></tr>"
        for name, value in rows
    )
    return f"<b>{html.escape(caption)}</b><table>{body}</table>"


def split_report(text: str, indent: int = 12) -> list[tuple[str, str]]:
    """Split the lines of a report into headings and what is said under them.

    Parameters
    ----------
    text : str
        Lines, whose first `indent` characters are a heading.
    indent : int
        Length of the headings.

    Returns
    -------
    list of (str, str)
    """
    return [(line[:indent].strip(), line[indent:].strip()) for line in text.split("\n")]
