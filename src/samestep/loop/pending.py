"""Batches that were trained on, in order, until it is known what became of their updates.

That is at once, or, where updates are made later (`agree.stale`), some updates after.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

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


class Pending:
    """The batches, as one worker counts them."""

    def __init__(self, record: Record):
        """Begin with none; what is left out or skipped is told to `record`."""
        self._record = record
        self._waiting: deque[Trained] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, update: Trained) -> None:
        """Take an update that was asked for."""
        self._waiting.append(update)

    def take(self, outcome: Outcome, agreed: Live, silent: bool) -> None:
        """Count what became of the first of them; nothing if that is not known yet.

        Args:
            outcome: what became of it.
            agreed: counts what was not finite or not readable.
            silent: it was told before.
        """
        if not outcome.is_known:
            return
        update = self._waiting.popleft()
        if not update.is_left_out(outcome):
            agreed.tolerance.count(update.optimizer, outcome.problem, update.where)
        agreed.allowance.count(update.feed.number, outcome.bad, update.where)
        if outcome.problem and not silent:
            self._record.skipped(outcome.problem)
        if update.pass_ == 0:
            if not silent:
                self._record.left_out(update.feed.left_out.new_among(outcome.bad), update.batch.number)
            update.feed.commit(update.batch, SampleCount(*outcome.read), outcome.bad)
