"""What a pipeline reports while it works."""

from __future__ import annotations

import pytest

from spxdask.progress import Bars, format_duration


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


def test_links_are_printed_to_standard_error(capsys):
    bars = Bars()
    bars.start("frames", 2, "frames")
    bars.connect("dashboard   http://127.0.0.1:8787/status")
    bars.advance(failed=True)
    bars.finish()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "dashboard   http://127.0.0.1:8787/status\n"
