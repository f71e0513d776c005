"""Which worker is hung, decided from readings of its pulse. Pure: no I/O, no clock.

    in a shard, reading data, in the update     hung after max(floor, 8 x the usual step) without a sign of life
    waiting for others                          never: those it waits for are looked at
    elsewhere in the user's code                never: it may take any time
    stopped by a signal                         hung after a second, wherever it is: the kernel says that nothing runs
    stopped and let go in turn (cpulimit)       slow, not stopped: it uses processor time between the looks

The first step of a run may take any time: much is compiled or read for the first time. The first step of a later fleet
may take 12 floors, so that a hang at the same place is found again; so may the first reading of each `run.steps`.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from samestep.guarding.pulse import Reading

FLOOR = 5.0
"""Seconds. No worker that runs is hung before, unless the user wants it."""
STOPPED = 1.0
"""Seconds for a worker that was stopped by a signal: longer than a terminal takes to let all of them go on."""
_USUAL_STEPS = 8
_FIRST_STEP = 12
_LONGEST_LOOK = 1.0
"""Seconds that one look can add to a silence: in a longer pause this process, or the machine, stood still itself."""
_WATCHED = ("data", "compute", "update")


@dataclass
class _Seen:
    """What is known of one worker of the fleet."""

    beats: float = -1.0
    ticks: int = 0
    num_steps: int = 0
    silence: float = 0.0
    stopped_for: float | None = None


class Patience:
    """Follows the fleets of one run.

    Attributes:
        floor: seconds; 0 never finds anyone hung.
        stopped: seconds for a worker that was stopped by a signal.
    """

    def __init__(self, floor: float = FLOOR, stopped: float = STOPPED):
        self.floor = floor
        self.stopped = stopped
        self._steps: deque[float] = deque(maxlen=64)
        self._seen: dict[int, _Seen] = {}
        self._looked_at: float | None = None

    def begin(self) -> None:
        """Begin with a new fleet. What a step usually takes stays known."""
        self._seen = {}
        self._looked_at = None

    def renew(self, rank: int) -> None:
        """Another process takes the place of a worker."""
        self._seen.pop(rank, None)

    def forget(self) -> None:
        """Begin with another training, whose steps may take any time."""
        self.begin()
        self._steps.clear()

    def silence(self, rank: int) -> float:
        """Return for how many seconds a worker has made no progress."""
        return self._seen[rank].silence

    def spare(self, rank: int) -> None:
        """Count anew for a worker that turned out to be at work."""
        self._seen[rank].silence = 0.0

    def look(self, now: float, readings: Sequence[Reading]) -> Reading | None:
        """Take a look at the workers that live.

        Args:
            now: seconds of the monotonic clock.
            readings: one of each.

        Returns:
            The one that is hung; of several the one that has been for longest.
        """
        since = 0.0 if self._looked_at is None else min(now - self._looked_at, _LONGEST_LOOK)
        self._looked_at = now
        for reading in readings:
            self._see(reading, since)
        # A step that was longer than usual, by the size of its batch for example, may be followed by more of them.
        latest = max((r.step_seconds for r in readings), default=0.0)
        usual = max(statistics.median(self._steps), latest) if self._steps else None
        hung = [r for r in readings if self._is_hung(r, usual)] if self.floor else []
        return max(hung, key=lambda r: self._seen[r.rank].silence, default=None)

    def _see(self, reading: Reading, since: float) -> None:
        seen = self._seen.setdefault(reading.rank, _Seen())
        if reading.num_steps > seen.num_steps:
            self._steps.append(reading.step_seconds)
        seen.num_steps = reading.num_steps
        is_silent = reading.beats == seen.beats and (reading.phase in _WATCHED or reading.stopped)
        seen.silence = seen.silence + since if is_silent and not reading.traced else 0.0
        went_on = (reading.beats, reading.ticks) != (seen.beats, seen.ticks)
        if not reading.stopped:
            seen.stopped_for = None
        elif seen.stopped_for is None or went_on:
            seen.stopped_for = 0.0
        else:
            # Two pauses at least: while a suspended run is let go, this process may wake before its workers.
            seen.stopped_for += min(since, self.stopped / 2)
        seen.beats, seen.ticks = reading.beats, reading.ticks

    def _is_hung(self, reading: Reading, usual: float | None) -> bool:
        """Return whether a worker is silent for longer than work may take; `usual` is a step, in seconds, if known."""
        seen = self._seen[reading.rank]
        if seen.stopped_for is not None:
            return seen.stopped_for >= self.stopped
        if usual is None:
            # Nothing was measured yet, so work cannot be told from a hang.
            return False
        is_first = reading.num_steps == 0 or (reading.begins and reading.phase == "data")
        return seen.silence > max(self.floor * (_FIRST_STEP if is_first else 1), _USUAL_STEPS * usual)
