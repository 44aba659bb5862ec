"""A frame that is read in parts from the bytes of its file, with garbage in place of the others."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from spxdask.science.level2.frame import Frame
from spxdask.science.level2.partial import Layouts, measure_partly, read_partly
from spxdask.science.level2.spans import Span, Spans


class PartlyRead:
    """The bytes of a file that were asked for, and what was asked for in each round."""

    def __init__(self, whole: bytes, *, garbage: bytes = b"\xff\xc3\x00\x41\x7f") -> None:
        self.whole = memoryview(whole)
        filling = garbage * (len(whole) // len(garbage) + 1)
        self.content = memoryview(bytearray(filling[: len(whole)]))
        self.held = Spans()
        self.rounds: list[list[Span]] = []

    def drive(self, reading: Generator[list[Span], None, Any]) -> Any:
        """Run a generator to its end, and return its result."""
        try:
            while True:
                spans = next(reading)
                assert spans == self.held.find_missing(spans), "asked for what is held"
                assert all(0 <= start < stop <= len(self.whole) for start, stop in spans)
                self.rounds.append(spans)
                for start, stop in spans:
                    self.content[start:stop] = self.whole[start:stop]
                    self.held.add(start, stop)
        except StopIteration as end:
            return end.value

    def read(self, choose_rows, layouts: Layouts | None = None, **options) -> Frame | None:
        layouts = Layouts() if layouts is None else layouts
        options = {"may_be_small": True} | options
        return self.drive(
            read_partly(self.content, self.held, "a.fits", choose_rows, layouts, **options)
        )

    def measure(self, frame: Frame, measure) -> Any:
        return self.drive(measure_partly(self.content, self.held, frame, measure))


def pick(ny: int, *bands: tuple[int, int]) -> np.ndarray:
    """Return a mask of rows."""
    rows = np.zeros(ny, bool)
    for first, last in bands:
        rows[first:last] = True
    return rows
