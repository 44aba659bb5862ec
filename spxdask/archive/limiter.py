"""How many requests this process makes at once."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress


class RequestLimiter:
    """Lets a number of requests through at once, the others in the order in which they came.

    All requests are made on one event loop. The limit may be changed at any time and from any
    thread; what is under way goes on.

    Parameters
    ----------
    limit : float
        Requests at once, at least 1.

    Attributes
    ----------
    limit : float
        As given.
    n_expected : int
        Requests that are under way, wait for their turn, or are announced by `announce`.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.limit = limit
        self.n_expected = 0
        self._counting = threading.Lock()
        self._n_active = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @contextmanager
    def announce(self) -> Iterator[None]:
        """Count one more request as expected, until the block ends; in any thread.

        Yields
        ------
        None
        """
        with self._counting:
            self.n_expected += 1
        try:
            yield
        finally:
            with self._counting:
                self.n_expected -= 1

    @asynccontextmanager
    async def take_turn(self) -> AsyncIterator[None]:
        """Wait until one more request may be made, which is over when the block ends.

        Yields
        ------
        None
        """
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._admit()
        try:
            with self.announce():
                await turn
                yield
        finally:
            if turn.done() and not turn.cancelled():
                self._n_active -= 1
            else:
                with suppress(ValueError):
                    self._waiting.remove(turn)
            self._admit()

    def _admit(self) -> None:
        """Let those through that may be."""
        while self._waiting and self._n_active < max(self.limit, 1):
            turn = self._waiting.popleft()
            if not turn.cancelled():
                self._n_active += 1
                turn.set_result(None)


# Of all transfers of this process.
REQUESTS = RequestLimiter()
