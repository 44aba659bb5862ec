"""Versions of files: compared, and asked for without their content."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
import simulated

from spxdask.archive.received import FileVersion
from spxdask.archive.retry import RetryPolicy
from spxdask.archive.version import ask_versions
from spxdask.run.ledger import LocalLedger, Outcome
from spxdask.simulate.archive import Fault, SimulatedArchive
from spxdask.stages.recheck import BATCH_SIZE, recheck_frames

RETRY = RetryPolicy(max_retries=2, first_delay_s=0.001)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    exposures = [simulated.exposure(number, 3) for number in range(2)]
    survey = simulated.make_survey(tmp_path_factory.mktemp("survey"), exposures, n_sources=2)
    with SimulatedArchive(survey.archived) as archive:
        archive.frames = survey.archived
        yield archive


def ask(archive, *uris):
    return ask_versions([f"{archive.url}/{uri}" for uri in uris], RETRY, 10.0)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (FileVersion('"a"'), FileVersion('"a"'), False),
        (FileVersion('"a"'), FileVersion('"b"'), True),
        # Whether a tag is weak says nothing of the file.
        (FileVersion('"a"'), FileVersion('W/"a"'), False),
        # Servers behind one name may have copies of different times.
        (FileVersion('"a"', "Mon"), FileVersion('"a"', "Tue"), False),
        (FileVersion(None, "Mon"), FileVersion('"a"', "Mon"), False),
        (FileVersion(None, "Mon"), FileVersion(None, "Tue"), True),
        (FileVersion('"a"'), FileVersion(None, "Mon"), None),
        (FileVersion(), FileVersion('"a"', "Mon"), None),
        (FileVersion(), FileVersion(), None),
    ],
)
def test_versions_differ(one, other, expected):
    assert one.differs(other) is other.differs(one) is expected


@pytest.mark.parametrize(
    "modified",
    ["Thu, 26 Nov 2026 05:00:00 GMT", "2026-11-26T05:00:00+00:00", "1795669200000000000"],
)
def test_times_of_all_archives_are_read(modified):
    when = FileVersion(modified=modified).modified_at
    assert when == datetime(2026, 11, 26, 5, tzinfo=UTC)


@pytest.mark.parametrize("modified", [None, "", "yesterday", "9" * 40])
def test_a_time_that_cannot_be_read_is_none(modified):
    assert FileVersion(modified=modified).modified_at is None


def test_a_server_is_asked_by_heads(archive):
    n_requests = len(archive.requests)
    versions = ask(archive, *(frame.uri for frame in archive.frames))
    assert all(version.etag and version.modified_at for version in versions)
    assert {request.method for request in archive.requests[n_requests:]} == {"HEAD"}


def test_requests_are_repeated_and_redirects_followed(archive):
    uri, other = (frame.uri for frame in archive.frames)
    [expected] = ask(archive, other)
    archive.add_faults(
        uri, [Fault(status=503, retry_after_s=0), Fault(redirect=f"{archive.url}/{other}")]
    )
    assert ask(archive, uri) == [expected]


def test_what_is_not_known_is_a_reason(archive):
    uri, other = (frame.uri for frame in archive.frames)
    archive.add_faults(uri, [Fault(status=404)])
    reason, version = ask(archive, uri, other)
    assert reason == "HTTP 404 Not Found"
    assert version.etag


def test_a_mirror_states_the_time(tmp_path):
    path = tmp_path / "frame.fits"
    path.write_bytes(b"1")
    os.utime(path, ns=(0, 1_795_669_200_123_456_789))
    version, reason = ask_versions([path.as_uri(), (tmp_path / "none").as_uri()], RETRY, 10.0)
    assert version == FileVersion(modified="1795669200123456789")
    assert reason == "No such file or directory"


def observation(name):
    return SimpleNamespace(filename=name, download_url=f"https://archive/{name}")


def test_frames_that_were_never_fetched_are_not_asked_about(tmp_path):
    ledger = LocalLedger(tmp_path / "ledger.jsonl")
    fetched = Outcome(stage="download", filename="a", status="done", etag='"1"')
    for outcome in (
        fetched,
        replace(fetched, filename="b", etag='"2"'),
        replace(fetched, filename="c", status="failed"),
        replace(fetched, filename="d", etag=None),
    ):
        ledger.add(outcome)
    asked = []

    def answer(urls):
        asked.extend(urls)
        versions = {"a": FileVersion('"1"'), "b": FileVersion('"1"'), "d": "HTTP 404 Not Found"}
        return [versions[url[-1]] for url in urls]

    found = recheck_frames(map(observation, "abcde"), ledger, answer)
    assert asked == ["https://archive/a", "https://archive/b", "https://archive/d"]
    assert (found.n_asked, found.replaced) == (3, {"b"})
    assert dict(found.unknown) == {"HTTP 404 Not Found": 1}


@pytest.mark.parametrize(
    ("modified", "expected"),
    [
        ("Thu, 26 Nov 2020 05:00:00 GMT", set()),
        ("Thu, 26 Nov 2099 05:00:00 GMT", {"a"}),
        (None, None),
    ],
)
def test_without_a_recorded_version_the_time_decides(tmp_path, modified, expected):
    ledger = LocalLedger(tmp_path / "ledger.jsonl")
    # Put into images/ by somebody, and measured.
    ledger.add(Outcome(stage="extract", filename="a", status="done"))
    answer = [FileVersion('"1"', modified)]
    found = recheck_frames([observation("a")], ledger, lambda urls: answer)
    if expected is None:
        assert dict(found.unknown) == {"the archive states no version": 1}
    else:
        assert found.replaced == expected


def test_few_frames_are_asked_about_at_a_time(tmp_path):
    ledger = LocalLedger(tmp_path / "ledger.jsonl")
    lengths, n_advanced = [], 0

    def answer(urls):
        lengths.append(len(urls))
        return []

    def advance():
        nonlocal n_advanced
        n_advanced += 1

    names = map(str, range(2 * BATCH_SIZE + 1))
    recheck_frames(map(observation, names), ledger, answer, advance)
    assert (lengths, n_advanced) == ([0, 0, 0], 2 * BATCH_SIZE + 1)
