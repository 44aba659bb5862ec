"""How fast the archive answers and sends, measured over what this process transfers."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable

# Taken for granted before anything is measured: the archive's bucket, seen from its region.
DEFAULT_LATENCY_S = 0.02
DEFAULT_BANDWIDTH = 20e6
# So many of the last requests and bodies count.
REQUESTS_REMEMBERED = 32
# The defaults count as one body of this length.
DEFAULT_BODY_BYTES = 1 << 20
# What is left of a shorter body after its first bytes was in the same packets.
SHORTEST_BODY_BYTES = 64 << 10
# Limits of the gap that is cheaper to read than to leave out, whatever was measured.
SHORTEST_GAP_BYTES = 8 << 10
LONGEST_GAP_BYTES = 1 << 19
# All gaps that are read along, as a share of the bytes that are asked for at the same time.
LARGEST_GAP_SHARE = 0.05


class Link:
    """What a request and a byte cost; safe for threads.

    The bandwidth is that of one transfer beside those that go on at the same time, and so is the
    time that a request would take from it.

    Parameters
    ----------
    latency_s : float
        Seconds of a request before anything is measured.
    bandwidth : float
        Bytes a second before anything is measured.
    clock : callable
        Returns the time, s.
    """

    def __init__(
        self,
        *,
        latency_s: float = DEFAULT_LATENCY_S,
        bandwidth: float = DEFAULT_BANDWIDTH,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._default_latency_s = latency_s
        self._latencies_s: deque[float] = deque(maxlen=REQUESTS_REMEMBERED)
        # Bytes and seconds of each body. The default is forgotten like a measured one.
        self._bodies = deque(
            [(DEFAULT_BODY_BYTES, DEFAULT_BODY_BYTES / bandwidth)], maxlen=REQUESTS_REMEMBERED
        )

    @property
    def latency_s(self) -> float:
        """Seconds from a request to the first bytes of its answer.

        Returns
        -------
        float
            The median of the last requests, of which the first to a server takes longer.
        """
        with self._lock:
            return statistics.median(self._latencies_s or [self._default_latency_s])

    @property
    def bandwidth(self) -> float:
        """Bytes a second of one answer, once they come.

        Returns
        -------
        float
            The mean of the last answers, each weighted by its length.
        """
        with self._lock:
            seconds = sum(seconds for _, seconds in self._bodies)
            return sum(count for count, _ in self._bodies) / max(seconds, 1e-9)

    @property
    def cheap_gap_bytes(self) -> int:
        """Number of bytes that come in the time that one more request takes.

        Returns
        -------
        int
            From 8 KiB to 512 KiB, whatever was measured.
        """
        gap = int(self.latency_s * self.bandwidth)
        return min(max(gap, SHORTEST_GAP_BYTES), LONGEST_GAP_BYTES)

    def start(self) -> Timing:
        """Begin to time a request, which is sent now.

        Returns
        -------
        Timing
        """
        return Timing(self, self._clock)

    def note(
        self, *, latency_s: float | None = None, body: tuple[int, float] | None = None
    ) -> None:
        """Take note of what was measured.

        Parameters
        ----------
        latency_s : float, optional
            Seconds from a request to its answer.
        body : (int, float), optional
            Bytes that followed the first ones of an answer, and the seconds they took.
        """
        with self._lock:
            if latency_s is not None:
                self._latencies_s.append(latency_s)
            if body is not None:
                self._bodies.append(body)


class Timing:
    """The times of one request, which `Link.start` begins.

    Parameters
    ----------
    link : Link
        Gets what is measured.
    clock : callable
        Returns the time, s.
    """

    def __init__(self, link: Link, clock: Callable[[], float]) -> None:
        self._link, self._clock = link, clock
        self._started = clock()
        self._first_at: float | None = None
        self._last_at = 0.0
        self._count = 0

    def note_answer(self) -> None:
        """Note that the answer begins now."""
        self._link.note(latency_s=self._clock() - self._started)

    def note_bytes(self, count: int) -> None:
        """Note that bytes of the body have come.

        Parameters
        ----------
        count : int
            How many.
        """
        if self._first_at is None:
            self._first_at = self._clock()
            return
        self._last_at = self._clock()
        self._count += count

    def finish(self) -> None:
        """Note that no more bytes will come, be it because they stalled."""
        if self._first_at is not None and self._count >= SHORTEST_BODY_BYTES:
            self._link.note(body=(self._count, self._last_at - self._first_at))
        self._count = 0


# Of all transfers of this process.
LINK = Link()
