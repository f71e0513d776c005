"""The rounds of one optimizer: when they come, what each replica weighs in them, and which are under way.

A round whose end is delayed overlaps with the steps after it: replicas go on from their own weights meanwhile, and what
they do until it ends counts in the next one.

[Note: who dies after a round]
When a round is committed, each worker writes what its replicas go on from, where all workers of a host see it. Were one
to die before it has, the others would play its replicas on from what lies there. So all meet once more: after a death
before that nobody goes on, and the run starts again from its newest state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from samestep.agree.agreement import Live
from samestep.agree.apart import Apart
from samestep.agree.coding import Coding
from samestep.agree.round import Round, begin, end, send

Items = dict[int, float]
"""Samples, or what else the user counts, of each replica."""


class Plan(Protocol):
    """What the recipe says of rounds (`Local`)."""

    @property
    def fragments(self) -> int:
        """Parts of the model that meet at different steps."""

    def due(self, update: int) -> list[int]:
        """Return the fragments that meet after update number `update` (from 0)."""

    def delay_of(self, update: int) -> int:
        """Return how many updates after that such a round is ended."""


class Rounds:
    """The rounds of one optimizer, as one worker sees them.

    Attributes:
        since: for each fragment, items of each replica since its last round began.
        under_way: rounds that have begun and are not ended yet, in order.
        num_rounds: how often replicas met so far.
        num_bytes: what one replica has encoded for that.
    """

    def __init__(self, plan: Plan, live: Live, apart: Apart, coding: Coding):
        """Begin before the first update.

        Args:
            plan: when rounds come.
            live: where the workers meet.
            apart: the replicas.
            coding: what compresses.
        """
        self._plan = plan
        self._live = live
        self._apart = apart
        self._coding = coding
        self._fragments = _cut([v.numel() for v in apart.trained.weights.views], plan.fragments)
        self._num_updates = 0
        self.since: list[Items] = [{} for _ in range(plan.fragments)]
        self.under_way: list[Round] = []
        self.num_rounds = 0
        self.num_bytes = 0

    @property
    def anchored(self) -> list[int]:
        """Parameters that rounds under way are about."""
        return sorted(index for round_ in self.under_way for index in round_.parameters)

    def count(self, weights: Mapping[int, float]) -> None:
        """Count what each replica has learned from in a step."""
        for items in self.since:
            for replica, count in weights.items():
                items[replica] = items.get(replica, 0.0) + count

    def advance(self, where: str) -> None:
        """Count an update; end what is due to end after it, and begin what is due to begin. Collective."""
        delay = self._plan.delay_of(self._num_updates)
        due = self._plan.due(self._num_updates)
        self._num_updates += 1
        over = [r for r in self.under_way if r.step + delay <= self._num_updates]
        self._end(over, where)
        begun = self._begin(due, is_late=delay > 0)
        if delay:
            for round_ in begun:
                begin(self._live, self._apart, self._coding, round_)
            self.under_way += begun
        else:
            self._end(begun, where)
        if over or begun:
            self._meet(where)

    def settle(self, where: str) -> None:
        """End what is under way, and make a last round of what replicas have done since. Collective."""
        self._end(list(self.under_way), where)
        self._end(self._begin(range(len(self._fragments)), is_late=False), where)
        self._meet(where)

    def values(self) -> dict[str, Any]:
        """Return plain values for `take`."""
        return {
            "updates": self._num_updates,
            "rounds": self.num_rounds,
            "bytes": self.num_bytes,
            "since": [_pairs(items) for items in self.since],
            "under_way": [[r.step, r.fragment, _pairs(r.items)] for r in self.under_way],
        }

    def take(self, values: Mapping[str, Any]) -> None:
        """Take what `values` gave; anchors and what the codec keeps are there already."""
        self._num_updates, self.num_rounds, self.num_bytes = values["updates"], values["rounds"], values["bytes"]
        self.since = [dict(items) for items in values["since"]]
        self.under_way = [
            Round(step, fragment, self._fragments[fragment], dict(items), is_late=True)
            for step, fragment, items in values["under_way"]
        ]
        for round_ in self.under_way:
            # What was on its way when that was written down is lost.
            send(self._live, self._apart, self._coding, round_)

    def drop(self) -> None:
        """Give up what is under way, and what replicas have done since. Collective."""
        for round_ in self.under_way:
            if round_.sent is not None:
                # Else it would be taken for what is sent next.
                round_.sent()
        self.under_way.clear()
        self.since = [{} for _ in self.since]
        self._coding.drop()

    def _begin(self, fragments: Sequence[int], is_late: bool) -> list[Round]:
        """Return rounds on those of some fragments for which replicas have learned from anything."""
        begun = []
        for fragment in fragments:
            items = self.since[fragment]
            if math.fsum(items.values()):
                self.since[fragment] = {}
                begun.append(Round(self._num_updates, fragment, self._fragments[fragment], items, is_late))
        return begun

    def _end(self, rounds: Sequence[Round], where: str) -> None:
        """Let replicas agree, on buffers too. Collective."""
        if not rounds:
            return
        apart, buffers = self._apart, self._live.model.buffers
        if buffers.num_bytes:
            buffers.publish(apart.mine)
            self._live.calls.meet("the round (buffers)", where)
            items = rounds[0].items
            buffers.merge(items, set(items))
            buffers.spread(apart.mine)
        for round_ in rounds:
            end(self._live, apart, self._coding, round_, where)
            self.num_bytes += self._coding.num_bytes(round_.step, round_.parameters)
        self.under_way = [r for r in self.under_way if r not in rounds]
        self.num_rounds += 1

    def _meet(self, where: str) -> None:
        """Return once all have written what their replicas go on from. See [Note: who dies after a round]."""
        if self._live.group.shares_memory:
            self._live.calls.meet("the round (end)", where)


def _pairs(items: Mapping[int, float]) -> list[list[float]]:
    return [[replica, count] for replica, count in items.items()]


def _cut(sizes: Sequence[int], num_fragments: int) -> list[list[int]]:
    """Divide parameters into runs of about the same number of elements."""
    total, before = sum(sizes), 0
    fragments: list[list[int]] = [[] for _ in range(num_fragments)]
    for index, size in enumerate(sizes):
        middle = before + size / 2
        fragments[min(num_fragments - 1, int(middle * num_fragments / total)) if total else 0].append(index)
        before += size
    return fragments
