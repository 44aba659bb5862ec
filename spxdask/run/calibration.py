"""Which calibration products the frames of a run are measured with, kept in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from spxdask.archive.calibration import (
    MAX_CONCURRENT_REQUESTS,
    CalibrationSet,
    LocatedProduct,
    ProductSource,
    find_in_cache,
    find_products,
    find_releases,
    obtain_product,
)
from spxdask.archive.retry import RetryPolicy
from spxdask.config import BatchConfig
from spxdask.errors import ArchiveError
from spxdask.science.calibration import USABLE_WAVELENGTH_UM
from spxdask.science.families import FAMILIES
from spxdask.storage import Store

__all__ = [
    "ProductStatus",
    "describe_products",
    "load_calibration",
    "make_product_source",
    "save_calibration",
    "survey_products",
]

CALIBRATION_NAME = "calibration.json"
BANDS = tuple(USABLE_WAVELENGTH_UM)
ABSENT = "there is no product"


def make_product_source(config: BatchConfig) -> ProductSource | None:
    """Return where the products of a run come from.

    Parameters
    ----------
    config : BatchConfig
        The run.

    Returns
    -------
    ProductSource or None
        None if nothing but what is in the frames is used.
    """
    if config.calibration == "frame":
        return None
    return ProductSource(
        url=config.archive_url if config.calibration == "archive" else config.calibration,
        retry=RetryPolicy(max_retries=config.max_retries),
        stall_timeout_s=config.stall_timeout,
        endpoint=config.archive_endpoint,
    )


def save_calibration(
    folder: Store, config: BatchConfig, calibration: CalibrationSet, query_time: str
) -> None:
    """Save the products of a run.

    Parameters
    ----------
    folder : Store
        The state folder of the run.
    config : BatchConfig
        The run.
    calibration : CalibrationSet
        What its frames are measured with.
    query_time : str
        When the archive was asked for these frames.
    """
    origin = {"options": _list_options(config), "query_time": query_time}
    content = {**origin, **json.loads(calibration.to_json())}
    folder.put(CALIBRATION_NAME, json.dumps(content, indent=1).encode())


def load_calibration(
    folder: Store, config: BatchConfig, *, query_time: str | None = None
) -> CalibrationSet | None:
    """Return the products of a run.

    Parameters
    ----------
    folder : Store
        The state folder of the run.
    config : BatchConfig
        The run.
    query_time : str, optional
        When the archive was asked for the frames; by default, products that were chosen for the
        frames of an earlier query are returned, too.

    Returns
    -------
    CalibrationSet or None
        None if none were saved, or with other options. With ``calibration: frame``, the empty set.
    """
    source = make_product_source(config)
    if source is None:
        return CalibrationSet()
    if not folder.exists(CALIBRATION_NAME):
        return None
    text = folder.get(CALIBRATION_NAME)
    try:
        found = json.loads(text)
        if found["options"] != _list_options(config):
            return None
        if query_time not in (None, found["query_time"]):
            return None
        return CalibrationSet.from_json(text, source)
    except (ValueError, TypeError, KeyError):
        # Written by another version; the next query writes it again.
        return None


def _list_options(config: BatchConfig) -> list:
    """Return what the choice of products depends on besides the frames, as JSON has it."""
    pins = [[family, [*tokens]] for family, tokens in config.calibration_pins]
    needs_psf = config.photometry.psf != "none"
    return [config.calibration, config.archive_url, pins, needs_psf]


@dataclass(frozen=True, kw_only=True)
class ProductStatus:
    """A product of one family for one band.

    Attributes
    ----------
    family, band : str
        Such as ``epsf`` and ``D3``.
    used : str or None
        The token of what a run folder uses, None if it uses none.
    newest : str or None
        The token of what the archive has; of those pinned, if any are.
    is_cached : bool
        Whether the file that the archive has is in the cache.
    problem : str or None
        Why it cannot be had.
    """

    family: str
    band: str
    used: str | None
    newest: str | None = None
    is_cached: bool = False
    problem: str | None = None


def survey_products(
    config: BatchConfig, used: CalibrationSet | None, *, fetch: bool
) -> list[ProductStatus]:
    """Compare the products of a run with those of the archive.

    Parameters
    ----------
    config : BatchConfig
        Its bands, and where products come from.
    used : CalibrationSet or None
        What the run uses.
    fetch : bool
        Whether what is not in the cache is fetched.

    Returns
    -------
    list of ProductStatus
        By family and band.

    Raises
    ------
    InputError
        If the cache cannot be written.
    DiskFullError
        If there is no room for a product.
    """
    tokens = {(p.family, p.band): p.token for p in used.products} if used else {}
    bands = sorted(config.bands or BANDS)
    source = make_product_source(config)
    if source is None:
        return []

    def survey(family: str, releases: list[str]) -> list[ProductStatus]:
        pins = dict(config.calibration_pins).get(family, ())
        try:
            found = find_products(source, family, bands, releases=releases, pins=pins)
        except ArchiveError as error:
            return [make(family, band, problem=str(error)) for band in bands]
        return [check(family, band, found.get(band)) for band in bands]

    def check(family: str, band: str, located: LocatedProduct | None) -> ProductStatus:
        if located is None:
            return make(family, band, problem=ABSENT)
        make_found = partial(make, family, band, newest=located.token)
        try:
            product = obtain_product(located, source) if fetch else find_in_cache(located)
        except ArchiveError as error:
            return make_found(problem=str(error))
        return make_found(is_cached=product is not None)

    def make(family: str, band: str, **state: Any) -> ProductStatus:
        return ProductStatus(family=family, band=band, used=tokens.get((family, band)), **state)

    try:
        releases = find_releases(source, [])
    except ArchiveError as error:
        reason = f"the archive cannot be listed ({error})"
        return [make(family, band, problem=reason) for family in FAMILIES for band in bands]
    with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS) as threads:
        found = threads.map(partial(survey, releases=releases), FAMILIES)
        return [status for statuses in found for status in statuses]


def describe_products(statuses: Iterable[ProductStatus]) -> str:
    """Return a table of products for a terminal.

    Parameters
    ----------
    statuses : iterable of ProductStatus
        By family and band.

    Returns
    -------
    str
        A line for bands of a family that are alike.
    """
    statuses = list(statuses)
    table = [("product", "bands", "used", "newest", "")]
    for (family, used, newest, is_cached), group in _group(statuses):
        bands = " ".join(status.band for status in group)
        state = "in the cache" if is_cached else "not in the cache" if newest else "not found"
        table.append((family, bands, used or "-", newest or "-", state))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    problems: dict[str, dict[str, None]] = {}
    for status in statuses:
        if status.problem not in (None, ABSENT):
            problems.setdefault(str(status.problem), {})[status.family] = None
    return "\n".join(lines + [f"{', '.join(names)}: {why}" for why, names in problems.items()])


def _group(statuses: list[ProductStatus]) -> Iterator[tuple[tuple, list[ProductStatus]]]:
    """Yield what products have in common, and the products, in order of their families."""

    def describe(status: ProductStatus) -> tuple:
        return (
            FAMILIES.index(status.family),
            status.used or "",
            status.newest or "",
            status.is_cached,
        )

    for key, group in groupby(sorted(statuses, key=describe), describe):
        yield (FAMILIES[key[0]], *key[1:]), sorted(group, key=lambda status: status.band)
