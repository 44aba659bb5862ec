"""Which rows of a table are fit for science."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np

from spxdask.errors import ConfigError
from spxdask.science.flags import FLAG_BITS, REJECTING_FLAGS, REJECTING_MASK, find_bit

__all__ = ["find_good_rows", "select_good_rows"]

Table = TypeVar("Table")


def select_good_rows(
    table: Table,
    *,
    flags: Iterable[str | int] = REJECTING_FLAGS,
    psf_fraction: float | None = None,
    psf_chi2: float | None = None,
    bad_fraction: float | None = None,
) -> Table:
    """Return the rows of a table that have a flux and none of the flags that speak against it.

    Parameters
    ----------
    table : pandas.DataFrame, astropy.table.Table, pyarrow.Table or polars.DataFrame
        Rows of spxdask with the columns ``flag`` and ``flux``.
    flags : iterable of str or int
        Flags that speak against a row, by name or bit. OVERFLOW, OUTLIER, FULLSAMPLE and SOURCE
        are not among `REJECTING_FLAGS`, the default, as in the mask of IRSA's Mosaic Tool; with
        ``()``, no flag does.
    psf_fraction : float, optional
        Lowest share of the PSF on usable pixels; by default, any.
    psf_chi2 : float, optional
        Highest reduced chi-squared of the PSF; by default, any. It grows with the flux, as errors
        of the PSF do.
    bad_fraction : float, optional
        Highest share of the light in the aperture on bad pixels; by default, any.

    Returns
    -------
    table of the same kind
        The rows with a finite flux that pass all of these, in order.

    Raises
    ------
    ConfigError
        If there is no such flag, or the table lacks a column.

    Examples
    --------
    >>> import pandas as pd
    >>> select_good_rows(pd.DataFrame({"flux": [1.0, 2.0], "flag": [1 << 21, 1 << 26]}))
       flux     flag
    0   1.0  2097152
    """
    rows: Any = table
    good = find_good_rows(
        rows,
        flags=flags,
        psf_fraction=psf_fraction,
        psf_chi2=psf_chi2,
        bad_fraction=bad_fraction,
    )
    is_arrow = type(rows).__module__.partition(".")[0] in ("pyarrow", "polars")
    # Those take no mask in brackets.
    selected: Table = rows.filter(good) if is_arrow else rows[good]
    return selected


def find_good_rows(
    table: Any,
    *,
    flags: Iterable[str | int] = REJECTING_FLAGS,
    psf_fraction: float | None = None,
    psf_chi2: float | None = None,
    bad_fraction: float | None = None,
) -> np.ndarray:
    """Return which rows `select_good_rows` selects.

    Parameters
    ----------
    table : pandas.DataFrame, astropy.table.Table, pyarrow.Table or polars.DataFrame
        Rows of spxdask.
    flags : iterable of str or int
        See `select_good_rows`.
    psf_fraction : float, optional
        See `select_good_rows`.
    psf_chi2 : float, optional
        See `select_good_rows`.
    bad_fraction : float, optional
        See `select_good_rows`.

    Returns
    -------
    (n,) bool array

    Raises
    ------
    ConfigError
        If there is no such flag, or the table lacks a column.
    """
    flag, flux = _read_numbers(table["flag"]), _read_numbers(table["flux"])
    # A row whose flags are missing is not known to be good.
    bits = np.where(np.isfinite(flag), flag, REJECTING_MASK).astype(np.int64)
    mask = REJECTING_MASK if flags is REJECTING_FLAGS else _make_mask(flags)
    good: np.ndarray = (bits & mask == 0) & np.isfinite(flux)
    if mask:
        good &= np.isfinite(flag)
    cuts = {
        "psf_fraction": (psf_fraction, np.greater_equal),
        "psf_chi2": (psf_chi2, np.less_equal),
        "bad_fraction": (bad_fraction, np.less_equal),
    }
    for name, (limit, compare) in cuts.items():
        if limit is None:
            continue
        if name not in _list_names(table):
            raise ConfigError(
                f"a cut in {name} needs that column, which the tables of a run with psf: none do "
                "not have",
                option=name,
                value=limit,
            )
        good &= compare(_read_numbers(table[name]), limit)
    return good


def _list_names(table: Any) -> list[str]:
    """Return the names of the columns of any kind of table."""
    for attribute in ("colnames", "column_names", "columns"):
        if hasattr(table, attribute):
            return list(getattr(table, attribute))
    return list(table)


def _make_mask(flags: Iterable[str | int]) -> int:
    """Return the bits of flags given by name or bit."""
    mask = 0
    for flag in (flags,) if isinstance(flags, str | int) else flags:
        try:
            mask |= 1 << find_bit(flag)
        except ValueError as error:
            near = difflib.get_close_matches(str(flag).upper(), FLAG_BITS, 1)
            hint = f": did you mean {near[0]}?" if near else f": flags are {', '.join(FLAG_BITS)}"
            raise ConfigError(f"{error}{hint}", option="flags", value=flag) from None
    return mask


def _read_numbers(column: Any) -> np.ndarray:
    """Return a column of any kind of table as numbers, NaN where a value is missing."""
    # Bits up to the 53rd are whole as a double; of a quantity, the numbers in its own unit.
    values = column.value if hasattr(column, "unit") and hasattr(column, "value") else column
    return np.ma.filled(np.ma.asarray(values, float), np.nan)
