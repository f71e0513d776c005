"""Signs of life of workers, in memory that they share with the supervisor. Writing one is a few stores, no system call.

One line of 64 bytes per worker, float64 words, written by that worker alone:

    [0] beats      rises with every sign of life
    [1] phase      number in `PHASES`
    [2] step       [3] replica, -1 outside of a shard
    [4] seconds    of the last whole step
    [5] steps      whole steps made in this launch call by this process
    [6] begins     1 in the first step of a `run.steps`
"""

from __future__ import annotations

import mmap
from array import array
from dataclasses import dataclass

PHASES = ("outside", "data", "compute", "wait", "update", "other")
"""Not yet in a run, then the phases of `core.clock`."""
_NUMBERS = {phase: float(number) for number, phase in enumerate(PHASES)}
_WORDS = 8


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the supervisor sees of one worker.

    Attributes:
        rank: the worker.
        beats: signs of life so far.
        phase: what it does, one of `PHASES`.
        step: its step, or its last one.
        replica: whose shard it plays; -1 outside of a shard.
        step_seconds: length of its last whole step, without the user's code between steps.
        num_steps: whole steps that its process has made.
        begins: its step is the first of a `run.steps`: data is opened.
        stopped: it is stopped by a signal.
        traced: a debugger holds it.
        ticks: processor time that it has used, in ticks of the kernel.
    """

    rank: int
    beats: float
    phase: str
    step: int = 0
    replica: int = -1
    step_seconds: float = 0.0
    num_steps: int = 0
    begins: bool = False
    stopped: bool = False
    traced: bool = False
    ticks: int = 0


class Pulse:
    """One worker's side. `core.clock.Clock` calls it."""

    def __init__(self, words: memoryview[float]):
        self._words = words
        self._began = -1.0

    def start(self) -> None:
        """Begin a launch call."""
        for number in range(2, _WORDS):
            self._words[number] = 0.0

    def beat(self, phase: str) -> None:
        """Note that the worker entered a phase."""
        words = self._words
        words[1] = _NUMBERS[phase]
        words[0] += 1.0

    def shard(self, step: int, replica: int) -> None:
        """Note which shard comes next; -1 for none."""
        self._words[2] = step
        self._words[3] = replica

    def begin(self, step: int, now: float, first: bool) -> None:
        """Note that a step begins, at `now` in seconds; `first` of a `run.steps`."""
        self._words[2] = step
        self._words[6] = first
        self._began = now

    def end(self, now: float) -> None:
        """Note that the step is made, at `now` in seconds."""
        if self._began >= 0:
            self._words[4] = now - self._began
            self._words[5] += 1.0
            self._began = -1.0


class Pulses:
    """The memory of all workers. The supervisor makes it before it forks them."""

    def __init__(self, num_workers: int):
        self._memory = mmap.mmap(-1, 8 * _WORDS * num_workers)
        self._words = memoryview(self._memory).cast("d")

    def of(self, rank: int) -> Pulse:
        """Return a worker's side."""
        return Pulse(self._words[_WORDS * rank : _WORDS * (rank + 1)])

    def renew(self, rank: int) -> None:
        """Forget what a worker noted: another takes its place."""
        self._words[_WORDS * rank : _WORDS * (rank + 1)] = memoryview(array("d", [0.0] * _WORDS))

    def read(self, rank: int, stopped: bool = False, traced: bool = False, ticks: int = 0) -> Reading:
        """Return what a worker last noted, with what else is known of its process."""
        line = self._words[_WORDS * rank : _WORDS * (rank + 1)].tolist()
        return Reading(
            rank=rank,
            beats=line[0],
            phase=PHASES[int(line[1])],
            step=int(line[2]),
            replica=int(line[3]),
            step_seconds=line[4],
            num_steps=int(line[5]),
            begins=bool(line[6]),
            stopped=stopped,
            traced=traced,
            ticks=ticks,
        )
