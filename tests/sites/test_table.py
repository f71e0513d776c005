"""Random sites at the table: each contribution counts once, none is lost, nobody waits for who is gone."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from samestep.sites import table
from samestep.sites.table import Answer, Gift, Table

NUM_SEEDS = 1500
PATIENCE = 5.0


class World:
    """Some sites that come, give, ask again, sleep, start anew and vanish; and a place that may lose what is open."""

    def __init__(self, seed: int):
        self.draw = random.Random(seed)
        self.names = ["a", "b", "c", "d"][: self.draw.randint(1, 4)]
        self.quorum = self.draw.randint(1, len(self.names))
        self.bound = self.draw.choice([0, 1, 3, 99])
        self.table = Table(self.quorum, PATIENCE, self.bound)
        self.now = 0.0
        self.given: dict[str, Gift] = {}
        self.waiting: dict[str, Gift] = {}
        self.known: dict[str, tuple[int, int]] = {}
        self.counted: Counter = Counter()
        self.made: dict[tuple[str, int], int] = {}
        self.full_at: float | None = None
        self.seen: Counter = Counter()
        self.lives: Counter = Counter()
        self.past: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        self.went_back: Counter = Counter()

    def join(self, site: str) -> int:
        self.lives[site] += 1
        return self.table.join(site, self.life(site))

    def life(self, site: str) -> str:
        return f"life {self.lives[site]}"

    def play(self, num_events: int = 120) -> None:
        for _ in range(num_events):
            self.now += self.draw.expovariate(2.0)
            site = self.draw.choice(self.names)
            if site not in self.known:
                self.known[site] = (self.join(site), self.table.num_rounds)
            elif site in self.waiting:
                self.draw.choice([self.ask, self.ask, self.give_again, self.start_anew])(site)
            else:
                acts = [self.give, self.give, self.start_anew, self.go_back, self.lose_place, self.leave]
                self.draw.choice(acts)(site)
            self.look()

    def give(self, site: str) -> None:
        sequence, base = self.known[site]
        gift = Gift(site, sequence + self.draw.randint(1, 3), sequence, base, 1.0 + self.draw.random(), self.life(site))
        answer = self.table.give(gift)
        self.seen[answer] += 1
        if answer is Answer.LATER:
            # Its last life gave something that is still open; it gives this one when that is over.
            return
        if answer is Answer.KNOWN:
            # It went back to an earlier state, and has given it before.
            assert self.went_back[site]
            self.known[site] = (gift.sequence, self.table.num_rounds)
            return
        assert answer is not Answer.OVERLAPS or self.went_back[site]
        assert answer in (Answer.TAKEN, Answer.TOO_OLD, Answer.OVERLAPS), answer
        assert (answer is Answer.TOO_OLD) == (base < self.table.num_rounds - self.bound)
        self.waiting[site] = gift
        if answer is not Answer.TAKEN:
            self.made[site, gift.sequence] = -1

    def give_again(self, site: str) -> None:
        gift = self.waiting[site]
        try:
            self.table.made(site, gift.sequence)
        except KeyError:
            answer = self.table.give(gift)
            assert answer in (Answer.TAKEN, Answer.TOO_OLD, Answer.OVERLAPS)
            if answer is not Answer.TAKEN:
                self.made[site, gift.sequence] = -1
            return
        assert self.table.give(gift) is Answer.KNOWN
        assert self.table.give(replace(gift, life="life 0")) is Answer.OTHER

    def ask(self, site: str) -> None:
        gift = self.waiting[site]
        try:
            made = self.table.made(site, gift.sequence)
        except KeyError:
            self.give_again(site)
            return
        if made is not None:
            assert made == self.made[site, gift.sequence]
            del self.waiting[site]
            self.known[site] = (gift.sequence, self.table.num_rounds)
            self.past[site].append(self.known[site])

    def go_back(self, site: str) -> None:
        """Start again from an earlier state, and with other steps from one contribution to the next."""
        if self.past[site]:
            self.join(site)
            self.known[site] = self.draw.choice(self.past[site])
            self.went_back[site] = True

    def start_anew(self, site: str) -> None:
        self.waiting.pop(site, None)
        self.known[site] = (self.join(site), self.table.num_rounds)
        self.seen["anew"] += 1

    def leave(self, site: str) -> None:
        """It has the answer to all that it gave, and comes again some time."""
        if self.draw.random() < 0.3 and site not in self.table.open:
            self.table.leave(site, "life 0")
            assert site not in self.table.ended
            self.table.leave(site, self.life(site))
            del self.known[site]
            self.seen["left"] += 1

    def lose_place(self, site: str) -> None:
        """The place is started again from its disk."""
        if self.draw.random() < 0.3:
            values = self.table.to_values()
            self.table = Table(self.quorum, PATIENCE, self.bound)
            self.table.load(values)
            for known in self.known:
                self.table.lives[known] = self.life(known)
            self.seen["lost"] += 1
            self.full_at = None

    def look(self) -> None:
        before = dict(self.table.open)
        due = self.table.due(self.now)
        needed = max(1, self.quorum - len(self.table.ended))
        if len(before) < needed:
            assert due is None
            self.full_at = None
            return
        self.full_at = self.now if self.full_at is None else self.full_at
        assert due == 0 or due <= PATIENCE - (self.now - self.full_at) + 1e-9
        if due:
            self.seen["waits"] += 1
            assert self.table.present - set(before), "nobody is waited for"
            return
        gifts = self.table.close()
        self.full_at = None
        assert [g.site for g in gifts] == sorted(before) and len(gifts) >= needed
        for gift in gifts:
            self.counted.update((gift.site, update) for update in range(gift.first + 1, gift.sequence + 1))
            self.made[gift.site, gift.sequence] = self.table.num_rounds
            self.seen["late"] += gift.base < self.table.num_rounds - 1
        self.seen["rounds"] += 1
        assert max(self.counted.values()) == 1, "counted twice"


def test_each_contribution_counts_once():
    seen: Counter = Counter()
    for seed in range(NUM_SEEDS):
        world = World(seed)
        try:
            world.play()
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        seen += world.seen
    # What is not reached is not tested.
    answers = (Answer.TAKEN, Answer.LATER, Answer.TOO_OLD, Answer.OVERLAPS)
    for what in (*answers, "anew", "left", "lost", "waits", "late", "rounds"):
        assert seen[what] > 200, (what, seen)


def twice(self, gift):
    """Forget what was given before."""
    self.last.pop(gift.site, None)
    self.open.pop(gift.site, None)
    return GIVE(self, gift)


def forget(self):
    gifts = CLOSE(self)
    return gifts[1:] if len(gifts) > 1 else gifts


def never(self, now):
    return DUE(self, now) if self.present <= set(self.open) else (None if DUE(self, now) is None else PATIENCE)


GIVE, CLOSE, DUE = Table.give, Table.close, Table.due


@pytest.mark.parametrize(("name", "bug"), [("give", twice), ("close", forget), ("due", never)])
def test_the_world_finds_planted_bugs(monkeypatch, name, bug):
    monkeypatch.setattr(table.Table, name, bug)
    with pytest.raises(AssertionError):
        for seed in range(300):
            World(seed).play()
