"""What became of every frame is known again, whatever happened to the file."""

from __future__ import annotations

import dataclasses
import json
import math
from datetime import datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from objectstore import BUCKET, serving

from spxdask.run.ledger import LINE_BYTES, LocalLedger, Outcome, StoreLedger, open_ledger
from spxdask.run.plan import has_failed
from spxdask.storage import open_store

FULL = Outcome(
    stage="extract",
    filename="level2_2025W51_1A_0684_2D3_spx_l2b-v21-2025-354.fits",
    status="failed",
    reason='line one\nline "two" \\ ü \u2028',
    seconds=1.2346,
    bytes=2**40,
    attempts=3,
    rows=17,
    skipped={"too few usable pixels": 2, "margin": 1},
    warnings=("first, with comma", "second\r\n"),
    psf_empty={"a bad pixel at the centre": 4},
    properties={"mjd": 61027.25, "psf": "epsf product", "is_zodi_fitted": True},
    sources_fingerprint="def",
    bounding_circle=(270.0, -66.56, 2.0 / 3.0),
    checksum="00ff00ff",
    recipe="0123",
    catalogue="4567",
    frame_bytes=71_600_000,
    etag='"abc"',
    modified="Thu, 26 Nov 2026 05:00:00 GMT",
    frame_checksum="xxh64:0",
    blame="archive",
    read="rows",
    requests=4,
    refusal="HTTP 200",
    time="2026-11-26T05:00:00+00:00",
)


def outcome(filename="a.fits", stage="download", status="done", **more) -> Outcome:
    return Outcome(filename=filename, stage=stage, status=status, **more)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def test_a_new_ledger_touches_nothing(path):
    assert LocalLedger(path).get("download", "a.fits") is None
    assert not path.exists()


def test_every_field_comes_back(path):
    ledger = LocalLedger(path)
    ledger.add(FULL)
    assert ledger.get(FULL.stage, FULL.filename) == FULL
    back = LocalLedger(str(path)).get(FULL.stage, FULL.filename)
    assert back == FULL
    assert type(back.warnings) is type(back.bounding_circle) is tuple
    # So that the test grows with the class.
    plain = outcome()
    assert all(
        getattr(FULL, option.name) != getattr(plain, option.name)
        for option in dataclasses.fields(Outcome)
    )


TEXT = st.text(st.characters())
DEGREES = st.floats(-360.0, 360.0)


@given(
    st.lists(
        st.builds(
            Outcome,
            stage=st.sampled_from(["download", "extract"]),
            filename=st.sampled_from(["a", "b"]) | TEXT,
            status=st.sampled_from(["done", "failed"]),
            reason=st.none() | TEXT,
            seconds=st.integers(0, 10**6).map(lambda k: k / 1e4),
            bytes=st.integers(0, 2**63),
            attempts=st.integers(0, 99),
            rows=st.integers(0, 2**63),
            skipped=st.dictionaries(TEXT, st.integers(0, 99)),
            warnings=st.lists(TEXT).map(tuple),
            psf_empty=st.dictionaries(TEXT, st.integers(0, 99)),
            properties=st.dictionaries(TEXT, st.booleans() | DEGREES | TEXT),
            sources_fingerprint=st.none() | TEXT,
            bounding_circle=st.none() | st.tuples(DEGREES, DEGREES, DEGREES),
            checksum=st.none() | TEXT,
            recipe=st.none() | TEXT,
            catalogue=st.none() | TEXT,
            etag=st.none() | TEXT,
            modified=st.none() | TEXT,
            frame_checksum=st.none() | TEXT,
        ),
        max_size=6,
    )
)
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_outcomes_come_back_the_last_of_each(tmp_path_factory, outcomes):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    for one in outcomes:
        # A new object each time, as a resumed run has.
        LocalLedger(path).add(one)
    ledger = LocalLedger(path)
    for one in {(o.stage, o.filename): o for o in outcomes}.values():
        assert ledger.get(one.stage, one.filename) == one


def test_the_last_word_counts(path):
    ledger = LocalLedger(path)
    ledger.add(outcome(status="failed", reason="503", attempts=6))
    ledger.add(outcome(stage="extract", rows=5))
    ledger.add(outcome("b.fits"))
    ledger.add(outcome(bytes=71))
    for seen in (ledger, LocalLedger(path)):
        assert seen.get("download", "a.fits") == outcome(bytes=71)
        assert seen.get("extract", "a.fits") == outcome(stage="extract", rows=5)
        assert seen.get("download", "b.fits") == outcome("b.fits")
        assert seen.get("extract", "b.fits") is None


def test_a_frame_has_failed_when_the_last_word_of_a_stage_is_so(path):
    ledger = LocalLedger(path)
    steps = [
        (outcome(status="failed"), True),
        (outcome(), False),
        (outcome(stage="extract", status="failed"), True),
        (outcome("b.fits"), True),
        (outcome(stage="extract"), False),
        (outcome(status="failed"), True),
    ]
    assert not has_failed(ledger, "a.fits")
    for one, failed in steps:
        ledger.add(one)
        reopened = LocalLedger(path)
        assert has_failed(ledger, "a.fits") == has_failed(reopened, "a.fits") == failed
    assert not has_failed(ledger, "b.fits")


def test_the_last_success_outlives_failures(path):
    ledger = LocalLedger(path)
    assert ledger.get_done("extract", "a.fits") is None
    first, second = (outcome(stage="extract", rows=rows) for rows in (1, 2))
    failure = outcome(stage="extract", status="failed", reason="x")
    for one, expected in [
        (failure, None),
        (first, first),
        (failure, first),
        (failure, first),
        (second, second),
        (failure, second),
    ]:
        ledger.add(one)
        for found in (ledger, LocalLedger(path)):
            assert found.get("extract", "a.fits") == one
            assert found.get_done("extract", "a.fits") == expected
            assert found.get_done("download", "a.fits") is None


def test_the_last_time_is_that_of_the_last_whole_line(path):
    ledger = LocalLedger(path)
    assert ledger.last_time is None
    ledger.add(outcome())
    line = json.loads(path.read_text())
    times = ["2001-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"]
    path.write_text("".join(json.dumps(line | {"time": time}) + "\n" for time in times))
    assert LocalLedger(path).last_time == times[1]
    path.write_text(path.read_text()[:-5])
    ledger = LocalLedger(path)
    assert ledger.last_time == times[0]
    ledger.add(outcome("b.fits"))
    assert ledger.last_time == LocalLedger(path).last_time > times[1]


def test_lines_are_only_appended_and_carry_the_time(path):
    LocalLedger(path).add(outcome("a.fits"))
    before = path.read_bytes()
    LocalLedger(path).add(FULL)
    after = path.read_bytes()
    assert after.startswith(before)
    lines = after.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert datetime.fromisoformat(json.loads(line)["time"]).utcoffset().total_seconds() == 0


def test_a_torn_last_line_is_ignored_and_the_next_is_read(path):
    LocalLedger(path).add(outcome("a.fits"))
    first = path.read_bytes()
    LocalLedger(path).add(FULL)
    whole = path.read_bytes()
    for cut in range(len(first), len(whole)):
        path.write_bytes(whole[:cut])
        torn = LocalLedger(path)
        # Also one that lacks only its line feed: somebody may be in the middle of writing it.
        assert torn.get(FULL.stage, FULL.filename) is None, cut
        torn.add(outcome("b.fits"))
        # Now that a line follows, all of it is known to be there.
        expected = FULL if cut == len(whole) - 1 else None
        for ledger in (torn, LocalLedger(path)):
            assert ledger.get("download", "a.fits") == outcome("a.fits")
            assert ledger.get("download", "b.fits") == outcome("b.fits")
            assert ledger.get(FULL.stage, FULL.filename) == expected, cut


def test_a_torn_line_does_not_undo_an_earlier_one(path):
    LocalLedger(path).add(outcome(rows=1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-5])
    assert LocalLedger(path).get("download", "a.fits") == outcome(rows=1)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\n",
        b"\0" * 50,
        b"\xff\xfe\x80",
        b"5",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b'{"stage": "download"}',
        b'{"stage": [], "filename": "a.fits", "status": "done"}',
        b'{"stage": "download", "filename": {}, "status": "done"}',
        b'{"stage": "download", "filename": "a.fits", "status": "done", "warnings": 5}',
        b'{"stage": "download", "filename": "a.fits", "status": "done", "cap": 5}',
        b'{"stage": "download", "filename": "a.fits", "status": "done", "bounding_circle": 5}',
        b'{"recipe": "0123"}',
        b'{"recipe": "0123", "steps": 5}',
        b'{"recipe": 5, "steps": {}}',
        b'{"stage": "download", "filename": "a.fits", "status": "done", "rows": 9} trailing',
        b"stage: download",
    ],
)
def test_foreign_lines_are_ignored(path, garbage):
    LocalLedger(path).add(outcome("a.fits"))
    with open(path, "ab") as file:
        file.write(garbage + b"\n" + garbage)
    LocalLedger(path).add(outcome("b.fits"))
    ledger = LocalLedger(path)
    assert ledger.get("download", "a.fits") == outcome("a.fits")
    assert ledger.get("download", "b.fits") == outcome("b.fits")


def test_fields_of_a_later_version_are_ignored(path):
    record = {"stage": "extract", "filename": "a", "status": "done", "rows": 3, "new": [1]}
    path.write_text(json.dumps(record) + "\n")
    assert LocalLedger(path).get("extract", "a") == Outcome(
        stage="extract", filename="a", status="done", rows=3
    )


def test_what_could_not_be_written_did_not_happen(path):
    ledger = LocalLedger(path.parent / "absent" / path.name)
    with pytest.raises(FileNotFoundError):
        ledger.add(outcome())
    assert ledger.get("download", "a.fits") is None


@pytest.mark.parametrize("length", [*range(LINE_BYTES - 2, LINE_BYTES + 3), 2 * LINE_BYTES, 10**6])
def test_lines_of_any_length(path, length):
    ledger = LocalLedger(path)
    ledger.add(outcome(status="failed", reason="x"))
    long = outcome(status="failed", reason="x" * (1 + length - path.stat().st_size))
    ledger.add(long)
    ledger.add(outcome("b.fits"))
    assert len(path.read_bytes().splitlines(keepends=True)[1]) == length
    for seen in (ledger, LocalLedger(path)):
        assert seen.get("download", "a.fits") == long
        assert seen.get("download", "b.fits") == outcome("b.fits")


def test_what_another_adds_is_seen_after_a_refresh(path):
    """A run's own ledger, and that of somebody who looks on."""
    run, other = LocalLedger(path), LocalLedger(path)
    run.add(outcome(rows=1))
    assert other.get("download", "a.fits") is None
    other.refresh()
    assert other.get("download", "a.fits") == outcome(rows=1)
    run.add(outcome(rows=2))
    run.add(FULL)
    assert other.get("download", "a.fits") == outcome(rows=1)
    other.refresh()
    assert other.get("download", "a.fits") == outcome(rows=2)
    assert other.get(FULL.stage, FULL.filename) == FULL
    assert other.last_time == run.last_time
    # To write is to look, too.
    other.add(outcome("b.fits"))
    assert run.get("download", "b.fits") is None
    run.add(outcome("c.fits"))
    assert run.get("download", "b.fits") == outcome("b.fits")
    assert other.get("download", "c.fits") is None


def test_a_line_that_comes_in_pieces_is_seen_when_it_is_whole(path):
    LocalLedger(path).add(FULL)
    line = path.read_bytes()
    path.write_bytes(b"")
    ledger = LocalLedger(path)
    for at in range(0, len(line), 100):
        assert ledger.get(FULL.stage, FULL.filename) is None
        with open(path, "ab") as file:
            file.write(line[at : at + 100])
        ledger.refresh()
    assert ledger.get(FULL.stage, FULL.filename) == FULL


def test_a_ledger_that_somebody_cut(path):
    ledger = LocalLedger(path)
    ledger.add(outcome())
    ledger.add(FULL)
    path.write_bytes(path.read_bytes()[:-10])
    assert ledger.get("download", "a.fits") == outcome()
    assert ledger.get(FULL.stage, FULL.filename) is None
    path.write_bytes(b"")
    assert ledger.get("download", "a.fits") is None


@pytest.mark.parametrize("other", [False, True])
def test_a_ledger_that_somebody_removed(path, other):
    ledger = LocalLedger(path)
    ledger.add(outcome())
    path.unlink()
    if other:
        LocalLedger(path).add(FULL)
    ledger.refresh()
    assert ledger.get("download", "a.fits") is None
    assert ledger.get(FULL.stage, FULL.filename) == (FULL if other else None)
    ledger.add(outcome())
    assert ledger.get("download", "a.fits") == outcome()
    assert LocalLedger(path).get("download", "a.fits") == outcome()


# Lines of earlier versions


def test_fields_of_earlier_versions_are_read(path):
    record = {"stage": "extract", "filename": "a", "status": "done", "fingerprint": "f"}
    path.write_text(json.dumps(record | {"sources": "s", "cap": [1.0, 2.0, 3.0]}) + "\n")
    assert LocalLedger(path).get("extract", "a") == Outcome(
        stage="extract",
        filename="a",
        status="done",
        sources_fingerprint="s",
        bounding_circle=(1.0, 2.0, 3.0),
    )


# Recipes

STEPS = {"background": {"version": 1, "annulus": [4.0, 8.0]}, "zodi": {"version": 2}}


@pytest.fixture(scope="module")
def s3():
    with serving() as filesystem:
        yield filesystem


@pytest.fixture(params=["disk", "store"])
def state(request, tmp_path):
    if request.param == "disk":
        return open_store(tmp_path)
    request.getfixturevalue("s3")
    return open_store(f"s3://{BUCKET}/{tmp_path.name}")


def test_a_recipe_is_written_once(state):
    ledger = open_ledger(state)
    assert ledger.recipes == {}
    ledger.add(outcome(recipe="0123"))
    ledger.add_recipe("0123", STEPS)
    ledger.add_recipe("0123", STEPS)
    ledger.add_recipe("4567", {})
    ledger.add(outcome("b.fits", recipe="0123"))
    ledger.add_recipe("0123", STEPS)
    ledger.flush()
    again = open_ledger(state)
    again.add_recipe("0123", STEPS)
    again.flush()
    for found in (ledger, again, open_ledger(state)):
        assert found.recipes == {"0123": STEPS, "4567": {}}
        assert found.get("download", "a.fits") == outcome(recipe="0123")
        assert found.get("download", "b.fits") == outcome("b.fits", recipe="0123")
    folder = state if state.local_path else state / "ledger"
    text = b"".join(folder.get_many(sorted(folder.list_names())))
    records = [json.loads(line) for line in text.splitlines()]
    assert [r for r in records if "stage" not in r] == [
        {"recipe": "0123", "steps": STEPS},
        {"recipe": "4567", "steps": {}},
    ]


def test_recipes_go_with_the_file(path):
    ledger = LocalLedger(path)
    ledger.add_recipe("0123", STEPS)
    path.unlink()
    ledger.refresh()
    assert ledger.recipes == {}


# In a store


@pytest.fixture
def folder(s3, tmp_path):
    """A folder of the test's own."""
    return open_store(f"s3://{BUCKET}/{tmp_path.name}/ledger")


def make(folder, **options) -> StoreLedger:
    """Open a ledger that sends nothing but its first line before it has to."""
    return StoreLedger(folder, **({"flush_interval_s": math.inf} | options))


def contents(folder) -> dict[str, bytes]:
    return {name: folder.get(name) for name in sorted(folder.list_names())}


def test_a_ledger_in_a_store(folder):
    ledger, other = make(folder), make(folder)
    ledger.flush()
    assert contents(folder) == {}
    for rows in range(3):
        ledger.add(outcome(rows=rows))
        ledger.add(outcome(f"{rows}.fits", bounding_circle=(1.0, 2.0, 3.0), warnings=("w",)))
    assert ledger.get("download", "a.fits") == outcome(rows=2)
    # What is not yet in the store is nowhere for others.
    for found in (other, make(folder)):
        found.refresh()
        assert found.get("download", "a.fits") == outcome(rows=0)
        assert found.get("download", "0.fits") is None
    ledger.flush()
    for found in (other, make(folder)):
        found.refresh()
        assert found.get("download", "a.fits") == outcome(rows=2)
        assert found.get("download", "1.fits") == ledger.get("download", "1.fits")
        assert found.last_time == ledger.last_time
    assert len(contents(folder)) == 1


def test_lines_are_sent_while_more_come(folder):
    ledger, other = make(folder, flush_interval_s=0.0), make(folder)
    for rows in range(1, 5):
        ledger.add(outcome(rows=rows))
        ledger.add(outcome(f"{rows}.fits"))
        other.refresh()
        assert other.get("download", "a.fits") == outcome(rows=rows)
        assert other.get("download", f"{rows}.fits") == outcome(f"{rows}.fits")
        assert list(contents(folder)) == ["00000001.jsonl"]


def test_a_crash_costs_the_last_lines_only(folder):
    ledger = make(folder)
    ledger.add(outcome(rows=1))
    ledger.add(outcome(rows=2))
    ledger.add(outcome("b.fits"))
    del ledger
    after = make(folder)
    assert after.get("download", "a.fits") == outcome(rows=1)
    assert after.get("download", "b.fits") is None
    after.add(outcome("b.fits"))
    after.flush()
    again = make(folder)
    assert again.get("download", "a.fits") == outcome(rows=1)
    assert again.get("download", "b.fits") == outcome("b.fits")


def test_full_files_are_not_sent_again(folder):
    ledger, other = make(folder, segment_bytes=1000), make(folder)
    for number in range(100):
        ledger.add(outcome(f"{number}.fits", rows=number + 1))
        if number == 50:
            before = contents(folder)
            other.refresh()
    ledger.flush()
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before) > 1
    assert all(1000 <= len(text) < 1200 for text in list(after.values())[:-1])
    other.refresh()
    for found in (ledger, other, make(folder)):
        for number in range(100):
            assert found.get("download", f"{number}.fits").rows == number + 1


def test_runs_that_take_turns_have_the_last_word_in_turn(folder):
    """Each with a ledger that it opened before the others wrote."""
    ledgers = [make(folder) for _ in range(3)]
    for rows, ledger in enumerate(ledgers * 2, 1):
        ledger.add(outcome(rows=rows))
        ledger.add(outcome(f"{rows}.fits"))
        ledger.flush()
        for one in (ledger, make(folder)):
            assert one.get("download", "a.fits").rows == rows
            assert all(one.get("download", f"{n}.fits") for n in range(1, rows + 1))
    for ledger in ledgers:
        ledger.refresh()
        assert ledger.get("download", "a.fits").rows == 6


def test_what_is_not_of_the_ledger_is_let_alone(folder):
    folder.put("notes.txt", b"mine")
    folder.put("00000007.jsonl", b"{}\n[1]\nnonsense\n")
    ledger = make(folder)
    ledger.add(outcome())
    ledger.flush()
    assert contents(folder).keys() == {*("notes.txt", "00000007.jsonl", "00000008.jsonl")}
    assert make(folder).get("download", "a.fits") == outcome()
