"""Runs in an object store."""

from __future__ import annotations

import importlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import killing
import pandas as pd
import pytest
import simulated
from distributed import Client
from moto.s3.exceptions import S3AccessDeniedError
from moto.s3.models import S3Backend
from objectstore import BUCKET, serving
from s3fs import S3FileSystem

from spxdask import BatchConfig, BatchPipeline, load_query_summary
from spxdask.cli import main
from spxdask.errors import RunFolderError
from spxdask.run.lock import LeaseLock
from spxdask.run.status import status
from spxdask.simulate.archive import SimulatedArchive
from spxdask.stages.aggregate import light_curve_name


@pytest.fixture(scope="module")
def store():
    with serving() as store:
        yield store


N_FRAMES = 4


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    sky = simulated.field_sky(20)
    exposures = [simulated.exposure(i, 1 + i) for i in range(N_FRAMES)]
    return sky, simulated.simulate(tmp_path_factory.mktemp("archive"), exposures, sky)


@pytest.fixture(scope="module")
def archive(survey):
    with SimulatedArchive([frame.archived for frame in survey[1]]) as archive:
        yield archive


@pytest.fixture(scope="module")
def catalogue(survey, store, tmp_path_factory):
    """The path of a catalogue, and the URL of another of the same content."""
    sky, _ = survey
    ids = ["a/b", "a*", "a[1]", "a?versionId=1", "a?b#c", "\u00e9" * 150]
    ids += [f"s{i}" for i in range(len(sky) - len(ids))]
    path = tmp_path_factory.mktemp("catalogue") / "sources.csv"
    simulated.write_catalogue(path, ids, sky.ra, sky.dec)
    store.put_file(str(path), f"{BUCKET}/catalogues/sources 1.csv")
    return path, f"s3://{BUCKET}/catalogues/sources 1.csv"


@pytest.fixture(scope="module")
def make_config(archive, catalogue):
    def make(output, **options) -> BatchConfig:
        defaults = simulated.run_options(catalogue[1], archive, output)
        return BatchConfig(**(defaults | options))

    return make


class Machine:
    """Folders that a process of its own machine would have, empty to begin with."""

    def __init__(self, path: Path) -> None:
        self.path, self.work, self.home = path, path / "work", path / "home"
        self.temporary, self.scratch = path / "temporary", path / "scratch"
        for folder in (self.work, self.home, self.temporary, self.scratch):
            folder.mkdir(parents=True)

    def start(self, *arguments: str) -> subprocess.Popen:
        places = {"HOME": str(self.home), "TMPDIR": str(self.temporary)}
        with open(self.path / "log", "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dask", *arguments],
                cwd=self.work,
                env=os.environ | places,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def files(self) -> set[str]:
        """Return the files that are there but for Dask's own."""
        folders = (self.work, self.home, self.temporary)
        found = (path for folder in folders for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.path)) for path in found}


@pytest.fixture(scope="module")
def machines(store, tmp_path_factory):
    """A scheduler and two workers that share no folder, and a client of theirs."""
    home = tmp_path_factory.mktemp("machines")
    scheduler = home / "scheduler.json"
    with ExitStack() as stack:
        machines = [Machine(home / name) for name in ("scheduler", "one", "two")]
        head, *workers = machines
        where = ["--host", "127.0.0.1", "--scheduler-file", str(scheduler)]
        where += ["--dashboard-address", "127.0.0.1:0"]
        commands = [(head, ["scheduler", *where, "--port", "0"])]
        for worker in workers:
            more = ["--no-nanny", "--nthreads", "3", "--local-directory", str(worker.scratch)]
            commands.append((worker, ["worker", *where, *more]))
        for machine, command in commands:
            process = stack.enter_context(machine.start(*command))
            stack.callback(process.kill)
        client = stack.enter_context(
            Client(scheduler_file=str(scheduler), set_as_default=False, timeout="60s")
        )
        client.wait_for_workers(2, timeout=60)
        yield client, workers


@pytest.fixture(scope="module")
def client(machines):
    return machines[0]


@pytest.fixture(scope="module")
def on_disk(make_config, catalogue, client, tmp_path_factory):
    """A run to a folder on disk."""
    output = tmp_path_factory.mktemp("disk") / "out"
    config = make_config(output, catalog_path=catalogue[0])
    with BatchPipeline(config, client=client) as pipeline:
        pipeline.run_all()
    return pipeline


@pytest.fixture(scope="module")
def in_store(make_config, machines, tmp_path_factory):
    """A run to a store, the folders of its client, and what was in those of the workers."""
    client, workers = machines
    home = Machine(tmp_path_factory.mktemp("client"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home.work)
        patch.setenv("HOME", str(home.home))
        patch.setattr(tempfile, "tempdir", str(home.temporary))
        with BatchPipeline(make_config(f"s3://{BUCKET}/runs/first"), client=client) as pipeline:
            pipeline.run_all()
    return pipeline, home, [worker.files() for worker in workers]


FOLDERS = ("images", "per_image", "lightcurves")


def in_folder(pipeline, name) -> dict[str, bytes]:
    folder = getattr(pipeline.folder, name)
    return {name: folder.get(name) for name in folder.list_names()}


def test_a_run_in_a_store_is_that_on_disk(on_disk, in_store):
    pipeline, *_ = in_store
    assert pipeline.summary.failed == {}
    for name in FOLDERS:
        found = in_folder(pipeline, name)
        assert found == in_folder(on_disk, name)
        assert len(found) >= N_FRAMES
    curves = in_folder(pipeline, "lightcurves")
    assert {"a*.csv", "a[1].csv", "a?b#c.csv"} & curves.keys()
    assert pipeline.summary.output == f"s3://{BUCKET}/runs/first"


def test_nothing_is_written_elsewhere(in_store):
    _, home, of_workers = in_store
    assert home.files() == set()
    for found in of_workers:
        mine = f"temporary/spxdask-{os.getuid()}/"
        assert {name for name in found if not name.startswith(mine)} == set()
        assert {Path(name).suffix for name in found} == {".arrow", ""}
        assert len(found) == 2


def test_status_of_a_run_in_a_store(on_disk, in_store, capsys):
    pipeline, *_ = in_store
    found, other = status(f"s3://{BUCKET}/runs/first"), status(on_disk.folder.path)
    for name in ("n_frames", "fetched", "measured", "pending", "rows", "lightcurves", "failed"):
        assert getattr(found, name) == getattr(other, name), name
    assert (found.measured, found.at_work) == (N_FRAMES, None)
    assert found.rows == pipeline.summary.stages["extract"].rows > 0
    assert main(["status", f"s3://{BUCKET}/runs/first"]) == 0
    assert f"output      s3://{BUCKET}/runs/first" in capsys.readouterr().out


def test_the_same_again_does_nothing(store, in_store, client):
    pipeline, *_ = in_store
    before = store.find(f"{BUCKET}/runs/first/images", detail=True)
    before |= store.find(f"{BUCKET}/runs/first/per_image", detail=True)
    curves = in_folder(pipeline, "lightcurves")
    summary = BatchPipeline(pipeline.config, client=client).run_all()
    for stage in ("download", "extract"):
        report = summary.stages[stage]
        assert (report.total, report.reused, report.done) == (N_FRAMES, N_FRAMES, 0)
    assert summary.stages["extract"].rows == pipeline.summary.stages["extract"].rows
    after = store.find(f"{BUCKET}/runs/first/images", detail=True)
    after |= store.find(f"{BUCKET}/runs/first/per_image", detail=True)
    # Not even with the same content.
    assert {n: f["LastModified"] for n, f in after.items()} == {
        n: f["LastModified"] for n, f in before.items()
    }
    assert in_folder(pipeline, "lightcurves") == curves


def test_stage_by_stage_in_a_store(store, on_disk, make_config, client, archive):
    config = make_config(f"s3://{BUCKET}/runs/stages", keep_bucket_files=True)
    stages = [BatchPipeline(config, client=client) for _ in range(4)]
    stages[0].run_query()
    assert stages[1].run_download().done == N_FRAMES
    asked = len(archive.requests)
    # The images are read from the store.
    assert stages[2].run_extract().done == N_FRAMES
    assert len(archive.requests) == asked
    assert stages[3].run_aggregate().total == len(in_folder(on_disk, "lightcurves"))
    for name in FOLDERS:
        assert in_folder(stages[3], name) == in_folder(on_disk, name)
    assert len(in_folder(stages[3], "buckets")) == 5
    assert stages[3].images.count().compute(scheduler="sync") == N_FRAMES
    summary = load_query_summary(f"s3://{BUCKET}/runs/stages")
    assert summary["n_observations"] == N_FRAMES


def test_an_image_that_went_bad_is_set_aside(make_config, client):
    config = make_config(f"s3://{BUCKET}/runs/bad", bands=["D3"])
    pipeline = BatchPipeline(config, client=client)
    pipeline.run_query()
    assert pipeline.run_download().done == 1
    ((name, data),) = in_folder(pipeline, "images").items()
    pipeline.folder.images.put(name, bytes(2880) + data[2880:])
    report = pipeline.run_extract()
    assert list(report.failed) == [name]
    assert report.failed[name].endswith(f"; set aside as {name}.unreadable")
    assert in_folder(pipeline, "images").keys() == {f"{name}.unreadable"}
    assert BatchPipeline(config, client=client).run_all().failed == {}


def test_images_that_are_not_kept(on_disk, make_config, client):
    config = make_config(f"s3://{BUCKET}/runs/lean", keep_images=False)
    summary = BatchPipeline(config, client=client).run_all()
    assert summary.stages["download"].done == N_FRAMES
    again = BatchPipeline(config, client=client)
    summary = again.run_all()
    assert (summary.stages["download"].done, summary.stages["extract"].reused) == (0, N_FRAMES)
    assert in_folder(again, "images") == {}
    for name in ("per_image", "lightcurves"):
        assert in_folder(again, name) == in_folder(on_disk, name)


def test_parquet_in_a_store(on_disk, make_config, client):
    formats = {"per_image_format": "parquet", "lightcurve_format": "parquet"}
    config = make_config(f"s3://{BUCKET}/runs/parquet", keep_images=False, **formats)
    pipeline = BatchPipeline(config, client=client)
    assert pipeline.run_all().failed == {}
    assert {name.rpartition(".")[2] for name in in_folder(pipeline, "per_image")} == {"parquet"}
    curves = pd.read_parquet(str(pipeline.folder.lightcurves))
    found = 0
    for target, rows in curves.groupby("target_id"):
        expected = pd.read_csv(on_disk.folder.lightcurves.path_to(light_curve_name(target)))
        pd.testing.assert_frame_equal(
            rows.drop(columns="target_id").reset_index(drop=True), expected, check_dtype=False
        )
        found += 1
    assert found == len(in_folder(on_disk, "lightcurves"))
    stood = status(pipeline.folder.path)
    assert (stood.lightcurves, stood.measured, stood.rows) == (found, N_FRAMES, len(curves))
    # With light curves of the other format, these are gone, and a user's file is not.
    pipeline.folder.lightcurves.put_many([("notes.csv", b"a,b\n"), ("notes.txt", b"")])
    other = make_config(
        f"s3://{BUCKET}/runs/parquet", keep_images=False, per_image_format="parquet"
    )
    again = BatchPipeline(other, client=client)
    again.run_all()
    found = in_folder(again, "lightcurves")
    assert (found.pop("notes.csv"), found.pop("notes.txt")) == (b"a,b\n", b"")
    assert found == in_folder(on_disk, "lightcurves")


def test_light_curves_of_sources_that_are_gone(survey, make_config, client, tmp_path):
    sky, _ = survey
    curves = []
    # What is left of a name may be the name of another.
    for ids in (["a[1]", "a*", "a?", "a", "a1"], ["a*", "a1"], ["a", "a1"]):
        path = tmp_path / "sources.csv"
        simulated.write_catalogue(path, ids, sky.ra[: len(ids)], sky.dec[: len(ids)])
        config = make_config(
            f"s3://{BUCKET}/runs/gone", catalog_path=path, bands=["D1", "D2"], keep_images=False
        )
        pipeline = BatchPipeline(config, client=client)
        pipeline.run_all()
        curves.append(in_folder(pipeline, "lightcurves").keys())
    assert curves == [
        {"a[1].csv", "a*.csv", "a?.csv", "a.csv", "a1.csv"},
        {"a*.csv", "a1.csv"},
        {"a.csv", "a1.csv"},
    ]


# A client that is killed


@contextmanager
def store_holds(folder: str, number: int) -> Iterator[threading.Event]:
    """Have the store hold the n-th object that comes to a folder; yield when it has come."""
    came, over, left, one_at_a_time = threading.Event(), threading.Event(), number, threading.Lock()
    put = S3Backend.put_object

    def put_object(backend, bucket_name, key_name, *arguments, **options):
        nonlocal left
        if f"/{folder}/" in key_name:
            with one_at_a_time:
                left -= 1
                held = left == 0
            if held:
                came.set()
                assert over.wait(100)
        return put(backend, bucket_name, key_name, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Backend, "put_object", put_object)
        try:
            yield came
        finally:
            over.set()


class ClockThatStands:
    """Time in which nobody waits."""

    def monotonic(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        raise AssertionError(f"waited for {seconds} s")


def test_a_run_that_is_killed(store, on_disk, make_config, client, tmp_path):
    url = f"s3://{BUCKET}/runs/killed"
    config = make_config(url)
    config.to_yaml(tmp_path / "run.yaml")
    arguments = ["run", "--config", str(tmp_path / "run.yaml")]
    arguments += ["--scheduler", client.scheduler.address]
    expected = {name: in_folder(on_disk, name) for name in FOLDERS}
    pipeline = BatchPipeline(config, client=client)
    for folder, number in (("images", 3), ("lightcurves", 10)):
        log = tmp_path / folder
        with (
            store_holds(folder, number) as came,
            killing.Command("spxdask", *arguments, log=log) as command,
        ):
            assert came.wait(60), command.said
            command.kill()
            # What is there is whole.
            for name in FOLDERS:
                found = in_folder(pipeline, name)
                assert found.items() <= expected[name].items()
            stood = status(url)
            assert (stood.at_work, stood.failed) == (None, {})
            assert store.exists(f"{url}/state/lock")
    # It does not wait for one that is dead.
    folder = pipeline.folder
    folder.lock = LeaseLock(folder.state, folder.path, clock=ClockThatStands())
    summary = pipeline.run_all()
    assert summary.failed == {}
    for name in FOLDERS:
        assert in_folder(pipeline, name) == expected[name]
    stood = status(url)
    assert (stood.measured, stood.pending, stood.at_work) == (N_FRAMES, 0, None)
    assert not store.exists(f"{url}/state/lock")


def test_two_runs_in_one_folder(make_config, client):
    config = make_config(f"s3://{BUCKET}/runs/two", bands=["D1"], keep_images=False)
    said = f"{config.output_dir}: another run is at work here .process {os.getpid()} on"
    first, second = (BatchPipeline(config, client=client) for _ in range(2))
    for folder in (first.folder, second.folder):
        options = {"renewal_interval_s": 0.1, "lease_s": 2.0}
        folder.lock = LeaseLock(folder.state, folder.path, **options)
    with ThreadPoolExecutor(1) as pool, store_holds("per_image", 1) as came:
        running = pool.submit(first.run_all)
        assert came.wait(60)
        assert status(config.output_dir).at_work
        for work in (second.run_query, second.run_extract, second.run_aggregate):
            with pytest.raises(RunFolderError, match=said):
                work()
    assert running.result().failed == {}
    third = BatchPipeline(config, client=client)
    assert third.run_all().stages["extract"].reused == 1


@pytest.mark.parametrize("part", ["images", "lightcurves", "state/ledger"])
def test_a_store_that_refuses(part, store, on_disk, make_config, client, tmp_path, capsys):
    """With credentials that may not, or may no longer, write to a part of the folder."""
    url = f"s3://{BUCKET}/runs/refused/{part}"
    config = make_config(url, bands=["D3"])
    config.to_yaml(tmp_path / "run.yaml")
    command = ["run", "--config", str(tmp_path / "run.yaml")]
    command += ["--scheduler", client.scheduler.address]
    put = S3Backend.put_object

    def put_object(backend, bucket_name, key_name, *arguments, **options):
        if f"/{part}/" in key_name.removeprefix("runs/refused/" + part):
            raise S3AccessDeniedError()
        return put(backend, bucket_name, key_name, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Backend, "put_object", put_object)
        assert main(command) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert re.search(rf"{url}/{part}\S*: PermissionError: Access Denied", said.out + said.err)
    assert not store.exists(f"{url}/state/lock")
    assert main(command) == 0
    pipeline = BatchPipeline(config)
    for name in ("images", "per_image"):
        found = in_folder(pipeline, name)
        assert len(found) == 1
        assert found.items() <= in_folder(on_disk, name).items()
    assert in_folder(pipeline, "lightcurves")


# What a user gets wrong


def no_bucket(monkeypatch, store) -> str:
    return "s3://nobucket/here"


def no_file(monkeypatch, store) -> str:
    return f"s3://{BUCKET}/not/here"


def no_credentials(monkeypatch, store) -> str:
    S3FileSystem.clear_instance_cache()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    return f"s3://{BUCKET}/here"


def no_permission(monkeypatch, store) -> str:
    async def refuse(self, method, *arguments, **options):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(S3FileSystem, "_call_s3", refuse)
    return f"s3://{BUCKET}/here"


def nobody_listens(monkeypatch, store) -> str:
    S3FileSystem.clear_instance_cache()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    return f"s3://{BUCKET}/here"


def no_library(monkeypatch, store) -> str:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3")
    return f"s3://{BUCKET}/here"


MISTAKES = {
    no_bucket: "The specified bucket does not exist",
    no_file: "No such file or directory|The specified key does not exist",
    no_credentials: "NoCredentialsError: Unable to locate credentials",
    no_permission: "PermissionError: Access Denied",
    nobody_listens: "Could not connect to the endpoint URL",
    no_library: "Install s3fs to access S3",
}


@pytest.mark.parametrize(
    ("what", "mistake"),
    [
        (what, mistake)
        for what in ("output", "catalogue", "status")
        for mistake in MISTAKES
        # To write, as good a place as any.
        if (what, mistake) != ("output", no_file)
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_mistakes_are_told_in_a_sentence(
    what, mistake, store, archive, catalogue, client, capsys, tmp_path
):
    ra, dec = map(str, simulated.CENTER)
    with pytest.MonkeyPatch.context() as patch:
        url = mistake(patch, store)
        catalog, output = catalogue[0], url
        if what == "catalogue":
            catalog, output = f"{url}/a.csv", tmp_path
        command = ["status", url]
        if what != "status":
            command = ["run", "--ra", ra, "--dec", dec, "--radius", "0.05"]
            command += ["--tap-url", archive.tap_url, "--archive-url", archive.archive_url]
            command += ["--catalog", str(catalog), "--output", str(output)]
            command += ["--scheduler", client.scheduler.address]
        answer = main(command)
    if mistake in (no_credentials, nobody_listens):
        # Connections keep what the environment was.
        S3FileSystem.clear_instance_cache()
    assert answer == 2
    said = capsys.readouterr()
    links = re.compile(r"(dashboard|frames) +http://127\.0\.0\.1:\d+/\w+")
    lines = [line for line in said.err.splitlines() if not links.fullmatch(line)]
    assert len(lines) == 1
    assert lines[0].startswith("spxdask: ")
    if mistake in (no_bucket, no_file) and what == "status":
        assert f"{url} is not the output folder of a run" in lines[0]
    else:
        assert url in lines[0]
        assert re.search(MISTAKES[mistake], lines[0])
    assert said.out == ""


def test_a_catalogue_where_the_run_writes_is_refused(make_config, catalogue):
    folder = f"s3://{BUCKET}/catalogues"
    for name, inside in (("sources 1.csv", False), ("state/a.csv", True), ("images/a/b.csv", True)):
        pipeline = BatchPipeline(make_config(folder, catalog_path=f"{folder}/{name}"))
        if inside:
            with pytest.raises(RunFolderError, match="lies where the run writes"):
                _ = pipeline.catalogue
        else:
            assert len(pipeline.catalogue) > 0


def test_a_catalogue_by_the_url_of_a_file(make_config, tmp_path):
    path = simulated.write_catalogue(tmp_path / "a 100%.csv", ["a"], [1.0], [2.0])
    pipeline = BatchPipeline(make_config(tmp_path.as_uri() + "/out", catalog_path=path.as_uri()))
    assert pipeline.catalogue.target_id.to_pylist() == ["a"]
    assert pipeline.folder.root.local_path == tmp_path / "out"
