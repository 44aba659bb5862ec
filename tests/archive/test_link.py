"""What a request and a byte cost, by a clock that the tests set."""

from __future__ import annotations

import pytest

from spxdask.archive.link import (
    LONGEST_GAP_BYTES,
    REQUESTS_REMEMBERED,
    SHORTEST_GAP_BYTES,
    Link,
)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def make_request(link, clock, latency_s, n_bytes=0, seconds=0.0, n_chunks=10):
    timing = link.start()
    clock.now += latency_s
    timing.note_answer()
    # The first bytes come with the headers, and say nothing of the bandwidth.
    timing.note_bytes(1_000)
    for _ in range(n_chunks if n_bytes else 0):
        clock.now += seconds / n_chunks
        timing.note_bytes(n_bytes // n_chunks)
    timing.finish()


def test_before_anything_is_measured():
    link = Link(latency_s=0.1, bandwidth=1e6)
    assert (link.latency_s, link.cheap_gap_bytes) == (0.1, 100_000)
    assert link.bandwidth == pytest.approx(1e6)
    assert (Link().latency_s, Link().cheap_gap_bytes) == (0.02, 400_000)


def test_latency_is_that_of_a_usual_request(clock):
    link = Link(clock=clock)
    # The first has to connect, and one waits for a busy server.
    for seconds in (0.9, 0.3, 0.1, 0.1, 0.1, 30.0, 0.1):
        make_request(link, clock, seconds)
    assert link.latency_s == pytest.approx(0.1)


def test_bandwidth_is_that_of_bodies_without_their_first_bytes(clock):
    link = Link(clock=clock)
    for _ in range(REQUESTS_REMEMBERED):
        make_request(link, clock, 5.0, n_bytes=500_000, seconds=0.25)
    assert link.bandwidth == pytest.approx(2e6)
    # What came before is forgotten.
    for _ in range(REQUESTS_REMEMBERED):
        make_request(link, clock, 5.0, n_bytes=500_000, seconds=0.5)
    assert link.bandwidth == pytest.approx(1e6)


def test_short_bodies_say_nothing_of_the_bandwidth(clock):
    link = Link(clock=clock)
    for _ in range(100):
        make_request(link, clock, 0.1, n_bytes=10_000, seconds=1e-6)
    assert link.bandwidth == pytest.approx(20e6)


def test_a_stall_does_not_count(clock):
    link = Link(clock=clock)
    timing = link.start()
    timing.note_answer()
    timing.note_bytes(1)
    clock.now += 1.0
    timing.note_bytes(100_000)
    clock.now += 600.0
    timing.finish()
    timing.finish()
    default_bytes = 1 << 20
    expected = (default_bytes + 100_000) / (default_bytes / 20e6 + 1.0)
    assert link.bandwidth == pytest.approx(expected)


@pytest.mark.parametrize(
    ("latency_s", "bandwidth", "gap"),
    [
        (1e-5, 1e6, SHORTEST_GAP_BYTES),
        (0.15, 2e6, 300_000),
        (10.0, 1e9, LONGEST_GAP_BYTES),
    ],
)
def test_the_gap_that_is_cheaper_than_a_request(latency_s, bandwidth, gap):
    assert Link(latency_s=latency_s, bandwidth=bandwidth).cheap_gap_bytes == pytest.approx(gap)


def test_bytes_that_come_in_no_time(clock):
    link = Link(clock=clock)
    for _ in range(REQUESTS_REMEMBERED):
        make_request(link, clock, 0.0, n_bytes=1_000_000, seconds=0.0)
    assert link.bandwidth > 0
    assert link.cheap_gap_bytes == SHORTEST_GAP_BYTES
