"""When, and how roughly, the workers of a fleet are ended. Pure: no I/O, no clock."""

from __future__ import annotations

from samestep.core.worker import Wish
from samestep.launching.events import Facts
from samestep.launching.instructions import GiveOrder, Instruction, Kill, LetEnd, Note, SetDeadline, Terminate
from samestep.launching.roster import Roster
from samestep.launching.verdict import Action, Verdict

PATIENCE = 0.5
"""Seconds between SIGTERM and SIGKILL."""
GRACE = 2.0
"""Seconds that the others get to do what one worker did: leave with `sys.exit`, or tell why a peer is gone."""
STEP = 3.0
"""Seconds that workers have to come to the end of their step when the run is to end."""


class Ending:
    """The end of one fleet.

    Attributes:
        has_begun: the workers have been told to end at once.
    """

    def __init__(self, roster: Roster, verdict: Verdict):
        """End the workers of `roster` as `verdict` wants it."""
        self.has_begun = False
        self._roster = roster
        self._verdict = verdict
        self._deadline: float | None = None

    @property
    def is_hurried(self) -> bool:
        """Whether a second signal has come."""
        return self._verdict.is_hurried

    def act(self, action: Action, now: float) -> list[Instruction]:
        """Do what the verdict wants, at `now` in seconds."""
        out: list[Instruction] = []
        if action is Action.END_SOON and self._deadline is None:
            out.append(self._until(now + GRACE))
        if action is Action.FINISH and not self.has_begun:
            text = "samestep: The run ends after this step. Once more (Ctrl-C) ends it at once."
            out += [GiveOrder(Wish.STOP), self._until(now + STEP), Note(text)]
        if action in (Action.END_NOW, Action.END_AT_ONCE) and not self.has_begun:
            self.has_begun = True
            out += [self._until(now + PATIENCE), LetEnd(), *map(Terminate, self._roster.alive())]
        if action is Action.END_AT_ONCE:
            out.append(self._until(now))
        return out

    def signalled(self, number: int, can_finish: bool, now: float) -> list[Instruction]:
        """A signal has come; `can_finish` if there is something to keep at the end of the step."""
        out: list[Instruction] = [self._until(now)] if self.has_begun else []
        return out + self.act(self._verdict.interrupted(number, can_finish), now)

    def ticked(self, facts: Facts) -> list[Instruction]:
        """Time has passed."""
        if self._deadline is None or facts.now < self._deadline:
            return []
        out: list[Instruction] = [self._until(None)]
        if self.has_begun:
            return out + self.kill_all()
        if facts.is_reached and self._verdict.may_write:
            # A large checkpoint takes as long as it takes.
            text = "samestep: The checkpoint is still being written. Once more (Ctrl-C) ends the run without it."
            return [*out, Note(text)]
        return out + self.act(self._verdict.waited(), facts.now)

    def kill_all(self) -> list[Instruction]:
        """Nothing that a worker may still do is worth the wait."""
        return [Kill(slot) for slot in self._roster.alive()]

    def _until(self, at: float | None) -> SetDeadline:
        self._deadline = at
        return SetDeadline(at)
