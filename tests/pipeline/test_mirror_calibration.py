"""A run over a mirror of frames and calibration products, and what a new product changes."""

from __future__ import annotations

import os

import pandas as pd
import pytest
import simulated
from astropy.io import fits
from outputs import output_of, read_files

from spxdask import BatchPipeline
from spxdask.run.frame_table import FRAMES_NAME
from spxdask.simulate.archive import SimulatedArchive, make_mirror
from spxdask.simulate.products import make_products

QR3 = {"release": "qr3", "version": 30, "year": 2026, "day": 90}


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    exposures = [simulated.exposure(0, 3), simulated.exposure(1, 3, **QR3)]
    return simulated.make_survey(tmp_path_factory.mktemp("survey"), exposures, n_sources=10)


@pytest.fixture(scope="module")
def archive(survey):
    with SimulatedArchive(survey.archived) as archive:
        yield archive


def tokens_of(pipeline: BatchPipeline) -> list[list[str]]:
    frames = pd.read_parquet(output_of(pipeline).state / FRAMES_NAME)
    assert (frames["status"] == "measured").all()
    return [text.split(", ") for text in frames["calibration"]]


@pytest.fixture
def _cache(tmp_path, monkeypatch, client):
    """The cache of this process and of the workers of the shared cluster."""
    monkeypatch.setenv("SPXDASK_CACHE", str(tmp_path / "cache"))
    client.run(os.environ.update, {"SPXDASK_CACHE": str(tmp_path / "cache")})
    yield
    client.run(os.environ.pop, "SPXDASK_CACHE")


@pytest.mark.usefixtures("_cache")
def test_a_mirror_of_frames_and_products(survey, make_config, tmp_path, client):
    mirror = tmp_path / "mirror"
    make_mirror(mirror, frames=survey.archived)
    (product,) = make_products(mirror, detectors=[3], families=["l3_flux_corrections"])
    config = make_config(archive_url=mirror.as_uri(), calibration="archive")
    first = BatchPipeline(config, client=client)
    summary = first.run_all()
    assert summary.failed == {}
    assert tokens_of(first) == [["cal-flxc-v1-2026-191"], [""]]
    assert {*summary.stages["query"].missing_products} == {
        *("spectral_wcs", "solid_angle_pixel_map", "epsf")
    }
    tables = read_files(output_of(first).per_image)

    again = BatchPipeline(config, client=client)
    assert again.run_all().stages["extract"].reused == 2
    with fits.open(product.path, mode="update") as hdus:
        hdus["IMAGE"].data *= 1.1
    changed = BatchPipeline(config, client=client)
    report = changed.run_all().stages["extract"]
    assert (report.reused, report.done) == (1, 1)
    now = read_files(output_of(changed).per_image)
    early = survey.frames[0].path.stem
    assert [name for name in tables if tables[name] != now[name]] == [f"{early}_photometry.csv"]
