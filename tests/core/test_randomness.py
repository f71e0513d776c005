"""Random numbers are a function of where the computation stands, and of nothing else."""

from __future__ import annotations

import itertools
import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from samestep.core import randomness

SEEDERS = {
    randomness.seed_start: 1,
    randomness.seed_step: 2,
    randomness.seed_shard: 4,
    randomness.seed_sample: 3,
    randomness.seed_evaluation: 3,
    randomness.seed_transform: 4,
}


def drawn() -> tuple:
    return (
        float(torch.rand((), dtype=torch.float64)),
        float(np.random.rand()),
        random.random(),
        int(torch.randperm(99)[0]),
    )


def test_every_place_draws_its_own():
    seen = set()
    for seeder, count in SEEDERS.items():
        for place in itertools.product((0, 1, 2), repeat=count):
            seeder(*place)
            first = drawn()
            seeder(*place)
            assert drawn() == first, "the same place drew other numbers"
            seen.add(first[:3])
    places = sum(3**count for count in SEEDERS.values())
    for column in zip(*seen, strict=True):
        assert len(set(column)) == places, "two places drew the same"


@given(st.lists(st.integers(-(2**70), 2**70), max_size=5), st.lists(st.integers(-(2**70), 2**70), max_size=5))
def test_keys(left, right):
    mask = (1 << 64) - 1
    assert 0 <= randomness.key(*left) <= mask
    same = [x & mask for x in left] == [x & mask for x in right]
    assert (randomness.key(*left) == randomness.key(*right)) is same


def test_keys_do_not_change_between_releases():
    """A recipe's result would change with them."""
    assert randomness.key(3, 0, 17, 0, 5) == 0xCB08CF945C20F738
    assert randomness.key() != randomness.key(0) != randomness.key(0, 0)


def test_half_of_the_bits_change():
    changed = [bin(randomness.key(3, 0, i, 0, 0) ^ randomness.key(3, 0, i + 1, 0, 0)).count("1") for i in range(300)]
    assert 30 < sum(changed) / len(changed) < 34
