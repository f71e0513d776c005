"""What can happen to a fleet, as its coordinator is told. Plain facts."""

from __future__ import annotations

from dataclasses import dataclass

from samestep.guarding.crash import Crash
from samestep.launching.channel import Frame


@dataclass(frozen=True, kw_only=True)
class Facts:
    """How things stand when something happens.

    Attributes:
        now: seconds of the monotonic clock.
        num_calls: calls that the run has recorded, over all fleets; 0 where nothing is kept.
        orders: those that stand (`Wish`, or-ed).
        is_reached: the workers have come to the end of a step, and carry the orders out.
        target: the number of workers that the user ordered; None if none was.
    """

    now: float
    num_calls: int = 0
    orders: int = 0
    is_reached: bool = False
    target: int | None = None


@dataclass(frozen=True)
class Heard:
    """A worker said something."""

    slot: int
    generation: int
    frame: Frame


@dataclass(frozen=True)
class Exited:
    """A worker's process is gone: its exit was waited for, and all that anybody said before was told.

    Attributes:
        slot, generation: the worker.
        pid: its.
        status: as `os.waitpid` gives it.
        crash: what is known of its end.
    """

    slot: int
    generation: int
    pid: int
    status: int
    crash: Crash | None = None


@dataclass(frozen=True)
class Hung:
    """A worker makes no progress; `message` says all that is known."""

    slot: int
    generation: int
    message: str


@dataclass(frozen=True)
class Signalled:
    """The supervisor got a signal that ends a run."""

    number: int


@dataclass(frozen=True)
class Enough:
    """Who watches the run has seen all that was wanted."""


@dataclass(frozen=True)
class Tick:
    """Time has passed, or orders have changed."""


Event = Heard | Exited | Hung | Signalled | Enough | Tick
