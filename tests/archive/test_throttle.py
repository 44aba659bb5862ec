"""One message of a kind in a while."""

from __future__ import annotations

import logging

import pytest

from spxdask.archive.throttle import MAX_KINDS, Throttle


@pytest.fixture
def show():
    """Return a function that shows a record at a time, None if it is not shown."""
    times = []
    throttle = Throttle(10.0, clock=lambda: times[-1])

    def show(at, kind="502", **more):
        times.append(at)
        values = {"name": "spxdask.test", "levelno": logging.INFO, "msg": f"{kind} at %g"}
        record = logging.makeLogRecord(values | {"args": (at,), "kind": kind} | more)
        return record.getMessage() if throttle.filter(record) else None

    return show


def test_the_first_of_a_kind_is_shown_at_once_and_the_others_are_counted(show):
    assert show(0) == "502 at 0"
    assert [show(at / 100) for at in range(1, 990)] == [None] * 989
    assert show(5, "stalled") == "stalled at 5"
    assert show(10) == "502 at 10 (989 more like this before)"
    assert show(30) == "502 at 30"


def test_those_that_another_process_did_not_show_count(show):
    assert show(0, n_similar=3) == "502 at 0 (3 more like this before)"
    assert show(1, n_similar=4) is None
    assert show(11, n_similar=2) == "502 at 11 (7 more like this before)"


def test_other_messages_are_all_shown(show):
    assert [show(0, None) for _ in range(3)] == ["None at 0"] * 3


def test_all_are_shown_when_debugging(show):
    logger = logging.getLogger("spxdask.test")
    logger.setLevel(logging.DEBUG)
    try:
        assert [show(0) for _ in range(3)] == ["502 at 0"] * 3
    finally:
        logger.setLevel(logging.NOTSET)


def test_not_all_kinds_are_remembered(show):
    for number in range(MAX_KINDS + 2):
        assert show(0, str(number)) is not None
    assert show(0, "0") is not None
