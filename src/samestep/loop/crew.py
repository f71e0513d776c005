"""The workers of a run, as they die and join: who goes on divides the work anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from samestep.agree.agreement import Live
from samestep.core.arena import Arena
from samestep.core.calls import Calls
from samestep.core.group import Group, WorkerLost
from samestep.core.model import Model
from samestep.core.snapshot import Snapshots
from samestep.core.worker import Worker
from samestep.loop.reporter import Reporter

T = TypeVar("T")


class Crew:
    """The crew, as one of its workers sees it.

    Attributes:
        group: how the workers reach each other.
        model: what is divided among them; None until there is one.
        agreed: how replicas agree; None until there is a model.
        num_regroups: how often it was divided anew.
    """

    def __init__(self, group: Group, calls: Calls, reporter: Reporter, snapshots: Snapshots | None):
        """Begin with the workers that `group` has; `snapshots` know how many calls were recorded."""
        self.group = group
        self.model: Model | None = None
        self.agreed: Live | None = None
        self.num_regroups = 0
        self._calls = calls
        self._reporter = reporter
        self._snapshots = snapshots

    @property
    def worker(self) -> Worker:
        """This worker, as it is now: ranks change where others die or join."""
        return self.group.worker

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
        if not self.worker.is_first:
            return
        if not was_first:
            self._reporter.take_over(self._snapshots.num_calls if self._snapshots is not None else 0)
        if group.deaths.answered != answered:
            dead = [slot for slot, deaths in enumerate(group.deaths.answered) if deaths and slot not in group.members]
            self._reporter.mended({"first": group.slot, "members": group.members, "dead": dead})
        if set(group.members) - before:
            self._reporter.joined({"members": group.members})
