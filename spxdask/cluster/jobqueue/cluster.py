"""Starting a cluster whose workers are jobs, and submitting them."""

from __future__ import annotations

import logging
import os
import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distributed import CancelledError, Client, Status

from spxdask.cluster.dask_internals import (
    abandon_cluster,
    detach_commands,
    get_job_class,
    submit_coroutine,
)
from spxdask.cluster.jobqueue.settings import Settings, read_settings
from spxdask.cluster.jobqueue.slurm import (
    find_cluster_of_answer,
    find_clusters,
    make_environment,
)
from spxdask.cluster.jobqueue.watchdog import (
    MAX_CONSECUTIVE_FAILURES,
    POLL_INTERVAL_S,
    RESUBMIT_DELAY_S,
    JobWatchdog,
)
from spxdask.cluster.page import ignore_taken_port
from spxdask.errors import ClusterError, ConfigError

logger = logging.getLogger(__name__)

# A job may have waited in a queue for hours, so it is given back only after this many
# seconds without work.
IDLE_TIME_S = 60
# A run has few tasks in flight, all of them short. With so short a target, their number
# alone decides how many workers Dask wants, whatever time they take.
_TARGET_DURATION = "10ms"
_ADAPT_INTERVAL_S = 1


@contextmanager
def jobqueue_client(
    path: str | os.PathLike[str],
    *,
    poll_interval_s: float = POLL_INTERVAL_S,
    resubmit_delay_s: float = RESUBMIT_DELAY_S,
    max_consecutive_failures: int = MAX_CONSECUTIVE_FAILURES,
    idle_time_s: int = IDLE_TIME_S,
) -> Iterator[Client]:
    """Have a batch system run the workers, and give its jobs back when the block ends.

    The scheduler is in this process. Jobs are submitted and given back as there is work,
    between the two numbers in the file.

    Parameters
    ----------
    path : path
        YAML file with a section ``jobqueue``, of one batch system, laid out as that of
        dask-jobqueue, whose defaults and configuration hold for what it leaves out; and
        with a section ``adapt``, with ``minimum_jobs`` and ``maximum_jobs``.
    poll_interval_s : float
        Seconds between two checks of the jobs.
    resubmit_delay_s : float
        Seconds until another job is submitted in place of one that was refused.
    max_consecutive_failures : int
        After this many jobs in a row that were refused, or that ended before they brought
        a worker, the run fails.
    idle_time_s : int
        A job is given back after this many seconds without work.

    Yields
    ------
    Client
        There may be no worker yet: jobs wait in their queue.

    Raises
    ------
    ConfigError
        If the file cannot be used.
    InputError
        If dask-jobqueue is not installed.
    ClusterError
        If the batch system refuses all of the jobs, or if one after the other ends before
        it brings a worker. In the block, it takes the place of the error that the cluster
        is gone.
    """
    settings = read_settings(path)
    cluster = _start_cluster(settings)
    with cluster, Client(cluster, set_as_default=False) as client:
        watchdog = JobWatchdog(
            settings,
            cluster,
            client,
            poll_interval_s=poll_interval_s,
            resubmit_delay_s=resubmit_delay_s,
            max_consecutive_failures=max_consecutive_failures,
        )
        _submit(cluster, settings.minimum_jobs)
        watchdog.poll()
        if watchdog.failure is not None:
            raise ClusterError(watchdog.failure, path=settings.path)
        cluster.adapt(
            minimum_jobs=settings.minimum_jobs,
            maximum_jobs=settings.maximum_jobs,
            worker_key=watchdog.get_job_name,
            interval=f"{_ADAPT_INTERVAL_S}s",
            target_duration=_TARGET_DURATION,
            wait_count=max(1, idle_time_s // _ADAPT_INTERVAL_S),
        )
        with watchdog:
            try:
                yield client
            except (ClusterError, CancelledError):
                if watchdog.failure is None:
                    raise
                raise ClusterError(watchdog.failure, path=settings.path) from None


def _start_cluster(settings: Settings) -> Any:
    """Start a scheduler whose workers are jobs, none yet."""
    # Made before it is initialized, so that what a failed initialization leaves can be ended.
    cluster = settings.cluster_class.__new__(settings.cluster_class)
    directives = settings.keywords.get("job_extra_directives", [])
    clusters = find_clusters(directives) if settings.system == "slurm" else None
    job_class = make_job_class(get_job_class(settings.cluster_class), clusters)
    try:
        with ignore_taken_port():
            cluster.__init__(job_cls=job_class, **settings.keywords)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        abandon_cluster(cluster)
        reason = " ".join(str(_find_cause(error)).split())
        reason = reason.removeprefix("Cluster failed to start: ")
        raise ConfigError(
            f"jobqueue.{settings.system} cannot be used: {reason}",
            option=f"jobqueue.{settings.system}",
            path=settings.path,
        ) from error
    return cluster


def _find_cause(error: BaseException) -> BaseException:
    """Return the OSError behind an error, or the error itself if there is none."""
    earlier: BaseException | None = error
    while earlier is not None and not isinstance(earlier, OSError):
        earlier = earlier.__cause__ or earlier.__context__
    return earlier or error


def make_job_class(base: Any, clusters: str | None = None) -> Any:
    """Return a class of jobs that record when they are refused, and end in good order.

    Parameters
    ----------
    base : type
        The class of jobs of dask-jobqueue.
    clusters : str, optional
        Those of Slurm that the user names; a job is on one of them.

    Returns
    -------
    type
        A subclass with the attributes that `JobWatchdog` reads and writes.
    """
    detached: Any = detach_commands(base, make_environment)

    class Job(detached):
        # The cluster of Slurm, or clusters, that it is on, None for that of this machine.
        slurm_cluster = clusters
        # Seconds of the monotonic clock, as all times of a job.
        submitted_at_s = 0.0
        # Why the batch system refused it, and whether that has been reported.
        refusal: str | None = None
        is_refusal_reported = False
        # Whether it has brought a worker, and when it last had one.
        has_had_worker = False
        worker_seen_at_s = 0.0

        async def start(self) -> None:
            self.submitted_at_s = time.monotonic()
            try:
                await super().start()
            except (OSError, RuntimeError, ValueError) as error:
                # Dask would log the error, with a traceback, and wait for the worker.
                self.refusal = _describe_refusal(self.submit_command, error)
                self.status = Status.running

        def note_answer(self, answer: str) -> None:
            self.slurm_cluster = find_cluster_of_answer(answer) or clusters

        async def close(self) -> None:
            if self.slurm_cluster is not None:
                self.cancel_command = f"scancel --clusters={shlex.quote(self.slurm_cluster)}"
            try:
                await super().close()
            except OSError as error:
                logger.warning("job %s could not be cancelled: %s", self.job_id, error)
            self.status = Status.closed

    return Job


def _describe_refusal(submit_command: str, error: Exception) -> str:
    """Return the reason why a job was refused, in the batch system's words."""
    command = submit_command.split()[0]
    if isinstance(error, FileNotFoundError):
        return f"there is no {command} on this machine; jobs are submitted where there is one"
    out, _, err = str(error).partition("\nstderr:\n")
    lines = (line.removeprefix(f"{command}: error: ") for line in (err or out).splitlines())
    return f"{command} refused a job: {'; '.join(line.strip() for line in lines if line.strip())}"


def _submit(cluster: Any, jobs: int) -> None:
    """Submit jobs, and return when the batch system has accepted or refused them.

    A Ctrl-C ends this wait only. With Dask's own way of waiting, it would end the submission,
    too, and leave jobs whose numbers are unknown.
    """
    is_over = threading.Event()

    async def wait() -> None:
        try:
            await cluster
        finally:
            is_over.set()

    cluster.scale(jobs=jobs)
    submit_coroutine(cluster, wait)
    is_over.wait()
