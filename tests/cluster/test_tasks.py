"""One task, and many with a bound on how many are in flight."""

from __future__ import annotations

import time

import pytest

from spxdask.cluster.tasks import (
    as_task,
    error_as_value,
    make_thread_window,
    run_one,
    run_window,
)
from spxdask.errors import ArchiveError, ClusterError


def fail(error: Exception):
    raise error


def test_one_task(client):
    assert run_one(client, divmod, 7, 2, key=("divide", "a")) == (3, 1)


def test_one_task_that_fails(client):
    error = ArchiveError("it rests", path="http://127.0.0.1", attempts=3)
    with pytest.raises(ArchiveError) as caught:
        run_one(client, fail, error, key=("fail", "a"))
    assert (caught.value.path, caught.value.attempts) == ("http://127.0.0.1", 3)


def test_bugs_are_raised_and_not_returned():
    assert isinstance(error_as_value(fail, ArchiveError("it rests")), ArchiveError)
    with pytest.raises(ZeroDivisionError):
        error_as_value(divmod, 1, 0)


def test_a_client_of_another_version(client):
    result = client.submit(error_as_value, abs, -1, version="0.0.1").result()
    assert isinstance(result, ClusterError)
    assert "the client spxdask 0.0.1" in result.reason


def work() -> tuple[float, float]:
    """Return when it began and ended, on the clock that all processes of the machine share."""
    began = time.monotonic()
    time.sleep(0.02)
    return began, time.monotonic()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_window_bounds_the_tasks_in_flight(client, size):
    read = []

    def tasks():
        for n in range(12):
            read.append(n)
            yield n, as_task(("work", f"{size}-{n}"), work)

    times = {}
    for item, result in run_window(client, tasks(), lambda: size):
        # Tasks are read only as others end.
        assert len(read) <= len(times) + 2 * size
        times[item] = result
    assert sorted(times) == list(range(12))
    at_once = [sum(b <= began < e for b, e in times.values()) for began, _ in times.values()]
    assert max(at_once) <= size


def test_a_window_yields_errors_in_place_of_results(client):
    errors = {"ours": ArchiveError("it rests"), "bug": ZeroDivisionError()}
    tasks = ((name, as_task(("fail", name), fail, error)) for name, error in errors.items())
    results = dict(run_window(client, tasks, lambda: 2))
    assert isinstance(results["ours"], ArchiveError)
    assert isinstance(results["bug"], ZeroDivisionError)


def test_an_interrupt_ends_a_window(client):
    """No further task is begun; what has ended is yielded, then comes the interrupt."""
    read = []

    def tasks():
        for n in range(10):
            if n == 4:
                raise KeyboardInterrupt
            read.append(n)
            yield n, as_task(("negate", f"interrupt-{n}"), abs, -n)

    results = []

    def consume() -> None:
        results.extend(run_window(client, tasks(), lambda: 2, interrupt_grace_s=30))

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert read == [0, 1, 2, 3]
    assert all(item == result for item, result in results)


def test_a_window_of_threads_follows_the_cluster(client):
    assert make_thread_window(client)() == 2 * 2 * 3
