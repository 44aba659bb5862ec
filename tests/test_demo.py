"""The demo, as the README's first command runs it."""

from __future__ import annotations

import os
import re

import pytest

from spxdask import BatchConfig
from spxdask.cli import main
from spxdask.demo import MARK
from spxdask.run.folder import RunFolder


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_demo_recovers_what_was_injected(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SPXDASK_CACHE", str(tmp_path / "cache"))
    # Files of an earlier demo may be written over, files of the user must stay.
    mine = tmp_path / "demo" / "archive" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    (tmp_path / "demo" / MARK).touch()
    (tmp_path / "demo" / "sources.csv").write_text("targetid,ra,dec\n1,2,3\n")
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    assert "SIMULATED" in out
    assert "12 frames found" in out
    assert "calibrated with cal-epsf-v1-2026-191 (D3: cal-epsf-v2-2026-191)" in out
    # Of all rows: shares of total flux that are recovered, and pulls, by aperture and by PSF.
    number = r"([+-]?\d+\.\d+)"
    rows, *values = re.search(
        rf"^all +([\d,]+) +\S+ - \S+ +{' +'.join([number] * 6)}$", out, flags=re.MULTILINE
    ).groups()
    aperture, psf, *pulls = map(float, values)
    assert rows == "3,600"
    assert abs(aperture - 1.0) < 2e-3
    assert abs(psf - 1.0) < 2e-3
    for median, scatter in (pulls[:2], pulls[2:]):
        assert abs(median) < 0.1
        assert 0.9 < scatter < 1.1
    assert float(re.search(r"error of a wavelength: (\S+) um", out)[1]) < 1e-5
    assert (tmp_path / "demo" / "spectra.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "demo").glob("archive*")] == ["archive"]
    assert mine.read_text() == "mine"
    # Simulated products are not in the user's cache.
    assert not (tmp_path / "cache").exists()
    assert os.environ["SPXDASK_CACHE"] == str(tmp_path / "cache")
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
    # That an earlier demo wrote to the folder does not matter.
    (tmp_path / MARK).touch()
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "has the files of a real run" in capsys.readouterr().err


def read_tree(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "name", ["sources.csv", "archive/raw.fits", "state/config.yaml", ".hidden"]
)
def test_demo_leaves_a_folder_with_other_files_alone(tmp_path, capsys, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = read_tree(tmp_path)
    assert main(["demo", "--output", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{tmp_path} has files that no demo wrote" in err
    assert read_tree(tmp_path) == before


def test_output_that_cannot_be_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["demo", "--output", str(tmp_path / "file")]) == 2
    assert main(["demo", "--output", "memory://demo"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 2
    assert "file: File exists" in err
    assert "is not on a disk" in err
