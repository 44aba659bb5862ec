"""Queries of TAP services: the simulated archive's, and servers that answer by script."""

from __future__ import annotations

import errno
import itertools
import logging
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from archived import archived_frame

from spxdask.archive.retry import RetryPolicy
from spxdask.archive.tap import TapOptions, run_adql
from spxdask.errors import ArchiveError, TruncatedAnswerError
from spxdask.simulate.archive import Fault, SimulatedArchive
from spxdask.simulate.tap import error_votable

URI_ADQL = "SELECT uri FROM spherex.artifact"
ADQL = (
    "SELECT a.uri, a.contentlength FROM spherex.plane AS p "
    "INNER JOIN spherex.artifact AS a ON a.planeid = p.planeid "
    "WHERE INTERSECTS(p.poly, CIRCLE('ICRS', 10.0, 0.0, 0.5)) = 1"
)


def options(max_retries=2, **limits):
    """Options with which a query waits hardly at all between attempts and polls."""
    retry = RetryPolicy(max_retries=max_retries, first_delay_s=0.001)
    return TapOptions(**{"retry": retry, "first_poll_s": 0.001} | limits)


@dataclass(frozen=True, kw_only=True)
class RecordingPolicy(RetryPolicy):
    """A policy that records its delays and does not wait."""

    max_retries: int = 2
    delays: list[float] = field(default_factory=list)

    def delay(self, attempt, retry_after=None):
        self.delays.append(super().delay(attempt, retry_after))
        return 0.0


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "frame.fits"
    path.write_bytes(b"x" * 5000)
    return [archived_frame(path, slew, detector) for slew in (1, 2) for detector in (3, 4)]


def run(archive, patience=None):
    return run_adql(archive.tap_url, ADQL, patience or options())


def tap_requests(archive):
    return [(r.method, r.path.removeprefix("/TAP/"), r.status) for r in archive.requests]


# What goes wrong

ALWAYS_502 = itertools.repeat(Fault(status=502))
SYNC, JOB, RESULT = "TAP/sync", "TAP/async/1", "TAP/async/1/results/result"
BROKEN = [
    Fault(status=502),
    Fault(status=503, retry_after_s=0),
    Fault(status=429, retry_after_s=0),
    Fault(status=500),
    Fault(html=True),
    Fault(truncate=700),
    Fault(short=700),
    Fault(short=0),
    Fault(garbage=True),
]


@pytest.mark.parametrize("fault", BROKEN, ids=repr)
def test_sync_is_tried_again(frames, fault):
    with SimulatedArchive(frames, faults={SYNC: [fault, fault]}) as archive:
        assert len(run(archive)) == 4
        assert [path for _, path, _ in tap_requests(archive)] == ["sync"] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "fault"),
    [
        (where, fault)
        for where in ("TAP/async", JOB, f"{JOB}/phase", RESULT)
        for fault in BROKEN
        # A page in place of a new job leads to the list of jobs, which this archive lacks.
        if not (where == "TAP/async" and fault.html)
    ],
    ids=repr,
)
def test_every_step_of_a_job_is_tried_again(frames, where, fault):
    with SimulatedArchive(frames, faults={SYNC: ALWAYS_502, where: [fault, fault]}) as archive:
        assert len(run(archive)) == 4
        assert tap_requests(archive)[-1][0] == "DELETE"


@pytest.mark.parametrize("fault", BROKEN, ids=repr)
def test_a_service_that_stays_broken_is_one_sentence(frames, fault):
    lasting = {where: itertools.repeat(fault) for where in (SYNC, "TAP/async", RESULT)}
    with SimulatedArchive(frames, faults=lasting) as archive:
        with pytest.raises(ArchiveError, match="TAP service") as caught:
            run(archive, options(1))
        assert sum(path == "sync" for _, path, _ in tap_requests(archive)) == 2
    assert not isinstance(caught.value, TruncatedAnswerError)
    assert "\n" not in str(caught.value)


def test_no_part_of_an_answer_is_taken_for_the_whole(frames):
    text = ADQL
    with SimulatedArchive(frames) as archive:
        size = len(body_of(archive, text))
        for cut in range(0, size, 41):
            archive.add_faults(SYNC, [Fault(short=cut)])
            archive.add_faults("TAP/async", [Fault(status=400)])
            with pytest.raises(ArchiveError):
                run_adql(archive.tap_url, text, options(0))
        assert len(run_adql(archive.tap_url, text, options(0))) == 4


def body_of(archive, text):
    form = {"LANG": "ADQL", "QUERY": text}
    with requests.post(f"{archive.tap_url}/sync", data=form, timeout=10) as answer:
        return answer.content


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/TAP"
        with pytest.raises(ArchiveError) as caught:
            run_adql(url, URI_ADQL, options(1))
    assert (caught.value.path, caught.value.attempts) == (url, 2)
    assert str(caught.value) == f"{url}: cannot be reached: connection refused (after 2 attempts)"


def unconnected(monkeypatch, error):
    """Have no connection come about, because of this; return the list of attempts."""
    attempts = []

    def connect(address, *_, **__):
        attempts.append(address)
        raise error

    monkeypatch.setattr("urllib3.util.connection.create_connection", connect)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return attempts


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "name or service not"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "network is unreachable"),
        (TimeoutError("timed out"), "no connection within 20 s"),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), "connection timed out"),
    ],
)
def test_a_service_that_cannot_be_reached_is_not_asked_for_a_job(monkeypatch, error, says):
    attempts = unconnected(monkeypatch, error)
    with pytest.raises(ArchiveError, match=f"^http://archive.test/TAP: cannot be reached: {says}"):
        run_adql("http://archive.test/TAP", URI_ADQL, options())
    assert len(attempts) == 3


def test_a_proxy_that_cannot_be_reached(monkeypatch):
    unconnected(monkeypatch, ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"))
    monkeypatch.setenv("http_proxy", "http://me:secret@proxy.test:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(ArchiveError) as caught:
        run_adql("http://archive.test/TAP", URI_ADQL, options(0))
    assert caught.value.reason == "cannot be reached: the proxy: connection refused"
    assert caught.value.attempts == 1


@pytest.mark.parametrize("status", [401, 502])
def test_passwords_are_not_shown(frames, caplog, status):
    caplog.set_level(logging.INFO, logger="spxdask")
    lasting = {
        f"TAP/{where}": itertools.repeat(Fault(status=status)) for where in ("sync", "async")
    }
    with SimulatedArchive(frames, faults=lasting, maxrec=3) as archive:
        url = archive.tap_url.replace("//", "//me:secret@")
        with pytest.raises(ArchiveError) as caught:
            run_adql(url, ADQL, options(1))
        messages = [str(caught.value)]
    with SimulatedArchive(frames, maxrec=3) as archive:
        url = archive.tap_url.replace("//", "//me:secret@")
        with pytest.raises(TruncatedAnswerError) as caught:
            run_adql(url, ADQL, options(1))
        messages.append(str(caught.value))
    with pytest.raises(ArchiveError, match="cannot be reached") as caught:
        run_adql(url, URI_ADQL, options(0))
    messages.append(str(caught.value))
    for text in (*messages, *(record.getMessage() for record in caplog.records)):
        assert "secret" not in text


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize(
    "text", ["SELECT nonsense FROM spherex.plane", "DROP TABLE x", URI_ADQL + ";"]
)
def test_bad_adql_is_sent_once(frames, status, text):
    with SimulatedArchive(frames, query_error_status=status) as archive:
        with pytest.raises(ArchiveError, match="the TAP service rejected the query: "):
            run_adql(archive.tap_url, text, options(5))
        assert tap_requests(archive) == [("POST", "sync", status)]


def test_bad_adql_as_a_job_is_sent_once(frames):
    faults = {SYNC: [Fault(status=502)]}
    with SimulatedArchive(frames, faults=faults) as archive:
        with pytest.raises(ArchiveError, match=r"ended as ERROR: .*nonsense"):
            run_adql(archive.tap_url, "SELECT nonsense FROM spherex.plane", options(0))
        requests = tap_requests(archive)
    assert [r for r in requests if r[0] == "POST"] == [
        ("POST", "sync", 502), ("POST", "async", 303), ("POST", "async/1/phase", 303),
    ]  # fmt: skip
    assert requests[-1] == ("DELETE", "async/1", 303)


@pytest.mark.parametrize(("where", "n"), [("sync", 1), ("async", 1)])
@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_is_final(frames, where, n, status):
    faults = {f"TAP/{where}": itertools.repeat(Fault(status=status))}
    with SimulatedArchive(frames, faults=faults, sync_limit_rows=1) as archive:
        with pytest.raises(ArchiveError, match=f"refused the query: {status}"):
            run_adql(archive.tap_url, ADQL, options(5))
        assert [path for _, path, _ in tap_requests(archive)].count(where) == n
        assert len(archive.requests) == (1 if where == "sync" else 2)


@pytest.mark.parametrize(("asked", "delay"), [(0, 0), (7, 7), (86400, 600)])
def test_the_archive_says_how_long_to_wait(frames, asked, delay):
    policy = RecordingPolicy()
    faults = [Fault(status=s, retry_after_s=asked) for s in (503, 429)]
    with SimulatedArchive(frames, faults={SYNC: faults}) as archive:
        assert len(run(archive, options(retry=policy))) == 4
    assert policy.delays == [delay, delay]


def test_an_answer_that_takes_too_long_becomes_a_job(frames):
    faults = {SYNC: itertools.repeat(Fault(stall=100))}
    with SimulatedArchive(frames, faults=faults) as archive:
        assert len(run(archive, options(5, sync_timeout_s=0.2))) == 4
        assert [path for _, path, _ in tap_requests(archive)].count("sync") == 1


# Truncated answers


def test_a_cut_sync_answer_becomes_a_job(frames):
    with SimulatedArchive(frames, sync_limit_rows=3) as archive:
        assert len(run(archive)) == 4
        assert tap_requests(archive)[-1] == ("DELETE", "async/1", 303)


def test_a_cut_job_is_an_error(frames):
    with SimulatedArchive(frames, maxrec=3) as archive:
        with pytest.raises(TruncatedAnswerError, match="truncated at 3 rows"):
            run(archive)
        assert tap_requests(archive)[-1] == ("DELETE", "async/1", 303)


def votable(place=None, value="OVERFLOW", name="QUERY_STATUS"):
    info = {place: f'<INFO name="{name}" value="{value}"/>'}
    get = info.get
    return f"""<?xml version="1.0"?>
<VOTABLE version="1.4" xmlns="http://www.ivoa.net/xml/VOTable/v1.3">{get("root", "")}
<RESOURCE type="results">{get("before", "")}
<TABLE><FIELD name="uri" datatype="char" arraysize="*"/>
<DATA><TABLEDATA><TR><TD>x</TD></TR></TABLEDATA></DATA>{get("table", "")}</TABLE>
{get("after", "")}<RESOURCE type="meta">{get("nested", "")}</RESOURCE></RESOURCE>
<RESOURCE type="meta">{get("other", "")}</RESOURCE>{get("end", "")}</VOTABLE>""".encode()


@contextmanager
def scripted(*answers):
    """A server that gives one (status, headers, body) a request; yields its URL and log."""
    left = iter(answers)
    log = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            log.append(f"{self.command} {self.path}")
            status, headers, body = next(left, (410, {}, b"nothing more"))
            self.send_response(status)
            for key, value in (
                {"Content-Length": len(body), "Connection": "close"} | headers
            ).items():
                self.send_header(key, str(value))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_DELETE = do_POST  # noqa: N815

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/TAP", log
        finally:
            server.shutdown()
            thread.join()


XML = {"Content-Type": "application/x-votable+xml"}


@pytest.mark.parametrize("value", ["OVERFLOW", "overflow"])
@pytest.mark.parametrize("place", ["root", "before", "table", "after", "nested", "other", "end"])
def test_overflow_is_seen_wherever_it_stands(place, value):
    with scripted((200, XML, votable(place, value))) as (url, log):
        # The job that follows is refused.
        with pytest.raises(ArchiveError, match="410"):
            run_adql(url, URI_ADQL, options(0))
        assert log == ["POST /TAP/sync", "POST /TAP/async"]


@pytest.mark.parametrize("place", ["root", "before", "table", "after"])
def test_an_answer_that_says_ok_is_whole(place):
    with scripted((200, XML, votable(place, "OK"))) as (url, log):
        assert list(run_adql(url, URI_ADQL, options(0))["uri"]) == ["x"]
        assert log == ["POST /TAP/sync"]


def test_another_info_that_says_overflow_is_none():
    with scripted((200, XML, votable("after", name="REMARK"))) as (url, _):
        assert len(run_adql(url, URI_ADQL, options(0))) == 1


@pytest.mark.parametrize(
    ("content_type", "body"),
    [("text/plain", b"column nonsense is unknown"), ("text/html", b"<html>Bad Request</html>")],
)
def test_bad_adql_told_otherwise_is_sent_once(content_type, body):
    with scripted((400, {"Content-Type": content_type}, body)) as (url, log):
        with pytest.raises(ArchiveError, match="refused the query") as caught:
            run_adql(url, URI_ADQL, options(3))
        assert log == ["POST /TAP/sync"]
    assert content_type == "text/html" or "column nonsense" in str(caught.value)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_service_that_speaks_votable_is_asked_again(status):
    busy = (status, XML | {"Retry-After": "0"}, error_votable("too many queries, come back later"))
    with scripted(busy, busy, (200, XML, votable())) as (url, log):
        assert len(run_adql(url, URI_ADQL, options())) == 1
        assert log == ["POST /TAP/sync"] * 3


def test_a_query_error_with_status_500_is_not_sent_again():
    with scripted((500, XML, error_votable("no such column"))) as (url, log):
        with pytest.raises(ArchiveError, match="rejected the query: no such column"):
            run_adql(url, URI_ADQL, options(3))
        assert len(log) == 1


def test_a_page_in_place_of_a_job_is_not_believed_nor_deleted():
    page = (200, {"Content-Type": "text/html"}, b"<html><body>maintenance</body></html>")
    with scripted((503, {}, b""), *[page] * 4) as (url, log):
        with pytest.raises(ArchiveError, match="the query did not become a job"):
            run_adql(url, URI_ADQL, options(0))
        assert not [line for line in log if line.startswith("DELETE")]


def job(phase, more=""):
    return (
        200,
        {"Content-Type": "application/xml"},
        '<uws:job xmlns:uws="http://www.ivoa.net/xml/UWS/v1.0" version="1.1" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
        f"<uws:jobId>1</uws:jobId><uws:phase>{phase}</uws:phase>{more}</uws:job>".encode(),
    )


SEE_JOB = (303, {"Location": "/TAP/async/1"}, b"")


def test_a_job_whose_start_was_not_confirmed_is_not_started_twice():
    answers = [
        (503, {}, b""), SEE_JOB, *[job("PENDING")] * 3, (503, {"Retry-After": "0"}, b""),
        job("QUEUED"), job("EXECUTING"), job("COMPLETED"), (200, XML, votable()), (200, {}, b""),
    ]  # fmt: skip
    with scripted((503, {"Retry-After": "0"}, b""), *answers) as (url, log):
        assert len(run_adql(url, URI_ADQL, options(1))) == 1
    assert log.count("POST /TAP/async/1/phase") == 1
    # No result was named: the standard's place is taken.
    assert log[-2:] == ["GET /TAP/async/1/results/result", "DELETE /TAP/async/1"]


@pytest.mark.parametrize(
    ("phase", "more", "says"),
    [
        ("ERROR", "", "ended as ERROR: no reason given"),
        ("ABORTED", "", "ended as ABORTED"),
        ("ERROR", "<uws:errorSummary><uws:message>out of memory</uws:message></uws:errorSummary>",
         "ended as ERROR: out of memory"),
    ],
)  # fmt: skip
def test_a_job_that_fails_says_why(phase, more, says):
    answers = [(503, {}, b""), SEE_JOB, *[job("QUEUED")] * 3, job(phase, more)]
    with scripted(*answers) as (url, log), pytest.raises(ArchiveError, match=says):
        run_adql(url, URI_ADQL, options(0))
    # The answer to that is lost, which must not hide the reason.
    assert log[-1] == "DELETE /TAP/async/1"


def test_a_job_that_never_ends_is_given_up():
    answers = [(503, {}, b""), SEE_JOB, *[job("EXECUTING")] * 50]
    with scripted(*answers) as (url, log), pytest.raises(ArchiveError, match="did not end within"):
        run_adql(url, URI_ADQL, options(0, job_timeout_s=0.0))
    assert log[-1] == "DELETE /TAP/async/1"


@pytest.mark.parametrize("announced", [60, 500])
def test_a_job_described_in_part_is_asked_again(announced):
    status, headers, body = job("EXECUTING")
    cut = (status, headers | {"Content-Length": announced}, body[:60])
    answers = [SEE_JOB, *[job("QUEUED")] * 2, cut, job("COMPLETED"), (200, XML, votable())]
    with scripted(*[(503, {"Retry-After": "0"}, b"")] * 2, *answers) as (url, log):
        assert len(run_adql(url, URI_ADQL, options(1))) == 1
    assert log.count("GET /TAP/async/1") == 4
