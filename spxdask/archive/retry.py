"""When to ask the archive again, and after how long."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 60.0
# A server may ask for hours; a frame that waits that long is better left to the next run.
LONGEST_RETRY_AFTER_S = 600.0

TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


def delay(attempt: int, retry_after: str | None = None) -> float:
    """Return the seconds to wait before trying again.

    Parameters
    ----------
    attempt : int
        How many attempts have failed, 1 after the first.
    retry_after : str, optional
        The server's Retry-After header, seconds or an HTTP date; it takes precedence.

    Returns
    -------
    float
        Else the delay doubles each time up to a minute, with up to half of it taken off
        at random so that many clients do not come back together.
    """
    asked = _retry_after_seconds(retry_after)
    if asked is not None:
        return min(max(asked, 0.0), LONGEST_RETRY_AFTER_S)
    longest = min(FIRST_DELAY_S * 2 ** (attempt - 1), LONGEST_DELAY_S)
    return longest * random.uniform(0.5, 1.0)


def _retry_after_seconds(value: str | None) -> float | None:
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    # A year or a zone may be beyond all numbers.
    except (ValueError, OverflowError):
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return (when - datetime.now(UTC)).total_seconds()
