"""What failures of the archive mean, and how long a run waits: on a clock that tests turn."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

import pytest

from spxdask.archive.outage import ArchiveQueue, Outage, OutagePolicy, wait_out
from spxdask.errors import ArchiveError

HOUR = 3600.0
BAD_GATEWAY = "HTTP 502 Bad Gateway"


@dataclass
class World:
    """An archive and a client with `window` connections, and what became of each job.

    `answers(job, time)` is what the archive says to a request that is made at a time. A job is
    asked for again for `burn_s` before it is a failure, unless it is one request only.
    """

    answers: object
    window: int = 4
    fetch_s: float = 2.0
    burn_s: float = 25.0
    policy: OutagePolicy = OutagePolicy(patience_s=12 * HOUR)
    earlier: str | None = None
    now: float = 1e9
    ended: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    announced: list = field(default_factory=list)

    def run(self, jobs):
        start = self.now
        queue = ArchiveQueue(
            jobs,
            self.policy,
            get_key=str,
            find_reference=lambda: self.earlier,
            clock=lambda: self.now,
        )
        flying, order = [], 0
        while not queue.is_finished:
            self.record(queue)
            while len(flying) < self.window and (request := queue.take()) is not None:
                began = self.now - start
                self.requests.append((began, request.job, request.purpose))
                end, verdict = self.try_job(request, began)
                heapq.heappush(flying, (start + end, order, request, verdict))
                order += 1
            if not flying:
                assert queue.pause_s is not None or queue.is_finished
                self.now += max(queue.pause_s or 0.0, 0.01)
                continue
            self.now, _, request, verdict = heapq.heappop(flying)
            result = (request.purpose, verdict)
            attempts = 6 if request.purpose == "job" else 1
            queue.settle(request, result, verdict, BAD_GATEWAY, attempts)
            self.record(queue)
            self.announced.append(queue.is_announced)
        self.record(queue)
        return self.now - start

    def record(self, queue):
        for job, (_, verdict) in queue.ended:
            assert job not in self.ended
            self.ended[job] = verdict
        queue.ended.clear()

    def try_job(self, request, began):
        """Return when an answer is there, and what it is."""
        patience = self.burn_s if request.purpose == "job" else 0.0
        at = began
        while True:
            verdict = self.answers(request.job, at)
            if verdict != "archive" or at - began >= patience:
                return at + (self.fetch_s if verdict == "served" else 0.1), verdict
            at += 1.0


JOBS = [f"frame{number:02d}" for number in range(42)]


def down_between(begin, end, verdict="archive", **of_job):
    def answers(job, at):
        if begin <= at < end:
            return verdict
        return of_job.get(job, "served")

    return answers


@pytest.mark.parametrize("window", [1, 2, 4, 40])
@pytest.mark.parametrize("seconds", [30, 60, 600, 5 * HOUR])
@pytest.mark.parametrize("begin", [0, 5])
def test_an_outage_costs_no_frame(window, seconds, begin):
    world = World(down_between(begin, begin + seconds), window=window, fetch_s=window / 2)
    took = world.run(JOBS)
    assert world.ended == dict.fromkeys(JOBS, "served")
    assert any(world.announced) or seconds == 30
    assert not world.announced[-1]
    # It goes on soon after the end, as pauses are a part of the time or ten minutes.
    idle = len(JOBS) / window * world.fetch_s
    assert took < begin + 1.5 * seconds + idle + 3 * world.burn_s
    assert took < begin + seconds + idle + 700 + 3 * world.burn_s
    # One request at a time, and few of them.
    probes = [request for request in world.requests if request[2] != "job"]
    assert len(probes) < 25 + seconds / 500


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("broken", [[0], [20], [41], [20, 30], [20, 21], [40, 41], [3, 4, 5]])
def test_broken_frames_among_healthy_ones_fail_for_themselves(window, broken):
    names = {JOBS[number] for number in broken}
    world = World(lambda job, at: "archive" if job in names else "served", window=window)
    took = world.run(JOBS)
    assert {job for job, verdict in world.ended.items() if verdict == "archive"} == names
    assert len(world.ended) == len(JOBS)
    assert took < 42 * world.fetch_s / window + 5 * world.burn_s * len(names)
    if len(broken) == 1:
        assert not any(world.announced)


def test_a_broken_frame_that_is_left_alone_is_told_from_an_outage_by_one_served_earlier():
    world = World(lambda job, at: "archive" if job == "broken" else "served", earlier="before")
    assert world.run(["broken"]) < 3 * world.burn_s
    assert world.ended == {"broken": "archive"}
    assert not any(world.announced)
    assert [purpose for *_, purpose in world.requests] == ["job", "reference"] * 2


def test_a_broken_frame_in_an_outage():
    world = World(down_between(10, 1000, frame05="archive"))
    world.run(JOBS)
    assert {job for job, verdict in world.ended.items() if verdict != "served"} == {"frame05"}


@pytest.mark.parametrize("seed", range(20))
def test_no_outages_in_a_row_lose_a_frame(seed):
    rng, at = random.Random(seed), 0.0
    times = []
    for _ in range(rng.randint(2, 5)):
        begin = at + rng.uniform(10, 40)
        at = begin + rng.uniform(40, 4000)
        times.append((begin, at))

    def answers(job, at):
        return "archive" if any(begin <= at < end for begin, end in times) else "served"

    world = World(answers, window=rng.choice([1, 4, 8]), fetch_s=rng.uniform(1, 30))
    world.run(JOBS)
    assert world.ended == dict.fromkeys(JOBS, "served")


def test_other_answers_are_of_the_frame_and_end_an_outage():
    world = World(down_between(0, 100, frame00="answered", frame01="answered"))
    world.run(JOBS[:3])
    assert world.ended == {"frame00": "answered", "frame01": "answered", "frame02": "served"}


@pytest.mark.parametrize("patience_s", [0, 60, 12 * HOUR])
def test_a_run_does_not_wait_for_ever(patience_s):
    policy = OutagePolicy(patience_s=patience_s)
    world = World(down_between(10, 1e9), policy=policy)
    with pytest.raises(ArchiveError, match="does not answer since 2001-09-09 01:") as caught:
        world.run(JOBS)
    assert caught.value.blame == "archive"
    assert "the same command resumes the run" in caught.value.reason
    # What was not served has not failed.
    assert set(world.ended.values()) == {"served"}
    waited = world.now - 1e9 - 10
    assert patience_s <= waited <= patience_s + 3 * world.burn_s
    # The last request is at the end of the patience.
    assert world.requests[-1][0] >= patience_s


def test_single_jobs_that_are_never_answered():
    world = World(lambda job, at: "archive", policy=OutagePolicy(patience_s=HOUR))
    with pytest.raises(ArchiveError):
        world.run(["one"])
    assert world.announced[-1]
    assert world.ended == {}


@pytest.mark.parametrize("n_jobs", [1, 2, 42])
def test_what_does_not_pass_is_not_waited_for(n_jobs):
    world = World(lambda job, at: "access")
    with pytest.raises(ArchiveError, match=BAD_GATEWAY) as caught:
        world.run(JOBS[:n_jobs])
    assert caught.value.blame == "access"
    assert world.now - 1e9 < 5
    assert world.ended == {}


def test_a_single_job_without_access_is_its_own_failure():
    world = World(lambda job, at: "access" if job == "frame20" else "served")
    world.run(JOBS)
    assert {job for job, verdict in world.ended.items() if verdict != "served"} == {"frame20"}


def test_jobs_are_read_as_they_are_taken():
    read = []
    queue = ArchiveQueue(
        (read.append(n) or n for n in range(9)), OutagePolicy(patience_s=1), get_key=int
    )
    requests = [queue.take(), queue.take()]
    assert read == [0, 1]
    assert queue.pause_s is None
    for request in requests:
        queue.settle(request, None, "archive", "gone")
    # Nothing is started in an outage before the time.
    assert queue.take() is None
    assert read == [0, 1]
    assert queue.pause_s > 0


def test_the_outcome_of_all_attempts_is_kept_and_not_that_of_a_probe():
    queue = ArchiveQueue(
        "ab", OutagePolicy(patience_s=1, first_pause_s=0), get_key=str, find_reference=lambda: "z"
    )
    verdicts = {"a": "archive", "b": "archive", "z": "served"}
    while not queue.is_finished:
        request = queue.take()
        result = f"{request.purpose} {request.job}"
        queue.settle(request, result, verdicts[request.job], "gone")
    assert dict(queue.ended) == {"a": "job a", "b": "job b"}


def test_a_single_request_is_no_outage():
    """Where nothing is left, and failures are not to be repeated."""
    queue = ArchiveQueue("ab", OutagePolicy(patience_s=1), get_key=str)
    for verdict in ("served", "archive"):
        queue.settle(queue.take(), verdict, verdict, "gone", attempts=1)
    assert queue.take() is None
    assert queue.is_finished
    assert queue.ended == [("a", "served"), ("b", "archive")]


def test_pauses_grow_up_to_a_limit_and_end_with_the_patience():
    policy = OutagePolicy(patience_s=HOUR, first_pause_s=1.0, longest_pause_s=600.0)
    outage, now, pauses = Outage(policy, BAD_GATEWAY, 0.0), 0.0, []
    while not outage.is_over_patience:
        pauses.append(outage.next_at - now)
        now = outage.next_at
        outage.postpone(BAD_GATEWAY, now)
    assert now == HOUR
    assert pauses[:2] == [1.0, 1.5]
    assert max(pauses) == 600.0
    assert pauses[:-1] == sorted(pauses[:-1])


def test_what_is_said():
    outage = Outage(OutagePolicy(patience_s=12 * HOUR), BAD_GATEWAY, 1764160440.0)
    assert str(outage) == (
        "the archive does not answer since 12:34:00 UTC (HTTP 502 Bad Gateway): waiting, next "
        "attempt at 12:34:01 UTC, the last at 2025-11-27 00:34:00 UTC"
    )


# Queries


@dataclass
class Service:
    """A service that fails some times, and a clock."""

    failures: list
    now: float = 0.0
    asked: list = field(default_factory=list)
    said: list = field(default_factory=list)

    def request(self, is_first):
        self.asked.append((self.now, is_first))
        if self.failures:
            raise self.failures.pop(0)
        return "answer"

    def sleep(self, seconds):
        self.now += seconds

    def wait_out(self, patience_s=12 * HOUR):
        policy = OutagePolicy(patience_s=patience_s)
        return wait_out(
            self.request, policy, self.said.append, clock=lambda: self.now, sleep=self.sleep
        )


def down(blame="archive"):
    return ArchiveError("cannot be reached: connection refused", path="http://x", blame=blame)


def test_a_query_waits_for_the_service():
    service = Service([down() for _ in range(30)])
    assert service.wait_out() == "answer"
    assert [is_first for _, is_first in service.asked] == [True] + [False] * 30
    assert HOUR < service.now < 12 * HOUR
    assert len(service.said) == 31
    assert "(cannot be reached: connection refused): waiting" in service.said[0]
    assert service.said[-1] is None


def test_a_query_that_is_refused_is_not_repeated():
    for blame in ("frame", "access"):
        service = Service([down(blame)])
        with pytest.raises(ArchiveError) as caught:
            service.wait_out()
        assert caught.value.blame == blame
        assert (service.said, service.now) == ([], 0.0)


@pytest.mark.parametrize("patience_s", [0, 100])
def test_a_query_does_not_wait_for_ever(patience_s):
    service = Service([down() for _ in range(1000)])
    with pytest.raises(ArchiveError) as caught:
        service.wait_out(patience_s)
    assert service.now == patience_s
    assert caught.value.blame == "archive"
    assert ("resumes the run" in caught.value.reason) == bool(patience_s)
