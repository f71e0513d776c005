"""What ties one worker's run to whoever supervises it; all of it may be missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from samestep.core.clock import Pulse
from samestep.core.snapshot import Snapshots
from samestep.loop.reporter import Reporter, Silent


class Orders(Protocol):
    """What the supervisor wants of the run."""

    def pending(self) -> int:
        """Return the orders that stand (`core.worker.Wish`, or-ed)."""

    def reached(self) -> None:
        """Take note that the workers have come to the end of a step, and carry the orders out."""

    def joiners(self) -> Sequence[int]:
        """Return the slots of workers that are ready and shall be taken in."""


class Writer(Protocol):
    """Takes the snapshot that is lent (`core.snapshot`) to the disk, in a process of its own."""

    def write(self, order: dict[str, Any]) -> None:
        """Let it be written. The snapshot is taken back when that has ended.

        Args:
            order: folder, step, keep as for `Archive.save`; cwd, which the folder is relative to.
        """

    def answer(self) -> dict[str, Any] | None:
        """Return, once, what became of the last order: its step, and `trouble` with deleting old checkpoints or None,
        or a message and the reason (None: the disk is not to blame). None if there is nothing new.
        """


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """One worker's ties.

    Attributes:
        reporter: where the first worker tells how far the run is.
        snapshots: where the newest state is kept outside of the workers, or None.
        pulse: where the worker shows that it makes progress, or None.
        orders: what the supervisor wants of the run, or None.
        joins: this worker takes the place of one that has died, in a run that is under way.
        verifies: whether memory is looked at for flipped bits.
        balances: whether replicas move away from slow workers.
        writer: writes checkpoints beside training, or None.
    """

    reporter: Reporter = field(default_factory=Silent)
    snapshots: Snapshots | None = None
    pulse: Pulse | None = None
    orders: Orders | None = None
    joins: bool = False
    verifies: bool = True
    balances: bool = True
    writer: Writer | None = None
