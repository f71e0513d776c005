"""How replicas are divided among workers: one contiguous run each, in rank order.

Results do not depend on it: replicas decide them, and gradients are added in the order of the tree, whoever plays what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from samestep.core.worker import run_of


@dataclass(frozen=True)
class Division:
    """Which replicas each worker plays.

    Attributes:
        counts: number of replicas of each worker, in rank order.
    """

    counts: tuple[int, ...]

    @classmethod
    def even(cls, num_workers: int, num_replicas: int) -> Division:
        """Divide replicas as evenly as can be."""
        return cls(tuple(len(run_of(rank, num_workers, num_replicas)) for rank in range(num_workers)))

    @classmethod
    def by_cost(cls, costs: Sequence[float], num_replicas: int) -> Division:
        """Divide replicas so that the last worker is ready as early as can be; each plays one at least.

        Args:
            costs: seconds that each worker takes for one replica, above 0.
            num_replicas: at least as many as there are workers.
        """
        counts = [1] * len(costs)
        for _ in range(num_replicas - len(costs)):
            # Who would be ready first with one more gets it: no other division is ready earlier than the last of these.
            first = min(range(len(costs)), key=lambda rank: (counts[rank] + 1) * costs[rank])
            counts[first] += 1
        return cls(tuple(counts))

    @property
    def num_replicas(self) -> int:
        """How many there are."""
        return sum(self.counts)

    @property
    def runs(self) -> list[range]:
        """The run of each worker, in rank order; together they cover all replicas."""
        stops = list(accumulate(self.counts))
        return [range(stop - count, stop) for stop, count in zip(stops, self.counts, strict=True)]

    def of(self, rank: int) -> range:
        """Return the run of replicas that worker `rank` plays."""
        return self.runs[rank]

    def player_of(self, replica: int) -> int:
        """Return the worker that plays a replica."""
        return next(rank for rank, run in enumerate(self.runs) if replica in run)

    def seconds(self, costs: Sequence[float]) -> float:
        """Return how long the last worker takes, where one replica takes worker `rank` `costs[rank]` seconds."""
        return max(count * cost for count, cost in zip(self.counts, costs, strict=True))
