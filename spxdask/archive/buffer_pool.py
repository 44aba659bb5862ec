"""Memory for frames that is used again, as fresh pages cost more than a copy into them."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Size of a huge page on common systems; blocks are a multiple of it.
HUGE_PAGE_BYTES = 2 << 20


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
            self._changed.wait_for(
                lambda: not self._leased_bytes or self._leased_bytes + size <= limit
            )
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
