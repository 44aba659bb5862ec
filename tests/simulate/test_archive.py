"""The simulated archive, asked by the clients that the pipeline uses."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from http.client import HTTPConnection, IncompleteRead
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import pytest
import pyvo
import requests
from pyvo.dal.exceptions import DALOverflowWarning, DALQueryError, DALServiceError

from spxdask.simulate.archive import (
    ArchivedFrame,
    Fault,
    LoggedRequest,
    SimulatedArchive,
    Traffic,
)

NEP = (270.0, 66.56)
FOOTPRINT = ((265.6, 64.8), (274.4, 64.8), (275.2, 68.3), (264.8, 68.3))
SOUTH = tuple((ra, -dec) for ra, dec in FOOTPRINT)
FILE_SIZE = 5000

QUERY = (
    "SELECT p.planeid, p.obs_publisher_did, p.energy_bandpassname, p.energy_bounds_lower, "
    "p.energy_bounds_upper, p.time_bounds_lower, p.time_bounds_upper, a.uri, a.contentlength "
    "FROM spherex.plane AS p INNER JOIN spherex.artifact AS a ON a.planeid = p.planeid "
    "WHERE INTERSECTS(p.poly, CIRCLE('ICRS', 270.0, 66.56, 1.0)) = 1 "
    "AND p.energy_bandpassname IN ('SPHEREx-D3', 'SPHEREx-D4') "
    "AND p.time_bounds_upper >= 61000.0 AND p.time_bounds_lower <= 61100.0"
)


def frame(path, detector, slew, polygon=FOOTPRINT, mjd=61050.0, **changes):
    obs_id = f"2025W51_1A_{slew:04d}_2"
    run = "l2b-v21-2025-354"
    values = {
        "obs_id": obs_id,
        "detector": detector,
        "collection": "spherex_qr2",
        "uri": f"ibe/data/spherex/qr2/level2/2025W51_1A/{run}/{detector}/"
        f"level2_{obs_id}D{detector}_spx_{run}.fits",
        "path": path,
        "mjd_begin": mjd,
        "mjd_end": mjd + 113.58 / 86400,
        "wavelength_min_um": 1.63,
        "wavelength_max_um": 2.41,
        "polygon": polygon,
    }
    return ArchivedFrame(**values | changes)


@pytest.fixture
def content():
    return np.random.default_rng(7).bytes(FILE_SIZE)


@pytest.fixture
def path(tmp_path, content):
    path = tmp_path / "frame.fits"
    path.write_bytes(content)
    return path


@pytest.fixture
def frames(path):
    """Five that the query matches, and one beside it in detector, place and time."""
    return [
        *(frame(path, detector, slew) for slew in (1, 2) for detector in (3, 4)),
        frame(path, 3, 3, mjd=60999.9995),
        frame(path, 2, 1),
        frame(path, 3, 4, polygon=SOUTH),
        frame(path, 3, 5, mjd=61100.5),
    ]


def download(url, headers=None, method="GET"):
    request = urllib.request.Request(url, headers=headers or {}, method=method)
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.status, response.headers, response.read()


def failed_download(url, headers=None):
    with pytest.raises(urllib.error.HTTPError) as caught:
        download(url, headers)
    with caught.value as error:
        return error.code, error.headers, error.read()


@contextmanager
def tap_service(archive):
    # pyvo leaves its session, and answers that it does not read, to the garbage collector.
    with requests.Session() as session, ExitStack() as answers:

        def close_later(answer, **_):
            answers.callback(answer.close)

        session.hooks["response"].append(close_later)
        yield pyvo.dal.TAPService(archive.tap_url, session=session)


def run_query(archive, query=QUERY, *, mode, **options):
    with tap_service(archive) as service:
        return {"sync": service.run_sync, "async": service.run_async}[mode](query, **options)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_pipelines_query_finds_its_frames(frames, mode):
    with SimulatedArchive(frames) as archive:
        results = run_query(archive, mode=mode)
    assert results.query_status == "OK"
    assert sorted(results["uri"]) == sorted(frame.uri for frame in frames[:5])
    row = next(row for row in results if row["uri"] == frames[0].uri)
    assert row["obs_publisher_did"] == "ivo://irsa.ipac/spherex_qr2?2025W51_1A_0001_2/D3"
    assert row["energy_bandpassname"] == "SPHEREx-D3"
    assert row["energy_bounds_lower"] == pytest.approx(1.63e-6, rel=1e-14)
    assert row["energy_bounds_upper"] == pytest.approx(2.41e-6, rel=1e-14)
    assert row["time_bounds_lower"] == 61050.0
    assert row["time_bounds_upper"] == 61050.0 + 113.58 / 86400
    assert row["contentlength"] == FILE_SIZE


def test_columns_are_called_by_name_not_by_id(frames):
    with SimulatedArchive(frames) as archive:
        results = run_query(
            archive, "SELECT obsid, collection FROM spherex.observation", mode="sync"
        )
    assert [field.ID for field in results.fielddescs] == ["col_0", "col_1"]
    assert results.fieldnames == ("obsid", "collection")


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(("maxrec", "status"), [(4, "OVERFLOW"), (5, "OK"), (6, "OK")])
def test_a_cut_answer_says_so(frames, mode, maxrec, status):
    with SimulatedArchive(frames, maxrec=maxrec) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", DALOverflowWarning)
        results = run_query(archive, mode=mode)
    assert results.query_status == status
    assert len(results) == min(maxrec, 5)


def test_pyvo_warns_of_the_services_limit_but_not_of_its_own(frames):
    with SimulatedArchive(frames, maxrec=4) as archive:
        with pytest.warns(DALOverflowWarning):
            run_query(archive, mode="sync")
        assert run_query(archive, mode="sync", maxrec=3).query_status == "OVERFLOW"


def test_sync_can_be_cut_where_async_is_not(frames):
    with SimulatedArchive(frames, sync_limit_rows=2) as archive:
        with pytest.warns(DALOverflowWarning):
            assert len(run_query(archive, mode="sync")) == 2
        results = run_query(archive, mode="async")
    assert (len(results), results.query_status) == (5, "OK")


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("query", [QUERY + ";", "SELECT missing FROM spherex.plane"])
def test_query_errors_reach_the_asker(frames, mode, query):
    reason = "semicolon" if query.endswith(";") else "missing"
    with SimulatedArchive(frames) as archive, pytest.raises(DALQueryError, match=reason):
        run_query(archive, query, mode=mode)


@pytest.mark.parametrize("status", [200, 400])
def test_status_of_a_query_error(frames, status):
    with SimulatedArchive(frames, query_error_status=status) as archive:
        with pytest.raises(DALQueryError, match="one SELECT statement"):
            run_query(archive, "DROP TABLE spherex.plane", mode="sync")
        assert archive.requests == [LoggedRequest("POST", "/TAP/sync", status)]


def test_a_query_by_post_and_without_its_parameters(frames):
    with SimulatedArchive(frames) as archive:
        url = f"{archive.tap_url}/sync"
        form = b"LANG=ADQL&QUERY=SELECT+COUNT(*)+FROM+spherex.plane&maxrec=1"
        with urllib.request.urlopen(url, data=form, timeout=10) as response:
            assert b"<TD>8</TD>" in response.read()
        for form in ("LANG=ADQL", "LANG=SQL&QUERY=x", "LANG=ADQL&QUERY=x&MAXREC=-1"):
            status, _, body = failed_download(f"{url}?{form}")
            assert status == 400
            assert b"The parameter" in body


def test_life_of_a_job(frames):
    with SimulatedArchive(frames) as archive, tap_service(archive) as service:
        job = service.submit_job("SELECT nonsense", maxrec=3)
        assert job.phase == "PENDING"
        assert failed_download(f"{job.url}/results/result")[0] == 404
        job.query = QUERY
        assert job.query == QUERY
        assert b"MAXREC" in download(f"{job.url}/parameters")[2]
        job.run()
        job.wait(timeout=10)
        assert job.phase == "COMPLETED"
        assert download(f"{job.url}/phase")[2] == b"COMPLETED"
        assert job.result_uri.encode() in download(f"{job.url}/results")[2]
        assert len(job.fetch_result()) == 3
        assert failed_download(f"{job.url}/error")[0] == 404
        url = job.url
        job.delete()
        assert failed_download(url)[0] == 404


def test_a_job_that_fails_and_one_that_is_aborted(frames):
    with SimulatedArchive(frames) as archive, tap_service(archive) as service:
        job = service.submit_job("SELECT nonsense")
        job.run().wait(timeout=10)
        assert job.phase == "ERROR"
        assert b"nonsense" in download(f"{job.url}/error")[2]
        job = service.submit_job(QUERY)
        assert job.abort().phase == "ABORTED"
        with pytest.raises(DALServiceError):
            job.run()


def test_service_descriptions(frames):
    with SimulatedArchive(frames, maxrec=1234) as archive, tap_service(archive) as service:
        assert b">true<" in download(f"{archive.tap_url}/availability")[2]
        assert service.hardlimit == 1234
        columns = [column.name for column in service.tables["spherex.artifact"].columns]
    assert columns == ["planeid", "uri", "contentlength"]


def test_collections_share_a_file_and_a_plane_has_further_artifacts(path, tmp_path):
    wide = frame(path, 3, 1)
    deep = replace(wide, collection="spherex_qr2_deep")
    reprocessed = replace(wide, uri=wide.uri.replace("v21", "v22"))
    notes = tmp_path / "notes.txt"
    notes.write_text("not an image")
    with SimulatedArchive(
        [wide, deep, reprocessed], extra_artifacts=[(wide, "ibe/notes.txt", notes)]
    ) as archive:
        results = run_query(archive, mode="sync")
        assert download(f"{archive.url}/ibe/notes.txt")[2] == b"not an image"
    found = {(row["obs_publisher_did"].split("?")[0][16:], row["uri"]) for row in results}
    assert found == {
        ("spherex_qr2", wide.uri),
        ("spherex_qr2", reprocessed.uri),
        ("spherex_qr2", "ibe/notes.txt"),
        ("spherex_qr2_deep", wide.uri),
    }
    assert len(set(results["planeid"])) == 2


def test_one_uri_cannot_stand_for_two_files(path, tmp_path):
    other = tmp_path / "other.fits"
    other.touch()
    with pytest.raises(ValueError, match="two files"):
        SimulatedArchive([frame(path, 3, 1), replace(frame(path, 3, 1), path=other)])


def test_files_and_their_headers(frames, content, path):
    with SimulatedArchive(frames) as archive:
        url = f"{archive.archive_url}/{frames[0].uri}"
        status, headers, body = download(url)
        head_status, head_headers, head_body = download(url, method="HEAD")
        assert failed_download(f"{archive.url}/ibe/data/unknown.fits")[0] == 404
        assert failed_download(f"{archive.url}{path}")[0] == 404
        assert [record.status for record in archive.requests] == [200, 200, 404, 404]
        assert archive.requests[1] == ("HEAD", f"/{frames[0].uri}", 200)
    assert (status, body) == (200, content)
    assert (head_status, head_body) == (200, b"")
    for name in ("Content-Length", "ETag", "Last-Modified", "Accept-Ranges"):
        assert headers[name] == head_headers[name]
    assert headers["Content-Length"] == str(FILE_SIZE)
    assert headers["ETag"].startswith('"')


@pytest.mark.parametrize(
    "escape", ["../secret", "%2e%2e/secret", "ibe/../../secret", "//etc/passwd"]
)
def test_nothing_else_can_be_read(frames, tmp_path, escape):
    (tmp_path / "secret").write_text("secret")
    with SimulatedArchive(frames) as archive:
        connection = HTTPConnection("127.0.0.1", int(archive.url.rpartition(":")[2]), timeout=10)
        connection.request("GET", f"/{escape}")
        assert connection.getresponse().status == 404
        connection.close()


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [("0-0", 0, 1), ("100-299", 100, 300), ("4990-9999", 4990, 5000), ("4000-", 4000, 5000),
     ("-10", 4990, 5000), ("-9999", 0, 5000)],
)  # fmt: skip
def test_byte_ranges(frames, content, asked, start, stop):
    with SimulatedArchive(frames) as archive:
        status, headers, body = download(
            f"{archive.url}/{frames[0].uri}", {"Range": f"bytes={asked}"}
        )
    assert (status, body) == (206, content[start:stop])
    assert headers["Content-Range"] == f"bytes {start}-{stop - 1}/{FILE_SIZE}"


@pytest.mark.parametrize("asked", ["bytes=5000-", "bytes=9-3", "bytes=0-1,4-5", "rows=1-2"])
def test_ranges_that_cannot_be_had(frames, asked):
    with SimulatedArchive(frames) as archive:
        status, headers, _ = failed_download(f"{archive.url}/{frames[0].uri}", {"Range": asked})
    assert (status, headers["Content-Range"]) == (416, f"bytes */{FILE_SIZE}")


def test_a_range_holds_only_for_the_same_file(frames, content):
    with SimulatedArchive(frames) as archive:
        url = f"{archive.url}/{frames[0].uri}"
        headers = download(url)[1]
        for validator in (headers["ETag"], headers["Last-Modified"]):
            resumed = download(url, {"Range": "bytes=4000-", "If-Range": validator})
            assert (resumed[0], resumed[2]) == (206, content[4000:])
        other = download(url, {"Range": "bytes=4000-", "If-Range": '"another"'})
        assert (other[0], other[2]) == (200, content)


def test_faults_are_used_up_one_a_request(frames, content):
    uri = frames[0].uri
    plan = [
        Fault(status=503, retry_after_s=2),
        Fault(status=404),
        Fault(),
        Fault(html=True),
        Fault(garbage=True),
        Fault(short=100),
        Fault(no_range=True),
    ]
    with SimulatedArchive(frames, faults={uri: plan}) as archive:
        url = f"{archive.url}/{uri}"
        status, headers, _ = failed_download(url)
        assert (status, headers["Retry-After"]) == (503, "2")
        assert failed_download(url)[0] == 404
        assert download(url)[2] == content
        status, headers, body = download(url)
        assert (status, headers.get_content_type(), body[:6]) == (200, "text/html", b"<html>")
        status, headers, body = download(url)
        assert (status, len(body)) == (200, FILE_SIZE)
        assert body != content
        status, headers, body = download(url)
        assert (headers["Content-Length"], body) == ("100", content[:100])
        status, headers, body = download(url, {"Range": "bytes=10-19"})
        assert (status, body, headers["Accept-Ranges"]) == (200, content, None)
        assert download(url, {"Range": "bytes=10-19"})[2] == content[10:20]
        archive.add_faults("/" + uri, [Fault(redirect=f"{archive.url}/{frames[1].uri}")])
        assert download(url)[2] == content
        assert archive.requests[-2:] == [
            ("GET", f"/{uri}", 302),
            ("GET", f"/{frames[1].uri}", 200),
        ]


def test_faults_of_ranges(frames, content):
    uri, asked = frames[0].uri, {"Range": "bytes=10-19"}
    with SimulatedArchive(frames) as archive:
        url = f"{archive.url}/{uri}"
        usual = download(url, asked)[1]
        for validator in ("ETag", "Last-Modified"):
            archive.add_faults(uri, [Fault(changed=True), Fault(unconditional=True)])
            conditional = asked | {"If-Range": usual[validator]}
            status, headers, body = download(url, conditional)
            assert (status, body) == (200, content)
            assert headers[validator] != usual[validator]
            status, headers, body = download(url, conditional)
            assert (status, body) == (206, content[10:20])
            assert headers[validator] != usual[validator]
        archive.add_faults(uri, [Fault(range_status=403)] * 2)
        assert failed_download(url, asked)[0] == 403
        assert download(url)[2] == content
        archive.add_faults(uri, [Fault(short_range=3), Fault(wrong_range=5)])
        status, headers, body = download(url, asked)
        assert (status, headers["Content-Range"], body) == (206, "bytes 10-12/5000", content[10:13])
        status, headers, body = download(url, asked)
        assert (status, headers["Content-Range"], body) == (206, "bytes 15-24/5000", content[15:25])
        archive.add_faults(uri, [Fault(multipart=True), Fault(no_version=True)])
        status, headers, body = download(url, asked)
        assert (status, headers["Content-Type"]) == (206, "multipart/byteranges; boundary=part")
        assert headers["Content-Range"] is None
        assert b"Content-Range: bytes 10-19/5000\r\n\r\n" + content[10:20] in body
        status, headers, body = download(url, asked)
        assert (status, headers["ETag"], headers["Last-Modified"]) == (206, None, None)


def test_a_file_can_be_replaced(frames, content, tmp_path):
    other = tmp_path / "other.fits"
    other.write_bytes(content[::-1])
    with SimulatedArchive(frames) as archive:
        url = f"{archive.url}/{frames[0].uri}"
        before = download(url)[1]["ETag"]
        archive.replace_file(frames[0].uri, other)
        _, headers, body = download(url, {"Range": "bytes=0-9", "If-Range": before})
        assert body == content[::-1]
        assert headers["ETag"] != before
        with pytest.raises(KeyError):
            archive.replace_file("ibe/none.fits", other)


def test_what_is_sent_is_counted(frames):
    with SimulatedArchive(frames) as archive:
        url = f"{archive.url}/{frames[0].uri}"
        download(url)
        download(url, method="HEAD")
        download(url, {"Range": "bytes=10-19"})
        download(url, {"Range": "bytes=-5"})
        assert archive.traffic["file"] == Traffic(answers=2, sent_bytes=FILE_SIZE)
        assert archive.traffic["range"] == (2, 15)
        assert archive.traffic["other"] == (0, 0)
        run_query(archive, mode="sync")
        assert archive.traffic["other"].answers == 1
        assert archive.sent_bytes == sum(kind.sent_bytes for kind in archive.traffic.values())
        assert str(archive.traffic["range"]) == "2 answers, 0.0 MB"


def test_latency_passes_at_the_same_time_for_requests_at_the_same_time(frames, content):
    n_clients = 5
    with (
        SimulatedArchive(frames, latency_s=0.2) as archive,
        ThreadPoolExecutor(n_clients) as pool,
    ):
        url = f"{archive.url}/{frames[0].uri}"
        begun = time.monotonic()
        answers = list(pool.map(download, [url] * n_clients, [{"Range": "bytes=0-9"}] * n_clients))
        seconds = time.monotonic() - begun
    assert [body for _, _, body in answers] == [content[:10]] * n_clients
    assert 0.2 <= seconds < 0.2 * n_clients


def test_a_fault_can_last(frames):
    lasting = itertools.repeat(Fault(status=500))
    with SimulatedArchive(frames, faults={frames[0].uri: lasting}) as archive:
        url = f"{archive.url}/{frames[0].uri}"
        assert [failed_download(url)[0] for _ in range(5)] == [500] * 5


@pytest.mark.parametrize("sent", [0, 1234])
def test_truncated_body(frames, content, sent):
    with SimulatedArchive(frames, faults={frames[0].uri: [Fault(truncate=sent)]}) as archive:
        url = f"{archive.url}/{frames[0].uri}"
        with pytest.raises(IncompleteRead) as caught:
            download(url)
        assert caught.value.partial == content[:sent]
        assert download(url)[2] == content


def test_truncated_range(frames, content):
    uri = frames[0].uri
    with SimulatedArchive(frames, faults={uri: [Fault(truncate=4), Fault(truncate=99)]}) as archive:
        asked = {"Range": "bytes=10-19"}
        with pytest.raises(IncompleteRead) as caught:
            download(f"{archive.url}/{uri}", asked)
        assert caught.value.partial == content[10:14]
        assert download(f"{archive.url}/{uri}", asked)[2] == content[10:20]


def test_broken_transfers_leave_no_log(frames, caplog):
    plan = [Fault(truncate=3), Fault(stall=3), Fault(status=500)]
    with SimulatedArchive(frames, faults={frames[0].uri: plan}) as archive:
        url = f"{archive.url}/{frames[0].uri}"
        with pytest.raises(IncompleteRead):
            download(url)
        with urllib.request.urlopen(url, timeout=10) as response:
            assert len(response.read(3)) == 3
        archive.wait_for(lambda archive: archive.open_connections == 0)
        assert failed_download(url)[0] == 500
    assert not caplog.records


def test_a_stalled_transfer_ends_with_its_client(frames, content):
    async def leave(archive):
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{archive.url}/{frames[0].uri}") as response,
        ):
            assert await response.content.readexactly(700) == content[:700]
            assert archive.open_connections == 1

    with SimulatedArchive(frames, faults={frames[0].uri: [Fault(stall=700)]}) as archive:
        asyncio.run(leave(archive))
        archive.wait_for(lambda archive: archive.open_connections == 0)
        assert archive.peak_connections == 1


def test_stopping_is_prompt_although_a_transfer_hangs(frames, content):
    archive = SimulatedArchive(frames, faults={frames[0].uri: [Fault(stall=700)]})
    archive.start()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(download, f"{archive.url}/{frames[0].uri}")
        archive.wait_for(lambda archive: archive.open_connections == 1)
        begun = time.monotonic()
        archive.stop()
        assert time.monotonic() - begun < 2
        with pytest.raises((IncompleteRead, ConnectionError)):
            waiting.result(timeout=10)


def test_stopping_is_prompt_although_a_job_is_waited_for(frames):
    archive = SimulatedArchive(frames)
    archive.start()
    with tap_service(archive) as service:
        job = service.submit_job(QUERY)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(download, f"{job.url}?WAIT=-1")
        # The answer to a job that waits is not begun: a later request has to be served meanwhile.
        assert download(f"{job.url}/phase")[2] == b"PENDING"
        begun = time.monotonic()
        archive.stop()
        assert time.monotonic() - begun < 2
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            waiting.result(timeout=10)


def test_no_client_that_connects_while_the_archive_stops_is_left_waiting(frames):
    for _ in range(20):
        archive = SimulatedArchive(frames)
        archive.start()
        address = urlsplit(archive.url)
        connected = threading.Barrier(2)

        def connect(address=address, connected=connected):
            connections = []
            with suppress(ConnectionError):
                for _ in range(60):  # less than the kernel holds for a listener
                    connections.append(socket.create_connection((address.hostname, address.port)))
                    if len(connections) == 3:
                        connected.wait(timeout=10)
            return connections

        with ThreadPoolExecutor(1) as pool:
            connecting = pool.submit(connect)
            connected.wait(timeout=10)
            archive.stop()
            for connection in connecting.result(timeout=10):
                with connection, suppress(ConnectionError):
                    connection.settimeout(10)
                    connection.sendall(b"GET /TAP/availability HTTP/1.1\r\n\r\n")
                    assert connection.recv(1) == b""


def test_faults_of_the_tap_service(frames):
    faults = {
        "TAP/sync": [Fault(status=502), Fault(html=True), Fault(truncate=300)],
        "/TAP/async": [Fault(status=503)],
        "/TAP/async/1/results/result": [Fault(status=500)],
    }
    with SimulatedArchive(frames, faults=faults) as archive:
        for _ in range(3):
            with pytest.raises((DALServiceError, pyvo.dal.DALFormatError)):
                run_query(archive, mode="sync")
        assert len(run_query(archive, mode="sync")) == 5
        for _ in range(2):
            with pytest.raises(DALServiceError):
                run_query(archive, mode="async")
        assert len(run_query(archive, mode="async")) == 5


@pytest.mark.parametrize(
    "faults", [{"html": True, "garbage": True}, {"status": 500, "short": 1}, {"retry_after_s": 1}]
)
def test_one_fault_at_a_time(faults):
    with pytest.raises(ValueError, match=r"only one fault|needs a status"):
        Fault(**faults)


def test_simultaneous_transfers_are_counted(frames):
    n_clients = 5
    stalls = {frames[0].uri: [Fault(stall=10)] * n_clients}
    with ThreadPoolExecutor(n_clients) as pool, SimulatedArchive(frames, faults=stalls) as archive:
        waiting = [
            pool.submit(download, f"{archive.url}/{frames[0].uri}") for _ in range(n_clients)
        ]
        archive.wait_for(lambda archive: archive.open_connections == n_clients)
        assert archive.peak_connections == n_clients
        archive.stop()
        assert all(isinstance(each.exception(), IncompleteRead) for each in waiting)


def test_bandwidth_is_shared(frames, content):
    with (
        SimulatedArchive(frames, bandwidth=4 * FILE_SIZE) as archive,
        ThreadPoolExecutor(2) as pool,
    ):
        begun = time.monotonic()
        bodies = pool.map(lambda f: download(f"{archive.url}/{f.uri}")[2], frames[:2])
        assert list(bodies) == [content, content]
        assert time.monotonic() - begun > 0.45


def test_started_again_at_the_same_address(frames, content):
    archive = SimulatedArchive(frames)
    with archive:
        url = f"{archive.url}/{frames[0].uri}"
        with pytest.raises(RuntimeError, match="already running"):
            archive.start()
    with pytest.raises(urllib.error.URLError):
        download(url)
    archive.stop()
    with archive:
        assert download(url)[2] == content
        assert len(run_query(archive, mode="sync")) == 5


def test_a_taken_port_is_an_error(frames):
    with SimulatedArchive(frames) as archive:
        other = SimulatedArchive(frames, port=int(archive.url.rpartition(":")[2]))
        with pytest.raises(OSError, match=r"[Aa]ddress already in use"):
            other.start()


def test_no_thread_is_left(frames):
    before = set(threading.enumerate())
    with SimulatedArchive(frames) as archive:
        run_query(archive, mode="async")
    assert set(threading.enumerate()) <= before


def test_waiting_ends(frames):
    with SimulatedArchive(frames) as archive, pytest.raises(TimeoutError, match="within"):
        archive.wait_for(lambda archive: archive.open_connections > 0, timeout_s=0.01)
