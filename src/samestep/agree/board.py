"""Where workers of one host leave word for each other without meeting: who plays what, who has come how far.

Everything is counted in updates, from 0. Memory is a ring: what concerns an update is written over by a later one, once
nobody can need it any more.

    committed          updates that are in the weights
    taken              1 while a worker makes the next one
    arrived[w]         updates that worker w has come to, its part of each written before
    claimed[k]         of an update, modulo bound + 1: (its number, replicas that have a player)
    parts, verdicts    what each worker told of an update; what became of it

[Note: how long a word stays]
No worker is more than `bound` updates behind another, counted in those it has come to, and each reads the word of the
update `bound` before its own. So 2 * bound + 2 updates have a place.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from samestep.core.group import Group
from samestep.errors import UsageError

_WORD_BYTES = 1 << 18
"""Bytes for what one worker tells of one update. What is not used is never touched, so it takes no memory."""


class Board:
    """The board, as one worker sees it.

    Attributes:
        newest: the newest version of the weights when this worker last claimed a shard.
    """

    def __init__(self, group: Group, num_replicas: int, bound: int):
        """Begin at update 0. Collective."""
        self._group = group
        self._num_replicas = num_replicas
        self._num_claims = bound + 1
        self._num_kept = 2 * bound + 2
        self.newest = 0
        self.open(0)

    def open(self, number: int) -> None:
        """Take the workers that the group has now; all have come to `number` updates, and all are made. Collective."""
        self._rank, self._size = self._group.worker.rank, self._group.worker.size
        head = 2 + self._size + self._num_claims
        num_words = self._num_kept * (self._size + 1)
        memory = self._group.allocate(8 * head + num_words * _WORD_BYTES, "stale board").numpy()
        self._words = memory[: 8 * head].view(np.int64)
        self._messages = memory[8 * head :].reshape(self._num_kept, self._size + 1, _WORD_BYTES)
        self._arrived = self._words[2 : 2 + self._size]
        self._claimed = self._words[2 + self._size :]
        self.reset(number)

    def reset(self, number: int) -> None:
        """Go on where all have come to `number` updates, and all are made. Collective."""
        self._group.exchange(b"")
        if self._group.worker.is_first:
            self._words[:2] = number, 0
            self._arrived[:] = number
            self._claimed[:] = -1
        self._group.exchange(b"")

    @property
    def committed(self) -> int:
        """How many updates are in the weights."""
        return int(self._words[0])

    def is_committed(self, number: int) -> bool:
        """Return whether update `number` is in the weights; if so, all that was written for it can be read."""
        with self._group.exclusive:
            return self.committed > number

    def claim(self, number: int) -> int | None:
        """Return a replica of update `number` that nobody plays yet, to be played here; None if there is none."""
        place = number % self._num_claims
        with self._group.exclusive:
            self.newest = self.committed
            of, count = divmod(int(self._claimed[place]), self._num_replicas + 1)
            replica = count if of == number else 0
            if replica == self._num_replicas:
                return None
            self._claimed[place] = number * (self._num_replicas + 1) + replica + 1
        return replica

    def arrive(self, number: int, part: bytes) -> None:
        """Tell this worker's part of update `number`."""
        self._write(number, self._rank, part)
        with self._group.exclusive:
            self._arrived[self._rank] = number + 1
        self._group.wake()

    def is_told(self, number: int) -> bool:
        """Return whether all workers have told their parts of update `number`."""
        return bool(self._arrived.min() > number)

    def parts(self, number: int) -> list[bytes]:
        """Return the workers' parts of an update, in rank order."""
        return [self._read(number, rank) for rank in range(self._size)]

    def take(self, number: int) -> bool:
        """Return whether update `number` is to be made now, by this worker, and by no other."""
        with self._group.exclusive:
            if self.committed != number or self._words[1] or not self.is_told(number):
                return False
            self._words[1] = 1
        return True

    def commit(self, number: int, verdict: bytes) -> None:
        """Tell that this worker has made update `number`, and what became of it."""
        self._write(number, self._size, verdict)
        with self._group.exclusive:
            self._words[:2] = number + 1, 0
        self._group.wake()

    def verdict(self, number: int) -> bytes:
        """Return what became of an update."""
        return self._read(number, self._size)

    def wait(self, number: int, may_help: Callable[[], bool]) -> None:
        """Return once update `number` is committed, or there is one for this worker to make.

        Args:
            number: the update.
            may_help: whether this worker could make the next one.
        """

        def is_over() -> bool:
            if self.committed > number:
                return True
            return not self._words[1] and may_help() and self.is_told(self.committed)

        self._group.wait_until(is_over)

    def rest(self) -> None:
        """Return once nobody is at work on updates, where all are made that were asked for: at once."""

    def _write(self, number: int, column: int, message: bytes) -> None:
        if len(message) > _WORD_BYTES - 8:
            raise UsageError(
                f"This worker has {len(message)} bytes to tell of one update (losses, step.mean, samples left out), "
                f"and {_WORD_BYTES - 8} is the most under Stale. Give step.mean fewer values, or use Synchronous()."
            )
        place = self._messages[number % self._num_kept, column]
        place[8 : 8 + len(message)] = np.frombuffer(message, np.uint8)
        place[:8].view(np.int64)[0] = len(message)

    def _read(self, number: int, column: int) -> bytes:
        place = self._messages[number % self._num_kept, column]
        return place[8 : 8 + int(place[:8].view(np.int64)[0])].tobytes()
