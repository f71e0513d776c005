"""The law of position: where a run is in its data and its ledger, under whatever comes, as a state machine.

A script grows operation by operation: loops over data sets of any size, left early or not, calls between, bad samples.
At any time the fleet is replaced: by one of another size (a leave, a join), or one that resumes from any checkpoint
made so far. It executes the script from its first line. What it is told, what it reads, which checkpoints it writes
must be what the first fleet had; and each sample is in exactly one committed step per epoch.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from in_turn import Fleet, Numbers, stand_ins
from playing import replaced

import samestep.agree.allowance as allowance
import samestep.core.division as division_module
import samestep.data.proof as proof_module
import samestep.data.shard as shard_module
import samestep.loop.feed as feed_module
import samestep.loop.replay as replay_module
import samestep.loop.run as run_module
import samestep.loop.session as session_module
import samestep.storage.ledger as ledger_module
from samestep.data.proof import Proof, SampleCount
from samestep.errors import MismatchError, SamestepError
from samestep.storage import wire
from samestep.storage.ledger import Ledger

Operation = tuple[str, Any]
"""What the script does: "open", "step", "leave", "once", "mean" or "save", and its argument."""


@dataclass(frozen=True)
class Mark:
    """A checkpoint, and how much of the script was done when it was made."""

    num_operations: int
    facts: dict[str, Any]

    @property
    def key(self) -> tuple[int, str]:
        return len(self.facts["ledger"]["site_of"]) // 4, self.facts["made_by"]


CALLS = ("once", "mean", "save")


class Position(RuleBasedStateMachine):
    """A script that grows, and fleets that execute it."""

    @initialize(
        replicas=st.integers(1, 5),
        sizes=st.lists(st.integers(1, 14), min_size=1, max_size=3),
        bad=st.lists(st.sets(st.integers(0, 13), max_size=3), min_size=3, max_size=3),
        data=st.data(),
    )
    def begin(self, replicas, sizes, bad, data):
        self.replicas = replicas
        self.data_sets = [
            Numbers(100 * number, size, frozenset(b for b in bad[number] if b < size))
            for number, size in enumerate(sizes)
        ]
        num_bad = sum(len(d.bad) for d in self.data_sets)
        self.rule = data.draw(st.sampled_from(["skip", num_bad] if num_bad else ["stop", "skip"]))
        self.script: list[Operation] = []
        self.told: list[Any] = []
        self.marks: dict[tuple[int, str], Mark] = {}
        self.seen: dict[int, list[int]] = {}
        self.is_open = self.has_parted = False
        self.resumed_at = self.num_diverged = 0
        self.is_within = False
        self.fleet = Fleet(replicas, data.draw(st.integers(1, min(3, replicas))), self.rule)

    # ------------------------------------------------------------------------------------------------- the script

    @precondition(lambda self: not self.is_open)
    @rule(
        which=st.integers(0, 2),
        sizes=st.lists(st.integers(1, 16), min_size=1, max_size=3),
        length=st.sampled_from([{"epochs": 1}, {"epochs": 2}, {"epochs": 3}, {"steps": 1}, {"steps": 9}]),
        shuffle=st.booleans(),
        drop_last=st.booleans(),
    )
    def begin_loop(self, which, sizes, length, shuffle, drop_last):
        number = which % len(self.data_sets)
        most = len(self.data_sets[number])
        chosen = {"number": number, "shuffle": shuffle, "drop_last": drop_last, **length}
        chosen["sizes"] = [min(size, most) if drop_last else size for size in sizes]
        self.is_open = True
        self.do("open", chosen)

    @precondition(lambda self: self.is_open)
    @rule(num_passes=st.sampled_from([1, 1, 1, 2]), num_steps=st.integers(1, 3))
    def step(self, num_passes, num_steps):
        for _ in range(num_steps):
            if self.is_open:
                self.is_open = self.do("step", num_passes) != "end"

    # Mostly after steps.
    @precondition(lambda self: self.is_open and (self.script[-1][0] != "open" or len(self.script) % 4 == 0))
    @rule()
    def leave_loop(self):
        self.do("leave", None)
        self.is_open = False

    # Without a bound, most of a script would be calls.
    @precondition(lambda self: sum(kind in CALLS for kind, _ in self.script) <= len(self.seen))
    @rule(kind=st.sampled_from(CALLS), value=st.integers(0, 9))
    def call(self, kind, value):
        self.do(kind, value)

    # ------------------------------------------------------------------------------------------------- the fleets

    @precondition(lambda self: self.marks and self.resumed_at + 4 <= len(self.script))
    @rule(data=st.data())
    def resume(self, data):
        """A join, a leave, a death or a resume: another fleet goes on from a checkpoint, old or new."""
        marks = list(self.marks.values())
        mark = data.draw(st.sampled_from(marks[-3:]) | st.sampled_from(marks))
        earlier = data.draw(st.sampled_from(marks))
        workers = data.draw(st.integers(1, min(3, self.replicas)))
        self.fleet = Fleet(self.replicas, workers, self.rule, resumed=in_two_parts(mark.facts, earlier.facts))
        told, self.told = self.told, []
        self.is_within = True
        for number, (kind, argument) in enumerate(self.script):
            self.perform(kind, argument)
            self.is_within = True
            assert repr(self.told[number]) == repr(told[number]), f"operation {number} is told otherwise"
        assert self.fleet.restored == [mark.num_operations] * workers, "the state was restored at another place"
        self.is_within = False
        self.resumed_at = len(self.script)

    @precondition(lambda self: self.marks and self.num_diverged < 3)
    @rule(data=st.data())
    def diverge(self, data):
        """A script that calls something else than was recorded is refused where it does, and told nothing wrong."""
        self.num_diverged += 1
        mark = data.draw(st.sampled_from(list(self.marks.values())))
        kinds = [kind for kind, _ in self.script[: mark.num_operations]]
        calls = [i for i, kind in enumerate(kinds) if kind in ("once", "mean", "open")]
        if not calls:
            return
        at = data.draw(st.sampled_from(calls))
        fleet = Fleet(self.replicas, 1, self.rule, resumed=mark.facts)
        for number, (kind, argument) in enumerate(self.script[:at]):
            told, _ = perform(fleet, self.data_sets, kind, argument)
            assert repr(told) == repr(self.told[number])
        if not fleet.replaying:
            return
        kind, argument = self.script[at]
        other = {"once": ("mean", 3), "mean": ("once", 3), "open": ("open", copy.deepcopy(argument))}[kind]
        if kind == "open":
            other[1]["shuffle"] = not argument["shuffle"]
        with pytest.raises(MismatchError):
            perform(fleet, self.data_sets, *other)

    @precondition(lambda self: not self.has_parted)
    @rule()
    def part(self):
        """Workers whose control flow parts are told so."""
        self.has_parted = True
        fleet = Fleet(self.replicas, 2, self.rule)
        first, second = fleet.players
        first.run.once(lambda: 1)
        with pytest.raises(MismatchError, match="different calls"):
            second.run.steps(self.data_sets[0], batch_size=1, epochs=1)

    # --------------------------------------------------------------------------------------------------- the laws

    def do(self, kind: str, argument: Any) -> Any:
        told = self.perform(kind, argument)
        self.script.append((kind, argument))
        return told

    def perform(self, kind: str, argument: Any) -> Any:
        """Let the fleet do an operation; hold what is seen of it against what was seen before."""
        self.is_within = True
        self.fleet.operation = len(self.told)
        told, seen = perform(self.fleet, self.data_sets, kind, argument)
        self.told.append(told)
        if seen is not None:
            assert self.seen.setdefault(told[0], seen) == seen, "a step that was made again read other samples"
        for facts in self.fleet.saved:
            mark = Mark(len(self.told) - 1, facts)
            known = self.marks.setdefault(mark.key, mark)
            assert known.facts["ledger"] == facts["ledger"], "another ledger was kept at the same point"
        self.fleet.saved.clear()
        self.is_within = False
        return told

    def expected_steps(self) -> dict[tuple[int, int], list[tuple]]:
        """Return the steps made on each (data set, epoch), in order, and whether they were
        shuffled; see that numbers and epochs count on."""
        made: dict[tuple[int, int], list[tuple]] = {}
        next_epoch, number, which, shuffled, fresh = Counter(), 0, 0, False, False
        for (kind, argument), told in zip(self.script, self.told, strict=True):
            if kind == "open":
                which, shuffled, fresh = argument["number"], argument["shuffle"], True
            elif kind == "step" and told != "end":
                assert told[0] == number, "steps do not count on"
                begins = fresh or (which, told[1]) not in made
                assert told[1] == next_epoch[which] - (not begins), "epochs do not count on"
                next_epoch[which] += begins
                number, fresh = number + 1, False
                made.setdefault((which, told[1]), []).append((*told, shuffled))
        return made

    @invariant()
    def each_sample_is_in_one_step(self):
        if not hasattr(self, "fleet") or (self.script and self.script[-1][0] not in ("leave", "mean")):
            return
        for (which, epoch), steps in self.expected_steps().items():
            numbers = self.data_sets[which]
            read = [value - numbers.first for told in steps for value in self.seen[told[0]]]
            bad = [sample for told in steps for sample in told[5]]
            where = f"data set {which}, epoch {epoch}"
            assert set(bad) <= numbers.bad, where
            assert not numbers.bad.intersection(read), where
            assert max(Counter([*read, *bad]).values()) == 1, f"{where}: a sample came twice"
            assert len(read) + len(bad) == sum(told[3] for told in steps), where
            if not steps[0][-1]:
                where += ", which is not shuffled"
                ids = [sorted([*(v - numbers.first for v in self.seen[told[0]]), *told[5]]) for told in steps]
                assert [i for some in ids for i in some] == list(range(sum(map(len, ids)))), where
            ended, covered = steps[-1][2], sum(told[3] for told in steps)
            assert not (covered == len(numbers) and not ended), where
            if covered == len(numbers):
                assert sorted([*read, *bad]) == list(range(len(numbers))), f"{where}: a sample is missing"

    def teardown(self):
        if not hasattr(self, "fleet") or self.is_within:
            return
        self.each_sample_is_in_one_step()
        self.a_smaller_budget_is_refused()
        steps = self.expected_steps()
        feeds = [player.session.feeds for player in self.fleet.players]
        facts = self.fleet.finish()
        assert facts["samples_exactly_once"], facts["samples_sentence"]
        assert facts["steps"] == sum(map(len, steps.values()))
        for number, numbers in enumerate(self.data_sets):
            for feed in [feed for some in feeds for feed in some.values() if feed.data is numbers]:
                mine = {epoch: made for (which, epoch), made in steps.items() if which == number}
                assert feed.read.num_samples == sum(len(self.seen[s[0]]) for made in mine.values() for s in made)
                self.proof_needs_each_sample(feed, [s for made in mine.values() for s in made])

    def a_smaller_budget_is_refused(self) -> None:
        """A resume that allows one bad sample less than its checkpoint has left out comes to an error."""
        if not self.marks:
            return
        mark = list(self.marks.values())[-1]
        known, which = set(), 0
        for (kind, argument), told in zip(self.script[: mark.num_operations], self.told, strict=False):
            which = argument["number"] if kind == "open" else which
            known |= {(which, sample) for sample in told[5]} if kind == "step" and told != "end" else set()
        if not known:
            return
        fleet = Fleet(self.replicas, 1, len(known) - 1 or "stop", resumed=mark.facts)
        with pytest.raises(MismatchError, match="left out bad samples"):
            for kind, argument in self.script[: mark.num_operations]:
                perform(fleet, self.data_sets, kind, argument)

    def proof_needs_each_sample(self, feed: Any, steps: list[tuple]) -> None:
        """One sample of a step taken away, counted twice, or counted in another epoch: the proof must not hold."""
        told = next((s for s in steps if self.seen[s[0]]), None)
        if told is None:
            return
        one = SampleCount.of(told[1], np.array(self.seen[told[0]][:1]) - feed.data.first)
        elsewhere = SampleCount.of(told[1] + 1, np.array(self.seen[told[0]][:1]) - feed.data.first)
        less = SampleCount(feed.read.num_samples - 1, (feed.read.hash - one.hash) % 2**64)
        for read in (less, feed.read + one, less + elsewhere):
            assert not Proof.of(feed.coverage, read, feed.order, feed.left_out).holds


def perform(fleet: Fleet, data_sets: list[Numbers], kind: str, argument: Any) -> tuple[Any, list[int] | None]:
    """Let a fleet do an operation of the script; return what it is told, and what was read for it."""
    if kind == "step":
        return fleet.step(argument)
    if kind == "open":
        chosen = copy.copy(argument)
        sizes = chosen.pop("sizes")
        size = sizes[0] if len(sizes) == 1 else lambda step: sizes[step % len(sizes)]
        return fleet.open(data_sets[chosen.pop("number")], batch_size=size, **chosen), None
    return (
        fleet.leave() if kind == "leave" else fleet.save() if kind == "save" else getattr(fleet, kind)(argument)
    ), None


def in_two_parts(facts: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Return `facts` after a journey: its ledger in two parts, the first one that of an earlier checkpoint."""
    whole, ledger = Ledger.from_facts(facts["ledger"]), Ledger.from_facts(earlier["ledger"])
    assert whole.to_facts() == facts["ledger"]
    if len(ledger) > len(whole):
        ledger = Ledger()
    ledger.extend(wire.unpack(wire.pack(whole.to_facts(first=len(ledger)))))
    return {**facts, "ledger": wire.unpack(wire.pack(ledger.to_facts()))}


def play(num_examples: int, **more: Any) -> None:
    """Play the state machine."""
    chosen = settings(
        max_examples=num_examples,
        stateful_step_count=50,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        **more,
    )
    with stand_ins():
        run_state_machine_as_test(Position, settings=chosen)


def test_position():
    play(200)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_position_for_long():
    play(5000)


# ------------------------------------------------------------------------------------------------------------ faults


def one_more(old):
    """A replayed step counts one sample more than was read."""

    def faulty(self, kind, where):
        value = old(self, kind, where)
        return [*value[:5], [value[5][0] + 1, value[5][1]], *value[6:]] if kind == "update" else value

    return faulty


def first_of(ledger: Ledger, num_entries: int) -> dict[str, Any]:
    """Return the facts of a ledger's first entries, written anew."""
    short = Ledger()
    for entry, _ in zip(ledger.entries(), range(num_entries), strict=False):
        short.append(*entry)
    return short.to_facts()


def forgets_the_last(old):
    def faulty(self, facts):
        whole = Ledger.__new__(Ledger)
        Ledger.__init__(whole)
        old(whole, facts)
        old(self, first_of(whole, max(1, len(whole) - 1)) if len(whole) else facts)

    return faulty


def overlapping(old):
    """Every worker but the last reads the next one's first shard, too."""

    def faulty(self, rank):
        mine = old(self, rank)
        return range(mine.start, min(mine.stop + 1, self.num_replicas)) if len(self.counts) > 1 else mine

    return faulty


def drawn_anew(old):
    """A resumed fleet shuffles by another seed."""

    def faulty(self, *args):
        num_feeds = len(self.feeds)
        feed = old(self, *args)
        if len(self.feeds) > num_feeds and self.replaying:
            feed._seed = (feed._seed[0] + 1, feed._seed[1])
        return feed

    return faulty


def empties_are_dropped(old):
    """A shard of which no sample is good is told as one of which none was asked for."""

    def faulty(*args):
        shard = old(*args)
        return shard if shard.size else None

    return faulty


def any_call_will_do(old):
    """The ledger gives the next result whatever is called."""
    return lambda self, kind, where: old(self, self._sites[self._site_of[self._num_replayed]][0], where)


FAULTS = {
    "a replayed count is one off": (ledger_module.Ledger, "next", one_more),
    "extend forgets the last entry": (ledger_module.Ledger, "extend", forgets_the_last),
    "the ledger gives the next result whatever is called": (ledger_module.Ledger, "next", any_call_will_do),
    "a shard is read by two workers": (division_module.Division, "of", overlapping),
    "shards begin too late": (
        feed_module,
        "shard_bounds",
        lambda old: lambda *args: [(a + (a < b - 1), b) for a, b in old(*args)],
    ),
    "orders are drawn anew after a resume": (session_module.Session, "feed", drawn_anew),
    "a shard that became empty is dropped": (shard_module, "_shard_of", empties_are_dropped),
    "an epoch that was left is begun again": (
        proof_module.Coverage,
        "next_epoch",
        lambda old: property(lambda self: max(0, old.fget(self) - bool(self._runs and self._runs[-1][2] % 2))),
    ),
    "steps are numbered anew in each loop": (
        run_module,
        "schedule",
        lambda old: lambda *args, **kwargs: old(*args, **{**kwargs, "first_step": 0}),
    ),
    "a loop keeps the order of the one before": (feed_module.Feed, "use_shuffle", lambda old: lambda *args: None),
    "bad samples are not declared": (
        feed_module.Feed,
        "commit",
        lambda old: lambda self, batch, read, bad=(): old(self, batch, read),
    ),
    "a budget begins anew": (
        allowance.Allowance,
        "count",
        lambda old: lambda self, *args: old(self, *args) if len(self._known) < 1 else None,
    ),
    "the state is restored wherever a loop stands": (
        replay_module.Replay,
        "reach",
        lambda old: lambda self, made_by: old(self, self._saved.facts["made_by"] if self._saved else made_by),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name):
    owner, attribute, make = FAULTS[name]
    with replaced(owner, attribute, make(owner.__dict__[attribute])):
        try:
            play(150, derandomize=True, phases=[Phase.generate])
        except (AssertionError, SamestepError, pytest.fail.Exception):
            return
    pytest.fail(f"not found: {name}")
