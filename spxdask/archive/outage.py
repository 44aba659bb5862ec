"""Times in which the archive does not answer: how long to wait, and what a failure means.

The time comes from a clock that is passed in.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, Literal, TypeVar

from spxdask.errors import ArchiveError

logger = logging.getLogger(__name__)

Job = TypeVar("Job")
Answer = TypeVar("Answer")

# This many failures one after the other, each after all retries, are taken for an outage.
FAILURES_OF_OUTAGE = 2
# A job has failed for itself when this many of its failures were followed by answers to others.
FAILURES_OF_JOB = 2


@dataclass(frozen=True, kw_only=True)
class OutagePolicy:
    """How long to wait for an archive that does not answer, and how often to ask it.

    Attributes
    ----------
    patience_s : float
        Longest time without an answer, s. There is one more attempt even if it is 0.
    first_pause_s : float
        Pause before the first attempt, s. Each further one is longer by the factor `growth`.
    longest_pause_s : float
        Upper limit of the pauses, s.
    growth : float
        Ratio of a pause to the one before.
    """

    patience_s: float
    first_pause_s: float = 1.0
    longest_pause_s: float = 600.0
    growth: float = 1.5


class Outage:
    """A time in which the archive does not answer.

    Parameters
    ----------
    policy : OutagePolicy
        Patience and pauses.
    reason : str
        What was wrong with the last request.
    now : float
        The time, s since the epoch.

    Attributes
    ----------
    since : float
        When it began, s since the epoch.
    next_at : float
        When the archive is asked again, s since the epoch.
    is_over_patience : bool
        Whether the last attempt has failed.
    """

    def __init__(self, policy: OutagePolicy, reason: str, now: float) -> None:
        self._policy = policy
        self._reason = reason
        self._deadline = now + policy.patience_s
        self._pause = policy.first_pause_s
        self.since = now
        self.next_at = min(now + self._pause, self._deadline)
        self.is_over_patience = False

    def postpone(self, reason: str, now: float) -> None:
        """Note that an attempt has failed.

        Parameters
        ----------
        reason : str
            Why.
        now : float
            The time, s since the epoch.
        """
        self._reason = reason
        self._pause = min(self._pause * self._policy.growth, self._policy.longest_pause_s)
        self.is_over_patience = now >= self._deadline
        # The last attempt is at the end of the patience.
        self.next_at = min(now + self._pause, self._deadline)

    def __str__(self) -> str:
        return (
            f"the archive does not answer since {_format_time(self.since, self.since)} "
            f"({self._reason}): waiting, next attempt at {_format_time(self.next_at, self.since)}, "
            f"the last at {_format_time(self._deadline, self.since)}"
        )

    def as_error(self, url: str | None = None) -> ArchiveError:
        """Return the error with which a run ends.

        Parameters
        ----------
        url : str, optional
            What was asked for.

        Returns
        -------
        ArchiveError
        """
        since = _format_time(self.since, None)
        return ArchiveError(
            f"the archive does not answer since {since} ({self._reason}), longer than "
            f"outage_patience ({self._policy.patience_s:g} s) allows; the same command resumes the "
            "run",
            path=url,
            blame="archive",
        )


def _format_time(when: float, reference: float | None) -> str:
    """Return a time in UTC, without the date if that is the one of another time."""
    moment = datetime.fromtimestamp(when, UTC)
    is_same_day = (
        reference is not None and datetime.fromtimestamp(reference, UTC).date() == moment.date()
    )
    return f"{moment:%H:%M:%S} UTC" if is_same_day else f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def wait_out(
    request: Callable[[bool], Answer],
    policy: OutagePolicy,
    on_wait: Callable[[str | None], None],
    *,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Answer:
    """Make a request again and again while the archive does not answer.

    Parameters
    ----------
    request : callable
        Makes the request; is told whether it is the first time.
    policy : OutagePolicy
        Patience and pauses.
    on_wait : callable
        Called with the state of an outage after each failure, and with None when it waits no
        more.
    clock, sleep : callable
        Return the time, s since the epoch, and pass some, s.

    Returns
    -------
    object
        What the request returned.

    Raises
    ------
    ArchiveError
        If the archive refuses the request, or does not answer for too long.
    """
    outage: Outage | None = None
    try:
        while True:
            try:
                answer = request(outage is None)
            except ArchiveError as error:
                if error.blame != "archive" or policy.patience_s == 0:
                    raise
                if outage is None:
                    outage = Outage(policy, error.reason, clock())
                    # As it is now: it changes with each attempt.
                    logger.warning(str(outage))
                else:
                    outage.postpone(error.reason, clock())
                if outage.is_over_patience:
                    raise outage.as_error(error.path) from error
                on_wait(str(outage))
                sleep(max(outage.next_at - clock(), 0.0))
            else:
                if outage is not None:
                    logger.warning("the archive answers again")
                return answer
    finally:
        if outage is not None:
            on_wait(None)


@dataclass(frozen=True, kw_only=True)
class Request(Generic[Job]):
    """A job that is started now.

    Attributes
    ----------
    job : object
        What is asked for.
    number : int
        How many were started before.
    purpose : {"job", "probe", "reference"}
        Whether it is done with all retries; is one request to an archive that may not answer; or
        asks once more for what was served before, only to learn whether the archive answers.
    """

    job: Job
    number: int
    purpose: Literal["job", "probe", "reference"] = "job"


class ArchiveQueue(Generic[Job]):
    """Jobs for the archive, held back while it does not answer.

    A job that fails for the archive's reasons is not given up: it is held until it is known what
    the failure means. If the archive does not answer other jobs either, it is an outage. Then one
    request is made at a time, with growing pauses, for the jobs that failed and, in turn with
    them, for one that was served before. When one is answered, the jobs are done again. If others
    were answered instead, the job is done again at the end, and is given up if that repeats
    itself.

    Parameters
    ----------
    jobs : iterable
        The jobs, read only as fast as they are taken.
    policy : OutagePolicy
        Patience and pauses.
    get_key : callable
        Returns what identifies a job.
    find_reference : callable
        Returns a job that the archive served in an earlier run, None if there is none. It is
        called at most once, and only in an outage.
    clock : callable
        Returns the time, s since the epoch.

    Attributes
    ----------
    outage : Outage or None
        The present one.
    is_announced : bool
        Whether the outage is certain enough to be reported.
    ended : list of (job, result)
        Jobs that have ended, with their results; the caller empties it.
    """

    def __init__(
        self,
        jobs: Iterable[Job],
        policy: OutagePolicy,
        *,
        get_key: Callable[[Job], Hashable],
        find_reference: Callable[[], Job | None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.outage: Outage | None = None
        self.is_announced = False
        self.ended: list[tuple[Job, Any]] = []
        self._jobs: Iterator[Job] = iter(jobs)
        self._has_more = True
        self._policy = policy
        self._get_key = get_key
        self._find_reference: Callable[[], Job | None] | None = find_reference
        self._clock = clock
        self._reference: Job | None = None
        # To be done again, after all others.
        self._again: deque[Job] = deque()
        # Failed for the archive's reasons, before it is known what that means.
        self._held: deque[Job] = deque()
        self._results: dict[Hashable, Any] = {}
        self._own_failures: dict[Hashable, int] = {}
        self._reason = ""
        self._error: ArchiveError | None = None
        self._n_in_flight = 0
        self._n_started = 0
        self._n_probes = 0
        self._n_failures_in_row = 0
        self._n_requests_in_row = 0
        # Answers to requests that were started earlier say nothing of the jobs that are held.
        self._counts_from = 0
        self._is_confirmed = False

    @property
    def is_finished(self) -> bool:
        """Whether nothing is in flight, and nothing is left to be started."""
        return not (self._n_in_flight or self._has_more or self._again or self._held)

    @property
    def pause_s(self) -> float | None:
        """Time until the next request of an outage, s; None if there is no outage."""
        if self._error is not None:
            return 0.0
        return None if self.outage is None else max(self.outage.next_at - self._clock(), 0.0)

    def take(self) -> Request[Job] | None:
        """Return what is to be started now.

        Returns
        -------
        Request or None
            None when there is nothing to start now, though there may be later.

        Raises
        ------
        ArchiveError
            If the archive did not answer for too long, or cannot be reached until somebody
            changes something. Nothing is in flight then.
        """
        if self._error is not None or (self.outage is not None and self.outage.is_over_patience):
            if self._n_in_flight:
                return None
            raise self._error or self.outage.as_error()  # type: ignore[union-attr]
        if self.outage is None:
            job = self._next_job()
            if job is not None:
                return self._start(job, "job")
            if self._n_in_flight or not self._held:
                return None
            # Nothing is left that could tell whether it is the archive or this job.
            if self._n_requests_in_row < FAILURES_OF_OUTAGE:
                self._give_up_held()
                return None
            self._begin_outage(is_announced=False)
        return self._take_probe()

    def _next_job(self) -> Job | None:
        if self._has_more:
            for job in self._jobs:
                return job
            self._has_more = False
        return self._again.popleft() if self._again else None

    def _take_probe(self) -> Request[Job] | None:
        assert self.outage is not None
        if self._n_in_flight or self._clock() < self.outage.next_at:
            return None
        self._n_probes += 1
        if self._n_probes % 2 == 0 or not self._held:
            reference = self._get_reference()
            if reference is not None:
                return self._start(reference, "reference")
        if self._held:
            return self._start(self._held.popleft(), "probe")
        # What was held has ended for another reason, such as a worker that died.
        self._end_outage()
        return self.take()

    def _get_reference(self) -> Job | None:
        if self._reference is None and self._find_reference is not None:
            self._reference, self._find_reference = self._find_reference(), None
        return self._reference

    def _start(self, job: Job, purpose: Literal["job", "probe", "reference"]) -> Request[Job]:
        request = Request(job=job, number=self._n_started, purpose=purpose)
        self._n_started += 1
        self._n_in_flight += 1
        return request

    def settle(
        self,
        request: Request[Job],
        result: Any,
        verdict: Literal["served", "answered", "archive", "access", "unknown"],
        reason: str = "",
        attempts: int = 1,
    ) -> None:
        """Take note of how a request has ended.

        Parameters
        ----------
        request : Request
            What `take` returned.
        result : object
            Is returned when it is decided that it stands.
        verdict : {"served", "answered", "archive", "access", "unknown"}
            Whether the archive served what was asked for; gave another answer, that concerns this
            job alone; did not answer; could not be reached for a reason that lies on our side; or
            whether nothing is known of it.
        reason : str
            What was wrong.
        attempts : int
            How often the archive was asked.
        """
        self._n_in_flight -= 1
        if verdict in ("archive", "access"):
            self._n_requests_in_row += attempts
            self._note_silence(request, result, verdict, reason)
            return
        if request.purpose != "reference":
            self.ended.append((request.job, result))
        if verdict == "unknown":
            if self.outage is not None and request.purpose != "job":
                self.outage.postpone(self._reason, self._clock())
            return
        if request.purpose != "reference":
            self._results.pop(self._get_key(request.job), None)
            self._own_failures.pop(self._get_key(request.job), None)
            if verdict == "served":
                self._reference = request.job
        self._n_failures_in_row = self._n_requests_in_row = 0
        if request.number >= self._counts_from:
            self._judge_held(request)

    def _note_silence(self, request: Request[Job], result: Any, verdict: str, reason: str) -> None:
        now, self._reason = self._clock(), reason
        self._n_failures_in_row += 1
        if request.purpose == "reference":
            self._is_confirmed = True
        else:
            if not self._held and self.outage is None:
                self._counts_from = self._n_started
            self._held.append(request.job)
            key = self._get_key(request.job)
            if request.purpose == "job" or key not in self._results:
                self._results[key] = result
        if self.outage is None:
            if self._n_failures_in_row >= FAILURES_OF_OUTAGE:
                self._begin_outage(is_announced=True)
        elif request.purpose != "job":
            self.outage.postpone(reason, now)
            # Where nothing was served before, the jobs themselves are all that can be asked for.
            if self._is_confirmed or self._get_reference() is None:
                self.is_announced = True
        if verdict == "access" and self.is_announced:
            self._error = ArchiveError(reason, blame="access")

    def _begin_outage(self, *, is_announced: bool) -> None:
        self.outage = Outage(self._policy, self._reason, self._clock())
        self.is_announced = is_announced
        # What was served before is asked for first if it may well be these jobs.
        self._n_probes, self._is_confirmed = int(not is_announced), False

    def _end_outage(self) -> None:
        self.outage, self.is_announced = None, False

    def _give_up_held(self) -> None:
        self.ended += [(job, self._results.pop(self._get_key(job))) for job in self._held]
        self._held.clear()

    def _judge_held(self, request: Request[Job]) -> None:
        """Decide, as the archive has answered, what becomes of the jobs that failed before."""
        # It was an outage if what failed in it is answered now.
        was_outage = self.outage is not None and (self._is_confirmed or request.purpose == "probe")
        self._end_outage()
        for job in self._held:
            key = self._get_key(job)
            if not was_outage:
                self._own_failures[key] = self._own_failures.get(key, 0) + 1
            if self._own_failures.get(key, 0) >= FAILURES_OF_JOB:
                del self._own_failures[key]
                self.ended.append((job, self._results.pop(key)))
            else:
                self._again.append(job)
        self._held.clear()
