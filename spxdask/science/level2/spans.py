"""Which bytes of a file are held in memory: intervals, half open as slices are."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise

__all__ = ["Span", "Spans", "merge_cheaply", "merge_spans"]

Span = tuple[int, int]
"""The first byte, and the one after the last."""


class Spans:
    """Sorted, disjoint intervals of bytes; those that touch are one.

    It is not safe for threads that add to it at the same time.

    Parameters
    ----------
    spans : iterable of (int, int), optional
        Intervals to begin with, in any order.
    """

    __slots__ = ("_starts", "_stops")

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in spans:
            self.add(start, stop)

    def __iter__(self) -> Iterator[Span]:
        return zip(list(self._starts), list(self._stops), strict=True)

    def __len__(self) -> int:
        return len(self._starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spans) and list(self) == list(other)

    def __hash__(self) -> int:
        raise TypeError("unhashable type: 'Spans'")

    def __repr__(self) -> str:
        return f"Spans({list(self)})"

    @property
    def total(self) -> int:
        """Number of bytes in all intervals."""
        return sum(self._stops) - sum(self._starts)

    def add(self, start: int, stop: int) -> None:
        """Add an interval; what is there already stays, and an empty one changes nothing.

        Parameters
        ----------
        start, stop : int
            First byte, and the one after the last.

        Raises
        ------
        ValueError
            If it begins before the file does.
        """
        if start < 0:
            raise ValueError(f"start must be >= 0, got {start}")
        if start >= stop:
            return
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def holds(self, start: int, stop: int) -> bool:
        """Return whether every byte of an interval is there; an empty one always is.

        Parameters
        ----------
        start, stop : int
            First byte, and the one after the last.

        Returns
        -------
        bool
        """
        if start >= stop:
            return True
        i = bisect_right(self._starts, start) - 1
        return i >= 0 and stop <= self._stops[i]

    def find_missing(self, wanted: Iterable[Span]) -> list[Span]:
        """Return the parts of some intervals that are not there.

        Parameters
        ----------
        wanted : iterable of (int, int)
            Intervals, in any order; they may overlap.

        Returns
        -------
        list of (int, int)
            Sorted, disjoint, and not touching.
        """
        missing: list[Span] = []
        for start, stop in merge_spans(wanted):
            i = bisect_right(self._stops, start)
            while i < len(self._starts) and self._starts[i] < stop:
                if start < self._starts[i]:
                    missing.append((start, self._starts[i]))
                start = self._stops[i]
                i += 1
            if start < stop:
                missing.append((start, stop))
        return missing


def merge_spans(spans: Iterable[Span], gap: int = 0) -> list[Span]:
    """Merge intervals that overlap, touch, or are near one another.

    Parameters
    ----------
    spans : iterable of (int, int)
        Intervals, in any order; empty ones are left out.
    gap : int
        Two intervals with no more than this many bytes between them become one, which has these
        bytes, too.

    Returns
    -------
    list of (int, int)
        Sorted and disjoint.
    """
    merged: list[Span] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((start, stop))
    return merged


def merge_cheaply(spans: Iterable[Span], gap: int, share: float) -> list[Span]:
    """Merge intervals where the gap between them is cheaper than one more request.

    Parameters
    ----------
    spans : iterable of (int, int)
        Intervals, in any order; empty ones are left out.
    gap : int
        A gap of no more than this many bytes is cheaper.
    share : float
        All gaps together have at most this share of the bytes that are wanted. The shortest come
        first.

    Returns
    -------
    list of (int, int)
        Sorted and disjoint.
    """
    apart = merge_spans(spans)
    left = share * sum(stop - start for start, stop in apart)
    gaps = sorted((after[0] - before[1], k) for k, (before, after) in enumerate(pairwise(apart)))
    bridged = []
    for length, k in gaps:
        if length > min(gap, left):
            break
        left -= length
        bridged.append((apart[k][0], apart[k + 1][1]))
    return merge_spans([*apart, *bridged])
