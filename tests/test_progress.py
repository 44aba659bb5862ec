"""What a pipeline reports while it works."""

from __future__ import annotations

from spxdask.progress import Bars


def test_links_are_printed_to_standard_error(capsys):
    bars = Bars()
    bars.start("frames", 2, "frames")
    bars.connect("dashboard   http://127.0.0.1:8787/status")
    bars.advance(failed=True)
    bars.finish()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "dashboard   http://127.0.0.1:8787/status\n"
