"""Blocks of memory are lent to one at a time."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from spxdask.memory import Memory


def address(block: memoryview) -> int:
    return np.frombuffer(block, np.uint8).ctypes.data


def test_blocks_are_used_again_and_never_shared():
    memory = Memory()
    with memory.take(100_000) as one, memory.take(100_000) as other:
        assert len(one) == len(other) == 100_000
        assert address(one) % mmap.PAGESIZE == 0
        first = {address(one), address(other)}
        assert len(first) == 2
    with memory.take(5_000) as one, memory.take(90_000) as other:
        assert {address(one), address(other)} == first


def test_a_block_that_is_too_small_makes_room_for_a_larger():
    memory = Memory()
    with memory.take(1):
        pass
    with memory.take(50 << 20) as large:
        large[-1] = 1
        there = address(large)
    with memory.take(1) as one:
        assert address(one) == there


def test_what_an_error_left_is_not_lent_again():
    memory = Memory()
    with pytest.raises(KeyError), memory.take(10) as one:
        raise KeyError
    with memory.take(10) as other:
        assert address(other) != address(one)


def test_nothing_can_be_lent_too():
    with Memory().take(0) as block:
        assert len(block) == 0
