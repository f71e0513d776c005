"""The recipe: what the result of a run is a function of, besides the script and its data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from samestep.errors import SettingsError
from samestep.loop.origin import Origin

ACCEPTABLE = ("code", "environment", "data")
"""What may differ, where the user says so, between a checkpoint and the run that resumes it."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings that decide the result.

    Attributes:
        replicas: logical copies of the model, or "workers": as many as there are workers, which gives up the promise
            that the result does not depend on them.
        seed: of every random number.
        threads: intra-op threads of each worker.
    """

    replicas: int | Literal["workers"] = 8
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if self.replicas != "workers" and not _is_positive(self.replicas):
            raise SettingsError(
                f"You set replicas={self.replicas!r}; it must be a whole number, 1 or more, or 'workers'."
            )
        if not _is_positive(self.threads):
            raise SettingsError(f"You set threads={self.threads!r}; it must be a whole number, 1 or more.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise SettingsError(f"You set seed={self.seed!r}; it must be a whole number.")

    def num_replicas(self, num_workers: int) -> int:
        """Return the number of replicas for a run of `num_workers` workers."""
        return num_workers if self.replicas == "workers" else self.replicas

    def as_facts(self) -> dict[str, Any]:
        """Return the recipe as plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """What a run writes down and reads back; none of it changes the result.

    Attributes:
        checkpoint: folder for checkpoints, or None.
        every: steps between checkpoints; None: only when `run.steps` ends.
        keep: how many checkpoints are kept.
        resume: checkpoint (or folder of them) to go on from, or None.
        trace: number of steps to record tensor digests of, then stop (used by `verify`); None: no trace.
        accept: which of `ACCEPTABLE` may differ between workers, and from the checkpoint.
        origin: the code and the environment at hand, for comparing.
    """

    checkpoint: str | None = None
    every: int | None = None
    keep: int = 3
    resume: str | None = None
    trace: int | None = None
    accept: tuple[str, ...] = ()
    origin: Origin = field(default_factory=Origin)

    def __post_init__(self) -> None:
        if self.every is not None and not _is_positive(self.every):
            raise SettingsError(f"You set every={self.every!r}; it must be a whole number of steps, 1 or more.")
        if self.every is not None and self.checkpoint is None:
            raise SettingsError(f"You set every={self.every} but no checkpoint folder. Add checkpoint='runs/name'.")
        for word in self.accept:
            if word not in ACCEPTABLE:
                raise SettingsError(
                    f"You set accept={word!r}, but what may differ is one or more of {', '.join(ACCEPTABLE)}. "
                    f"Use --accept {','.join(ACCEPTABLE)}, or fewer of them."
                )


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
