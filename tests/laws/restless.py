"""A balance that is never content: it moves replicas at random after every step, on all workers alike."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

from playing import replaced

import samestep.loop.crew as crew_module
from samestep.core.division import Division
from samestep.loop.balance import Balance, Move


class Restless(Balance):
    """Put in place of the other by `restless()`."""

    @property
    def is_due(self) -> bool:
        return len(self._steps) >= 1

    def weigh(self, step: int, workers: Sequence[int], division: Division, told: Sequence) -> Move:
        self._steps.clear()
        size, num_replicas = len(division.counts), division.num_replicas
        draw = random.Random(step)
        after = division
        while after == division:
            cuts = [0, *sorted(draw.sample(range(1, num_replicas), size - 1)), num_replicas]
            after = Division(tuple(b - a for a, b in pairwise(cuts)))
        return Move(
            step=step, workers=tuple(workers), before=division, after=after, costs=(1.0,) * size, seconds_before=1.0
        )


@contextmanager
def restless() -> Iterator[list[Balance]]:
    """Put it in place for a while; return those that were made, one for each worker."""
    made: list[Balance] = []

    def make(wanted: bool) -> Balance:
        made.append(Restless(wanted))
        return made[-1]

    with replaced(crew_module, "Balance", make):
        yield made
