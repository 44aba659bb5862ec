"""Calibration: the products that the frames of a query are measured with."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

from spxdask.archive.calibration import (
    CalibrationSet,
    Product,
    ProductSource,
    obtain_calibration,
    open_in_cache,
)
from spxdask.archive.observation import Observation
from spxdask.archive.outage import OutagePolicy, wait_out
from spxdask.config import BatchConfig
from spxdask.errors import ArchiveError, InputError
from spxdask.run.calibration import load_calibration, make_product_source, save_calibration
from spxdask.run.folder import RunFolder
from spxdask.run.summary import StageReport
from spxdask.science.families import EPSF
from spxdask.storage import local_path

__all__ = ["fetch_products", "prepare_calibration", "require_products_folder"]

logger = logging.getLogger(__name__)


def prepare_calibration(
    folder: RunFolder,
    config: BatchConfig,
    observations: Iterable[Observation],
    report: StageReport | None = None,
) -> CalibrationSet:
    """Return the products of a run; find, fetch and record them if need be.

    Parameters
    ----------
    folder : RunFolder
        Locked by the caller.
    config : BatchConfig
        The run.
    observations : iterable of Observation
        Its frames.
    report : StageReport, optional
        That of a query, after which the archive is asked for its newest products; it gets what
        is used. Otherwise the products of the last query are taken.

    Returns
    -------
    CalibrationSet
        The same for all frames, which are measured alike.

    Raises
    ------
    InputError
        If a product that is to be used is not there, or the cache cannot be written.
    DiskFullError
        If there is no room for the products.
    """
    source = make_product_source(config)
    if source is None:
        return CalibrationSet()
    query = folder.load_observations(config)
    query_time = "" if query is None else query.query_time
    # A query that was killed may have left products for the frames of an earlier one.
    current = load_calibration(folder.state, config, query_time=query_time)
    if current is not None and report is None:
        return current
    recorded = load_calibration(folder.state, config)
    bands, releases = set(), set()
    for observation in observations:
        bands.add(observation.band)
        releases.add(observation.release)
    if not bands:
        return recorded or CalibrationSet(source=source)
    require_products_folder(config)
    skipped = {EPSF} if config.photometry.psf == "none" else set()
    found = obtain_calibration(
        source,
        bands=bands,
        releases=releases,
        pins={name: tokens for name, tokens in config.calibration_pins if name not in skipped},
        skipped=skipped,
        recorded=recorded,
    )
    for family, reason in found.kept.items():
        logger.warning(
            "calibration: %s: the products of the last query are used again: %s", family, reason
        )
    for reason in dict.fromkeys(found.missing.values()):
        families = ", ".join(name for name, why in found.missing.items() if why == reason)
        logger.warning("calibration: %s: the frames' own values are used, as %s", families, reason)
    save_calibration(folder.state, config, found, query_time)
    if report is not None:
        report.products, report.missing_products = found.tokens, dict(found.missing)
    return found


def require_products_folder(config: BatchConfig) -> None:
    """Raise InputError where calibration is a folder on disk that is not there.

    Parameters
    ----------
    config : BatchConfig
        The run.
    """
    if config.calibration in ("archive", "frame"):
        return
    tree = local_path(config.calibration)
    if tree is not None and not tree.is_dir():
        raise InputError(f"calibration: there is no folder {tree}")


def fetch_products(
    calibration: CalibrationSet,
    kinds: Iterable[tuple[str, bool]],
    policy: OutagePolicy,
    on_wait: Callable[[str | None], None],
) -> None:
    """Fetch the products that frames are measured with, and wait out an outage of their archive.

    Without them, each frame would fail. A product that cannot be had for another reason is left to
    the frames that need it.

    Parameters
    ----------
    calibration : CalibrationSet
        The products of the run.
    kinds : iterable of (str, bool)
        Band of the frames, and whether they are early ones; see `CalibrationSet.choose`.
    policy : OutagePolicy
        How long to wait.
    on_wait : callable
        Called with the reason when it waits for the archive, with None when it goes on.

    Raises
    ------
    ArchiveError
        If the archive does not answer for too long.
    InputError
        If the cache cannot be written.
    DiskFullError
        If there is no room for the products.
    """
    products = {p for kind in kinds for p in calibration.choose(*kind).values()}
    for product in sorted(products, key=lambda product: product.filename):
        try:
            wait_out(functools.partial(_fetch, product, calibration.source), policy, on_wait)
        except ArchiveError as error:
            if error.blame == "archive":
                raise
            logger.debug("a product cannot be had: %s", error)


def _fetch(product: Product, source: ProductSource | None, is_first: bool) -> None:
    """Have a product in the cache; ask only once where the archive did not answer before."""
    if source is not None and not is_first:
        source = replace(source, retry=replace(source.retry, max_retries=0))
    open_in_cache(product, source)
