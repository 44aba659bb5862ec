"""Which rows of a table are fit for science."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

from spxdask.science.flags import REJECTING_MASK

__all__ = ["select_good_rows"]

Table = TypeVar("Table")


def select_good_rows(table: Table) -> Table:
    """Return the rows of a table that have a flux and none of the flags that speak against it.

    Parameters
    ----------
    table : pandas.DataFrame, astropy.table.Table, pyarrow.Table or polars.DataFrame
        Rows of spxdask with the columns ``flag`` and ``flux``.

    Returns
    -------
    table of the same kind
        The rows with a finite flux and none of `REJECTING_FLAGS`, in order. OVERFLOW, OUTLIER,
        FULLSAMPLE and SOURCE do not speak against a row, as in the mask of IRSA's Mosaic Tool.

    Examples
    --------
    >>> import pandas as pd
    >>> select_good_rows(pd.DataFrame({"flux": [1.0, 2.0], "flag": [1 << 21, 1 << 26]}))
       flux     flag
    0   1.0  2097152
    """
    rows: Any = table
    flag, flux = _read_numbers(rows["flag"]), _read_numbers(rows["flux"])
    # A row whose flags are missing is not known to be good.
    bits = np.where(np.isfinite(flag), flag, REJECTING_MASK).astype(np.int64)
    good = (bits & REJECTING_MASK == 0) & np.isfinite(flux)
    is_arrow = type(rows).__module__.partition(".")[0] in ("pyarrow", "polars")
    # Those take no mask in brackets.
    selected: Table = rows.filter(good) if is_arrow else rows[good]
    return selected


def _read_numbers(column: Any) -> np.ndarray:
    """Return a column of any kind of table as numbers, NaN where a value is missing."""
    # Bits up to the 53rd are whole as a double.
    return np.ma.filled(np.ma.asarray(column, float), np.nan)
