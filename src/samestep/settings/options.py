"""What can be set, from where, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from samestep.errors import SettingsError
from samestep.loop.recipe import Keeping, Recipe

DEVICES = ("cpu", "cuda")


def words_of(text: str | Sequence[str]) -> tuple[str, ...]:
    """Return the words of a list, or of text with commas between them."""
    return tuple(word.strip() for word in (text.split(",") if isinstance(text, str) else text))


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of one launch call; None is "not set here".

    Attributes:
        workers: processes to start.
        replicas: logical copies of the model, or "workers".
        threads: intra-op threads of each worker.
        seed: of every random number.
        checkpoint: folder for checkpoints.
        every: steps between checkpoints, or time ("30s", "10m", "2h").
        async_checkpoints: write them beside training.
        resume: checkpoint to go on from.
        device: "cpu" or "cuda".
        hang_after: seconds after which a worker that makes no progress counts as hung; 0 for never.
        protect: whether the newest state is kept in memory, so that the run survives dead workers; True by default.
        balance: whether replicas move away from workers that are steadily slower; True by default.
        trace: steps to record tensor digests of, then stop.
        accept: kinds of differences that are let pass (see `ACCEPTABLE`).
    """

    workers: int | None = None
    replicas: int | str | None = None
    threads: int | None = None
    seed: int | None = None
    checkpoint: str | None = None
    every: int | str | None = None
    async_checkpoints: bool | None = None
    resume: str | None = None
    device: str | None = None
    hang_after: float | None = None
    protect: bool | None = None
    balance: bool | None = None
    trace: int | None = None
    accept: tuple[str, ...] | None = None

    def over(self, weaker: Options) -> Options:
        """Return these settings, with those of `weaker` where nothing is set here."""
        mine = self.to_dict()
        return Options(**{**weaker.to_dict(), **mine})

    def to_dict(self) -> dict[str, Any]:
        """Return what is set, as plain facts."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Options:
        """Return what `to_dict` wrote."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in facts.items() if name in known})

    def recipe(self) -> Recipe:
        """Return what decides the result.

        Raises:
            SettingsError: a value is out of range.
        """
        facts = self.to_dict()
        return Recipe(**{name: facts[name] for name in ("replicas", "threads", "seed") if name in facts})

    def keeping(self) -> Keeping:
        """Return what the run writes and reads. A traced run writes nothing and starts from nothing.

        Raises:
            SettingsError: a value is out of range, or clashes with another.
        """
        if self.trace is not None:
            return Keeping(trace=self.trace)
        return Keeping(
            checkpoint=self.checkpoint,
            every=self.every,
            async_checkpoints=bool(self.async_checkpoints),
            resume=self.resume,
            accept=tuple(self.accept or ()),
        )

    def check(self) -> None:
        """Find what is wrong with what is set so far.

        Raises:
            SettingsError: a value is out of range, or clashes with another.
        """
        recipe = self.recipe()
        if self.every is not None:
            Keeping(every=self.every, checkpoint=self.checkpoint if self.checkpoint is not None else "unknown yet")
        Keeping(accept=tuple(self.accept or ()))
        if self.async_checkpoints and self.protect is False:
            raise SettingsError(
                "You set async_checkpoints and protect=False, but such checkpoints are taken from the copy of the "
                "state in memory that protect=False saves. Use one of them: --protect, or --no-async-checkpoints."
            )
        if self.device is not None and self.device not in DEVICES:
            raise SettingsError(f"You set device={self.device!r}. Use one of {' and '.join(DEVICES)}.")
        if self.hang_after is not None and not _is_seconds(self.hang_after):
            raise SettingsError(
                f"You set hang_after={self.hang_after!r}. Use seconds above 0, as in --hang-after 60, or 0 to let a "
                "silent worker be."
            )
        workers = self.workers
        if workers is None:
            return
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise SettingsError(
                f"You set workers={workers!r}, but a run needs at least 1 worker. Use --workers 1 or more, or leave it "
                "out to use every core."
            )
        if self.replicas is not None and recipe.replicas != "workers" and workers > recipe.replicas:
            replicas = recipe.replicas
            idle = workers - replicas
            raise SettingsError(
                f"You set workers={workers} but replicas={replicas}, so {idle} worker{'s' * (idle > 1)} would idle. "
                f"Use --workers {replicas}, or replicas={workers} (a new recipe: results change)."
            )
        if self.device == "cuda" and workers > 1:
            raise SettingsError(
                f"You set device='cuda' and workers={workers}, but workers that this command starts share memory of "
                "the CPU. Use --workers 1 (one worker on one GPU plays all replicas), or start the script with "
                "torchrun and SAMESTEP_DEVICE=cuda."
            )

    def num_workers(self, num_available: int) -> int:
        """Return how many workers the run has.

        Args:
            num_available: cores, or workers that were started before the script told how many it wants.

        Raises:
            SettingsError: see `check`.
        """
        self.check()
        if self.workers is not None:
            return self.workers
        if self.device == "cuda":
            return 1
        if isinstance(self.replicas, int):
            return min(num_available, self.replicas)
        return num_available


def _is_seconds(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value < math.inf
