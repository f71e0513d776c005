"""Divisions of replicas among workers: they cover all, and no other one is ready earlier."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samestep.core.division import Division

COSTS = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=4)


def assert_covers(division: Division, num_replicas: int) -> None:
    assert [replica for run in division.runs for replica in run] == list(range(num_replicas))
    assert division.num_replicas == num_replicas
    assert [division.of(rank) for rank in range(len(division.counts))] == division.runs


@given(num_workers=st.integers(1, 9), num_replicas=st.integers(1, 40))
def test_even_ones_differ_by_one_at_most(num_workers, num_replicas):
    division = Division.even(num_workers, num_replicas)
    assert_covers(division, num_replicas)
    assert max(division.counts) - min(division.counts) <= 1


@given(costs=COSTS, more=st.integers(0, 6))
def test_no_other_division_is_ready_earlier(costs, more):
    num_replicas = len(costs) + more
    division = Division.by_cost(costs, num_replicas)
    assert_covers(division, num_replicas)
    assert min(division.counts) >= 1
    others = [c for c in product(range(1, more + 2), repeat=len(costs)) if sum(c) == num_replicas]
    assert division.seconds(costs) == min(Division(counts).seconds(costs) for counts in others)


@pytest.mark.parametrize(
    ("costs", "counts"), [([1, 1], (4, 4)), ([1, 3], (6, 2)), ([1, 100], (7, 1)), ([1, 1, 2, 1], (2, 2, 1, 3))]
)
def test_who_is_slow_plays_less(costs, counts):
    division = Division.by_cost(costs, 8)
    assert sorted(division.counts) == sorted(counts)
    assert division.counts[costs.index(max(costs))] == min(counts) or len(set(costs)) == 1
    assert all(a.stop == b.start for a, b in pairwise(division.runs))
