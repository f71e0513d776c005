"""When replicas move: from steady differences that are worth it, on all workers alike, and not for ever."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samestep.core.division import Division
from samestep.loop.balance import Balance, Move


class Simulated:
    """Workers with speeds of their own; each keeps a balance, and they must never differ.

    Attributes:
        costs: seconds per shard; may be changed while it runs.
        other: seconds of a step that are no shard's.
        moves: what was moved, as (step, counts).
    """

    def __init__(self, costs: list[float], num_replicas: int, other: float = 0.0):
        self.costs, self.other = costs, other
        self.division = Division.even(len(costs), num_replicas)
        self.balances = [Balance() for _ in costs]
        self.moves: list[tuple[int, tuple[int, ...]]] = []
        self.num_steps = 0
        self.seconds = 0.0
        self.num_meetings = 0

    def play(self, num_steps: int, hiccup: float = 1.0) -> None:
        """Make steps; in the first one worker 0 takes `hiccup` times as long."""
        for number in range(num_steps):
            self.num_steps += 1
            costs = [self.costs[0] * (hiccup if number == 0 else 1.0), *self.costs[1:]]
            step_seconds = self.division.seconds(costs) + self.other
            self.seconds += step_seconds
            for balance, count, cost in zip(self.balances, self.division.counts, costs, strict=True):
                balance.took(count, count * cost, step_seconds)
            due = {balance.is_due for balance in self.balances}
            assert len(due) == 1, "workers differ in whether they meet"
            if due.pop():
                self._meet()

    def _meet(self) -> None:
        self.num_meetings += 1
        told = [balance.mine() for balance in self.balances]
        found = [b.weigh(self.num_steps, range(len(told)), self.division, told) for b in self.balances]
        assert len({repr(move) for move in found}) == 1, "workers differ in what shall move"
        if found[0] is None:
            return
        self.division = found[0].after
        self.moves.append((self.num_steps, self.division.counts))
        for balance, move in zip(self.balances, found, strict=True):
            balance.made(move)


def test_replicas_leave_the_slow_worker():
    fleet = Simulated([0.1, 0.3], 8)
    fleet.play(400)
    assert fleet.moves == [(32, (6, 2))]
    move = fleet.balances[0].moves[0]
    assert move.time_since == pytest.approx(0.5)
    assert move.in_words() == (
        "Replicas moved after step 32: 2 of 4 from worker 1, 3.0 times as slow as the fastest; "
        "a step takes 0.50 of the time since."
    )


def test_each_of_several_slow_workers_is_named():
    fleet = Simulated([0.1, 0.4, 0.1, 0.2], 16)
    fleet.play(100)
    assert len(fleet.moves) == 1
    words = fleet.balances[2].moves[0].in_words()
    assert "from worker 1, 4.0 times" in words and "from worker 3, 2.0 times" in words
    assert "from worker 0" not in words and "from worker 2" not in words


@pytest.mark.parametrize(
    ("costs", "replicas", "other"),
    [
        ([0.1, 0.1, 0.1], 8, 0.0),  # nothing to gain, although they differ in how many they play
        ([0.1, 0.109], 40, 0.0),  # too little to gain
        ([0.001, 0.003], 8, 1.0),  # shards are not what the time goes to
        ([0.1, 0.3], 2, 0.0),  # one each already
    ],
)
def test_nothing_moves_for_little(costs, replicas, other):
    fleet = Simulated(costs, replicas, other)
    fleet.play(500)
    assert not fleet.moves


def test_a_hiccup_moves_nothing():
    fleet = Simulated([0.1, 0.1], 8)
    for _ in range(20):
        fleet.play(16, hiccup=100.0)
    assert not fleet.moves


def test_one_slow_window_moves_nothing():
    fleet = Simulated([0.1, 0.1], 8)
    for _ in range(6):
        fleet.play(16)
        fleet.costs = [0.1, 0.5]
        fleet.play(16)
        fleet.costs = [0.1, 0.1]
    assert not fleet.moves


def test_replicas_come_back_when_the_worker_recovers():
    fleet = Simulated([0.1, 0.4], 8)
    fleet.play(100)
    fleet.costs = [0.1, 0.1]
    fleet.play(300)
    assert [counts for _, counts in fleet.moves] == [(7, 1), (4, 4)]
    assert "from worker 0" in fleet.balances[0].moves[1].in_words()
    assert "slow" not in fleet.balances[0].moves[1].in_words()


def test_each_move_waits_longer_than_the_one_before():
    fleet = Simulated([0.1, 0.4], 8)
    for _ in range(400):
        fleet.play(33)
        fleet.costs.reverse()
    steps = [step for step, _ in fleet.moves]
    assert len(steps) <= 400 * 33 // (16 * 64) + 7
    fleet = Simulated([0.1, 0.4], 8)
    gaps = []
    for _ in range(5):
        before = fleet.num_steps
        known = len(fleet.moves)
        while len(fleet.moves) == known:
            fleet.play(1)
        gaps.append(fleet.num_steps - before)
        fleet.costs.reverse()
    assert gaps == [32, 64, 128, 256, 512]


def test_short_steps_have_longer_windows():
    fleet = Simulated([0.0001, 0.0003], 2)
    fleet.play(5000)
    assert fleet.num_meetings <= 2 + fleet.seconds / 0.4
    fleet = Simulated([0.1, 0.3], 2)
    fleet.play(160)
    assert fleet.num_meetings == 10


def test_what_was_known_is_forgotten():
    balance = Balance()
    for _ in range(15):
        balance.took(2, 0.2, 0.2)
    balance.forget()
    balance.took(2, 0.6, 0.6)
    assert not balance.is_due
    assert balance.mine() == [pytest.approx(0.3), 0.6]


def test_a_move_is_not_judged_by_steps_after_a_death():
    fleet = Simulated([0.1, 0.3], 8)
    fleet.play(40)
    for balance in fleet.balances:
        balance.forget()
    fleet.division = Division.even(2, 8)
    fleet.play(20)
    fleet.balances[0].end()
    assert fleet.balances[0].moves[0].time_since is None
    assert fleet.balances[0].moves[0].in_words().endswith("as slow as the fastest.")


def test_a_move_near_the_end_is_judged_by_what_there_is():
    fleet = Simulated([0.1, 0.3], 8)
    fleet.play(35)
    fleet.balances[0].end()
    assert fleet.balances[0].moves[0].time_since == pytest.approx(0.5)


def test_nothing_is_due_unless_wanted():
    balance = Balance(wanted=False)
    for _ in range(100):
        balance.took(1, 0.1, 0.1)
    assert not balance.is_due


@pytest.mark.parametrize("told", [[[None, 0.1], [0.2, 0.1]], [[0.1, None], [0.2, None]], [[0.0, 0.1], [0.2, 0.1]]])
def test_who_does_not_know_its_speed_leaves_all_as_it_is(told):
    balance, division = Balance(), Division.even(2, 8)
    for step in range(10):
        assert balance.weigh(step, [0, 1], division, told) is None


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.floats(0.05, 10.0), min_size=2, max_size=5),
    more=st.integers(0, 12),
    other=st.floats(0.0, 1.0),
)
def test_a_move_shortens_steps_by_a_tenth_at_least_and_the_next_has_nothing_left(costs, more, other):
    fleet = Simulated(costs, len(costs) + more, other)
    fleet.play(1)
    before = fleet.seconds
    fleet.play(200)
    assert len(fleet.moves) <= 1
    for move in fleet.balances[0].moves:
        assert isinstance(move, Move)
        move.seconds_since.clear()
        seconds = fleet.seconds
        fleet.play(1)
        assert fleet.seconds - seconds <= 0.9 * before + 1e-9
