"""Query: which frames cover the field, from the archive's TAP service."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from urllib.parse import urlsplit

import numpy as np
import pyvo
import requests
from astropy.table import Table
from pyvo.dal import DALFormatError, DALQuery, DALQueryError, DALServiceError
from pyvo.dal.tap import AsyncTAPJob, TAPResults
from urllib3.exceptions import HTTPError, MaxRetryError, ProxyError, ReadTimeoutError

from spxdask.archive import retry
from spxdask.archive.observation import (
    Observation,
    check_uri,
    filename_identity,
    frame_url,
    is_level2_name,
)
from spxdask.archive.urls import without_credentials
from spxdask.config import BatchConfig
from spxdask.errors import ArchiveError, InputError, TruncatedAnswerError

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
# Answers take a minute at worst; beyond these the query is better off as a job.
CONNECT_TIMEOUT_S = 20.0
SYNC_TIMEOUT_S = 300.0
JOB_TIMEOUT_S = 4 * 3600.0
FIRST_POLL_S = 0.2
LONGEST_POLL_S = 15.0
# Rows asked of a job; a whole survey has some 1.5 million.
JOB_MAXREC = 20_000_000

_COLLECTION = re.compile(r"ivo://[^?]*/spherex_(?P<release>qr\d+)(?P<deep>_deep)?\?")


def find_observations(config: BatchConfig) -> list[Observation]:
    """Ask the archive for the frames of a run.

    Parameters
    ----------
    config : BatchConfig

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
    InputError
        If more frames than ``max_images`` were found.
    """
    answer = ask(config.tap_url, adql(config), max_retries=config.max_retries)
    observations = select(answer, config)
    check_count(observations, config)
    return observations


def adql(config: BatchConfig) -> str:
    """Return the query of a run, in ADQL 2.0."""
    place = ", ".join(map(_literal, (config.center_ra, config.center_dec, config.radius)))
    circle = f"CIRCLE('ICRS', {place})"
    where = [
        f"INTERSECTS(p.poly, {circle}) = 1"
        if config.coverage_mode == "any"
        else f"CONTAINS({circle}, p.poly) = 1"
    ]
    if config.bands is not None:
        names = ", ".join(f"'SPHEREx-{band}'" for band in config.bands)
        where.append(f"p.energy_bandpassname IN ({names})")
    if config.mjd_range is not None:
        # All exposures that could have their middle in the range; `select` is exact.
        first, last = map(_literal, config.mjd_range)
        where += [f"p.time_bounds_upper >= {first}", f"p.time_bounds_lower <= {last}"]
    return (
        f"SELECT {', '.join(COLUMNS)} "
        "FROM spherex.plane AS p INNER JOIN spherex.artifact AS a ON a.planeid = p.planeid "
        f"WHERE {' AND '.join(where)}"
    )


def _literal(value: float) -> str:
    """Write a number out in full: ADQL's grammar has no exponent with a small e."""
    return np.format_float_positional(value, trim="0")


def select(answer: Table, config: BatchConfig) -> list[Observation]:
    """Turn the archive's rows into observations; see `find_observations`."""
    kept: dict[tuple[str, ...], Observation] = {}
    others = 0
    for row in answer.iterrows():
        did, *bounds, uri, size = row
        uri = str(uri)
        collection = _COLLECTION.match(str(did))
        if collection is None or not is_level2_name(uri):
            others += 1
            continue
        if config.release in ("qr2", "qr3") and collection["release"] != config.release:
            continue
        check_uri(uri)
        bounds = (np.nan if np.ma.is_masked(bound) else float(bound) for bound in bounds)
        lower, upper, begin, end = bounds
        mjd = (begin + end) / 2
        if config.mjd_range and not config.mjd_range[0] <= mjd <= config.mjd_range[1]:
            continue
        obs_id, band = filename_identity(uri.rpartition("/")[2])
        observation = Observation(
            obs_id=obs_id,
            band=band,
            mjd=mjd,
            wavelength_um=(lower + upper) / 2 * 1e6,
            uri=uri,
            download_url=frame_url(config.archive_url, uri),
            size_bytes=None if np.ma.is_masked(size) or int(size) <= 0 else int(size),
        )
        # A file name holds exposure, detector and version, and is ours on disk.
        key = (observation.filename,) if config.release == "all" else (obs_id, band)
        if key not in kept or kept[key].recency < observation.recency:
            kept[key] = observation
    if others:
        logger.info("%d files that are not Level 2 science frames left out", others)
    # A frame without a time comes last.
    return sorted(
        kept.values(),
        key=lambda o: (np.nan_to_num(o.mjd, nan=np.inf), o.obs_id, o.band, o.filename),
    )


def check_count(observations: list[Observation], config: BatchConfig) -> None:
    """Raise InputError when there are more observations than the run allows."""
    if len(observations) <= config.max_images:
        return
    raise InputError(
        f"{len(observations):,} frames ({gigabytes(observations):,.1f} GB) cover the field, "
        f"max_images allows {config.max_images:,}; raise max_images, or take a smaller radius, "
        "fewer bands or a shorter mjd_range"
    )


def gigabytes(observations: Iterable[Observation]) -> float:
    """Return the size of the frames in GB, 71.6 MB where the archive does not say."""
    return sum(o.size_bytes or 71_600_000 for o in observations) / 1e9


def ask(tap_url: str, query: str, *, max_retries: int) -> Table:
    """Run a query, sync first, then as a job when the sync endpoint cannot answer it.

    Returns
    -------
    Table
        The whole answer.

    Raises
    ------
    ArchiveError, TruncatedAnswerError
    """
    with _Session() as session:
        return _ask(pyvo.dal.TAPService(tap_url, session=session), query, max_retries)


def _ask(service: pyvo.dal.TAPService, query: str, max_retries: int) -> Table:
    url = service.baseurl
    try:
        results = _repeat(lambda: _sync(service, query), "the TAP service", url, max_retries)
        if not _overflowed(results):
            return results.to_table()
        logger.info("sync answer cut at %d rows, asking again as a job", len(results))
    except (_RefusedError, _UnreachableError):
        raise
    except ArchiveError as error:
        logger.info("sync query failed (%s), asking again as a job", error)
    results = _run_job(service, query, max_retries)
    if _overflowed(results):
        raise TruncatedAnswerError(
            f"{without_credentials(url)} cut its answer at {len(results):,} rows; take a smaller "
            "radius, fewer bands or a shorter mjd_range"
        )
    return results.to_table()


def _sync(service: pyvo.dal.TAPService, query: str) -> TAPResults:
    try:
        return _fetch(service.create_query(query))
    except DALFormatError as error:
        # It would take as long the next time.
        if isinstance(error.cause, requests.ReadTimeout | ReadTimeoutError):
            raise ArchiveError(f"no answer within {SYNC_TIMEOUT_S:g} s") from error
        raise


def _fetch(request: DALQuery) -> TAPResults:
    """Fetch an answer without pyvo's warning of a cut one; `_overflowed` looks by itself."""
    return TAPResults(request.execute_votable(), url=request.queryurl)


def _overflowed(results: TAPResults) -> bool:
    """Tell whether an answer says anywhere that it is not the whole."""
    elements = [results.votable, *results.votable.iter_tables()]
    for element in elements:
        elements += getattr(element, "resources", ())
    return any(
        info.name.upper() == "QUERY_STATUS" and info.value.upper() == "OVERFLOW"
        for element in elements
        for info in element.infos
    )


def _run_job(service: pyvo.dal.TAPService, query: str, max_retries: int) -> TAPResults:
    """Run a query as a UWS job; polls by itself, as pyvo gives up on the first lost poll."""
    name = "the TAP service's job"

    def create() -> AsyncTAPJob:
        job = service.submit_job(query, maxrec=JOB_MAXREC)
        if urlsplit(job.url).path.endswith("/async"):
            raise DALFormatError(reason="no job was made of the query", url=job.url)
        return job

    def poll() -> str:
        phase = job.phase
        if phase is None:
            raise DALFormatError(reason="the answer does not describe the job", url=job.url)
        # Looked at first, as a call to run may have been lost, or only its answer.
        if phase == "PENDING":
            job.run()
        return phase

    job = _repeat(create, name, service.baseurl, max_retries)
    try:
        deadline = time.monotonic() + JOB_TIMEOUT_S
        pause = FIRST_POLL_S
        ended = ("COMPLETED", "ERROR", "ABORTED")
        while (phase := _repeat(poll, name, service.baseurl, max_retries)) not in ended:
            if time.monotonic() > deadline:
                raise ArchiveError(f"{name} did not end within {JOB_TIMEOUT_S / 3600:g} hours")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_S)
        if phase != "COMPLETED":
            summary = getattr(job._job, "errorsummary", None)
            said = getattr(getattr(summary, "message", None), "content", None)
            raise ArchiveError(f"{name} ended as {phase}: {said or 'no reason given'}")
        # Not `fetch_result`, which lets errors of all kinds through.
        url = job.result_uri or f"{job.url}/results/result"

        def fetch() -> TAPResults:
            return _fetch(DALQuery(url, session=service._session))

        return _repeat(fetch, name, url, max_retries)
    finally:
        try:
            job.delete()
        except (DALServiceError, requests.RequestException) as error:
            logger.debug("job not deleted: %s", error)


class _RefusedError(ArchiveError):
    """The archive's last word: asking again, or otherwise, would not help."""


class _UnreachableError(ArchiveError):
    """No connection to the archive came about, and none would for another request."""


def _repeat(call: Callable, name: str, url: str, max_retries: int):
    """Call until it answers; only what may pass by itself is tried again."""
    for attempt in range(1, max_retries + 2):
        try:
            return call()
        except DALQueryError as error:
            said = without_credentials(str(error))
            raise _RefusedError(f"{name} rejected the query: {said}") from error
        except (DALFormatError, DALServiceError, requests.RequestException) as error:
            response = getattr(getattr(error, "cause", None) or error, "response", None)
            if response is not None and response.status_code not in retry.TRANSIENT_STATUS:
                said = without_credentials(str(error))
                raise _RefusedError(f"{name} refused the query: {said}") from error
            retry_after = response.headers.get("Retry-After") if response is not None else None
            failure = error
        except (HTTPError, ValueError) as error:
            # What pyvo lets through of a job's description that is cut or no XML.
            failure, retry_after = error, None
        if attempt <= max_retries:
            pause = retry.delay(attempt, retry_after)
            said = without_credentials(str(failure))
            logger.info("%s failed (%s), again in %.1f s", name, said, pause)
            time.sleep(pause)
    unconnected = _unconnected(failure)
    if unconnected is not None:
        raise _UnreachableError(
            f"cannot reach {without_credentials(url)}: {unconnected} (after {attempt} "
            f"attempt{'s' if attempt > 1 else ''})"
        ) from failure
    said = without_credentials(str(failure))
    raise ArchiveError(f"{name} does not answer as it should: {said}") from failure


def _unconnected(failure: Exception) -> str | None:
    """Say why no connection came about, None if one did."""
    error = getattr(failure, "cause", None) or failure
    if not isinstance(error, requests.ConnectionError):
        return None
    if not (error.args and isinstance(error.args[0], MaxRetryError)):
        return None
    reason = error.args[0].reason
    start = "the proxy: " if isinstance(reason, ProxyError) else ""
    # What the system said is at the bottom.
    bottom: BaseException | None = reason
    while bottom is not None and not isinstance(bottom, OSError):
        bottom = bottom.__cause__ or bottom.__context__
    said = getattr(bottom, "strerror", None) or without_credentials(str(bottom or reason))
    if said == "timed out":
        said = f"no connection within {CONNECT_TIMEOUT_S:g} s"
    return f"{start}{said[:1].lower()}{said[1:]}"


class _Session(requests.Session):
    """What pyvo leaves out: no request waits for ever, every answer is closed, and a busy
    server is told from a wrong query although both may send a VOTable that says ERROR.
    """

    def __init__(self) -> None:
        super().__init__()
        self._answers = ExitStack()

    def request(self, method, url, **options):
        options.setdefault("timeout", (CONNECT_TIMEOUT_S, SYNC_TIMEOUT_S))
        answer = super().request(method, url, **options)
        self._answers.callback(answer.close)
        if answer.status_code in retry.TRANSIENT_STATUS - {500}:
            answer.raise_for_status()
        return answer

    def close(self):
        self._answers.close()
        super().close()
