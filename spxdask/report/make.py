"""Make the report of a run: report.html and report.json in its output folder."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from typing import Any

from spxdask.report.collect import collect_numbers, identify
from spxdask.report.page import render_page
from spxdask.run.folder import REPORT_NAMES, RunFolder
from spxdask.run.summary import RunSummary

__all__ = ["is_report_current", "make_report", "make_report_of_run"]

logger = logging.getLogger(__name__)

# The report of a run with more rows is made on its cluster, not in this process.
CLUSTER_ROWS = 2_000_000


def make_report(path: str | os.PathLike[str], *, scheduler: Any = None) -> dict[str, Any]:
    """Write the report of a run, of whatever there is in its folder.

    Parameters
    ----------
    path : path
        The output folder, on disk or in an object store.
    scheduler : optional
        Where large tables are read: a client of a cluster, or what `dask.compute` takes; by
        default, threads of this process.

    Returns
    -------
    dict
        The content of `report.json`.

    Raises
    ------
    RunFolderError
        If it is not the output folder of a run.
    DiskFullError, StoreError
        If it cannot be written.
    """
    folder = RunFolder(path)
    numbers, drawing = collect_numbers(folder, scheduler)
    numbers = _make_plain(numbers)
    page, content = REPORT_NAMES
    folder.root.put(page, render_page(numbers, drawing).encode("utf-8", "backslashreplace"))
    # The latter says what both are made of, and so comes last.
    folder.root.put(content, (json.dumps(numbers, indent=1, allow_nan=False) + "\n").encode())
    return numbers


def make_report_of_run(summary: RunSummary, connect: Callable[[], Any]) -> str:
    """Bring the report of a run up to date at its end; a failure does not cost the run.

    Parameters
    ----------
    summary : RunSummary
        What the run did.
    connect : callable
        Returns the client of the run's cluster, on which large tables are read.

    Returns
    -------
    str
        For the summary.
    """
    path, extracted = summary.output, summary.stages.get("extract")
    is_large = extracted is not None and extracted.rows > CLUSTER_ROWS
    started = time.monotonic()
    name = REPORT_NAMES[0]
    try:
        if is_report_current(path):
            return f"{name} (already there)"
        make_report(path, scheduler=connect() if is_large else None)
    except Exception as error:
        # Whatever is in the tables, the results of the run are there.
        reason = str(error).partition("\n")[0] or type(error).__name__
        logger.warning("no report was made: %s", reason)
        logger.debug("the report failed", exc_info=True)
        return f"not made: {reason}"
    return f"{name:<52} {time.monotonic() - started:8.1f} s"


def is_report_current(path: str | os.PathLike[str]) -> bool:
    """Return whether the report that is there would be made again with the same content.

    Parameters
    ----------
    path : path
        The output folder.

    Returns
    -------
    bool
        False without a report.
    """
    folder = RunFolder(path)
    if not all(folder.root.exists(name) for name in REPORT_NAMES):
        return False
    try:
        found = json.loads(folder.root.get(REPORT_NAMES[1]))["made_of"]
    except (ValueError, TypeError, KeyError):
        return False
    folder.ledger.refresh()
    return bool(found == _make_plain(identify(folder, folder.saved_config())))


def _make_plain(value: Any) -> Any:
    """Return a value as JSON has it; numbers that are not finite are None."""
    if isinstance(value, dict):
        return {str(k): _make_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_make_plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
