"""What the supervisor orders its workers to do: words in memory that they share. Knows nothing of training.

The first worker looks at them in every call it makes with the others, and tells them; so all hear of an order at the
same call, and carry it out at the end of the same step.

    [0] the orders that stand (`Wish`, or-ed)     written by the supervisor
    [1] whether they are being carried out        written by the first worker
    [2] whether a worker that gets SIGTERM shall end
    [64] onwards, a byte each: workers that are to be taken in (`Wish.JOIN`)
"""

from __future__ import annotations

import mmap
from collections.abc import Collection

from samestep.core.worker import Wish

_JOINING = 64
"""Word where the bytes begin."""
MOST_SLOTS = 2048
"""Workers that have such a byte."""


class Orders:
    """The orders of one run. They outlive its fleets: one that dies before it has obeyed leaves that to the next."""

    def __init__(self) -> None:
        # Private memory would not be shared with workers that are forked later.
        block = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        self._words = block.cast("q")
        self._joining = block[8 * _JOINING :][:MOST_SLOTS]

    def give(self, wish: Wish) -> None:
        """Order something, besides what was ordered before."""
        self._words[0] |= wish

    def done(self) -> None:
        """Take all orders back: they were carried out."""
        self._words[0] = self._words[1] = 0

    def joining(self, slots: Collection[int]) -> None:
        """Order that the workers take in these, and no others, at the end of a step; none withdraws the order."""
        self._words[0] &= ~Wish.JOIN
        self._joining[:] = bytes(slot in slots for slot in range(MOST_SLOTS))
        if slots:
            self._words[0] |= Wish.JOIN

    def joiners(self) -> tuple[int, ...]:
        """Return the slots of those that are to be taken in."""
        return tuple(slot for slot, is_asked in enumerate(self._joining) if is_asked)

    def pending(self) -> int:
        """Return the orders that stand."""
        return self._words[0]

    def reached(self) -> None:
        """In the first worker: the end of a step is reached, and the orders are carried out now."""
        self._words[1] = 1

    def end(self) -> None:
        """Let workers end at SIGTERM."""
        self._words[2] = 1

    def begin(self) -> None:
        """A new fleet begins. It ignores SIGTERM: who sends that to the supervisor often sends it to every process."""
        self._words[1] = self._words[2] = 0
        self.joining(())

    @property
    def is_ending(self) -> bool:
        """Whether a worker that gets SIGTERM shall end."""
        return bool(self._words[2])

    @property
    def is_reached(self) -> bool:
        """Whether the workers have come to the end of a step, and carry the orders out."""
        return bool(self._words[1])
