"""What a run remembers of itself, for progress while it goes and for the summary at its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from samestep.core.clock import PHASES, Clock
from samestep.core.group import Group
from samestep.core.memory import pss_bytes
from samestep.loop.reporter import Reporter
from samestep.loop.saves import Saves
from samestep.storage.digest import tensor_digest

_PROGRESS_SECONDS = 0.2
_SKIPS_TOLD = 5


class Record:
    """One worker's record of the run.

    Attributes:
        num_steps: committed steps, replayed ones included.
        notes: sentences for the summary.
        logged: the latest numbers given to `run.log`.
        saves: what became of the checkpoints.
    """

    def __init__(self, group: Group, reporter: Reporter, clock: Clock):
        self._group = group
        self._reporter = reporter
        self._clock = clock
        self._told = 0.0
        self._trained_seconds = 0.0
        self._num_samples = 0
        self._memory: list[int] = []
        self._num_skipped = 0
        self._num_bad = 0
        self.num_steps = 0
        self.notes: list[str] = []
        self.logged: dict[str, float] = {}
        self.saves = Saves(self.note)

    def caught_up(self) -> None:
        """Tell that what an earlier fleet has shown is over."""
        self._reporter.caught_up()

    def note(self, text: str) -> None:
        """Keep a sentence for the summary, and tell it now."""
        self.notes.append(text)
        if self._group.worker.is_first:
            self._reporter.note(text)

    def skipped(self, problem: str) -> None:
        """Tell of an update that was skipped; the first few are enough."""
        self._num_skipped += 1
        if self._num_skipped <= _SKIPS_TOLD:
            last = " Further ones are skipped silently." if self._num_skipped == _SKIPS_TOLD else ""
            self.note(f"An update was skipped. {problem}{last}")

    def left_out(self, bad: Sequence[tuple[int, str]], step: int) -> None:
        """Tell of samples that could not be read; the first few are enough, and the summary counts them all."""
        for sample, error in bad[: _SKIPS_TOLD - self._num_bad]:
            self._num_bad += 1
            last = " Further ones are skipped silently." if self._num_bad == _SKIPS_TOLD else ""
            self.note(f"Sample {sample} could not be read for step {step}, and was skipped: {error}.{last}")

    def timed(self, num_samples: int, seconds: float) -> None:
        """Take the duration of a step that was really made (not replayed).

        Args:
            num_samples: of the batch.
            seconds: from the wait for its data to the end of the user's code after it.
        """
        self._num_samples += num_samples
        self._trained_seconds += seconds
        if self.num_steps & (self.num_steps - 1) == 0:
            self.sample_memory()

    def sample_memory(self) -> None:
        """Note the memory this worker takes now."""
        self._memory.append(pss_bytes() or 0)

    def progress(self, frame: dict[str, Any], last: bool = False) -> None:
        """Tell how far the run is, a few times a second."""
        now = time.monotonic()
        if self._group.worker.is_first and (last or now - self._told >= _PROGRESS_SECONDS):
            self._told = now
            speed = self._num_samples / self._trained_seconds if self._trained_seconds else None
            self._reporter.progress({**frame, "samples_per_second": speed, "logged": dict(self.logged)})

    def trace(self, step: int, loss: float, tensors: list[tuple[str, torch.Tensor]]) -> None:
        """Tell the digests of all tensors after a step."""
        if self._group.worker.is_first:
            digests = {name: tensor_digest(tensor) for name, tensor in tensors}
            self._reporter.trace({"step": step, "loss": loss, "tensors": digests})

    def facts(self) -> dict[str, Any]:
        """Return this worker's part of the summary."""
        self.sample_memory()
        return {
            "seconds": dict(self._clock.seconds),
            "memory": self._memory,
            "trained_seconds": self._trained_seconds,
            "samples": self._num_samples,
            "saves": self.saves.facts(),
        }


def combined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what all workers' facts amount to."""
    first = parts[0]
    peak = max((sum(column) for column in zip(*(p["memory"] for p in parts), strict=False)), default=0)
    speed = first["samples"] / first["trained_seconds"] if first["trained_seconds"] else 0.0
    return {
        "seconds": {phase: sum(p["seconds"][phase] for p in parts) / len(parts) for phase in PHASES},
        "peak_memory_bytes": peak,
        # Who joined late knows of late moves only.
        "moves": max((p["moves"] for p in parts), key=len),
        "samples_per_second": speed,
        **first["saves"],
    }
