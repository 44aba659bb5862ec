"""HATS catalogues, as the library that others open them with sees them."""

from __future__ import annotations

import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_run import CENTER, make_points, make_rows, make_run
from outputs import read_files

from spxdask.errors import ConfigError, MissingExtraError, RunFolderError
from spxdask.results import open_run
from spxdask.results.hats import write_hats

# Warnings of the libraries about each other.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", autouse=True)
def _needs_lsdb():
    # Of the environments of .ci/run, that with the lowest versions lacks it, as it asks for newer
    # ones. It takes seconds to import, which all processes that collect tests would do.
    pytest.importorskip("lsdb", exc_type=ImportError)


@pytest.fixture(scope="module")
def curves():
    rng = np.random.default_rng(1)
    spectrum = np.ones_like
    names = [f"s, {i}" for i in range(30)]
    return {one: make_rows(make_points(rng, 3 + i % 4, spectrum)) for i, one in enumerate(names)}


@pytest.fixture(scope="module")
def positions(curves):
    """Over the whole sky, and two in one place; one source without a row."""
    rng = np.random.default_rng(2)
    found = {one: (rng.uniform(0, 360), rng.uniform(-80, 80)) for one in curves}
    names = list(curves)
    return found | {names[1]: found[names[0]], "none": CENTER}


@pytest.fixture
def run(request, tmp_path, curves, positions):
    how = getattr(request, "param", "csv")
    return make_run(tmp_path / "out", curves, positions=positions, format=how)


def list_tree(folder) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("run", ["csv", "parquet"], indirect=True)
def test_lsdb_opens_the_catalogue_with_nested_light_curves(run, tmp_path, curves, positions):
    import lsdb
    from hats.io.validation import is_valid_catalog

    open_run(run.path).to_hats(tmp_path / "cat", points_per_partition=20)
    assert is_valid_catalog(tmp_path / "cat", strict=True)
    catalog = lsdb.open_catalog(tmp_path / "cat")
    assert len(catalog.get_healpix_pixels()) > 3
    found = catalog.compute(progress_bar=False).set_index("id")
    assert set(found.index) == set(curves)
    for one, rows in curves.items():
        row = found.loc[one]
        assert (row["ra"], row["dec"]) == positions[one]
        assert row["points"] == len(rows)
        for name in rows.column_names:
            assert row["lightcurve"][name].tolist() == rows[name].to_pylist(), name
    # The summary is that of the run.
    sources = open_run(run.path).sources
    for row in sources:
        np.testing.assert_array_equal(found.loc[row["id"], "chi2"], row["chi2"])
        np.testing.assert_array_equal(
            found.loc[row["id"], "flux_D1"], row["flux_D1"].to_value("uJy")
        )
    flux = catalog["lightcurve.flux"].compute(progress_bar=False)
    assert len(flux) == sum(map(len, curves.values()))
    one = catalog.cone_search(*positions["s, 5"], radius_arcsec=1).compute(progress_bar=False)
    assert one["id"].tolist() == ["s, 5"]


def test_a_catalogue_says_what_its_columns_are(run, tmp_path):
    write_hats(run.path, tmp_path / "cat")
    metadata = pq.read_metadata(tmp_path / "cat" / "dataset" / "_common_metadata").metadata
    text = metadata[b"IVOA.VOTable-Parquet.content"].decode()
    [field] = re.findall('<FIELD[^>]* name="lightcurve.psf_flux"[^>]*>', text)
    assert 'unit="uJy"' in field
    assert 'ucd="phot.flux.density;em.IR;instr.det.psf"' in field
    properties = (tmp_path / "cat" / "hats.properties").read_text()
    for line in ("obs_collection=cat", "hats_nrows=30", "spxdask_releases=qr3"):
        assert line in properties.splitlines()


def test_the_same_run_is_the_same_bytes(run, tmp_path):
    for number in (1, 2):
        write_hats(run.path, tmp_path / f"{number}", name="one", points_per_partition=20)
    assert list_tree(tmp_path / "1") == list_tree(tmp_path / "2")


def test_a_catalogue_appears_whole_or_not_at_all(run, tmp_path):
    class Killed(BaseException):
        pass

    seen = []

    def stop(n_done: int, n_all: int) -> None:
        seen.append((n_done, n_all))
        if n_all > n_done > len(open_run(run.path).curves.parts):
            raise Killed

    with pytest.raises(Killed):
        write_hats(run.path, tmp_path / "cat", points_per_partition=20, on_progress=stop)
    assert seen[-1][0] > 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_object_store(run, curves):
    import fsspec

    write_hats(run.path, "memory://bucket/cat", points_per_partition=40)
    store = fsspec.filesystem("memory")
    names = store.find("/bucket/cat")
    assert "/bucket/cat/hats.properties" in names
    assert sum(name.endswith(".parquet") for name in names) > 1
    with pytest.raises(ConfigError):
        write_hats(run.path, "memory://bucket/cat")


def test_what_cannot_be_written(run, tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "mine").write_bytes(b"")
    with pytest.raises(ConfigError, match="is not an empty folder: choose another path"):
        write_hats(run.path, tmp_path / "cat")
    assert set(read_files(tmp_path / "cat")) == {"mine"}
    with pytest.raises(ConfigError):
        write_hats(run.path, tmp_path / "other", points_per_partition=0)
    for name in run.state.list_names():
        if name.startswith("catalogue-"):
            run.state.delete_many([name])
    with pytest.raises(RunFolderError):
        write_hats(run.path, tmp_path / "other")
    monkeypatch.setitem(__import__("sys").modules, "hats.io", None)
    with pytest.raises(MissingExtraError) as caught:
        write_hats(run.path, tmp_path / "other")
    assert caught.value.extra == "hats"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "cat"}
