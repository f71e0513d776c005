"""Regions of the memory that workers of one host share: where each lies, and which were given up.

Every worker keeps the same table, since all ask for the same in the same order; one that joins is given it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import Any

Region = tuple[int, int]
"""Where it starts, and its length in bytes, whole pages."""


class Regions:
    """One worker's table of the memory behind a descriptor, and what it has mapped of it."""

    def __init__(self, descriptor: int):
        """Begin with none."""
        self._descriptor = descriptor
        self._end = 0
        self._named: dict[str, Region] = {}
        self._free: list[Region] = []
        self._maps: dict[Region, mmap.mmap] = {}

    def known(self, name: str, num_bytes: int) -> mmap.mmap | None:
        """Return the region `name` if it is of that length; give it up if it is of another."""
        region = self._named.get(name)
        if region is None:
            return None
        if region[1] != _whole_pages(num_bytes):
            self._free.append(self._named.pop(name))
            # Its pages go back to the system. All do this before any of them takes it again: they meet in between.
            with contextlib.suppress(OSError, ValueError):
                self.map(region).madvise(mmap.MADV_REMOVE)
            return None
        return self.map(region)

    def take(self, name: str, num_bytes: int, makes: bool) -> Region:
        """Return a region for `name` (empty: without one) that nobody uses.

        Args:
            name: under which it will be known.
            num_bytes: its least length.
            makes: this worker sees to it that it exists and is zero; the others map it later.
        """
        length = _whole_pages(num_bytes)
        region = next((free for free in self._free if free[1] == length), None)
        if region is not None:
            self._free.remove(region)
            if makes:
                self.map(region)[:] = bytes(length)
        else:
            region = self._end, length
            self._end += length
            if makes:
                os.ftruncate(self._descriptor, self._end)
        if name:
            self._named[name] = region
        return region

    def map(self, region: Region) -> mmap.mmap:
        """Return the memory of a region; the same object each time."""
        memory = self._maps.get(region)
        if memory is None:
            memory = self._maps[region] = mmap.mmap(self._descriptor, region[1], offset=region[0])
        return memory

    def to_facts(self) -> list[Any]:
        """Return the table as JSON values."""
        return [self._end, self._named, self._free]

    def go_on_with(self, facts: list[Any]) -> None:
        """Take over the table of another worker."""
        self._end, named, free = facts
        self._named = {name: (start, length) for name, (start, length) in named.items()}
        self._free = [(start, length) for start, length in free]

    def close(self) -> None:
        """Forget what is mapped. Tensors keep the memory that they lie in."""
        self._maps.clear()


def _whole_pages(num_bytes: int) -> int:
    return -(-max(num_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
