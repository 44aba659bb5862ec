"""Pieces of a file: from the simulated archive, a bucket, a disk, a server that acts by script."""

from __future__ import annotations

import gzip
import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from archived import archived_frame
from objectstore import BUCKET as BUCKET_OF_MOTO
from objectstore import serving

from spxdask.archive.limiter import RequestLimiter
from spxdask.archive.link import Link
from spxdask.archive.pieces import RangeRefusals, ReceivedPieces, fetch_pieces
from spxdask.archive.received import FileVersion, ReceivedFile
from spxdask.archive.retry import RetryPolicy
from spxdask.archive.s3 import open_bucket
from spxdask.archive.transfer import fetch_file
from spxdask.errors import ArchiveError, FileChangedError, RangesRefusedError
from spxdask.science.level2.spans import Spans
from spxdask.simulate.archive import BUCKET, Fault, SimulatedArchive, Traffic

SIZE = 400_000
HEAD = [(0, 6_000)]
# Farther from one another than any gap that is read along.
ROWS = [(50_000, 60_000), (150_000, 151_000), (250_000, 280_000)]
N_BYTES = 41_000


class NoGaps(Link):
    """A link on which one more request costs nothing."""

    cheap_gap_bytes = 0


@dataclass(frozen=True, kw_only=True)
class RecordingPolicy(RetryPolicy):
    """A policy that records what it is asked for, and does not wait."""

    max_retries: int = 3
    calls: list[tuple[int, str | None]] = field(default_factory=list)

    def delay(self, attempt, retry_after=None):
        self.calls.append((attempt, retry_after))
        return 0.0


@pytest.fixture(scope="module")
def content():
    return np.random.default_rng(13).bytes(SIZE)


@pytest.fixture(scope="module")
def changed_content():
    return np.random.default_rng(31).bytes(SIZE)


@pytest.fixture(scope="module")
def frame(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "frame.fits"
    path.write_bytes(content)
    return archived_frame(path)


@pytest.fixture
def refusals():
    return RangeRefusals()


def receive(size=SIZE, memory_bytes=SIZE):
    return ReceivedPieces(memoryview(bytearray(memory_bytes)), expected_size=size)


def fetch(url, received, spans, refusals=None, retries=3, **options):
    defaults = {
        "retry": RetryPolicy(max_retries=retries, first_delay_s=0.001),
        "stall_timeout_s": 10.0,
        "link": NoGaps(),
        "refusals": refusals or RangeRefusals(),
        "limiter": RequestLimiter(),
    }
    fetch_pieces(url, received, spans, **defaults | options)


def fetch_whole(url, received, retries=3, stall_timeout_s=10.0):
    def check(received):
        received.check_size(received.size)
        return bytes(received.content)

    retry = RetryPolicy(max_retries=retries, first_delay_s=0.001)
    return fetch_file(url, received, check, retry=retry, stall_timeout_s=stall_timeout_s)


def at(archive, frame):
    return f"{archive.url}/{frame.uri}"


def statuses(archive):
    return sorted(request.status for request in archive.requests)


def assert_holds(received, content, spans):
    for start, stop in spans:
        assert received.held.holds(start, stop)
    for start, stop in received.held:
        assert received.memory[start:stop] == content[start:stop]


class Server(ThreadingHTTPServer):
    """A server that takes one (status, headers, body) of an iterator a request."""

    def __init__(self, answers):
        self.answers, self.log = iter(answers), []
        super().__init__(("127.0.0.1", 0), Script)
        self.url = f"http://127.0.0.1:{self.server_port}/frame.fits"

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
        status, headers, body = next(self.server.answers)
        self.send_response(status)
        self.send_header("Connection", "close")
        for name, value in ({"Content-Length": len(body)} | headers).items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def part(content, start, stop, total=SIZE, **headers):
    said = {"Content-Range": f"bytes {start}-{stop - 1}/{total}", "ETag": '"a"'}
    return 206, said | headers, content[start:stop]


# What works


def test_pieces_come_in_rounds_of_requests(frame, content):
    received = receive()
    with SimulatedArchive([frame]) as archive:
        fetch(at(archive, frame), received, HEAD)
        fetch(at(archive, frame), received, [*ROWS, *HEAD])
        fetch(at(archive, frame), received, ROWS)
        assert archive.traffic["range"] == Traffic(4, N_BYTES + 6_000)
        assert archive.sent_bytes == N_BYTES + 6_000
    assert_holds(received, content, HEAD + ROWS)
    assert received.held == Spans(HEAD + ROWS)
    assert (received.attempts, received.n_requests, received.n_bytes) == (1, 4, N_BYTES + 6_000)
    assert received.total == SIZE
    assert received.version.strong_etag


def test_bytes_between_pieces_are_read_where_that_is_cheaper(frame, content):
    received = receive()
    near = [(10_000, 20_000), (21_000, 50_000), (80_000, 90_000)]
    # 50 kB come in the time of a request, and 30 kB are more than a twentieth of all.
    with SimulatedArchive([frame]) as archive:
        fetch(at(archive, frame), received, near, link=Link(latency_s=0.05, bandwidth=1e6))
    assert list(received.held) == [(10_000, 50_000), (80_000, 90_000)]
    assert_holds(received, content, near)
    assert (received.n_requests, received.n_bytes) == (2, 50_000)


@pytest.mark.parametrize("total", [SIZE, "*"])
def test_a_file_of_unknown_length(content, total):
    received = receive(None, 2 * SIZE)
    with Server([part(content, 0, SIZE, total), part(content, 7, 9, total)]) as server:
        fetch(server.url, received, [(0, 2 * SIZE)] if total == SIZE else [(0, SIZE)])
        if total == "*":
            return
        fetch(server.url, received, [(7, SIZE + 1)])
        with pytest.raises(ArchiveError, match="has 400000 bytes, and is needed from byte 400000"):
            fetch(server.url, received, [(SIZE, SIZE + 1)])
        assert len(server.log) == 1
    assert received.total == SIZE


def test_all_of_a_short_file_is_no_refusal(frame, content, refusals):
    received = receive(None, 2 * SIZE)
    with Server([(200, {"ETag": '"a"'}, content)]) as server:
        fetch(server.url, received, [(0, 500_000)], refusals)
        assert refusals.find(server.url) is None
    assert list(received.held) == [(0, SIZE)]
    assert received.memory[:SIZE] == content


# One version


@pytest.mark.parametrize(
    ("headers", "condition"),
    [
        ({"ETag": '"a"', "Last-Modified": "Thu"}, '"a"'),
        ({"ETag": 'W/"a"', "Last-Modified": "Thu"}, "Thu"),
        ({"ETag": None, "Last-Modified": "Thu"}, "Thu"),
    ],
)
def test_the_version_is_asked_for(content, headers, condition):
    received = receive()
    later = headers | ({} if condition == '"a"' else {"Last-Modified": None})
    answers = [part(content, 0, 6_000, **headers), part(content, 7_000, 8_000, **later)]
    with Server(answers) as server:
        fetch(server.url, received, HEAD)
        fetch(server.url, received, [(7_000, 8_000)])
        assert server.log == [("bytes=0-5999", None), ("bytes=7000-7999", condition)]
    assert_holds(received, content, [*HEAD, (7_000, 8_000)])


CHANGED = [Fault(changed=True), Fault(unconditional=True)]


@pytest.mark.parametrize("fault", CHANGED, ids=repr)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_file_that_is_changed_in_between_starts_over(frame, content, fault, which, refusals):
    plan = [Fault()] * (which + 1) + [fault]
    received, policy = receive(), RecordingPolicy()
    with SimulatedArchive([frame], faults={frame.uri: plan}) as archive:
        fetch(at(archive, frame), received, HEAD, refusals)
        with pytest.raises(FileChangedError, match="changed"):
            fetch(at(archive, frame), received, ROWS, refusals, retry=policy)
        assert (list(received.held), received.total, received.version) == ([], None, FileVersion())
        assert (received.attempts, received.whole, policy.calls) == (2, None, [(1, None)])
        fetch(at(archive, frame), received, ROWS, refusals)
        assert refusals.find(at(archive, frame)) is None
    assert_holds(received, content, ROWS)


def test_pieces_of_the_new_file_are_not_joined_to_those_of_the_old(
    frame, changed_content, content, tmp_path
):
    path = tmp_path / "new.fits"
    path.write_bytes(changed_content)
    received = receive()
    with SimulatedArchive([frame]) as archive:
        fetch(at(archive, frame), received, HEAD)
        archive.replace_file(frame.uri, path)
        with pytest.raises(FileChangedError):
            fetch(at(archive, frame), received, ROWS)
        fetch(at(archive, frame), received, HEAD + ROWS)
        assert_holds(received, changed_content, HEAD + ROWS)
        with pytest.raises(KeyError):
            archive.replace_file("none", path)


def test_answers_of_one_round_are_of_one_version(frame, content):
    with SimulatedArchive([frame], faults={frame.uri: [Fault(unconditional=True)]}) as archive:
        received = receive()
        with pytest.raises(FileChangedError):
            fetch(at(archive, frame), received, ROWS)
        assert list(received.held) == []


def test_another_length_is_another_version(content):
    received = receive(None)
    with Server([part(content, 0, 10), part(content, 20, 30, SIZE - 1)]) as server:
        fetch(server.url, received, [(0, 10)])
        with pytest.raises(FileChangedError):
            fetch(server.url, received, [(20, 30)])


def test_a_file_that_changes_with_each_request_is_fetched_whole(frame, content, refusals):
    # As of several servers that make up ETags of their own.
    tags = itertools.cycle([Fault(), Fault(unconditional=True)])
    received = receive()

    def read(url):
        while True:
            with suppress(FileChangedError):
                fetch(url, received, HEAD, refusals)
                fetch(url, received, ROWS, refusals)

    with SimulatedArchive([frame], faults={frame.uri: tags}) as archive:
        with pytest.raises(RangesRefusedError, match="changed"):
            read(at(archive, frame))
        assert received.attempts == 3
        assert fetch_whole(at(archive, frame), received.take_whole()) == content


# What passes by itself

TRANSIENT = [
    *(Fault(status=status, retry_after_s=0) for status in (408, 416, 425, 429, 500, 503, 504)),
    Fault(html=True),
    Fault(truncate=0),
    Fault(truncate=300),
    Fault(short_range=300),
    Fault(wrong_range=300),
    Fault(wrong_range=-300),
    Fault(multipart=True),
    Fault(redirect="http://127.0.0.1:9/"),
]


@pytest.mark.parametrize("fault", TRANSIENT, ids=repr)
def test_it_is_tried_again(frame, content, fault, refusals):
    received = receive()
    # The first answer, one of the next, and one of those to what was asked for again.
    plan = [fault, Fault(), Fault(), fault, Fault(), fault]
    with SimulatedArchive([frame], faults={frame.uri: plan}) as archive:
        fetch(at(archive, frame), received, HEAD, refusals)
        assert received.attempts == 2
        fetch(at(archive, frame), received, ROWS, refusals, retries=5)
        assert refusals.find(at(archive, frame)) is None
        assert len(archive.requests) == received.n_requests == 2 + 3 + 2
    assert (received.attempts, received.whole) == (4, None)
    assert received.held == Spans(HEAD + ROWS)
    assert_holds(received, content, HEAD + ROWS)


@pytest.mark.parametrize(
    "fault",
    [Fault(truncate=300), Fault(stall=300), Fault(short_range=300)],
    ids=repr,
)
def test_a_broken_piece_goes_on_from_where_it_stopped(frame, content, fault):
    received = receive()
    with SimulatedArchive([frame], faults={frame.uri: [fault]}) as archive:
        options = {} if fault.stall is None else {"stall_timeout_s": 0.5}
        fetch(at(archive, frame), received, [(1_000, 2_000)], **options)
        assert archive.traffic["range"] == Traffic(2, 1_000)
    assert (received.attempts, received.n_requests, received.n_bytes) == (2, 2, 1_000)
    assert_holds(received, content, [(1_000, 2_000)])


@pytest.mark.parametrize(
    "fault",
    [
        *(Fault(status=status) for status in (401, 404, 410, 429, 503)),
        Fault(html=True),
        Fault(truncate=0),
        Fault(stall=0),
        Fault(redirect="http://127.0.0.1:9/"),
        Fault(redirect="file:///etc/passwd"),
        Fault(short=SIZE - 1),
    ],
    ids=repr,
)
def test_a_failure_has_the_words_that_it_has_for_whole_files(frame, fault, refusals):
    received, whole = receive(), ReceivedFile(memoryview(bytearray(SIZE)), SIZE)
    with SimulatedArchive([frame], faults={frame.uri: itertools.repeat(fault)}) as archive:
        url = at(archive, frame)
        stall_timeout_s = 10.0 if fault.stall is None else 0.2
        with pytest.raises(ArchiveError) as of_pieces:
            fetch(url, received, HEAD, refusals, retries=1, stall_timeout_s=stall_timeout_s)
        with pytest.raises(ArchiveError) as of_whole:
            fetch_whole(url, whole, retries=1, stall_timeout_s=stall_timeout_s)
        assert refusals.find(url) is None
    assert str(of_pieces.value) == str(of_whole.value)
    assert of_pieces.value.blame == of_whole.value.blame
    assert received.attempts == whole.attempts


def test_the_archive_says_how_long_to_wait(frame, content):
    policy, received = RecordingPolicy(), receive()
    plan = [Fault(status=503, retry_after_s=7), Fault(status=429), Fault()]
    with SimulatedArchive([frame], faults={frame.uri: plan}) as archive:
        fetch(at(archive, frame), received, ROWS, retry=policy)
    # One attempt for a round, whatever number of its requests failed.
    assert sorted(policy.calls, key=str) == [(1, "7"), (1, None)]
    assert received.attempts == 2
    assert_holds(received, content, ROWS)


def test_redirects_are_followed(frame, content):
    received = receive()
    with SimulatedArchive([frame]) as archive:
        archive.add_faults("moved", itertools.repeat(Fault(redirect=f"/{frame.uri}")))
        fetch(f"{archive.url}/moved", received, ROWS)
    assert_holds(received, content, ROWS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"Content-Range": None},
        {"Content-Range": "bytes 0-5999"},
        {"Content-Range": "bytes 5999-0/400000"},
        {"Content-Range": "rows 0-5999/400000"},
        {"Content-Range": f"bytes 0-{'9' * 5000}/*"},
        {"Content-Range": "bytes 0-6000/400000"},
        {"Content-Range": "bytes 0-5999/5999"},
        {"Content-Encoding": "gzip"},
    ],
    ids=str,
)
def test_an_answer_that_is_no_such_range(content, wrong):
    received = receive()
    with Server([part(content, 0, 6_000, **wrong), part(content, 0, 6_000)]) as server:
        fetch(server.url, received, HEAD)
    assert received.attempts == 2
    assert_holds(received, content, HEAD)


def test_more_bytes_than_were_asked_for(content):
    received = receive()
    chunked = {"Content-Length": None, "Transfer-Encoding": "chunked"}
    status, headers, _ = part(content, 0, 6_000, **chunked)
    more = b"%x\r\n%b\r\n0\r\n\r\n" % (6_001, content[:6_001])
    with Server([(status, headers, more), part(content, 0, 6_000)]) as server:
        fetch(server.url, received, HEAD)
    assert received.attempts == 2
    assert received.memory[6_000] == 0
    assert_holds(received, content, HEAD)


# Servers without ranges


def test_a_server_that_ignores_ranges_is_asked_for_none_again(frame, content, refusals):
    received, other = receive(), receive()
    lasting = itertools.repeat(Fault(no_range=True))
    with SimulatedArchive([frame], faults={frame.uri: lasting}) as archive:
        url = at(archive, frame)
        with pytest.raises(RangesRefusedError, match="whole files instead of the parts"):
            fetch(url, received, HEAD, refusals)
        whole = received.take_whole()
        assert (whole.is_complete, whole.size, whole.attempts) == (True, SIZE, 1)
        # What was sent is taken.
        assert fetch_whole(url, whole) == content
        assert archive.traffic["file"] == Traffic(1, SIZE)
        with pytest.raises(RangesRefusedError):
            fetch(url, other, HEAD, refusals)
        assert other.attempts == 0
        assert statuses(archive) == [200]
        refusals.begin("")
        assert refusals.find(url) is not None
        refusals.begin("another run")
        assert refusals.find(url) is None
    assert (received.n_requests, received.n_bytes, whole.n_bytes) == (1, 0, SIZE)


def test_of_requests_at_once_one_whole_file_is_read(frame, content, refusals):
    received = receive()
    plan = [Fault(), *[Fault(no_range=True)] * 3]
    with SimulatedArchive([frame], faults={frame.uri: plan}) as archive:
        fetch(at(archive, frame), received, HEAD, refusals)
        with pytest.raises(RangesRefusedError):
            fetch(at(archive, frame), received, ROWS, refusals)
        whole = received.take_whole()
        assert fetch_whole(at(archive, frame), whole) == content
        assert whole.n_requests == 0
    assert list(received.held) == []


@pytest.mark.parametrize("status", [400, 403, 405, 406, 501])
def test_a_server_that_forbids_ranges(frame, content, status, refusals):
    received = receive()
    lasting = itertools.repeat(Fault(range_status=status))
    with SimulatedArchive([frame], faults={frame.uri: lasting}) as archive:
        url = at(archive, frame)
        with pytest.raises(RangesRefusedError, match=f"HTTP {status} "):
            fetch(url, received, ROWS, refusals)
        assert refusals.find(url)
        assert fetch_whole(url, received.take_whole()) == content
        assert statuses(archive)[0] == 200
        assert statuses(archive).count(200) == 1


def test_a_file_that_is_forbidden_says_nothing_of_ranges(frame, refusals):
    received = receive()
    lasting = itertools.repeat(Fault(status=403))
    with SimulatedArchive([frame], faults={frame.uri: lasting}) as archive:
        with pytest.raises(ArchiveError, match="HTTP 403") as caught:
            fetch(at(archive, frame), received, ROWS, refusals)
        assert refusals.find(at(archive, frame)) is None
        # Once for each span, and once whole.
        assert len(archive.requests) == len(ROWS) + 1
    assert (caught.value.blame, received.attempts, received.whole) == ("frame", 1, None)


def test_without_a_version_pieces_cannot_be_joined(frame, content, refusals):
    received = receive()
    lasting = itertools.repeat(Fault(no_version=True))
    with SimulatedArchive([frame], faults={frame.uri: lasting}) as archive:
        with pytest.raises(RangesRefusedError, match="no version"):
            fetch(at(archive, frame), received, HEAD, refusals)
        assert fetch_whole(at(archive, frame), received.take_whole()) == content
        assert archive.traffic["file"] == Traffic(1, SIZE)


def test_wrong_ranges_and_other_faults_in_turn(frame, content, refusals):
    # The last attempt but one fails for another reason.
    plan = [Fault(wrong_range=5), Fault(status=503, retry_after_s=0), Fault(wrong_range=5)]
    received = receive()
    with SimulatedArchive([frame], faults={frame.uri: plan}) as archive:
        with pytest.raises(RangesRefusedError):
            fetch(at(archive, frame), received, HEAD, refusals, retries=2)
        assert fetch_whole(at(archive, frame), received.take_whole()) == content
        assert statuses(archive) == [200, 206, 206, 503]


@pytest.mark.parametrize(
    "fault",
    [Fault(wrong_range=5), Fault(multipart=True), Fault(short_range=1), Fault(range_status=416)],
    ids=repr,
)
def test_the_last_attempt_is_made_without_ranges(frame, content, fault, refusals):
    received = receive()
    with SimulatedArchive([frame], faults={frame.uri: itertools.repeat(fault)}) as archive:
        with pytest.raises(RangesRefusedError):
            fetch(at(archive, frame), received, HEAD, refusals, retries=2)
        assert statuses(archive).count(200) == 1
        assert len(archive.requests) == 3
        assert fetch_whole(at(archive, frame), received.take_whole()) == content


def test_a_whole_file_that_breaks_off_is_gone_on_with(content, refusals):
    received = receive()
    length = {"Content-Length": SIZE, "ETag": '"a"'}

    def answers():
        yield 200, length, content[:300_000]
        first = int(server.log[-1][0][6:-1])
        yield part(content, first, SIZE)

    with Server(answers()) as server:
        with pytest.raises(RangesRefusedError):
            fetch(server.url, received, HEAD, refusals)
        whole = received.take_whole()
        assert not whole.is_complete
        assert fetch_whole(server.url, whole) == content
    assert whole.attempts == 2


def test_a_whole_file_that_is_encoded(content, refusals):
    received = receive()
    packed = gzip.compress(content)
    with Server([(200, {"Content-Encoding": "gzip", "ETag": '"a"'}, packed)]) as server:
        with pytest.raises(RangesRefusedError):
            fetch(server.url, received, HEAD, refusals)
        assert fetch_whole(server.url, received.take_whole()) == content


def test_of_a_new_file_nothing_is_read_only_to_be_dropped(content, refusals):
    received = receive()
    # It would be a long wait for its second half.
    new = 200, {"ETag": '"b"', "Content-Length": SIZE}, content[: SIZE // 2]
    with Server([part(content, 0, 6_000), new]) as server:
        fetch(server.url, received, HEAD, refusals)
        with pytest.raises(FileChangedError):
            fetch(server.url, received, ROWS[:1], refusals)
    assert received.n_bytes == 6_000


# Requests at once


def test_requests_at_once_are_limited_for_pieces_and_whole_files_together(frame, content):
    limiter = RequestLimiter(2)
    many = [(start, start + 10) for start in range(0, SIZE, 20_000)]

    def get_pieces(archive):
        received = receive()
        fetch(at(archive, frame), received, many, limiter=limiter)
        assert_holds(received, content, many)

    def get_whole(archive):
        received = ReceivedFile(memoryview(bytearray(SIZE)), SIZE)
        options = {"retry": RetryPolicy(max_retries=0), "stall_timeout_s": 9}
        fetch_file(at(archive, frame), received, ReceivedFile.discard, limiter=limiter, **options)

    with SimulatedArchive([frame], latency_s=0.005) as archive, ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(job, archive) for job in (get_pieces, get_whole) * 2]
        for job in jobs:
            job.result()
        assert archive.peak_connections <= 2
        assert len(archive.requests) == 2 * len(many) + 2


# Other ways


def test_pieces_of_a_file_on_disk(content, changed_content, tmp_path):
    path = tmp_path / "frame.fits"
    path.write_bytes(content)
    received = receive(None, 2 * SIZE)
    fetch(path.as_uri(), received, HEAD)
    fetch(path.as_uri(), received, [*ROWS, (SIZE - 5, SIZE + 5)])
    assert_holds(received, content, [*HEAD, *ROWS, (SIZE - 5, SIZE)])
    assert (received.n_requests, received.n_bytes) == (5, 6_000 + N_BYTES + 5)
    assert (received.total, received.attempts) == (SIZE, 1)

    status = path.stat()
    path.write_bytes(changed_content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(FileChangedError):
        fetch(path.as_uri(), received, [(70_000, 70_001)])
    fetch(path.as_uri(), received, ROWS)
    assert_holds(received, changed_content, ROWS)
    # As long ago, but of another length.
    path.write_bytes(content[:-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(FileChangedError):
        fetch(path.as_uri(), received, [(70_000, 70_001)])


def test_files_on_disk_that_are_not_as_they_should_be(content, tmp_path):
    path = tmp_path / "frame.fits"
    with pytest.raises(ArchiveError, match="No such file") as caught:
        fetch(path.as_uri(), receive(), HEAD)
    assert caught.value.blame == "frame"
    path.write_bytes(content[:5_000])
    for spans in (HEAD, ROWS):
        with pytest.raises(ArchiveError, match="has 5000 bytes"):
            fetch(path.as_uri(), receive(), spans, retries=2)


@pytest.fixture
def clean_buckets():
    open_bucket.cache_clear()
    yield
    open_bucket.cache_clear()


def test_pieces_of_an_object(content, changed_content, clean_buckets):
    received, url = receive(None), f"s3://{BUCKET_OF_MOTO}/frame.fits"
    with serving() as store:
        store.pipe_file(url, content)
        fetch(url, received, HEAD)
        fetch(url, received, [*ROWS, (SIZE - 5, SIZE + 5)])
        assert_holds(received, content, [*HEAD, *ROWS, (SIZE - 5, SIZE)])
        assert (received.n_requests, received.n_bytes) == (5, 6_000 + N_BYTES + 5)
        assert received.total == SIZE
        store.pipe_file(url, changed_content)
        with pytest.raises(FileChangedError):
            fetch(url, received, [(70_000, 70_001)])
        fetch(url, received, ROWS)
        assert_holds(received, changed_content, ROWS)
        assert received.attempts == 2
        with pytest.raises(ArchiveError) as caught:
            fetch(f"s3://{BUCKET_OF_MOTO}/none.fits", receive(), HEAD)
        assert caught.value.blame == "frame"


@pytest.fixture
def bucket(frame, clean_buckets):
    """Return the simulated bucket with some faults, and the URL of a file in it."""
    uri = frame.uri.removeprefix("ibe/data/spherex/")
    return (
        lambda faults: SimulatedArchive([frame], faults={f"{BUCKET}/{uri}": faults}),
        f"s3://{BUCKET}/{uri}",
    )


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503),
        Fault(status=416),
        Fault(truncate=300),
        Fault(stall=300),
        Fault(short_range=300),
        Fault(wrong_range=300),
    ],
    ids=repr,
)
def test_faults_of_a_bucket_pass(content, bucket, fault, refusals):
    serve, url = bucket
    received = receive()
    with serve([fault, Fault(), Fault(), fault]) as archive:
        stall_timeout_s = 10.0 if fault.stall is None else 3.0
        options = {"endpoint": archive.url, "stall_timeout_s": stall_timeout_s}
        fetch(url, received, HEAD, refusals, **options)
        fetch(url, received, ROWS, refusals, **options)
        assert_holds(received, content, HEAD + ROWS)
        assert received.n_bytes == N_BYTES + 6_000
        assert len(archive.requests) == received.n_requests == 6
    assert (received.attempts, received.whole) == (3, None)


@pytest.mark.parametrize("fault", CHANGED, ids=repr)
def test_an_object_that_is_changed_in_between(content, bucket, fault):
    serve, url = bucket
    received = receive()
    with serve([Fault(), Fault(), fault]) as archive:
        fetch(url, received, HEAD, endpoint=archive.url)
        with pytest.raises(FileChangedError):
            fetch(url, received, ROWS, endpoint=archive.url)
        assert (list(received.held), received.attempts) == ([], 2)
        fetch(url, received, ROWS, endpoint=archive.url)
    assert_holds(received, content, ROWS)


@pytest.mark.parametrize("fault", [Fault(no_range=True), Fault(range_status=501)], ids=repr)
def test_a_bucket_without_ranges(content, bucket, fault, refusals):
    serve, url = bucket
    received = receive()
    with serve(itertools.repeat(fault)) as archive:
        with pytest.raises(RangesRefusedError):
            fetch(url, received, ROWS, refusals, endpoint=archive.url)
        whole = received.take_whole()
        assert (whole.is_complete, whole.content) == (True, content)
        assert refusals.find(url)
