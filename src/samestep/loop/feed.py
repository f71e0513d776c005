"""One data set as a run feeds it to its steps: the order of each epoch, the shards, the count of what was read."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from samestep.core.randomness import key, seed_sample
from samestep.data.fingerprint import fingerprint
from samestep.data.loading import Request, Shard, load
from samestep.data.permutation import Identity, Order, Permutation
from samestep.data.proof import Coverage, LeftOut, Proof, SampleCount
from samestep.data.source import Source
from samestep.data.split import Slice, shard_bounds
from samestep.storage.digest import state_digest


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How shards are read.

    Attributes:
        seed: of the run.
        shuffle: whether an epoch's order is a permutation.
        num_replicas: shards per batch.
        replicas: those whose shards are read, a contiguous run.
        loaders: processes that read ahead.
        skip_bad: whether samples that cannot be read are left out.
    """

    seed: int
    shuffle: bool
    num_replicas: int
    replicas: range
    loaders: int
    skip_bad: bool = False


class Feed:
    """Feeds one data set; epochs go on counting from one `run.steps` to the next.

    Attributes:
        data: what the user gave; kept so that its identity stays its own.
        number: of the data set in the run.
        coverage: what the committed steps were due to read.
        read: what was read for them, by all workers.
        left_out: what could not be read for them.
    """

    def __init__(self, data: Any, num_samples: int, seed: tuple[int, int]):
        """Take a data set.

        Args:
            data: what the user gave.
            num_samples: its length.
            seed: the run's seed, and the number of the data set in the run.
        """
        self.data = data
        self.num_samples = num_samples
        self.coverage = Coverage(num_samples)
        self._content: list[str] | None = None
        self.read = SampleCount()
        self.left_out = LeftOut()
        self.number = seed[1]
        self._seed = seed
        self._shuffle = True
        self._shuffled: dict[int, bool] = {}
        self._orders: dict[int, Order] = {}

    def order(self, epoch: int) -> Order:
        """Return the order of an epoch."""
        if epoch not in self._orders:
            if len(self._orders) > 3:
                self._orders.pop(min(self._orders))
            shuffled = self._shuffled.get(epoch, self._shuffle)
            permuted = Permutation(self.num_samples, key(6, *self._seed, epoch)) if shuffled else None
            self._orders[epoch] = permuted if permuted is not None else Identity(self.num_samples)
        return self._orders[epoch]

    def content(self, source: Source) -> list[str]:
        """Return the fingerprint of the data's content, as it was when first asked for."""
        if self._content is None:
            self._content = fingerprint(source, state_digest, seed_sample)
        return self._content

    def batches(
        self, source: Source, slices: Iterator[Slice], reading: Reading
    ) -> Generator[tuple[Slice, Sequence[Shard | None]], None, None]:
        """Yield each batch with the shards of these replicas (None where empty). Close it to end the loaders."""
        ahead: deque[Slice] = deque()
        mine = reading.replicas

        def requests() -> Iterator[Request]:
            for batch in slices:
                ahead.append(batch)
                bounds = shard_bounds(batch.start, batch.stop, reading.num_replicas)[mine.start : mine.stop]
                first, last = (bounds[0][0], bounds[-1][1]) if bounds else (0, 0)
                ids = self.order(batch.epoch).ids(first, last)
                yield Request(batch.epoch, tuple(ids[a - first : b - first] for a, b in bounds))

        shards = load(
            source,
            requests(),
            loaders=reading.loaders,
            seed=reading.seed,
            seed_sample=seed_sample,
            skip_bad=reading.skip_bad,
        )
        try:
            for loaded in shards:
                yield ahead.popleft(), loaded
        finally:
            shards.close()

    def use_shuffle(self, shuffle: bool) -> None:
        """Set whether epochs are permuted, from now on."""
        if shuffle != self._shuffle:
            self._shuffle = shuffle
            self._orders.clear()

    def commit(self, batch: Slice, read: SampleCount, bad: Sequence[tuple[int, str]] = ()) -> None:
        """Count a committed step's samples, as all workers have read them, and those that could not be."""
        self.coverage.add(batch)
        self._shuffled.setdefault(batch.epoch, self._shuffle)
        self.read += read
        self.left_out.add(batch.epoch, bad)

    def proof(self) -> Proof:
        """Compare what was read with what was due."""
        return Proof.of(self.coverage, self.read, self.order, self.left_out)


def count_read(epoch: int, shards: Sequence[Shard | None]) -> tuple[int, int]:
    """Return how many samples were read, and their hash (the fields of a `SampleCount`)."""
    ids = [shard.ids for shard in shards if shard is not None]
    count = SampleCount.of(epoch, np.concatenate(ids)) if ids else SampleCount()
    return count.num_samples, count.hash
