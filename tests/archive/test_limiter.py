"""Requests at once, their limit changed while some wait."""

from __future__ import annotations

import asyncio

import pytest

from spxdask.archive.limiter import RequestLimiter


class Requests:
    """Requests by number, which last until they are ended."""

    def __init__(self, limit):
        self.limiter, self.active = RequestLimiter(limit), []
        self._ends, self._tasks = {}, {}

    async def start(self, *numbers):
        for number in numbers:
            self._ends[number] = asyncio.Event()
            self._tasks[number] = asyncio.ensure_future(self._run(number))
        await settle()

    async def _run(self, number):
        async with self.limiter.take_turn():
            self.active.append(number)
            try:
                await self._ends[number].wait()
            finally:
                self.active.remove(number)

    async def end(self, number):
        self._ends[number].set()
        await settle()

    async def cancel(self, *numbers):
        for number in numbers:
            self._tasks[number].cancel()
        await settle()


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


def test_those_who_wait_take_their_turn():
    async def check():
        requests = Requests(2)
        await requests.start(1, 2, 3, 4)
        assert requests.active == [1, 2]
        await requests.end(1)
        assert requests.active == [2, 3]
        await requests.start(5)
        await requests.end(3)
        await requests.end(2)
        assert requests.active == [4, 5]

    asyncio.run(check())


def test_the_limit_may_be_changed_meanwhile():
    async def check():
        requests = Requests(1)
        await requests.start(1, 2, 3, 4)
        requests.limiter.limit = 3
        await requests.end(1)
        assert requests.active == [2, 3, 4]
        requests.limiter.limit = 1
        await requests.start(5, 6)
        for number, active in ((2, [3, 4]), (3, [4]), (4, [5]), (5, [6])):
            await requests.end(number)
            assert requests.active == active

    asyncio.run(check())


@pytest.mark.parametrize("cancelled", [(1,), (2,), (1, 2), (2, 1), (1, 2, 3)])
def test_a_request_that_is_given_up_gives_its_turn_to_the_next(cancelled):
    async def check():
        requests = Requests(1)
        await requests.start(1, 2, 3, 4)
        await requests.cancel(*cancelled)
        for number in sorted({1, 2, 3} - set(cancelled)):
            assert requests.active == [number]
            await requests.end(number)
        assert requests.active == [4]

    asyncio.run(check())


@pytest.mark.parametrize("limit", [0, -1, 0.5])
def test_one_request_is_always_made(limit):
    async def check():
        requests = Requests(limit)
        await requests.start(1, 2)
        assert requests.active == [1]

    asyncio.run(check())


def test_requests_are_expected_before_their_turn_and_when_announced():
    async def scenario():
        requests = Requests(1)
        await requests.start(0, 1, 2)
        expected = [requests.limiter.n_expected]
        with requests.limiter.announce():
            expected.append(requests.limiter.n_expected)
        await requests.end(0)
        await requests.cancel(1, 2)
        return [*expected, requests.limiter.n_expected]

    assert asyncio.run(scenario()) == [3, 4, 0]
