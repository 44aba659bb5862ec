"""Queries of a TAP service: synchronous first, as a job where that does not give the answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyvo
import requests
from astropy.table import Table
from fsspec.asyn import get_loop, sync
from pyvo.dal import DALFormatError, DALQuery, DALQueryError, DALServiceError
from pyvo.dal.tap import AsyncTAPJob, TAPResults
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, MaxRetryError, ProxyError, ReadTimeoutError
from yarl import URL

from spxdask.archive.limiter import REQUESTS
from spxdask.archive.network import explain_certificate_error, find_proxy, get_ssl_context
from spxdask.archive.redirects import MAX_REDIRECTS, REDIRECT_STATUS, resolve_redirect
from spxdask.archive.retry import TRANSIENT_STATUS, RetryPolicy
from spxdask.archive.urls import strip_credentials
from spxdask.errors import ArchiveError, ConfigError, TruncatedAnswerError, UnreachableError

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


# Errors of requests that no other attempt mends, whoever is to mend them.
_LASTING_ERRORS = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidProxyURL,
    requests.exceptions.InvalidSchema,
    requests.exceptions.MissingSchema,
)


class _Query:
    """One query, while it is run."""

    def __init__(self, url: str, adql: str, options: TapOptions, session: _Session) -> None:
        self._service = pyvo.dal.TAPService(url, session=session)
        self._session = session
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
        except (_RefusedError, UnreachableError):
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
            query = DALQuery(url, session=self._session)
            return self._repeat(lambda: _fetch(query), name, url)
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
                    f"{name}{self._name_redirect()} rejected the query: "
                    f"{strip_credentials(str(error))}",
                    path=shown_url,
                ) from error
            except (DALFormatError, DALServiceError, requests.RequestException) as error:
                failure = error
                cause = getattr(error, "cause", None) or error
                self._raise_if_lasting(cause, shown_url)
                response = getattr(cause, "response", None)
                if response is not None:
                    if response.status_code not in TRANSIENT_STATUS:
                        raise _RefusedError(
                            f"{name}{self._name_redirect()} refused the query: "
                            f"{strip_credentials(str(error))}",
                            path=shown_url,
                        ) from error
                    retry_after = response.headers.get("Retry-After")
            except ConfigError:
                raise
            except (HTTPError, ValueError) as error:
                # pyvo lets these through when the description of a job is cut or not XML.
                failure = error
            if attempt <= retry.max_retries:
                pause = retry.delay(attempt, retry_after)
                text = strip_credentials(str(failure))
                logger.info("%s failed (%s); trying again in %.1f s", name, text, pause)
                with REQUESTS.announce():
                    time.sleep(pause)
        obstacle = self._explain_no_connection(failure)
        if obstacle is not None:
            raise UnreachableError(
                f"cannot be reached: {obstacle}",
                path=shown_url,
                attempts=attempt,
                blame="archive",
            ) from failure
        raise ArchiveError(
            f"{name}{self._name_redirect()} gave no valid answer: "
            f"{strip_credentials(str(failure))}",
            path=shown_url,
            attempts=attempt,
            blame="archive",
        ) from failure

    def _raise_if_lasting(self, error: BaseException, shown_url: str) -> None:
        """Raise an error that no other attempt mends."""
        # pyvo takes whatever is raised for a sign of a bad answer.
        if isinstance(error, _RefusedError | ConfigError):
            raise error
        url = self._session.redirected_to or self._url
        reason = explain_certificate_error(url, error)
        if reason is None and isinstance(error, _LASTING_ERRORS):
            reason = strip_credentials(str(error))
        # A proxy that refuses the connection to a server tells so in this text only.
        if reason is None and "407 Proxy Authentication Required" in str(error):
            reason = f"the proxy {strip_credentials(find_proxy(url) or '')} needs a valid login"
        if reason is not None:
            raise _RefusedError(reason, path=shown_url, blame="access") from error

    def _name_redirect(self) -> str:
        """Return where the last request was redirected to, for messages."""
        target = self._session.redirected_to
        return "" if target is None else f", redirected to {strip_credentials(target)},"

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


class _Adapter(HTTPAdapter):
    """Connections with the TLS settings of `get_ssl_context`, also through proxies."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, ssl_context=get_ssl_context(), **options)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        return super().proxy_manager_for(proxy, ssl_context=get_ssl_context(), **options)


class _Session(requests.Session):
    """A session with what pyvo lacks: timeouts, closed answers, and errors of a busy server.

    Both a busy server and one that rejects a query may answer with a VOTable that states an
    error; only the status codes differ. Proxies and trusted certificates are those of downloads,
    and no login is read from ~/.netrc.
    """

    def __init__(self, timeout_s: tuple[float, float]) -> None:
        super().__init__()
        self.trust_env = False
        self._timeout_s = timeout_s
        self._answers = ExitStack()
        # Where the last request was redirected to.
        self.redirected_to: str | None = None
        for prefix in ("https://", "http://"):
            self.mount(prefix, _Adapter())

    def request(self, method: str, url: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", self._timeout_s)
        follows = options.pop("allow_redirects", True)
        method, first, self.redirected_to = method.upper(), url, None
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._ask(method, url, options)
            location = answer.headers.get("Location", "")
            if not follows or answer.status_code not in REDIRECT_STATUS:
                break
            # Its body is not needed, and its connection is.
            answer.close()
            target = _resolve_redirect(first, url, location)
            if not _keeps_method(answer.status_code, method, url, target):
                method = "GET"
                options = {name: options[name] for name in ("timeout", "stream") if name in options}
            elif method == "POST":
                # The body as it was sent, as files that it was made of have been read.
                sent = answer.request
                headers = {"Content-Type": sent.headers.get("Content-Type", "")}
                options = {**options, "data": sent.body, "files": None, "headers": headers}
            # Location has the parameters that the target needs.
            options["params"] = None
            url = self.redirected_to = target
        else:
            raise _RefusedError(
                f"redirected more than {MAX_REDIRECTS} times", path=strip_credentials(first)
            )
        if answer.status_code in TRANSIENT_STATUS - {500}:
            answer.raise_for_status()
        return answer

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Have requests follow none by itself, nor fail at one that it does not understand."""

    def _ask(self, method: str, url: str, options: Mapping[str, Any]) -> requests.Response:
        """Send one request, through the proxy that the environment names for its host."""
        proxy = find_proxy(url)
        proxies = {} if proxy is None else {"http": proxy, "https": proxy}
        answer = super().request(method, url, proxies=proxies, allow_redirects=False, **options)
        self._answers.callback(answer.close)
        return answer

    def close(self) -> None:
        self._answers.close()
        super().close()


def _resolve_redirect(first: str, current: str, location: str) -> str:
    """Return the target of a redirect, by the rules that downloads follow."""
    try:
        target = sync(
            get_loop(), resolve_redirect, _parse_url(first), _parse_url(current), location
        )
    except ArchiveError as error:
        raise _RefusedError(error.reason, path=strip_credentials(first)) from error
    return str(target)


def _parse_url(url: str) -> URL:
    return URL(requests.Request("GET", url).prepare().url or url, encoded=True)


def _keeps_method(status: int, method: str, url: str, target: str) -> bool:
    """Return whether a redirected request is made again as it was, and not as a GET.

    Browsers turn a POST into a GET at 301 and 302, too, and services rely on it: the answer to a
    query or a new job may be elsewhere. But where the whole service has moved, the same resource
    of it is named, and needs the query.
    """
    if status in (307, 308) or method in ("GET", "HEAD"):
        return True
    return status in (301, 302) and _last_segment(url) == _last_segment(target)


def _last_segment(url: str) -> str:
    return urlsplit(url).path.rstrip("/").rpartition("/")[2]
