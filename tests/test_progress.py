"""What a pipeline reports while it works."""

from __future__ import annotations

import io

from spxdask.progress import Bars, Lines


def test_lines_are_at_most_one_a_minute_and_tell_what_is_left():
    file, seconds = io.StringIO(), [0.0]
    lines = Lines(file, clock=lambda: seconds[0])
    lines.note("compiling")
    lines.start("frames", 400, "frames")
    for _ in range(240):
        seconds[0] += 0.5
        lines.receive(50_000_000)
        lines.advance(failed=seconds[0] == 10)
    seconds[0] += 60
    lines.wait("the archive does not answer")
    lines.finish()
    assert file.getvalue().splitlines() == [
        "compiling",
        "frames: 120 of 400 frames, 1 failed, 2/s, 6 GB, 140 s left".replace("140 s", "2 min"),
        "frames: 240 of 400 frames, 1 failed, 2/s, 12 GB, 80 s left",
        "frames: waiting: the archive does not answer",
    ]


def test_waiting_for_the_first_frame_is_no_rate():
    file, seconds = io.StringIO(), [0.0]
    lines = Lines(file, clock=lambda: seconds[0])
    lines.start("frames", 100, "frames")
    seconds[0] += 100
    lines.advance()
    for _ in range(60):
        seconds[0] += 1
        lines.advance()
    assert file.getvalue().splitlines() == [
        "frames: 1 of 100 frames",
        "frames: 61 of 100 frames, 1/s, 39 s left",
    ]


def test_links_are_printed_to_standard_error(capsys):
    bars = Bars()
    bars.start("frames", 2, "frames")
    bars.connect("dashboard   http://127.0.0.1:8787/status")
    bars.advance(failed=True)
    bars.finish()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "dashboard   http://127.0.0.1:8787/status\n"
