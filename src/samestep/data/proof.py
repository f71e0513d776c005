"""The proof that each sample was used exactly once per epoch.

The recipe says which positions of which epochs were due (`Coverage`); what was really read is counted where it was
read (`SampleCount`, added up over shards, steps and workers). Both are multiset hashes: the sum, modulo 2**64, of a
well-mixed 64-bit number for every (epoch, sample). A sample left out, read twice, or read in another epoch changes
the sum; order and grouping do not. It guards against mistakes, not against someone who constructs a collision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from samestep.data.mixing import GOLDEN, MASK, mix, mix_one
from samestep.data.permutation import BLOCK, Identity, Order
from samestep.data.split import Slice
from samestep.errors import UsageError
from samestep.units import count_in_words

_GOLDEN = np.uint64(GOLDEN)
_NUM_NAMED = 3


def hash_of(epoch: int, ids: np.ndarray) -> int:
    """Return the multiset hash of samples read in one epoch; hashes add, modulo 2**64.

    Args:
        epoch: the epoch's number.
        ids: sample ids, integers of any shape.
    """
    values = ids.astype(np.uint64)
    scratch = np.empty_like(values)
    np.add(values, _GOLDEN, values)
    mix(values, scratch)
    # Mixed once more than the ids are: else sample 3 of epoch 5 would count like sample 5 of epoch 3.
    np.add(values, _key_of(epoch), values)
    return int(np.add.reduce(mix(values, scratch), axis=None))


@lru_cache(maxsize=4)
def _key_of(epoch: int) -> np.uint64:
    return np.uint64(mix_one(mix_one(epoch) + GOLDEN))


def expected(num_samples: int, epochs: range) -> int:
    """Return the multiset hash of every sample exactly once in each of `epochs`."""
    return sum(_hash_of_order(epoch, Identity(num_samples), num_samples) for epoch in epochs) & MASK


@dataclass(frozen=True, slots=True)
class SampleCount:
    """How many samples were read, and their multiset hash. Counts add.

    Attributes:
        num_samples: number of samples, doubles included.
        hash: sum of their hashes, modulo 2**64.
    """

    num_samples: int = 0
    hash: int = 0

    @classmethod
    def of(cls, epoch: int, ids: np.ndarray) -> SampleCount:
        """Return the count of samples `ids` read in `epoch`."""
        return cls(int(ids.size), hash_of(epoch, ids)) if ids.size else cls()

    def __add__(self, other: SampleCount) -> SampleCount:
        return SampleCount(self.num_samples + other.num_samples, (self.hash + other.hash) & MASK)

    @property
    def digest(self) -> str:
        """The hash as 16 hexadecimal digits."""
        return f"{self.hash:016x}"

    def state_dict(self) -> dict[str, int]:
        """Return the count as plain values."""
        return {"num_samples": self.num_samples, "hash": self.hash}

    @classmethod
    def from_state(cls, state: dict[str, int]) -> SampleCount:
        """Return the count that `state_dict` described."""
        return cls(state["num_samples"], state["hash"])


class Coverage:
    """What the recipe says was due: for every epoch, positions 0 .. stop-1 of its order, as its steps commit.

    Args:
        num_samples: samples of the data set.
    """

    def __init__(self, num_samples: int):
        self.num_samples = num_samples
        self._runs: list[list[int]] = []  # [first epoch, number of epochs, positions covered in each], in order

    def add(self, batch: Slice) -> None:
        """Note a committed step.

        Raises:
            UsageError: it does not follow the steps noted before, so that some positions would be due twice or never.
        """
        first, num_epochs, covered = self._runs[-1] if self._runs else (0, 0, 0)
        last_epoch = first + num_epochs - 1
        follows = (batch.epoch, batch.start) == (last_epoch, covered)
        if not follows and (batch.start > 0 or batch.epoch <= last_epoch):
            raise UsageError(
                f"Step {batch.number} reads positions {batch.start}:{batch.stop} of epoch {batch.epoch}, but the steps "
                f"before it ended at position {covered} of epoch {max(last_epoch, 0)}. Steps must follow one another."
            )
        if follows and num_epochs == 1 and (len(self._runs) == 1 or self._runs[-2][2] != batch.stop):
            self._runs[-1][2] = batch.stop
            return
        if follows and batch.start > 0:
            self._runs.pop()
            self._append(first, num_epochs - 1, covered)
        self._append(batch.epoch, 1, batch.stop)

    @property
    def next_epoch(self) -> int:
        """One more than the last epoch that was begun; 0 before the first."""
        return sum(self._runs[-1][:2]) if self._runs else 0

    def expected(self, order_of: Callable[[int], Order]) -> SampleCount:
        """Return the count of what was due.

        Whole epochs are counted without the help of `order_of`, so an order that is no permutation is found out.

        Args:
            order_of: the order of an epoch, by its number.
        """
        total, num_samples = 0, 0
        for first, num_epochs, covered in self._runs:
            num_samples += num_epochs * covered
            for epoch in range(first, first + num_epochs):
                order = Identity(self.num_samples) if covered == self.num_samples else order_of(epoch)
                total += _hash_of_order(epoch, order, covered)
        return SampleCount(num_samples, total & MASK)

    def in_words(self, left_out: Mapping[int, int] | None = None) -> str:
        """Return "1,437 of 1,437 samples exactly once per epoch, 12 epochs"; epochs that covered less come after.

        Args:
            left_out: how many samples of an epoch were due and left out.
        """
        epochs_of: Counter[int] = Counter()
        for first, num_epochs, covered in self._runs:
            fewer = Counter(covered - n for e, n in (left_out or {}).items() if first <= e < first + num_epochs)
            epochs_of.update(fewer)
            epochs_of[covered] += num_epochs - fewer.total()
        parts = [
            f"{count_in_words(covered)} of {count_in_words(self.num_samples)} samples exactly once per epoch, "
            f"{count_in_words(num_epochs)} epoch{'s' if num_epochs > 1 else ''}"
            for covered, num_epochs in sorted(epochs_of.items(), reverse=True)
            if num_epochs
        ]
        return "; ".join(parts) if parts else "no samples, 0 epochs"

    def state_dict(self) -> dict[str, Any]:
        """Return the coverage as plain values."""
        return {"num_samples": self.num_samples, "runs": [list(run) for run in self._runs]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Coverage:
        """Return the coverage that `state_dict` described."""
        coverage = cls(state["num_samples"])
        coverage._runs = [list(run) for run in state["runs"]]
        return coverage

    def _append(self, epoch: int, num_epochs: int, covered: int) -> None:
        if num_epochs == 0:
            return
        if self._runs and epoch == self.next_epoch and covered == self._runs[-1][2]:
            self._runs[-1][1] += num_epochs
        else:
            self._runs.append([epoch, num_epochs, covered])


class LeftOut:
    """The samples that were due and declared bad.

    Attributes:
        count: their count.
        per_epoch: how many of each epoch, where any.
    """

    def __init__(self) -> None:
        self.count = SampleCount()
        self.per_epoch: Counter[int] = Counter()
        self._errors: dict[int, str] = {}

    def add(self, epoch: int, bad: Sequence[tuple[int, str]]) -> None:
        """Note samples of a committed step: id, and what the reading ended with."""
        if bad:
            self.count += SampleCount.of(epoch, np.array([sample for sample, _ in bad], dtype=np.int64))
            self.per_epoch[epoch] += len(bad)
            self._errors.update(bad)

    def new_among(self, bad: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
        """Return those that were not noted before, in whatever epoch."""
        return [(sample, error) for sample, error in bad if sample not in self._errors]

    def in_words(self) -> str:
        """Return "1 skipped (sample 17: ValueError: broken)", each sample once; empty if there are none."""
        named = [f"sample {sample}: {error}" for sample, error in list(self._errors.items())[:_NUM_NAMED]]
        more = len(self._errors) - len(named)
        tail = f"; and {count_in_words(more)} more" if more else ""
        return f"{count_in_words(len(self._errors))} skipped ({'; '.join(named)}{tail})" if named else ""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was due beside what was read.

    Attributes:
        coverage: what the recipe says was due.
        due: its count.
        read: the count of what was really read.
        left_out: what was declared bad.
    """

    coverage: Coverage
    due: SampleCount
    read: SampleCount
    left_out: LeftOut = field(default_factory=LeftOut)

    @classmethod
    def of(
        cls,
        coverage: Coverage,
        read: SampleCount,
        order_of: Callable[[int], Order],
        left_out: LeftOut | None = None,
    ) -> Proof:
        """Compare `read` and `left_out` with what `coverage` says was due, in the orders of `order_of`."""
        due = coverage.expected(order_of)
        return cls(coverage=coverage, due=due, read=read, left_out=left_out if left_out is not None else LeftOut())

    @property
    def holds(self) -> bool:
        """Whether each sample that was due was read exactly once or declared bad, and no other was read."""
        return self.due == self.read + self.left_out.count

    def in_words(self) -> str:
        """Return one sentence that states the proof, or how it fails."""
        skipped = self.left_out.in_words()
        if self.holds:
            return self.coverage.in_words(self.left_out.per_epoch) + (f"; {skipped}" if skipped else "")
        due, read = count_in_words(self.due.num_samples), count_in_words(self.read.num_samples)
        amount = "as many, but not the same ones" if due == read else f"{read} were read"
        amount += f", {skipped}" if skipped else ""
        return (
            f"NOT each sample exactly once: {due} were due ({self.coverage.in_words()}), {amount} "
            f"(hash {self.read.digest}, due {self.due.digest})"
        )


def _hash_of_order(epoch: int, order: Order, stop: int) -> int:
    return sum(hash_of(epoch, order.ids(at, min(at + BLOCK, stop))) for at in range(0, stop, BLOCK))
