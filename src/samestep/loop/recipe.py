"""The recipe: what the result of a run is a function of, besides the script and its data."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from samestep.errors import SettingsError
from samestep.loop.origin import Origin

_TIME = re.compile(r"(\d+(?:\.\d+)?)([smh])")
_SECONDS = {"s": 1, "m": 60, "h": 3600}

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
        every: steps between checkpoints, or time ("30s", "10m", "2h"); None: only when `run.steps` ends.
        keep: how many checkpoints are kept.
        async_checkpoints: write them beside training, but for the last one.
        resume: checkpoint (or folder of them) to go on from, or None.
        trace: number of steps to record tensor digests of, then stop (used by `verify`); None: no trace.
        accept: which of `ACCEPTABLE` may differ between workers, and from the checkpoint.
        origin: the code and the environment at hand, for comparing.
    """

    checkpoint: str | None = None
    every: int | str | None = None
    keep: int = 3
    async_checkpoints: bool = False
    resume: str | None = None
    trace: int | None = None
    accept: tuple[str, ...] = ()
    origin: Origin = field(default_factory=Origin)

    def __post_init__(self) -> None:
        if self.every is not None and not _is_positive(self.every) and not self.every_seconds:
            raise SettingsError(
                f"You set every={self.every!r}; it must be a whole number of steps, 1 or more, or a time such as "
                "'30s', '10m' or '2h'."
            )
        if self.every is not None and self.checkpoint is None:
            raise SettingsError(f"You set every={self.every} but no checkpoint folder. Add checkpoint='runs/name'.")
        if self.async_checkpoints and self.checkpoint is None:
            raise SettingsError("You set async_checkpoints but no checkpoint folder. Add checkpoint='runs/name'.")
        for word in self.accept:
            if word not in ACCEPTABLE:
                raise SettingsError(
                    f"You set accept={word!r}, but what may differ is one or more of {', '.join(ACCEPTABLE)}. "
                    f"Use --accept {','.join(ACCEPTABLE)}, or fewer of them."
                )

    @property
    def every_seconds(self) -> float | None:
        """Seconds between checkpoints, None where they are counted in steps or `every` is no time above 0."""
        found = _TIME.fullmatch(self.every) if isinstance(self.every, str) else None
        return float(found[1]) * _SECONDS[found[2]] or None if found is not None else None

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after so many committed steps."""
        return isinstance(self.every, int) and step % self.every == 0


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
