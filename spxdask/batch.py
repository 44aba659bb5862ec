"""A whole run in one call."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

from spxdask.config import BatchConfig, check_options, expand_path, name_file, read_options
from spxdask.errors import ConfigError
from spxdask.pipeline import BatchPipeline

if TYPE_CHECKING:
    from spxdask.cluster.session import Client
    from spxdask.progress import Progress


def run_batch(
    config: Any = None,
    *,
    catalog: Any = None,
    client: Client | None = None,
    scheduler: str | None = None,
    jobqueue: str | os.PathLike | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> BatchPipeline:
    """Run the four stages in one call.

    Parameters
    ----------
    config : BatchConfig, path or table, optional
        The options of the run; or the path of a YAML file (``.yaml``, ``.yml``) of options, over
        which those passed by name take precedence; or what ``catalog`` may be. Without it, or
        with a catalogue, options are passed by name.
    catalog : path, Table, DataFrame or SkyCoord, optional
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
        if "catalog_path" in options:
            raise ConfigError("catalog and catalog_path are the same option: pass one of them")
        options["catalog_path"] = catalog
    if not isinstance(config, BatchConfig):
        config = BatchConfig.from_dict(_find_options(config, options))
    elif options:
        raise ConfigError(f"pass a config or options, not both: {', '.join(options)}")
    pipeline = BatchPipeline(
        config, client=client, scheduler=scheduler, jobqueue=jobqueue, progress=progress
    )
    pipeline.run_all()
    return pipeline


def _list_parameters() -> inspect.Signature:
    """Return the signature of `run_batch` with each option by its name, for tab completion."""
    own = inspect.signature(run_batch)
    given = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = inspect.signature(BatchConfig).parameters.values()
    by_name = [p.replace(kind=p.KEYWORD_ONLY) for p in options]
    return own.replace(parameters=[*given, *by_name])


# Not written out, as they would be the fields of BatchConfig a second time.
run_batch.__signature__ = _list_parameters()  # type: ignore[attr-defined]


def _find_options(given: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return all options, where the first argument is a YAML file or a catalogue."""
    if given is None:
        return options
    if isinstance(given, str | os.PathLike):
        path = expand_path(given, "config")
        if path.lower().endswith((".yaml", ".yml")):
            values = read_options(path)
            with name_file(path):
                check_options(BatchConfig, {k: v for k, v in values.items() if k not in options})
            # Options that a template leaves open are null.
            return {k: v for k, v in values.items() if v is not None or k not in options} | options
    if "catalog_path" in options:
        raise ConfigError("the catalogue is given twice: drop the first argument or catalog")
    return {"catalog_path": given} | options
