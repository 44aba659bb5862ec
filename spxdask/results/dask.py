"""All rows of a run as a Dask DataFrame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dask.dataframe as dd
import pandas as pd
import pyarrow as pa

from spxdask.results.curves import Curves

__all__ = ["make_dask_frame"]


class _Reader:
    """Reads a part of the light curves; Dask asks for fewer columns where it can."""

    def __init__(self, curves: Curves, names: Sequence[str]) -> None:
        self._curves, self._names = curves, names

    def __call__(self, part: Any, columns: Sequence[str] | None = None) -> pd.DataFrame:
        names = list(self._names if columns is None else columns)
        rows = self._curves.read_part(part, [name for name in names if name != "target_id"])
        return _to_pandas(rows.select(names))


def make_dask_frame(curves: Curves) -> dd.DataFrame:
    """Return all rows as a Dask DataFrame.

    Parameters
    ----------
    curves : Curves
        The light curves.

    Returns
    -------
    dask.dataframe.DataFrame
        A partition for each of the parts.
    """
    first = curves.read_part(curves.parts[0])
    reader = _Reader(curves, first.column_names)
    return dd.from_map(
        reader, curves.parts, meta=_to_pandas(first.slice(0, 0)), label="light-curves"
    )


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    text = pd.ArrowDtype(pa.string())
    is_text = (pa.string(), pa.large_string())
    columns = [
        pa.field(field.name, pa.string() if field.type in is_text else field.type)
        for field in table.schema
    ]
    return table.cast(pa.schema(columns)).to_pandas(
        types_mapper=lambda kind: text if kind == pa.string() else None
    )
