"""The coordinator, held to its promises over thousands of simulated runs; and planted bugs that these runs find.

`simulated_fleet.py` tells what a run is, and asserts: it ends, once, with the right code; never two workers in a slot;
none is marked dead before its exit; none is replaced before the others go on without it; no step is made twice; JOIN
stands only for who lives and is ready; nobody lives at the end.
"""

import signal
from collections import Counter
from dataclasses import replace

import pytest
from simulated_fleet import Violation, World

from samestep.launching import roster
from samestep.launching.coordinator import Coordinator
from samestep.launching.ending import Ending
from samestep.launching.events import Exited
from samestep.launching.instructions import Fork, Join, MarkDead
from samestep.launching.roster import Part, Roster

NUM_SEEDS = 5_000
MANY = 500_000
PART = 25_000


def play(seeds):
    """Play runs; return what happened in them. The first that breaks something names its seed."""
    seen = Counter()
    for seed in seeds:
        world = World(seed)
        try:
            world.run()
        except Exception as error:
            raise Violation(seed, *error.args) from error
        seen[f"code {world.outcome.code}"] += 1
        for what in ("fleets", "mended", "back", "lost", "marked", "forked again", "dismissed", "out of date"):
            seen[what] += world.seen[what]
    return seen


def test_it_keeps_its_promises_whatever_happens():
    seen = play(range(NUM_SEEDS))
    print(dict(seen))
    # What is not reached is not tested.
    assert set(seen) >= {"code 0", "code 1", f"code {128 + signal.SIGINT}", f"code {128 + signal.SIGTERM}"}
    least = {"fleets": NUM_SEEDS, "mended": 1000, "back": 300, "lost": 200, "marked": 1500}
    least |= {"forked again": 100, "dismissed": 300, "out of date": 10}
    assert {what: seen[what] for what in least if seen[what] < least[what]} == {}


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("begin", range(0, MANY, PART))
def test_it_keeps_them_for_long(begin):
    play(range(NUM_SEEDS + begin, NUM_SEEDS + begin + PART))


def instead(owner, name):
    """Decorate a function that gets the original of `owner.name` first: the bug, to be patched in."""

    def plant(bug):
        original = getattr(owner, name)

        def patch(patcher):
            if isinstance(original, property):
                patcher.setattr(owner, name, property(lambda self: bug(original.fget, self)))
            else:
                patcher.setattr(owner, name, lambda *arguments: bug(original, *arguments))

        BUGS[bug.__name__] = patch
        return bug

    return plant


BUGS = {}


@instead(Coordinator, "_hung")
def a_hung_worker_is_marked_before_its_exit(original, self, event):
    original(self, event)
    self._out.append(MarkDead(event.slot))


@instead(Coordinator, "_hung")
def a_hung_worker_is_left_alone(original, self, event):
    pass


@instead(Roster, "mended")
def an_answer_that_is_out_of_date_is_taken(original, self, info):
    return original(self, {**info, "dead": range(len(self.places))})


@instead(Roster, "lose")
def nobody_waits_for_the_answer(original, self, death):
    out = original(self, death)
    self.places[death.slot].is_marked = False
    return out


@instead(Roster, "dismiss")
def replacements_live_on_at_the_end(original, self, *parts):
    return []


@instead(Roster, "joined")
def the_order_to_join_stands_for_ever(original, self, info):
    return [instruction for instruction in original(self, info) if not isinstance(instruction, Join)]


@instead(Roster, "lose")
def a_joiner_that_died_is_still_to_be_taken_in(original, self, death):
    return [instruction for instruction in original(self, death) if not isinstance(instruction, Join)]


@instead(Roster, "current")
def generations_are_ignored(original, self, slot, generation):
    return original(self, slot, self.places[slot].generation)


@instead(Coordinator, "_recall")
def deaths_that_nobody_answered_are_forgotten(original, self):
    pass


@instead(Coordinator, "_lost")
def survivors_that_cannot_go_on_are_not_heard(original, self, slot):
    pass


@instead(Roster, "refill")
def a_replacement_counts_as_one_of_them(original, self):
    out = original(self)
    for instruction in out:
        if isinstance(instruction, Fork):
            self.places[instruction.slot].part = Part.MEMBER
    return out


@instead(Roster, "refill")
def a_replacement_gets_the_generation_of_the_dead(original, self):
    return [replace(i, generation=i.generation - 1) if isinstance(i, Fork) else i for i in original(self)]


@instead(Coordinator, "_heard")
def a_joiner_is_killed_at_the_word_of_anybody(original, self, event):
    original(self, event)
    if self._roster.some_leave:
        self._out += self._roster.dismiss(Part.JOINER)


@instead(Coordinator, "_exited")
def the_death_of_the_last_one_is_not_noticed(original, self, event):
    place = self._roster.current(event.slot, event.generation)
    if place is not None and self._roster.alive(Part.MEMBER) == [event.slot]:
        place.is_alive = False
    else:
        original(self, event)


@instead(Coordinator, "_is_leaving")
def replacements_are_forked_into_the_end(original, self):
    return False


@instead(Ending, "kill_all")
def nobody_is_killed(original, self):
    return []


@instead(World, "reap")
def an_exit_is_told_before_what_was_said_before_it(original, self, process):
    process.is_reaped = True
    while process.sent:
        self.hear(process)
    self.tell(Exited(process.slot, process.generation, 100, process.status))


BUGS["a replacement is tried for ever"] = lambda patcher: patcher.setattr(roster, "MOST_TRIES", 10**6)


@pytest.mark.parametrize("name", sorted(BUGS))
def test_a_planted_bug_is_found(name, monkeypatch):
    BUGS[name](monkeypatch)
    with pytest.raises(Violation) as found:
        play(range(NUM_SEEDS))
    print(name, found.value.args)
