"""The memory bandwidth that several processes reach together, with plain torch loops over memory far out of cache.

Two loops are tried, and the better one counts: adding in place (two reads, one write), copying (one read, one write).
A copy may also read the lines that it is about to write; that is not counted, since large copies often avoid it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_ARRAY_BYTES = 96 << 20


def measure(meet: Callable[[], object], num_workers: int, num_rounds: int = 8) -> float:
    """Return the bandwidth of all workers together, in bytes per second. Called by every worker.

    Args:
        meet: a barrier of the workers.
        num_workers: how many run this at the same time.
        num_rounds: how often each loop is timed; the median counts.
    """
    first, second = (torch.ones(_ARRAY_BYTES // 4) for _ in range(2))
    loops = ((3, lambda: first.add_(second)), (2, lambda: first.copy_(second)))
    seconds = [median_seconds(loop, meet, num_rounds) for _, loop in loops]
    moved = [num_workers * streams * _ARRAY_BYTES for streams, _ in loops]
    return max(num_bytes / taken for num_bytes, taken in zip(moved, seconds, strict=True))


def median_seconds(work: Callable[[], object], meet: Callable[[], object], num_rounds: int, inner: int = 1) -> float:
    """Return the median seconds of `work`, from a meeting of all workers to the next.

    Args:
        work: what is timed.
        meet: a barrier of the workers.
        num_rounds: timed rounds; one more comes first and does not count.
        inner: calls of `work` per round, for work that is short against a barrier.
    """
    seconds = []
    for _ in range(num_rounds + 1):
        meet()
        begin = time.perf_counter()
        for _ in range(inner):
            work()
        meet()
        seconds.append((time.perf_counter() - begin) / inner)
    return sorted(seconds[1:])[num_rounds // 2]
