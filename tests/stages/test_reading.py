"""Which way a frame is read: pure decisions."""

from __future__ import annotations

import numpy as np
import pytest

from spxdask.archive.link import LONGEST_GAP_BYTES
from spxdask.science.rows import find_spread_rows
from spxdask.stages.reading import HEADERS, RowRule, choose_way, count_requests, make_row_rule

FILE = 71_600_000
# The bucket from its region, and IRSA.
BUCKET = {"latency_s": 0.02, "bandwidth": 20e6}
IRSA = {"latency_s": 0.15, "bandwidth": 2e6}
NEAR = {"latency_s": 1e-4, "bandwidth": 2e9}


def rows_at(*starts: int, height: int = 56, ny: int = 2040) -> np.ndarray:
    rows = np.zeros(ny, bool)
    for start in starts:
        rows[start : start + height] = True
    return rows


@pytest.mark.parametrize(
    ("link", "wanted", "n_requests", "way"),
    [
        (BUCKET, 3_000_000, 8, "rows"),
        (IRSA, 3_000_000, 8, "rows"),
        (NEAR, 3_000_000, 8, "rows"),
        # Half of the bytes in so many requests that they take as long as the other half.
        (BUCKET, 35_800_000, 80, "rows"),
        (BUCKET, 35_800_000, 100, "whole"),
        (IRSA, 35_800_000, 100, "rows"),
        (IRSA, 35_800_000, 140, "whole"),
        # The share of the file limits it, whatever requests cost.
        (BUCKET, 70_000_000, 1, "rows"),
        (BUCKET, 71_000_000, 1, "whole"),
        (NEAR, FILE, 1, "whole"),
    ],
)
def test_the_way_that_keeps_connections_busy_for_less_time(link, wanted, n_requests, way):
    assert way == choose_way(file_bytes=FILE, wanted_bytes=wanted, n_requests=n_requests, **link)


@pytest.mark.parametrize("link", [BUCKET, IRSA, NEAR])
@pytest.mark.parametrize("height", [1, 10, 56])
def test_it_is_never_much_slower_than_the_better_way(link, height):
    rng = np.random.default_rng(1)
    gap = int(link["latency_s"] * link["bandwidth"])
    for n_sources in (1, 3, 10, 30, 100, 300, 1000):
        rows = rows_at(*rng.integers(0, 2040 - height, n_sources), height=height)
        n_requests, wanted = count_requests(rows, 8160, gap)
        costs = {
            "rows": n_requests * link["latency_s"] + wanted / link["bandwidth"],
            "whole": link["latency_s"] + FILE / link["bandwidth"],
        }
        way = choose_way(file_bytes=FILE, wanted_bytes=wanted, n_requests=n_requests, **link)
        assert costs[way] <= 1.1 * min(costs.values()) + 5 * link["latency_s"]


def test_requests_are_counted_by_runs_of_rows():
    assert count_requests(rows_at(), 8160, 0) == (4 + HEADERS, 0)
    assert count_requests(rows_at(5), 8160, 0) == (4 + HEADERS, 4 * 56 * 8160)
    assert count_requests(rows_at(5, 100), 8160, 0) == (8 + HEADERS, 8 * 56 * 8160)
    # 5 rows between them, which are less than a twentieth.
    assert count_requests(rows_at(5, 66), 8160, 5 * 8160 - 1)[0] == 8 + HEADERS
    assert count_requests(rows_at(5, 66), 8160, 5 * 8160) == (4 + HEADERS, 4 * 117 * 8160)
    # Gaps that are more than a twentieth are not read along, whatever requests cost.
    assert count_requests(rows_at(5, 67), 8160, 1 << 30)[0] == 8 + HEADERS
    # Rows that overlap are one run.
    assert count_requests(rows_at(5, 40), 8160, 0) == (4 + HEADERS, 4 * 91 * 8160)


def test_one_source_takes_few_bytes_and_requests_wherever_it_is():
    """With a window of 50 pixels, and gaps as cheap as they can be."""
    for y in range(26, 2013):
        rows = rows_at(y - 25, height=50) | find_spread_rows(2040)
        n_requests, n_bytes = count_requests(rows, 8160, LONGEST_GAP_BYTES)
        assert n_requests <= 9 * 4 + HEADERS
        assert n_bytes < 2_600_000


def test_the_rule_of_numbers_knows_nothing_of_the_link():
    few, many = rows_at(0, 900), rows_at(*range(0, 2000, 50))
    auto = make_row_rule("auto", is_kept=False)
    assert auto is not None
    assert (auto.applies(few, FILE), auto.applies(many, FILE)) == (True, False)
    # Cut-outs are whole.
    assert not auto.applies(few, 1_000_000)
    always = make_row_rule("rows", is_kept=False)
    assert always is not None
    assert always.applies(many, FILE)
    assert not always.applies(few, 1_000_000)


@pytest.mark.parametrize(("read", "is_kept"), [("whole", False), ("rows", True), ("auto", True)])
def test_frames_that_are_kept_or_asked_for_whole_have_no_rule(read, is_kept):
    assert make_row_rule(read, is_kept=is_kept) is None


def test_the_share_is_that_of_the_rows():
    rows = np.arange(10) < 9
    assert RowRule(least_file_bytes=0).applies(rows, 1)
    assert not RowRule(least_file_bytes=0, largest_share=0.89).applies(rows, 1)
