"""The columns, spelt out: they are a file format."""

from __future__ import annotations

import astropy.units as u
import pyarrow as pa
import pytest
from astropy.io.votable.ucd import check_ucd, parse_ucd

from spxdask.tables.schema import (
    APERTURE_ONLY,
    COLUMNS,
    LAYOUTS,
    LIGHT_CURVE_START,
    PER_IMAGE,
    SCHEMA,
    SORT_KEYS,
    TEXT,
    column_rows,
)


def test_names_and_types():
    first = (
        "target_id,ra,dec,obs_id,band,mjd,x,y,flux,flux_error,mag_ab,mag_ab_error,wavelength,"
        "bandwidth,flag,bg_level,bg_error,aperture_radius,filename"
    )
    assert ",".join(APERTURE_ONLY.per_image) == first
    assert ",".join(PER_IMAGE) == (
        f"{first},aperture_correction,psf_flux,psf_flux_error,psf_chi2,psf_fraction,"
        "neighbour_flux,bad_fraction,bjd_tdb"
    )
    assert tuple(SCHEMA.names) == (*PER_IMAGE, "release")
    assert TEXT == ("target_id", "obs_id", "band", "filename", "release")
    assert SCHEMA.field("flag").type == pa.int64()
    assert {SCHEMA.field(name).type for name in set(PER_IMAGE) - {*TEXT, "flag"}} == {pa.float64()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_of_a_light_curve_are_those_of_the_tables_and_then_the_frame(layout):
    """Its lines are cut out of those of the per-image tables."""
    cut = tuple(n for n in layout.per_image if n not in ("target_id", "ra", "dec", "filename"))
    assert layout.light_curve == (*cut, "filename", "release")
    assert cut[: len(LIGHT_CURVE_START)] == LIGHT_CURVE_START
    assert set(SORT_KEYS) <= {"target_id", *LIGHT_CURVE_START}


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
def test_a_column_has_a_unit_and_a_description(column):
    assert column.description
    unit = u.Unit(column.unit)
    has_none = {*TEXT, "flag", "aperture_correction", "psf_chi2", "psf_fraction", "bad_fraction"}
    assert (column.name in has_none) == (column.unit == "")
    if column.name.startswith("bg_"):
        assert unit.is_equivalent(u.uJy / u.arcsec**2)


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
def test_a_column_has_a_ucd_of_the_controlled_vocabulary(column):
    assert check_ucd(column.ucd, check_controlled_vocabulary=True)
    assert parse_ucd(column.ucd, check_controlled_vocabulary=True)
    assert column.ucd.startswith("stat.error;") == column.name.endswith("_error")


def test_rows_for_the_documentation():
    rows = column_rows()
    assert [name for name, *_ in rows] == [*PER_IMAGE, "release"]
    assert rows[1] == ("ra", "deg", "pos.eq.ra", COLUMNS[1].description)
