"""What a forked worker knows of itself, so that `samestep.launch` in the script finds its place."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, field
from typing import Any, NoReturn

from samestep.guarding.pulse import Pulse
from samestep.launching.channel import Sender
from samestep.launching.orders import Orders
from samestep.launching.output import Muted, WorkerOutput


@dataclass(kw_only=True)
class WorkerContext:
    """One worker, from its birth to its end.

    Attributes:
        rank: index among the forked workers.
        num_forked: number of workers that were forked; a run may want fewer.
        generation: how many workers had this rank before, in this fleet.
        joins: it takes the place of one that died: it replays what the others have done, tells "ready" and joins them.
        sender: the way to the supervisor.
        shared: what the zygote made before forking for the workers to share; None for a lone worker.
        known: modules that the zygote had imported before.
        pulse: where it shows the supervisor that it makes progress.
        options: what was set outside the script, as plain facts.
        earlier: results of the launch calls that the caller's process has already made.
        leaves: whether the worker ends after its launch call (the caller's process goes on with the script).
        muted: what silences the script, where the caller's process or an earlier fleet has shown that part.
        output: what it prints.
        snapshots: where the run keeps its newest state outside of the workers; None without.
        orders: what the supervisor wants of the run; None without.
        writer: writes checkpoints beside training; None without.
        num_calls: launch calls seen so far.
        num_seated: workers taking part, once the first launch call has decided.
        group: how the seated workers reach each other; made at the first launch call, kept for later ones.
        is_playing: the user's function is under way; stays true when it raises.
    """

    rank: int
    num_forked: int
    sender: Sender
    generation: int = 0
    joins: bool = False
    shared: Any = None
    known: frozenset[str] = frozenset()
    pulse: Pulse | None = None
    options: dict[str, Any] = field(default_factory=dict)
    earlier: tuple[bytes, ...] = ()
    leaves: bool = False
    muted: Muted | None = None
    output: WorkerOutput | None = None
    snapshots: Any = None
    orders: Orders | None = None
    writer: Any = None
    num_calls: int = 0
    num_seated: int | None = None
    group: Any = None
    is_playing: bool = False

    def unmute(self) -> None:
        """Let the script print from now on."""
        if self.muted is not None:
            self.muted.end()

    def give_up(self) -> NoReturn:
        """Say that this worker cannot go on without one that has died, and wait for the end."""
        if not self.joins:
            self.sender.send("lost")
            while True:
                signal.pause()
        os._exit(1)

    def leave(self) -> NoReturn:
        """End this process at once and quietly.

        Nothing of the script runs any more: its `finally` blocks might remove what the other workers still need.
        """
        self.sender.send("left")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


_current: WorkerContext | None = None


def current() -> WorkerContext | None:
    """Return the context of this process, None if it is not a forked worker."""
    return _current


def enter(context: WorkerContext) -> None:
    """Make `context` that of this process."""
    global _current
    _current = context
