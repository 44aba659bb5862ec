"""What Parquet files say of themselves, as other programs read it."""

from __future__ import annotations

import io
import json
import warnings

import astropy.units as u
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import votable
from astropy.io.misc import parquet
from astropy.table import QTable, Table

from spxdask.tables.metadata import make_votable, parquet_metadata
from spxdask.tables.per_image import encode_rows
from spxdask.tables.provenance import RELEASE_DOIS, Provenance
from spxdask.tables.schema import APERTURE_ONLY, COLUMNS, LAYOUTS, SCHEMA, WITH_PSF

PROVENANCE = Provenance(
    version="9.8",
    digest="abc",
    configuration='radius: 0.1\nname: "a < b & c"\n',
    calibration=(("epsf", "cal-epsf-v1-2026-191"),),
    releases=("qr2",),
)
BY_NAME = {column.name: column for column in COLUMNS}


def make_rows(names: tuple[str, ...]) -> dict:
    numbers = {pa.float64(): np.array([0.5, np.nan]), pa.int64(): np.array([1, 2**31])}
    text = pa.array(["a", "ü"])
    return {name: numbers.get(SCHEMA.field(name).type, text) for name in names}


def test_the_list_of_ucds_is_not_asked_for(monkeypatch):
    # Where astropy does not find it, it asks the internet.
    monkeypatch.setattr(votable.ucd, "_ucd_singleton", None)
    monkeypatch.setattr(votable.ucd, "UCDWords", lambda: pytest.fail("the list is asked for"))
    fields = make_votable(COLUMNS, PROVENANCE, "").get_first_table().fields
    assert [field.ucd for field in fields] == [column.ucd for column in COLUMNS]


@pytest.fixture(params=[APERTURE_ONLY, WITH_PSF])
def path(request, tmp_path):
    path = tmp_path / "table.parquet"
    path.write_bytes(encode_rows(make_rows(request.param.per_image), "parquet", PROVENANCE))
    return path


def test_astropy_reads_units_descriptions_and_provenance(path):
    table = QTable.read(path)
    for name in table.colnames:
        column = BY_NAME[name]
        assert table[name].info.description == column.description
        assert table[name].info.meta["ucd"] == column.ucd
        # A magnitude is a quantity in a logarithmic unit.
        assert (table[name].info.unit or u.dimensionless_unscaled) == u.Unit(column.unit)
    assert list(table["target_id"]) == ["a", "ü"]
    assert table["flux"][0] == 0.5 * u.uJy
    assert table.meta["software"] == "spxdask 9.8"
    assert table.meta["releases"] == ["qr2"]
    assert table.meta["calibration"] == {"epsf": "cal-epsf-v1-2026-191"}
    assert table.meta["configuration"] == PROVENANCE.configuration
    assert RELEASE_DOIS["qr2"] in table.meta["citation"][1]


def test_programs_of_the_virtual_observatory_read_the_same(path):
    found = pq.read_metadata(path).metadata
    assert found[b"IVOA.VOTable-Parquet.version"] == b"1.0"
    content = found[b"IVOA.VOTable-Parquet.content"]
    assert b"<DATA" not in content
    file = votable.parse(io.BytesIO(content), verify="exception")
    [resource] = file.resources
    [table] = resource.tables
    # The fields are the columns of the file, in its order.
    assert [field.name for field in table.fields] == pq.read_schema(path).names
    for field in table.fields:
        column = BY_NAME[field.name]
        assert (field.ucd, field.description) == (column.ucd, column.description)
        expected = u.Unit(column.unit.removesuffix("(AB)"))
        assert (field.unit or u.dimensionless_unscaled) == expected
    infos = {info.name: info.value for info in resource.infos}
    assert infos["software"] == "spxdask 9.8"
    assert infos["configuration"] == "abc"
    [text] = (info.content for info in resource.infos if info.name == "configuration")
    assert text.strip() == PROVENANCE.configuration.strip()
    assert {system.ID: system.timescale for system in resource.time_systems}["utc"] == "UTC"


@pytest.mark.skipif(
    not hasattr(parquet, "read_parquet_votable"), reason="astropy before 7 has no such reader"
)
def test_astropy_joins_rows_and_votable(path):
    """Its reader stacks an empty table of the VOTable's columns on the rows."""
    with warnings.catch_warnings(record=True) as differences:
        warnings.simplefilter("always")
        table = Table.read(path, format="parquet.votable")
    # Units of the IVOA have no AB system.
    assert all("'mag_ab' the 'unit'" in str(one.message) for one in differences)
    assert [table[name].meta["ucd"] for name in ("flux", "ra")] == [
        BY_NAME["flux"].ucd, BY_NAME["ra"].ucd,
    ]  # fmt: skip
    assert table["flux"].unit == u.uJy
    assert list(table["target_id"]) == ["a", "ü"]
    assert table["flag"].tolist() == [1, 2**31]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_rows_are_the_same_bytes(layout):
    """Nothing of time, host or order is in a file, and its metadata are made once."""
    rows = make_rows(layout.per_image)
    one = encode_rows(rows, "parquet", PROVENANCE)
    parquet_metadata.cache_clear()
    assert encode_rows(rows, "parquet", PROVENANCE) == one
    assert parquet_metadata.cache_info().misses == 1
    encode_rows(rows, "parquet", PROVENANCE)
    assert parquet_metadata.cache_info().misses == 1
    # Arrow's own copy of the schema would make small tables twice as long.
    assert len(one) < 30_000
    assert json.loads(pq.read_metadata(pa.BufferReader(one)).metadata[b"spxdask"])["releases"] == [
        "qr2"
    ]
