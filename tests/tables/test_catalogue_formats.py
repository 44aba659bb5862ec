"""Catalogues in the formats of astropy and Arrow, and as objects of Python."""

from __future__ import annotations

import gzip
import io
import logging
import pickle

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.table import MaskedColumn, QTable, Table
from astropy.time import Time

from spxdask.errors import CatalogueError
from spxdask.tables.catalogue import (
    CatalogueColumns,
    CatalogueReader,
    GivenCatalogue,
    encode_catalogue,
    is_catalogue,
    read_catalogue,
)

IDS = [3963345870782649211, 3963345870782649212, 7]
RA, DEC = [10.5, 11.5, 359.25], [-20.25, 0.0, 89.5]
EXPECTED = {str(i): (ra, dec) for i, ra, dec in zip(IDS, RA, DEC, strict=True)}


def sources(catalogue) -> dict[str, tuple[float, float]]:
    ids = catalogue.target_id.to_pylist()
    return dict(
        zip(ids, zip(catalogue.ra.tolist(), catalogue.dec.tolist(), strict=True), strict=True)
    )


def make_table(**changes) -> Table:
    columns = {"source_id": IDS, "mag": [1.0, 2.0, 3.0], "ra": RA * u.deg, "dec": DEC * u.deg}
    return Table({**columns, **changes})


def give(value, **options) -> dict[str, tuple[float, float]]:
    return sources(read_catalogue(GivenCatalogue(value), **options))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    "name, format_name",
    [
        ("x.fits", "fits"),
        ("x.vot", "votable"),
        ("x.ecsv", "ascii.ecsv"),
        ("x.tbl", "ascii.ipac"),
        ("x.txt", "ascii.mrt"),
        ("x.parquet", "parquet"),
        ("x.csv", "ascii.csv"),
        ("x.tex", "ascii.latex"),
        ("x.dat", "ascii.fixed_width"),
        ("x.dat", "ascii.commented_header"),
        ("x.dat", "ascii.basic"),
        ("x.rst", "ascii.rst"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_every_format_by_its_content(tmp_path, name, format_name, compress):
    path = tmp_path / name
    table = make_table()
    if format_name == "ascii.mrt":
        table["source_id"] = [str(i) for i in IDS]
    table.write(path, format=format_name)
    if compress:
        content = gzip.compress(path.read_bytes())
        path = tmp_path / f"{name}.gz"
        path.write_bytes(content)
    assert sources(read_catalogue(path)) == EXPECTED
    if format_name not in ("ascii.latex", "ascii.rst"):
        renamed = path.rename(tmp_path / "noname")
        assert sources(read_catalogue(renamed)) == EXPECTED


def test_units_of_formats(tmp_path):
    table = make_table(ra=np.deg2rad(RA) * u.rad, dec=np.array(DEC) * 60 * u.arcmin)
    formats = {"x.fits": "fits", "x.ecsv": "ascii.ecsv", "x.vot": "votable", "x.pq": "parquet"}
    for name, format_name in formats.items():
        table.write(tmp_path / name, format=format_name)
        found = sources(read_catalogue(tmp_path / name))
        assert set(found) == set(EXPECTED)
        for key, position in found.items():
            assert position == pytest.approx(EXPECTED[key], abs=1e-12)
    hours = make_table(ra=["00:42:00", "00:46:00", "23:57:00"])
    hours["ra"].unit = '"h:m:s"'
    assert give(hours) == EXPECTED


MRT = """\
Title: Stars
Authors: N. N.
Table: Positions
================================================================================
Byte-by-byte Description of file: t.txt
--------------------------------------------------------------------------------
   Bytes Format Units  Label     Explanations
--------------------------------------------------------------------------------
   1-  8 A8     ---    Name      Name of the star
  10- 11 I2     h      RAh       Hour
  13- 14 I2     min    RAm       Minute
  16- 20 F5.2   s      RAs       Second
      22 A1     ---    DE-       Sign
  23- 24 I2     deg    DEd       Degree
  26- 27 I2     arcmin DEm       Arcminute
  29- 32 F4.1   arcsec DEs       Arcsecond
--------------------------------------------------------------------------------
S05-5230 14 45 36.88 -05 12 11.3
007      00 00 00.00 -00 30 00.0
"""


def test_positions_in_parts(tmp_path):
    (tmp_path / "t.txt").write_text(MRT)
    found = sources(read_catalogue(tmp_path / "t.txt"))
    expected = SkyCoord("14h45m36.88s", "-05d12m11.3s")
    assert found["S05-5230"] == pytest.approx((expected.ra.deg, expected.dec.deg), abs=1e-10)
    assert found["007"] == (0.0, -0.5)


def test_the_table_with_positions_is_taken(tmp_path):
    from astropy.io import fits

    other = fits.BinTableHDU(Table({"header": ["x"]}))
    wanted = fits.BinTableHDU(make_table())
    fits.HDUList([fits.PrimaryHDU(), other, wanted]).writeto(tmp_path / "x.fits")
    assert sources(read_catalogue(tmp_path / "x.fits")) == EXPECTED
    fits.PrimaryHDU(np.zeros((2, 2))).writeto(tmp_path / "image.fits")
    with pytest.raises(CatalogueError, match="no table, but images alone"):
        read_catalogue(tmp_path / "image.fits")


@pytest.mark.parametrize("name", ["x.fits", "x.vot", "x.ecsv", "x.parquet", "x.tbl"])
def test_damaged_files_are_a_sentence(tmp_path, name):
    kind = {"x.vot": "votable", "x.ecsv": "ascii.ecsv", "x.tbl": "ascii.ipac"}.get(name)
    make_table().write(tmp_path / name, format=kind)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 2 // 5])
    with pytest.raises(CatalogueError) as raised:
        read_catalogue(tmp_path / name)
    assert raised.value.path == str(tmp_path / name)
    assert pickle.loads(pickle.dumps(raised.value)).path == str(tmp_path / name)


@pytest.mark.parametrize("dtype", ["u8", "i8", "u4", "i4", "i2", "u1", ">i8"])
def test_ids_of_any_integer_type(tmp_path, dtype):
    ids = np.array([np.iinfo(dtype).max - 1, np.iinfo(dtype).max, 0], dtype)
    expected = {str(int(i)) for i in ids}
    table = make_table(source_id=ids)
    table.write(tmp_path / "x.fits")
    assert set(sources(read_catalogue(tmp_path / "x.fits"))) == expected
    assert set(give(table)) == expected
    if not dtype.startswith(">"):
        table.to_pandas().to_parquet(tmp_path / "x.parquet")
        assert set(sources(read_catalogue(tmp_path / "x.parquet"))) == expected
        assert set(give(table.to_pandas())) == expected


def test_ids_as_bytes_and_masked(tmp_path):
    table = make_table(source_id=np.array([b"a b", b"caf\xc3\xa9", b"c  "]))
    table.write(tmp_path / "x.fits")
    assert set(sources(read_catalogue(tmp_path / "x.fits"))) == {"a b", "caf\u00e9", "c"}
    masked = make_table(source_id=MaskedColumn(IDS, mask=[False, True, False]))
    for name in ("x.ecsv", "y.fits"):
        masked.write(tmp_path / name)
        with pytest.raises(CatalogueError, match=r"targetid is empty in data row 2"):
            read_catalogue(tmp_path / name)
        assert len(read_catalogue(tmp_path / name, on_bad_row="skip")) == 2
    assert len(read_catalogue(GivenCatalogue(masked), on_bad_row="skip")) == 2


def test_missing_positions_of_formats(tmp_path):
    ra = MaskedColumn(RA, mask=[True, False, False], unit="deg")
    make_table(ra=ra, dec=[1.0, np.nan, 2.0]).write(tmp_path / "x.ecsv")
    with pytest.raises(
        CatalogueError, match=r"ra is missing in data row 1 \('3963345870782649211'\)"
    ):
        read_catalogue(tmp_path / "x.ecsv")
    assert set(sources(read_catalogue(tmp_path / "x.ecsv", on_bad_row="skip"))) == {"7"}


def test_ids_of_floats_are_written_as_in_csv(tmp_path, caplog):
    frame = pd.DataFrame({"id": [3.963345870782649e16, 4295806720.0], "ra": [1, 2], "dec": [3, 4]})
    frame.to_csv(tmp_path / "x.csv", index=False)
    frame.to_parquet(tmp_path / "x.parquet")
    with caplog.at_level(logging.WARNING, logger="spxdask"):
        found = sources(read_catalogue(tmp_path / "x.parquet"))
    assert "2 ids, such as '3.963345870782649e+16', went through" in caplog.text
    assert found == sources(read_catalogue(tmp_path / "x.csv")) == give(frame)
    collided = pd.DataFrame({"id": np.array(IDS[:2]).astype(float), "ra": [1, 2], "dec": [3, 4]})
    with pytest.raises(CatalogueError, match=r"more than once .* floating-point number"):
        give(collided)


def test_parquet_datasets(tmp_path):
    folder = tmp_path / "sources.parquet"
    frame = make_table().to_pandas()
    for i in range(3):
        part = folder / ("Norder=1" if i == 2 else ".")
        part.mkdir(parents=True, exist_ok=True)
        frame[i : i + 1].to_parquet(part / f"part.{i}.parquet")
    (folder / "_metadata").write_bytes(b"x")
    (folder / "README").write_text("x")
    reader = CatalogueReader(folder)
    catalogue = reader.read()
    assert sources(catalogue) == EXPECTED
    assert reader.read() is catalogue
    frame[:1].assign(source_id=1, ra=1.0).to_parquet(folder / "part.10.parquet")
    grown = reader.read()
    assert sources(grown) == EXPECTED | {"1": (1.0, -20.25)}
    # part.10 comes behind part.1.
    assert sorted(zip(grown.row.tolist(), grown.target_id.to_pylist(), strict=True))[-1][1] == "1"
    (tmp_path / "empty").mkdir()
    with pytest.raises(CatalogueError, match="a folder without Parquet files"):
        read_catalogue(tmp_path / "empty")


def test_only_needed_columns_of_parquet_are_read(tmp_path):
    table = pa.table(
        {"id": IDS, "ra": RA, "dec": DEC, "cube": [[1, 2], [3], []], "s": [{"a": 1}] * 3}
    )
    pq.write_table(table, tmp_path / "x.parquet")
    assert sources(read_catalogue(tmp_path / "x.parquet")) == EXPECTED
    with pytest.raises(CatalogueError, match="targetid: numbers or texts are needed, got list"):
        read_catalogue(tmp_path / "x.parquet", CatalogueColumns(target_id="cube"))


def make_objects() -> dict[str, object]:
    table = make_table()
    frame = table.to_pandas()
    arrow = pa.Table.from_pandas(frame)
    return {
        "Table": table,
        "QTable": QTable(table),
        "masked": Table(table, masked=True),
        "coordinates in a table": Table({"id": IDS, "position": SkyCoord(RA, DEC, unit="deg")}),
        "structured array": table.as_array(),
        "DataFrame": frame,
        "index": frame.set_index("source_id"),
        "categories": frame.assign(source_id=pd.Categorical([str(i) for i in IDS])),
        "nullable": frame.convert_dtypes(),
        "objects": frame.astype(object),
        "Arrow": arrow,
        "Arrow in pieces": pa.concat_tables([arrow[:1], arrow[1:]]),
        "polars": pl.from_arrow(arrow),
        "dask": dd.from_pandas(frame, npartitions=2),
    }


@pytest.mark.parametrize("kind", make_objects())
def test_objects(kind):
    value = make_objects()[kind]
    assert is_catalogue(value)
    with dask.config.set(scheduler="synchronous"):
        assert give(value) == EXPECTED


@pytest.mark.parametrize(
    "value", [None, 3, "x", [1], {"ra": 1}, np.zeros(3), pd.Series([1]), Table, 1 * u.deg]
)
def test_what_is_no_catalogue(value):
    assert not is_catalogue(value)


def test_objects_are_refused_as_files_are():
    with pytest.raises(CatalogueError, match="<DataFrame>: no column ra or raj2000"):
        give(pd.DataFrame({"id": [1], "dec": [2.0]}))
    with pytest.raises(CatalogueError, match="2 columns targetid"):
        give(make_table(name=["a", "b", "c"]))
    assert give(make_table(name=["a", "b", "c"]), columns=CatalogueColumns(target_id="source_id"))
    with pytest.raises(CatalogueError, match="holds arrays"):
        give(make_table(ra=np.ones((3, 2))))


@pytest.mark.parametrize("frame", ["icrs", "galactic", "fk5", "fk4", "barycentrictrueecliptic"])
def test_coordinates_of_any_frame(frame):
    coordinates = SkyCoord(RA, DEC, unit="deg").transform_to(frame)
    found = give(coordinates)
    assert sorted(found) == ["0", "1", "2"]
    for i in range(3):
        there = SkyCoord(*found[str(i)], unit="deg")
        assert there.separation(coordinates[i].icrs).arcsec < 1e-6
    assert len(give(coordinates.reshape(3, 1))) == 3
    assert list(give(coordinates[1])) == ["0"]
    assert len(give(coordinates.frame)) == 3


def test_coordinates_of_other_representations():
    cartesian = SkyCoord(x=[1.0], y=[1.0], z=[0.0], unit="pc", representation_type="cartesian")
    assert give(cartesian)["0"] == pytest.approx((45.0, 0.0))
    assert cartesian.representation_type.__name__ == "CartesianRepresentation"
    nowhere = SkyCoord([1] * u.deg, [2] * u.deg, frame="altaz")
    with pytest.raises(CatalogueError, match="<SkyCoord>: the coordinates cannot be transformed"):
        give(nowhere)
    with pytest.raises(CatalogueError, match=r"ra is missing in data row 2 \('1'\)"):
        give(SkyCoord([1, np.nan], [2, 3], unit="deg"))


def test_motions_of_objects():
    moving = SkyCoord(
        [10, 11] * u.deg, [20, 21] * u.deg, distance=[10, 20] * u.pc,
        pm_ra_cosdec=[1, 2] * u.mas / u.yr, pm_dec=[3, 4] * u.arcsec / u.yr, obstime=Time("J2016"),
    )  # fmt: skip
    for value in (moving, Table({"id": [0, 1], "where": moving})):
        found = read_catalogue(GivenCatalogue(value))
        np.testing.assert_allclose(found.pmra, [1, 2], rtol=1e-9)
        np.testing.assert_allclose(found.pmdec, [3000, 4000], rtol=1e-9)
        np.testing.assert_allclose(found.parallax, [100, 50], rtol=1e-9)
        np.testing.assert_allclose(found.ref_epoch, 2016.0, rtol=1e-12)
    table = make_table(
        pmRA=[1.0, 2, 3] * u.deg / u.yr, ref_epoch=Time([2015.5] * 3, format="jyear")
    )
    found = read_catalogue(GivenCatalogue(table))
    np.testing.assert_allclose(np.sort(found.pmra), np.array([1, 2, 3]) * 3.6e6, rtol=1e-12)
    np.testing.assert_allclose(found.ref_epoch, 2015.5, rtol=1e-12)


def test_encoded_catalogue_is_the_same(tmp_path):
    table = make_table(pmra=[1.0, np.nan, 3], source_id=["b ", "a\n", "\u00fc"])
    first = read_catalogue(GivenCatalogue(table))
    (tmp_path / "x.parquet").write_bytes(encode_catalogue(first))
    again = read_catalogue(tmp_path / "x.parquet")
    assert again.fingerprint == first.fingerprint
    assert again.motion_fingerprint == first.motion_fingerprint
    assert again.target_id.equals(first.target_id)
    np.testing.assert_array_equal(again.row, first.row)
    np.testing.assert_array_equal(again.pmra, first.pmra)
    assert encode_catalogue(again) == encode_catalogue(first)
    plain = io.StringIO(
        "targetid,ra,dec\n"
        + "".join(f"{i},{r},{d}\n" for i, r, d in zip(IDS, RA, DEC, strict=True))
    )
    (tmp_path / "x.csv").write_text(plain.getvalue())
    assert (
        read_catalogue(tmp_path / "x.csv").fingerprint
        == read_catalogue(GivenCatalogue(make_table())).fingerprint
    )
