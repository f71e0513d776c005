"""Finds a worker that makes no progress, and writes down what it was doing. The supervisor then kills it.

pulses    signs of life, in shared memory      ->  patience   who is hung: a pure rule
stack     asked of the one that is hung        ->  a file in the run's folder, and one sentence for the user
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Protocol

from samestep.guarding import stack
from samestep.guarding.patience import FLOOR, STOPPED, Patience
from samestep.guarding.pulse import Pulses, Reading
from samestep.guarding.stack import StackFile

_POLL = 0.5
"""Seconds between looks."""


class Suspect(Protocol):
    """One worker, as the supervisor holds it."""

    rank: int
    pid: int
    is_alive: bool
    stack: StackFile


class Fence:
    """Watches the fleets of one run for hangs.

    Attributes:
        pulses: of the fleet that is under way.
    """

    pulses: Pulses

    def __init__(self) -> None:
        self._patience = Patience()
        self._is_on = False
        self._call = 0
        self._suspected: tuple[int, float] | None = None
        self._next_look = 0.0
        self._private_folder: str | None = None

    def begin(self, num_workers: int) -> None:
        """Begin with a new fleet."""
        self.pulses = Pulses(num_workers)
        self._patience.begin()
        # A worker may be stopped before it has a seat, and the others wait for it. The limit is the last that was set.
        self._is_on = self._patience.floor > 0

    def seated(self, call: int, hang_after: float | None) -> None:
        """Watch from now on: the workers are in a run.

        Args:
            call: number of the launch call.
            hang_after: seconds that the user gives a silent worker at least, stopped or not; 0 is for ever, None the
                default.
        """
        if call != self._call:
            self._call = call
            self._patience.forget()
        self._patience.floor = FLOOR if hang_after is None else hang_after
        self._patience.stopped = STOPPED if hang_after is None else hang_after
        self._is_on = self._patience.floor > 0

    def renew(self, rank: int) -> None:
        """A worker has ended, and the others may go on: watch them, and who comes in its place."""
        self._patience.renew(rank)
        self.pulses.renew(rank)
        self._suspected = None
        self._is_on = self._patience.floor > 0

    def timeout(self, other: float | None) -> float | None:
        """Return how long the supervisor may sleep, in seconds, where it would sleep for `other` (None: for ever)."""
        if not self._is_on:
            return other
        return _POLL if other is None else min(other, _POLL)

    def look(self, now: float, members: Sequence[Suspect], run_folder: str | None) -> tuple[int, str] | None:
        """Look for a worker that is hung.

        Args:
            now: seconds of the monotonic clock.
            members: the workers of the fleet.
            run_folder: where its stack goes; None makes a private folder.

        Returns:
            Its rank, and a sentence or more for the user. None while all is well.
        """
        if not self._is_on or now < self._next_look:
            return None
        self._next_look = now + _POLL
        alive = {member.rank: member for member in members if member.is_alive}
        found = self._patience.look(now, [self._read(member) for member in alive.values()])
        if found is None:
            return None
        member = alive[found.rank]
        state = stack.state_of(member.pid)
        text = member.stack.ask(member.pid, found.stopped)
        is_back = self._read(member).beats != found.beats
        if not found.stopped and (is_back or stack.work_in(text)):
            self._patience.spare(found.rank)
            return None
        if not found.stopped and self._suspected != (found.rank, found.beats):
            # Between two parts of a compilation nothing of it is on the stack: look twice.
            self._suspected = found.rank, found.beats
            return None
        line, loader = stack.line_of_user(text), None
        if found.phase == "data":
            line, loader, more = _in_loaders(member, line)
            text += more
        # One is enough until it is dead, which may end this fleet.
        self._is_on = False
        seconds = self._patience.silence(found.rank)
        head = f"Worker {found.rank} (pid {member.pid}) hung {_where(found, loader)}{line and f', at {line}'}."
        why = f"It {_how(found, state, text)} for {seconds:.1f} s, so it was killed."
        advice = "" if found.stopped else f" If that was work, give it more time: --hang-after {4 * seconds:.0f}."
        told = self._keep(found, f"{head}\n{why}\n\n{text}", run_folder)
        return found.rank, f"{head} {why} {told}{advice}"

    def _read(self, member: Suspect) -> Reading:
        state = stack.state_of(member.pid)
        ticks = stack.ticks_of(member.pid)
        return self.pulses.read(member.rank, stopped=state == "T", traced=state == "t", ticks=ticks)

    def _keep(self, found: Reading, text: str, run_folder: str | None) -> str:
        """Write the stack to a new file; return the sentence that says where."""
        try:
            if run_folder is not None:
                folder = os.path.join(run_folder, "hangs")
                os.makedirs(folder, exist_ok=True)
            else:
                folder = self._private_folder = self._private_folder or tempfile.mkdtemp(prefix="samestep-hangs-")
            number = 1
            while os.path.exists(path := os.path.join(folder, f"{number}-worker-{found.rank}.txt")):
                number += 1
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            return f"Its stack could not be written: {error}."
        return f"Its stack is in {path}."


def _in_loaders(member: Suspect, line: str) -> tuple[str, int | None, str]:
    """Ask a worker's data loaders what they do.

    Returns:
        The user's line in the one that is held up (`line` if none is), its pid, and the stacks of all.
    """
    texts = {}
    for pid in stack.children_of(member.pid):
        texts[pid] = member.stack.ask(pid, stopped=stack.state_of(pid) == "T")
    stacks = "".join(f"\nprocess {pid}, started by this worker:\n{text}" for pid, text in texts.items())
    for pid, text in texts.items():
        if inner := stack.line_in_loader(text):
            return inner, pid, stacks
    return line, next((pid for pid, text in texts.items() if text), None), stacks


def _where(found: Reading, loader: int | None) -> str:
    """Return what the worker was doing, in words."""
    if found.phase == "compute" and found.replica >= 0:
        return f"in step {found.step}, replica {found.replica}"
    if found.phase == "data" and loader is not None:
        return f"in step {found.step}, waiting for its data loader (pid {loader})"
    if found.phase == "data":
        return f"in step {found.step}, reading its data"
    if found.phase == "update":
        return f"in the update of step {found.step}"
    return f"in or after step {found.step}, outside of its shards"


def _how(found: Reading, state: str, text: str) -> str:
    """Return what is known of why it made no progress, in words."""
    if found.stopped:
        return "was stopped by a signal (SIGSTOP) and made no progress"
    if state == "D":
        return "waited for a disk or a network inside the kernel, and made no progress"
    if not text:
        return "was inside C code that lets no signal through, and made no progress"
    return "made no progress"
