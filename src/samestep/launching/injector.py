"""Injects faults into a run, for `samestep chaos`: signals to workers that this run started, and to nobody else.

A fault strikes once the run has recorded so many calls, at a random instant of the time that a call takes. The next one
waits until the run has recorded a new call since, so that each is measured alone.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

KINDS = {
    "kill": ("SIGKILL", 8),
    "kill several": ("SIGKILL", 2),
    "kill all": ("SIGKILL", 2),
    "crash": ("SIGSEGV", 2),
    "abort": ("SIGABRT", 1),
    "stop": ("SIGSTOP", 1),
}
"""What can happen: the signal, and how often of 16 times."""


class Victim(Protocol):
    """A worker, as the supervisor holds it: signals go through its pidfd, so never to another process."""

    rank: int
    is_alive: bool

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it is dead already."""


@dataclass(frozen=True)
class Fault:
    """What is to happen.

    Attributes:
        kind: one of `KINDS`.
        at_call: after so many recorded calls of the run.
        share: of the usual time between two calls, that passes before it strikes.
    """

    kind: str
    at_call: int
    share: float


@dataclass
class Strike:
    """What happened.

    Attributes:
        fault: as planned.
        ranks: the workers it struck.
        at: when, in seconds of the monotonic clock.
        num_calls: calls recorded by then.
        noticed_after: seconds until the supervisor knew; None if it never did.
        recovered_after: seconds until the run had recorded a new call; None if it never did.
    """

    fault: Fault
    ranks: tuple[int, ...]
    at: float
    num_calls: int
    noticed_after: float | None = None
    recovered_after: float | None = None


@dataclass
class Injector:
    """Decides when to strike whom. It has no clock: the supervisor polls it.

    Attributes:
        faults: in the order of their calls.
        seconds_per_call: usual time between two calls.
        num_calls: tells how many calls the run has recorded.
        draw: chooses the victims.
        strikes: what has happened so far.
    """

    faults: Sequence[Fault]
    seconds_per_call: float
    num_calls: Callable[[], int]
    draw: random.Random
    strikes: list[Strike] = field(default_factory=list)
    _due: float | None = None

    def poll(self, now: float, victims: Sequence[Victim]) -> Strike | None:
        """Strike if it is time to, and see whether the run has recovered.

        Args:
            now: seconds of the monotonic clock.
            victims: the workers of the fleet.

        Returns:
            The strike from which the run has just recovered, if any.
        """
        count = self.num_calls()
        last = self.strikes[-1] if self.strikes else None
        if last is not None and last.recovered_after is None:
            if last.noticed_after is None or count <= last.num_calls:
                return None
            last.recovered_after = now - last.at
            return last
        if len(self.strikes) == len(self.faults):
            return None
        fault = self.faults[len(self.strikes)]
        if self._due is None and count >= fault.at_call:
            self._due = now + fault.share * self.seconds_per_call
        if self._due is not None and now >= self._due:
            self._strike(fault, now, count, [v for v in victims if v.is_alive])
        return None

    def ended(self, now: float) -> None:
        """Take note that the supervisor has seen a worker end."""
        if self.strikes and self.strikes[-1].noticed_after is None:
            self.strikes[-1].noticed_after = now - self.strikes[-1].at

    def _strike(self, fault: Fault, now: float, count: int, alive: list[Victim]) -> None:
        if not alive:
            return
        self._due = None
        most = {"kill all": len(alive), "kill several": self.draw.randint(1, len(alive))}.get(fault.kind, 1)
        struck = self.draw.sample(alive, most)
        self.strikes.append(Strike(fault, tuple(sorted(v.rank for v in struck)), now, count))
        for victim in struck:
            victim.send_signal(signal.Signals[KINDS[fault.kind][0]])


def plan(num_faults: int, num_calls: int, draw: random.Random) -> list[Fault]:
    """Return faults at random calls of a run that records `num_calls`, in their order."""
    kinds, weights = list(KINDS), [weight for _, weight in KINDS.values()]
    calls = sorted(draw.sample(range(num_calls - 1), num_faults))
    return [Fault(draw.choices(kinds, weights)[0], call, draw.random()) for call in calls]
