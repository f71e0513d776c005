"""The clients of one round, and what each of them counts for: the same on every worker."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """The clients of one round.

    Attributes:
        seed: the run's.
        number: the round's.
        samples: samples of each client that was drawn, by ascending id.
        lost: those that do not deliver: dropped out, or too late.
        num_leaves: leaves of the tree along which updates are added; at least as many as clients.
        divisor: what the sum of updates is divided by where each client counts once; None where each counts by its
            samples, and the sum is divided by theirs.
    """

    seed: int
    number: int
    samples: Mapping[int, int]
    lost: frozenset[int]
    num_leaves: int
    divisor: float | None = None

    @property
    def drawn(self) -> Sequence[int]:
        """All clients of the round, ascending."""
        return tuple(self.samples)

    @cached_property
    def delivering(self) -> Sequence[int]:
        """Those whose updates count, ascending."""
        return tuple(client for client in self.samples if client not in self.lost)

    @cached_property
    def client_of(self) -> Mapping[int, int]:
        """The client that each leaf stands for, for those that deliver.

        Where there are more leaves than clients these are spread evenly, so that workers have about as many each.
        """
        number, most = len(self.samples), self.num_leaves
        leaves = {client: place * most // number for place, client in enumerate(self.samples)}
        return {leaves[client]: client for client in self.delivering}

    @cached_property
    def num_samples(self) -> int:
        """Samples of the clients that deliver."""
        return sum(self.samples[client] for client in self.delivering)

    def share(self, client: int) -> float:
        """Return what a client's update is multiplied by, so that all add up to their mean."""
        return self.samples[client] / self.num_samples if self.divisor is None else 1.0 / self.divisor

    def scale(self, client: int) -> float:
        """Return the same, but at most 1, and known before anybody is lost; see `total`."""
        return self.samples[client] / max(self.samples.values()) if self.divisor is None else 1.0

    @cached_property
    def total(self) -> float:
        """What the sum of updates multiplied by `scale` is divided by."""
        return math.fsum(map(self.scale, self.delivering)) if self.divisor is None else self.divisor
