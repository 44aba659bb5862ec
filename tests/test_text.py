"""Numbers and times as text for people."""

from __future__ import annotations

import pytest

from spxdask.text import format_count, format_duration


@pytest.mark.parametrize(
    ("number", "words", "text"),
    [
        (0, ("frame",), "0 frames"),
        (1, ("frame",), "1 frame"),
        (2000, ("light curve",), "2,000 light curves"),
        (1, ("query", "queries"), "1 query"),
        (2, ("query", "queries"), "2 queries"),
    ],
)
def test_counts(number, words, text):
    assert format_count(number, *words) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (7190, "2 h 0 min"),
        (3599.9, "60 min"),
        (4 * 3600 - 1, "4 h 0 min"),
        (3 * 86400 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
