"""Who is in a fleet, who is missing and who is on the way. Pure: no I/O, no clock.

    MEMBER --exit--> NOBODY, marked --"mended"--> NOBODY --Fork--> REPLACEMENT --"ready"--> JOINER --"joined"--> MEMBER
                            ^                       ^                   |                     |
                            |                       +-------exit--------+                     |
                            +-----------------------exit--------------------------------------+

A joiner may be a member already before anybody has said so: it is marked dead like one. A replacement is known to the
supervisor alone. What is not needed any more is DISMISSED: killed, and nothing that it does counts.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from samestep.launching.events import Exited
from samestep.launching.instructions import Fork, Instruction, Join, Kill, MarkDead, Note

MOST_TRIES = 4
"""Replacements of one worker that may fail one after the other: the first, and three more."""


class Part(Enum):
    """What the process in a slot is to the fleet."""

    NOBODY = 0
    SPARE = 1
    """The run needs fewer workers; it leaves."""
    MEMBER = 2
    REPLACEMENT = 3
    JOINER = 4
    DISMISSED = 5


@dataclass
class Place:
    """One slot.

    Attributes:
        part: of the process that is, or was last, there.
        generation: how many processes were there before.
        is_alive: its exit was not told yet.
        told_end: it said how it ends.
        is_marked: it is marked dead, and the others have not said yet that they go on without it.
        was_member: it was one when it was marked dead.
        tries: replacements since there was a member.
        hung: what is known of its hang; empty if it did not hang.
    """

    part: Part = Part.MEMBER
    generation: int = 0
    is_alive: bool = True
    told_end: bool = False
    is_marked: bool = False
    was_member: bool = False
    tries: int = 0
    hung: str = ""


@dataclass
class Roster:
    """The slots of one fleet.

    Attributes:
        places: one per slot.
        deaths: those that the fleet has neither answered nor been ended for.
        asked: slots that the workers were ordered to take in.
    """

    places: list[Place]
    deaths: list[tuple[Exited, str]] = field(default_factory=list)
    asked: tuple[int, ...] = ()

    def current(self, slot: int, generation: int) -> Place | None:
        """Return the slot if that worker still lives there; None for one of before."""
        place = self.places[slot]
        return place if place.is_alive and place.generation == generation else None

    def alive(self, *parts: Part) -> list[int]:
        """Return the slots of processes that live; only those that are one of `parts`, if any are given."""
        return [slot for slot, place in enumerate(self.places) if place.is_alive and (not parts or place.part in parts)]

    @property
    def marked(self) -> set[int]:
        """Slots that are marked dead, without an answer."""
        return {slot for slot, place in enumerate(self.places) if place.is_marked}

    @property
    def some_leave(self) -> bool:
        """Whether a worker that takes part has said how it ends."""
        return any(place.told_end and place.part in (Part.MEMBER, Part.JOINER) for place in self.places)

    def seat(self, num_workers: int) -> None:
        """Take note that the run takes the first `num_workers` workers."""
        for place in self.places[num_workers:]:
            place.part = Part.SPARE

    def may_lose(self, slot: int) -> bool:
        """Return whether another takes part beside this worker, which has died."""
        return self.places[slot].part in (Part.MEMBER, Part.JOINER) and bool(self.alive(Part.MEMBER))

    def lose(self, death: Exited) -> list[Instruction]:
        """Go on without a worker that has died."""
        place = self.places[death.slot]
        place.was_member |= place.part is Part.MEMBER
        was_asked = place.part is Part.JOINER
        place.part, place.is_marked = Part.NOBODY, True
        self.deaths.append((death, place.hung))
        # First the order, lest the others ask in again whom they have just given up.
        return [*([self._join()] if was_asked else []), MarkDead(death.slot)]

    def mended(self, info: dict[str, Any]) -> list[Instruction]:
        """Take what the first survivor says: who goes on, and without whom.

        Args:
            info: first, members, dead, step.
        """
        out = self.joined(info)
        if not self.marked <= set(info["dead"]):
            # More have died since. Those who are left will meet again.
            return out
        for death, hung in self.deaths:
            if self.places[death.slot].was_member:
                out.append(Note(f"samestep: {_in_words(death, hung)}"))
                self.places[death.slot].was_member = False
        self.deaths.clear()
        for slot in self.marked:
            self.places[slot].is_marked = False
        return out

    def joined(self, info: dict[str, Any]) -> list[Instruction]:
        """Take what the first member says: who takes part.

        Args:
            info: members, step.
        """
        back = [slot for slot in info["members"] if self.places[slot].part is Part.JOINER]
        if not back:
            return []
        for slot in back:
            self.places[slot].part, self.places[slot].tries = Part.MEMBER, 0
        return [self._join(), *(Note(f"samestep: Worker {slot} is back.") for slot in back)]

    def ready(self, slot: int) -> list[Instruction]:
        """A replacement has come to where the others are."""
        self.places[slot].part = Part.JOINER
        return [self._join()]

    def refill(self) -> list[Instruction]:
        """Start who is missing, once the others go on without them."""
        if self.marked:
            return []
        out: list[Instruction] = []
        for slot, place in enumerate(self.places):
            if place.part is not Part.NOBODY or place.tries > MOST_TRIES:
                continue
            place.tries += 1
            if place.tries <= MOST_TRIES:
                place.part, place.generation = Part.REPLACEMENT, place.generation + 1
                place.is_alive, place.told_end, place.hung = True, False, ""
                out.append(Fork(slot, place.generation, joins=True))
            else:
                num_left = len(self.alive(Part.MEMBER))
                out.append(Note(f"samestep: {_without(slot, num_left)}"))
        return out

    def dismiss(self, *parts: Part) -> list[Instruction]:
        """Kill those that are not needed any more."""
        slots = self.alive(*parts)
        for slot in slots:
            self.places[slot].part = Part.DISMISSED
        return [Kill(slot) for slot in slots]

    def withdraw(self) -> list[Instruction]:
        """Nobody is to be taken in any more."""
        if not self.asked:
            return []
        self.asked = ()
        return [Join(())]

    def _join(self) -> Join:
        self.asked = tuple(self.alive(Part.JOINER))
        return Join(self.asked)


def new_roster(num_workers: int) -> Roster:
    """Return the slots of a fleet that begins."""
    return Roster([Place() for _ in range(num_workers)])


def forks(roster: Roster) -> Sequence[Fork]:
    """Return what starts it."""
    return [Fork(slot, place.generation) for slot, place in enumerate(roster.places)]


def _in_words(death: Exited, hung: str) -> str:
    if hung:
        return f"{hung} Its replicas moved to the other workers."
    if os.WIFSIGNALED(death.status):
        how = signal.Signals(os.WTERMSIG(death.status)).name
    else:
        how = f"exit code {os.waitstatus_to_exitcode(death.status)}"
    return f"Worker {death.slot} died ({how}); its replicas moved to the other workers."


def _without(slot: int, num_left: int) -> str:
    goes_on = f"the run goes on with {num_left} worker{'s' * (num_left != 1)}"
    return f"None of {MOST_TRIES} replacements of worker {slot} came up, so {goes_on}."
