"""Errors carry their values, and bring them from one process to another."""

from __future__ import annotations

import pickle
import threading

import pytest
from astropy.table import Table

from spxdask import errors
from spxdask.errors import ArchiveError, CatalogueError, ConfigError, SpxdaskError

EVERY_ERROR = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize(
    "error",
    [
        *(kind("it is wrong", path="/some/where") for kind in EVERY_ERROR),
        *(kind("it is wrong") for kind in EVERY_ERROR),
        ConfigError(option="photometry.window_size", value=(1, 2), rule="large", path="run.yaml"),
        CatalogueError("duplicate target_id", path="sources.csv", rows=(3, 17)),
        ArchiveError("HTTP 503", path="https://host/x", attempts=6),
    ],
    ids=repr,
)
def test_errors_survive_the_way_between_processes(error):
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_a_value_that_cannot_be_pickled_does_not_keep_the_error_back():
    error = ConfigError(option="client", value=threading.Lock(), rule="a client")
    back = pickle.loads(pickle.dumps(error))
    assert str(back) == str(error)
    assert back.value == repr(error.value)
    assert isinstance(error.value, type(threading.Lock()))


def test_a_value_may_be_long_or_without_text():
    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError

    assert len(str(ConfigError(option="x", value="a" * 10_000, rule="short"))) < 150
    assert str(ConfigError(option="x", value=10**5000, rule="small")).endswith("type int")
    assert str(ConfigError(option="x", value=Mute(), rule="a text")).endswith("type Mute")
    table = Table({"ra": [1.0, 2.0]})
    assert str(ConfigError(option="x", value=table, rule="a path")).endswith("type Table")


def test_the_sentence_begins_with_the_path():
    assert str(SpxdaskError("it is wrong", path="a/b")) == "a/b: it is wrong"
    assert str(ArchiveError("HTTP 503", attempts=1)) == "HTTP 503 (after 1 attempt)"
    assert str(ArchiveError("HTTP 503", attempts=2)) == "HTTP 503 (after 2 attempts)"
