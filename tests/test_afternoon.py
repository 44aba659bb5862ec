"""An astronomer's afternoon: from a catalogue to science, in few lines."""

from __future__ import annotations

import numpy as np
import pytest
import simulated
from astropy.table import Table

from spxdask.simulate.archive import SimulatedArchive

# Warnings of the libraries about each other.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def survey(tmp_path):
    """Eight visits in D3, half a degree along the detector, and one in another band."""
    exposures = [simulated.exposure(number, 3, roll_deg=0.0) for number in range(8)]
    return simulated.make_survey(tmp_path, [*exposures, simulated.exposure(8, 4)], n_sources=12)


@pytest.mark.slow
def test_from_a_catalogue_to_science_in_fifteen_lines(survey, client, tmp_path, monkeypatch):
    # Of the environments of .ci/run, that with the lowest versions lacks it, as it asks for newer
    # ones.
    lsdb = pytest.importorskip("lsdb", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    columns = [[f"star {i}" for i in range(12)], survey.sky.ra, survey.sky.dec]
    Table(columns, names=["NAME", "RA", "DEC"]).write("sources.fits")
    with SimulatedArchive(survey.archived) as archive:
        monkeypatch.setenv("SPXDASK_TAP_URL", archive.tap_url)
        monkeypatch.setenv("SPXDASK_ARCHIVE_URL", archive.archive_url)

        # The afternoon.
        import spxdask

        field = {"center_ra": 270.0, "center_dec": 66.56, "radius": 0.2}
        options = {"id_column": "NAME", "calibration": "frame", "num_buckets": 4}
        spxdask.run_batch("sources.fits", output_dir="out", client=client, **field, **options)
        run = spxdask.open_run("out")
        star = run["star 3"]
        spectrum = star.spectrum()
        spectrum.plot().figure.savefig("spectrum.png")
        detrended = star.detrended()
        run.to_hats(tmp_path / "catalogue")
        catalogue = lsdb.open_catalog(tmp_path / "catalogue").compute()

    used = np.flatnonzero(spectrum["n"])
    assert spectrum["n"].sum() == len(star.good()) == 9
    assert set(spectrum["band"][used]) == {"D3", "D4"}
    true = survey.sky.take(np.array([3])).flux(spectrum["wavelength_mean"].value[used])
    pulls = (spectrum.flux.value[used] - true) / spectrum.flux_error.value[used]
    assert np.all(np.abs(pulls) < 5)
    assert (tmp_path / "spectrum.png").stat().st_size > 10_000
    assert np.count_nonzero(np.isfinite(detrended.table["ratio"])) >= 8
    assert detrended.reduced_chi2 < 4
    # One is on no cut-out.
    assert len(catalogue) == len(run) == 12 - len(run.missing_sources) == 11
