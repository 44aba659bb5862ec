"""Whether a frame is read whole or by rows: what its numbers depend on, and what its speed does.

Two decisions are kept apart. Which pixels the zodiacal fit and the median variance see changes
numbers: it follows from frame, sources and options alone (`RowRule`), so that a run that
was killed and resumed ends with the same bytes. By which requests these pixels come changes
nothing but the time, and is decided by what the link to the archive has shown (`choose_way`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from spxdask.archive.link import LARGEST_GAP_SHARE
from spxdask.science.level2.spans import merge_cheaply

Way = Literal["whole", "rows"]
ReadOption = Literal["auto", "whole", "rows"]

# Below this share of the rows, it is left to the speed of the link whether they are read. Above it,
# they would save less than a tenth of the time at best: the four planes are 93 % of a file.
LARGEST_SHARE = 0.98
# Shorter files are read whole, such as cut-outs.
LEAST_FILE_BYTES = 8_000_000
# IMAGE, FLAGS, VARIANCE and ZODI have each row of pixels in a place of its own.
PLANES = 4
# Requests that a frame takes besides those for rows of pixels: the head of the file, five headers
# and the wavelengths that follow the last.
HEADERS = 6


@dataclass(frozen=True, kw_only=True)
class RowRule:
    """Of which frames only the rows are used that their sources need.

    Attributes
    ----------
    largest_share : float
        Of frames of whose rows a larger share is needed, all are used.
    least_file_bytes : int
        Of shorter files, all are used.
    """

    largest_share: float = LARGEST_SHARE
    least_file_bytes: int = LEAST_FILE_BYTES

    def applies(self, rows: np.ndarray, file_bytes: int) -> bool:
        """Return whether only some rows of a frame are used.

        Parameters
        ----------
        rows : (ny,) bool array
            The rows that its sources need.
        file_bytes : int
            Length of its file.

        Returns
        -------
        bool
        """
        is_long = file_bytes >= self.least_file_bytes
        return bool(is_long and rows.mean() <= self.largest_share)


def make_row_rule(read: ReadOption, *, is_kept: bool) -> RowRule | None:
    """Return the rule that the options of a run stand for.

    Parameters
    ----------
    read : {"auto", "whole", "rows"}
        The option.
    is_kept : bool
        Whether frames are kept, and so come whole.

    Returns
    -------
    RowRule or None
        None if all rows of every frame are used.
    """
    if is_kept or read == "whole":
        return None
    return RowRule(largest_share=1.0) if read == "rows" else RowRule()


def choose_way(
    *,
    file_bytes: int,
    wanted_bytes: int,
    n_requests: int,
    latency_s: float,
    bandwidth: float,
    largest_share: float = LARGEST_SHARE,
) -> Way:
    """Choose how the rows of a frame come faster: by themselves, or with the whole file.

    Both are counted as the time in which they keep connections busy, as it is these that a run has
    only so many of.

    Parameters
    ----------
    file_bytes : int
        Length of the file.
    wanted_bytes : int
        Bytes of the rows, and of what is read with them.
    n_requests : int
        Requests that these take.
    latency_s : float
        Seconds of a request without its bytes.
    bandwidth : float
        Bytes a second of a connection.
    largest_share : float
        Rows that are a larger share of the file are not worth their requests.

    Returns
    -------
    {"whole", "rows"}
    """
    if wanted_bytes > largest_share * file_bytes:
        return "whole"
    by_rows = n_requests * latency_s + wanted_bytes / bandwidth
    return "rows" if by_rows <= latency_s + file_bytes / bandwidth else "whole"


def count_requests(rows: np.ndarray, row_bytes: int, gap_bytes: int) -> tuple[int, int]:
    """Estimate what it takes to read rows of the planes of a frame.

    Parameters
    ----------
    rows : (ny,) bool array
        The rows.
    row_bytes : int
        Bytes of a row of one plane.
    gap_bytes : int
        A gap of so many bytes is read along.

    Returns
    -------
    n_requests, n_bytes : int
        Requests, those of the other rounds included, and bytes, those of the gaps included.
    """
    at = row_bytes * np.flatnonzero(rows)
    spans = ((start, start + row_bytes) for start in at.tolist())
    merged = merge_cheaply(spans, gap_bytes, LARGEST_GAP_SHARE)
    n_bytes = sum(stop - start for start, stop in merged)
    return PLANES * (len(merged) or 1) + HEADERS, PLANES * n_bytes
