"""A worker's clock: splits its time into phases."""

from __future__ import annotations

import time

PHASES = ("data", "compute", "wait", "update", "other")


class Clock:
    """Adds up the seconds that a worker spends in each phase. It is always in exactly one.

    Attributes:
        seconds: seconds spent so far in each phase that was left.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._phase = "other"
        self._since = self._begin = time.perf_counter()

    def to(self, phase: str) -> str:
        """Enter `phase`; return the phase that was left."""
        now = time.perf_counter()
        before = self._phase
        self.seconds[before] += now - self._since
        self._phase, self._since = phase, now
        return before

    def elapsed(self) -> float:
        """Return seconds since the clock was made."""
        return time.perf_counter() - self._begin

    def add(self, seconds: float) -> None:
        """Count `seconds` more as elapsed: those of the run before it was resumed."""
        self._begin -= seconds
