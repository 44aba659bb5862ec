"""A whole run in one call."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from spxdask.config import BatchConfig
from spxdask.errors import ConfigError
from spxdask.pipeline import BatchPipeline

if TYPE_CHECKING:
    from spxdask.cluster.session import Client
    from spxdask.progress import Progress


def run_batch(
    config: BatchConfig | None = None,
    *,
    catalog: str | os.PathLike | None = None,
    client: Client | None = None,
    scheduler: str | None = None,
    jobqueue: str | os.PathLike | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> BatchPipeline:
    """Run the four stages in one call.

    Parameters
    ----------
    config : BatchConfig, optional
        The run; or give its options by name.
    catalog : path, optional
        Short for the option ``catalog_path``.
    client, scheduler, jobqueue, progress
        As in `BatchPipeline`.
    **options
        Options of `BatchConfig`, such as ``center_ra``, ``radius`` or ``bands``.

    Returns
    -------
    BatchPipeline
        Finished; its `summary` says what happened.

    Raises
    ------
    ConfigError
        If an option is unknown, missing or not allowed.

    Examples
    --------
    >>> from spxdask import run_batch
    >>> pipeline = run_batch(
    ...     catalog="sources.csv", center_ra=270.0, center_dec=66.56, radius=1.0, bands=["D3"]
    ... )  # doctest: +SKIP
    """
    if catalog is not None:
        options["catalog_path"] = catalog
    if config is None:
        config = BatchConfig.from_dict(options)
    elif options:
        raise ConfigError(f"give a config or options, not both: {', '.join(options)}")
    pipeline = BatchPipeline(
        config, client=client, scheduler=scheduler, jobqueue=jobqueue, progress=progress
    )
    pipeline.run_all()
    return pipeline
