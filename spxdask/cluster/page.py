"""A page about the run, served by the scheduler beside its dashboard.

The client tells the scheduler once a second how far it is; the page stays when the client
goes.
"""

from __future__ import annotations

import html
import json
import logging
import os
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from distributed import Client
from distributed.diagnostics.plugin import SchedulerPlugin
from tornado import web

from spxdask.progress import RATE_S, Progress, duration

logger = logging.getLogger(__name__)

TOPIC = "spxdask"
PATH = "/spxdask"
PUBLISH_INTERVAL_S = 1.0
# Failures shown.
SHOWN = 20
# What the scheduler calls the states of a task, and what we do.
STATES = {
    "processing": "running",
    "queued": "queued",
    "waiting": "waiting",
    "no-worker": "waiting for a worker",
}
# Tasks by the stage that they are of.
STAGES = (
    *("query", "download-extract", "download", "extract"),
    *("read", "shuffle-transfer", "shuffle-barrier", "p2pshuffle", "write-lightcurves"),
)


class ProgressPublisher:
    """Tells the scheduler how far a run is, and passes on what it is told to a bar.

    Parameters
    ----------
    progress : Progress
    output : str
        The output folder, which names the run.

    Attributes
    ----------
    client : Client or None
        Who is connected to the scheduler.
    """

    def __init__(self, progress: Progress, output: str) -> None:
        self._progress = progress
        self.client: Client | None = None
        self._told = 0.0
        self._stages: list[dict[str, Any]] = []
        self._run = {
            "output": output,
            "process": f"process {os.getpid()} on {socket.gethostname()}",
        }

    def start(self, stage: str, total: int, unit: str) -> None:
        """Say that a stage of `total` units begins."""
        self._progress.start(stage, total, unit)
        # One that is done again starts the run again.
        done = [s["stage"] for s in self._stages]
        self._stages = self._stages[: done.index(stage)] if stage in done else self._stages
        stage = {"stage": stage, "unit": unit, "total": total, "done": 0, "failed": 0}
        self._stages.append(stage | {"failures": [], "state": "at work", "started": time.time()})
        self._tell()

    def advance(self, *, failed: bool = False, reason: str | None = None) -> None:
        """Say that one more unit of the stage has ended."""
        self._progress.advance(failed=failed)
        stage = self._stages[-1]
        stage["failed" if failed else "done"] += 1
        if reason:
            stage["failures"] = [*stage["failures"], reason][-SHOWN:]
        if time.monotonic() - self._told > PUBLISH_INTERVAL_S:
            self._tell()

    def finish(self) -> None:
        """Say that the stage is over."""
        self._progress.finish()
        self._stages[-1]["state"] = "ended"
        self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        if self.client is None or self.client.status != "running":
            return
        told = self._run | {"client": self.client.id, "stages": self._stages}
        try:
            self.client.log_event(TOPIC, told)
        except (OSError, RuntimeError) as error:
            # The run itself notices when the scheduler is gone.
            logger.debug("the scheduler was not told: %s", error)


def show_page(client: Client) -> str | None:
    """Have the scheduler serve the page; return its address, None when it cannot."""
    try:
        client.register_plugin(Monitor())
    except Exception as error:
        # A scheduler may lack spxdask, or not take plugins; the run does without.
        logger.warning("no page of the run beside the dashboard: %s", error)
        return None
    dashboard = client.dashboard_link
    return dashboard.removesuffix("/status") + PATH if dashboard else None


@dataclass
class _Run:
    """What a client told last, and how far it was when."""

    told: dict[str, Any]
    at: float
    past: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=1000))
    gone: bool = False


class Monitor(SchedulerPlugin):
    """Keeps what clients tell of their runs, and shows it."""

    name = "spxdask-monitor"
    idempotent = True

    def __init__(self) -> None:
        self.runs: dict[str, _Run] = {}

    async def start(self, scheduler: Any) -> None:
        """Add the page to the scheduler's web server."""
        self.scheduler = scheduler
        application = getattr(scheduler, "http_application", None)
        if application is not None:
            routes = [
                (rf"{PATH}/?", _Page, {"monitor": self}),
                (rf"{PATH}/state\.json", _State, {"monitor": self}),
            ]
            application.add_handlers(".*$", routes)

    def log_event(self, topic: str, msg: Any) -> None:
        """Take what a client tells."""
        if topic != TOPIC or not isinstance(msg, dict) or not msg.get("stages"):
            return
        now, stage = time.time(), msg["stages"][-1]
        run = self.runs.get(msg["output"])
        if run is None or run.told["stages"][-1]["started"] != stage["started"]:
            run = self.runs[msg["output"]] = _Run(msg, now)
        run.told, run.at, run.gone = msg, now, False
        run.past.append((now, stage["done"] + stage["failed"]))
        while len(run.past) > 2 and now - run.past[0][0] > RATE_S:
            run.past.popleft()

    def remove_client(self, scheduler: Any, client: str) -> None:
        """Remember that a run's client has gone."""
        for run in self.runs.values():
            run.gone = run.gone or run.told.get("client") == client

    def state(self) -> dict[str, Any]:
        """Return what the page shows."""
        prefixes = self.scheduler.task_prefixes
        tasks = {
            name: {said: prefixes[name].states.get(state, 0) for state, said in STATES.items()}
            for name in STAGES
            if name in prefixes
        }
        return {
            "workers": len(self.scheduler.workers),
            "threads": self.scheduler.total_nthreads,
            "tasks": {name: counts for name, counts in tasks.items() if any(counts.values())},
            "runs": [_described(run) for run in self.runs.values()],
        }


def _described(run: _Run) -> dict[str, Any]:
    *before, stage = run.told["stages"]
    remaining = max(stage["total"] - stage["done"] - stage["failed"], 0)
    (begin, first), (end, last) = run.past[0], run.past[-1]
    state, rate = stage["state"], 0.0
    if state == "at work" and run.gone:
        state = "client gone"
    elif state == "at work" and end > begin:
        rate = (last - first) / (end - begin)
    now = stage | {
        "state": state,
        "per_second": rate,
        "seconds_left": remaining / rate if rate else None,
    }
    return {
        "output": run.told["output"],
        "process": run.told["process"],
        "stages": [*before, now],
        "seconds_since_told": time.time() - run.at,
    }


class _State(web.RequestHandler):
    def initialize(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def get(self) -> None:
        self.set_header("Content-Type", "application/json")
        self.write(json.dumps(self.monitor.state()))


class _Page(_State):
    def get(self) -> None:
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.write(_as_html(self.monitor.state()))


def _as_html(state: dict[str, Any]) -> str:
    runs = "".join(map(_run_as_html, state["runs"])) or "<p>No run has told of itself yet.</p>"
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>"
        + ", ".join(f"{n:,} {state}" for state, n in counts.items() if n)
        + "</td></tr>"
        for name, counts in state["tasks"].items()
    )
    tasks = f"<h2>Tasks now</h2><table>{rows}</table>" if rows else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="2">
<title>spxdask</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; color: #222 }}
h1 {{ font-size: 1.4em }} h2 {{ font-size: 1.1em; margin: 1.5em 0 .3em }}
progress {{ width: 100%; height: 1.2em }} td {{ padding: .1em 1.5em .1em 0 }}
.failed {{ color: #a00 }} code {{ font-size: .9em }}
</style></head><body>
<h1>spxdask</h1>
<p>{state["workers"]:,} workers, {state["threads"]:,} threads; <a href="/status">dashboard</a>,
<a href="{PATH}/state.json">as JSON</a></p>
{runs}{tasks}</body></html>"""


def _run_as_html(run: dict[str, Any]) -> str:
    gone = ""
    if run["stages"][-1]["state"] == "client gone":
        gone = (
            f"<p class=failed>The client has gone, {duration(run['seconds_since_told'])} after it "
            "told of itself last; the same command goes on where it was.</p>"
        )
    return (
        f"<h2>{html.escape(str(run['output']))}</h2><p>{html.escape(str(run['process']))}, told "
        f"of itself {duration(run['seconds_since_told'])} ago</p>{gone}"
        + "".join(map(_stage_as_html, run["stages"]))
    )


def _stage_as_html(stage: dict[str, Any]) -> str:
    name, unit = html.escape(str(stage["stage"])), html.escape(str(stage["unit"]))
    ended, total = stage["done"] + stage["failed"], stage["total"]
    failed = f", <span class=failed>{stage['failed']:,} failed</span>" if stage["failed"] else ""
    rate = ""
    if stage.get("per_second"):
        left = duration(stage["seconds_left"])
        rate = f", {total - ended:,} to do at {stage['per_second']:.2f} {unit}/s, {left} left"
    failures = "".join(f"<li><code>{html.escape(str(f))}</code></li>" for f in stage["failures"])
    failures = f"<p class=failed>Failed last:</p><ul>{failures}</ul>" if failures else ""
    return f"""<p><b>{name}</b> ({html.escape(stage["state"])}): {stage["done"]:,} of {total:,}
{unit} done{failed}{rate}<br><progress value="{ended}" max="{max(total, 1)}"></progress></p>
{failures}"""
