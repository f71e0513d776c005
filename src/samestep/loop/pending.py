"""Batches that were trained on, in order, until it is known what became of their updates.

That is at once, or, where updates are made later (`agree.stale`), some updates after.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from samestep.agree.agreement import Live
from samestep.agree.meeting import Outcome
from samestep.data.proof import SampleCount
from samestep.data.split import Slice
from samestep.loop.feed import Feed
from samestep.loop.record import Record


@dataclass(frozen=True)
class Trained:
    """One update that was asked for.

    Attributes:
        feed: where its batch is from.
        batch: the batch.
        optimizer: index of the optimizer.
        pass_: which update of its step it is.
        where: line of the script.
    """

    feed: Feed
    batch: Slice
    optimizer: int
    pass_: int
    where: str

    def is_left_out(self, outcome: Outcome) -> bool:
        """Return whether every sample of the batch was left out."""
        return len(outcome.bad) == self.batch.size


class Counted(Protocol):
    """The run that they belong to (`Session`)."""

    record: Record

    @property
    def agreed(self) -> Live:
        """How replicas agree."""

    @property
    def replaying(self) -> bool:
        """Whether what happens now has happened before."""

    def recorded(self, kind: str, make: Callable[[], Any]) -> Any:
        """Return what `make` gives, and record it; in a replay, what was recorded."""


class Pending:
    """The batches, as one worker counts them."""

    def __init__(self, run: Counted):
        """Begin with none."""
        self._run = run
        self._waiting: deque[Trained] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, update: Trained) -> None:
        """Take an update that was asked for."""
        self._waiting.append(update)

    def take(self, outcome: Outcome) -> None:
        """Count what became of the first of them; nothing if that is not known yet."""
        if not outcome.is_known:
            return
        run, update = self._run, self._waiting.popleft()
        if not update.is_left_out(outcome):
            run.agreed.tolerance.count(update.optimizer, outcome.problem, update.where)
        run.agreed.allowance.count(update.feed.number, outcome.bad, update.where)
        if outcome.problem and not run.replaying:
            run.record.skipped(outcome.problem)
        if update.pass_ == 0:
            if not run.replaying:
                run.record.left_out(update.feed.left_out.new_among(outcome.bad), update.batch.number)
            update.feed.commit(update.batch, SampleCount(*outcome.read), outcome.bad)

    def settle(self) -> None:
        """Bring into the weights what is under way, and count what became of it. Collective."""
        run = self._run
        if not self._waiting:
            if not run.replaying:
                run.agreed.settle()
            return

        def make() -> list[Any]:
            run.agreed.settle()
            return [outcome.to_values() for outcome in run.agreed.late()]

        for values in run.recorded("settle", make):
            self.take(Outcome(*values))
