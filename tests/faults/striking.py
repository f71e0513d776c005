"""Strikes a worker at a chosen line of our own protocol, the n-th time that it comes there.

    points_of(functions)    every line of some functions, read from their code, so that the list follows the code
    Tracer                  in a worker: counts how often it comes to each line, and strikes where a strike is planned

Nothing is put into the source: Python's own tracing tells of each line just before it runs. What has struck, and what
was counted, is written to memory that all fleets of a run share, so that workers which start again are left alone.
"""

from __future__ import annotations

import errno
import importlib
import inspect
import linecache
import mmap
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

RANKS, BIRTHS = 4, 3
"""Workers, and fleets of a run, that are told apart in what is counted."""
_PAUSE = 0.1
"""Seconds that a worker is held up at a line by a pause."""
KINDS = ("kill", "stop", "oserror", "memory", "pause")


@dataclass(frozen=True)
class Point:
    """A line of the protocol.

    Attributes:
        function: "samestep.core.arena:Arena.exchange".
        line: its number in the file.
        text: what stands there.
    """

    function: str
    line: int
    text: str

    def __str__(self) -> str:
        module, _, name = self.function.removeprefix("samestep.").partition(":")
        return f"{module}.{name}:{self.text}"


@dataclass(frozen=True)
class Strike:
    """What is to happen where.

    Attributes:
        kind: one of `KINDS`: SIGKILL or SIGSTOP to itself, an error that may pass, or a delay.
        rank: the worker.
        birth: which of the workers of that rank, 0 for the first; None for whichever comes there.
        point: the line; it strikes before that runs.
        time: at which time that this worker comes there, from 1.
    """

    kind: str
    rank: int
    birth: int | None
    point: Point
    time: int = 1

    def __str__(self) -> str:
        again = f", after {self.birth} deaths" if self.birth else ""
        return f"{self.kind} of worker {self.rank}{again}, time {self.time} at {self.point}"


def function_named(name: str) -> Any:
    """Return the function, or the property's getter, that "module:Class.function" names."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = inspect.getattr_static(found, part)
    found = found.fget if isinstance(found, property) else found
    return inspect.unwrap(getattr(found, "__func__", found))


def codes_of(name: str) -> list[CodeType]:
    """Return the code of a function and of those written inside it."""
    codes = [function_named(name).__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return codes


def points_of(functions: Iterable[str]) -> tuple[Point, ...]:
    """Return every line of the functions that runs, in their order."""
    points = []
    for name in functions:
        lines = set()
        for code in codes_of(name):
            lines |= {line for _, _, line in code.co_lines() if line and line != code.co_firstlineno}
        filename = function_named(name).__code__.co_filename
        points += [Point(name, line, linecache.getline(filename, line).strip()) for line in sorted(lines)]
    return tuple(points)


class Board:
    """What the fleets of one run share: how often each line was reached, which strikes are done."""

    _HEAD = 64

    def __init__(self, num_points: int):
        self._num_points = num_points
        self._memory = mmap.mmap(-1, 8 * (self._HEAD + RANKS * BIRTHS * num_points))
        self._words = memoryview(self._memory).cast("q")

    def born(self, rank: int) -> int:
        """Note that a worker of this rank begins; return how many there were before."""
        self._words[rank] += 1
        return self._words[rank] - 1

    def strike(self, number: int, value: int) -> None:
        """Note that strike `number` happens now, when the run had recorded `value` calls."""
        self._words[16 + number] = 1 + value

    def struck(self, number: int) -> int | None:
        """Return the calls recorded when strike `number` happened; None if it has not."""
        return self._words[16 + number] - 1 if self._words[16 + number] else None

    def count(self, rank: int, birth: int, index: int) -> int:
        """Count that a worker has come to a point once more; return how often it has."""
        at = self._HEAD + (rank * BIRTHS + min(birth, BIRTHS - 1)) * self._num_points + index
        self._words[at] += 1
        return self._words[at]

    def counts(self) -> dict[tuple[int, int, int], int]:
        """Return how often (rank, birth, number of the point) was reached, where it was."""
        found = {}
        for place, count in enumerate(self._words[self._HEAD :].tolist()):
            if count:
                worker, index = divmod(place, self._num_points)
                found[(*divmod(worker, BIRTHS), index)] = count
        return found

    def close(self) -> None:
        self._words.release()
        self._memory.close()


class Tracer:
    """Follows one worker through the points."""

    def __init__(self, points: Sequence[Point], board: Board, strikes: Sequence[Strike], rank: int, num_calls: Any):
        """Prepare to follow a worker.

        Args:
            points: what is counted, and where it may strike.
            board: shared with the workers before and after.
            strikes: planned for the run.
            rank: the worker.
            num_calls: tells how many calls the run has recorded.
        """
        self._board = board
        self._rank = rank
        self._num_calls = num_calls
        self._birth = board.born(rank)
        self._numbers = {(point.function, point.line): number for number, point in enumerate(points)}
        self._due = {
            (self._numbers[strike.point.function, strike.point.line], strike.time): (number, strike)
            for number, strike in enumerate(strikes)
            if strike.rank == rank and strike.birth in (None, self._birth) and board.struck(number) is None
        }
        self._lines: dict[CodeType, dict[int, int]] = {}
        for name in dict.fromkeys(point.function for point in points):
            numbers = {line: number for (function, line), number in self._numbers.items() if function == name}
            self._lines |= dict.fromkeys(codes_of(name), numbers)

    def start(self) -> None:
        """Follow this thread from now on."""
        sys.settrace(self._called)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        numbers = self._lines.get(frame.f_code)
        if numbers is None:
            return None

        def told(frame: FrameType, event: str, argument: Any) -> Any:
            number = numbers.get(frame.f_lineno) if event == "line" else None
            if number is not None:
                due = self._due.get((number, self._board.count(self._rank, self._birth, number)))
                if due is not None:
                    self._board.strike(due[0], self._num_calls())
                    act(due[1])
            return told

        return told


def act(strike: Strike) -> None:
    """Let it happen to this process, here and now."""
    # The same error at the same place twice would be a mistake of the script's, so each says whose it is.
    words = f"planted at a point of worker {strike.rank}, number {strike.birth}"
    if strike.kind in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if strike.kind == "kill" else signal.SIGSTOP)
    elif strike.kind == "oserror":
        raise OSError(errno.EIO, words)
    elif strike.kind == "memory":
        raise MemoryError(words)
    else:
        time.sleep(_PAUSE)
