"""Intervals of bytes, compared with sets of numbers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spxdask.science.level2.spans import Spans, merge_cheaply, merge_spans

interval = st.tuples(st.integers(0, 40), st.integers(0, 40))
intervals = st.lists(interval, max_size=8)


def list_bytes(spans) -> set[int]:
    return {byte for start, stop in spans for byte in range(start, stop)}


def is_tidy(spans, gap=0) -> bool:
    """Whether intervals are not empty, sorted, and farther apart than a gap."""
    spans = list(spans)
    return all(start < stop for start, stop in spans) and all(
        one[1] + gap < other[0] for one, other in itertools.pairwise(spans)
    )


@given(intervals, intervals, interval)
def test_spans_are_a_set_of_bytes(added, wanted, asked):
    spans = Spans(added)
    held = list_bytes(added)
    assert list_bytes(spans) == held
    assert is_tidy(spans)
    assert spans.total == len(held)
    assert len(spans) == len(list(spans))
    assert spans.holds(*asked) == (list_bytes([asked]) <= held)
    missing = spans.find_missing(wanted)
    assert list_bytes(missing) == list_bytes(wanted) - held
    assert is_tidy(missing)
    for span in missing:
        spans.add(*span)
    assert spans.find_missing(wanted) == []
    assert spans == Spans([*wanted, *added])


@given(intervals, st.integers(0, 10))
def test_intervals_that_are_near_are_merged(spans, gap):
    merged = merge_spans(spans, gap)
    assert is_tidy(merged, gap)
    assert list_bytes(merged) >= list_bytes(spans)
    # Only bytes between two intervals are read along, and none where the gap is wider.
    plain = merge_spans(spans)
    gaps = {(a[1], b[0]) for a, b in itertools.pairwise(plain) if b[0] - a[1] <= gap}
    assert list_bytes(merged) == list_bytes(spans) | list_bytes(gaps)


def test_bytes_before_the_file_are_refused():
    with pytest.raises(ValueError, match="start must be >= 0, got -1"):
        Spans([(-1, 3)])


def test_many_small_intervals_are_quick():
    spans = Spans((i * 10, i * 10 + 5) for i in range(20_000))
    assert spans.total == 100_000
    assert len(spans.find_missing([(0, 200_000)])) == 20_000


@given(intervals, st.integers(0, 10), st.sampled_from([0.0, 0.05, 0.5]))
def test_gaps_that_are_read_along_are_short_and_few(spans, gap, share):
    plain = merge_spans(spans)
    merged = merge_cheaply(spans, gap, share)
    wanted, come = (sum(stop - start for start, stop in some) for some in (plain, merged))
    assert come - wanted <= share * wanted
    assert Spans(merged).find_missing(plain) == []
    assert merge_spans(merged) == merged
    bridged = [
        after[0] - before[1]
        for before, after in itertools.pairwise(plain)
        if Spans(merged).holds(before[1], after[0])
    ]
    assert all(length <= gap for length in bridged)
    assert len(merged) == len(plain) - len(bridged)


def test_the_shortest_gaps_come_first():
    spans = [(0, 100), (104, 200), (202, 300)]
    assert merge_cheaply(spans, 10, 0.01) == [(0, 100), (104, 300)]
    assert merge_cheaply(spans, 10, 0.02) == [(0, 100), (104, 300)]
    assert merge_cheaply(spans, 10, 0.03) == [(0, 300)]
    assert merge_cheaply(spans, 3, 0.03) == [(0, 100), (104, 300)]
