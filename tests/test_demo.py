"""The demo, as the README's first command runs it."""

from __future__ import annotations

import functools
import os
import re

import numpy as np
import pytest

import spxdask
from spxdask import BatchConfig, demo
from spxdask.cli import main
from spxdask.demo import (
    FIRST_ID,
    MARK,
    VISIT_ORDER,
    _list_exposures,
    _make_sky,
    robust_scatter,
)
from spxdask.run.folder import RunFolder
from spxdask.science.channels import PUBLISHED_CHANNELS

# Of both releases, and that with the longest wavelengths; all are cut-outs of the field.
VISITS = (1, 4, 6, 9, 12, 15)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_demo_recovers_what_was_injected(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SPXDASK_CACHE", str(tmp_path / "cache"))
    # Fewer visits than a user's demo makes.
    monkeypatch.setattr(demo, "run_demo", functools.partial(demo.run_demo, visits=VISITS))
    # Files of an earlier demo may be written over, files of the user must stay.
    mine = tmp_path / "demo" / "archive" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    (tmp_path / "demo" / MARK).touch()
    (tmp_path / "demo" / "sources.csv").write_text("targetid,ra,dec\n1,2,3\n")
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    assert "SIMULATED" in out
    # The older release of one of them is left out.
    assert "36 frames found" in out
    assert "calibrated with cal-epsf-v1-2026-191 (D3: cal-epsf-v2-2026-191)" in out
    assert max(map(len, out.splitlines())) <= max(80, len(str(tmp_path)) + 40)
    # Of all rows: shares of total flux that are recovered, and pulls, by PSF and by aperture.
    number = r"([+-]?\d+\.\d+)"
    rows, *values = re.search(
        rf"^all +([\d,]+) +\S+-\S+ +{' +'.join([number] * 6)}$", out, flags=re.MULTILINE
    ).groups()
    assert rows == "4,470"
    for ratio, median, scatter in (map(float, values[:3]), map(float, values[3:])):
        assert abs(ratio - 1.0) < 1e-3
        assert abs(median) < 0.1
        assert 0.9 < scatter < 1.1
    assert float(re.search(r"error of a wavelength: (\S+) um", out)[1]) < 1e-5
    for name in ("spectra.png", "checks.png"):
        assert (tmp_path / "demo" / name).read_bytes().startswith(b"\x89PNG")
        assert str(tmp_path / "demo" / name) in out
    assert [path.name for path in (tmp_path / "demo").glob("archive*")] == ["archive"]
    assert mine.read_text() == "mine"
    # Simulated products are not in the user's cache.
    assert not (tmp_path / "cache").exists()
    assert os.environ["SPXDASK_CACHE"] == str(tmp_path / "cache")
    run = spxdask.open_run(tmp_path / "demo")
    assert len(run) == 131
    sky = _make_sky()
    ids = {name: str(FIRST_ID + getattr(sky, name)) for name in ("bright", "constant", "faint")}
    assert np.count_nonzero(run[ids["bright"]].spectrum()["n"]) > 30
    assert np.count_nonzero(run[ids["faint"]].table["psf_flux"].value < 0) > 2
    assert run[ids["constant"]].detrended().reduced_chi2 < 2
    assert run[str(FIRST_ID + sky.variable)].detrended().reduced_chi2 > 100
    # Neither of the pair has the light of the other.
    for source in sky.pair:
        rows = run[str(FIRST_ID + source)].good(psf_fraction=0.9)
        true = sky.sky.take(np.array([source])).flux(rows["wavelength"].value)
        pulls = (rows["psf_flux"].value - true) / rows["psf_flux_error"].value
        assert abs(np.median(pulls)) < 0.5
        assert robust_scatter(pulls) < 1.4


@pytest.mark.slow
def test_all_visits_together_see_each_channel():
    sky = _make_sky()
    chosen = sky.sky.take(np.array([sky.bright, sky.emission, sky.variable, sky.constant]))
    low, high = PUBLISHED_CHANNELS.wavelength_min, PUBLISHED_CHANNELS.wavelength_max
    seen = np.zeros((len(chosen), len(low)), int)
    exposures = _list_exposures(range(len(VISIT_ORDER)))
    assert len(exposures) == 103
    for exposure, _ in exposures:
        x, y = exposure.wcs().all_world2pix(chosen.ra, chosen.dec, 0)
        inside = (x > 10) & (x < 2029) & (y > 10) & (y < 2029)
        wavelength = exposure.wavelength(x, y)[0][:, None]
        is_band = PUBLISHED_CHANNELS.band == exposure.detector - 1
        seen += inside[:, None] & is_band & (wavelength >= low) & (wavelength < high)
    assert seen.min() > 0


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
