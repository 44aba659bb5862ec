"""What every stage begins and ends with: lock, ledger, times."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from spxdask.cluster.page import ProgressPublisher
from spxdask.extras import HATS_EXTRA, import_extra
from spxdask.run.folder import RunFolder
from spxdask.run.sources import RunSources
from spxdask.run.summary import StageReport, describe_stage

__all__ = ["PAGE_NAME", "open_stages"]

PAGE_NAME = "progress.html"

logger = logging.getLogger(__name__)


@contextmanager
def open_stages(
    stages: Sequence[str], folder: RunFolder, sources: RunSources, progress: ProgressPublisher
) -> Iterator[list[StageReport]]:
    """Lock the folder of a run for stages, and time them.

    Parameters
    ----------
    stages : sequence of str
        Their names.
    folder : RunFolder
        Its ledger is up to date in the block, and is flushed behind it.
    sources : RunSources
        What of them is kept in the folder is kept before the block.
    progress : ProgressPublisher
        Ends with the block.

    Yields
    ------
    list of StageReport
        One for each stage, without times before the end.
    """
    if sources.config.lightcurve_format == "hats":
        # Said before the first frame, not after the last.
        import_extra("hats.io", HATS_EXTRA, "lightcurve_format hats")
    reports = [StageReport(stage=stage) for stage in stages]
    started = time.monotonic()
    logger.info("%s: begins", ", ".join(stages))
    with folder.locked():
        folder.ledger.refresh()
        sources.keep(stages, reports[0])
        try:
            yield reports
        finally:
            # The ledger of a folder that another run has taken over is not ours to write.
            progress.finish()
            if not folder.is_lock_lost:
                folder.ledger.flush()
                # What the dashboard showed, for when the cluster has gone.
                folder.root.put(PAGE_NAME, progress.format_page().encode())
        # Workers that died leave partial files behind.
        folder.delete_partial_files()
    for report in reports:
        report.seconds = time.monotonic() - started
        logger.info("%s", describe_stage(report))
