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
        The options of the run. Without it, they are passed by name.
    catalog : path, optional
        Another name of the option ``catalog_path``.
    client : distributed.Client, optional
        Cluster to use; `BatchPipeline` describes this and the next three parameters.
    scheduler : str, optional
        Address of a scheduler, or its scheduler file.
    jobqueue : path, optional
        YAML file of a batch system.
    progress : bool or Progress, default True
        Whether a bar is drawn for each stage, or an object that receives the progress.
    **options
        Options of `BatchConfig`, such as ``center_ra``, ``radius`` or ``bands``.

    Returns
    -------
    BatchPipeline
        The finished pipeline; its `summary` counts what was done and names what failed.

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
        raise ConfigError(f"pass a config or options, not both: {', '.join(options)}")
    pipeline = BatchPipeline(
        config, client=client, scheduler=scheduler, jobqueue=jobqueue, progress=progress
    )
    pipeline.run_all()
    return pipeline
