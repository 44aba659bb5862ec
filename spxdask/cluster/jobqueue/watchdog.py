"""Monitoring of jobs, so that no run waits for workers that will never start."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import dask
from dask.utils import parse_timedelta
from distributed import Client, SchedulerPlugin, Status

from spxdask.cluster.dask_internals import (
    cancel_futures,
    close_job,
    get_jobs,
    get_requested_jobs,
    get_worker_name,
    get_workers,
    run_coroutine,
)
from spxdask.cluster.jobqueue.settings import Settings
from spxdask.cluster.jobqueue.slurm import ENDED_STATES, find_clusters, list_states

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 10.0
# Another job is submitted in place of a refused one after this many seconds.
RESUBMIT_DELAY_S = 60.0
# This many jobs in a row that are refused, or end before they bring a worker, are no accident.
MAX_CONSECUTIVE_FAILURES = 3
# After a failure, what the client waits for is cancelled again and again, as it may go on to
# submit tasks.
CANCEL_INTERVAL_S = 1.0


class JobWatchdog:
    """Check the jobs again and again, in a thread, for as long as a ``with`` block lasts.

    Jobs that were refused, that ended without a worker, or that lost all of several workers
    are, for Dask, still to come. The watchdog drops them, so that Dask submits others. When
    that does not help, it cancels what the client waits for.

    Parameters
    ----------
    settings : Settings
        Of the cluster.
    cluster : dask_jobqueue.JobQueueCluster
        Its jobs are watched.
    client : Client
        What it waits for is cancelled after a failure.
    poll_interval_s : float
        Seconds between two checks of the jobs.
    resubmit_delay_s : float
        Seconds until another job is submitted in place of one that was refused.
    max_consecutive_failures : int
        So many jobs in a row that are refused, or that end before they bring a worker, are a
        failure.

    Attributes
    ----------
    failure : str or None
        Why the cluster will have no workers.
    get_job_name : callable
        Returns the name of the job that a worker of the scheduler belongs to. It is a plain
        function, as adaptive scaling sends it to the scheduler.
    """

    def __init__(
        self,
        settings: Settings,
        cluster: Any,
        client: Client,
        *,
        poll_interval_s: float = POLL_INTERVAL_S,
        resubmit_delay_s: float = RESUBMIT_DELAY_S,
        max_consecutive_failures: int = MAX_CONSECUTIVE_FAILURES,
    ) -> None:
        self.failure: str | None = None
        self._settings = settings
        self._cluster = cluster
        self._client = client
        self._poll_interval_s = poll_interval_s
        self._resubmit_delay_s = resubmit_delay_s
        self._max_failures = max_consecutive_failures
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="spxdask-jobs", daemon=True)
        has_groups = settings.keywords["processes"] > 1
        self.get_job_name = _get_group_name if has_groups else get_worker_name
        self._arrivals = _ArrivalRecorder(self.get_job_name)
        cluster.scheduler.add_plugin(self._arrivals)
        self._has_had_workers = False
        # Numbers of jobs in a row.
        self._n_refused = 0
        self._n_ended = 0

    def __enter__(self) -> JobWatchdog:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        self._thread.join()

    def poll(self) -> None:
        """Check the jobs once; drop those that are lost, and set `failure` if none is left."""
        jobs, with_workers = self._list_jobs()
        lost = self._find_lost(jobs, with_workers)
        ended = self._find_ended(jobs)
        refused = {name: job for name, job in jobs.items() if job.refusal is not None}
        self._check_ended(ended, has_workers=bool(with_workers))
        self._check_refused(refused, has_others=refused.keys() != jobs.keys())
        resubmit_before = time.monotonic() - self._resubmit_delay_s
        for name, job in (lost | ended | refused).items():
            if job.refusal is None or job.submitted_at_s < resubmit_before:
                run_coroutine(self._cluster, close_job, self._cluster, name, job)

    def _run(self) -> None:
        while not self._is_over.wait(
            self._poll_interval_s if self.failure is None else CANCEL_INTERVAL_S
        ):
            if self._cluster.status != Status.running:
                return
            try:
                if self.failure is None:
                    self.poll()
                if self.failure is not None:
                    cancel_futures(self._client, reason="no jobs")
            except Exception:
                # The next check may succeed, and without any a run could wait for workers
                # without end.
                if self._cluster.status == Status.running:
                    logger.warning("the jobs could not be checked", exc_info=True)

    def _list_jobs(self) -> tuple[dict[Any, Any], set[Any]]:
        """Return the jobs by name, and the names of those that have workers."""

        # On the event loop, where both change.
        async def collect() -> tuple[dict[Any, Any], set[Any]]:
            workers = get_workers(self._cluster.scheduler).values()
            return get_jobs(self._cluster), {self.get_job_name(worker) for worker in workers}

        return run_coroutine(self._cluster, collect)

    def _check_ended(self, ended: Mapping[Any, Any], *, has_workers: bool) -> None:
        """Fail when jobs in a row ended before they brought a worker, and there is none."""
        self._n_ended += len(ended)
        for job in ended.values():
            logger.warning("job %s ended before it brought a worker", job.job_id)
        if ended and not has_workers and self._n_ended >= self._max_failures:
            log = self._get_log_path(list(ended.values())[-1])
            self.failure = (
                f"{self._n_ended} jobs in a row ended before they brought a worker; see {log}"
            )

    def _check_refused(self, refused: Mapping[Any, Any], *, has_others: bool) -> None:
        """Fail when all jobs are refused; once there were workers, not at the first refusal."""
        if has_others:
            self._n_refused = 0
        new = [job for job in refused.values() if not job.is_refusal_reported]
        if not new:
            return
        self._n_refused += not has_others
        is_tolerated = self._has_had_workers and self._n_refused < self._max_failures
        if has_others or is_tolerated:
            logger.warning("%s", new[0].refusal)
        else:
            self.failure = new[0].refusal
        for job in new:
            job.is_refusal_reported = True

    def _find_lost(self, jobs: Mapping[Any, Any], with_workers: set[Any]) -> dict[Any, Any]:
        """Record which jobs have brought workers; return those that have lost them all.

        Dask itself replaces a lost worker only if its job has no others.
        """
        now_s = time.monotonic()
        timeout_s = parse_timedelta(dask.config.get("distributed.deploy.lost-worker-timeout"))
        lost = {}
        for name, job in jobs.items():
            arrived_at_s = self._arrivals.last_s.get(name, 0.0)
            if arrived_at_s > job.submitted_at_s and not job.has_had_worker:
                job.has_had_worker = self._has_had_workers = True
                job.worker_seen_at_s = arrived_at_s
                self._n_ended = 0
            if name in with_workers:
                job.worker_seen_at_s = now_s
            elif job.has_had_worker and now_s - job.worker_seen_at_s > timeout_s:
                lost[name] = job
        return lost

    def _find_ended(self, jobs: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return the jobs that have ended without ever bringing a worker; Slurm's only."""
        waiting = {
            name: job
            for name, job in jobs.items()
            if job.job_id is not None and not job.has_had_worker
        }
        if self._settings.system != "slurm" or not waiting:
            return {}
        named = find_clusters(self._settings.keywords.get("job_extra_directives", []))
        requested = get_requested_jobs(self._cluster)
        ended: dict[Any, Any] = {}
        by_cluster = {name: getattr(job, "slurm_cluster", named) for name, job in waiting.items()}
        for cluster in set(by_cluster.values()):
            states = list_states(cluster)
            if states is None:
                # A controller that does not answer now will answer later.
                continue
            ended |= {
                name: job
                for name, job in waiting.items()
                if by_cluster[name] == cluster
                and states.get(job.job_id, "COMPLETED") in ENDED_STATES
                and name in requested
            }
        return ended

    def _get_log_path(self, job: Any) -> str:
        folder = self._settings.keywords.get("log_directory")
        if folder is None:
            return f"slurm-{job.job_id}.out"
        return os.path.join(folder, f"{job.job_name}-{job.job_id}.err")


class _ArrivalRecorder(SchedulerPlugin):
    """Record when workers arrive, by the names of their jobs."""

    name = "spxdask-arrivals"

    def __init__(self, get_job_name: Callable[[Any], Any]) -> None:
        # Seconds of the monotonic clock.
        self.last_s: dict[Any, float] = {}
        self._get_job_name = get_job_name

    def add_worker(self, scheduler: Any, worker: str) -> None:
        """Record the arrival of the worker at an address."""
        name = self._get_job_name(get_workers(scheduler)[worker])
        self.last_s[name] = time.monotonic()


def _get_group_name(worker: Any) -> str:
    """Return the name of a worker's job where a job has several, whose names have a suffix."""
    return str(get_worker_name(worker)).rpartition("-")[0]
