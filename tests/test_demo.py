"""The demo, as the README's first command runs it."""

from __future__ import annotations

import re

import pytest

from spxdask import BatchConfig
from spxdask.cli import main
from spxdask.runfolder import RunFolder


@pytest.mark.timeout(400)
def test_demo_recovers_what_was_injected(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    assert "SIMULATED" in out
    assert "18 frames found" in out
    rows, median, scatter = re.search(
        r"^all +([\d,]+) .* ([+-]\d\.\d+) +(\d\.\d+)$", out, flags=re.MULTILINE
    ).groups()
    assert rows == "5,400"
    assert abs(float(median)) < 0.1
    assert 0.9 < float(scatter) < 1.1
    assert float(re.search(r"error of a wavelength: (\S+) um", out)[1]) < 1e-4
    assert (tmp_path / "demo" / "spectra.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "demo" / "archive").exists()
    assert len(list((tmp_path / "demo" / "lightcurves").iterdir())) == 300


def test_demo_leaves_a_real_run_alone(tmp_path, capsys):
    config = BatchConfig(
        center_ra=1.0,
        center_dec=1.0,
        radius=1.0,
        catalog_path="x.csv",
        tap_url="https://example.org/TAP",
    )
    folder = RunFolder(tmp_path)
    with folder.locked():
        folder.save_config(config)
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "holds a real run" in capsys.readouterr().err
