"""Memory for frames that is used again, as fresh pages cost more than a copy into them."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# Size of a huge page on common systems; blocks are a multiple of it.
HUGE_PAGE_BYTES = 2 << 20


class SparseMemory:
    """Memory as long as a file of which only some parts are held, so that few pages of it exist.

    Parameters
    ----------
    length : int
        Length of the file, bytes.
    count : callable
        Takes a number of further bytes that will be held; may wait.

    Attributes
    ----------
    memory : memoryview
        The memory, of `length` bytes; zeros where nothing was written.
    reserved_bytes : int
        Bytes that count as held.
    """

    def __init__(self, length: int, count: Callable[[int, bool], None]) -> None:
        self._block = mmap.mmap(-1, max(length, 1))
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            # One byte would hold two megabytes.
            with suppress(OSError):
                self._block.madvise(mmap.MADV_NOHUGEPAGE)
        self.memory = memoryview(self._block)[:length]
        self.reserved_bytes = 0
        self._count = count

    def reserve(self, size: int) -> None:
        """Count bytes as held, before they are received.

        The first call waits for room. Later ones do not: two users that wait for each other,
        while they hold what the other waits for, would wait for ever.

        Parameters
        ----------
        size : int
            Bytes that are held from now on, those of earlier calls included.
        """
        if size > self.reserved_bytes:
            self._count(size - self.reserved_bytes, not self.reserved_bytes)
            self.reserved_bytes = size

    def release(self) -> None:
        """Return the pages to the system, whoever may still refer to the memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._block.madvise(mmap.MADV_DONTNEED)


class BufferPool:
    """Blocks of memory, each leased to one user at a time and kept for the next.

    The pool never holds more blocks than were leased at the same time.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._leased_bytes = 0
        self._changed = threading.Condition()

    @contextmanager
    def lease(self, size: int, limit: float = math.inf) -> Iterator[memoryview]:
        """Lease page-aligned memory for the duration of a ``with`` block.

        The memory still contains what its last user wrote. After the block nothing may
        refer to it. If the block ends in an error, a traceback may, and the memory is
        not leased again.

        Parameters
        ----------
        size : int
            Bytes to lease.
        limit : float
            Wait until this lease keeps the sum of all leases within so many bytes, or
            is the only one.

        Yields
        ------
        memoryview
            The memory, of `size` bytes.
        """
        with self._changed:
            self._wait_for_room(size, limit)
            self._leased_bytes += size
        try:
            block = self._get_block(size)
            yield memoryview(block)[:size]
            with self._changed:
                self._free.append(block)
        finally:
            with self._changed:
                self._leased_bytes -= size
                self._changed.notify_all()

    @contextmanager
    def lease_sparse(self, length: int, limit: float = math.inf) -> Iterator[SparseMemory]:
        """Lease memory for parts of a file, for the duration of a ``with`` block.

        Nothing counts before the user knows how many bytes it needs, and calls
        `SparseMemory.reserve`. After the block nothing may refer to the memory.

        Parameters
        ----------
        length : int
            Length of the file, bytes.
        limit : float
            `SparseMemory.reserve` waits until the sum of all leases is within so many bytes, or
            there is no other.

        Yields
        ------
        SparseMemory
            Zeros.
        """

        def count(size: int, may_wait: bool) -> None:
            with self._changed:
                if may_wait:
                    self._wait_for_room(size, limit)
                self._leased_bytes += size

        leased = SparseMemory(length, count)
        try:
            yield leased
        finally:
            leased.release()
            with self._changed:
                self._leased_bytes -= leased.reserved_bytes
                self._changed.notify_all()

    def _wait_for_room(self, size: int, limit: float) -> None:
        """Wait until a lease keeps the sum within the limit, or is the only one."""
        self._changed.wait_for(lambda: not self._leased_bytes or self._leased_bytes + size <= limit)

    def _get_block(self, size: int) -> mmap.mmap:
        """Return a free block of at least `size` bytes, or a new one."""
        with self._changed:
            for block in self._free:
                if len(block) >= size:
                    self._free.remove(block)
                    return block
            # All free blocks are too small, so one of them makes room for the new one.
            del self._free[:1]
        block = mmap.mmap(-1, -(-max(size, 1) // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # A kernel without huge pages refuses; the memory works all the same.
            with suppress(OSError):
                block.madvise(mmap.MADV_HUGEPAGE)
        return block
