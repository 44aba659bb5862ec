"""Frames out of an object store, behind a proxy that acts by script, and out of a mirror."""

from __future__ import annotations

import http.client
import importlib
import re
import shutil
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import simulated
from distributed import Client
from objectstore import BUCKET, serving

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


@pytest.fixture(scope="module")
def store():
    with serving() as store:
        store.mkdir(PUBLIC_BUCKET)
        yield store


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    sky = simulated.field_sky()
    folder = tmp_path_factory.mktemp("archive")
    exposures = [simulated.exposure(i, 1 + i) for i in range(3)]
    simulated.write_catalogue(
        folder / "sources.csv", [f"s{i}" for i in range(len(sky))], sky.ra, sky.dec
    )
    return folder, simulated.simulate(folder, exposures, sky)


@pytest.fixture(scope="module")
def archive(survey, store):
    with SimulatedArchive([frame.archived for frame in survey[1]]) as archive:
        for frame in survey[1]:
            key = frame.exposure.uri.removeprefix(SERVICE_PREFIX)
            store.put_file(str(frame.path), f"{BUCKET}/{key}")
            store.put_file(str(frame.path), f"{PUBLIC_BUCKET}/{key}", ACL="public-read")
        yield archive


def mirror(folder: Path, frames, prefix: str) -> str:
    for frame in frames:
        path = folder / frame.exposure.uri.removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(frame.path, path)
    return folder.as_uri()


# Whole runs


@pytest.fixture(scope="module")
def run(survey, archive, tmp_path_factory):
    """Run, and return the folder of the run and how many requests the HTTP archive had."""
    with Client(
        processes=False, n_workers=1, threads_per_worker=3, dashboard_address="127.0.0.1:0"
    ) as client:

        def run(url: str) -> tuple[Path, int]:
            output = tmp_path_factory.mktemp("run")
            config = BatchConfig(
                catalog_path=survey[0] / "sources.csv",
                center_ra=simulated.CENTER[0],
                center_dec=simulated.CENTER[1],
                radius=0.05,
                output_dir=output,
                num_buckets=2,
                max_retries=0,
                tap_url=archive.tap_url,
                archive_url=url,
            )
            asked = len(archive.requests)
            summary = BatchPipeline(config, client=client).run_all()
            assert summary.failed == {}
            assert summary.stages["download"].done == len(survey[1])
            return output, len(archive.requests) - asked

        yield run


@pytest.fixture(scope="module")
def over_http(run, archive):
    return run(archive.archive_url)


@pytest.mark.parametrize("source", ["bucket", "public bucket", "mirror", "mirror of the bucket"])
def test_the_same_rows_from_everywhere(run, over_http, survey, store, source, tmp_path):
    frames = survey[1]
    folder = tmp_path / "a mirror, 100 %"
    url = {
        "bucket": lambda: f"s3://{BUCKET}/",
        "public bucket": lambda: f"s3://{PUBLIC_BUCKET}",
        "mirror": lambda: mirror(folder, frames, ""),
        "mirror of the bucket": lambda: mirror(folder, frames, SERVICE_PREFIX),
    }[source]()
    expected, requests = over_http
    assert requests == 1 + len(frames)
    output, requests = run(url)
    # The query.
    assert requests == 1
    for name in ("images", "per_image", "lightcurves"):
        found = {path.name: path.read_bytes() for path in (output / name).iterdir()}
        assert found == {path.name: path.read_bytes() for path in (expected / name).iterdir()}
        assert found


# Frame by frame


@pytest.fixture(scope="module")
def frame(survey, archive):
    return survey[1][0]


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


def assert_failed(outcome, images, url, says, attempts):
    assert (outcome.status, outcome.bytes) == ("failed", 0)
    assert outcome.reason.startswith(f"{url}: ")
    # Once is enough.
    assert outcome.reason.count("s3://") + outcome.reason.count("file://") == 1
    assert says in outcome.reason
    assert outcome.reason.isprintable()
    assert outcome.attempts == attempts
    assert list(images.iterdir()) == []


@dataclass
class Act:
    """What the proxy does with one request; `Act()` passes it on.

    With `after`, it sends so many bytes of the body, and then leaves; or sends no more, if it
    is to `stall`.
    """

    after: int | None = None
    stall: bool = False
    status: int | None = None
    first: object = field(default=lambda: None)


class Proxy(ThreadingHTTPServer):
    """Passes requests on to the store, each as the next of `acts` says, and keeps their headers."""

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
        # The client left when it had heard enough.
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
def anew():
    """Nothing is left of the connections of one test for another."""
    open_bucket.cache_clear()
    yield
    open_bucket.cache_clear()


@pytest.fixture
def behind(anew, store, monkeypatch):
    """Put a proxy before the store."""

    def behind(*acts):
        proxy = Proxy(store.s3.meta.endpoint_url, acts)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        return proxy

    return behind


def ranges(proxy):
    return [headers["Range"] for headers in proxy.headers]


@pytest.mark.parametrize("known", [True, False])
def test_a_frame_comes_whole(frame, content, images, behind, known):
    with behind() as proxy:
        observation = observed(frame) if known else observed(frame, size_bytes=None)
        assert_done(fetch(images, observation), images, content, 1)
        assert ranges(proxy) == [None]
        assert "Credential=key/" in proxy.headers[0]["Authorization"]


def test_the_public_bucket_is_asked_without_credentials(
    frame, content, images, behind, monkeypatch
):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with behind() as proxy:
        observation = observed(frame, f"s3://{PUBLIC_BUCKET}")
        assert_done(fetch(images, observation), images, content, 1)
        assert proxy.headers[0]["Authorization"] is None


# Many times what is on its way at the moment when a connection breaks, and lost with it.
SOME = 2_000_000


def test_a_broken_transfer_goes_on_where_it_broke(frame, content, images, behind):
    with behind(Act(after=0), Act(after=SOME), Act(after=SOME)) as proxy:
        assert_done(fetch(images, observed(frame)), images, content, 4)
        first, second, *goes_on = ranges(proxy)
        assert (first, second) == (None, None)
        one, two = (int(re.fullmatch(r"bytes=(\d+)-", text)[1]) for text in goes_on)
        assert SOME / 2 < one <= SOME
        assert one + SOME / 2 < two <= one + SOME
        assert len({headers["If-Match"] for headers in proxy.headers[2:]}) == 1


def test_a_transfer_that_breaks_again_and_again(frame, images, behind):
    with behind(*[Act(after=SOME // 4)] * 4):
        outcome = fetch(images, observed(frame))
    url = re.escape(observed(frame).download_url)
    says = rf"{url}: the transfer broke off after \d{{6,7}} bytes \(after 4 attempts\)"
    assert re.fullmatch(says, outcome.reason)
    assert list(images.iterdir()) == []


def test_a_stalled_transfer_is_given_up_and_goes_on(frame, content, images, behind):
    with behind(Act(after=1000, stall=True)) as proxy:
        assert_done(fetch(images, observed(frame), HURRIED), images, content, 2)
        assert ranges(proxy) == [None, "bytes=1000-"]


@pytest.mark.parametrize("after", [0, 1000])
def test_a_store_that_stalls_each_time(frame, images, behind, after):
    with behind(*[Act(after=after, stall=True)] * 2):
        outcome = fetch(images, observed(frame), HURRIED)
    says = "no data received for 0.8 s (after 2 attempts)"
    assert_failed(outcome, images, observed(frame).download_url, says, 2)


def test_a_store_that_does_not_answer(frame, content, images, behind, monkeypatch):
    wait = threading.Event()
    with behind(Act(first=wait.wait)):
        assert_done(fetch(images, observed(frame), HURRIED), images, content, 2)
        wait.set()


@pytest.mark.parametrize("status", [500, 503])
def test_a_store_with_too_much_to_do(frame, content, images, behind, status):
    acts = (Act(status=status), Act(after=1000, stall=True), Act(status=status))
    with behind(*acts) as proxy:
        patience = options(3, HURRIED.stall_timeout_s)
        assert_done(fetch(images, observed(frame), patience), images, content, 4)
        # Nobody but us has tried again.
        assert ranges(proxy) == [None, None, "bytes=1000-", "bytes=1000-"]


def test_a_store_that_ignores_ranges(frame, content, images, behind, monkeypatch):
    """Bytes are not joined that do not belong together."""
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
    """An object of the test's own: its path in the store, and the frame that it is said to be."""
    uri = f"{request.node.name.partition('[')[0]}/{frame.path.name}"
    path = f"{BUCKET}/{uri}"
    store.put_file(str(frame.path), path)
    return path, observed(frame, uri=uri, download_url=f"s3://{path}")


def test_a_frame_that_is_replaced_while_it_comes(own, content, images, behind, store):
    path, observation = own
    # Of the same length, and a frame as well with another pixel.
    middle = len(content) // 2
    other = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    replace = Act(first=lambda: store.pipe_file(path, other))
    with behind(Act(after=SOME), replace) as proxy:
        outcome = fetch(images, observation)
        assert_done(outcome, images, other, 3)
        assert [bool(text) for text in ranges(proxy)] == [False, True, False]


def test_a_frame_that_is_gone_while_it_comes(own, images, behind, store):
    path, observation = own
    with behind(Act(after=1000), Act(first=lambda: store.rm_file(path))):
        outcome = fetch(images, observation)
    says = "The specified key does not exist."
    assert_failed(outcome, images, observation.download_url, says, 2)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_frame_of_another_length_is_tried_again(own, content, images, anew, store, change):
    path, observation = own
    size = len(content) + change
    store.pipe_file(path, (content + b" ")[:size])
    outcome = fetch(images, observation)
    says = f"the file has {size} bytes, the archive lists {len(content)} (after 4 attempts)"
    assert_failed(outcome, images, observation.download_url, says, 4)


def test_what_is_no_frame_is_tried_again(own, content, images, anew, store):
    path, observation = own
    store.pipe_file(path, bytes(len(content)))
    outcome = fetch(images, observation)
    assert_failed(outcome, images, observation.download_url, "not a FITS file", 4)


@pytest.mark.parametrize(
    ("bucket", "says"),
    [
        (BUCKET, "The specified key does not exist."),
        ("nobucket", "The specified bucket does not exist"),
    ],
)
def test_what_is_not_there_is_a_failure_at_once(frame, images, anew, bucket, says):
    url = f"s3://{bucket}/not/there/{frame.path.name}"
    outcome = fetch(images, observed(frame, download_url=url))
    assert_failed(outcome, images, url, says, 1)


def test_no_credentials(frame, images, anew, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    outcome = fetch(images, observed(frame))
    says = "Unable to locate credentials"
    assert_failed(outcome, images, observed(frame).download_url, says, 1)


def test_no_library(frame, images, anew, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3")
    outcome = fetch(images, observed(frame))
    assert_failed(outcome, images, observed(frame).download_url, "Install s3fs to access S3", 1)


def test_nobody_listens(frame, images, anew, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    outcome = fetch(images, observed(frame))
    says = "Could not connect to the endpoint URL"
    assert_failed(outcome, images, observed(frame).download_url, says, 4)


# A mirror


@pytest.fixture
def mirrored(frame, tmp_path):
    url = mirror(tmp_path / "mirror", [frame], SERVICE_PREFIX)
    observation = observed(frame, url)
    path = tmp_path / "mirror" / frame.exposure.uri.removeprefix(SERVICE_PREFIX)
    assert observation.download_url == path.as_uri()
    return path, observation


@pytest.mark.parametrize("known", [True, False])
def test_a_frame_of_a_mirror(frame, mirrored, content, images, known):
    _, observation = mirrored
    if not known:
        observation = observed(frame, size_bytes=None, download_url=observation.download_url)
    assert_done(fetch(images, observation), images, content, 1)


def test_a_mirror_that_lacks_a_frame(mirrored, images):
    path, observation = mirrored
    path.unlink()
    outcome = fetch(images, observation)
    assert_failed(outcome, images, observation.download_url, "No such file or directory", 1)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_mirrored_frame_of_another_length(mirrored, content, images, change):
    path, observation = mirrored
    size = len(content) + change
    path.write_bytes((content + b" ")[:size])
    outcome = fetch(images, observation)
    says = f"the file has {size} bytes, the archive lists {len(content)} (after 4 attempts)"
    assert_failed(outcome, images, observation.download_url, says, 4)


def test_a_folder_in_place_of_a_mirrored_frame(mirrored, images):
    path, observation = mirrored
    path.unlink()
    path.mkdir()
    outcome = fetch(images, observation)
    assert_failed(outcome, images, observation.download_url, "Is a directory", 4)
