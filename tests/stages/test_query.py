"""The query stage against the simulated archive and against servers that answer by script."""

from __future__ import annotations

import errno
import itertools
import logging
import random
import re
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import requests
from astropy.table import MaskedColumn, Table
from hypothesis import given
from hypothesis import strategies as st

from spxdask.archive import retry
from spxdask.config import BatchConfig
from spxdask.errors import ArchiveError, InputError, TruncatedAnswerError
from spxdask.simulate.archive import ArchivedFrame, Fault, SimulatedArchive
from spxdask.simulate.tap import error_votable
from spxdask.stages import query

HALF_EXPOSURE = 113.58 / 86400 / 2
# About (10, 0): one holds the field of radius 0.5, one cuts it, one is elsewhere.
HOLDS = ((8.0, -2.0), (12.0, -2.0), (12.0, 2.0), (8.0, 2.0))
CUTS = ((10.2, -2.0), (14.0, -2.0), (14.0, 2.0), (10.2, 2.0))
BESIDE = ((20.0, -2.0), (24.0, -2.0), (24.0, 2.0), (20.0, 2.0))
QUERY = "SELECT uri FROM spherex.artifact"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(query, "FIRST_POLL_S", 0.001)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "frame.fits"
    path.write_bytes(b"x" * 5000)
    return path


def uri(slew=1, detector=3, release="qr2", run="l2b-v21-2025-354"):
    name = f"level2_2025W51_1A_{slew:04d}_2D{detector}_spx_{run}.fits"
    return f"ibe/data/spherex/{release}/level2/2025W51_1A/{run}/{detector}/{name}"


def frame(
    path, slew=1, detector=3, *, polygon=HOLDS, mjd=61050.0, release="qr2", deep="", run=None
):
    return ArchivedFrame(
        obs_id=f"2025W51_1A_{slew:04d}_2",
        detector=detector,
        collection=f"spherex_{release}{deep}",
        uri=uri(slew, detector, release, *[run] if run else []),
        path=path,
        mjd_begin=mjd - HALF_EXPOSURE,
        mjd_end=mjd + HALF_EXPOSURE,
        wavelength_min_um=1.63,
        wavelength_max_um=2.41,
        polygon=polygon,
    )


@pytest.fixture
def frames(path):
    return [frame(path, slew, detector) for slew in (1, 2) for detector in (3, 4)]


def config(archive=None, **options):
    urls = {"tap_url": archive.tap_url, "archive_url": archive.url} if archive else {}
    place = {"center_ra": 10.0, "center_dec": 0.0, "radius": 0.5, "catalog_path": "x.csv"}
    return BatchConfig(**{"max_retries": 2} | place | urls | options)


def found(archive, **options):
    return query.find_observations(config(archive, **options))


def tap_requests(archive):
    return [(r.method, r.path.removeprefix("/TAP/"), r.status) for r in archive.requests]


# What is asked


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"coverage_mode": "full"},
        {"bands": ["D3"]},
        {"bands": ["D1", "D6"], "mjd_range": (61000, 61000.00065)},
        {"center_ra": 1e-5, "center_dec": -1.5e-7, "radius": 1e-9},
        {"center_ra": 360.0, "center_dec": -90.0, "radius": 90.0, "mjd_range": (1e-6, 1e6)},
        {"coverage_mode": "full", "center_ra": 270.123456789012, "center_dec": 66.56},
    ],
)
def test_another_parser_takes_the_adql(options):
    queryparser = pytest.importorskip("queryparser.adql")
    text = query.adql(config(**options))
    assert "spherex.artifact" in queryparser.ADQLQueryTranslator(text).to_postgresql()
    assert ";" not in text


def test_the_other_parser_is_strict():
    queryparser = pytest.importorskip("queryparser.adql")
    errors = pytest.importorskip("queryparser.exceptions")
    text = query.adql(config(radius=0.25))
    for wrong in (text.replace("0.25", "25e-2"), text.replace(" = 1", "", 1) + " ="):
        with pytest.raises(errors.QuerySyntaxError):
            queryparser.ADQLQueryTranslator(wrong)


@given(st.floats(0, 360), st.floats(-90, 90), st.floats(0, 90, exclude_min=True))
def test_the_place_is_asked_for_exactly(ra, dec, radius):
    text = query.adql(config(center_ra=ra, center_dec=dec, radius=radius))
    numbers = re.search(r"CIRCLE\('ICRS', (.*?)\)", text)[1].split(", ")
    assert [float(n) for n in numbers] == [ra, dec, radius]
    assert all(re.fullmatch(r"-?\d+\.\d+", n) for n in numbers)


@pytest.mark.parametrize(("mode", "slews"), [("any", [1, 2]), ("full", [1])])
def test_coverage(path, mode, slews):
    sky = [frame(path, n, polygon=p) for n, p in enumerate((HOLDS, CUTS, BESIDE), start=1)]
    with SimulatedArchive(sky) as archive:
        assert [o.uri for o in found(archive, coverage_mode=mode)] == [uri(n) for n in slews]


@pytest.mark.parametrize(
    ("bands", "kept"), [(None, "123456"), (["D3"], "3"), (["D6", "D1"], "16"), (["D2"], "2")]
)
def test_bands_are_left_out_in_the_query(path, bands, kept):
    sky = [frame(path, 1, detector) for detector in range(1, 7)]
    with SimulatedArchive(sky) as archive:
        observations = found(archive, bands=bands)
        asked = query.ask(archive.tap_url, query.adql(config(bands=bands)), max_retries=0)
    assert [o.band for o in observations] == [f"D{detector}" for detector in kept]
    assert len(asked) == len(kept)


@pytest.mark.parametrize(
    ("first", "last", "slews"),
    [
        (61050, 61050, [2]),
        (61049.5, 61050, [1, 2]),
        (61050, 61050.5, [2, 3]),
        (61049.5 + 1e-6, 61050.5 - 1e-6, [2]),
        (61049.5 - 2 * HALF_EXPOSURE, 61049.5 - 1e-6, []),
        (0, 1e6, [1, 2, 3]),
    ],
)
def test_times_are_of_mid_exposure_and_both_ends_count(path, first, last, slews):
    sky = []
    for slew, mjd in enumerate((61049.5, 61050.0, 61050.5), start=1):
        # Binary fractions, so that the middle is exact.
        times = {"mjd_begin": mjd - 2**-10, "mjd_end": mjd + 2**-10}
        sky.append(ArchivedFrame(**vars(frame(path, slew)) | times))
    with SimulatedArchive(sky) as archive:
        observations = found(archive, mjd_range=(first, last))
    assert [o.uri for o in observations] == [uri(n) for n in slews]


def test_what_an_observation_says(path):
    with SimulatedArchive([frame(path, 7, 4, mjd=61050.25)]) as archive:
        [observation] = found(archive)
        assert observation.download_url == f"{archive.url}/{uri(7, 4)}"
    assert (observation.obs_id, observation.band) == ("2025W51_1A_0007_2", "D4")
    assert observation.mjd == pytest.approx(61050.25, abs=1e-9)
    assert observation.wavelength_um == pytest.approx(2.02)
    assert observation.uri == uri(7, 4)
    assert observation.size_bytes == 5000


def test_nothing_there_is_no_error(path):
    with SimulatedArchive([frame(path, polygon=BESIDE)]) as archive:
        assert found(archive) == []


# What is kept


OLD, NEW, QR3 = uri(), uri(run="l2b-v22-2026-010"), uri(release="qr3", run="l2b-v2-2026-100")


@pytest.mark.parametrize(
    ("release", "kept"),
    [("latest", [QR3]), ("qr2", [NEW]), ("qr3", [QR3]), ("all", sorted([OLD, NEW, QR3]))],
)
@pytest.mark.parametrize("turn", range(4))
def test_releases_and_versions(path, release, kept, turn):
    sky = [
        frame(path, run="l2b-v22-2026-010"),
        frame(path),
        frame(path, deep="_deep"),
        frame(path, release="qr3", run="l2b-v2-2026-100"),
    ]
    with SimulatedArchive(sky[turn:] + sky[:turn]) as archive:
        observations = found(archive, release=release)
    assert sorted(o.uri for o in observations) == kept


def test_detectors_of_an_exposure_are_not_versions_of_it(frames):
    with SimulatedArchive(frames) as archive:
        assert {(o.obs_id[-6:-2], o.band) for o in found(archive)} == {
            ("0001", "D3"), ("0001", "D4"), ("0002", "D3"), ("0002", "D4"),
        }  # fmt: skip


def test_only_science_files_count(path):
    other = [
        uri().replace("level2_", "cutout_"),
        uri().replace(".fits", ".fits.gz"),
        "ibe/data/spherex/qr2/level2/notes.txt",
        "../../level2_passwd",
    ]
    science = frame(path)
    with SimulatedArchive(
        [science, frame(path, 2, release="xx")], extra_artifacts=[(science, u, path) for u in other]
    ) as archive:
        assert [o.uri for o in found(archive)] == [uri()]


ROW = ("ivo://irsa.ipac/spherex_qr2?2025W51_1A_0001_2/D3", 1e-6, 2e-6, 1.0, 2.0, uri(), 5000)


def table(*rows, names="abcdefg"):
    return Table(rows=list(rows), names=list(names))


def changed(**values):
    row = dict(zip(("did", "lower", "upper", "begin", "end", "uri", "size"), ROW, strict=True))
    return tuple((row | values).values())


def test_columns_may_be_called_anything():
    names = [f"col_{n}" for n in range(48, 55)]
    [observation] = query.select(table(ROW, names=names), config())
    assert (observation.uri, observation.mjd) == (uri(), 1.5)


@pytest.mark.parametrize(
    ("archive_url", "below"),
    [
        ("https://example.org/a", uri()),
        ("s3://nasa-irsa-spherex", uri().removeprefix("ibe/data/spherex/")),
        ("file:///nowhere/mirror", uri().removeprefix("ibe/data/spherex/")),
    ],
)
def test_frames_are_where_the_archive_is(archive_url, below):
    [observation] = query.select(table(ROW), config(archive_url=archive_url))
    assert observation.uri == uri()
    assert observation.download_url == f"{archive_url}/{below}"


@pytest.mark.parametrize(
    "hostile",
    [
        f"../../{uri()}",
        f"//evil.example/{uri()}",
        f"/{uri()}",
        f"https://evil.example/{uri()}",
        f"@evil.example/{uri()}",
        uri().replace("qr2", "qr2\0"),
        uri().replace("qr2", ".."),
        uri().replace("level2/", "level2/%2e%2e/"),
        uri().replace("qr2/", "qr2//"),
        uri().replace("qr2/", "qr2\\"),
    ],
)
@pytest.mark.parametrize("release", ["latest", "all"])
def test_a_hostile_uri_is_an_error(hostile, release):
    with pytest.raises(ArchiveError, match="unusable URI"):
        query.select(table(ROW, changed(uri=hostile)), config(release=release))


@pytest.mark.parametrize("size", [0, -1, np.ma.masked])
def test_an_unknown_length_is_none(size):
    answer = table(ROW)
    answer["g"] = MaskedColumn([0 if size is np.ma.masked else size], mask=[size is np.ma.masked])
    [observation] = query.select(answer, config())
    assert observation.size_bytes is None
    assert query.gigabytes([observation]) == pytest.approx(0.0716)


def test_a_frame_without_times_is_kept_and_comes_last():
    answer = table(ROW, *(changed(uri=uri(n), begin=n + 1.0) for n in range(2, 5)))
    answer["d"] = MaskedColumn(answer["d"], mask=[True, False, True, False])
    observations = query.select(answer, config())
    assert [o.uri for o in observations] == [uri(2), uri(4), uri(1), uri(3)]
    assert np.isnan(observations[2].mjd)


def test_order_of_the_rows_does_not_matter():
    rows = [
        changed(uri=uri(slew, detector, run=f"l2b-v{version}-2025-354"), begin=float(slew // 2))
        for slew, detector, version in itertools.product(range(4), (1, 6), (9, 10))
    ]
    expected = query.select(table(*rows), config())
    assert len(expected) == 8
    assert all("-v10-" in o.uri for o in expected)
    assert [o.mjd for o in expected] == sorted(o.mjd for o in expected)
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        assert query.select(table(*rows), config()) == expected


def test_too_many_frames(frames):
    with SimulatedArchive(frames) as archive:
        assert len(found(archive, max_images=4)) == 4
        with pytest.raises(InputError) as caught:
            found(archive, max_images=3)
    said = str(caught.value)
    assert said.startswith("4 frames (0.0 GB) cover the field, max_images allows 3")
    assert all(option in said for option in ("raise max_images", "radius", "bands", "mjd_range"))


def test_gigabytes_are_counted():
    observations = query.select(
        table(*(changed(uri=uri(n), size=2_000_000_000) for n in range(3))), config()
    )
    with pytest.raises(InputError, match=re.escape("3 frames (6.0 GB)")):
        query.check_count(observations, config(max_images=2))


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
        assert len(found(archive)) == 4
        assert [path for _, path, _ in tap_requests(archive)] == ["sync"] * 3


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
        assert len(found(archive)) == 4
        assert tap_requests(archive)[-1][0] == "DELETE"


@pytest.mark.parametrize("fault", BROKEN, ids=repr)
def test_a_service_that_stays_broken_is_one_sentence(frames, fault):
    lasting = {where: itertools.repeat(fault) for where in (SYNC, "TAP/async", RESULT)}
    with SimulatedArchive(frames, faults=lasting) as archive:
        with pytest.raises(ArchiveError, match="TAP service") as caught:
            found(archive, max_retries=1)
        assert sum(path == "sync" for _, path, _ in tap_requests(archive)) == 2
    assert not isinstance(caught.value, TruncatedAnswerError)
    assert "\n" not in str(caught.value)


def test_no_part_of_an_answer_is_taken_for_the_whole(frames):
    text = query.adql(config())
    with SimulatedArchive(frames) as archive:
        size = len(body_of(archive, text))
        for cut in range(0, size, 41):
            archive.add_faults(SYNC, [Fault(short=cut)])
            archive.add_faults("TAP/async", [Fault(status=400)])
            with pytest.raises(ArchiveError):
                query.ask(archive.tap_url, text, max_retries=0)
        assert len(query.ask(archive.tap_url, text, max_retries=0)) == 4


def body_of(archive, text):
    form = {"LANG": "ADQL", "QUERY": text}
    with requests.post(f"{archive.tap_url}/sync", data=form, timeout=10) as answer:
        return answer.content


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/TAP"
        says = f"^cannot reach {re.escape(url)}: connection refused \\(after 2 attempts\\)$"
        with pytest.raises(ArchiveError, match=says):
            query.ask(url, QUERY, max_retries=1)


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
    with pytest.raises(ArchiveError, match=f"^cannot reach http://archive.test/TAP: {says}"):
        query.ask("http://archive.test/TAP", QUERY, max_retries=2)
    assert len(attempts) == 3


def test_a_proxy_that_cannot_be_reached(monkeypatch):
    unconnected(monkeypatch, ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"))
    monkeypatch.setenv("http_proxy", "http://me:secret@proxy.test:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    says = (
        r"^cannot reach http://archive.test/TAP: the proxy: connection refused \(after 1 attempt\)$"
    )
    with pytest.raises(ArchiveError, match=says):
        query.ask("http://archive.test/TAP", QUERY, max_retries=0)


@pytest.mark.parametrize("status", [401, 502])
def test_passwords_are_not_shown(frames, caplog, status):
    caplog.set_level(logging.INFO, logger="spxdask")
    lasting = {
        f"TAP/{where}": itertools.repeat(Fault(status=status)) for where in ("sync", "async")
    }
    with SimulatedArchive(frames, faults=lasting, maxrec=3) as archive:
        url = archive.tap_url.replace("//", "//me:secret@")
        with pytest.raises(ArchiveError) as caught:
            query.ask(url, query.adql(config()), max_retries=1)
        messages = [str(caught.value)]
    with SimulatedArchive(frames, maxrec=3) as archive:
        url = archive.tap_url.replace("//", "//me:secret@")
        with pytest.raises(TruncatedAnswerError) as caught:
            query.ask(url, query.adql(config()), max_retries=1)
        messages.append(str(caught.value))
    with pytest.raises(ArchiveError, match="cannot reach") as caught:
        query.ask(url, QUERY, max_retries=0)
    messages.append(str(caught.value))
    for text in (*messages, *(record.getMessage() for record in caplog.records)):
        assert "secret" not in text


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize(
    "text", ["SELECT nonsense FROM spherex.plane", "DROP TABLE x", QUERY + ";"]
)
def test_bad_adql_is_sent_once(frames, status, text):
    with SimulatedArchive(frames, query_error_status=status) as archive:
        with pytest.raises(ArchiveError, match="the TAP service rejected the query: "):
            query.ask(archive.tap_url, text, max_retries=5)
        assert tap_requests(archive) == [("POST", "sync", status)]


def test_bad_adql_as_a_job_is_sent_once(frames):
    faults = {SYNC: [Fault(status=502)]}
    with SimulatedArchive(frames, faults=faults) as archive:
        with pytest.raises(ArchiveError, match=r"ended as ERROR: .*nonsense"):
            query.ask(archive.tap_url, "SELECT nonsense FROM spherex.plane", max_retries=0)
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
            query.ask(archive.tap_url, query.adql(config()), max_retries=5)
        assert [path for _, path, _ in tap_requests(archive)].count(where) == n
        assert len(archive.requests) == (1 if where == "sync" else 2)


@pytest.mark.parametrize(("asked", "pause"), [(0, 0), (7, 7), (86400, retry.LONGEST_RETRY_AFTER_S)])
def test_the_archive_says_how_long_to_wait(frames, monkeypatch, asked, pause):
    pauses = []
    monkeypatch.setattr(query.time, "sleep", pauses.append)
    faults = [Fault(status=s, retry_after_s=asked) for s in (503, 429)]
    with SimulatedArchive(frames, faults={SYNC: faults}) as archive:
        assert len(found(archive)) == 4
    assert pauses == [pause, pause]


def test_an_answer_that_takes_too_long_becomes_a_job(frames, monkeypatch):
    monkeypatch.setattr(query, "SYNC_TIMEOUT_S", 0.2)
    faults = {SYNC: itertools.repeat(Fault(stall=100))}
    with SimulatedArchive(frames, faults=faults) as archive:
        assert len(found(archive, max_retries=5)) == 4
        assert [path for _, path, _ in tap_requests(archive)].count("sync") == 1


# Truncated answers


def test_a_cut_sync_answer_becomes_a_job(frames):
    with SimulatedArchive(frames, sync_limit_rows=3) as archive:
        assert len(found(archive)) == 4
        assert tap_requests(archive)[-1] == ("DELETE", "async/1", 303)


def test_a_cut_job_is_an_error(frames):
    with SimulatedArchive(frames, maxrec=3) as archive:
        with pytest.raises(TruncatedAnswerError, match="cut its answer at 3 rows; take a smaller"):
            found(archive)
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
            query.ask(url, QUERY, max_retries=0)
        assert log == ["POST /TAP/sync", "POST /TAP/async"]


@pytest.mark.parametrize("place", ["root", "before", "table", "after"])
def test_an_answer_that_says_ok_is_whole(place):
    with scripted((200, XML, votable(place, "OK"))) as (url, log):
        assert list(query.ask(url, QUERY, max_retries=0)["uri"]) == ["x"]
        assert log == ["POST /TAP/sync"]


def test_another_info_that_says_overflow_is_none():
    with scripted((200, XML, votable("after", name="REMARK"))) as (url, _):
        assert len(query.ask(url, QUERY, max_retries=0)) == 1


@pytest.mark.parametrize(
    ("content_type", "body"),
    [("text/plain", b"column nonsense is unknown"), ("text/html", b"<html>Bad Request</html>")],
)
def test_bad_adql_told_otherwise_is_sent_once(content_type, body):
    with scripted((400, {"Content-Type": content_type}, body)) as (url, log):
        with pytest.raises(ArchiveError, match="refused the query") as caught:
            query.ask(url, QUERY, max_retries=3)
        assert log == ["POST /TAP/sync"]
    assert content_type == "text/html" or "column nonsense" in str(caught.value)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_service_that_speaks_votable_is_asked_again(status):
    busy = (status, XML | {"Retry-After": "0"}, error_votable("too many queries, come back later"))
    with scripted(busy, busy, (200, XML, votable())) as (url, log):
        assert len(query.ask(url, QUERY, max_retries=2)) == 1
        assert log == ["POST /TAP/sync"] * 3


def test_a_query_error_with_status_500_is_not_sent_again():
    with scripted((500, XML, error_votable("no such column"))) as (url, log):
        with pytest.raises(ArchiveError, match="rejected the query: no such column"):
            query.ask(url, QUERY, max_retries=3)
        assert len(log) == 1


def test_a_page_in_place_of_a_job_is_not_believed_nor_deleted():
    page = (200, {"Content-Type": "text/html"}, b"<html><body>maintenance</body></html>")
    with scripted((503, {}, b""), *[page] * 4) as (url, log):
        with pytest.raises(ArchiveError, match="no job was made of the query"):
            query.ask(url, QUERY, max_retries=0)
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
        assert len(query.ask(url, QUERY, max_retries=1)) == 1
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
        query.ask(url, QUERY, max_retries=0)
    # The answer to that is lost, which must not hide the reason.
    assert log[-1] == "DELETE /TAP/async/1"


def test_a_job_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(query, "JOB_TIMEOUT_S", 0.0)
    answers = [(503, {}, b""), SEE_JOB, *[job("EXECUTING")] * 50]
    with scripted(*answers) as (url, log), pytest.raises(ArchiveError, match="did not end within"):
        query.ask(url, QUERY, max_retries=0)
    assert log[-1] == "DELETE /TAP/async/1"


@pytest.mark.parametrize("announced", [60, 500])
def test_a_job_described_in_part_is_asked_again(announced):
    status, headers, body = job("EXECUTING")
    cut = (status, headers | {"Content-Length": announced}, body[:60])
    answers = [SEE_JOB, *[job("QUEUED")] * 2, cut, job("COMPLETED"), (200, XML, votable())]
    with scripted(*[(503, {"Retry-After": "0"}, b"")] * 2, *answers) as (url, log):
        assert len(query.ask(url, QUERY, max_retries=1)) == 1
    assert log.count("GET /TAP/async/1") == 4
