"""The account of a run in words."""

from __future__ import annotations

from collections import Counter

import pytest

from spxdask.run.summary import RunSummary, StageReport, describe_stage


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (StageReport(stage="query", total=1, bytes=71_600_000), "1 frame found, 0.0716 GB"),
        (StageReport(stage="query"), "no frame covers the field"),
        (StageReport(stage="download", total=3, done=1, reused=1), "2 of 3 frames (1 already"),
        (StageReport(stage="download", total=2, reused=2), "2 frames (already there)"),
        (StageReport(stage="extract", total=1, done=1, rows=1), "1 of 1 frame, 1 row"),
        (StageReport(stage="extract", total=1, reused=1, rows=9), "1 frame, 9 rows (already there"),
        (StageReport(stage="extract"), "nothing to do"),
        (StageReport(stage="aggregate", total=1, done=1, rows=20), "1 light curve, 20 rows"),
        (
            StageReport(stage="aggregate", total=300, reused=300, rows=5_400),
            "300 light curves, 5,400 rows (already there)",
        ),
    ],
)
def test_line_of_a_stage(report, text):
    assert describe_stage(report).startswith(f"{report.stage:<11} {text}")


@pytest.mark.parametrize(
    ("n", "left_out", "skipped"),
    [
        (1, "1 frame not included: not measured", "1 measurement left out: off the detector"),
        (2, "2 frames not included: not measured", "2 measurements left out: off the detector"),
    ],
)
def test_lines_for_what_is_missing(n, left_out, skipped):
    report = StageReport(stage="aggregate", left_out=n, skipped=Counter({"off the detector": n}))
    lines = describe_stage(report).splitlines()
    assert [line.strip() for line in lines[1:]] == [left_out, skipped]


def test_a_stage_that_did_nothing_has_no_rate():
    done = StageReport(stage="aggregate", total=3, done=3, rows=9, seconds=1.0)
    reused = StageReport(stage="aggregate", total=3, reused=3, rows=9, seconds=1.0)
    assert ("rows/s" in repr(done), "rows/s" in repr(reused)) == (True, False)


def test_failed_frames_are_listed_up_to_ten():
    failed = {f"frame-{i:02d}.fits": "HTTP 404" for i in range(12)}
    report = StageReport(stage="download", total=12, failed=failed)
    summary = RunSummary(stages={"download": report}, n_sources=3, output="out")
    lines = str(summary).splitlines()
    assert "failed      12 frames" in lines
    assert sum("download: HTTP 404" in line for line in lines) == 10
    assert f"{'':<12}and 2 more, see the ledger in state/" in lines


@pytest.mark.parametrize(
    ("by_rows", "text"),
    [
        (0, None),
        (2, "fetched 1.6 GB of 71 GB, by rows"),
        (1, "fetched 1.6 GB of 71 GB, 1 of 2 frames by rows"),
    ],
)
def test_how_much_of_the_frames_came(by_rows, text):
    sizes = {"bytes": 1_600_000_000, "file_bytes": 71_000_000_000}
    report = StageReport(stage="download", total=2, done=2, by_rows=by_rows, **sizes)
    assert [line.strip() for line in repr(report).splitlines()[1:]] == [text] * (text is not None)


def test_an_archive_that_sends_no_parts_is_named_once():
    report = StageReport(stage="download", total=2, done=2, refusal="HTTP 200")
    assert repr(report).count("HTTP 200") == 1
