"""The order of an epoch is a permutation, a pure function of (n, key), and looks like a random one."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samestep.data.permutation import BLOCK, Identity, Permutation

keys = st.integers(min_value=-(2**63), max_value=2**64)


def everything(num_samples, key):
    return Permutation(num_samples, key).ids(0, num_samples)


def test_is_a_bijection_for_every_small_size():
    for num_samples in range(1, 301):
        for key in (1, 0xFEDCBA9876543210):
            assert np.array_equal(np.sort(everything(num_samples, key)), np.arange(num_samples)), (num_samples, key)


@settings(max_examples=25, deadline=None)
@given(st.integers(min_value=1, max_value=70_000), keys)
def test_is_a_bijection_for_any_size_and_key(num_samples, key):
    assert np.array_equal(np.sort(everything(num_samples, key)), np.arange(num_samples))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_piece_is_a_piece_of_the_whole(data):
    num_samples = data.draw(st.sampled_from([1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17]))
    whole = everything(num_samples, 7)
    order = Permutation(num_samples, 7)
    for _ in range(3):
        start = data.draw(st.integers(0, num_samples))
        stop = data.draw(st.integers(start, num_samples))
        assert np.array_equal(order.ids(start, stop), whole[start:stop])


def test_is_frozen():
    """Another order is another result of every run that was recorded: these numbers may not change."""
    assert everything(10, 0).tolist() == [2, 3, 9, 5, 4, 1, 8, 7, 0, 6]
    assert Permutation(10**12, 2**63 + 1).ids(10**12 - 3, 10**12).tolist() == [563623547618, 715522338551, 565489346159]


def test_keys_give_other_orders():
    orders = {tuple(everything(64, key).tolist()) for key in range(200)}
    assert len(orders) == 200
    assert np.array_equal(everything(64, 5), everything(64, 5 + 2**64))


def test_the_caller_may_write_to_ids():
    order = Permutation(100, 3)
    before = order.ids(0, 100)
    order.ids(0, 100)[:] = 0
    assert np.array_equal(order.ids(0, 100), before)


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("num_samples", [2, 7, 16])
def test_every_sample_comes_to_every_position_equally_often(num_samples):
    num_keys = 1000
    counts = np.zeros((num_samples, num_samples))
    for key in range(num_keys):
        counts[np.arange(num_samples), everything(num_samples, key)] += 1
    freedom = (num_samples - 1) ** 2
    limit = freedom + 6 * np.sqrt(2 * freedom) + 6
    assert chi_square(counts, num_keys / num_samples) < limit


@pytest.mark.parametrize(("num_samples", "num_orders"), [(3, 6), (4, 24)])
def test_all_orders_are_equally_likely(num_samples, num_orders):
    num_keys = 40 * num_orders
    found: dict[tuple, int] = {}
    for key in range(num_keys):
        order = tuple(everything(num_samples, key).tolist())
        found[order] = found.get(order, 0) + 1
    assert len(found) == num_orders
    freedom = num_orders - 1
    assert chi_square(np.array(list(found.values())), 40) < freedom + 6 * np.sqrt(2 * freedom)


def test_neighbours_do_not_stay_neighbours():
    ids = everything(100_000, 11)
    assert abs(np.corrcoef(np.arange(ids.size), ids)[0, 1]) < 0.02
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.02
    assert np.count_nonzero(np.abs(np.diff(ids)) == 1) < 12  # two are expected of a random order
    assert np.count_nonzero(ids == np.arange(ids.size)) < 9  # one is expected


def test_a_huge_set_needs_one_block_of_memory():
    tracemalloc.start()
    try:
        order = Permutation(10**12, 1)
        ids = order.ids(999_999_000_000, 999_999_001_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * 8 * BLOCK
    assert np.unique(ids).size == 1000
    assert ids.dtype == np.int64
    assert 0 <= ids.min() < ids.max() < 10**12
    assert ids.max() > 9 * 10**11 > 10**11 > ids.min()


def test_identity():
    assert Identity(10**12).ids(5, 8).tolist() == [5, 6, 7]
    assert Identity(3).ids(1, 1).dtype == np.int64


@pytest.mark.parametrize("order", [Identity(10), Permutation(10, 0), Permutation(0, 0)])
def test_positions_outside_are_refused(order):
    assert order.ids(order.num_samples, order.num_samples).size == 0
    for start, stop in [(-1, 2), (0, 11), (3, 2)]:
        with pytest.raises(IndexError, match=f"{start}:{stop}"):
            order.ids(start, stop)


@pytest.mark.parametrize("num_samples", [-1, 2**63])
def test_impossible_sizes_are_refused(num_samples):
    with pytest.raises(ValueError, match=str(num_samples)):
        Permutation(num_samples, 0)
