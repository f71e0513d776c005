"""What the coordinator of a fleet tells its shell to do. Plain facts, to be carried out in order."""

from __future__ import annotations

from dataclasses import dataclass

from samestep.core.worker import Wish
from samestep.launching.channel import Frame
from samestep.launching.verdict import Outcome


@dataclass(frozen=True)
class Fork:
    """Start a worker; one that `joins` others which are at work replays what they have done."""

    slot: int
    generation: int
    joins: bool = False


@dataclass(frozen=True)
class Terminate:
    """Send SIGTERM to the worker."""

    slot: int


@dataclass(frozen=True)
class Kill:
    """Send SIGKILL to the worker."""

    slot: int


@dataclass(frozen=True)
class MarkDead:
    """Tell the other workers that this one will never come."""

    slot: int


@dataclass(frozen=True)
class GiveOrder:
    """Order something of the workers."""

    wish: Wish


@dataclass(frozen=True)
class Join:
    """Order the workers to take in these, and no others, at the end of a step. None withdraws the order."""

    slots: tuple[int, ...]


@dataclass(frozen=True)
class LetEnd:
    """Let workers end at SIGTERM from now on."""


@dataclass(frozen=True)
class Show:
    """Give a worker's frame to whoever watches the run."""

    frame: Frame


@dataclass(frozen=True)
class Note:
    """Tell the user something."""

    text: str


@dataclass(frozen=True)
class Learn:
    """A script imports these modules."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Watch:
    """Look for hangs from now on: number of the launch call, and seconds as for `Fence.seated`."""

    call: int
    hang_after: float | None


@dataclass(frozen=True)
class SetDeadline:
    """Tell when it is `at`, in seconds of the monotonic clock; None for never."""

    at: float | None


@dataclass(frozen=True)
class StartAgain:
    """Every worker is gone: start a fleet of `num_workers`. `outcome` is how this one ended."""

    num_workers: int
    outcome: Outcome


@dataclass(frozen=True)
class End:
    """Every worker is gone, and the run is over."""

    outcome: Outcome


Instruction = (
    Fork
    | Terminate
    | Kill
    | MarkDead
    | GiveOrder
    | Join
    | LetEnd
    | Show
    | Note
    | Learn
    | Watch
    | SetDeadline
    | StartAgain
    | End
)
