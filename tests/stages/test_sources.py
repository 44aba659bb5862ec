"""Frames from an object store, behind a proxy that follows a script, and from a mirror."""

from __future__ import annotations

import http.client
import importlib
import re
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pytest
import simulated
from botocore import UNSIGNED
from fsspec.asyn import sync
from objectstore import BUCKET
from outputs import read_files

from spxdask import BatchConfig, BatchPipeline
from spxdask.archive.observation import SERVICE_PREFIX, Observation, frame_url
from spxdask.archive.retry import RetryPolicy
from spxdask.archive.s3 import PUBLIC_BUCKET, open_bucket
from spxdask.simulate.archive import SimulatedArchive
from spxdask.stages.download import FetchOptions, download


def options(max_retries: int, stall_timeout_s: float) -> FetchOptions:
    """Return options with which a download waits hardly at all between attempts."""
    retry = RetryPolicy(max_retries=max_retries, first_delay_s=0.001)
    return FetchOptions(retry=retry, stall_timeout_s=stall_timeout_s)


PATIENT = options(3, 20.0)
HURRIED = options(1, 0.8)
# Where an attempt after a stall is to succeed: on a busy machine, it may pause for seconds.
PERSISTENT = options(1, 4.0)


@pytest.fixture(scope="module")
def store(object_store):
    object_store.mkdir(PUBLIC_BUCKET)
    return object_store


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    exposures = [simulated.exposure(i, 1 + i) for i in range(3)]
    return simulated.make_survey(tmp_path_factory.mktemp("survey"), exposures)


@pytest.fixture(scope="module")
def archive(survey, store):
    """An archive by HTTP; the same frames are in two buckets."""
    with SimulatedArchive(survey.archived) as archive:
        for frame in survey.frames:
            key = frame.exposure.uri.removeprefix(SERVICE_PREFIX)
            store.put_file(str(frame.path), f"{BUCKET}/{key}")
            store.put_file(str(frame.path), f"{PUBLIC_BUCKET}/{key}", ACL="public-read")
        yield archive


def make_mirror(folder: Path, frames, prefix: str) -> str:
    """Copy frames to where their URIs without a prefix lead, and return the URL of the folder."""
    for frame in frames:
        path = folder / frame.exposure.uri.removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(frame.path, path)
    return folder.as_uri()


# Whole runs.


@pytest.fixture(scope="module")
def run(survey, archive, thread_client, tmp_path_factory) -> Callable[[str], tuple[Path, int]]:
    """Return a function that makes a run, and gives its folder and the number of HTTP requests."""
    catalogue = survey.write_catalogue(tmp_path_factory.mktemp("catalogue") / "sources.csv")

    def run(url: str, **more) -> tuple[Path, int]:
        output = tmp_path_factory.mktemp("run")
        options = simulated.run_options(catalogue, archive, output) | {"archive_url": url}
        options |= more
        n_requests = len(archive.requests)
        summary = BatchPipeline(BatchConfig(**options), client=thread_client).run_all()
        assert summary.failed == {}
        assert summary.stages["download"].done == len(survey.frames)
        return output, len(archive.requests) - n_requests

    return run


@pytest.fixture(scope="module")
def over_http(run, archive):
    return run(archive.archive_url)


@pytest.mark.cluster
@pytest.mark.parametrize("source", ["bucket", "public bucket", "mirror", "mirror of the bucket"])
def test_every_source_gives_the_same_files(run, over_http, survey, store, source, tmp_path):
    frames = survey.frames
    folder = tmp_path / "a mirror, 100 %"
    url = {
        "bucket": lambda: f"s3://{BUCKET}/",
        "public bucket": lambda: f"s3://{PUBLIC_BUCKET}",
        "mirror": lambda: make_mirror(folder, frames, ""),
        "mirror of the bucket": lambda: make_mirror(folder, frames, SERVICE_PREFIX),
    }[source]()
    expected, requests = over_http
    assert requests == 1 + len(frames)
    # The public bucket is at AWS unless an option names another server.
    endpoint = store.s3.meta.endpoint_url if source == "public bucket" else None
    output, requests = run(url, archive_endpoint=endpoint)
    # The query is the only request.
    assert requests == 1
    for name in ("images", "per_image", "lightcurves"):
        found = read_files(output / name)
        assert found == read_files(expected / name)
        assert found


# Single frames.


@pytest.fixture(scope="module")
def frame(survey, archive):
    return survey.frames[0]


@pytest.fixture(scope="module")
def content(frame):
    return frame.path.read_bytes()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


def observed(frame, url=f"s3://{BUCKET}", **changes) -> Observation:
    uri = frame.exposure.uri
    values = {
        "obs_id": frame.exposure.obs_id,
        "band": frame.exposure.band,
        "mjd": 61027.0,
        "wavelength_um": 0.93,
        "uri": uri,
        "download_url": frame_url(url, uri),
        "size_bytes": frame.path.stat().st_size,
    }
    return Observation(**values | changes)


def fetch(images, observation, patience=PATIENT):
    return download(observation, str(images), patience)


def assert_done(outcome, images, content, attempts):
    assert (outcome.status, outcome.reason) == ("done", None)
    assert (outcome.bytes, outcome.attempts) == (len(content), attempts)
    (path,) = images.iterdir()
    assert path.read_bytes() == content


def assert_failed(outcome, images, url, reason, attempts):
    assert (outcome.status, outcome.bytes) == ("failed", 0)
    assert outcome.reason.startswith(f"{url}: ")
    # The URL stands in it once.
    assert outcome.reason.count("s3://") + outcome.reason.count("file://") == 1
    assert reason in outcome.reason
    assert outcome.reason.isprintable()
    assert outcome.attempts == attempts
    assert list(images.iterdir()) == []


@dataclass
class Act:
    """What the proxy does with one request; `Act()` passes it on to the store.

    `first` is called before. With `status`, the proxy answers that error itself. With `after`,
    it sends that many bytes of the body and closes the connection, or keeps it open in silence
    if `stall` is set.
    """

    after: int | None = None
    stall: bool = False
    status: int | None = None
    first: object = field(default=lambda: None)


class Proxy(ThreadingHTTPServer):
    """Treats each request as the next of `acts` says, and records the headers."""

    daemon_threads = True

    def __init__(self, store_url: str, acts) -> None:
        self.store = urlsplit(store_url).netloc
        self.acts, self.headers, self.over = iter(acts), [], threading.Event()
        super().__init__(("127.0.0.1", 0), Passing)

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()
        return super().__enter__()

    def __exit__(self, *exception):
        self.over.set()
        self.shutdown()
        self.thread.join()
        super().__exit__(*exception)

    def handle_error(self, *_):
        # Clients may close a connection before its end.
        pass


class Passing(BaseHTTPRequestHandler):
    def do_GET(self):
        act = next(self.server.acts, Act())
        act.first()
        self.server.headers.append(self.headers)
        if act.status:
            body = b"<Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>"
            self.answer(act.status, {"Content-Length": len(body)}, body)
            return
        store = http.client.HTTPConnection(self.server.store)
        store.request("GET", self.path, headers=dict(self.headers))
        answer = store.getresponse()
        body = answer.read()
        store.close()
        self.answer(answer.status, answer.headers, body[: act.after])
        if act.stall:
            self.server.over.wait()

    def answer(self, status, headers, body):
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "server", "date"):
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body)
            self.wfile.flush()

    def log_message(self, *_):
        pass


@pytest.fixture
def no_connections():
    """No connection of one test is used by another."""
    open_bucket.cache_clear()
    yield
    open_bucket.cache_clear()


@pytest.fixture
def behind(no_connections, store, monkeypatch):
    """Return a function that puts a proxy in front of the store."""

    def behind(*acts):
        proxy = Proxy(store.s3.meta.endpoint_url, acts)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        return proxy

    return behind


def requested_ranges(proxy):
    return [headers["Range"] for headers in proxy.headers]


@pytest.mark.parametrize("known", [True, False])
def test_frame_is_fetched_whole(frame, content, images, behind, known):
    with behind() as proxy:
        observation = observed(frame) if known else observed(frame, size_bytes=None)
        assert_done(fetch(images, observation), images, content, 1)
        assert requested_ranges(proxy) == [None]
        assert "Credential=key/" in proxy.headers[0]["Authorization"]


def test_public_bucket_is_read_without_credentials(frame, content, images, behind, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with behind() as proxy:
        observation = observed(frame, f"s3://{PUBLIC_BUCKET}")
        patience = replace(PATIENT, endpoint=f"http://127.0.0.1:{proxy.server_port}")
        assert_done(fetch(images, observation, patience), images, content, 1)
        assert proxy.headers[0]["Authorization"] is None


@pytest.fixture
def misleading(no_connections, monkeypatch, tmp_path):
    """An environment with settings for the user's own stores, of every kind."""
    config = tmp_path / "config"
    config.write_text(
        "[default]\nendpoint_url = http://127.0.0.1:9\nregion = eu-north-1\n"
        "s3 =\n  addressing_style = path\nuse_fips_endpoint = true\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    monkeypatch.setenv("AWS_USE_DUALSTACK_ENDPOINT", "true")
    monkeypatch.setitem(
        fsspec.config.conf, "s3", {"key": "k", "endpoint_url": "http://127.0.0.1:9"}
    )


def test_settings_for_other_stores_do_not_lead_the_public_bucket_astray(misleading):
    filesystem = open_bucket(PUBLIC_BUCKET, 1.0)
    client = sync(filesystem.loop, filesystem.set_session)
    assert client.meta.endpoint_url == "https://s3.us-east-1.amazonaws.com"
    assert client.meta.config.signature_version is UNSIGNED
    assert client.meta.region_name == "us-east-1"


def test_the_server_that_was_asked_is_named(
    frame, images, no_connections, store, misleading, monkeypatch
):
    endpoint = store.s3.meta.endpoint_url
    url = f"s3://{PUBLIC_BUCKET}/not/there/{frame.path.name}"
    observation = observed(frame, download_url=url)
    outcome = fetch(images, observation, replace(PATIENT, endpoint=endpoint))
    assert_failed(outcome, images, url, f"does not exist. (asked: {endpoint})", 1)
    assert outcome.blame is None


@pytest.mark.parametrize("name", ["https_proxy", "ALL_PROXY"])
def test_the_public_bucket_is_asked_for_through_the_proxy(
    frame, images, no_connections, monkeypatch, name
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        monkeypatch.setenv(name, f"127.0.0.1:{port}")
        outcome = fetch(images, observed(frame, f"s3://{PUBLIC_BUCKET}"), HURRIED)
    assert "s3.us-east-1.amazonaws.com" in outcome.reason
    assert f"127.0.0.1:{port}" in outcome.reason
    assert (outcome.blame, outcome.attempts) == ("archive", 2)


# In bytes; many times what is in flight, and lost, when a connection breaks.
SOME = 2_000_000


def test_broken_transfer_continues_where_it_broke(frame, content, images, behind):
    with behind(Act(after=0), Act(after=SOME), Act(after=SOME)) as proxy:
        assert_done(fetch(images, observed(frame)), images, content, 4)
        first, second, *continued = requested_ranges(proxy)
        assert (first, second) == (None, None)
        one, two = (int(re.fullmatch(r"bytes=(\d+)-", text)[1]) for text in continued)
        assert SOME / 2 < one <= SOME
        assert one + SOME / 2 < two <= one + SOME
        assert len({headers["If-Match"] for headers in proxy.headers[2:]}) == 1


def test_transfer_that_breaks_each_time_fails(frame, images, behind):
    with behind(*[Act(after=SOME // 4)] * 4):
        outcome = fetch(images, observed(frame))
    url = re.escape(observed(frame).download_url)
    reason = rf"{url}: the transfer broke off after \d{{6,7}} bytes \(after 4 attempts\)"
    assert re.fullmatch(reason, outcome.reason)
    assert list(images.iterdir()) == []


def test_stalled_transfer_is_broken_off_and_continued(frame, content, images, behind):
    with behind(Act(after=1000, stall=True)) as proxy:
        assert_done(fetch(images, observed(frame), PERSISTENT), images, content, 2)
        assert requested_ranges(proxy) == [None, "bytes=1000-"]


@pytest.mark.parametrize("after", [0, 1000])
def test_store_that_stalls_each_time(frame, images, behind, after):
    with behind(*[Act(after=after, stall=True)] * 2):
        outcome = fetch(images, observed(frame), HURRIED)
    reason = "no data received for 0.8 s (after 2 attempts)"
    assert_failed(outcome, images, observed(frame).download_url, reason, 2)


def test_store_that_does_not_answer(frame, content, images, behind, monkeypatch):
    wait = threading.Event()
    with behind(Act(first=wait.wait)):
        assert_done(fetch(images, observed(frame), PERSISTENT), images, content, 2)
        wait.set()


@pytest.mark.parametrize("status", [500, 503])
def test_overloaded_store_is_tried_again(frame, content, images, behind, status):
    acts = (Act(status=status), Act(after=1000, stall=True), Act(status=status))
    with behind(*acts) as proxy:
        patience = options(3, PERSISTENT.stall_timeout_s)
        assert_done(fetch(images, observed(frame), patience), images, content, 4)
        # The libraries below have not tried again by themselves.
        assert requested_ranges(proxy) == [None, None, "bytes=1000-", "bytes=1000-"]


def test_store_that_ignores_ranges(frame, content, images, behind, monkeypatch):
    """The answer from the beginning is not appended to what came before."""
    monkeypatch.setattr(Passing, "do_GET", ignore_ranges(Passing.do_GET))
    with behind(Act(after=SOME)):
        assert_done(fetch(images, observed(frame)), images, content, 3)


def ignore_ranges(do_get):
    def get(self):
        self.headers.replace_header("Range", "bytes=0-") if self.headers["Range"] else None
        do_get(self)

    return get


@pytest.fixture
def own(frame, store, request):
    """A copy of the frame for this test alone: its path in the store, and its observation."""
    uri = f"{request.node.name.partition('[')[0]}/{frame.path.name}"
    path = f"{BUCKET}/{uri}"
    store.put_file(str(frame.path), path)
    return path, observed(frame, uri=uri, download_url=f"s3://{path}")


def test_frame_that_is_replaced_during_its_transfer(own, content, images, behind, store):
    path, observation = own
    # The other frame has the same length and differs in one pixel.
    middle = len(content) // 2
    other = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    replacing = Act(first=lambda: store.pipe_file(path, other))
    with behind(Act(after=SOME), replacing) as proxy:
        outcome = fetch(images, observation)
        assert_done(outcome, images, other, 3)
        assert [bool(text) for text in requested_ranges(proxy)] == [False, True, False]


def test_frame_that_is_removed_during_its_transfer(own, images, behind, store):
    path, observation = own
    with behind(Act(after=1000), Act(first=lambda: store.rm_file(path))):
        outcome = fetch(images, observation)
    reason = "The specified key does not exist."
    assert_failed(outcome, images, observation.download_url, reason, 2)


@pytest.mark.parametrize("change", [-1, 1])
def test_frame_of_another_length_is_tried_again(
    own, content, images, no_connections, store, change
):
    path, observation = own
    size = len(content) + change
    store.pipe_file(path, (content + b" ")[:size])
    outcome = fetch(images, observation)
    reason = f"the file has {size} bytes, the archive lists {len(content)} (after 4 attempts)"
    assert_failed(outcome, images, observation.download_url, reason, 4)


def test_object_that_is_no_frame_is_tried_again(own, content, images, no_connections, store):
    path, observation = own
    store.pipe_file(path, bytes(len(content)))
    outcome = fetch(images, observation)
    assert_failed(outcome, images, observation.download_url, "not a FITS file", 4)


@pytest.mark.parametrize(
    ("bucket", "reason"),
    [
        (BUCKET, "The specified key does not exist."),
        ("nobucket", "The specified bucket does not exist"),
    ],
)
def test_missing_object_fails_at_once(frame, images, no_connections, bucket, reason):
    url = f"s3://{bucket}/not/there/{frame.path.name}"
    outcome = fetch(images, observed(frame, download_url=url))
    assert_failed(outcome, images, url, reason, 1)


def test_no_credentials(frame, images, no_connections, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    outcome = fetch(images, observed(frame))
    reason = "Unable to locate credentials"
    assert_failed(outcome, images, observed(frame).download_url, reason, 1)


def test_no_library(frame, images, no_connections, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3")
    outcome = fetch(images, observed(frame))
    assert_failed(outcome, images, observed(frame).download_url, "Install s3fs to access S3", 1)


def test_no_server(frame, images, no_connections, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    outcome = fetch(images, observed(frame))
    reason = "Could not connect to the endpoint URL"
    assert_failed(outcome, images, observed(frame).download_url, reason, 4)


# Mirrors.


@pytest.fixture
def mirrored(frame, tmp_path):
    url = make_mirror(tmp_path / "mirror", [frame], SERVICE_PREFIX)
    observation = observed(frame, url)
    path = tmp_path / "mirror" / frame.exposure.uri.removeprefix(SERVICE_PREFIX)
    assert observation.download_url == path.as_uri()
    return path, observation


@pytest.mark.parametrize("known", [True, False])
def test_frame_of_a_mirror(frame, mirrored, content, images, known):
    _, observation = mirrored
    if not known:
        observation = observed(frame, size_bytes=None, download_url=observation.download_url)
    assert_done(fetch(images, observation), images, content, 1)


def test_mirror_without_the_frame(mirrored, images):
    path, observation = mirrored
    path.unlink()
    outcome = fetch(images, observation)
    assert_failed(outcome, images, observation.download_url, "No such file or directory", 1)


@pytest.mark.parametrize("change", [-1, 1])
def test_mirrored_frame_of_another_length(mirrored, content, images, change):
    path, observation = mirrored
    size = len(content) + change
    path.write_bytes((content + b" ")[:size])
    outcome = fetch(images, observation)
    reason = f"the file has {size} bytes, the archive lists {len(content)} (after 4 attempts)"
    assert_failed(outcome, images, observation.download_url, reason, 4)


def test_folder_in_place_of_a_mirrored_frame(mirrored, images):
    path, observation = mirrored
    path.unlink()
    path.mkdir()
    outcome = fetch(images, observation)
    assert_failed(outcome, images, observation.download_url, "Is a directory", 4)
