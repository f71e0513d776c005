"""A worker that takes the place of one that has died, in a run that is under way.

alone      it executes the script from its first line, and replays what the newest snapshot holds
ready      it tells the supervisor, and waits for an offer
offer      at the end of a step the members keep a snapshot, and wait for it there
comes in   it replays the few calls in between, and meets them; weights and state lie in the arena
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from samestep.core.arena import Arena
from samestep.core.group import Group
from samestep.core.snapshot import Snapshots
from samestep.errors import WorkerError
from samestep.loop.crew import Crew
from samestep.loop.reporter import Reporter
from samestep.loop.supervision import Orders
from samestep.storage.checkpoint import Checkpoint
from samestep.storage.ledger import Ledger

_POLL = 0.0005
"""Seconds between looks for an offer. The supervisor ends this process if there will be none."""


class Joined(Protocol):
    """The run that a newcomer joins (`Session`)."""

    group: Group
    ledger: Ledger
    crew: Crew

    def of_first(self, kind: str, make: Callable[[], Any]) -> Any:
        """Return on every worker what `make` gives on the first."""


def who_joins(run: Joined, orders: Orders | None, snapshots: Snapshots) -> list[int]:
    """Return, in a member, the slots of those that shall be taken in now. Collective."""

    def ready_now() -> list[int]:
        # While a snapshot is lent there may be no room for the one that they come in by.
        return list(orders.joiners()) if orders is not None and not snapshots.lender is not None else []

    ready = run.of_first("steps (join)", ready_now)
    return [slot for slot in ready if isinstance(run.group, Arena) and slot not in run.group.members]


def let_in(run: Joined, snapshots: Snapshots, joining: Sequence[int], step: int, last_write: int) -> None:
    """Meet, as a member, those who join, at the snapshot that was just kept. Collective.

    Args:
        run: of this worker.
        snapshots: where the newest is the state as it is now.
        joining: slots of those who come in.
        step: committed steps.
        last_write: step of the last checkpoint in the run's folder.
    """
    assert isinstance(run.group, Arena)
    if run.group.worker.is_first:
        group = run.group
        taking_part = {"members": group.members, "answered": group.deaths.answered, "joining": joining}
        snapshots.offers.make({**taking_part, "count": group.count, "step": step, "last_write": last_write})
    run.crew.regroup(joining)


class Newcomer:
    """One worker, until it has come in."""

    def __init__(self, run: Joined, snapshots: Snapshots, reporter: Reporter):
        """Join `run` through what `snapshots` hold."""
        self._run = run
        self._snapshots = snapshots
        self._reporter = reporter
        self._known, _ = snapshots.offers.newest()
        self._offer: dict[str, Any] | None = None

    def first(self) -> Checkpoint:
        """Return what to replay first."""
        saved = self._snapshots.newest()
        return saved if saved is not None else self._await_offer()

    def further(self) -> Checkpoint:
        """Return where to come in, once the calls up to the last one that was known are replayed.

        If there are more calls until then, the ledger replays them next.
        """
        if self._offer is not None:
            return self._offered(self._offer)
        saved = self._await_offer()
        self._run.ledger = self._run.ledger.go_on_in(Ledger.from_facts(saved.facts["ledger"]))
        return saved

    def come_in(self) -> int:
        """Meet the members. Returns the step of their last checkpoint."""
        assert self._offer is not None
        self._run.crew.regroup(offer=self._offer)
        return self._offer["last_write"]

    def _await_offer(self) -> Checkpoint:
        self._reporter.ready()
        while True:
            number, offer = self._snapshots.offers.newest()
            if number > self._known and self._run.group.slot in offer["joining"]:
                break
            time.sleep(_POLL)
        self._offer = offer
        return self._offered(offer)

    def _offered(self, offer: dict[str, Any]) -> Checkpoint:
        saved = self._snapshots.newest()
        if saved is None or saved.step != offer["step"]:
            raise WorkerError(f"The state after step {offer['step']} that was kept in memory is damaged.")
        return saved
