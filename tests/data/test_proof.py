"""The multiset hash finds every sample that is left out, doubled or in the wrong epoch, and nothing else."""

from functools import cache

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from samestep.data.permutation import Identity, Order, Permutation
from samestep.data.proof import Coverage, Proof, SampleCount, expected, hash_of
from samestep.data.split import Slice, schedule, shard_bounds
from samestep.errors import UsageError
from samestep.storage.wire import pack, unpack

samples = st.lists(st.integers(0, 10**12), max_size=30)


def array(ids):
    return np.array(ids, dtype=np.int64)


def order_of(num_samples):
    return cache(lambda epoch: Permutation(num_samples, epoch + 77))


def read(batches, num_samples, num_replicas=3, orders=None):
    """What workers would count, shard by shard."""
    orders = orders or order_of(num_samples)
    total = SampleCount()
    for batch in batches:
        for start, stop in shard_bounds(batch.start, batch.stop, num_replicas):
            total += SampleCount.of(batch.epoch, orders(batch.epoch).ids(start, stop))
    return total


def proof_of(batches, seen, num_samples, orders=None):
    coverage = Coverage(num_samples)
    for batch in batches:
        coverage.add(batch)
    return Proof.of(coverage, seen, orders or order_of(num_samples))


@given(samples, samples, st.integers(0, 1000))
def test_hashes_add_and_order_does_not_matter(left, right, epoch):
    together = hash_of(epoch, array([*left, *right]))
    assert together == (hash_of(epoch, array(left)) + hash_of(epoch, array(right))) % 2**64
    assert together == hash_of(epoch, array([*right, *left]))


@given(samples, samples, st.integers(0, 5), st.integers(0, 5))
def test_other_samples_or_epochs_have_another_hash(left, right, epoch, other):
    assume((sorted(left), epoch) != (sorted(right), other) and (left or right))
    assert hash_of(epoch, array(left)) != hash_of(other, array(right))


def test_single_hashes_fill_all_64_bits_and_differ():
    hashes = [hash_of(epoch, array([sample])) for epoch in range(20) for sample in range(200)]
    assert len(set(hashes)) == len(hashes)
    ones = np.array([[h >> bit & 1 for bit in range(64)] for h in hashes]).mean(axis=0)
    assert np.all(np.abs(ones - 0.5) < 0.05)


def test_is_frozen():
    """Recorded digests of samples are compared with later runs."""
    assert hash_of(3, np.arange(1000)) == 14395329731925615088


def test_expected_is_every_sample_once_per_epoch():
    epochs = range(2, 5)
    by_hand = sum(hash_of(epoch, np.random.default_rng(0).permutation(40_000)) for epoch in epochs) % 2**64
    assert expected(40_000, epochs) == by_hand
    assert expected(40_000, range(0)) == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 50), st.integers(1, 5))
def test_holds_for_any_size_and_any_stop(num_samples, batch_size, steps, num_replicas):
    batches = list(schedule(num_samples, batch_size, steps=steps))
    proof = proof_of(batches, read(batches, num_samples, num_replicas), num_samples)
    assert proof.holds
    assert proof.read.num_samples == sum(batch.size for batch in batches)
    assert "NOT" not in proof.in_words()


def faults():
    batches = list(schedule(20, 6, epochs=3))
    ids = order_of(20)(1).ids(6, 12)
    return {
        "a sample left out": (-1, 1, ids[:1]),
        "a sample doubled": (1, 1, ids[:1]),
        "a batch left out": (-1, 1, ids),
        "one sample for another": (None, 1, ids[:2]),
        "a sample of another epoch": (None, (1, 2), ids[:1]),
    }, batches


@pytest.mark.parametrize("fault", faults()[0])
def test_finds(fault):
    sign, epoch, ids = faults()[0][fault]
    batches = faults()[1]
    seen = read(batches, 20)
    if sign is not None:
        change = [(sign, epoch, ids)]
    elif isinstance(epoch, tuple):
        change = [(-1, epoch[0], ids), (1, epoch[1], ids)]
    else:
        change = [(-1, epoch, ids[:1]), (1, epoch, ids[1:])]
    for times, where, which in change:
        count = SampleCount.of(where, which)
        seen = SampleCount(seen.num_samples + times * count.num_samples, (seen.hash + times * count.hash) % 2**64)
    proof = proof_of(batches, seen, 20)
    assert not proof.holds
    assert proof.in_words().startswith("NOT each sample exactly once: 60 were due")
    assert ("as many, but not the same ones" in proof.in_words()) == (seen.num_samples == 60)


def test_an_order_that_is_no_permutation_is_found_by_whole_epochs():
    class Broken(Order):
        def _ids(self, start, stop):
            return np.zeros(stop - start, dtype=np.int64)

    batches = list(schedule(10, 4, epochs=1))
    seen = read(batches, 10, orders=lambda epoch: Broken(10))
    assert not proof_of(batches, seen, 10, orders=lambda epoch: Broken(10)).holds


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "length", "drop_last", "words"),
    [
        (1437, 256, {"epochs": 12}, False, "1,437 of 1,437 samples exactly once per epoch, 12 epochs"),
        (1437, 256, {"epochs": 1}, False, "1,437 of 1,437 samples exactly once per epoch, 1 epoch"),
        (1437, 256, {"epochs": 3}, True, "1,280 of 1,437 samples exactly once per epoch, 3 epochs"),
        (
            1437,
            256,
            {"steps": 14},
            False,
            "1,437 of 1,437 samples exactly once per epoch, 2 epochs; "
            "512 of 1,437 samples exactly once per epoch, 1 epoch",
        ),
        (1437, 256, {"steps": 0}, False, "no samples, 0 epochs"),
    ],
)
def test_says_what_was_proved(num_samples, batch_size, length, drop_last, words):
    batches = list(schedule(num_samples, batch_size, drop_last=drop_last, **length))
    proof = proof_of(batches, read(batches, num_samples), num_samples)
    assert proof.holds
    assert proof.in_words() == words


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 40), st.integers(0, 40), st.booleans())
def test_coverage_goes_on_after_a_checkpoint(num_samples, batch_size, stop, more, drop_last):
    batch_size = min(batch_size, num_samples)
    batches = list(schedule(num_samples, batch_size, steps=stop + more, drop_last=drop_last))
    whole, resumed = Coverage(num_samples), Coverage(num_samples)
    for batch in batches:
        whole.add(batch)
    for batch in batches[:stop]:
        resumed.add(batch)
    resumed = Coverage.from_state(unpack(pack(resumed.state_dict())))
    for batch in batches[stop:]:
        resumed.add(batch)
    assert resumed.state_dict() == whole.state_dict()
    assert resumed.expected(order_of(num_samples)) == read(batches, num_samples)
    assert len(whole.state_dict()["runs"]) <= 2


def test_epochs_may_be_left_and_sets_trained_on_again():
    first = list(schedule(10, 4, steps=2))
    second = list(schedule(10, 4, first_step=2, first_epoch=1, epochs=2))
    proof = proof_of([*first, *second], read([*first, *second], 10), 10)
    assert proof.holds
    assert proof.coverage.next_epoch == 3
    assert proof.in_words() == (
        "10 of 10 samples exactly once per epoch, 2 epochs; 8 of 10 samples exactly once per epoch, 1 epoch"
    )


@pytest.mark.parametrize(
    "batch",
    [Slice(1, 0, 0, 4, False), Slice(1, 0, 5, 8, False), Slice(1, 0, 3, 8, False), Slice(1, 1, 4, 8, False)],
)
def test_steps_that_do_not_follow_are_refused(batch):
    coverage = Coverage(10)
    coverage.add(Slice(0, 0, 0, 4, False))
    before = coverage.state_dict()
    with pytest.raises(UsageError, match=f"Step 1 reads positions {batch.start}:{batch.stop}"):
        coverage.add(batch)
    assert coverage.state_dict() == before


def test_counts_cross_the_wire():
    count = SampleCount.of(2, np.arange(5)) + SampleCount.of(3, np.arange(0))
    assert SampleCount.from_state(unpack(pack(count.state_dict()))) == count
    assert count.num_samples == 5
    assert int(count.digest, 16) == count.hash
    assert len(count.digest) == 16


def test_identity_orders_are_covered_too():
    batches = list(schedule(7, 3, steps=2))
    seen = read(batches, 7, orders=lambda epoch: Identity(7))
    assert proof_of(batches, seen, 7, orders=lambda epoch: Identity(7)).holds
    assert not proof_of(batches, seen, 7).holds
