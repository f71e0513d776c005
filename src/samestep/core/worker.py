"""A worker: a process bound to a device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag


class Wish(IntFlag):
    """What one worker asks of all workers of its run; it is told along with every call."""

    SNAPSHOT = 1
    """Keep the state in memory."""
    STOP = 2
    """Write a checkpoint where there is a folder for it, and leave."""
    SCALE = 4
    """Keep the state in memory, and leave."""
    JOIN = 8
    """Take in workers that are ready, at the end of the step."""
    ANSWER = 16
    """Look who is gone: somebody has died whom nobody waits for."""
    VERIFY = 32
    """Fold the memory after this update, so that the next one finds what has changed in between."""
    SAVE = 64
    """Write a checkpoint."""


def run_of(rank: int, num_workers: int, num_items: int) -> range:
    """Return the contiguous run of `num_items` items that worker `rank` of `num_workers` takes."""
    return range(rank * num_items // num_workers, (rank + 1) * num_items // num_workers)


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Facts of one worker; no other object holds a rank.

    Attributes:
        rank: index of the worker in the run, 0 .. size - 1.
        size: number of workers in the run (the world size).
        device: a torch device string, "cpu" or "cuda:0".
        local_rank: index among the workers of this host.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this worker speaks for the run (rank 0)."""
        return self.rank == 0
