"""Queries of a TAP service: synchronous first, as a job where that does not give the answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyvo
import requests
from astropy.table import Table
from pyvo.dal import DALFormatError, DALQuery, DALQueryError, DALServiceError
from pyvo.dal.tap import AsyncTAPJob, TAPResults
from urllib3.exceptions import HTTPError, MaxRetryError, ProxyError, ReadTimeoutError

from spxdask.archive.retry import TRANSIENT_STATUS, RetryPolicy
from spxdask.archive.urls import strip_credentials
from spxdask.errors import ArchiveError, TruncatedAnswerError

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class TapOptions:
    """How patient queries are.

    Attributes
    ----------
    retry : RetryPolicy
        Number of attempts for each request and the delays between them.
    connect_timeout_s : float
        Longest time until there is a connection, in seconds.
    sync_timeout_s : float
        Longest time without a byte of an answer, in seconds. Answers take a minute at
        worst; a query that takes longer than this is better run as a job.
    job_timeout_s : float
        Longest time for a job, in seconds.
    first_poll_s : float
        Time between the first polls of a job, in seconds. It doubles with each poll.
    longest_poll_s : float
        Longest time between polls, in seconds.
    job_max_rows : int
        Number of rows requested of a job; a whole survey has about 1.5 million.
    """

    retry: RetryPolicy
    connect_timeout_s: float = 20.0
    sync_timeout_s: float = 300.0
    job_timeout_s: float = 4 * 3600.0
    first_poll_s: float = 0.2
    longest_poll_s: float = 15.0
    job_max_rows: int = 20_000_000


def run_adql(url: str, adql: str, options: TapOptions) -> Table:
    """Run a query, and as a job if the synchronous endpoint cannot answer it.

    Parameters
    ----------
    url : str
        Base URL of the TAP service.
    adql : str
        The query.
    options : TapOptions
        Patience and limits.

    Returns
    -------
    Table
        The whole answer.

    Raises
    ------
    ArchiveError
        If the service rejects the query, or does not answer after all retries.
    QueryRejectedError
        The first of these, if the service finds the query itself wrong.
    TruncatedAnswerError
        If it answers only in part.
    """
    with _Session((options.connect_timeout_s, options.sync_timeout_s)) as session:
        return _Query(url, adql, options, session).run()


class _RefusedError(ArchiveError):
    """The service's final answer: neither another attempt nor a job would help."""


class QueryRejectedError(_RefusedError):
    """The service found the query itself wrong."""


class _UnreachableError(ArchiveError):
    """There was no connection to the service, and a job would not have one either."""


class _Query:
    """One query, while it is run."""

    def __init__(self, url: str, adql: str, options: TapOptions, session: requests.Session) -> None:
        self._service = pyvo.dal.TAPService(url, session=session)
        self._url = url
        self._shown_url = strip_credentials(url)
        self._adql = adql
        self._options = options

    def run(self) -> Table:
        """Return the whole answer, or raise one of the errors of `run_adql`."""
        try:
            results = self._repeat(self._run_sync, "the TAP service", self._url)
            if not _is_truncated(results):
                return results.to_table()
            logger.info("synchronous answer truncated at %d rows; running a job", len(results))
        except (_RefusedError, _UnreachableError):
            raise
        except ArchiveError as error:
            logger.info("synchronous query failed (%s); running a job", error)
        results = self._run_job()
        if _is_truncated(results):
            raise TruncatedAnswerError(
                f"the answer was truncated at {len(results):,} rows", path=self._shown_url
            )
        return results.to_table()

    def _run_sync(self) -> TAPResults:
        try:
            return _fetch(self._service.create_query(self._adql))
        except DALFormatError as error:
            # Another attempt would take as long, so this is an error that is not repeated.
            if isinstance(error.cause, requests.ReadTimeout | ReadTimeoutError):
                limit = self._options.sync_timeout_s
                raise ArchiveError(f"no answer within {limit:g} s", path=self._shown_url) from error
            raise

    def _run_job(self) -> TAPResults:
        """Run the query as a UWS job, without pyvo's polling, which ends at the first error."""
        name = "the TAP service's job"

        def create() -> AsyncTAPJob:
            job = self._service.submit_job(self._adql, maxrec=self._options.job_max_rows)
            if urlsplit(job.url).path.endswith("/async"):
                raise DALFormatError(reason="the query did not become a job", url=job.url)
            return job

        job = self._repeat(create, name, self._url)
        try:
            self._wait_for(job, name)
            # `fetch_result` would raise errors of many kinds.
            url = job.result_uri or f"{job.url}/results/result"
            session = self._service._session
            return self._repeat(lambda: _fetch(DALQuery(url, session=session)), name, url)
        finally:
            try:
                job.delete()
            except (DALServiceError, requests.RequestException) as error:
                logger.debug("job not deleted: %s", error)

    def _wait_for(self, job: AsyncTAPJob, name: str) -> None:
        """Start a job and poll it until it is completed."""

        def poll() -> str:
            phase = job.phase
            if phase is None:
                raise DALFormatError(reason="the answer does not describe the job", url=job.url)
            # Started only in this phase: an earlier start may have worked although its
            # answer was lost.
            if phase == "PENDING":
                job.run()
            return phase

        options = self._options
        deadline = time.monotonic() + options.job_timeout_s
        pause = options.first_poll_s
        while (phase := self._repeat(poll, name, self._url)) not in (
            "COMPLETED",
            "ERROR",
            "ABORTED",
        ):
            if time.monotonic() > deadline:
                hours = options.job_timeout_s / 3600
                raise ArchiveError(
                    f"{name} did not end within {hours:g} hours", path=self._shown_url
                )
            time.sleep(pause)
            pause = min(2 * pause, options.longest_poll_s)
        if phase != "COMPLETED":
            summary = getattr(job._job, "errorsummary", None)
            message = getattr(getattr(summary, "message", None), "content", None)
            raise ArchiveError(
                f"{name} ended as {phase}: {message or 'no reason given'}", path=self._shown_url
            )

    def _repeat(self, request: Callable[[], Answer], name: str, url: str) -> Answer:
        """Make a request until it is answered; repeat only failures that may pass."""
        shown_url = strip_credentials(url)
        retry = self._options.retry
        failure: Exception
        for attempt in range(1, retry.max_retries + 2):
            retry_after = None
            try:
                return request()
            except DALQueryError as error:
                raise QueryRejectedError(
                    f"{name} rejected the query: {strip_credentials(str(error))}", path=shown_url
                ) from error
            except (DALFormatError, DALServiceError, requests.RequestException) as error:
                failure = error
                response = getattr(getattr(error, "cause", None) or error, "response", None)
                if response is not None:
                    if response.status_code not in TRANSIENT_STATUS:
                        raise _RefusedError(
                            f"{name} refused the query: {strip_credentials(str(error))}",
                            path=shown_url,
                        ) from error
                    retry_after = response.headers.get("Retry-After")
            except (HTTPError, ValueError) as error:
                # pyvo lets these through when the description of a job is cut or not XML.
                failure = error
            if attempt <= retry.max_retries:
                pause = retry.delay(attempt, retry_after)
                text = strip_credentials(str(failure))
                logger.info("%s failed (%s); trying again in %.1f s", name, text, pause)
                time.sleep(pause)
        obstacle = self._explain_no_connection(failure)
        if obstacle is not None:
            raise _UnreachableError(
                f"cannot be reached: {obstacle}", path=shown_url, attempts=attempt
            ) from failure
        raise ArchiveError(
            f"{name} gave no valid answer: {strip_credentials(str(failure))}",
            path=shown_url,
            attempts=attempt,
        ) from failure

    def _explain_no_connection(self, failure: Exception) -> str | None:
        """Return why there was no connection, None if there was one."""
        error = getattr(failure, "cause", None) or failure
        if not isinstance(error, requests.ConnectionError):
            return None
        if not (error.args and isinstance(error.args[0], MaxRetryError)):
            return None
        reason = error.args[0].reason
        prefix = "the proxy: " if isinstance(reason, ProxyError) else ""
        # The operating system's error is the innermost of several.
        innermost: BaseException | None = reason
        while innermost is not None and not isinstance(innermost, OSError):
            innermost = innermost.__cause__ or innermost.__context__
        text = getattr(innermost, "strerror", None) or strip_credentials(str(innermost or reason))
        if text == "timed out":
            text = f"no connection within {self._options.connect_timeout_s:g} s"
        return f"{prefix}{text[:1].lower()}{text[1:]}"


def _fetch(request: DALQuery) -> TAPResults:
    """Fetch an answer without pyvo's warning of a truncated one, which `_is_truncated` finds."""
    return TAPResults(request.execute_votable(), url=request.queryurl)


def _is_truncated(results: TAPResults) -> bool:
    """Return whether an answer states anywhere that it is incomplete."""
    elements = [results.votable, *results.votable.iter_tables()]
    for element in elements:
        elements += getattr(element, "resources", ())
    return any(
        info.name.upper() == "QUERY_STATUS" and info.value.upper() == "OVERFLOW"
        for element in elements
        for info in element.infos
    )


class _Session(requests.Session):
    """A session with what pyvo lacks: timeouts, closed answers, and errors of a busy server.

    Both a busy server and one that rejects a query may answer with a VOTable that states an
    error; only the status codes differ.
    """

    def __init__(self, timeout_s: tuple[float, float]) -> None:
        super().__init__()
        self._timeout_s = timeout_s
        self._answers = ExitStack()

    def request(self, method: str, url: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", self._timeout_s)
        answer = super().request(method, url, **options)
        self._answers.callback(answer.close)
        if answer.status_code in TRANSIENT_STATUS - {500}:
            answer.raise_for_status()
        return answer

    def close(self) -> None:
        self._answers.close()
        super().close()
