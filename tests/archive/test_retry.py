"""How long to wait before the archive is asked again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spxdask.archive.retry import RetryPolicy

POLICY = RetryPolicy(max_retries=3)
LONGEST = POLICY.longest_retry_after_s


@pytest.mark.parametrize(
    ("attempt", "longest"), [(1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (100, 60)]
)
def test_delay_doubles_up_to_a_minute_and_is_scattered(attempt, longest):
    delays = [POLICY.delay(attempt) for _ in range(200)]
    assert all(longest / 2 <= delay <= longest for delay in delays)
    assert max(delays) - min(delays) > longest / 4


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [("0", 0), ("7", 7), (" 7 ", 7), ("86400", LONGEST), ("9" * 400, LONGEST)],
)
def test_seconds_that_the_server_asks_for(asked, seconds):
    assert POLICY.delay(5, asked) == seconds


@pytest.mark.parametrize(("ahead_s", "seconds"), [(100, 100), (-100, 0), (1e6, LONGEST)])
@pytest.mark.parametrize("zone", [UTC, None])
def test_a_date_that_the_server_asks_for(ahead_s, seconds, zone):
    when = datetime.now(UTC) + timedelta(seconds=ahead_s)
    asked = format_datetime(when.replace(tzinfo=zone))
    assert POLICY.delay(1, asked) == pytest.approx(seconds, abs=10 if seconds == 100 else 0)


@pytest.mark.parametrize("asked", ["", "soon", "-5", "1.5", "\u00b2", "1e3", "32 Foo 2026", "nan"])
def test_what_cannot_be_read_is_as_if_not_said(asked):
    assert 0.5 <= POLICY.delay(1, asked) <= 1


@pytest.mark.parametrize(
    "asked",
    [
        "Mon, 01 Jan 99999999999 00:00:00 GMT",
        f"Mon, 01 Jan 2027 00:00:00 +{'9' * 20}",
        f"Mon, 01 Jan 2027 {'9' * 20}:00:00 GMT",
        "Mon, 01 Jan 9999 23:59:00 -9999",
    ],
)
def test_a_date_beyond_all_numbers_is_as_if_not_said(asked):
    assert 0.5 <= POLICY.delay(1, asked) <= 1


@given(
    st.integers(1, 101),
    st.none()
    | st.text()
    | st.from_regex(r"\w{3}, \d+ \w{3} \d+ [\d:]+ [+-]?\w+")
    | st.from_regex(r"Mon, [0-9]{2} Jan [0-9]+ 00:00:00 [+-][0-9]+", fullmatch=True),
)
def test_no_header_breaks_it(attempt, asked):
    assert 0 <= POLICY.delay(attempt, asked) <= LONGEST


def test_limits_are_of_the_policy():
    policy = RetryPolicy(
        max_retries=3, first_delay_s=4.0, longest_delay_s=6.0, longest_retry_after_s=9.0
    )
    assert 2 <= policy.delay(1) <= 4
    assert 3 <= policy.delay(2) <= 6
    assert policy.delay(1, "8") == 8
    assert policy.delay(1, "10") == 9
