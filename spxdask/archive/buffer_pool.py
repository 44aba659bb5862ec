"""BufferPool that is used again: fresh pages cost more than what is copied into them."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Of huge pages, where there are any.
STEP = 2 << 20


class BufferPool:
    """Blocks of memory, lent to one at a time and kept for the next.

    There are never more of them than were lent at once.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._lent = 0
        self._changed = threading.Condition()

    @contextmanager
    def lease(self, size: int, limit: float = math.inf) -> Iterator[memoryview]:
        """Lend `size` bytes, aligned to pages; what they hold is left from the last use.

        After the block, nothing may look at them any more. If it ends in an error, the
        memory is not lent again, as something may.

        Parameters
        ----------
        size : int
        limit : float
            Wait until no more bytes than this are lent with these, or no others.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._lent or self._lent + size <= limit)
            self._lent += size
        try:
            block = self._take(size)
            yield memoryview(block)[:size]
            with self._changed:
                self._free.append(block)
        finally:
            with self._changed:
                self._lent -= size
                self._changed.notify_all()

    def _take(self, size: int) -> mmap.mmap:
        with self._changed:
            for block in self._free:
                if len(block) >= size:
                    self._free.remove(block)
                    return block
            # Too small for what comes now.
            del self._free[:1]
        block = mmap.mmap(-1, -(-max(size, 1) // STEP) * STEP)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # A kernel without huge pages is slower, and no matter.
            with suppress(OSError):
                block.madvise(mmap.MADV_HUGEPAGE)
        return block
