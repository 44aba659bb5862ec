"""A page about the run, served by the scheduler beside its dashboard.

The client sends the scheduler a report once a second. The page stays when the client goes.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from distributed import Client
from distributed.diagnostics.plugin import SchedulerPlugin
from tornado import web

from spxdask.cluster.dask_internals import (
    count_task_states,
    count_threads,
    get_web_application,
    get_workers,
)
from spxdask.cluster.page_html import format_page
from spxdask.progress import RATE_WINDOW_S, Progress

logger = logging.getLogger(__name__)

DASHBOARD_PORT = 8787
TOPIC = "spxdask"
PATH = "/spxdask"
PUBLISH_INTERVAL_S = 1.0
# The page shows this many of the last failures of a stage.
MAX_FAILURES_SHOWN = 20
# The plot of a stage has at most this many points.
MAX_SAMPLES = 240
# Dask's names for the states of a task, and what the page calls them.
STATE_NAMES = {
    "processing": "running",
    "queued": "queued",
    "waiting": "waiting",
    "no-worker": "waiting for a worker",
}
# The page counts the tasks whose keys begin with these.
TASK_PREFIXES = (
    *("query", "download-extract", "download", "extract", "probe"),
    *("read", "shuffle-transfer", "shuffle-barrier", "p2pshuffle", "write-lightcurves"),
)


class ProgressPublisher:
    """Sends the scheduler reports on a run, and forwards its progress to another object.

    Parameters
    ----------
    progress : Progress
        Receives what this object receives.
    output : str
        The output folder, which names the run.
    interval_s : float
        During a stage, reports are at least this many seconds apart.

    Attributes
    ----------
    client : Client or None
        The client whose scheduler gets the reports. Set it when there is one.
    """

    def __init__(
        self, progress: Progress, output: str, *, interval_s: float = PUBLISH_INTERVAL_S
    ) -> None:
        self.client: Client | None = None
        self._progress = progress
        self._interval_s = interval_s
        self._published_at = 0.0
        self._stages: list[dict[str, Any]] = []
        self._record: _Run | None = None
        self._run = {
            "output": output,
            "process": f"process {os.getpid()} on {socket.gethostname()}",
        }

    def connect(self, client: Client, links: str) -> None:
        """Report that there is a cluster, to its scheduler and, if it has the method, the object.

        Parameters
        ----------
        client : Client
            Its scheduler gets the reports from now on.
        links : str
            Lines that name the pages of the cluster.
        """
        self.client = client
        forward = getattr(self._progress, "connect", None)
        if forward is not None:
            forward(links)

    def start(self, stage: str, total: int, unit: str) -> None:
        """Report that a stage begins.

        Parameters
        ----------
        stage : str
            Name of the stage. If it is among those reported, the run has started again
            there, and those that came after it are forgotten.
        total : int
            Number of its units.
        unit : str
            What they are, in the plural.
        """
        self._progress.start(stage, total, unit)
        names = [each["stage"] for each in self._stages]
        if stage in names:
            del self._stages[names.index(stage) :]
        self._stages.append(
            {
                "stage": stage,
                "unit": unit,
                "total": total,
                "done": 0,
                "failed": 0,
                "bytes": 0,
                "failures": [],
                "state": "running",
                "waiting": None,
                "started": time.time(),
            }
        )
        self._publish()

    def advance(self, *, failed: bool = False, reason: str | None = None, n_bytes: int = 0) -> None:
        """Report that one more unit of the stage has ended.

        Parameters
        ----------
        failed : bool
            Whether it failed.
        reason : str, optional
            Which unit it was and why it failed, for the page.
        n_bytes : int
            How many bytes were fetched for it.
        """
        receive = getattr(self._progress, "receive", None)
        if receive is not None and n_bytes:
            receive(n_bytes)
        self._progress.advance(failed=failed)
        stage = self._stages[-1]
        stage["failed" if failed else "done"] += 1
        stage["bytes"] += n_bytes
        if reason:
            stage["failures"] = [*stage["failures"], reason][-MAX_FAILURES_SHOWN:]
        if time.monotonic() - self._published_at > self._interval_s:
            self._publish()

    def wait(self, reason: str | None) -> None:
        """Report that the stage waits, or that it goes on.

        Parameters
        ----------
        reason : str or None
            What it waits for, in words; None when it goes on.
        """
        forward = getattr(self._progress, "wait", None)
        if forward is not None:
            forward(reason)
        if self._stages and self._stages[-1]["waiting"] != reason:
            self._stages[-1]["waiting"] = reason
            self._publish()

    def note(self, text: str) -> None:
        """Report what the stage is about to do, to the object if it has the method.

        Parameters
        ----------
        text : str
            In words.
        """
        forward = getattr(self._progress, "note", None)
        if forward is not None:
            forward(text)

    def finish(self) -> None:
        """Report that the stage has ended."""
        self._progress.finish()
        if self._stages:
            self._stages[-1] |= {"state": "ended", "waiting": None}
        self._publish()

    def format_page(self) -> str:
        """Return the page about the run as it is now, for when there is no scheduler to serve it.

        Returns
        -------
        str
            HTML.
        """
        runs = [] if self._record is None else [_describe_run(self._record, time.time())]
        return format_page({"runs": runs, "tasks": {}}, None)

    def _publish(self) -> None:
        self._published_at = time.monotonic()
        client = None if self.client is None else self.client.id
        report: dict[str, Any] = self._run | {"client": client, "stages": self._stages}
        if self._stages:
            now = time.time()
            self._record = self._record or _Run(report, now)
            # A copy, as the next report is compared with it.
            self._record.add(report | {"stages": [dict(s) for s in self._stages]}, now)
        if self.client is None or self.client.status != "running":
            return
        try:
            self.client.log_event(TOPIC, report)
        except (OSError, RuntimeError) as error:
            # The run itself fails when the scheduler is gone; its page must not be the reason.
            logger.debug("the scheduler could not be sent a report: %s", error)


def choose_dashboard_port(preferred: int = DASHBOARD_PORT) -> int:
    """Return a port for the dashboard.

    Parameters
    ----------
    preferred : int
        The port to use if it is free.

    Returns
    -------
    int
        The port, or 0 for whichever the system gives.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", preferred))
        except OSError:
            return 0
    return preferred


@contextmanager
def ignore_taken_port() -> Iterator[None]:
    """Keep Dask from warning of a port that was taken since it was chosen; it takes another.

    Yields
    ------
    None
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*Port \d+ is already in use")
        # The socket for that port, which Dask does not close.
        warnings.filterwarnings("ignore", "unclosed <socket", ResourceWarning)
        yield


def show_page(client: Client) -> str | None:
    """Have the scheduler serve the page.

    Parameters
    ----------
    client : Client
        Of the cluster.

    Returns
    -------
    str or None
        The address of the page, None if there is none.
    """
    try:
        client.register_plugin(Monitor())
    except Exception as error:
        # A scheduler without spxdask, or one that accepts no plugins, answers with whatever
        # error its Python raises. The run works without a page.
        logger.warning("there is no page about the run beside the dashboard: %s", error)
        return None
    dashboard = client.dashboard_link
    return dashboard.removesuffix("/status") + PATH if dashboard else None


@dataclass
class _Run:
    """The last report of a client, and how many units had ended at which time."""

    report: dict[str, Any]
    reported_at: float
    # Of the last minutes, for the rate; and of the whole stage, for the plot.
    history: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=1000))
    samples: list[tuple[float, int]] = field(default_factory=list)
    is_client_gone: bool = False

    def add(self, report: dict[str, Any], now: float) -> None:
        """Take the next report."""
        stage = report["stages"][-1]
        if self.report["stages"][-1]["started"] != stage["started"]:
            self.history.clear()
            self.samples.clear()
        self.report, self.reported_at, self.is_client_gone = report, now, False
        point = now, stage["done"] + stage["failed"]
        self.history.append(point)
        while len(self.history) > 2 and now - self.history[0][0] > RATE_WINDOW_S:
            self.history.popleft()
        self.samples.append(point)
        if len(self.samples) > MAX_SAMPLES:
            # Half as many, evenly over the stage, and always the first and the last.
            self.samples[:] = [*self.samples[:-1:2], point]


class Monitor(SchedulerPlugin):
    """Scheduler plugin that keeps the reports of clients and serves the page.

    Parameters
    ----------
    clock : callable
        Returns the time in seconds since the epoch.
    """

    name = "spxdask-monitor"
    idempotent = True

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.runs: dict[str, _Run] = {}
        self.scheduler: Any = None
        self._clock = clock

    async def start(self, scheduler: Any) -> None:
        """Add the page to the scheduler's web server.

        Parameters
        ----------
        scheduler : distributed.Scheduler
            The scheduler that the plugin is registered on.
        """
        self.scheduler = scheduler
        application = get_web_application(scheduler)
        if application is not None:
            routes = [
                (rf"{PATH}/?", _PageHandler, {"monitor": self}),
                (rf"{PATH}/state\.json", _StateHandler, {"monitor": self}),
            ]
            application.add_handlers(".*$", routes)

    def log_event(self, topic: str, msg: Any) -> None:
        """Keep the report of a client.

        Parameters
        ----------
        topic : str
            Messages of topics other than `TOPIC` are ignored.
        msg : dict
            The report; whatever is not one is ignored.
        """
        if topic != TOPIC or not isinstance(msg, dict) or not msg.get("stages"):
            return
        now = self._clock()
        self.runs.setdefault(msg["output"], _Run(msg, now)).add(msg, now)

    def remove_client(self, scheduler: Any, client: str) -> None:
        """Note that the client of a run has gone.

        Parameters
        ----------
        scheduler : distributed.Scheduler
            The scheduler that the plugin is registered on.
        client : str
            Id of the client.
        """
        for run in self.runs.values():
            run.is_client_gone = run.is_client_gone or run.report.get("client") == client

    def describe_state(self) -> dict[str, Any]:
        """Describe what the page shows.

        Returns
        -------
        dict
            Numbers of workers, threads and tasks, and the runs with their stages.
        """
        tasks = {}
        for prefix in TASK_PREFIXES:
            states = count_task_states(self.scheduler, prefix)
            counts = {name: states.get(state, 0) for state, name in STATE_NAMES.items()}
            if any(counts.values()):
                tasks[prefix] = counts
        now = self._clock()
        return {
            "workers": len(get_workers(self.scheduler)),
            "threads": count_threads(self.scheduler),
            "tasks": tasks,
            "runs": [_describe_run(run, now) for run in self.runs.values()],
        }


def _describe_run(run: _Run, now: float) -> dict[str, Any]:
    *before, stage = run.report["stages"]
    remaining = max(stage["total"] - stage["done"] - stage["failed"], 0)
    (begin, first), (end, last) = run.history[0], run.history[-1]
    state, rate = stage["state"], 0.0
    if state == "running" and run.is_client_gone:
        state = "client gone"
    elif state == "running" and end > begin:
        rate = (last - first) / (end - begin)
    current = stage | {
        "state": state,
        "per_second": rate,
        "seconds_left": remaining / rate if rate else None,
    }
    return {
        "output": run.report["output"],
        "process": run.report["process"],
        "stages": [*before, current],
        "seconds_since_report": now - run.reported_at,
        "seconds_elapsed": run.reported_at - run.report["stages"][0]["started"],
        "finish_time": now + remaining / rate if rate else None,
        "throughput": _find_throughput(run.samples),
    }


def _find_throughput(samples: list[tuple[float, int]]) -> list[tuple[float, float]]:
    """Return units a second over the time since the stage began, s."""
    begin = samples[0][0] if samples else 0.0
    pairs = itertools.pairwise(samples)
    return [((t + u) / 2 - begin, (m - n) / (u - t)) for (t, n), (u, m) in pairs if u > t]


class _StateHandler(web.RequestHandler):
    def initialize(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def get(self) -> None:
        self.set_header("Content-Type", "application/json")
        self.write(json.dumps(self.monitor.describe_state()))


class _PageHandler(_StateHandler):
    def get(self) -> None:
        self.set_header("Content-Type", "text/html; charset=utf-8")
        # Links are relative, so that they work behind a proxy that adds a prefix to paths.
        root = "../" if self.request.path.endswith("/") else ""
        self.write(format_page(self.monitor.describe_state(), root))
