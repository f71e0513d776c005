"""The workers of a run, as they die and join: who goes on divides the work anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from samestep.agree.agreement import Live
from samestep.core.arena import Arena
from samestep.core.calls import Calls
from samestep.core.device import free_bytes
from samestep.core.group import Group, WorkerLost
from samestep.core.model import Model
from samestep.core.worker import Worker
from samestep.loop.balance import Balance
from samestep.loop.supervision import Supervision

T = TypeVar("T")


class Crew:
    """The crew, as one of its workers sees it.

    Attributes:
        group: how the workers reach each other.
        model: what is divided among them; None until there is one.
        agreed: how replicas agree; None until there is a model.
        num_regroups: how often it was divided anew.
        balance: decides when replicas move away from a slow worker.
    """

    def __init__(self, group: Group, calls: Calls, supervision: Supervision):
        """Begin with the workers that `group` has."""
        self.group = group
        self.model: Model | None = None
        self.agreed: Live | None = None
        self.num_regroups = 0
        self.balance = Balance(supervision.balances)
        self._calls = calls
        self._reporter = supervision.reporter
        self._snapshots = supervision.snapshots

    @property
    def worker(self) -> Worker:
        """This worker, as it is now: ranks change where others die or join."""
        return self.group.worker

    @property
    def replicas(self) -> range:
        """Those that this worker plays now."""
        assert self.model is not None
        return self.model.division.of(self.worker.rank)

    def facts(self) -> dict[str, Any]:
        """Return which replicas moved, for the summary."""
        self.balance.end()
        return {"moves": [move.to_facts() for move in self.balance.moves]}

    def surviving(self, act: Callable[[], T]) -> T:
        """Return what `act` gives; where a worker dies meanwhile, the others divide the work anew and do it again."""
        while True:
            try:
                with self.group.mendable():
                    return act()
            except WorkerLost:
                self.regroup()

    def regroup(self, joining: Sequence[int] = (), offer: dict[str, Any] | None = None) -> None:
        """Divide the work among those who are left, and who join. Collective.

        Args:
            joining: slots of workers that come in.
            offer: in such a worker: see `Arena.join`.
        """
        group, calls = self.group, self._calls
        assert self.model is not None and self.agreed is not None and isinstance(group, Arena)
        before, answered = set(group.members), group.deaths.answered
        was_first = offer is None and self.worker.is_first
        told = group.reform(calls.position(), joining) if offer is None else group.join(offer)
        while True:
            calls.go_to(told[0])
            try:
                with group.mendable():
                    self.model.reseat()
                    self.agreed.reseat()
                break
            except WorkerLost:
                told = group.reform(calls.position())
        group.settle()
        self.model.integrity.watch()
        self.num_regroups += 1
        self.balance.forget()
        if not self.worker.is_first:
            return
        if not was_first:
            self._reporter.take_over(self._snapshots.num_calls if self._snapshots is not None else 0)
        if group.deaths.answered != answered:
            dead = [slot for slot, deaths in enumerate(group.deaths.answered) if deaths and slot not in group.members]
            self._reporter.mended({"first": group.slot, "members": group.members, "dead": dead})
        if set(group.members) - before:
            self._reporter.joined({"members": group.members})

    def rebalance(self, step: int) -> None:
        """Let replicas move away from workers that are steadily slower. Collective, at the end of each step.

        Args:
            step: committed steps.
        """
        assert self.model is not None and self.agreed is not None
        division = self.model.division
        can_move = self.agreed.can_move and (self.group.shares_memory or not self.model.states)
        if not can_move or not self.balance.is_due or not 1 < self.worker.size < division.num_replicas:
            return
        told = self._told("run.steps (balance)", self.balance.mine)
        if told is None:
            return
        # All weigh the same numbers, so all come to the same.
        workers = self.group.members if isinstance(self.group, Arena) else range(self.worker.size)
        move = self.balance.weigh(step, workers, division, told)
        if move is None:
            return
        free = self._told("run.steps (room)", lambda: free_bytes(self.worker.device))
        if free is None or not _fits(self.model.gradient_bytes(move.after), free):
            return
        try:
            with self.group.mendable():
                self.model.divide(move.after)
                self.agreed.reseat()
        except WorkerLost:
            self.regroup()
            return
        self.num_regroups += 1
        self.balance.made(move)
        if self.worker.is_first:
            self._reporter.note(f"samestep: {move.in_words()}")

    def _told(self, kind: str, make: Callable[[], Any]) -> list[Any] | None:
        """Return what `make` gives on each worker; None if the work was divided anew meanwhile, so that it is stale."""
        before = self.num_regroups
        met = self.surviving(lambda: self._calls.meet(kind, "", make()))
        return [value for value, _ in met] if self.num_regroups == before else None


def _fits(needed: Sequence[int], free: Sequence[int | None]) -> bool:
    """Return whether each worker has the bytes it needs, as far as it knows: a faster step is not worth a crash."""
    return all(room is None or room >= num_bytes for num_bytes, room in zip(needed, free, strict=True))
