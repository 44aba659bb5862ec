"""Messages that would be repeated for each of a thousand frames, a few of them shown."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

# Kinds of messages that are remembered; servers make up their own.
MAX_KINDS = 1000


class Throttle(logging.Filter):
    """Lets one record of a kind pass in a while, with the number of those that did not.

    Records have their kind in the attribute `kind`, and pass always without one or where
    debugging is on. A record may pass the filters of two processes: `single_message` is its text
    without the number, and `n_similar` the number.

    Parameters
    ----------
    interval_s : float
        Least time between two records of a kind, s.
    clock : callable
        Returns the time, s.
    """

    def __init__(
        self, interval_s: float = 10.0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        # When a kind was shown last, and how many were not shown since.
        self._shown: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is shown.

        Parameters
        ----------
        record : logging.LogRecord
            Its text gets the number of similar ones that were not shown before it.

        Returns
        -------
        bool
        """
        kind = getattr(record, "kind", None)
        if kind is None or logging.getLogger(record.name).isEnabledFor(logging.DEBUG):
            return True
        n_similar = getattr(record, "n_similar", 0)
        with self._lock:
            now = self._clock()
            if len(self._shown) > MAX_KINDS:
                self._shown.clear()
            if kind in self._shown:
                shown_at, n_hidden = self._shown[kind]
                n_similar += n_hidden
                if now - shown_at < self._interval_s:
                    self._shown[kind] = (shown_at, n_similar + 1)
                    return False
            self._shown[kind] = (now, 0)
        message = record.getMessage()
        record.single_message, record.n_similar = message, n_similar
        if n_similar:
            record.msg, record.args = f"{message} ({n_similar:,} more like this before)", None
        return True
