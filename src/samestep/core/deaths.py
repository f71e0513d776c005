"""Exits of workers that the supervisor has seen, by slot, and which of them the others have got over.

The supervisor counts up a slot's word after the process is gone. Who goes on without it has answered; in that slot a
new worker may come, whose own exit counts anew.
"""

from __future__ import annotations


class Deaths:
    """One worker's view.

    Attributes:
        answered: for each slot, the deaths that the members have got over.
    """

    def __init__(self, words: memoryview[int], first: int, stride: int, num_slots: int):
        """Read the counts from `words`, at `first` for slot 0 and `stride` further for each slot."""
        self._words = words
        self._first = first
        self._stride = stride
        self.answered = [0] * num_slots

    def counts(self) -> list[int]:
        """Return the deaths in each slot so far."""
        return [self._words[self._first + self._stride * slot] for slot in range(len(self.answered))]

    def has_died(self, slot: int) -> bool:
        """Return whether the worker in `slot` is gone, and nobody has answered yet."""
        return self._words[self._first + self._stride * slot] > self.answered[slot]

    @property
    def are_unanswered(self) -> bool:
        """Whether there are any."""
        return self.counts() != self.answered
