"""Every position of every epoch is in exactly one shard of one step."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samestep.data.split import Slice, schedule, shard_bounds
from samestep.errors import SettingsError

sizes = st.integers(min_value=1, max_value=200)


@given(st.integers(0, 1000), st.integers(0, 300), st.integers(1, 40))
def test_shards_tile_the_batch_evenly(start, size, num_replicas):
    bounds = shard_bounds(start, start + size, num_replicas)
    assert len(bounds) == num_replicas
    assert [position for a, b in bounds for position in range(a, b)] == list(range(start, start + size))
    lengths = [b - a for a, b in bounds]
    assert max(lengths) - min(lengths) <= 1


@given(sizes, sizes, st.integers(1, 9), st.integers(1, 4), st.integers(0, 50), st.integers(0, 50))
def test_each_position_once_per_epoch(num_samples, batch_size, num_replicas, epochs, first_step, first_epoch):
    seen: dict[int, list[int]] = {}
    batches = list(schedule(num_samples, batch_size, first_step=first_step, first_epoch=first_epoch, epochs=epochs))
    for batch in batches:
        for start, stop in shard_bounds(batch.start, batch.stop, num_replicas):
            seen.setdefault(batch.epoch, []).extend(range(start, stop))
    assert seen == {first_epoch + e: list(range(num_samples)) for e in range(epochs)}
    assert [batch.number for batch in batches] == list(range(first_step, first_step + len(batches)))
    assert all(batch.size == batch_size for batch in batches if not batch.ends_epoch)


@given(sizes, st.lists(sizes, min_size=1, max_size=9), st.integers(1, 60), st.booleans())
def test_a_size_by_step_fills_epochs_in_order(num_samples, cycle, steps, drop_last):
    cycle = [min(size, num_samples) for size in cycle]
    asked = []

    def batch_size(number):
        asked.append(number)
        return cycle[number % len(cycle)]

    batches = list(schedule(num_samples, batch_size, steps=steps, drop_last=drop_last))
    assert len(batches) == steps
    assert len(asked) == len(set(asked))
    position, epoch = 0, 0
    for batch in batches:
        full = cycle[batch.number % len(cycle)]
        assert (batch.epoch, batch.start) == (epoch, position)
        assert batch.size == (full if drop_last else min(full, num_samples - position))
        position = batch.stop
        if batch.ends_epoch:
            rest = num_samples - position
            assert rest == 0 or (drop_last and rest < cycle[(batch.number + 1) % len(cycle)])
            position, epoch = 0, epoch + 1


@given(sizes, sizes, st.integers(1, 3), st.booleans())
def test_the_last_batch_of_an_epoch_says_so(num_samples, batch_size, epochs, drop_last):
    if drop_last:
        batch_size = min(batch_size, num_samples)
    batches = list(schedule(num_samples, batch_size, epochs=epochs, drop_last=drop_last))
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        assert batch.ends_epoch == (following is None or following.epoch > batch.epoch)


def test_drop_last_drops_only_the_short_batch():
    assert list(schedule(10, 4, epochs=2, drop_last=True)) == [
        Slice(0, 0, 0, 4, False),
        Slice(1, 0, 4, 8, True),
        Slice(2, 1, 0, 4, False),
        Slice(3, 1, 4, 8, True),
    ]
    assert [b.ends_epoch for b in schedule(8, 4, epochs=1, drop_last=True)] == [False, True]


def test_a_batch_larger_than_the_set_is_the_whole_set():
    assert list(schedule(3, 100, epochs=1)) == [Slice(0, 0, 0, 3, True)]


def test_steps_cross_epochs_and_may_stop_inside_one():
    assert [(b.epoch, b.start, b.stop, b.ends_epoch) for b in schedule(5, 2, steps=4)] == [
        (0, 0, 2, False),
        (0, 2, 4, False),
        (0, 4, 5, True),
        (1, 0, 2, False),
    ]


def test_is_lazy():
    batches = schedule(10**15, 1000, epochs=10**12)
    assert [b.start for b in islice(batches, 3)] == [0, 1000, 2000]


def test_a_stopped_function_is_not_asked_beyond_the_end():
    table = [2, 2, 2]
    assert len(list(schedule(4, table.__getitem__, steps=3))) == 3


@pytest.mark.parametrize("length", [{"epochs": 0}, {"steps": 0}])
def test_no_steps_at_all(length):
    assert list(schedule(4, 2, **length)) == []


def test_numpy_integers_are_integers():
    batches = list(schedule(4, np.int64(3), epochs=1))
    assert batches == [Slice(0, 0, 0, 3, False), Slice(1, 0, 3, 4, True)]
    assert type(batches[0].stop) is int
    assert type(next(schedule(4, lambda number: np.int32(3), epochs=1)).stop) is int


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0, "epochs": 1}, ["batch_size is 0", "1 or more"]),
        ({"batch_size": -3, "epochs": 1}, ["batch_size is -3"]),
        ({"batch_size": 2.0, "epochs": 1}, ["batch_size is 2.0", "whole number"]),
        ({"batch_size": True, "epochs": 1}, ["batch_size is True"]),
        ({"batch_size": None, "epochs": 1}, ["batch_size is None"]),
        ({"batch_size": 2}, ["neither epochs nor steps", "exactly one"]),
        ({"batch_size": 2, "epochs": 1, "steps": 5}, ["both epochs=1 and steps=5"]),
        ({"batch_size": 2, "epochs": -1}, ["epochs=-1"]),
        ({"batch_size": 2, "steps": 1.5}, ["steps=1.5"]),
        ({"batch_size": 2, "epochs": 1, "num_samples": 0}, ["empty", "0 samples"]),
        ({"batch_size": 11, "epochs": 1, "drop_last": True}, ["batch_size=11", "10 samples", "drop_last=False"]),
    ],
)
def test_settings_that_clash_are_refused_before_the_first_step(settings, words):
    with pytest.raises(SettingsError) as caught:
        schedule(**{"num_samples": 10} | settings)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "words"),
    [
        (lambda number: 5 - number, False, ["batch_size is 0 for step 5"]),
        (lambda number: "4", False, ["batch_size is '4' for step 0"]),
        (lambda number: 5 * (number + 1), True, ["batch_size=15 for step 2", "10 samples"]),
    ],
)
def test_sizes_by_step_are_checked_when_their_step_comes(batch_size, drop_last, words):
    with pytest.raises(SettingsError) as caught:
        list(schedule(10, batch_size, steps=20, drop_last=drop_last))
    assert all(word in str(caught.value) for word in words), caught.value
