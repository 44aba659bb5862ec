"""Query stage: which frames cover the field, from the archive's TAP service."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np
from astropy.table import Table

from spxdask.archive.observation import (
    Observation,
    check_uri,
    frame_url,
    is_level2_name,
    parse_filename,
    parse_release,
)
from spxdask.archive.outage import OutagePolicy, wait_out
from spxdask.archive.retry import RetryPolicy
from spxdask.archive.tap import QueryRejectedError, TapOptions, run_adql
from spxdask.config import RELEASES, BatchConfig
from spxdask.errors import InputError, TruncatedAnswerError, UnreachableError
from spxdask.run.folder import RunFolder
from spxdask.run.plan import NO_SOURCE
from spxdask.run.query_summary import Field
from spxdask.run.summary import StageReport
from spxdask.science.catalogue import Catalogue
from spxdask.science.footprint import Circle, pack_footprint
from spxdask.text import format_count

logger = logging.getLogger(__name__)

COLUMNS = (
    "p.obs_publisher_did",
    "p.energy_bounds_lower",
    "p.energy_bounds_upper",
    "p.time_bounds_lower",
    "p.time_bounds_upper",
    "a.uri",
    "a.contentlength",
)
FOOTPRINT_COLUMN = "p.poly"
# Queries that the archive answers at once, at the most.
QUERIES_AT_ONCE = 4
# A source farther than this from the field is on none of its frames, which are 3.5 deg wide.
FRAME_REACH_DEG = 6.0
# Length of a QR2 frame, taken where the archive does not state one.
TYPICAL_FRAME_BYTES = 71_600_000


def find_patiently(
    config: BatchConfig,
    circles: Sequence[Circle],
    *,
    policy: OutagePolicy,
    run_once: Callable[..., list[Observation]],
    on_wait: Callable[[str | None], None],
    may_be_mistaken: bool,
) -> list[Observation]:
    """Query the archive, and wait out an outage.

    Parameters
    ----------
    config : BatchConfig
        The run.
    circles : sequence of Circle
        The field.
    policy : OutagePolicy
        How long to wait for the archive.
    run_once : callable
        Calls a function with arguments, somewhere.
    on_wait : callable
        Called with the reason when the query waits for the archive, with None when it goes on.
    may_be_mistaken : bool
        Whether nobody at the archive's address is more likely a mistake in it than an outage.

    Returns
    -------
    list of Observation
        As `find_observations` returns them.
    """

    def ask(is_first: bool) -> list[Observation]:
        # Without retries where the archive did not answer before.
        asked = config if is_first else dataclasses.replace(config, max_retries=0)
        try:
            return run_once(find_observations, asked, circles)
        except UnreachableError as error:
            if is_first and may_be_mistaken:
                error.blame = "access"
            raise

    return wait_out(ask, policy, on_wait)


def find_observations(
    config: BatchConfig,
    circles: Sequence[Circle] | None = None,
    *,
    tap_options: TapOptions | None = None,
) -> list[Observation]:
    """Query the archive for the frames of a run, with a query for each circle.

    Parameters
    ----------
    config : BatchConfig
        The run.
    circles : sequence of Circle, optional
        The field; by default the circle that the configuration names.
    tap_options : TapOptions, optional
        Patience and limits of the query; by default with the run's ``max_retries``.

    Returns
    -------
    list of Observation
        Each exposure and detector once (each file once with ``release="all"``), sorted by
        time, observation and band. Empty when nothing covers the field.

    Raises
    ------
    ArchiveError
        If the archive rejects the query, or does not answer it after all retries.
    TruncatedAnswerError
        If it answers only in part.
    """
    if tap_options is None:
        tap_options = TapOptions(retry=RetryPolicy(max_retries=config.max_retries))
    circles = [_own_circle(config)] if circles is None else circles
    ask = _Query(config, tap_options)
    if len(circles) == 1:
        # In this thread, which Ctrl-C interrupts.
        ask(circles[0])
        return ask.selection.finish()
    pool = ThreadPoolExecutor(min(QUERIES_AT_ONCE, config.max_download_workers))
    try:
        for n, answered in enumerate(as_completed(pool.submit(ask, c) for c in circles), start=1):
            answered.result()
            logger.info("%d of %d queries answered", n, len(circles))
    finally:
        # After an error, what is asked already is not waited for.
        pool.shutdown(wait=False, cancel_futures=True)
    return ask.selection.finish()


class _Query:
    """The queries of a run, which differ by their circles; threads may share it."""

    def __init__(self, config: BatchConfig, tap_options: TapOptions) -> None:
        self._config = config
        self._tap_options = tap_options
        self._footprints = True
        self.selection = _Selection(config)

    def __call__(self, circle: Circle) -> None:
        """Add the frames that the archive has for a circle to the selection."""
        try:
            answer = self._run(circle)
        except TruncatedAnswerError as error:
            is_circle = self._config.region == "circle"
            narrower = "a smaller radius, " if is_circle else "fewer sources, "
            raise TruncatedAnswerError(
                f"{error.reason}; choose {narrower}fewer bands or a shorter mjd_range",
                path=error.path,
            ) from error
        self.selection.add(answer)

    def _run(self, circle: Circle) -> Table:
        config = self._config
        if self._footprints:
            try:
                adql = build_adql(config, circle)
                return run_adql(config.tap_url, adql, self._tap_options)
            except QueryRejectedError as error:
                rejection = error
        # Footprints save transfers; a service that does not give them is of use all the same.
        adql = build_adql(config, circle, footprints=False)
        answer = run_adql(config.tap_url, adql, self._tap_options)
        if self._footprints:
            self._footprints = False
            logger.warning(
                "the archive does not give footprints (%s): all frames of the field are taken",
                rejection.reason,
            )
        return answer


def _own_circle(config: BatchConfig) -> Circle:
    """Return the circle that a configuration names."""
    assert config.center_ra is not None
    assert config.center_dec is not None
    assert config.radius is not None
    return Circle(config.center_ra, config.center_dec, config.radius)


def make_field(config: BatchConfig, catalogue: Catalogue) -> Field:
    """Return what part of the sky a run is about.

    Parameters
    ----------
    config : BatchConfig
        The run.
    catalogue : Catalogue
        Its sources.

    Returns
    -------
    Field
        The circle of the configuration; without one, circles that cover the sources.
    """
    circles = [_own_circle(config)] if config.region == "circle" else catalogue.sky.cover()
    return Field(mode=config.region, circles=circles, n_sources=len(catalogue))


def build_adql(
    config: BatchConfig, circle: Circle | None = None, *, footprints: bool = True
) -> str:
    """Return a query of a run, in ADQL 2.0.

    Parameters
    ----------
    config : BatchConfig
        The run.
    circle : Circle, optional
        Where on the sky; by default the circle that the configuration names.
    footprints : bool
        Whether footprints are asked for.

    Returns
    -------
    str
        A query for `COLUMNS`, in their order, and last for `FOOTPRINT_COLUMN`.
    """
    position = ", ".join(map(_format_number, circle or _own_circle(config)))
    shape = f"CIRCLE('ICRS', {position})"
    conditions = [
        f"INTERSECTS(p.poly, {shape}) = 1"
        if config.coverage_mode == "any"
        else f"CONTAINS({shape}, p.poly) = 1"
    ]
    if config.bands is not None:
        names = ", ".join(f"'SPHEREx-{band}'" for band in config.bands)
        conditions.append(f"p.energy_bandpassname IN ({names})")
    if config.mjd_range is not None:
        # Every exposure whose middle may be in the range; `select_observations` is exact.
        first, last = map(_format_number, config.mjd_range)
        conditions += [f"p.time_bounds_upper >= {first}", f"p.time_bounds_lower <= {last}"]
    columns = (*COLUMNS, FOOTPRINT_COLUMN) if footprints else COLUMNS
    return (
        f"SELECT {', '.join(columns)} "
        "FROM spherex.plane AS p INNER JOIN spherex.artifact AS a ON a.planeid = p.planeid "
        f"WHERE {' AND '.join(conditions)}"
    )


def _format_number(value: float) -> str:
    """Return a number without an exponent, as ADQL's grammar has none with a small e."""
    return np.format_float_positional(value, trim="0")


def select_observations(answer: Table, config: BatchConfig) -> list[Observation]:
    """Turn the rows of the archive's answer into observations.

    Parameters
    ----------
    answer : Table
        Rows with `COLUMNS` in their order, whatever their names.
    config : BatchConfig
        The run.

    Returns
    -------
    list of Observation
        As of `find_observations`.

    Raises
    ------
    ArchiveError
        If a file has a URI that is not a plain relative path.
    """
    selection = _Selection(config)
    selection.add(answer)
    return selection.finish()


class _Selection:
    """The frames of one answer of the archive after the other, in any order; threads share it."""

    def __init__(self, config: BatchConfig) -> None:
        self._config = config
        self._wanted = None if config.release in RELEASES else config.release.split(",")
        self._selected: dict[tuple[str, ...], Observation] = {}
        self._ignored: set[str] = set()
        self._releases: set[str] = set()
        self._lock = threading.Lock()

    def add(self, answer: Table) -> None:
        """Add the rows of an answer."""
        with self._lock:
            for row in answer.iterrows():
                self._add_row(*row)

    def _add_row(
        self,
        publisher_did: Any,
        lower: Any,
        upper: Any,
        begin: Any,
        end: Any,
        uri: Any,
        size: Any,
        footprint: Any = None,
    ) -> None:
        config, uri = self._config, str(uri)
        release = parse_release(str(publisher_did))
        if release is None or not is_level2_name(uri):
            self._ignored.add(f"{uri} of {publisher_did}")
            return
        self._releases.add(release)
        if self._wanted is not None and release not in self._wanted:
            return
        check_uri(uri)
        lower_m, upper_m, begin, end = (
            np.nan if np.ma.is_masked(bound) else float(bound)
            for bound in (lower, upper, begin, end)
        )
        mjd = (begin + end) / 2
        if config.mjd_range and not config.mjd_range[0] <= mjd <= config.mjd_range[1]:
            return
        obs_id, band = parse_filename(uri.rpartition("/")[2])
        observation = Observation(
            obs_id=obs_id,
            band=band,
            mjd=mjd,
            wavelength_um=(lower_m + upper_m) / 2 * 1e6,
            uri=uri,
            download_url=frame_url(config.archive_url, uri),
            size_bytes=None if np.ma.is_masked(size) or int(size) <= 0 else int(size),
            footprint=None if np.ma.is_masked(footprint) else pack_footprint(footprint),
        )
        # A file name states exposure, detector and version. Wide and deep collections may
        # list the same file.
        key = (observation.filename,) if config.release == "all" else (obs_id, band)
        earlier = self._selected.get(key)
        if earlier is None or _rank(earlier) < _rank(observation):
            self._selected[key] = observation

    def finish(self) -> list[Observation]:
        """Warn of what was not understood or not there, and return the frames in order of time."""
        if self._ignored:
            logger.warning(
                "%s of the archive ignored, as name or collection is not understood; for example "
                "%s",
                format_count(len(self._ignored), "file"),
                min(self._ignored)[:200],
            )
        absent = set(self._wanted or ()) - self._releases
        if absent and self._releases:
            logger.warning(
                "no frame of release %s covers the field; there are frames of %s",
                ", ".join(sorted(absent)),
                ", ".join(sorted(self._releases)),
            )
        # Frames without a time come last.
        return sorted(
            self._selected.values(),
            key=lambda o: (np.nan_to_num(o.mjd, nan=np.inf), o.obs_id, o.band, o.filename),
        )


def _rank(observation: Observation) -> tuple[Any, ...]:
    """Return what decides between two entries of a frame, the same in any order of them."""
    o = observation
    return o.recency, o.footprint or b"", o.size_bytes or 0, np.nan_to_num(o.mjd, nan=-np.inf)


def check_count(observations: list[Observation], config: BatchConfig) -> None:
    """Raise an error if there are more observations than the run allows.

    Parameters
    ----------
    observations : list of Observation
        The frames found.
    config : BatchConfig
        The run.

    Raises
    ------
    InputError
        If there are more than ``max_images``.
    """
    if len(observations) <= config.max_images:
        return
    narrower = "a smaller radius, " if config.region == "circle" else ""
    raise InputError(
        f"{len(observations):,} frames ({sum_gigabytes(observations):,.1f} GB) cover the field, "
        f"max_images allows {config.max_images:,}; raise max_images, or choose {narrower}"
        "fewer bands or a shorter mjd_range"
    )


def sum_gigabytes(observations: Iterable[Observation]) -> float:
    """Return the total size of frames.

    Parameters
    ----------
    observations : iterable of Observation
        The frames.

    Returns
    -------
    float
        Size in GB, with 71.6 MB for a frame whose length the archive does not state.
    """
    return sum(o.size_bytes or TYPICAL_FRAME_BYTES for o in observations) / 1e9


def record_query(
    folder: RunFolder,
    config: BatchConfig,
    catalogue: Catalogue,
    field: Field,
    found: Sequence[Observation],
    report: StageReport,
) -> None:
    """Save what a query found, with the catalogue and the configuration, and report it.

    Parameters
    ----------
    folder : RunFolder
        Locked by the caller.
    config : BatchConfig
        The run.
    catalogue : Catalogue
        Its sources.
    field : Field
        Where the frames were looked for.
    found : sequence of Observation
        The result of `find_observations`.
    report : StageReport
        The report to fill in.

    Raises
    ------
    InputError
        If more frames than ``max_images`` are to be fetched.
    """
    is_empty = find_empty(config, catalogue, found)
    taken = [o for o, empty in zip(found, is_empty, strict=True) if not empty]
    check_count(taken, config)
    excluded = Counter({NO_SOURCE: n} if (n := len(found) - len(taken)) else {})
    folder.raise_if_lock_lost()
    folder.save_query(found, config, field, catalogue.fingerprint, is_empty)
    folder.save_catalogue(catalogue)
    folder.save_config(config)
    report.total = report.done = len(found)
    report.bytes = sum(o.size_bytes or 0 for o in taken)
    report.excluded = excluded
    report.without_source = sum(catalogue.sky.find_empty([o.footprint for o in found]))
    report.releases.update(o.release for o in found)
    if config.region == "circle":
        report.outside = len(catalogue) - len(catalogue.within(*field.circles[0]))
        if found:
            warn_of_distant_catalogue(catalogue, config)


def find_empty(
    config: BatchConfig, catalogue: Catalogue, found: Sequence[Observation]
) -> list[bool]:
    """Find the frames that a run neither fetches nor measures, as no source can lie on them.

    Parameters
    ----------
    config : BatchConfig
        The run.
    catalogue : Catalogue
        Its sources.
    found : sequence of Observation
        The frames.

    Returns
    -------
    list of bool
        One for each frame; the plan of the stages that follow decides the same.
    """
    if config.fetches_empty_frames:
        return [False] * len(found)
    unknown = [o.uri for o in found if o.footprint is None]
    if unknown:
        logger.warning(
            "%s of the archive without a footprint that is understood, and fetched whether or not "
            "a source is there; for example %s",
            format_count(len(unknown), "frame"),
            unknown[0][:200],
        )
    return catalogue.sky.find_empty([o.footprint for o in found]).tolist()


def warn_of_distant_catalogue(
    catalogue: Catalogue, config: BatchConfig, reach_deg: float = FRAME_REACH_DEG
) -> None:
    """Warn when all of a catalogue is far from the field, before frames are fetched for nothing.

    Parameters
    ----------
    catalogue : Catalogue
        The sources.
    config : BatchConfig
        The run.
    reach_deg : float
        A source farther than this from the field is on none of its frames, deg.
    """
    ra, dec, radius = _own_circle(config)
    reach = radius + reach_deg
    if not len(catalogue.within(ra, dec, reach)):
        logger.warning(
            "%s: none of the %s sources lies within %g deg of the field's centre (%g, %g); "
            "check that ra and dec are in degrees and not exchanged",
            *(config.catalog_path, f"{len(catalogue):,}", reach),
            *(ra, dec),
        )
