"""Decides what becomes of a fleet, from its first fork to its last exit. Pure: no I/O, no clock.

Events come in with the time and other facts, instructions go out; the supervisor carries them out. So all of it can be
simulated.

    starting   forked; not seated, or no call of its own recorded yet. A death ends the fleet
    playing    a death is survived by the others, where they can go on (`survivors_go_on`): see `roster`
    leaving    a signal, an order to stop or scale, or a worker's word that it ends: no death is survived, and no
               replacement is needed any more
    ending     SIGTERM, half a second later SIGKILL, to all
    ended      no process lives: `End`, or `StartAgain` from the newest state

[Note: what is told in order]
The frames of one worker come in their order; those of several in any. An exit comes after every frame that was sent,
by anybody, before it. So a "mended" or "joined" that comes after a worker's exit, and could not have been said without
knowing of it, was said after it; and those two kinds come in the order in which they were said.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from samestep.core.worker import Wish
from samestep.launching.channel import Frame
from samestep.launching.ending import Ending
from samestep.launching.events import Enough, Event, Exited, Facts, Heard, Hung, Signalled, Tick
from samestep.launching.failure import Failure
from samestep.launching.instructions import (
    End,
    Instruction,
    Kill,
    Learn,
    Note,
    Show,
    StartAgain,
    Watch,
)
from samestep.launching.restarts import IN_VAIN, Restarts
from samestep.launching.roster import Part, forks, new_roster
from samestep.launching.verdict import Action, Verdict

_LAST_WORDS = ("error", "exit", "done", "left")
_LEAVING = Wish.STOP | Wish.SCALE


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is known of a fleet before it begins.

    Attributes:
        num_workers: how many to fork.
        has_snapshots: its newest state is kept outside of it, so another can start from there.
        has_orders: its workers can be told to stop at the end of a step.
        survivors_go_on: its workers can go on without one that has died, and take in another.
        run_folder: the folder for checkpoints, as far as it is known.
        num_calls: calls that the run had recorded before.
    """

    num_workers: int
    has_snapshots: bool = False
    has_orders: bool = False
    survivors_go_on: bool = False
    run_folder: str | None = None
    num_calls: int = 0


class Coordinator:
    """One fleet.

    Attributes:
        ending: its end, as far as it has begun.
        has_died: a worker has died.
    """

    def __init__(self, setup: Setup, restarts: Restarts):
        """Coordinate a fleet; `restarts` outlives it."""
        self.has_died = False
        self._setup = setup
        self._restarts = restarts
        self._roster = new_roster(setup.num_workers)
        self._verdict = Verdict(setup.num_workers)
        self.ending = Ending(self._roster, self._verdict)
        self._run_folder = setup.run_folder
        self._keeps_state = True
        self._is_kept = False
        self._has_finished = False
        self._has_ended = False
        self._facts = Facts(now=0.0)
        self._out: list[Instruction] = []

    def begin(self) -> list[Instruction]:
        """Return how to begin."""
        return list(forks(self._roster))

    def take(self, event: Event, facts: Facts) -> list[Instruction]:
        """Return what to do about an event. After `End` or `StartAgain` nothing is to be done any more."""
        if self._has_ended:
            return []
        self._facts, self._out = facts, []
        if isinstance(event, Tick):
            self._out += self.ending.ticked(facts)
        elif isinstance(event, Enough):
            self._act(Action.END_NOW)
        elif isinstance(event, Signalled):
            self._out += self.ending.signalled(event.number, self._can_finish, facts.now)
        elif isinstance(event, Hung):
            self._hung(event)
        elif isinstance(event, Exited):
            self._exited(event)
        else:
            self._heard(event)
        self._settle()
        return self._out

    @property
    def _can_finish(self) -> bool:
        """Whether there is anything to keep at the end of a step: not before the run has recorded a call."""
        return self._setup.has_orders and self._setup.has_snapshots and self._facts.num_calls > 0

    @property
    def _is_leaving(self) -> bool:
        """Whether the workers are about to end, so that nobody is replaced any more."""
        is_ordered = bool(self._facts.orders & _LEAVING) or self._verdict.is_interrupted
        return is_ordered or self.ending.has_begun or self._has_finished or self._roster.some_leave

    @property
    def _is_playing(self) -> bool:
        """Whether the workers are all in a run that is kept in memory, and go on with it."""
        # A fleet that replays has recorded no call of its own: it may not be all there yet.
        has_begun = self._is_kept and self._keeps_state and self._facts.num_calls > self._setup.num_calls
        return self._setup.survivors_go_on and has_begun and not self._is_leaving

    def _heard(self, event: Heard) -> None:
        place, frame = self._roster.current(event.slot, event.generation), event.frame
        if place is None or place.part is Part.DISMISSED:
            return
        if place.part is Part.REPLACEMENT:
            if frame.kind == "ready":
                self._out += self._roster.ready(event.slot)
            return
        place.told_end |= frame.kind in _LAST_WORDS
        if frame.kind == "error":
            failure = Failure(**frame.info)
            if failure.of_peer:
                self._recall()
            self._act(self._verdict.failed(failure))
        elif frame.kind == "exit":
            self._act(self._verdict.left(event.slot, frame.info))
        elif frame.kind == "wants":
            self._act(self._verdict.wants(frame.info["num_workers"]))
        elif frame.kind == "halted":
            self._has_finished = True
            self._act(self._verdict.halted(self._facts.target))
        elif frame.kind == "imports":
            self._out.append(Learn(tuple(frame.info["names"])))
        elif frame.kind == "mended":
            self._out += self._roster.mended(frame.info)
        elif frame.kind == "joined":
            self._out += self._roster.joined(frame.info)
        elif frame.kind == "lost":
            self._lost(event.slot)
        elif frame.kind not in _LAST_WORDS:
            self._show(frame)

    def _show(self, frame: Frame) -> None:
        """Pass on what is for the user, and learn from it."""
        info = frame.info
        if frame.kind == "seated":
            self._run_folder = info.get("run_folder") or self._run_folder
            self._keeps_state = info.get("keeps_state", True)
            self._is_kept, self._has_finished = info.get("can_scale", False), False
            self._roster.seat(info.get("num_workers", self._setup.num_workers))
            self._out.append(Watch(info.get("call", 0), info.get("hang_after")))
        self._has_finished |= frame.kind == "finished"
        self._out.append(Show(frame))

    def _exited(self, event: Exited) -> None:
        place = self._roster.current(event.slot, event.generation)
        if place is None:
            return
        place.is_alive = False
        if self.ending.has_begun or place.part is Part.DISMISSED:
            return
        if place.part is Part.REPLACEMENT:
            place.part = Part.NOBODY
            return
        told = place.told_end and os.WIFEXITED(event.status)
        self.has_died |= not told
        if not told and self._is_playing and self._roster.may_lose(event.slot):
            self._out += self._roster.lose(event)
            return
        if not told:
            self._recall()
        self._died(event, place.hung, place.told_end)
        if self._verdict.has_failed and self._can_finish and not self._verdict.is_interrupted:
            self._out += self.ending.kill_all()

    def _hung(self, event: Hung) -> None:
        place = self._roster.current(event.slot, event.generation)
        if place is not None and not self.ending.has_begun:
            place.hung = event.message
            self._out.append(Kill(event.slot))

    def _lost(self, slot: int) -> None:
        """The survivors cannot go on."""
        self._recall()
        if not self._verdict.has_failed:
            self._act(self._verdict.failed(Failure(message=f"Worker {slot} could not go on: it lost the others.")))
        self._out += self.ending.kill_all()

    def _recall(self) -> None:
        """Let the deaths count after all that the others have not got over."""
        deaths, self._roster.deaths = self._roster.deaths, []
        for death, hung in deaths:
            self._died(death, hung)

    def _died(self, event: Exited, hung: str, told_end: bool = False) -> None:
        if hung:
            self._verdict.hung(event.slot, hung)
        self._act(self._verdict.died(event.slot, event.pid, event.status, told_end, event.crash))

    def _act(self, action: Action) -> None:
        self._out += self.ending.act(action, self._facts.now)

    def _settle(self) -> None:
        """Do what follows from how things stand, whatever has just happened."""
        roster = self._roster
        is_empty = not roster.alive(Part.MEMBER)
        if is_empty and not self._has_finished and not self.ending.has_begun:
            # They left without a word of those who died.
            self._recall()
        if self._is_leaving:
            self._out += roster.withdraw() + roster.dismiss(Part.REPLACEMENT)
        # One that was asked in may be a member, and even the first, until the first has said that all is over.
        if self._has_finished or is_empty:
            self._out += roster.dismiss(Part.REPLACEMENT, Part.JOINER)
        if self._is_playing:
            self._out += roster.refill()
        if not roster.alive():
            self._conclude()

    def _conclude(self) -> None:
        """Every worker is gone."""
        self._has_ended = True
        outcome = replace(self._verdict.outcome(), run_folder=self._run_folder)
        may_start = self._setup.has_snapshots and self._keeps_state and outcome.died is not None
        if may_start and self._restarts.allow(self._facts.num_calls, outcome.error):
            text = f"samestep: {outcome.died} All workers start again from the newest state."
            self._out += [Note(text), StartAgain(self._setup.num_workers, replace(outcome, restarts=True))]
        elif outcome.wants is not None:
            self._out.append(StartAgain(outcome.wants, outcome))
        else:
            text = ""
            if self._restarts.came_again:
                text = "\nsamestep: it came again after a new start, at the same place."
            elif self._restarts.in_vain:
                text = f"\nsamestep: the last {IN_VAIN} times the run came no further than before, so it has ended."
            self._out.append(End(replace(outcome, message=f"{outcome.message}{text}")))
