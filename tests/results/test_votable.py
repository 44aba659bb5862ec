"""Light curves as a VOTable, as astropy reads and checks it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from astropy import units as u
from astropy.io import votable
from astropy.table import QTable
from made_run import make_points, make_rows, make_run

from spxdask.errors import ConfigError, NoSuchSourceError, RunFolderError
from spxdask.results import open_run
from spxdask.results.votable import write_votable


@pytest.fixture(scope="module")
def curves():
    rng = np.random.default_rng(1)
    return {one: make_rows(make_points(rng, 4, np.ones_like)) for one in ("b", "ü, 2", "a")}


@pytest.fixture(params=["csv", "parquet"])
def run(request, tmp_path, curves):
    return make_run(tmp_path / "out", curves, format=request.param)


def test_all_rows_with_units_ucds_and_systems(run, tmp_path, curves):
    path = tmp_path / "rows.vot"
    write_votable(run.path, path)
    report = io.StringIO()
    assert votable.validate(path, output=report), report.getvalue()
    file = votable.parse(path, verify="exception")
    fields = {field.name: field for field in file.get_first_table().fields}
    assert fields["ra"].ref == "icrs"
    systems = {one.ID: one for one in file.resources[0].time_systems}
    utc, tdb = systems[fields["mjd"].ref], systems[fields["bjd_tdb"].ref]
    assert (utc.timescale, utc.timeorigin, utc.refposition) == ("UTC", "MJD-origin", "TOPOCENTER")
    assert (tdb.timescale, tdb.timeorigin, tdb.refposition) == ("TDB", "JD-origin", "BARYCENTER")
    infos = {info.name: info.value for info in file.resources[0].infos}
    assert infos["releases"] == "qr3"
    table = QTable.read(path)
    assert list(table["target_id"]) == [one for one in sorted(curves) for _ in range(4)]
    assert table["psf_flux"].unit == u.uJy
    assert table["psf_flux"].info.meta["ucd"] == "phot.flux.density;em.IR;instr.det.psf"
    for one, rows in curves.items():
        mine = table[table["target_id"] == one]
        np.testing.assert_array_equal(mine["psf_flux"].value, rows["psf_flux"])
        assert list(mine["obs_id"]) == rows["obs_id"].to_pylist()
        assert list(mine["flag"]) == rows["flag"].to_pylist()


def test_some_sources(run, tmp_path):
    write_votable(run.path, tmp_path / "rows.vot", ["ü, 2", "a", "a"])
    assert list(QTable.read(tmp_path / "rows.vot")["target_id"]) == ["ü, 2"] * 4 + ["a"] * 4
    open_run(run.path).to_votable(tmp_path / "rows.vot", "b")
    assert set(QTable.read(tmp_path / "rows.vot")["target_id"]) == {"b"}


def test_what_cannot_be_written(run, tmp_path):
    path = tmp_path / "rows.vot"
    with pytest.raises(NoSuchSourceError) as caught:
        write_votable(run.path, path, ["a", "c"])
    assert caught.value.source == "c"
    with pytest.raises(ConfigError, match="more than 11 rows"):
        write_votable(run.path, path, max_rows=11)
    with pytest.raises(RunFolderError):
        write_votable(run.path, path, [])
    assert not path.exists()
