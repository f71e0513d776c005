"""A worker's clock: splits its time into phases."""

from __future__ import annotations

import time
from typing import Protocol

PHASES = ("data", "compute", "wait", "update", "other")


class Pulse(Protocol):
    """Where a worker shows that it makes progress, for whoever watches it."""

    def beat(self, phase: str) -> None:
        """Note that the worker entered a phase."""

    def shard(self, step: int, replica: int) -> None:
        """Note which shard comes next; -1 for none."""

    def begin(self, step: int, now: float, first: bool) -> None:
        """Note that a step begins, at `now` in seconds; `first` of a `run.steps`."""

    def end(self, now: float) -> None:
        """Note that the step is made, at `now` in seconds."""


class Clock:
    """Adds up the seconds that a worker spends in each phase. It is always in exactly one.

    Attributes:
        seconds: seconds spent so far in each phase that was left.
    """

    def __init__(self, pulse: Pulse | None = None) -> None:
        self._pulse = pulse
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._phase = "other"
        self._since = self._begin = time.perf_counter()

    def to(self, phase: str) -> str:
        """Enter `phase`; return the phase that was left."""
        now = time.perf_counter()
        before = self._phase
        self.seconds[before] += now - self._since
        self._phase, self._since = phase, now
        if self._pulse is not None:
            self._pulse.beat(phase)
        return before

    def begin_step(self, step: int, first: bool) -> None:
        """Say that the work on a step begins, the `first` of a `run.steps` or not."""
        if self._pulse is not None:
            self._pulse.begin(step, time.perf_counter(), first)

    def end_step(self) -> None:
        """Say that the step's update is made."""
        if self._pulse is not None:
            self._pulse.end(time.perf_counter())

    def begin_shard(self, step: int, replica: int) -> None:
        """Say which shard comes next, before it is entered; a replica of -1 after the last."""
        if self._pulse is not None:
            self._pulse.shard(step, replica)

    def worked(self) -> float:
        """Return seconds spent on shards so far: reading them, and the user's code in them; not in a phase still on."""
        return self.seconds["data"] + self.seconds["compute"]

    def elapsed(self) -> float:
        """Return seconds since the clock was made."""
        return time.perf_counter() - self._begin

    def add(self, seconds: float) -> None:
        """Count `seconds` more as elapsed: those of the run before it was resumed."""
        self._begin -= seconds
