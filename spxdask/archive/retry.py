"""When a request to the archive is repeated, and after how long."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

# HTTP status codes of errors that pass by themselves.
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often, and after what delays, a failed request is repeated.

    Attributes
    ----------
    max_retries : int
        Number of attempts after the first.
    first_delay_s : float
        Longest delay after the first attempt, in seconds. It doubles with each attempt.
    longest_delay_s : float
        Upper limit of the doubled delay, in seconds.
    longest_retry_after_s : float
        Upper limit of the delay that a server asks for, in seconds. Servers may ask for
        hours; a frame that would wait so long is better left to the next run.
    """

    max_retries: int
    first_delay_s: float = 1.0
    longest_delay_s: float = 60.0
    longest_retry_after_s: float = 600.0

    def delay(self, attempt: int, retry_after: str | None = None) -> float:
        """Return how long to wait before the next attempt.

        Parameters
        ----------
        attempt : int
            Number of attempts that have failed, 1 after the first.
        retry_after : str, optional
            The server's Retry-After header: seconds or an HTTP date. It takes precedence.

        Returns
        -------
        float
            Delay in seconds. Unless the server asked for one, it doubles with each
            attempt up to `longest_delay_s`, less a random part of up to one half, so that
            many clients do not return at the same moment.
        """
        requested = _parse_retry_after(retry_after)
        if requested is not None:
            return min(max(requested, 0.0), self.longest_retry_after_s)
        longest = min(self.first_delay_s * 2 ** (attempt - 1), self.longest_delay_s)
        return longest * random.uniform(0.5, 1.0)


def _parse_retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, None if it is unreadable."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value.strip())
    try:
        when = parsedate_to_datetime(value)
    # OverflowError: a year or a time zone beyond the range of datetime.
    except (ValueError, OverflowError):
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return (when - datetime.now(UTC)).total_seconds()
