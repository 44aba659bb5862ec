"""The page about a run that the scheduler serves."""

from __future__ import annotations

import itertools
import json
import re
import threading
import urllib.request
from types import SimpleNamespace
from urllib.parse import urljoin

import pytest
import simulated

from spxdask import BatchConfig, BatchPipeline
from spxdask.cluster.page import TOPIC, Monitor, ProgressPublisher, show_page
from spxdask.cluster.page_html import format_page
from spxdask.progress import Silent
from spxdask.run.status import watch_status
from spxdask.simulate.archive import Fault, SimulatedArchive

N_FRAMES = 6


def config(survey, archive, folder, **options) -> BatchConfig:
    defaults = simulated.run_options(survey[0], archive, folder / "out")
    return BatchConfig(**(defaults | options))


def page(pipeline, name: str = "") -> str:
    with urllib.request.urlopen(pipeline.page_link + name) as answer:
        return answer.read().decode()


def reported(pipeline) -> dict:
    runs = json.loads(page(pipeline, "/state.json"))["runs"]
    return next(run for run in runs if run["output"] == str(pipeline.folder.path))


def test_a_run_is_on_the_page(client, survey, tmp_path):
    bad = survey[1][2].uri
    with SimulatedArchive(survey[1], faults={bad: [Fault(status=404)]}) as archive:
        pipeline = BatchPipeline(config(survey, archive, tmp_path), client=client)
        pipeline.run_all()
    stages = reported(pipeline)["stages"]
    assert [stage["stage"] for stage in stages] == ["query", "frames", "aggregate"]
    assert all(stage["state"] == "ended" for stage in stages)
    frames = stages[1]
    assert (frames["total"], frames["done"], frames["failed"]) == (N_FRAMES, N_FRAMES - 1, 1)
    assert [text.partition(":")[0] for text in frames["failures"]] == [bad.rpartition("/")[2]]
    text = page(pipeline)
    assert "<title>done aggregate - spxdask</title>" in text
    # The same stays in the folder when the cluster has gone, without links to it.
    kept = (pipeline.folder.root / "progress.html").local_path.read_text()
    for shown in (text, kept):
        assert f"<td class=n>{N_FRAMES - 1}</td><td class=n>{N_FRAMES} frames</td>" in shown
        assert bad.rpartition("/")[2] in shown
    assert frames["bytes"] == sum(
        frame.path.stat().st_size for frame in survey[1][:2] + survey[1][3:]
    )
    assert "href" not in kept
    assert "http-equiv" not in kept
    assert pipeline.dashboard_link == client.dashboard_link
    assert pipeline.page_link == client.dashboard_link.removesuffix("/status") + "/spxdask"


def test_reports_are_escaped(client):
    stage = {"stage": "<b>", "unit": "<i>", "total": 1, "done": 0, "failed": 1}
    stage |= {"failures": ["<script>alert(1)</script>"], "state": "running", "started": 1.0}
    address = show_page(client)
    client.log_event(TOPIC, {"output": "<out>", "process": "<p>", "client": "x", "stages": [stage]})
    with urllib.request.urlopen(address) as answer:
        text = answer.read().decode()
    assert "&lt;script&gt;" in text
    assert "&lt;out&gt;" in text
    assert "<script" not in text
    assert "<out>" not in text


def test_messages_that_are_not_reports_are_ignored():
    monitor = Monitor()
    for topic, message in [("other", {}), (TOPIC, "text"), (TOPIC, {}), (TOPIC, {"stages": []})]:
        monitor.log_event(topic, message)
    assert monitor.runs == {}


def test_rate_and_time_left():
    clock = itertools.count(1000, 10)
    monitor = Monitor(clock=lambda: next(clock))
    for done in (0, 5, 10):
        stage = {"stage": "frames", "unit": "frames", "total": 40, "done": done, "failed": 0}
        stage |= {"failures": [], "state": "running", "started": 1.0}
        monitor.log_event(TOPIC, {"output": "o", "process": "p", "client": "c", "stages": [stage]})
    monitor.scheduler = SimpleNamespace(task_prefixes={}, workers={}, total_nthreads=0)
    now = monitor.describe_state()["runs"][0]["stages"][-1]
    assert now["per_second"] == 0.5
    assert now["seconds_left"] == 60.0
    monitor.remove_client(None, "another")
    assert monitor.describe_state()["runs"][0]["stages"][-1]["state"] == "running"
    monitor.remove_client(None, "c")
    gone = monitor.describe_state()["runs"][0]["stages"][-1]
    assert (gone["state"], gone["seconds_left"]) == ("client gone", None)


def test_the_page_of_a_long_stage_has_a_plot_and_the_time_of_its_end():
    seconds = itertools.count(1_000_000)
    monitor = Monitor(clock=lambda: next(seconds))
    for done in range(1000):
        stage = {"stage": "frames", "unit": "frames", "total": 2000, "done": done, "failed": 0}
        stage |= {"failures": [], "state": "running", "started": 1_000_000.0, "bytes": 7 * 10**9}
        monitor.log_event(TOPIC, {"output": "o", "process": "p", "client": "c", "stages": [stage]})
    monitor.scheduler = SimpleNamespace(task_prefixes={}, workers={}, total_nthreads=0)
    state = monitor.describe_state()
    run = state["runs"][0]
    assert run["seconds_elapsed"] == 999
    assert run["finish_time"] == pytest.approx(1_001_000 + 1001)
    assert 100 < len(run["throughput"]) <= 240
    assert {rate for _, rate in run["throughput"]} == {1.0}
    text = format_page(state, "")
    for shown in ("<title>49 % frames - spxdask</title>", "<polyline", "17 min elapsed", ">7<"):
        assert shown in text


@pytest.mark.parametrize("slash", ["", "/"])
def test_links_are_relative(client_with_pages, slash):
    address = show_page(client_with_pages) + slash
    with urllib.request.urlopen(address) as answer:
        links = re.findall('href="([^"]*)"', answer.read().decode())
    assert len(links) == 2
    for link in links:
        assert not link.startswith("/")
        with urllib.request.urlopen(urljoin(address, link)) as answer:
            assert answer.status == 200


def test_links_are_forwarded_to_who_wants_them():
    class Linked(Silent):
        links = None

        def connect(self, links: str) -> None:
            self.links = links

    class Unlinked:
        """What a user may pass."""

        def start(self, stage: str, total: int, unit: str) -> None: ...
        def advance(self, *, failed: bool = False) -> None: ...
        def finish(self) -> None: ...

    linked = Linked()
    ProgressPublisher(linked, "out").connect(None, "dashboard   http://127.0.0.1:8787/status")
    assert linked.links == "dashboard   http://127.0.0.1:8787/status"
    ProgressPublisher(Unlinked(), "out").connect(None, "dashboard")


class HoldAfter(Silent):
    """Holds the run when so many units have ended."""

    def __init__(self, number: int, reached: threading.Event, go_on: threading.Event) -> None:
        self._remaining, self._reached, self._go_on = number, reached, go_on

    def advance(self, *, failed: bool = False) -> None:
        self._remaining -= 1
        if not self._remaining:
            self._reached.set()
            assert self._go_on.wait(60)


def test_watching_a_run(client, survey, tmp_path):
    """It ends with the run, and what it said grew."""
    begun = threading.Event()
    with SimulatedArchive(survey[1]) as archive:
        options = config(survey, archive, tmp_path, max_download_workers=1)
        seen = []
        go_on = threading.Event()

        pipeline = BatchPipeline(options, client=client, progress=HoldAfter(3, begun, go_on))
        run = threading.Thread(target=pipeline.run_all)
        run.start()
        assert begun.wait(60)
        for found in watch_status(options.output_dir, interval_s=0.01):
            seen.append(found)
            go_on.set()
        run.join(60)
    assert seen[0].running is not None
    assert seen[0].pending > 0
    assert seen[-1].running is None
    assert seen[-1].measured == N_FRAMES
    assert seen[-1].per_second > 0
    assert "frames/s" in str(seen[-1])
