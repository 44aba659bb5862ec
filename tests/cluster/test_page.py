"""The page about a run that the scheduler serves, and a client that goes and comes back."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections import Counter
from types import SimpleNamespace

import pytest
import simulated
from distributed import Client, LocalCluster

from spxdask import BatchConfig, BatchPipeline, progress
from spxdask.cluster import client as cluster
from spxdask.cluster.page import TOPIC, Monitor, show_page
from spxdask.errors import ClusterError, ConfigError, InputError
from spxdask.progress import duration
from spxdask.run.status import status, watch
from spxdask.simulate.archive import Fault, SimulatedArchive

N_FRAMES = 6


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    return simulated.small_survey(tmp_path_factory.mktemp("monitor"), N_FRAMES)


def config(survey, archive, folder, **options) -> BatchConfig:
    defaults = simulated.run_options(survey[0], archive, folder / "out")
    return BatchConfig(**(defaults | options))


def page(pipeline, name: str = "") -> str:
    with urllib.request.urlopen(pipeline.page_link + name) as answer:
        return answer.read().decode()


def told(pipeline) -> dict:
    runs = json.loads(page(pipeline, "/state.json"))["runs"]
    return next(run for run in runs if run["output"] == str(pipeline.folder.path))


def test_a_run_is_on_the_page(client, survey, tmp_path):
    bad = survey[1][2].uri
    with SimulatedArchive(survey[1], faults={bad: [Fault(status=404)]}) as archive:
        pipeline = BatchPipeline(config(survey, archive, tmp_path), client=client)
        pipeline.run_all()
    stages = told(pipeline)["stages"]
    assert [stage["stage"] for stage in stages] == ["query", "frames", "aggregate"]
    assert all(stage["state"] == "ended" for stage in stages)
    frames = stages[1]
    assert (frames["total"], frames["done"], frames["failed"]) == (N_FRAMES, N_FRAMES - 1, 1)
    assert [text.partition(":")[0] for text in frames["failures"]] == [bad.rpartition("/")[2]]
    text = page(pipeline)
    assert f"{N_FRAMES - 1} of {N_FRAMES}" in text
    assert bad.rpartition("/")[2] in text
    assert pipeline.links.splitlines() == [
        f"dashboard   {client.dashboard_link}",
        f"frames      {pipeline.page_link}",
    ]


def test_what_comes_from_outside_is_no_markup(client):
    stage = {"stage": "<b>", "unit": "<i>", "total": 1, "done": 0, "failed": 1}
    stage |= {"failures": ["<script>alert(1)</script>"], "state": "at work", "started": 1.0}
    address = show_page(client)
    client.log_event(TOPIC, {"output": "<out>", "process": "<p>", "client": "x", "stages": [stage]})
    with urllib.request.urlopen(address) as answer:
        text = answer.read().decode()
    assert "&lt;script&gt;" in text
    assert "&lt;out&gt;" in text
    assert "<script" not in text
    assert "<out>" not in text


def test_what_is_no_account_of_a_run_is_ignored():
    monitor = Monitor()
    for topic, message in [("other", {}), (TOPIC, "text"), (TOPIC, {}), (TOPIC, {"stages": []})]:
        monitor.log_event(topic, message)
    assert monitor.runs == {}


def test_rate_and_time_left(monkeypatch):
    monitor = Monitor()
    clock = iter(range(1000, 1100, 10))
    monkeypatch.setattr("spxdask.cluster.page.time.time", lambda: next(clock))
    for done in (0, 5, 10):
        stage = {"stage": "frames", "unit": "frames", "total": 40, "done": done, "failed": 0}
        stage |= {"failures": [], "state": "at work", "started": 1.0}
        monitor.log_event(TOPIC, {"output": "o", "process": "p", "client": "c", "stages": [stage]})
    monitor.scheduler = SimpleNamespace(task_prefixes={}, workers={}, total_nthreads=0)
    now = monitor.state()["runs"][0]["stages"][-1]
    assert now["per_second"] == 0.5
    assert now["seconds_left"] == 60.0
    monitor.remove_client(None, "another")
    assert monitor.state()["runs"][0]["stages"][-1]["state"] == "at work"
    monitor.remove_client(None, "c")
    gone = monitor.state()["runs"][0]["stages"][-1]
    assert (gone["state"], gone["seconds_left"]) == ("client gone", None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (7190, "2 h 0 min"),
        (3599.9, "60 min"),
        (4 * 3600 - 1, "4 h 0 min"),
        (3 * 86400 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


class Until(progress.Silent):
    """Calls back once when so many frames have ended."""

    def __init__(self, number: int, call) -> None:
        self._left, self._call = number, call

    def advance(self, *, failed: bool = False) -> None:
        self._left -= 1
        if not self._left:
            self._call()


def test_a_client_that_lost_its_connection_goes_on_where_it_was(survey, tmp_path):
    """The scheduler and its workers live on; frames that ended are not done again."""
    with (
        SimulatedArchive(survey[1]) as archive,
        LocalCluster(
            n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as cluster_,
    ):
        options = config(survey, archive, tmp_path, max_download_workers=1)
        with Client(cluster_) as first:

            def cut() -> None:
                cut_off = threading.Event()

                def abort() -> None:
                    first.scheduler_comm.comm.abort()
                    cut_off.set()

                first.loop.add_callback(abort)
                assert cut_off.wait(10)

            # The query counts, too.
            pipeline = BatchPipeline(options, client=first, progress=Until(4, cut))
            with pytest.raises(ClusterError, match="the same command goes on"):
                pipeline.run_all()
            before = status(options.output_dir)
            assert 3 <= before.measured < N_FRAMES
        with Client(cluster_) as second:
            pipeline = BatchPipeline(options, client=second)
            summary = pipeline.run_all()
            assert told(pipeline)["stages"][-1]["state"] == "ended"
        assert not summary.failed
        assert summary.stages["extract"].reused == before.measured
        fetched = Counter(r.path for r in archive.requests if r.path.endswith(".fits"))
        assert sum(fetched.values()) <= N_FRAMES + 1


def test_other_versions_are_an_error(client, survey, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "__version__", "0.0.1")
    with SimulatedArchive(survey[1]) as archive:
        pipeline = BatchPipeline(config(survey, archive, tmp_path), client=client)
        with pytest.raises(ClusterError, match=r"worker tcp://\S+ has spxdask .* 0\.0\.1: install"):
            pipeline.run_all()


def test_a_worker_that_comes_later_is_looked_at_by_its_tasks(client, survey, tmp_path, monkeypatch):
    monkeypatch.setattr("spxdask.pipeline.check_versions", lambda client: 2)
    monkeypatch.setattr(cluster, "__version__", "0.0.1")
    with SimulatedArchive(survey[1]) as archive:
        pipeline = BatchPipeline(config(survey, archive, tmp_path), client=client)
        with pytest.raises(ClusterError, match=r"worker tcp://\S+ has spxdask"):
            pipeline.run_all()


def test_a_worker_without_spxdask_is_an_error():
    class Bare:
        def run(self, function, *arguments, on_error):
            assert function(*arguments) == cluster.__version__
            assert function("spxdask_that_is_not_there.__version__") is None
            return {"tcp://10.0.0.7:1234": None}

    with pytest.raises(ClusterError, match=r"tcp://10\.0\.0\.7:1234 has no spxdask"):
        cluster.check_versions(Bare())


def test_a_scheduler_file(client, survey, tmp_path):
    file = tmp_path / "scheduler.json"
    client.write_scheduler_file(str(file))
    with SimulatedArchive(survey[1]) as archive:
        pipeline = BatchPipeline(config(survey, archive, tmp_path), scheduler=str(file))
        assert not pipeline.run_all().failed


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"address": 5}', "address: tcp"])
def test_what_is_no_scheduler_file(tmp_path, content):
    file = tmp_path / "scheduler.json"
    file.write_text(content)
    with pytest.raises(InputError, match="no Dask scheduler at") as raised:
        cluster.connect(str(file))
    assert "\n" not in str(raised.value)


def test_one_cluster_at_a_time(survey, tmp_path, client):
    with SimulatedArchive(survey[1]) as archive:
        options = config(survey, archive, tmp_path)
    with pytest.raises(ConfigError, match="not two of them"):
        BatchPipeline(options, client=client, jobqueue="slurm.yaml")


def test_watching_a_run(client, survey, tmp_path):
    """It ends with the run, and what it said grew."""
    begun = threading.Event()
    with SimulatedArchive(survey[1]) as archive:
        options = config(survey, archive, tmp_path, max_download_workers=1)
        seen = []
        go_on = threading.Event()

        def hold() -> None:
            begun.set()
            assert go_on.wait(60)

        pipeline = BatchPipeline(options, client=client, progress=Until(3, hold))
        run = threading.Thread(target=pipeline.run_all)
        run.start()
        assert begun.wait(60)
        for found in watch(options.output_dir, every=0.01):
            seen.append(found)
            go_on.set()
        run.join(60)
    assert seen[0].at_work is not None
    assert seen[0].pending > 0
    assert seen[-1].at_work is None
    assert seen[-1].measured == N_FRAMES
    assert seen[-1].per_second > 0
    assert "frames/s" in str(seen[-1])
