"""A contestant's stopwatch: when its first step was done, and how fast the timed ones were."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Stopwatch:
    """Takes the time after every step.

    The clock is the system's monotonic one, which all processes of a machine share, so the program that started this
    one can tell how long the first step took from the start.
    """

    def __init__(self, num_warm: int):
        """Take the number of steps before the timed ones; at least 1."""
        self._num_warm = num_warm
        self._laps: list[float] = []
        self._losses: list[float] = []

    def lap(self, loss: float) -> None:
        """Note that a step has ended."""
        self._laps.append(time.monotonic())
        self._losses.append(loss)

    def facts(self, batch_size: int) -> dict[str, Any]:
        """Return what was measured: seconds, samples per second, and the mean loss of the timed steps."""
        num_timed = len(self._laps) - self._num_warm
        seconds = self._laps[-1] - self._laps[self._num_warm - 1] if num_timed > 0 else float("nan")
        return {
            "first_step_at": self._laps[0],
            "seconds_per_step": seconds / max(1, num_timed),
            "samples_per_second": num_timed * batch_size / seconds,
            "loss": sum(self._losses[self._num_warm :]) / max(1, num_timed),
            "pss_bytes": pss_bytes(),
        }


def pss_bytes() -> int:
    """Return the memory of this process; what several processes share counts in part for each."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def tell(facts: dict[str, Any]) -> None:
    """Print facts as one line that `contestants` reads. In one write, so that lines of two processes stay apart."""
    print("\n" + json.dumps(facts) + "\n", end="", flush=True)
