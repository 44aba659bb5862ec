"""Reading the parts of a frame that are needed, without knowing how bytes are had.

The generators here yield what they need next, and are resumed when it is there:

>>> def drive(reading, fetch):
...     try:
...         spans = next(reading)
...         while True:
...             fetch(spans)
...             spans = next(reading)
...     except StopIteration as end:
...         return end.value

A frame is as long a buffer as its file, of which some bytes are held, and is opened by the same
code as a whole one: what it needs and does not find is an error, which says what to fetch. So a
wrong guess of where something is costs a request, and never a number.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple, TypeVar

import numpy as np

from spxdask.errors import FrameError, MissingBytesError, MissingRowsError
from spxdask.science.level2.fits import BLOCK, Hdu, pad, walk
from spxdask.science.level2.frame import Frame, list_spans, open_frame, open_head
from spxdask.science.level2.spans import Span, Spans

__all__ = ["Layouts", "is_large", "measure_partly", "read_partly", "read_rows"]

T = TypeVar("T")
Reading = Generator[list[Span], None, T]
"""It yields the spans that it needs next, and returns its result."""

# Frames with less in IMAGE than this, such as cut-outs, are read whole, bytes.
LEAST_IMAGE_BYTES = 1 << 20
# Asked for in the beginning, where nothing is known: the headers of a primary and of IMAGE take
# six blocks in QR2.
HEAD_BYTES = 12 * BLOCK
# A measurement that finds something missing this many times is one that will never end: it asks
# for rows, for the rows of a better fit, for zones of a PSF, and for all of its zones.
MOST_ATTEMPTS = 8

NOT_HELD = "a reader of frames was resumed without the bytes that it asked for"


class Layout(NamedTuple):
    """Where things are in a file.

    Attributes
    ----------
    size : int
        Length of the file, bytes.
    hdus : tuple of Hdu
        Its extensions, in the order of the file.
    """

    size: int
    hdus: tuple[Hdu, ...]


class Layouts:
    """Where things were in the last frame of each release and band, for guesses about the next.

    One object serves all frames of a process, from any number of threads. Frames differ from their
    layouts without harm.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Layout] = {}
        self._head_bytes = 0

    @property
    def head_bytes(self) -> int:
        """How much to ask for in the beginning of a file: what the longest head so far took."""
        return self._head_bytes or HEAD_BYTES

    def find(self, key: tuple[str, str]) -> Layout | None:
        """Return the layout of the last frame like this one.

        Parameters
        ----------
        key : (str, str)
            Release of the pipeline, and band.

        Returns
        -------
        Layout or None
            None if there was no such frame.
        """
        return self._known.get(key)

    def remember(self, key: tuple[str, str], layout: Layout) -> None:
        """Keep the layout of a frame.

        Parameters
        ----------
        key : (str, str)
            Release of the pipeline, and band.
        layout : Layout
            Of the frame.
        """
        self._known[key] = layout
        image = next(hdu for hdu in layout.hdus if hdu.name == "IMAGE")
        # Headers of some frames have a block more.
        self._head_bytes = max(self._head_bytes, image.data_start + BLOCK)


def is_large(head: Frame) -> bool:
    """Return whether it may be worth while to read a frame in parts.

    Parameters
    ----------
    head : Frame
        From `open_head`, or the frame itself.

    Returns
    -------
    bool
        False for cut-outs of less than a mebibyte a plane, which `read_partly` reads whole.
    """
    return head.image.size * head.image.itemsize >= LEAST_IMAGE_BYTES


def read_partly(
    content: memoryview,
    held: Spans,
    filename: str,
    choose_rows: Callable[[Frame], np.ndarray | None],
    layouts: Layouts,
    *,
    may_be_small: bool = False,
) -> Reading[Frame | None]:
    """Read the rows of a frame that are needed, and no more.

    There are two or three rounds of requests once a frame of the same release and band has been
    read, and one for each extension before.

    Parameters
    ----------
    content : memoryview
        As long as the file, which must be known. What is not held is never read, and may be
        anything.
    held : Spans
        Which bytes of it are there. It belongs to the caller, who adds what was asked for, and
        more if that is cheaper, before the generator is resumed.
    filename : str
        The archive's own name of the file.
    choose_rows : callable
        Given the head of the frame (see `open_head`), it returns the rows that are needed as a
        (ny,) bool array, or None to read no further. It is called once.
    layouts : Layouts
        Shared by all frames of a process.
    may_be_small : bool
        Whether cut-outs are read in parts, too.

    Returns
    -------
    Frame or None
        The frame, whose `rows` are those chosen; a small one is whole, and has None. None if no
        row was chosen.

    Yields
    ------
    list of (int, int)
        What is needed next, one round of requests: spans (start, stop) within the file that are
        not held, sorted, disjoint, and not merged where there is a gap between them. Never empty.

    Raises
    ------
    FrameError
        If it is no readable Level 2 frame, as far as it was read.
    """
    content = content.toreadonly()
    yield from _ask(held, [(0, min(layouts.head_bytes, len(content)))])
    head = yield from _repeat(lambda: open_head(content, filename, held=held))
    rows = choose_rows(head)
    if rows is None:
        return None
    if not (may_be_small or is_large(head)):
        yield from _ask(held, [(0, len(content))])
        return open_frame(content, filename)
    key = _make_key(content, held, head)
    layout = layouts.find(key)
    if layout is not None:
        yield from _ask(held, _predict(layout, len(content), rows))
    frame = yield from read_rows(content, held, filename, rows)
    layouts.remember(key, Layout(len(content), tuple(walk(content, held))))
    return frame


def read_rows(content: memoryview, held: Spans, filename: str, rows: np.ndarray) -> Reading[Frame]:
    """Read rows of a frame of which nothing need be known.

    Parameters
    ----------
    content : memoryview
        As that of `read_partly`.
    held : Spans
        As that of `read_partly`.
    filename : str
        The archive's own name of the file.
    rows : (ny,) bool array
        The rows.

    Returns
    -------
    Frame
        With these rows.

    Yields
    ------
    list of (int, int)
        As those of `read_partly`.

    Raises
    ------
    FrameError
        If it is no readable Level 2 frame.
    """
    rows = rows.copy()
    rows.flags.writeable = False
    return (yield from _repeat(lambda: open_frame(content, filename, held=held, rows=rows)))


def measure_partly(
    content: memoryview, held: Spans, frame: Frame, measure: Callable[[Frame], T]
) -> Reading[T]:
    """Measure a frame that was read in parts, and read what the measurement finds missing.

    Parameters
    ----------
    content : memoryview
        As that of `read_partly`, of which the frame is.
    held : Spans
        As that of `read_partly`.
    frame : Frame
        The frame.
    measure : callable
        Called with it. Whenever it raises `MissingRowsError` or `MissingBytesError`, it is called
        again, with a frame that has these rows, too.

    Returns
    -------
    object
        What `measure` returned.

    Yields
    ------
    list of (int, int)
        As those of `read_partly`.

    Raises
    ------
    FrameError
        If something is missing again and again; and whatever else `measure` raises.
    """
    for _ in range(MOST_ATTEMPTS):
        try:
            return measure(frame)
        except MissingRowsError as error:
            if error.rows is None or frame.rows is None:
                raise
            more = yield from read_rows(content, held, frame.filename, frame.rows | error.rows)
            frame = dataclasses.replace(frame, flags=more.flags, rows=more.rows)
        except MissingBytesError as error:
            yield from _ask(held, error.spans)
    raise FrameError(f"parts of the frame were missing {MOST_ATTEMPTS} times")


def _ask(held: Spans, wanted: Iterable[Span]) -> Reading[None]:
    """Yield what is not held, if anything is, and insist on it."""
    missing = held.find_missing(wanted)
    if missing:
        yield missing
        if held.find_missing(missing):
            raise RuntimeError(NOT_HELD)


def _repeat(attempt: Callable[[], T]) -> Reading[T]:
    """Return what a call returns when nothing that it needs is missing any more."""
    asked: set[tuple[Span, ...]] = set()
    while True:
        try:
            return attempt()
        except MissingBytesError as error:
            missing = error.spans
        if missing in asked:
            raise RuntimeError(NOT_HELD)
        asked.add(missing)
        yield list(missing)


def _make_key(content: memoryview, held: Spans, head: Frame) -> tuple[str, str]:
    """Return what frames of one layout have in common: release of the pipeline, and band."""
    primary = next(walk(content, held)).header
    return str(primary.get("VERSION", "")).partition(".")[0], head.band


def _predict(layout: Layout, size: int, rows: np.ndarray) -> list[Span]:
    """Return where the headers, the rows and the wavelengths of a frame should be.

    Files of a release differ in the length of their compressed flags, so that what is before
    them is where it was from the beginning, and what is behind them where it was from the end.
    """
    hdus: dict[str, Hdu] = {}
    spans: list[Span] = []
    shift, end = 0, 0
    for hdu in layout.hdus:
        spans.append((end + shift, hdu.data_start + shift))
        end = hdu.data_start + pad(hdu.data_size)
        hdus.setdefault(hdu.name, dataclasses.replace(hdu, data_start=hdu.data_start + shift))
        if hdu.name == "FLAGS":
            shift = size - layout.size
    with contextlib.suppress(FrameError):
        spans += list_spans(hdus, rows)
    limits = ((min(max(start, 0), size), min(max(stop, 0), size)) for start, stop in spans)
    return [span for span in limits if span[0] < span[1]]
