"""Blocks of memory are lent to one at a time."""

from __future__ import annotations

import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest

from spxdask.archive.buffer_pool import BufferPool


def address(block: memoryview) -> int:
    return np.frombuffer(block, np.uint8).ctypes.data


def test_blocks_are_used_again_and_never_shared():
    memory = BufferPool()
    with memory.lease(100_000) as one, memory.lease(100_000) as other:
        assert len(one) == len(other) == 100_000
        assert address(one) % mmap.PAGESIZE == 0
        first = {address(one), address(other)}
        assert len(first) == 2
    with memory.lease(5_000) as one, memory.lease(90_000) as other:
        assert {address(one), address(other)} == first


def test_a_block_that_is_too_small_makes_room_for_a_larger():
    memory = BufferPool()
    with memory.lease(1):
        pass
    with memory.lease(50 << 20) as large:
        large[-1] = 1
        there = address(large)
    with memory.lease(1) as one:
        assert address(one) == there


def test_what_an_error_left_is_not_lent_again():
    memory = BufferPool()
    with pytest.raises(KeyError), memory.lease(10) as one:
        raise KeyError
    with memory.lease(10) as other:
        assert address(other) != address(one)


def test_nothing_can_be_lent_too():
    with BufferPool().lease(0) as block:
        assert len(block) == 0


class Noticing(threading.Condition):
    """Says when somebody begins to wait; then it is too late to be lent anything first."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = threading.Semaphore(0)

    def wait(self, timeout=None):
        self.waiting.release()
        return super().wait(timeout)


@pytest.fixture
def memory():
    memory = BufferPool()
    memory._changed = Noticing()
    return memory


class Borrower:
    """A thread that takes a block and keeps it until it is told to give it back."""

    def __init__(self, pool, memory, size, limit) -> None:
        self.has, self.enough = threading.Event(), threading.Event()
        self.ended = pool.submit(self.run, memory, size, limit)

    def run(self, memory, size, limit) -> None:
        with memory.lease(size, limit) as block:
            assert len(block) == size
            self.has.set()
            assert self.enough.wait(60)

    def give_back(self) -> None:
        self.enough.set()
        self.ended.result(60)


@pytest.fixture
def pool():
    with ThreadPoolExecutor() as pool:
        yield pool


def assert_waits(borrower, memory) -> None:
    assert memory._changed.waiting.acquire(timeout=60)
    assert not borrower.has.is_set()


def test_who_would_go_over_the_limit_waits(memory, pool):
    first, second = (Borrower(pool, memory, 40, 100) for _ in range(2))
    assert first.has.wait(60)
    assert second.has.wait(60)
    third = Borrower(pool, memory, 40, 100)
    assert_waits(third, memory)
    # One who needs less is not held up by one who waits.
    small = Borrower(pool, memory, 20, 100)
    assert small.has.wait(60)
    small.give_back()
    assert_waits(third, memory)
    first.give_back()
    assert third.has.wait(60)
    second.give_back()
    third.give_back()


def test_more_than_the_limit_is_lent_alone(memory, pool):
    large = Borrower(pool, memory, 500, 100)
    assert large.has.wait(60)
    small = Borrower(pool, memory, 1, 100)
    assert_waits(small, memory)
    large.give_back()
    assert small.has.wait(60)
    larger = Borrower(pool, memory, 600, 100)
    assert_waits(larger, memory)
    small.give_back()
    assert larger.has.wait(60)
    larger.give_back()


def test_what_an_error_kept_counts_no_more(memory, pool):
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(KeyError))
        stack.enter_context(memory.lease(100, 100))
        borrower = Borrower(pool, memory, 100, 100)
        assert_waits(borrower, memory)
        raise KeyError
    assert borrower.has.wait(60)
    borrower.give_back()


def test_only_what_is_held_of_a_sparse_file_counts(memory, pool):
    with memory.lease_sparse(1000, 100) as parts:
        assert len(parts.memory) == 1000
        assert not any(parts.memory)
        first = Borrower(pool, memory, 40, 100)
        assert first.has.wait(60)
        parts.reserve(60)
        # Who holds something already does not wait for more, which could be for ever.
        parts.reserve(90)
        parts.reserve(10)
        assert parts.reserved_bytes == 90
        second = Borrower(pool, memory, 40, 100)
        assert_waits(second, memory)
        first.give_back()
        assert_waits(second, memory)
    assert second.has.wait(60)
    second.give_back()


def test_a_sparse_file_waits_for_room_once(memory, pool):
    large = Borrower(pool, memory, 90, 100)
    assert large.has.wait(60)

    def reserve() -> None:
        with memory.lease_sparse(1000, 100) as parts:
            parts.reserve(20)

    waiting = pool.submit(reserve)
    assert memory._changed.waiting.acquire(timeout=60)
    large.give_back()
    waiting.result(60)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="counts pages of Linux")
def test_a_sparse_file_has_the_pages_that_were_written_and_loses_them():
    def count() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    before = count()
    with BufferPool().lease_sparse(256 << 20) as parts:
        for start in range(0, 256 << 20, 1 << 20):
            parts.memory[start] = 1
        held = count() - before
        kept = parts.memory
    assert 256 <= held < 1000
    assert count() - before < 100
    assert len(kept) == 256 << 20
