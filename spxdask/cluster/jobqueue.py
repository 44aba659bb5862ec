"""Workers that are jobs of a batch system, submitted by dask-jobqueue as they are needed."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import dask
from dask.utils import parse_bytes, parse_timedelta
from distributed import CancelledError, Client, Future, SchedulerPlugin, Status
from distributed.deploy.local import nprocesses_nthreads

from spxdask.cluster.client import DASHBOARD_PORT, KEEP_FREED_MEMORY, free_port
from spxdask.config import read_options
from spxdask.errors import ClusterError, ConfigError, InputError

logger = logging.getLogger(__name__)

# What the batch systems are called in the files of dask-jobqueue, and their classes there.
SYSTEMS = {
    "slurm": "SLURMCluster",
    "pbs": "PBSCluster",
    "sge": "SGECluster",
    "lsf": "LSFCluster",
    "oar": "OARCluster",
    "htcondor": "HTCondorCluster",
}
SCALE = {"minimum_jobs": 1, "maximum_jobs": 20}
# A run keeps few tasks in flight, all of them short. So their number decides how many
# workers there should be, whatever time they take; and as jobs may have waited for hours
# in a queue, one is given back after a minute without work.
_ADAPT = {"interval": "1s", "target_duration": "10ms", "wait_count": 60}

# Seconds from one look at the jobs to the next, and until a refused one is tried again.
LOOK_S = 10.0
AGAIN_S = 60.0
# So many jobs in a row that are refused, or end before they bring a worker, are no accident.
TRIES = 3
# A worker leaves in good order before the batch system ends its job: by a tenth of the
# job's time, or by so many seconds if that is less, give or take half of it.
SPARE = 0.1
SPARE_S = 900

_RENAMED = {
    "name": "job_name",
    "extra": "worker_extra_args",
    "env_extra": "job_script_prologue",
    "header_skip": "job_directives_skip",
    "job_extra": "job_extra_directives",
}
_OF_SCHEDULER = ("dashboard_address", "host")
# Those that are ours to give, or that a file cannot hold.
_NOT_IN_FILES = {
    *("self", "scheduler", "name", "job_cls", "loop", "asynchronous", "n_workers"),
    *("scheduler_cls", "config_name", "base_class_kwargs", "job_kwargs", "kwargs"),
    *_OF_SCHEDULER,
}
_COUNTS = ("cores", "processes", "job_cpu", "ncpus")
_FLAGS = ("nanny", "security", "use_stdin")
_LISTS = (
    *("job_script_prologue", "worker_extra_args", "job_directives_skip"),
    *("job_extra_directives", "submit_command_extra", "cancel_command_extra"),
)


@contextmanager
def jobqueue_client(path: str | os.PathLike) -> Iterator[Client]:
    """Have a batch system run the workers, and give its jobs back when the block ends.

    The scheduler is in this process. Jobs come and go with the work there is, between the
    two numbers in the file.

    Parameters
    ----------
    path : path
        YAML file with a section ``jobqueue``, of one batch system, laid out as that of
        dask-jobqueue, whose defaults and configuration hold for what it leaves out; and
        with a section ``adapt``, of `SCALE`.

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
        If the batch system takes none of the jobs, or if one after the other ends before
        it brings a worker; also in the block, in place of the error that there is no
        cluster any more.
    """
    settings = _read(path)
    cluster = _started(settings)
    with cluster, Client(cluster) as client:
        watch = _Watch(settings, cluster, client)
        _submit(cluster, settings.minimum_jobs)
        watch.look()
        if watch.failure is not None:
            raise ClusterError(watch.failure)
        cluster.adapt(
            minimum_jobs=settings.minimum_jobs,
            maximum_jobs=settings.maximum_jobs,
            worker_key=watch.job_of,
            **_ADAPT,
        )
        with watch:
            try:
                yield client
            except (ClusterError, CancelledError):
                if watch.failure is None:
                    raise
                raise ClusterError(watch.failure) from None


@contextmanager
def hold_worker_count(client: Client) -> Iterator[None]:
    """Keep an adaptive cluster at the number of workers it has, those still queued included.

    What a shuffle has brought to a worker is lost with it, and brought again. Workers that
    are lost are replaced. A cluster that does not adapt is left as it is.
    """
    cluster = client.cluster
    adaptive = getattr(cluster, "_adaptive", None)
    if adaptive is None or adaptive.state not in ("starting", "running"):
        yield
        return
    before = {"minimum": adaptive.minimum, "maximum": adaptive.maximum}
    count = max(len(cluster.plan), 1)
    cluster.adapt(minimum=count, maximum=count)
    try:
        yield
    finally:
        if cluster.status == Status.running:
            cluster.adapt(**before)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What the file says, checked."""

    path: str
    system: str
    keywords: dict[str, Any]
    minimum_jobs: int
    maximum_jobs: int
    cluster_class: type


def _read(path: str | os.PathLike) -> _Settings:
    values = read_options(path)
    _no_others(path, "", values, ("jobqueue", "adapt"))
    section = _section(path, "jobqueue", values.get("jobqueue"))
    _no_others(path, "jobqueue.", section, SYSTEMS)
    if len(section) != 1:
        found = ", ".join(section) or "none"
        raise ConfigError(f"{path}: jobqueue has {found}; allowed is one of {', '.join(SYSTEMS)}")
    [(system, section)] = section.items()
    scale = _section(path, "adapt", values.get("adapt"))
    _no_others(path, "adapt.", scale, SCALE)
    scale = SCALE | {key: value for key, value in scale.items() if value is not None}
    if not _is_count(scale["minimum_jobs"], 0):
        _refuse(path, "adapt.minimum_jobs", scale["minimum_jobs"], "a number of jobs")
    if not _is_count(scale["maximum_jobs"], max(1, scale["minimum_jobs"])):
        least = max(1, scale["minimum_jobs"])
        _refuse(path, "adapt.maximum_jobs", scale["maximum_jobs"], f"{least} or more")
    section = _section(path, f"jobqueue.{system}", section)
    cluster_class = getattr(_dask_jobqueue(), SYSTEMS[system])
    known = _known(cluster_class)
    # What the file leaves out, as dask-jobqueue does.
    default = dask.config.get(f"jobqueue.{system}", {})
    default = _options("Dask's configuration", system, default, known, strict=False)
    options = default | _options(path, system, section, known, strict=True)
    return _Settings(
        path=str(path),
        system=system,
        keywords=_keywords(path, system, options),
        cluster_class=cluster_class,
        **scale,
    )


def _section(path: Any, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        _refuse(path, key, value, "a mapping")
    return value or {}


def _no_others(path: Any, section: str, values: Mapping, known: Any) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(sorted(known))}"
            raise ConfigError(f"{path}: unknown key {section}{key}; {hint}")


def _refuse(path: Any, key: str, value: Any, allowed: str) -> None:
    raise ConfigError(f"{path}: {key} is {value!r}; allowed is {allowed}")


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _options(
    path: Any, system: str, section: Mapping[str, Any], known: set[str], *, strict: bool
) -> dict[str, Any]:
    """Return what a section says, with keys as Python's and names as they are today.

    Keys that are not known are an error if `strict`, and left out otherwise.
    """
    options: dict[str, Any] = {}
    for key, value in section.items():
        name = str(key).replace("-", "_")
        name = _RENAMED.get(name, name)
        if name not in known:
            if not strict:
                continue
            if name in _OF_SCHEDULER:
                raise ConfigError(
                    f"{path}: jobqueue.{system}.{key} belongs into jobqueue.{system}."
                    "scheduler_options"
                )
            _no_others(path, f"jobqueue.{system}.", [key], {*known, *_RENAMED})
        # The file that dask-jobqueue comes with names all there is, most of it as null.
        if value is None:
            continue
        allowed = _allowed(name, value, system)
        if allowed is not None:
            _refuse(path, f"jobqueue.{system}.{key}", value, allowed)
        if options.get(name) and value:
            raise ConfigError(f"{path}: jobqueue.{system}.{key} is given twice, as {name}")
        options[name] = options.get(name) or value
    return options


def _allowed(name: str, value: Any, system: str) -> str | None:
    """Say what a value must be, None if it is that."""
    if name in _COUNTS:
        return None if _is_count(value, 1) else "a whole number from 1"
    if name in _FLAGS:
        return None if isinstance(value, bool) else "true or false"
    if name == "scheduler_options" or (name, system) == ("job_extra_directives", "htcondor"):
        return None if isinstance(value, dict) else "a mapping"
    if name in _LISTS:
        texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
        return None if texts else "a list of texts"
    if name == "memory":
        with suppress(ValueError):
            # A number alone is one of bytes, and meant otherwise.
            if isinstance(value, str | int) and parse_bytes(str(value)) >= 1e6:
                return None
        return "an amount with its unit, such as 8GB"
    texts = isinstance(value, str | int | float) and not isinstance(value, bool)
    return None if texts else "a text"


def _dask_jobqueue() -> Any:
    """Import dask-jobqueue, which takes Ctrl-C for itself and must not."""
    before = signal.getsignal(signal.SIGINT)
    try:
        return importlib.import_module("dask_jobqueue")
    except ModuleNotFoundError as error:
        raise InputError(
            f"workers in batch jobs need dask-jobqueue ({error}): pip install 'spxdask[jobqueue]'"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGINT, before)


def _known(cluster_class: type) -> set[str]:
    """Return the keywords that a cluster and its jobs take."""
    known: set[str] = set()
    for one in (*cluster_class.__mro__, *cluster_class.job_cls.__mro__):
        if one.__module__.startswith("dask_jobqueue") and "__init__" in vars(one):
            known |= inspect.signature(one).parameters.keys()
    return known - _NOT_IN_FILES


def _keywords(path: Any, system: str, options: dict[str, Any]) -> dict[str, Any]:
    """Complete the options by what a run needs, of what the user left open."""
    for key in ("cores", "memory"):
        if key not in options:
            raise ConfigError(f"{path}: jobqueue.{system}.{key} is missing")
    cores = options["cores"]
    # By name, or dask-jobqueue would not know how many workers a job has.
    processes = options.get("processes") or nprocesses_nthreads(cores)[0]
    if processes > cores:
        _refuse(path, f"jobqueue.{system}.processes", processes, f"at most cores, {cores}")
    # Workers of jobs do not inherit our configuration. First, so that the user has the last
    # word.
    prologue = [
        f"export {key.rpartition('.')[2]}={value}" for key, value in KEEP_FREED_MEMORY.items()
    ]
    arguments = [*options.get("worker_extra_args", [])]
    if not any("--lifetime" in argument for argument in arguments):
        arguments += _lifetime(system, options.get("walltime"))
    scheduler = {"dashboard_address": f":{free_port(DASHBOARD_PORT)}"}
    return options | {
        "processes": processes,
        "job_script_prologue": [*prologue, *options.get("job_script_prologue", [])],
        "worker_extra_args": arguments,
        "scheduler_options": scheduler | options.get("scheduler_options", {}),
    }


def _lifetime(system: str, walltime: Any) -> list[str]:
    """Return how a worker is told to leave before its job's time is over.

    Nothing for a time that is not understood, or without end.
    """
    text = str(walltime)
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d?):(\d\d?)", text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    elif system == "slurm" and (match := re.fullmatch(r"(\d+)-(\d+)(?::(\d\d?))?", text)):
        days, hours, minutes, seconds = *(int(part or 0) for part in match.groups()), 0
    elif system == "slurm" and (match := re.fullmatch(r"(\d+)(?::(\d\d?))?", text)):
        days, hours, minutes, seconds = 0, 0, *(int(part or 0) for part in match.groups())
    elif system == "lsf" and (match := re.fullmatch(r"(?:(\d+):)?(\d+)", text)):
        days, hours, minutes, seconds = 0, *(int(part or 0) for part in match.groups()), 0
    else:
        return []
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        return []
    spare = min(total * SPARE, SPARE_S)
    return [f"--lifetime {total - spare:.0f}s", f"--lifetime-stagger {spare / 2:.0f}s"]


def _started(settings: _Settings) -> Any:
    """Start a scheduler whose workers are jobs, none yet."""
    cluster = settings.cluster_class.__new__(settings.cluster_class)
    try:
        cluster.__init__(job_cls=_job_class(settings.cluster_class.job_cls), **settings.keywords)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        # Dask leaves behind what it has begun.
        cluster.status = Status.closed
        with suppress(AttributeError):
            cluster._loop_runner.stop()
        reason = " ".join(str(_first(error)).split()).removeprefix("Cluster failed to start: ")
        raise ConfigError(
            f"{settings.path}: jobqueue.{settings.system} cannot be used: {reason}"
        ) from error
    return cluster


def _first(error: BaseException) -> BaseException:
    """Return what the system refused, if that is behind an error, or else the error."""
    earlier: BaseException | None = error
    while earlier is not None and not isinstance(earlier, OSError):
        earlier = earlier.__cause__ or earlier.__context__
    return earlier or error


def _job_class(base: type) -> type:
    """Return a class of jobs that tell when they are refused, and end in good order."""

    class Job(base):
        submitted_at = 0.0
        # Why it was refused, and whether that has been said.
        refusal: str | None = None
        told = False
        # Whether it has brought a worker, and when one was last seen.
        came = False
        seen_at = 0.0

        async def start(self) -> None:
            self.submitted_at = time.monotonic()
            try:
                await super().start()
            except (OSError, RuntimeError, ValueError) as error:
                # Dask would log it, with a traceback, and wait for the worker.
                self.refusal = _said(self.submit_command, error)
                self.status = Status.running

        async def close(self) -> None:
            try:
                await super().close()
            except OSError as error:
                logger.warning("job %s could not be cancelled: %s", self.job_id, error)
            self.status = Status.closed

        @staticmethod
        async def _call(command: list[str], **options: Any) -> str:
            # A job whose submission were stopped by a Ctrl-C could be there unknown to us.
            return await base._call(command, start_new_session=True, **options)

    return Job


def _said(command: str, error: Exception) -> str:
    """Say what became of a job that was not taken, in the batch system's words."""
    command = command.split()[0]
    if isinstance(error, FileNotFoundError):
        return f"there is no {command} on this machine; jobs are submitted where there is one"
    out, _, err = str(error).partition("\nstderr:\n")
    lines = (line.removeprefix(f"{command}: error: ") for line in (err or out).splitlines())
    return f"{command} refused a job: {'; '.join(line.strip() for line in lines if line.strip())}"


def _submit(cluster: Any, jobs: int) -> None:
    """Submit jobs, and return when the batch system has them or has refused them.

    A Ctrl-C ends our waiting alone. Dask's own way to wait would end the submission, and
    leave jobs whose numbers nobody knows.
    """
    over = threading.Event()

    async def submitted() -> None:
        try:
            await cluster
        finally:
            over.set()

    cluster.scale(jobs=jobs)
    cluster.loop.add_callback(submitted)
    over.wait()


def _job_of(worker: Any) -> str:
    """Return the name of the job that a worker is of, where a job has several."""
    return str(worker.name).rpartition("-")[0]


class _Arrivals(SchedulerPlugin):
    """Notes when workers come, by the names of their jobs."""

    name = "spxdask-arrivals"

    def __init__(self, job_of: Callable[[Any], str]) -> None:
        self.last: dict[str, float] = {}
        self._job_of = job_of

    def add_worker(self, scheduler: Any, worker: str) -> None:
        self.last[self._job_of(scheduler.workers[worker])] = time.monotonic()


class _Watch:
    """Sees to it that nobody waits for jobs that will not come.

    In the block, a thread looks at them again and again. Those that were refused, that ended
    without a worker, or that lost all of several workers, Dask takes for jobs that are still
    to come. They are dropped, and so others are submitted in their place. Where that leads to
    nothing, what the client waits for is called off.
    """

    def __init__(self, settings: _Settings, cluster: Any, client: Client) -> None:
        self.failure: str | None = None
        self._settings = settings
        self._cluster = cluster
        self._client = client
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="spxdask-jobs", daemon=True)
        several = settings.keywords["processes"] > 1
        self.job_of = _job_of if several else attrgetter("name")
        self._arrivals = _Arrivals(self.job_of)
        cluster.scheduler.add_plugin(self._arrivals)
        self._ever = False
        self._refusals = self._in_vain = 0

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._over.wait(LOOK_S if self.failure is None else 1.0):
            if self._cluster.status != Status.running:
                return
            try:
                if self.failure is None:
                    self.look()
                if self.failure is not None:
                    futures = [Future(key, self._client) for key in list(self._client.futures)]
                    self._client.cancel(futures, reason="no jobs")
            except Exception:
                # Without these looks a run could wait for ever; the next may do better.
                if self._cluster.status == Status.running:
                    logger.warning("the jobs could not be looked after", exc_info=True)

    def look(self) -> None:
        """Look after the jobs once."""
        jobs, there = self._present()
        lost = self._lost(jobs, there)
        ended = self._ended(jobs)
        refused = {name: job for name, job in jobs.items() if job.refusal is not None}
        self._in_vain += len(ended)
        for job in ended.values():
            logger.warning("job %s ended before it brought a worker", job.job_id)
        if ended and not there and self._in_vain >= TRIES:
            self._fail(
                f"{self._in_vain} jobs in a row ended before they brought a worker; see "
                f"{self._log_of(job)}"
            )
        self._look_at_refused(refused, alone=refused.keys() == jobs.keys())
        again = time.monotonic() - AGAIN_S
        for name, job in (lost | ended | refused).items():
            if job.refusal is None or job.submitted_at < again:
                self._drop(name, job)

    def _present(self) -> tuple[dict[str, Any], set[str]]:
        """Return the jobs, and the names of those that have workers."""

        # On the loop, as that changes both.
        async def present() -> tuple[dict[str, Any], set[str]]:
            workers = self._cluster.scheduler.workers.values()
            return dict(self._cluster.workers), {self.job_of(worker) for worker in workers}

        return self._cluster.sync(present)

    def _look_at_refused(self, refused: Mapping[str, Any], *, alone: bool) -> None:
        """Fail when there are no other jobs; if there once were, not at the first refusal."""
        if not alone:
            self._refusals = 0
        new = [job for job in refused.values() if not job.told]
        if not new:
            return
        self._refusals += alone
        if alone and (not self._ever or self._refusals >= TRIES):
            self._fail(new[0].refusal)
        else:
            logger.warning("%s", new[0].refusal)
        for job in new:
            job.told = True

    def _fail(self, reason: str) -> None:
        self.failure = f"{self._settings.path}: {reason}"

    def _lost(self, jobs: Mapping[str, Any], there: set[str]) -> dict[str, Any]:
        """Note which jobs have brought workers; return those that have lost them all.

        Dask replaces a lost worker that is a job of its own, and no others.
        """
        now = time.monotonic()
        timeout = parse_timedelta(dask.config.get("distributed.deploy.lost-worker-timeout"))
        lost = {}
        for name, job in jobs.items():
            came_at = self._arrivals.last.get(name, 0.0)
            if came_at > job.submitted_at and not job.came:
                job.came = self._ever = True
                job.seen_at = came_at
                self._in_vain = 0
            if name in there:
                job.seen_at = now
            elif job.came and now - job.seen_at > timeout:
                lost[name] = job
        return lost

    def _ended(self, jobs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the jobs that have ended by themselves without ever bringing a worker.

        Only of Slurm, whose command for it is known.
        """
        waiting = {n: j for n, j in jobs.items() if j.job_id is not None and not j.came}
        if self._settings.system != "slurm" or not waiting:
            return {}
        # By number, as not all have a name, in a container for example.
        command = ["squeue", "--noheader", "--format=%A", f"--user={os.getuid()}"]
        try:
            asked = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=True,
                timeout=5,
                start_new_session=True,
            )
        # A controller that does not answer will do so later.
        except (OSError, subprocess.SubprocessError):
            return {}
        queued, wanted = asked.stdout.split(), set(self._cluster.worker_spec)
        return {n: j for n, j in waiting.items() if j.job_id not in queued and n in wanted}

    def _log_of(self, job: Any) -> str:
        folder = self._settings.keywords.get("log_directory")
        if folder is None:
            return f"slurm-{job.job_id}.out"
        return os.path.join(folder, f"{job.job_name}-{job.job_id}.err")

    def _drop(self, name: str, job: Any) -> None:
        async def drop() -> None:
            if self._cluster.workers.get(name) is job:
                del self._cluster.workers[name]
                await job.close()

        self._cluster.sync(drop)
