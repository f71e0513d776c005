"""How a run ends, decided from what its workers said and how they died. Pure: no I/O, no clock."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from samestep.errors import IntegrityError
from samestep.guarding.crash import Crash
from samestep.launching.failure import Failure

_PID = re.compile(r"\bpid \d+")


class Action(Enum):
    """What the supervisor does next."""

    GO_ON = 0
    END_SOON = 1
    """Give the others a moment to do the same, or to tell more; then end them."""
    END_NOW = 2
    END_AT_ONCE = 3
    """Without the patience that END_NOW has for what workers do when they are told to end."""
    FINISH = 4
    """Let all come to the end of their step."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a fleet ended.

    Attributes:
        code: exit code of the run.
        message: what to print, once; empty if nothing went wrong.
        num_workers: workers that were forked.
        has_failed: a worker failed (not: was ended by a signal or by its own sys.exit).
        wants: the run asked to be started again with this many workers; None if it did not.
        died: where a worker died, or had an error that may pass: a short sentence that says how.
        error: the error, where `died` is about one; without the pids in it.
        restarts: the run starts again.
        ended_by: the signal that ended the run; None if it ended by itself.
        run_folder: the folder for checkpoints, as far as it is known.
    """

    code: int
    message: str
    num_workers: int
    has_failed: bool = False
    wants: int | None = None
    died: str | None = None
    error: str = ""
    restarts: bool = False
    ended_by: int | None = None
    run_folder: str | None = None


class Verdict:
    """Collects events of one fleet."""

    def __init__(self, num_workers: int):
        self._num_workers = num_workers
        self._failures: list[Failure] = []
        self._suspicion: Failure | None = None
        self._exit: tuple[int, str] | None = None
        self._signal: int | None = None
        self._has_halted = False
        self._is_cut = False
        self._is_hurried = False
        self._wants: int | None = None
        self._hung: dict[int, str] = {}

    @property
    def has_failed(self) -> bool:
        """Whether a worker has failed."""
        return bool(self._failures)

    @property
    def is_interrupted(self) -> bool:
        """Whether a signal has come."""
        return self._signal is not None

    @property
    def is_hurried(self) -> bool:
        """Whether a second signal has come."""
        return self._is_hurried

    @property
    def may_write(self) -> bool:
        """Whether workers that have come to the end of their step may still write a checkpoint there."""
        return not self._has_halted and not self._failures

    def failed(self, failure: Failure) -> Action:
        """A worker told its error."""
        self._failures.append(failure)
        return Action.END_SOON if failure.of_peer else Action.END_NOW

    def left(self, rank: int, info: dict[str, Any]) -> Action:
        """A worker called `sys.exit`: no error if all do, or if it gave an exit code of its own."""
        code = info["code"]
        if self._exit is None or rank == 0:
            self._exit = (code, info["message"])
        if code != 0:
            return Action.END_SOON
        if not info["inside"]:
            return Action.GO_ON
        self._suspicion = Failure(
            message=f"Worker {rank} called sys.exit() inside the function given to launch(), while other workers went "
            "on. Leave it on all workers at the same step: decide by step.loss, run.mean or run.once."
        )
        return Action.END_SOON

    def died(self, rank: int, pid: int, status: int, told: bool, crash: Crash | None = None) -> Action:
        """A worker's process ended with wait status `status`; `told` if it had said that and why."""
        if told and os.WIFEXITED(status):
            return Action.GO_ON
        if rank in self._hung:
            return self.failed(Failure(message=self._hung[rank], rank=rank))
        return self.failed(Failure.of_exit(rank, pid, status, crash))

    def hung(self, rank: int, message: str) -> None:
        """A worker made no progress, and is killed now; `message` says all that is known."""
        self._hung[rank] = message

    def interrupted(self, number: int, can_finish: bool = False) -> Action:
        """The supervisor got a signal; `can_finish` if there is something to keep at the end of the step."""
        if self._signal is not None:
            self._is_cut = self._is_hurried = True
            return Action.END_AT_ONCE
        self._signal = number
        if can_finish:
            return Action.FINISH
        self._is_cut = True
        return Action.END_NOW

    def halted(self, num_workers: int | None) -> Action:
        """The workers leave at the end of a step, by order; the run goes on with `num_workers`, if that is given."""
        self._has_halted = True
        self._wants = num_workers
        return Action.END_SOON

    def wants(self, num_workers: int) -> Action:
        """The run needs another number of workers than were forked."""
        self._wants = num_workers
        return Action.END_NOW

    def waited(self) -> Action:
        """The moment after END_SOON is over and some still live."""
        if self._suspicion is not None:
            self._failures.append(self._suspicion)
        self._is_cut = True
        return Action.END_NOW

    def outcome(self) -> Outcome:
        """Return the end of it, once every worker is gone."""
        if self._signal is not None and self._was_stopped():
            name = signal.Signals(self._signal).name
            return self._make(128 + self._signal, f"samestep: {name} ended the run.", stopped=True)
        if self._failures:
            cause = next((failure for failure in self._failures if not failure.of_peer), self._failures[0])
            ranks = {f.rank for f in self._failures if f.rank is not None and f.is_same_as(cause)}
            died = None
            if cause is not self._suspicion and self._signal is None:
                died = cause.message if cause.rank in self._hung and not cause.kind else _in_short(cause)
            ended = self._make(cause.code, cause.text(sorted(ranks)))
            # The same error is the same in another process.
            error = _PID.sub("pid", f"{cause.kind}: {cause.message}") if cause.kind else ""
            return replace(ended, died=died, error=error)
        if self._wants is not None:
            return self._make(0, "")
        return self._make(*(self._exit if self._exit is not None else (0, "")))

    def _make(self, code: int, message: str, stopped: bool = False) -> Outcome:
        return Outcome(
            code=code,
            message=message,
            num_workers=self._num_workers,
            has_failed=self.has_failed and not stopped,
            wants=None if self.has_failed or self._signal is not None else self._wants,
            ended_by=self._signal if stopped else None,
        )

    def _was_stopped(self) -> bool:
        """Whether the signal is what ended the run: not if it came to its own end, or error, in that step."""
        if self._has_halted or self._is_cut:
            return True
        # Who sends a signal to the supervisor often sends it to all of its workers too.
        return bool(self._failures) and all(f.of_peer or not f.kind for f in self._failures)


def _in_short(cause: Failure) -> str | None:
    """Say in a sentence why a worker is gone, if the run may go on without what went wrong."""
    if cause.may_pass and cause.kind == IntegrityError.__name__:
        return cause.message
    if cause.kind:
        what = ": ".join(filter(None, (cause.kind, cause.message)))
        return f"Worker {cause.rank} had a {what}." if cause.may_pass else None
    return cause.message.partition(":")[0] + "."
