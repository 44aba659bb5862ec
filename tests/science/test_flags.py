"""The two sets of flags, and the rows that they leave."""

from __future__ import annotations

import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pytest
from astropy import units
from astropy.table import MaskedColumn, QTable, Table

import spxdask
from spxdask import PhotometryConfig, select_good_rows
from spxdask.science.flags import FLAG_BITS, REJECTING_FLAGS, REJECTING_MASK

# Table 16 of the Explanatory Supplement v2.0.
MASKED_BY_IRSA = [
    *("TRANSIENT", "SUR_ERROR", "NONFUNC", "DICHROIC", "MISSING_DATA", "HOT", "COLD", "PHANMISS"),
    *("NONLINEAR", "PERSIST", "CROSSTALK", "GHOST", "GHOST_FPA", "GHOST_EXT", "STREAK", "BLOOM"),
    *("SNOWBALL", "HALO", "SATELLITE_HALO"),
]
KEPT_BY_IRSA = ["OVERFLOW", "OUTLIER", "FULLSAMPLE", "SOURCE"]


def rows_with(*names: str) -> pd.DataFrame:
    flags = [1 << FLAG_BITS[name] | 1 << FLAG_BITS["SOURCE"] for name in names]
    return pd.DataFrame({"flux": np.arange(len(names)) + 1.0, "flag": flags})


def test_the_set_is_that_of_irsas_mosaics():
    assert set(REJECTING_FLAGS) == set(MASKED_BY_IRSA)
    assert sum(1 << FLAG_BITS[name] for name in MASKED_BY_IRSA) == REJECTING_MASK


def test_the_set_for_background_and_fit_is_as_it_was():
    assert PhotometryConfig().bad_flags == (0, 1, 2, 6, 7, 9, 10, 11, 14, 15, 17, 19)


@pytest.mark.parametrize("name", MASKED_BY_IRSA)
def test_a_row_with_what_irsa_masks_is_not_good(name):
    assert select_good_rows(rows_with("SOURCE", name))["flux"].tolist() == [1.0]


@pytest.mark.parametrize("name", KEPT_BY_IRSA)
def test_a_row_with_what_irsa_keeps_is_good(name):
    assert len(select_good_rows(rows_with(name))) == 1


KINDS = {
    "pandas": lambda frame: frame,
    "pandas with pyarrow": lambda frame: frame.convert_dtypes(dtype_backend="pyarrow"),
    "pyarrow": pa.Table.from_pandas,
    "polars": polars.from_pandas,
    "astropy": lambda frame: Table.from_pandas(frame),
    "masked": lambda frame: Table(
        {
            "flux": MaskedColumn(frame["flux"].fillna(-1.0), mask=frame["flux"].isna()),
            "flag": frame["flag"].to_numpy(),
        }
    ),
    "units": lambda frame: QTable(
        {"flux": frame["flux"].to_numpy() * units.uJy, "flag": frame["flag"].to_numpy()}
    ),
    "numpy": lambda frame: frame.to_records(index=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_all_kinds_keep_their_kind(kind):
    frame = rows_with("SOURCE", "BLOOM", "SOURCE", "OUTLIER")
    frame.loc[2, "flux"] = np.nan
    table = KINDS[kind](frame)
    good = select_good_rows(table)
    assert type(good) is type(table)
    flux = good["flux"]
    assert list(getattr(flux, "value", flux) if kind == "units" else np.asarray(flux)) == [1.0, 4.0]


def test_rows_without_flags_are_not_known_to_be_good():
    table = pd.DataFrame({"flux": [1.0, 2.0], "flag": [np.nan, 0.0]})
    assert select_good_rows(table)["flux"].tolist() == [2.0]


def test_an_empty_table_stays_one():
    empty = rows_with("SOURCE").iloc[:0]
    assert select_good_rows(empty).columns.tolist() == ["flux", "flag"]


def test_it_is_public():
    assert "select_good_rows" in spxdask.__all__
