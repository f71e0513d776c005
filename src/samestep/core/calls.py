"""Where workers meet: every collective call of the user's script, numbered, so that a difference is named.

Workers run the same script, so they make the same calls in the same order. Each call carries its number, its kind and
the line of the script; if they differ, control flow has parted, and both lines are told instead of a hang.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from samestep.core.clock import Clock
from samestep.core.group import Group
from samestep.errors import MismatchError

_encode = json.JSONEncoder(separators=(",", ":")).encode
_END_OF_SHARDS = "the end of `for batch in step`"
_OWN_FOLDER = str(Path(__file__).resolve().parent.parent)


def line_of_user() -> str:
    """Return the innermost line outside samestep on the stack, as "train.py:40"."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OWN_FOLDER):
        frame = frame.f_back
    if frame is None:
        return "unknown"
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


class Halted(BaseException):
    """The run ends here by order. Not an error, and no `except Exception` of the user's may take it for one."""


class Calls:
    """Numbers the calls of one worker and meets the other workers at each."""

    def __init__(self, group: Group, clock: Clock, orders: Callable[[], int] | None = None):
        """Begin with call 1.

        Args:
            group: the workers.
            clock: takes the time spent waiting.
            orders: what the first worker is told from outside to ask of all (`Wish`, or-ed); looked at in every call.
        """
        self._group = group
        self._clock = clock
        self._orders = orders
        self._halted: BaseException | None = None
        self._asked = 0
        self._heard = 0
        self.number = 0

    def ask(self, request: int) -> None:
        """Tell all workers, at the next call, that this one wants something (a power of two)."""
        self._asked |= request

    def heard(self, request: int) -> bool:
        """Return whether any worker asked for this since it was last heard.

        Told along with every call, so after the same call it is the same on every worker.
        """
        found = bool(self._heard & request)
        self._heard &= ~request
        return found

    def is_ordered(self, request: int) -> bool:
        """Return whether this worker is told from outside to ask this of all; known to the first worker alone."""
        return self._orders is not None and bool(self._orders() & request)

    def position(self) -> list[int]:
        """Return what a worker that joins the others takes over: the number of calls, and what was heard in them."""
        return [self.number, self._heard]

    def go_to(self, position: list[int]) -> None:
        """Take over the `position` of another worker."""
        self.number, self._heard = position

    def stands(self, request: int) -> bool:
        """Return what `heard` would, without taking it as heard."""
        return bool(self._heard & request)

    def halt(self, reason: BaseException) -> NoReturn:
        """Leave the user's code by raising `reason`; should it be swallowed, every later call raises it again."""
        self._halted = reason
        raise reason

    def meet(self, kind: str, where: str, value: Any = None, frame: bytes = b"") -> list[tuple[Any, bytes]]:
        """Exchange a value with all workers.

        Args:
            kind: what the script called.
            where: the line of the script.
            value: JSON values.
            frame: further bytes.

        Returns:
            Value and frame of each worker, in rank order.

        Raises:
            MismatchError: another worker is at another call.
            Halted: the run has ended.
        """
        asked = self._count()
        self._heard |= asked
        if self._group.worker.size == 1:
            return [(value, frame)]
        head = _encode([self.number, kind, where, value, asked]).encode()
        before = self._clock.to("wait")
        replies = self._group.exchange(b"%d;%b%b" % (len(head), head, frame))
        self._clock.to(before)
        met = []
        for rank, reply in enumerate(replies):
            if not reply:
                raise self._parted(kind, where, rank, self.number, _END_OF_SHARDS, "in this step")
            length, _, rest = reply.partition(b";")
            number, their_kind, their_line, their_value, their_asked = json.loads(rest[: int(length)])
            self._heard |= their_asked
            if (number, their_kind) != (self.number, kind):
                raise self._parted(kind, where, rank, number, their_kind, their_line)
            met.append((their_value, rest[int(length) :]))
        return met

    def begin(self, kind: str, where: str) -> list[Any]:
        """Begin a call that the others need not have come to; return what to tell them of it (JSON values).

        Raises:
            Halted: the run has ended.
        """
        asked = self._count()
        return [self.number, kind, where, asked]

    def _count(self) -> int:
        """Count a call; return what this worker asks for at it."""
        if self._halted is not None:
            raise self._halted
        self.number += 1
        asked, self._asked = self._asked, 0
        if self._orders is not None and self._group.worker.is_first:
            asked |= self._orders()
        return asked

    def end(self, told: Sequence[Sequence[Any]]) -> None:
        """Take what all workers told of such a call, in rank order.

        Raises:
            MismatchError: one of them was at another call.
        """
        number, kind, where, _ = told[self._group.worker.rank]
        for rank, (their_number, their_kind, their_line, their_asked) in enumerate(told):
            self._heard |= their_asked
            if (their_number, their_kind) != (number, kind):
                raise self._parted(kind, where, rank, their_number, their_kind, their_line, number)

    def end_shards(self) -> None:
        """Meet all workers where their shards of a step are done. It tells nothing, so it costs little.

        Raises:
            MismatchError, Halted: see `meet`.
        """
        if self._halted is not None:
            raise self._halted
        self.number += 1
        if self._group.worker.size == 1:
            return
        before = self._clock.to("wait")
        replies = self._group.exchange(b"")
        self._clock.to(before)
        for rank, reply in enumerate(replies):
            if reply:
                length, _, rest = reply.partition(b";")
                number, kind, line, *_ = json.loads(rest[: int(length)])
                raise self._parted(_END_OF_SHARDS, line_of_user(), rank, number, kind, line)

    def _parted(
        self, kind: str, where: str, rank: int, number: int, their_kind: str, their_line: str, mine: int | None = None
    ) -> MismatchError:
        mine = mine if mine is not None else self.number
        me, other = _with_line(kind, where), _with_line(their_kind, their_line)
        return MismatchError(
            f"Workers are at different calls: worker {self._group.worker.rank} at call {mine}, {me}; "
            f"worker {rank} at call {number}, {other}. The script took different paths. "
            f"Decide by step.loss, step.mean, run.mean or run.once, which are the same on every worker."
        )


def _with_line(kind: str, line: str) -> str:
    """Name a call and its line; the end of main has none."""
    return f"{kind} ({line})" if line else kind
