"""The download stage against the simulated archive and against a server that acts by script."""

from __future__ import annotations

import errno
import itertools
import logging
import math
import os
import pickle
import re
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urljoin, urlsplit

import pytest
from astropy.io import fits
from fsspec.asyn import get_loop

from spxdask.archive.buffer_pool import BufferPool
from spxdask.archive.observation import Observation
from spxdask.archive.redirects import MAX_REDIRECTS
from spxdask.archive.retry import RetryPolicy
from spxdask.cluster.tasks import error_as_value
from spxdask.cluster.workers import worker_memory_limit
from spxdask.errors import DiskFullError
from spxdask.science.content_hash import hash_content
from spxdask.science.level2.frame import open_frame
from spxdask.simulate.archive import ArchivedFrame, Fault, SimulatedArchive
from spxdask.simulate.frames import Exposure, SceneOptions, make_planes, make_sky, write_frame
from spxdask.stages.download import (
    MAX_FRAME_BYTES,
    FetchOptions,
    download,
    fetch_frame,
    frame_memory_limit,
)
from spxdask.storage import LocalStore

WINDOW = (900, 900, 60, 60)


def options(max_retries=3, stall_timeout_s=10.0, **limits):
    """Options with which a download waits hardly at all between attempts."""
    retry = RetryPolicy(max_retries=max_retries, first_delay_s=0.001)
    return FetchOptions(retry=retry, stall_timeout_s=stall_timeout_s, **limits)


PATIENT = options()


@dataclass(frozen=True, kw_only=True)
class RecordingPolicy(RetryPolicy):
    """A policy that records what it is asked for, calls `before_retry` and does not wait."""

    max_retries: int = 3
    calls: list[tuple[int, str | None]] = field(default_factory=list)
    before_retry: Callable[[], object] = lambda: None

    def delay(self, attempt, retry_after=None):
        self.calls.append((attempt, retry_after))
        self.before_retry()
        return 0.0


def exposure(**changes):
    return Exposure(
        **{
            "obs_id": "2025W51_1A_0684_2",
            "detector": 2,
            "ra": 270.0,
            "dec": 66.56,
            "roll_deg": 0.0,
            "mjd_begin": 61050.0,
            "release": "qr3",
        }
        | changes
    )


def write(folder, shot, seed=1):
    sky = make_sky(shot.ra, shot.dec, 0.01, n_sources=3, min_separation_arcsec=5.0, seed=1)
    planes = make_planes(shot, sky, SceneOptions(seed=seed), window=WINDOW)
    write_frame(folder / shot.filename, shot, planes, window=WINDOW)
    return ArchivedFrame(
        obs_id=shot.obs_id,
        detector=shot.detector,
        collection=shot.collection,
        uri=shot.uri,
        path=folder / shot.filename,
        mjd_begin=shot.mjd_begin,
        mjd_end=shot.mjd_end,
        wavelength_min_um=1.1,
        wavelength_max_um=1.62,
        polygon=shot.footprint(),
    )


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    return write(tmp_path_factory.mktemp("one"), exposure())


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Of the same exposure and length, but another detector."""
    return write(tmp_path_factory.mktemp("other"), exposure(detector=1))


@pytest.fixture(scope="module")
def qr2(tmp_path_factory):
    shot = exposure(release="qr2", obs_id="2025W51_1A_0685_1")
    return write(tmp_path_factory.mktemp("qr2"), shot)


@pytest.fixture(scope="module")
def content(frame):
    return frame.path.read_bytes()


@pytest.fixture(scope="module")
def changed_content(tmp_path_factory):
    """The same frame, of the same length, with other pixels."""
    return write(tmp_path_factory.mktemp("changed"), exposure(), seed=2).path.read_bytes()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


def observed(frame, url, **changes):
    values = {
        "obs_id": frame.obs_id,
        "band": f"D{frame.detector}",
        "mjd": (frame.mjd_begin + frame.mjd_end) / 2,
        "wavelength_um": 1.36,
        "uri": frame.uri,
        "download_url": f"{url}/{frame.uri}",
        "size_bytes": frame.path.stat().st_size,
    }
    return Observation(**values | changes)


class Server(ThreadingHTTPServer):
    """A server that takes one (status, headers, body) of an iterator a request.

    `log` has the Range and If-Range headers of the requests, `paths` what was asked for.
    """

    def __init__(self, answers):
        self.answers, self.log, self.paths = iter(answers), [], []
        super().__init__(("127.0.0.1", 0), Script)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        # The client left when it had heard enough.
        pass

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()
        return super().__enter__()

    def __exit__(self, *exception):
        self.shutdown()
        self.thread.join()
        super().__exit__(*exception)


class Script(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.log.append((self.headers["Range"], self.headers["If-Range"]))
        self.server.paths.append(self.path)
        status, headers, body = next(self.server.answers)
        self.send_response(*(status if isinstance(status, tuple) else (status,)))
        self.send_header("Connection", "close")
        for name, value in ({"Content-Length": len(body)} | headers).items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def fetch(archive, frame, images, patience=PATIENT, **changes):
    return download(observed(frame, archive.url, **changes), str(images), patience)


def statuses(archive):
    return [request.status for request in archive.requests]


def assert_failed(outcome, images, says, attempts):
    assert (outcome.stage, outcome.status, outcome.bytes) == ("download", "failed", 0)
    assert says in outcome.reason
    assert outcome.attempts == attempts
    assert "\n" not in outcome.reason
    assert os.listdir(images) == []


def assert_done(outcome, images, frame, content, attempts):
    assert (outcome.stage, outcome.status, outcome.reason) == ("download", "done", None)
    assert outcome.filename == frame.path.name
    assert (outcome.bytes, outcome.attempts) == (len(content), attempts)
    assert os.listdir(images) == [frame.path.name]
    assert (images / frame.path.name).read_bytes() == content


# What works


@pytest.mark.parametrize("which", ["frame", "qr2"])
@pytest.mark.parametrize("known", [True, False])
def test_a_frame_comes_whole(request, images, which, known):
    frame = request.getfixturevalue(which)
    with SimulatedArchive([frame]) as archive:
        outcome = fetch(archive, frame, images, **{} if known else {"size_bytes": None})
        assert statuses(archive) == [200]
        archive.wait_for(lambda archive: archive.open_connections == 0)
    assert_done(outcome, images, frame, frame.path.read_bytes(), 1)
    assert open_frame(images / frame.path.name).obs_id == frame.obs_id


def test_many_at_once(frame, other, qr2, images):
    with SimulatedArchive([frame, other, qr2]) as archive, ThreadPoolExecutor(6) as pool:
        # Twice each, as when a task is run again that was not over.
        outcomes = list(pool.map(lambda f: fetch(archive, f, images), [frame, other, qr2] * 2))
    assert {outcome.status for outcome in outcomes} == {"done"}
    assert sorted(os.listdir(images)) == sorted(f.path.name for f in (frame, other, qr2))
    for each in (frame, other, qr2):
        assert (images / each.path.name).read_bytes() == each.path.read_bytes()


def test_outcome_and_options_go_between_processes(frame, images):
    with SimulatedArchive([frame]) as archive:
        outcome = fetch(archive, frame, images)
    assert pickle.loads(pickle.dumps((outcome, PATIENT))) == (outcome, PATIENT)


def test_a_file_of_the_wrong_length_is_replaced(frame, content, images):
    (images / frame.path.name).write_bytes(b"half")
    with SimulatedArchive([frame]) as archive:
        assert_done(fetch(archive, frame, images), images, frame, content, 1)


# What passes by itself

TRANSIENT = [
    *(Fault(status=s, retry_after_s=0) for s in (408, 425, 429, 500, 502, 503, 504)),
    Fault(html=True),
    Fault(garbage=True),
    Fault(short=0),
    Fault(short=500_000),
    Fault(truncate=0),
    Fault(truncate=1_000_000),
    Fault(redirect="http://127.0.0.1:9/"),
]


@pytest.mark.parametrize("fault", TRANSIENT, ids=repr)
def test_it_is_tried_again(frame, content, images, fault):
    with SimulatedArchive([frame], faults={frame.uri: [fault, fault]}) as archive:
        assert_done(fetch(archive, frame, images), images, frame, content, 3)
        assert len(archive.requests) == 3


LASTING = [
    (Fault(status=503, retry_after_s=0), "HTTP 503 Service Unavailable (after 3 attempts)"),
    (Fault(status=429), "HTTP 429 Too Many Requests"),
    (Fault(html=True), "the server sent an HTML page instead of the file"),
    (Fault(garbage=True), "not a FITS file"),
    (Fault(short=500_000), "the file has 500000 bytes, the archive lists "),
    (Fault(short=0), "the file has 0 bytes, the archive lists "),
    (Fault(truncate=0), "the transfer broke off after 0 bytes"),
    (Fault(truncate=100_000), "the transfer broke off after "),
    (Fault(redirect="http://127.0.0.1:9/"), "Cannot connect to host 127.0.0.1:9"),
]


@pytest.mark.parametrize(("fault", "says"), LASTING, ids=lambda value: repr(value)[:80])
def test_what_does_not_pass_is_a_failure_with_its_reason(frame, images, fault, says):
    with SimulatedArchive([frame], faults={frame.uri: itertools.repeat(fault)}) as archive:
        outcome = fetch(archive, frame, images, options(max_retries=2))
        assert_failed(outcome, images, says, 3)
        assert outcome.reason.startswith(f"{archive.url}/{frame.uri}: ")
        assert len(archive.requests) == 3
        archive.wait_for(lambda archive: archive.open_connections == 0)


@pytest.mark.parametrize("retries", [0, 1])
def test_number_of_retries(frame, images, retries):
    patience = options(max_retries=retries)
    with SimulatedArchive([frame], faults={frame.uri: [Fault(html=True)] * 9}) as archive:
        assert_failed(fetch(archive, frame, images, patience), images, "HTML", retries + 1)
        assert len(archive.requests) == retries + 1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (((404, "Perdu \u00e0 jamais"), {}, b""), "HTTP 404 Perdu jamais"),
        ((200, {"Content-Length": "many"}, b""), "Invalid character in Content-Length"),
        ((302, {"Location": "file:///\u00e9t\u00e9"}, b""), "redirected to file:"),
    ],
)
def test_whatever_a_server_says_is_one_line_that_can_be_printed(frame, images, answer, says):
    with Server([answer]) as server:
        outcome = fetch(server, frame, images)
    assert_failed(outcome, images, says, 1)
    assert outcome.reason.isprintable()
    assert outcome.reason.encode()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 501])
def test_what_will_not_pass_is_not_tried_again(frame, images, status):
    with SimulatedArchive([frame], faults={frame.uri: [Fault(status=status)] * 9}) as archive:
        assert_failed(fetch(archive, frame, images), images, f"HTTP {status} ", 1)
        assert statuses(archive) == [status]


def test_nobody_listens(frame, images):
    with SimulatedArchive([frame]) as archive:
        pass
    assert_failed(fetch(archive, frame, images), images, "Cannot connect to host", 4)


def test_the_archive_says_how_long_to_wait(frame, images):
    policy = RecordingPolicy()
    faults = [Fault(status=503, retry_after_s=7), Fault(html=True), Fault(status=429)]
    with SimulatedArchive([frame], faults={frame.uri: faults}) as archive:
        assert fetch(archive, frame, images, replace(PATIENT, retry=policy)).status == "done"
    assert policy.calls == [(1, "7"), (2, None), (3, None)]


# Whole, and the right one


@pytest.mark.parametrize("known", [True, False])
def test_another_frame_is_not_taken(frame, other, images, known):
    assert frame.path.stat().st_size == other.path.stat().st_size
    with SimulatedArchive([frame, other]) as archive:
        archive.add_faults(
            frame.uri, itertools.repeat(Fault(redirect=f"{archive.url}/{other.uri}"))
        )
        outcome = fetch(archive, frame, images, **{} if known else {"size_bytes": None})
        assert_failed(outcome, images, "the file is of band D1, not D", 4)


@pytest.mark.parametrize("off", [-1, 1, 2880])
def test_the_archives_length_counts(frame, content, images, off):
    said = len(content) + off
    # Nothing needs to be sent to know it.
    with Server(itertools.repeat((200, {"Content-Length": len(content)}, b""))) as server:
        outcome = fetch(server, frame, images, size_bytes=said)
    says = f"the file has {len(content)} bytes, the archive lists {said}"
    assert_failed(outcome, images, says, 4)


CHUNKED = {"Content-Length": None, "Transfer-Encoding": "chunked"}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("headers", [{"Content-Length": None}, CHUNKED], ids=["none", "chunked"])
@pytest.mark.parametrize("more", [b"", b"x" * 2880])
def test_a_transfer_that_does_not_say_how_long_it_is(frame, content, images, known, headers, more):
    body = content + more
    if headers is CHUNKED:
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    with Server(itertools.repeat((200, headers, body))) as server:
        outcome = fetch(server, frame, images, **{} if known else {"size_bytes": None})
    if known and more:
        assert_failed(outcome, images, f"received more than {len(content)} bytes", 4)
    else:
        # FITS lets a file go on after its last unit.
        assert_done(outcome, images, frame, content + more, 1)


@pytest.mark.parametrize(
    ("size", "says", "attempts"),
    [
        (1_000_001, "1000001 bytes is too long for a frame", 0),
        (None, "bytes is too long for a frame", 1),
        (0, "bytes, the archive lists 0", 4),
    ],
)
def test_lengths_that_no_frame_has(frame, content, images, size, says, attempts):
    limited = options(max_frame_bytes=1_000_000)
    with Server(itertools.repeat((200, {}, content))) as server:
        outcome = fetch(server, frame, images, limited, size_bytes=size)
        assert len(server.paths) == attempts
    assert_failed(outcome, images, says, attempts)


@pytest.fixture(scope="module")
def summed(qr2, tmp_path_factory):
    """A frame whose units carry sums."""
    path = tmp_path_factory.mktemp("summed") / qr2.path.name
    with fits.open(qr2.path, disable_image_compression=True) as hdus:
        hdus.writeto(path, checksum=True)
    return replace(qr2, path=path)


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize(
    ("where", "says"),
    [
        (lambda hdus: hdus["IMAGE"].fileinfo()["datLoc"] + 3, "DATASUM is"),
        (lambda hdus: hdus[-1].fileinfo()["datLoc"] - 1, "CHECKSUM"),
        # Where nobody looks.
        (lambda hdus: -1, "DATASUM is"),
    ],
    ids=["pixel", "header", "padding"],
)
def test_damage_on_the_way_is_noticed(summed, images, where, says, lasting):
    content = summed.path.read_bytes()
    damaged = bytearray(content)
    with fits.open(summed.path, disable_image_compression=True) as hdus:
        damaged[where(hdus)] ^= 1
    bad, good = (200, {}, bytes(damaged)), (200, {}, content)
    with Server(itertools.chain([bad] * (4 if lasting else 1), [good])) as server:
        outcome = fetch(server, summed, images)
    if not lasting:
        assert_done(outcome, images, summed, content, 2)
        assert (outcome.checksum, outcome.warnings) == (hash_content(content), ())
    elif says == "CHECKSUM":
        # The archive serves it so: a header that was mended in place, with the data as they were.
        assert_done(outcome, images, summed, bytes(damaged), 2)
        assert outcome.checksum == hash_content(damaged)
        assert len(outcome.warnings) == 1
        assert "CHECKSUM of WCS-WAVE disagrees with the header" in outcome.warnings[0]
    else:
        assert_failed(outcome, images, says, 2)
        assert outcome.reason.endswith("a second transfer brought the same bytes")
        assert outcome.checksum is None


def test_damage_that_differs_each_time_is_no_matter_of_the_archive(summed, images):
    content = summed.path.read_bytes()
    start = len(content) - 2880
    damaged = [content[:at] + b"?" + content[at + 1 :] for at in range(start, start + 3)]
    answers = [(200, {}, body) for body in (*damaged, content)]
    with Server(answers) as server:
        assert_done(fetch(server, summed, images), images, summed, content, 4)


@pytest.fixture(scope="module")
def mended(summed, tmp_path_factory):
    """A frame whose primary header was changed in place, sums and all data left as they were."""
    path = tmp_path_factory.mktemp("mended") / summed.path.name
    content = summed.path.read_bytes()
    at = content.index(b"CHECKSUM")
    path.write_bytes(content[: at + 75] + b"x" + content[at + 76 :])
    return replace(summed, path=path)


@pytest.mark.parametrize("max_retries", [0, 1, 5])
def test_a_mended_header_costs_no_frame_however_few_attempts_there_are(mended, images, max_retries):
    with SimulatedArchive([mended]) as archive:
        outcome = fetch(archive, mended, images, options(max_retries))
        attempts = min(max_retries + 1, 2)
        assert_done(outcome, images, mended, mended.path.read_bytes(), attempts)
        assert len(archive.requests) == attempts
    assert len(outcome.warnings) == 1


def test_measuring_sees_hash_and_warnings_of_a_frame(mended, images):
    seen = []
    with SimulatedArchive([mended]) as archive:
        observation = observed(mended, archive.url)
        outcome, _ = fetch_frame(observation, None, PATIENT, seen.append)
    [frame] = seen
    assert frame.checksum == outcome.checksum == hash_content(mended.path.read_bytes())
    assert set(outcome.warnings) <= set(frame.warnings)


def test_a_frame_that_the_archive_has_broken_is_asked_for_twice(frame, content, images):
    broken = content.replace(b"MJD-BEG ", b"MJD-BEGX")
    with Server(itertools.repeat((200, {}, broken))) as server:
        outcome = fetch(server, frame, images, options(max_retries=5))
    assert_failed(outcome, images, "MJD-BEG", 2)


@pytest.mark.parametrize(
    "headers", [{"ETag": '"a"', "Last-Modified": "Thu"}, {"ETag": 'W/"a"'}, {}]
)
def test_what_was_fetched_has_hash_and_version_in_the_ledger(frame, content, images, headers):
    with Server([(200, headers, content)]) as server:
        outcome = fetch(server, frame, images)
    assert outcome.checksum == outcome.content_hash == hash_content(content)
    assert (outcome.etag, outcome.modified) == (headers.get("ETag"), headers.get("Last-Modified"))


def test_the_hash_is_that_of_the_whole_file_after_a_broken_transfer(frame, content, images):
    plan = [Fault(truncate=1_000_000), Fault(truncate=500_000), Fault(html=True)]
    with SimulatedArchive([frame], faults={frame.uri: plan}) as archive:
        assert fetch(archive, frame, images).checksum == hash_content(content)
        assert 206 in statuses(archive)


@pytest.mark.parametrize("cut", [0, 1, 2880, 300_000])
def test_a_short_file_of_unknown_length_is_not_taken(frame, images, cut):
    with SimulatedArchive([frame], faults={frame.uri: [Fault(short=cut)] * 4}) as archive:
        outcome = fetch(archive, frame, images, size_bytes=None)
    assert outcome.status == "failed"
    assert os.listdir(images) == []


def test_the_name_appears_last(frame, content, images):
    seen = None

    def watch():
        nonlocal seen
        yield Fault(truncate=1_500_000)
        seen = os.listdir(images)
        yield Fault()

    with SimulatedArchive([frame], faults={frame.uri: watch()}) as archive:
        assert_done(fetch(archive, frame, images), images, frame, content, 2)
    assert seen == []


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails(frame, images, monkeypatch, call, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    with SimulatedArchive([frame]) as archive, monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        result = error_as_value(fetch, archive, frame, images)
    if code == errno.EIO:
        assert_failed(result, images, os.strerror(code), 1)
        return
    # No matter of this frame, and one that every frame would meet.
    assert isinstance(pickle.loads(pickle.dumps(result)), DiskFullError)
    said = f"{os.strerror(code)} in {images}: make room, then the same command resumes the run"
    assert str(result) == said
    assert os.listdir(images) == []


def test_no_folder_is_a_failure_of_the_frame(frame, tmp_path):
    with SimulatedArchive([frame]) as archive:
        outcome = fetch(archive, frame, tmp_path / "gone")
    assert outcome.status == "failed"
    assert "No such file or directory" in outcome.reason


# Stalls, and going on


@pytest.mark.parametrize("sent", [0, 1_000_000])
def test_a_stalled_transfer_is_given_up(frame, images, sent):
    hasty = options(max_retries=1, stall_timeout_s=0.2)
    with SimulatedArchive([frame], faults={frame.uri: [Fault(stall=sent)] * 2}) as archive:
        assert_failed(fetch(archive, frame, images, hasty), images, "no data received for 0.2 s", 2)
        archive.wait_for(lambda archive: archive.open_connections == 0)


@pytest.mark.parametrize("fault", [Fault(stall=1_000_000), Fault(truncate=1_000_000)], ids=repr)
def test_a_broken_transfer_goes_on(frame, content, images, fault):
    hasty = options(stall_timeout_s=4.0)
    plan = [fault, Fault(status=503, retry_after_s=0), Fault(truncate=500_000)]
    with SimulatedArchive([frame], faults={frame.uri: plan}) as archive:
        assert_done(fetch(archive, frame, images, hasty), images, frame, content, 4)
        assert statuses(archive) == [200, 503, 206, 206]


def test_a_server_without_ranges_sends_all_again(frame, content, images):
    plan = [Fault(truncate=1_000_000), Fault(no_range=True)]
    with SimulatedArchive([frame], faults={frame.uri: plan}) as archive:
        assert_done(fetch(archive, frame, images), images, frame, content, 2)
        assert statuses(archive) == [200, 200]


def test_a_changed_file_is_not_joined_to_what_came(
    frame, content, changed_content, images, tmp_path
):
    assert len(content) == len(changed_content)
    path = tmp_path / frame.path.name
    path.write_bytes(content)

    def change():
        yield Fault(truncate=1_000_000)
        path.unlink()
        path.write_bytes(changed_content)
        yield Fault()

    served = replace(frame, path=path)
    with SimulatedArchive([served], faults={frame.uri: change()}) as archive:
        assert_done(fetch(archive, served, images), images, frame, changed_content, 2)
        assert statuses(archive) == [200, 200]


def fetch_broken(frame, images, tag, second):
    """Fetch from a server that breaks off first and sends all the third time.

    `second` gives its second answer from the first byte that is asked for. Returns the
    outcome and the Range and If-Range headers of the requests.
    """
    content = frame.path.read_bytes()

    def answers():
        length = {"Content-Length": len(content)}
        yield 200, length | ({"ETag": tag} if tag else {}), content[:1_000_000]
        asked = server.log[-1][0]
        yield second(int(asked[6:-1]) if asked else 0)
        yield 200, {}, content

    with Server(answers()) as server:
        return fetch(server, frame, images), server.log


def span(first, content):
    return {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}


def test_going_on_names_the_version(frame, content, images):
    def second(first):
        return 206, {"ETag": '"a"'} | span(first, content), content[first:]

    outcome, log = fetch_broken(frame, images, '"a"', second)
    assert_done(outcome, images, frame, content, 2)
    assert log[0] == (None, None)
    assert re.fullmatch(r"bytes=\d+-", log[1][0])
    assert 0 < int(log[1][0][6:-1]) <= 1_000_000
    assert log[1][1] == '"a"'


@pytest.mark.parametrize("tag", [None, 'W/"a"'])
def test_without_a_strong_tag_all_is_sent_again(frame, content, images, tag):
    outcome, log = fetch_broken(frame, images, tag, lambda first: (200, {}, content))
    assert_done(outcome, images, frame, content, 2)
    assert log == [(None, None)] * 2


@pytest.mark.parametrize(
    "wrong",
    [
        lambda first, content, changed: ({"ETag": '"b"'} | span(first, content), changed[first:]),
        lambda first, content, changed: (span(first, content), changed[first:]),
        lambda first, content, changed: ({"ETag": '"a"'} | span(0, content), content),
        lambda first, content, changed: ({"ETag": '"a"'}, content[first:]),
        lambda first, content, changed: (
            {"ETag": '"a"'} | span(first + 1, content), content[first + 1 :],
        ),
    ],
    ids=["other version", "no version", "from the start", "nowhere", "one byte on"],
)  # fmt: skip
def test_a_range_of_something_else_is_not_joined(frame, content, changed_content, images, wrong):
    outcome, log = fetch_broken(
        frame, images, '"a"', lambda first: (206, *wrong(first, content, changed_content))
    )
    assert_done(outcome, images, frame, content, 3)
    assert log[2] == (None, None)


def test_a_range_that_was_not_asked_for_is_not_taken(frame, content, images):
    with Server([(206, span(0, content), content), (200, {}, content)]) as server:
        assert_done(fetch(server, frame, images), images, frame, content, 2)


def test_a_range_that_cannot_be_had_starts_over(frame, content, images):
    outcome, log = fetch_broken(frame, images, '"a"', lambda first: (416, {}, b""))
    assert_done(outcome, images, frame, content, 3)
    assert log[2] == (None, None)


# Somewhere else


def moved(location, status=302):
    return status, {"Location": location}, b""


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(frame, content, images, status):
    forms = ["next", "../up/", "/a%2Fb%20c?d=%26e#f", "//localhost:{port}/g", "?h", "{url}/i"]
    steps = list(itertools.islice(itertools.cycle(forms), MAX_REDIRECTS))

    def answers():
        for step in steps:
            yield moved(step.format(url=server.url, port=server.server_port), status)
        yield 200, {}, content

    with Server(answers()) as server:
        assert_done(fetch(server, frame, images), images, frame, content, 1)
        at, expected = f"{server.url}/{frame.uri}", [f"/{frame.uri}"]
        for step in steps:
            at = urljoin(at, step.format(url=server.url, port=server.server_port))
            parts = urlsplit(at)
            expected.append(parts.path + (f"?{parts.query}" if parts.query else ""))
        assert server.paths == expected


def test_redirects_end(frame, content, images):
    steps = (moved("next") for _ in range(MAX_REDIRECTS + 1))
    with Server([*steps, (200, {}, content)]) as server:
        assert_failed(
            fetch(server, frame, images), images, f"redirected more than {MAX_REDIRECTS} times", 1
        )
        assert len(server.paths) == MAX_REDIRECTS + 1


def test_a_redirected_transfer_goes_on(frame, content, images):
    tag = {"ETag": '"a"'}

    def answers():
        yield moved("/mirror")
        yield 200, tag | {"Content-Length": len(content)}, content[:1_000_000]
        yield moved("/mirror")
        first = int(server.log[-1][0][6:-1])
        yield 206, tag | span(first, content), content[first:]

    with Server(answers()) as server:
        assert_done(fetch(server, frame, images), images, frame, content, 2)
        assert server.log[:2] == [(None, None)] * 2
        assert server.log[2] == server.log[3]
        assert server.log[2][1] == '"a"'


def test_a_redirect_may_be_a_fault_that_passes(frame, content, images):
    answers = [moved("/mirror"), (503, {"Retry-After": 0}, b""), (200, {}, content)]
    with Server(answers) as server:
        assert_done(fetch(server, frame, images), images, frame, content, 2)
        assert server.paths == [f"/{frame.uri}", "/mirror", f"/{frame.uri}"]


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "FTP://127.0.0.1/frame.fits",
        "s3://bucket/frame.fits",
        "data:application/fits,SIMPLE",
        None,
        "",
        "http:///nowhere",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:port/",
        "http://[::1/",
        "http://[example]/",
        f"http://{'a' * 64}.test/",
        "http://a..test/",
        "http://\u00e9.test/",
    ],
)
def test_a_place_that_will_not_do(frame, images, location):
    with Server(itertools.repeat(moved(location))) as server:
        outcome = fetch(server, frame, images)
        assert_failed(outcome, images, "redirected", 1)
        assert outcome.reason.startswith(f"{server.url}/{frame.uri}: ")
        assert len(server.paths) == 1
    if location and location.isascii():
        assert location.partition("/")[0].lower() in outcome.reason


NAMES = {
    "archive.test": ["8.8.8.8"],
    "mirror.test": ["8.8.4.4", "2001:4860:4860::8888"],
    # As they are told in a network that reaches IPv4 by NAT64, and others.
    "nat64.test": ["64:ff9b::8.8.8.8", "2002:808:808::1", "::ffff:8.8.8.8"],
    "mixed.test": ["8.8.8.8", "10.0.0.1"],
}


@pytest.fixture
def connected(monkeypatch):
    """Let names have public addresses, behind all of which this machine answers.

    Gives the addresses that were connected to.
    """
    loop, addresses = get_loop(), []
    ask, connect = loop.getaddrinfo, loop.sock_connect

    async def getaddrinfo(host, port, **options):
        if host in NAMES:
            # The transfer asks with options.
            found = ["127.0.0.1"] if options else NAMES[host]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in found]
        if host.endswith(".test"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return await ask(host, port, **options)

    async def sock_connect(sock, address):
        addresses.append(address[:2])
        return await connect(sock, address)

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(loop, "sock_connect", sock_connect)
    return addresses


@pytest.mark.parametrize("way", [[], ["mirror.test"]])
@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.0.1",
        "100.64.0.1",
        "169.254.169.254",
        "0.0.0.0",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::127.0.0.1]",
        "[::ffff:10.0.0.1]",
        "[64:ff9b::127.0.0.1]",
        "[64:ff9b::a9fe:a9fe]",
        "[64:ff9b:1::8.8.8.8]",
        "[2002:7f00:1::1]",
        "[2002:c0a8:1::1]",
        "[fe80::1]",
        "[fd00::1]",
        "mixed.test",
    ],
)
def test_a_public_archive_cannot_lead_inwards(frame, images, connected, host, way):
    steps = (moved(f"http://{place}:{{port}}/secret") for place in [*way, host])

    def answers():
        for status, headers, body in steps:
            yield status, {"Location": headers["Location"].format(port=server.server_port)}, body

    with Server(answers()) as server:
        archive = f"http://archive.test:{server.server_port}"
        outcome = download(observed(frame, archive), str(images), PATIENT)
        target = f"http://{host}:{server.server_port}/secret"
        says = f"{frame.uri}: redirected to {target}, a private address, which is not followed"
        assert_failed(outcome, images, says, 1)
        assert connected == [("127.0.0.1", server.server_port)] * (1 + len(way))
        assert len(server.paths) == 1 + len(way)


@pytest.mark.parametrize("mirror", ["mirror.test", "nat64.test"])
def test_a_public_archive_can_lead_to_a_public_mirror(frame, content, images, connected, mirror):
    with Server([moved("/there"), (200, {}, content)]) as server:
        answers = [moved(f"http://{mirror}:{server.server_port}/there"), (200, {}, content)]
        server.answers = iter(answers)
        archive = f"http://archive.test:{server.server_port}"
        outcome = download(observed(frame, archive), str(images), PATIENT)
        assert_done(outcome, images, frame, content, 1)


def test_a_name_that_is_nobodys(frame, images, connected):
    with Server(itertools.repeat(moved("http://nobody.test/"))) as server:
        assert_failed(fetch(server, frame, images), images, "Cannot connect to host nobody.test", 4)


@pytest.mark.parametrize("scheme", ["ftp", "http"])
def test_passwords_of_others_stay_out_of_the_ledger(frame, images, connected, scheme):
    with Server([moved(f"{scheme}://user:secret@10.0.0.1/")]) as server:
        archive = f"http://archive.test:{server.server_port}"
        outcome = download(observed(frame, archive), str(images), PATIENT)
    assert "10.0.0.1" in outcome.reason
    assert "secret" not in outcome.reason


@pytest.mark.parametrize(
    "answer",
    [
        (404, {}, b""),
        (503, {"Retry-After": 0}, b""),
        (200, {}, b"no frame"),
        moved("http://10.0.0.1/"),
        moved("ftp://elsewhere.test/"),
        moved("http://[example]/"),
        moved("next"),
    ],
    ids=repr,
)
def test_our_own_password_stays_out_of_the_ledger_and_the_log(
    frame, images, connected, caplog, answer
):
    caplog.set_level(logging.INFO)
    with Server(itertools.repeat(answer)) as server:
        host = f"archive.test:{server.server_port}"
        outcome = download(observed(frame, f"http://me:secret@{host}"), str(images), PATIENT)
    assert outcome.status == "failed"
    assert outcome.reason.startswith(f"http://{host}/{frame.uri}: ")
    for text in (outcome.reason, caplog.text):
        assert "secret" not in text


# From a mirror on disk


@pytest.fixture
def mirror(frame, tmp_path):
    path = tmp_path / "mirror of the archive" / frame.uri
    path.parent.mkdir(parents=True)
    path.write_bytes(frame.path.read_bytes())
    return path


def fetch_from(mirror, frame, images, patience=PATIENT, **changes):
    changes = {"download_url": mirror.as_uri()} | changes
    return download(observed(frame, "", **changes), str(images), patience)


@pytest.mark.parametrize("known", [True, False])
def test_a_frame_comes_from_a_mirror(frame, content, images, mirror, known):
    outcome = fetch_from(mirror, frame, images, **{} if known else {"size_bytes": None})
    assert_done(outcome, images, frame, content, 1)
    assert outcome.checksum == hash_content(content)
    assert outcome.modified == str(mirror.stat().st_mtime_ns)


def test_a_mended_header_comes_from_a_mirror_too(mended, images, mirror):
    content = mended.path.read_bytes()
    mirror.write_bytes(content)
    outcome = fetch_from(mirror, mended, images)
    assert_done(outcome, images, mended, content, 2)
    assert len(outcome.warnings) == 1


@pytest.mark.parametrize(
    ("change", "says", "attempts"),
    [
        (lambda path: path.unlink(), "No such file or directory", 1),
        (lambda path: (path.unlink(), path.mkdir()), "Is a directory", 4),
        (
            lambda path: os.truncate(path, 1_000_000),
            "the file has 1000000 bytes, the archive lists",
            4,
        ),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "not a FITS file", 4),
    ],
)
def test_a_mirror_that_does_not_have_it(frame, images, mirror, change, says, attempts):
    change(mirror)
    outcome = fetch_from(mirror, frame, images)
    assert_failed(outcome, images, says, attempts)
    assert outcome.reason.startswith(f"{mirror.as_uri()}: ")


def test_another_frame_of_a_mirror_is_not_taken(frame, other, images, mirror):
    mirror.write_bytes(other.path.read_bytes())
    outcome = fetch_from(mirror, frame, images)
    assert_failed(outcome, images, "the file is of band D1, not D2", 4)


def test_a_mirror_that_is_just_being_copied(frame, content, images, mirror):
    mirror.write_bytes(content[:1_000_000])
    policy = RecordingPolicy(before_retry=lambda: mirror.write_bytes(content))
    outcome = fetch_from(mirror, frame, images, replace(PATIENT, retry=policy))
    assert_done(outcome, images, frame, content, 2)
    assert policy.calls == [(1, None)]


# How much at once


class CountingPool(BufferPool):
    """Records the leases, and the most of them at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.leases, self.leased, self.peak = [], 0, 0
        self.lock = threading.Lock()

    @contextmanager
    def lease(self, size, limit=math.inf):
        with super().lease(size, limit) as block:
            with self.lock:
                self.leases.append((size, limit))
                self.leased += 1
                self.peak = max(self.peak, self.leased)
            try:
                yield block
            finally:
                with self.lock:
                    self.leased -= 1


@pytest.fixture
def pool():
    return CountingPool()


def measure_nothing(_):
    return None


@pytest.mark.parametrize("room", [1, 2, 3])
def test_a_worker_holds_no_more_frames_than_it_may(frame, other, images, pool, room):
    size = frame.path.stat().st_size
    assert other.path.stat().st_size == size
    limited = options(scratch_bytes=room * size)

    def fetch_one(archive, which):
        observation = observed(which, archive.url)
        return fetch_frame(observation, str(images), limited, measure_nothing, buffers=pool)[0]

    with (
        # So slow that all would be under way at once.
        SimulatedArchive([frame, other], bandwidth=8 * size) as archive,
        ThreadPoolExecutor(6) as threads,
    ):
        outcomes = list(threads.map(partial(fetch_one, archive), [frame, other] * 3))
    assert {outcome.status for outcome in outcomes} == {"done"}
    assert pool.leases == [(size, room * size)] * 6
    assert pool.peak <= room


@pytest.mark.parametrize(
    ("worker", "scratch", "expected"),
    [(8e9, 5e9, 2e9), (8e9, 1e9, 1e9), (math.inf, 5e9, 5e9), (math.inf, math.inf, math.inf)],
)
def test_a_quarter_of_the_memory_of_a_worker_is_for_frames(worker, scratch, expected):
    assert frame_memory_limit(scratch, worker) == expected


def lease_in_worker(observation, images):
    pool = CountingPool()
    fetch_frame(observation, images, PATIENT, measure_nothing, buffers=pool)
    return pool.leases, worker_memory_limit()


def test_a_download_knows_the_memory_of_its_worker(frame, images, client):
    with SimulatedArchive([frame]) as archive:
        task = client.submit(lease_in_worker, observed(frame, archive.url), str(images))
        [(_, limit)], worker_bytes = task.result()
    assert limit == worker_bytes / 4 < math.inf


@pytest.mark.parametrize("known", [True, False])
def test_memory_is_for_the_length_of_the_frame(frame, images, pool, known):
    size = frame.path.stat().st_size
    with SimulatedArchive([frame]) as archive:
        observation = observed(frame, archive.url, **{} if known else {"size_bytes": None})
        fetch_frame(observation, str(images), PATIENT, measure_nothing, buffers=pool)
    assert pool.leases == [(size if known else MAX_FRAME_BYTES, math.inf)]


# Measured where it was received


def test_a_frame_is_measured_in_memory(frame, content, images):
    with SimulatedArchive([frame]) as archive:
        observation = observed(frame, archive.url)
        measured = fetch_frame(observation, str(images), PATIENT, lambda f: (f.obs_id, f.band))
        outcome, identity = measured
        assert identity == (observation.obs_id, observation.band)
        assert_done(outcome, images, frame, content, 1)
        outcome, identity = fetch_frame(observation, None, PATIENT, lambda f: f.obs_id)
        assert (outcome.status, identity) == ("done", observation.obs_id)


def test_nothing_is_measured_without_a_frame(frame):
    with SimulatedArchive([frame], faults={frame.uri: [Fault(status=404)]}) as archive:
        outcome, measured = fetch_frame(observed(frame, archive.url), None, PATIENT, pytest.fail)
    assert (outcome.status, measured) == ("failed", None)


# What is there already


def test_complete_is_of_the_archives_length(frame, content, images):
    observation = observed(frame, "http://127.0.0.1")
    unknown = replace(observation, size_bytes=None)
    assert not observation.is_complete(LocalStore(images).list_sizes())
    assert not unknown.is_complete(LocalStore(images / "gone").list_sizes())
    path = images / frame.path.name
    for bad in (b"", content[:-1], content + b"x"):
        path.write_bytes(bad)
        assert not observation.is_complete(LocalStore(images).list_sizes())
        assert unknown.is_complete(LocalStore(images).list_sizes())
    path.write_bytes(content)
    assert observation.is_complete(LocalStore(images).list_sizes())


def test_a_part_is_not_complete(frame, content, images):
    observation = observed(frame, "http://127.0.0.1")
    (images / f".{frame.path.name}.0123456789ab.part").write_bytes(content)
    assert not observation.is_complete(LocalStore(images).list_sizes())
    assert not replace(observation, size_bytes=None).is_complete(LocalStore(images).list_sizes())


def test_what_was_fetched_is_complete(frame, images):
    with SimulatedArchive([frame]) as archive:
        fetch(archive, frame, images)
        assert observed(frame, archive.url).is_complete(LocalStore(images).list_sizes())
