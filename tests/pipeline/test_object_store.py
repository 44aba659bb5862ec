"""Whole runs into an object store, by workers that share no disk."""

from __future__ import annotations

import importlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
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
from objectstore import BUCKET
from outputs import output_of, read_files
from s3fs import S3FileSystem

from spxdask import BatchConfig, BatchPipeline, load_query_summary
from spxdask.cli import main
from spxdask.errors import RunFolderError
from spxdask.run import lock
from spxdask.run.lock import LeaseLock
from spxdask.run.status import read_status
from spxdask.simulate.archive import SimulatedArchive
from spxdask.stages.light_curves import light_curve_name

N_FRAMES = 4


FOLDERS = ("images", "per_image", "lightcurves")
# Ids that mean something in a URL or in a pattern of file names.
IDS = ["a/b", "a*", "a[1]", "a?versionId=1", "a?b#c", "\u00e9" * 150]


@pytest.fixture(scope="module")
def store(object_store):
    return object_store


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    exposures = [simulated.exposure(i, 1 + i) for i in range(N_FRAMES)]
    folder = tmp_path_factory.mktemp("survey")
    return simulated.make_survey(folder, exposures, ids=IDS, n_sources=20)


@pytest.fixture(scope="module")
def archive(survey):
    with SimulatedArchive(survey.archived) as archive:
        yield archive


@pytest.fixture(scope="module")
def catalogue(survey, store, tmp_path_factory):
    """The path of a catalogue, and the URL of another of the same content."""
    path = survey.write_catalogue(tmp_path_factory.mktemp("catalogue") / "sources.csv")
    store.put_file(str(path), f"{BUCKET}/catalogues/sources 1.csv")
    return path, f"s3://{BUCKET}/catalogues/sources 1.csv"


@pytest.fixture(scope="module")
def make_config(archive, catalogue) -> Callable[..., BatchConfig]:
    def make(output, **options) -> BatchConfig:
        defaults = simulated.run_options(catalogue[1], archive, output)
        return BatchConfig(**(defaults | options))

    return make


class Machine:
    """The folders of a process as on a machine of its own; all are empty at first."""

    def __init__(self, path: Path) -> None:
        self.path, self.work, self.home = path, path / "work", path / "home"
        self.temporary, self.scratch = path / "temporary", path / "scratch"
        for folder in (self.work, self.home, self.temporary, self.scratch):
            folder.mkdir(parents=True)

    def start(self, *arguments: str) -> subprocess.Popen:
        folders = {"HOME": str(self.home), "TMPDIR": str(self.temporary)}
        with open(self.path / "log", "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dask", *arguments],
                cwd=self.work,
                env=os.environ | folders,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def files(self) -> set[str]:
        """Return the files in all folders but those of Dask."""
        folders = (self.work, self.home, self.temporary)
        found = (path for folder in folders for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.path)) for path in found}


@pytest.fixture(scope="module")
def machines(store, tmp_path_factory):
    """A client, and the folders of its two workers; scheduler and workers share no disk."""
    home = tmp_path_factory.mktemp("machines")
    scheduler = home / "scheduler.json"
    with ExitStack() as stack:
        machines = [Machine(home / name) for name in ("scheduler", "one", "two")]
        head, *workers = machines
        where = ["--host", "127.0.0.1", "--scheduler-file", str(scheduler), "--no-dashboard"]
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
    """A run into the store, the folders of its client, and the files left by its workers."""
    client, workers = machines
    home = Machine(tmp_path_factory.mktemp("client"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home.work)
        patch.setenv("HOME", str(home.home))
        patch.setattr(tempfile, "tempdir", str(home.temporary))
        config = make_config(f"s3://{BUCKET}/runs/first", report=True)
        with BatchPipeline(config, client=client) as pipeline:
            pipeline.run_all()
    return pipeline, home, [worker.files() for worker in workers]


def read_folder(store, pipeline, name) -> dict[str, bytes]:
    """Return the content of each file in a folder of a run, on disk or in the store."""
    output = str(pipeline.config.output_dir)
    if not output.startswith("s3://"):
        return read_files(Path(output, name))
    folder = f"{output}/{name}"
    if not store.exists(folder):
        return {}
    files = [entry["name"] for entry in store.ls(folder, detail=True) if entry["type"] == "file"]
    return {path.rpartition("/")[2]: store.cat_file(path) for path in files}


def test_run_in_a_store_gives_the_files_of_one_on_disk(store, on_disk, in_store):
    pipeline, *_ = in_store
    assert pipeline.summary.failed == {}
    for name in FOLDERS:
        found = read_folder(store, pipeline, name)
        assert found == read_folder(store, on_disk, name)
        assert len(found) >= N_FRAMES
    curves = read_folder(store, pipeline, "lightcurves")
    assert {"a*.csv", "a[1].csv", "a?b#c.csv"} & curves.keys()
    assert str(pipeline.summary.output) == f"s3://{BUCKET}/runs/first"


def test_nothing_is_written_outside_the_store(in_store):
    _, home, left_by_workers = in_store
    # Each machine keeps a copy of the catalogue, and the file that locks it.
    copies = f"temporary/spxdask-{os.getuid()}/"
    for found in (home.files(), *left_by_workers):
        assert all(name.startswith(copies) for name in found)
        assert {Path(name).suffix for name in found} == {".arrow", ""}
        assert len(found) == 2


def test_status_of_a_run_in_a_store(on_disk, in_store, capsys):
    pipeline, *_ = in_store
    found, other = read_status(f"s3://{BUCKET}/runs/first"), read_status(on_disk.config.output_dir)
    for name in ("n_frames", "fetched", "measured", "pending", "rows", "lightcurves", "failed"):
        assert getattr(found, name) == getattr(other, name), name
    assert (found.measured, found.running) == (N_FRAMES, None)
    assert found.rows == pipeline.summary.stages["extract"].rows > 0
    assert main(["status", f"s3://{BUCKET}/runs/first"]) == 0
    assert f"output      s3://{BUCKET}/runs/first" in capsys.readouterr().out


def test_second_run_in_a_store_repeats_no_work(store, in_store, client):
    pipeline, *_ = in_store
    before = store.find(f"{BUCKET}/runs/first/images", detail=True)
    before |= store.find(f"{BUCKET}/runs/first/per_image", detail=True)
    curves = read_folder(store, pipeline, "lightcurves")
    summary = BatchPipeline(pipeline.config, client=client).run_all()
    for stage in ("download", "extract"):
        report = summary.stages[stage]
        assert (report.total, report.reused, report.done) == (N_FRAMES, N_FRAMES, 0)
    assert summary.stages["extract"].rows == pipeline.summary.stages["extract"].rows
    after = store.find(f"{BUCKET}/runs/first/images", detail=True)
    after |= store.find(f"{BUCKET}/runs/first/per_image", detail=True)
    # No object is written again, not even with the same content.
    assert {n: f["LastModified"] for n, f in after.items()} == {
        n: f["LastModified"] for n, f in before.items()
    }
    assert read_folder(store, pipeline, "lightcurves") == curves


def test_stage_by_stage_in_a_store(store, on_disk, make_config, client, archive):
    config = make_config(f"s3://{BUCKET}/runs/stages", keep_bucket_files=True)
    stages = [BatchPipeline(config, client=client) for _ in range(4)]
    stages[0].run_query()
    assert stages[1].run_download().done == N_FRAMES
    n_requests = len(archive.requests)
    # Extract reads the images from the store.
    assert stages[2].run_extract().done == N_FRAMES
    assert len(archive.requests) == n_requests
    assert stages[3].run_aggregate().total == len(read_folder(store, on_disk, "lightcurves"))
    for name in FOLDERS:
        assert read_folder(store, stages[3], name) == read_folder(store, on_disk, name)
    assert len(read_folder(store, stages[3], "buckets")) == 5
    assert stages[3].images.count().compute(scheduler="sync") == N_FRAMES
    summary = load_query_summary(f"s3://{BUCKET}/runs/stages")
    assert summary["n_observations"] == N_FRAMES


def test_unreadable_image_is_set_aside(store, make_config, client):
    config = make_config(f"s3://{BUCKET}/runs/bad", bands=["D3"])
    pipeline = BatchPipeline(config, client=client)
    pipeline.run_query()
    assert pipeline.run_download().done == 1
    ((name, data),) = read_folder(store, pipeline, "images").items()
    store.pipe_file(f"{config.output_dir}/images/{name}", bytes(2880) + data[2880:])
    report = pipeline.run_extract()
    assert list(report.failed) == [name]
    assert report.failed[name].endswith(f"; set aside as {name}.unreadable")
    assert read_folder(store, pipeline, "images").keys() == {f"{name}.unreadable"}
    assert BatchPipeline(config, client=client).run_all().failed == {}


def test_images_that_are_not_kept_in_a_store(store, on_disk, make_config, client):
    config = make_config(f"s3://{BUCKET}/runs/lean", keep_images=False)
    summary = BatchPipeline(config, client=client).run_all()
    assert summary.stages["download"].done == N_FRAMES
    again = BatchPipeline(config, client=client)
    summary = again.run_all()
    assert (summary.stages["download"].done, summary.stages["extract"].reused) == (0, N_FRAMES)
    assert read_folder(store, again, "images") == {}
    for name in ("per_image", "lightcurves"):
        assert read_folder(store, again, name) == read_folder(store, on_disk, name)


def test_parquet_in_a_store(store, on_disk, make_config, client):
    formats = {"per_image_format": "parquet", "lightcurve_format": "parquet"}
    config = make_config(f"s3://{BUCKET}/runs/parquet", keep_images=False, **formats)
    pipeline = BatchPipeline(config, client=client)
    assert pipeline.run_all().failed == {}
    assert {name.rpartition(".")[2] for name in read_folder(store, pipeline, "per_image")} == {
        "parquet"
    }
    curves = pd.read_parquet(f"{config.output_dir}/lightcurves")
    found = 0
    for target, rows in curves.groupby("target_id"):
        expected = pd.read_csv(output_of(on_disk).lightcurves / light_curve_name(target))
        pd.testing.assert_frame_equal(
            rows.drop(columns="target_id").reset_index(drop=True), expected, check_dtype=False
        )
        found += 1
    assert found == len(read_folder(store, on_disk, "lightcurves"))
    at_end = read_status(config.output_dir)
    assert (at_end.lightcurves, at_end.measured, at_end.rows) == (found, N_FRAMES, len(curves))
    # Light curves in the other format replace these, and leave files of the user.
    store.pipe_file(f"{config.output_dir}/lightcurves/notes.csv", b"a,b\n")
    store.pipe_file(f"{config.output_dir}/lightcurves/notes.txt", b"")
    other = make_config(
        f"s3://{BUCKET}/runs/parquet", keep_images=False, per_image_format="parquet"
    )
    again = BatchPipeline(other, client=client)
    again.run_all()
    found = read_folder(store, again, "lightcurves")
    assert (found.pop("notes.csv"), found.pop("notes.txt")) == (b"a,b\n", b"")
    assert found == read_folder(store, on_disk, "lightcurves")


def test_light_curves_of_removed_sources_are_removed(store, survey, make_config, client, tmp_path):
    sky = survey.sky
    curves = []
    # Some names are patterns that match others.
    for ids in (["a[1]", "a*", "a?", "a", "a1"], ["a", "a1"]):
        path = tmp_path / "sources.csv"
        simulated.write_catalogue(path, ids, sky.ra[: len(ids)], sky.dec[: len(ids)])
        config = make_config(
            f"s3://{BUCKET}/runs/gone", catalog_path=path, bands=["D1", "D2"], keep_images=False
        )
        pipeline = BatchPipeline(config, client=client)
        pipeline.run_all()
        curves.append(read_folder(store, pipeline, "lightcurves").keys())
    assert curves == [
        {"a[1].csv", "a*.csv", "a?.csv", "a.csv", "a1.csv"},
        {"a.csv", "a1.csv"},
    ]


@contextmanager
def store_holds(folder: str, number: int) -> Iterator[threading.Event]:
    """Let the store wait with the n-th object written to a folder, until the block ends.

    The event that is yielded is set when the object has arrived.
    """
    arrived, over, left, counting = threading.Event(), threading.Event(), number, threading.Lock()
    put = S3Backend.put_object

    def put_object(backend, bucket_name, key_name, *arguments, **options):
        nonlocal left
        if f"/{folder}/" in key_name:
            with counting:
                left -= 1
                held = left == 0
            if held:
                arrived.set()
                assert over.wait(100)
        return put(backend, bucket_name, key_name, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Backend, "put_object", put_object)
        try:
            yield arrived
        finally:
            over.set()


@pytest.mark.kill
def test_killed_run_in_a_store_is_resumed(store, on_disk, make_config, client, caplog, tmp_path):
    url = f"s3://{BUCKET}/runs/killed"
    config = make_config(url)
    config.to_yaml(tmp_path / "run.yaml")
    arguments = ["run", "--config", str(tmp_path / "run.yaml")]
    arguments += ["--scheduler", client.scheduler.address]
    expected = {name: read_folder(store, on_disk, name) for name in FOLDERS}
    pipeline = BatchPipeline(config, client=client)
    for folder, number in (("images", 3), ("lightcurves", 10)):
        log = tmp_path / folder
        with (
            store_holds(folder, number) as arrived,
            killing.Command("spxdask", *arguments, log=log) as command,
        ):
            assert arrived.wait(60), command.stderr
            command.kill()
            # Every object is complete.
            for name in FOLDERS:
                found = read_folder(store, pipeline, name)
                assert found.items() <= expected[name].items()
            at_end = read_status(url)
            assert (at_end.running, at_end.failed) == (None, {})
            assert store.exists(f"{url}/state/lock")
    summary = pipeline.run_all()
    # It takes over the lock of a dead process at once, instead of waiting for its lease to end.
    assert [record for record in caplog.records if record.name == lock.__name__] == []
    assert summary.failed == {}
    for name in FOLDERS:
        assert read_folder(store, pipeline, name) == expected[name]
    at_end = read_status(url)
    assert (at_end.measured, at_end.pending, at_end.running) == (N_FRAMES, 0, None)
    assert not store.exists(f"{url}/state/lock")


def test_second_run_in_a_folder_of_a_store_is_refused(make_config, client):
    config = make_config(f"s3://{BUCKET}/runs/two", bands=["D1"], keep_images=False)
    refusal = f"{config.output_dir}: another run is at work here .process {os.getpid()} on"
    first, second = (BatchPipeline(config, client=client) for _ in range(2))
    for folder in (first.folder, second.folder):
        patience = {"renewal_interval_s": 0.1, "lease_s": 2.0}
        folder.lock = LeaseLock(folder.state, folder.path, **patience)
    with ThreadPoolExecutor(1) as pool, store_holds("per_image", 1) as arrived:
        running = pool.submit(first.run_all)
        assert arrived.wait(60)
        assert read_status(config.output_dir).running
        for work in (second.run_query, second.run_extract, second.run_aggregate):
            with pytest.raises(RunFolderError, match=refusal):
                work()
    assert running.result().failed == {}
    third = BatchPipeline(config, client=client)
    assert third.run_all().stages["extract"].reused == 1


@pytest.mark.parametrize("part", ["images", "lightcurves", "state/ledger"])
def test_store_that_refuses_writes(part, store, on_disk, make_config, client, tmp_path, capsys):
    """Credentials do not allow to write to one part of the folder, at first."""
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
    # Long lines of the summary are broken.
    words = " ".join((said.out + said.err).split())
    assert re.search(rf"{url}/{part}\S*: PermissionError: Access Denied", words)
    assert not store.exists(f"{url}/state/lock")
    assert main(command) == 0
    pipeline = BatchPipeline(config)
    for name in ("images", "per_image"):
        found = read_folder(store, pipeline, name)
        assert len(found) == 1
        assert found.items() <= read_folder(store, on_disk, name).items()
    assert read_folder(store, pipeline, "lightcurves")


# Mistakes of the user. Each function makes one and returns a URL to use.


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


def no_server(monkeypatch, store) -> str:
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
    no_server: "Could not connect to the endpoint URL",
    no_library: "Install s3fs to access S3",
}


@pytest.mark.parametrize(
    ("what", "mistake"),
    [
        (what, mistake)
        for what in ("output", "catalogue", "status")
        for mistake in MISTAKES
        # A folder that does not exist yet is no mistake for the output.
        if (what, mistake) != ("output", no_file)
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_mistake_ends_in_one_sentence(
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
    if mistake in (no_credentials, no_server):
        # Connections keep the settings that they were made with.
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


def test_catalogue_where_the_run_writes_is_refused(make_config, catalogue):
    folder = f"s3://{BUCKET}/catalogues"
    for name, inside in (("sources 1.csv", False), ("state/a.csv", True), ("images/a/b.csv", True)):
        pipeline = BatchPipeline(make_config(folder, catalog_path=f"{folder}/{name}"))
        if inside:
            with pytest.raises(RunFolderError, match="lies where the run writes"):
                _ = pipeline.catalogue
        else:
            assert len(pipeline.catalogue) > 0


def test_catalogue_by_the_url_of_a_file(make_config, client, tmp_path):
    path = simulated.write_catalogue(tmp_path / "a 100%.csv", ["a"], [1.0], [2.0])
    config = make_config(tmp_path.as_uri() + "/out", catalog_path=path.as_uri())
    pipeline = BatchPipeline(config, client=client)
    assert pipeline.catalogue.target_id.to_pylist() == ["a"]
    pipeline.run_query()
    assert load_query_summary(tmp_path / "out")["n_observations"] == N_FRAMES
