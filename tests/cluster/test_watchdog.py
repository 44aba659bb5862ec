"""The thread that watches the jobs, and the jobs that it watches."""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
import threading
from types import SimpleNamespace

import pytest
from distributed import Status

from spxdask.cluster.jobqueue import cluster, watchdog
from spxdask.cluster.jobqueue.watchdog import JobWatchdog

SETTINGS = SimpleNamespace(path="x", system="slurm", keywords={"processes": 1})


def watch(client, kind=JobWatchdog, settings=SETTINGS, **options) -> JobWatchdog:
    """Return a watchdog over a cluster whose worker is not a job."""
    return kind(settings, client.cluster, client, **options)


def test_a_check_that_fails_is_not_the_last(in_process, monkeypatch):
    error, warnings, again = ZeroDivisionError(), [], threading.Event()

    class Failing(JobWatchdog):
        polls = 0

        def poll(self) -> None:
            self.polls += 1
            if self.polls == 1:
                raise error
            again.set()

    monkeypatch.setattr(
        watchdog.logger, "warning", lambda *_, exc_info: warnings.append(sys.exc_info()[1])
    )
    with watch(in_process, Failing, poll_interval_s=0.01):
        assert again.wait(60)
    assert warnings == [error]


def test_jobs_and_workers_are_listed_on_the_event_loop(in_process):
    """Where they change, so that the two fit together."""
    threads, dog = set(), watch(in_process)
    get_job_name = dog.get_job_name

    def noting(worker):
        threads.add(threading.get_ident())
        return get_job_name(worker)

    async def ident() -> int:
        return threading.get_ident()

    dog.get_job_name = noting
    jobs, with_workers = dog._list_jobs()
    assert set(jobs) == with_workers == {0}
    assert threads == {in_process.cluster.sync(ident)}


@pytest.mark.parametrize(("processes", "name"), [(1, "job-3-1"), (2, "job-3")])
def test_the_name_of_a_job_is_found_by_the_scheduler(in_process, processes, name):
    """Adaptive scaling pickles the function that finds it."""
    dog = watch(in_process, settings=SimpleNamespace(keywords={"processes": processes}))
    get_job_name = pickle.loads(pickle.dumps(dog.get_job_name))
    assert get_job_name(SimpleNamespace(name="job-3-1")) == name


def job(**attributes) -> SimpleNamespace:
    defaults = {"refusal": None, "is_refusal_reported": False, "submitted_at_s": 0.0}
    defaults |= {"has_had_worker": False, "worker_seen_at_s": 0.0, "job_id": None}
    return SimpleNamespace(**(defaults | attributes))


def test_refusals_are_tolerated_while_there_are_others(in_process):
    dog = watch(in_process, max_consecutive_failures=2)
    dog._check_refused({"a": job(refusal="no")}, has_others=True)
    assert dog.failure is None
    # There was never a worker.
    dog._check_refused({"a": job(refusal="no memory")}, has_others=False)
    assert dog.failure == "no memory"


def test_refusals_in_a_row_are_a_failure(in_process):
    dog = watch(in_process, max_consecutive_failures=2)
    dog._has_had_workers = True
    dog._check_refused({"a": job(refusal="first")}, has_others=False)
    assert dog.failure is None
    dog._check_refused({"b": job(refusal="second")}, has_others=False)
    assert dog.failure == "second"


def test_jobs_are_listed_without_the_name_of_the_user(in_process, monkeypatch, tmp_path):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def getpwuid(_):
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", getpwuid)
    stub = tmp_path / "squeue"
    stub.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho 12\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    queued, ended = (
        SimpleNamespace(job_id="12", has_had_worker=False),
        SimpleNamespace(job_id="13", has_had_worker=False),
    )
    monkeypatch.setitem(in_process.cluster.worker_spec, 1, {})
    assert watch(in_process)._find_ended({0: queued, 1: ended}) == {1: ended}
    assert f"--user={os.getuid()}" in (tmp_path / "asked").read_text()


SQUEUE = """#!/bin/sh
env | grep -E "^(SQUEUE|SLURM_CLUSTERS)" >&2 && exit 1
case "$*" in
    *--states=all*--clusters=other*) echo "CLUSTER: other"; echo "12 PENDING"; echo "13 FAILED" ;;
    *--states=all*) echo "14 SUSPENDED"; echo "15 COMPLETED" ;;
    *) exit 1 ;;
esac
"""


def test_jobs_on_another_cluster_are_asked_of_that_cluster(in_process, monkeypatch, tmp_path):
    (tmp_path / "squeue").write_text(SQUEUE)
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in {"STATES": "RUNNING", "FORMAT": "%i", "CLUSTERS": "third"}.items():
        monkeypatch.setenv(f"SQUEUE_{name}", value)
    monkeypatch.setenv("SLURM_CLUSTERS", "third")
    places = {"12": "other", "13": "other", "14": None, "15": None, "16": None, "17": "other"}
    jobs = {
        int(number): SimpleNamespace(job_id=number, has_had_worker=False, slurm_cluster=place)
        for number, place in places.items()
    }
    for number in jobs:
        monkeypatch.setitem(in_process.cluster.worker_spec, number, {})
    assert watch(in_process)._find_ended(jobs).keys() == {13, 15, 16, 17}


def test_a_job_that_cannot_be_cancelled(monkeypatch):
    warnings = []
    # Not by caplog, as dask-jobqueue has its handler pass errors only.
    monkeypatch.setattr(cluster.logger, "warning", lambda text, *of: warnings.append(text % of))

    class Base:
        job_id = "12"
        cancel_command = "scancel"

        async def close(self):
            raise FileNotFoundError("scancel")

    job = cluster.make_job_class(Base)()
    asyncio.run(job.close())
    assert job.status == Status.closed
    assert warnings == ["job 12 could not be cancelled: scancel"]
