"""Decides when replicas move away from workers that are steadily slower. Pure: no clock, no input and output.

    took      each worker notes, step by step, how long its shards took, and the whole step
    is_due    after a window of steps, the same one on all workers, they tell each other the medians (`mine`)
    weigh     ... and come to the same division, since all weigh the same numbers
    made      it was carried out

Replicas move where two windows in a row say that steps would be shorter by a tenth. Each move makes the next one wait
twice as long, so a machine that is never the same for long does not keep them moving. After a death or a join the
division is even, and all that was known is forgotten.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from samestep.core.division import Division

_FEWEST_STEPS, _MOST_STEPS = 16, 4096
_SECONDS = 0.5
"""A window has at least so many steps, and takes about this long unless it would have more than the most."""
_GAIN = 0.1
"""The least part of a step's time that a move must be worth."""
_FEWEST_WINDOWS, _MOST_WINDOWS = 2, 64
_MENTIONED = 1.05
"""Workers that take this many times as long as the fastest are told to be slower."""


@dataclass(frozen=True, kw_only=True)
class Telling:
    """What all workers told of one window.

    Attributes:
        costs: seconds per shard of each worker, in rank order.
        step_seconds: of a whole step.
    """

    costs: tuple[float, ...]
    step_seconds: float

    def gain(self, before: Division, after: Division) -> float:
        """Return the part of a step's time that the other division would save. What is no shard's stays as it is."""
        now = before.seconds(self.costs)
        return (now - after.seconds(self.costs)) / max(now, self.step_seconds)


@dataclass(frozen=True, kw_only=True)
class Move:
    """One change of the division.

    Attributes:
        step: committed steps when it was made.
        workers: what workers are called, in rank order.
        before, after: the divisions.
        costs: seconds per shard of each worker, as they were.
        seconds_before: of a step, by the windows that led to it.
        seconds_since: of a step, by each window since, until the work was divided once more.
    """

    step: int
    workers: tuple[int, ...]
    before: Division
    after: Division
    costs: tuple[float, ...]
    seconds_before: float
    seconds_since: list[float] = field(default_factory=list)

    @property
    def time_since(self) -> float | None:
        """What a step takes since, as a part of what it took before; None if no window has ended since."""
        return statistics.median(self.seconds_since) / self.seconds_before if self.seconds_since else None

    def in_words(self) -> str:
        """Return a sentence on what moved, why, and what came of it if that is known."""
        fastest, left = min(self.costs), []
        for worker, had, has, cost in zip(self.workers, self.before.counts, self.after.counts, self.costs, strict=True):
            if has < had:
                slower = f", {cost / fastest:.1f} times as slow as the fastest" if cost >= _MENTIONED * fastest else ""
                left.append(f"{had - has} of {had} from worker {worker}{slower}")
        since = f"; a step takes {self.time_since:.2f} of the time since" if self.time_since is not None else ""
        return f"Replicas moved after step {self.step}: {'; '.join(left)}{since}."

    def to_facts(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "step": self.step,
            "workers": self.workers,
            "replicas_before": self.before.counts,
            "replicas_after": self.after.counts,
            "seconds_per_shard": self.costs,
            "time_since": self.time_since,
            "words": self.in_words(),
        }


class Balance:
    """What one worker knows of how fast all are.

    Attributes:
        moves: what was moved so far.
    """

    def __init__(self, wanted: bool = True):
        """Begin; nothing is ever due unless `wanted`."""
        self._wanted = wanted
        self.moves: list[Move] = []
        self.forget()

    def forget(self) -> None:
        """Begin anew: other workers take part, or the work was divided evenly again. To be called on all alike."""
        self._costs: list[float] = []
        self._steps: list[float] = []
        self._told: list[Telling] = []
        self._num_steps = _FEWEST_STEPS
        self._num_windows = _FEWEST_WINDOWS
        self._last: Move | None = None

    def took(self, num_shards: int, shard_seconds: float, step_seconds: float) -> None:
        """Note a step.

        Args:
            num_shards: those of this worker that had samples.
            shard_seconds: what they took, reading included.
            step_seconds: what the whole step took.
        """
        self._steps.append(step_seconds)
        if num_shards:
            self._costs.append(shard_seconds / num_shards)

    @property
    def is_due(self) -> bool:
        """Whether a window is over; the same on every worker."""
        return self._wanted and len(self._steps) >= self._num_steps

    def mine(self) -> list[float | None]:
        """Return what this worker tells the others: seconds per shard (None: it had none), seconds per step."""
        return [_median(self._costs), _median(self._steps)]

    def weigh(
        self, step: int, workers: Sequence[int], division: Division, told: Sequence[Sequence[float | None]]
    ) -> Move | None:
        """Begin a new window, and return how replicas shall move now, if at all.

        Args:
            step: committed steps.
            workers: what they are called, in rank order.
            division: as it is.
            told: what `mine` gave on each worker.
        """
        self._costs.clear()
        self._steps.clear()
        step_seconds, costs = told[0][1], [cost for cost, _ in told if cost]
        if len(costs) < len(told) or not step_seconds:
            self._told.clear()
            return None
        self._num_steps = min(max(_FEWEST_STEPS, math.ceil(_SECONDS / step_seconds)), _MOST_STEPS)
        self._told.append(Telling(costs=tuple(costs), step_seconds=step_seconds))
        if self._last is not None:
            self._last.seconds_since.append(step_seconds)
        if len(self._told) < self._num_windows:
            return None
        recent = self._told[-_FEWEST_WINDOWS:]
        means = tuple(statistics.fmean(column) for column in zip(*(telling.costs for telling in recent), strict=True))
        after = Division.by_cost(means, division.num_replicas)
        if min(telling.gain(division, after) for telling in recent) < _GAIN:
            return None
        return Move(
            step=step,
            workers=tuple(workers),
            before=division,
            after=after,
            costs=means,
            seconds_before=statistics.fmean(telling.step_seconds for telling in recent),
        )

    def made(self, move: Move) -> None:
        """Note that replicas moved. To be called on all alike."""
        self._told.clear()
        self._num_windows = min(2 * self._num_windows, _MOST_WINDOWS)
        self._last = move
        self.moves.append(move)

    def end(self) -> None:
        """Let the last move be judged by a window that is not over, if by none before."""
        seconds = _median(self._steps)
        if self._last is not None and not self._last.seconds_since and seconds:
            self._last.seconds_since.append(seconds)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
