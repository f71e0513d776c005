"""Masks cancel exactly, for any clients that are left; one masked update looks like noise; too few cannot unmask."""

import contextlib
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samestep.errors import SettingsError, UnmaskingError, UsageError
from samestep.federated import masking as module
from samestep.federated.extra import extra_module
from samestep.federated.fixed_point import FixedPoint
from samestep.federated.masking import MaskedRound, Masking, Party
from samestep.federated.neighbours import degree_of, neighbours_of
from samestep.federated.stream import Stream

NUMBERS = {32: FixedPoint(limit=1.0), 64: FixedPoint(limit=1.0, bits=32, modulus_bits=64)}
LENGTH = 50


def words_of(numbers, client, length=LENGTH):
    values = torch.randn(length, generator=torch.Generator().manual_seed(client))
    return numbers.encode(values, (0, client))


def check_sum(masking, clients, survivors, cuts=(), make=None):
    """The law: the sum of masked words, unmasked, is the sum of plain words; in any division into runs."""
    numbers, edges = masking.numbers, [0, *cuts, LENGTH]
    round_ = masking.bind(clients, 7, 3) if make is None else MaskedRound(masking, clients, 7, 3, make)
    plain, total = torch.zeros(LENGTH, dtype=numbers.dtype), torch.zeros(LENGTH, dtype=numbers.dtype)
    for client in survivors:
        words = words_of(numbers, client)
        numbers.add(plain, words)
        for start, stop in pairwise(edges):
            round_.mask(client, words[start:stop], start)
        numbers.add(total, words)
    if len(survivors) > 1:
        assert not torch.equal(total, plain), "nothing was masked"
    for start, stop in pairwise(edges):
        round_.unmask(total[start:stop], survivors, start)
    assert torch.equal(total, plain)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_sum_is_exact_for_any_survivors(data):
    clients = data.draw(st.lists(st.integers(0, 999), min_size=2, max_size=12, unique=True))
    neighbours = data.draw(st.sampled_from([None, 2, 3, 4, 6]))
    threshold = data.draw(st.sampled_from([0.5, 0.6, 0.8]))
    masking = Masking(numbers=NUMBERS[data.draw(st.sampled_from([32, 64]))], neighbours=neighbours, threshold=threshold)
    survivors = data.draw(st.lists(st.sampled_from(clients), unique=True, max_size=len(clients)))
    cuts = sorted(data.draw(st.lists(st.integers(0, LENGTH), max_size=3)))
    round_ = masking.bind(clients, 7, 3)
    complete = degree_of(len(clients), neighbours) == len(clients) - 1
    # All hold shares of all: enough are left for each client, or for none.
    expected = contextlib.nullcontext()
    try:
        round_.check(survivors)
        assert survivors and (not complete or len(survivors) >= round_.num_needed)
    except UnmaskingError:
        assert not complete or len(survivors) < round_.num_needed
        expected = pytest.raises(UnmaskingError, match=f"Round 3: {len(survivors)} of {len(clients)} clients")
    with expected:
        check_sum(masking, clients, survivors, cuts)


def test_exactly_the_threshold_is_enough():
    masking, clients = Masking(numbers=NUMBERS[32]), range(9)
    needed = masking.bind(clients, 7, 3).num_needed
    assert needed == 5
    check_sum(masking, clients, range(4, 9))
    with pytest.raises(UnmaskingError, match="5 of the 9 that hold its shares are needed, but 4 are left"):
        check_sum(masking, clients, range(5, 9))


def test_a_neighbourhood_survives_the_loss_of_every_tenth():
    clients = list(range(100, 220))
    masking = Masking(numbers=NUMBERS[32])
    assert degree_of(120) == 28 and degree_of(1000) == 40
    check_sum(masking, clients, [client for client in clients if client % 10])


def test_workers_who_play_some_clients_each_agree():
    masking, clients, survivors = Masking(numbers=NUMBERS[64], neighbours=4), range(12), [0, 1, 3, 4, 5, 7, 8, 9, 11]
    plain, total = torch.zeros(LENGTH, dtype=torch.int64), torch.zeros(LENGTH, dtype=torch.int64)
    for worker in range(3):
        round_ = masking.bind(clients, 7, 3)
        for client in survivors[worker::3]:
            words = words_of(masking.numbers, client)
            masking.numbers.add(plain, words)
            round_.mask(client, words)
            masking.numbers.add(total, words)
    for start, stop in ((0, 20), (20, LENGTH)):
        masking.bind(clients, 7, 3).unmask(total[start:stop], survivors, start)
    assert torch.equal(total, plain)


def test_secrets_from_the_system_cancel_too():
    parties = {client: Party.fresh(client) for client in range(5)}
    assert len({party.private_key for party in parties.values()} | {p.own_seed for p in parties.values()}) == 10
    check_sum(Masking(numbers=NUMBERS[32]), range(5), [0, 2, 4], make=parties.__getitem__)


def leave_out_last(original):
    return lambda self, alive: list(original(self, alive))[:-1]


FAULTS = {
    "the last mask not cancelled": (MaskedRound, "_left_over", leave_out_last(MaskedRound._left_over)),
    "both of a pair add": (module, "_sign", lambda client, other: 1),
    "unmasked from position 0": (MaskedRound, "_add", lambda self, words, start, streams: ADD(self, words, 0, streams)),
    "the pair's secret seen from one side": (Party, "pair_secret", lambda self, public_key: self.private_key),
    "a sum in floating point": (
        FixedPoint,
        "add",
        lambda self, total, words: total.copy_((total.float() + words.float()).to(total.dtype)),
    ),
}
ADD = MaskedRound._add


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_breaks_the_law(fault, monkeypatch):
    check_sum(Masking(numbers=NUMBERS[32]), range(8), [0, 2, 3, 5, 6, 7], [13])
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        masking, make = Masking(numbers=NUMBERS[32]), lambda client: Party.simulated(client, 7, 3)
        if fault == "unmasked from position 0":
            # Masked in one piece, unmasked in two.
            monkeypatch.setattr(MaskedRound, "mask", mask_in_one(make))
        check_sum(masking, range(8), [0, 2, 3, 5, 6, 7], [13])


def mask_in_one(make):
    whole = {}

    def mask(self, client, words, start=0):
        if not start:
            streams = [(Stream(make(client).own_seed), 1)]
            streams += [(self._pair(client, other), module._sign(client, other)) for other in self.neighbours[client]]
            whole[client] = torch.zeros(LENGTH, dtype=words.dtype)
            ADD(self, whole[client], 0, streams)
        NUMBERS[32].add(words, whole[client][start : start + len(words)])

    return mask


def looks_uniform(words):
    """Chi-squared over bytes: 255 on average, with a deviation of 22.6."""
    counts = np.bincount(words.numpy().view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    return float(((counts - expected) ** 2 / expected).sum()) < 255 + 5 * 22.6


@pytest.mark.parametrize("modulus_bits", [32, 64])
def test_one_masked_update_looks_uniform_and_unlike_any_other(modulus_bits):
    numbers = NUMBERS[modulus_bits]
    masking, zeros = Masking(numbers=numbers), torch.zeros(50_000, dtype=numbers.dtype)
    plain = words_of(numbers, 5, 50_000)
    masked = []
    for round_number, client, words in ((0, 5, zeros), (1, 5, zeros), (0, 6, zeros), (0, 5, plain)):
        out = words.clone()
        masking.bind(range(8), 7, round_number).mask(client, out)
        assert looks_uniform(out)
        masked.append(out)
    assert looks_uniform(masked[0] - masked[1]) and looks_uniform(masked[0] - masked[2])
    assert not looks_uniform(plain) and not looks_uniform(masked[0] - masked[3]), "the test sees what is no mask"


def test_without_its_own_mask_a_late_update_would_be_open():
    """A client told lost, whose words come late: its own stream still hides them once its pairs' masks are known."""
    masking, clients = Masking(numbers=NUMBERS[32]), range(5)
    round_ = masking.bind(clients, 7, 3)
    late = torch.zeros(50_000, dtype=torch.int32)
    round_.mask(2, late)
    pairs = [
        (Stream(Party.simulated(2, 7, 3).pair_secret(Party.simulated(o, 7, 3).public_key)), o) for o in (0, 1, 3, 4)
    ]
    round_._add(late, 0, [(stream, -1 if other > 2 else 1) for stream, other in pairs])
    assert looks_uniform(late)


def test_a_round_is_unmasked_for_one_set_of_survivors():
    round_ = Masking(numbers=NUMBERS[32]).bind(range(6), 7, 3)
    total = torch.zeros(4, dtype=torch.int32)
    round_.unmask(total, [0, 1, 2, 3, 4])
    round_.unmask(total, (4, 3, 2, 1, 0), start=4)
    with pytest.raises(UsageError, match="Round 3 was unmasked for 5 survivors before"):
        round_.unmask(total, [0, 1, 2, 3, 5])


def test_a_pair_sees_one_secret_from_both_sides():
    a, b, c = (Party.simulated(client, 0, 0) for client in range(3))
    assert a.pair_secret(b.public_key) == b.pair_secret(a.public_key) != a.pair_secret(c.public_key)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 9999), min_size=2, max_size=60, unique=True),
    st.none() | st.integers(2, 20),
    st.integers(0, 9),
)
def test_neighbours_are_mutual_and_as_many_as_said(clients, wanted, round_):
    degree = degree_of(len(clients), wanted)
    found = neighbours_of(clients, degree, 1, round_)
    assert sorted(found) == sorted(clients)
    for client, others in found.items():
        assert len(set(others)) == degree and client not in others and set(others) <= set(clients)
        assert all(client in found[other] for other in others)
    assert degree >= min(wanted or 2, len(clients) - 1)


def test_rounds_have_other_neighbours():
    assert neighbours_of(range(50), 4, 1, 0) != neighbours_of(range(50), 4, 1, 1)


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_any_run_of_a_stream_is_a_run_of_the_whole(dtype):
    stream = Stream(bytes(range(32)))
    whole = stream.words(0, 100, np.dtype(dtype))
    assert len(set(whole.tolist())) == 100
    for start in range(0, 100, 3):
        for stop in (start, start + 1, 100):
            assert np.array_equal(stream.words(start, stop, np.dtype(dtype)), whole[start:stop])


def test_bits_are_frozen():
    """Recorded runs hold on to these. The first words are AES-256-CTR, as any other implementation gives them."""
    assert Stream(bytes(32)).words(0, 4, np.dtype(np.uint32)).astype("<u4").tobytes().hex() == (
        "dc95c078a2408989ad48a21492842087"
    )
    words = torch.zeros(2, dtype=torch.int32)
    Masking(numbers=NUMBERS[32]).bind(range(4), 0, 0).mask(1, words)
    assert words.tolist() == [52430102, -1164206679]


def test_bytes_are_as_stated():
    masking = Masking(numbers=NUMBERS[32])
    assert masking.bytes_per_client(1000, 300) == 4000 + 32 + 2 * 66 * 36
    shares = Party.simulated(0, 0, 0).shares_of_key(range(37), masking.num_needed(37))
    assert max(value.bit_length() for value in shares.values()) <= 66 * 8


def test_without_the_extra_one_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    extra_module.cache_clear()
    with pytest.raises(SettingsError, match=r"needs the package cryptography.*pip install 'samestep\[privacy\]'"):
        Stream(bytes(32))
    extra_module.cache_clear()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Masking(numbers=NUMBERS[32], neighbours=1), "neighbours=1"),
        (lambda: Masking(numbers=NUMBERS[32], threshold=0.4), "threshold=0.4"),
        (lambda: Masking(numbers=NUMBERS[32], threshold=1.0), "threshold=1.0"),
        (lambda: Masking(numbers=NUMBERS[32]).bind([3], 0, 2), "hides nothing; round 2 has \\[3\\]"),
        (lambda: Masking(numbers=NUMBERS[32]).bind([3, 3], 0, 2), "different clients"),
        (lambda: Masking(numbers=FixedPoint(limit=1.0, bits=31)).bind([1, 2, 3], 0, 0), "at most 2 clients"),
    ],
)
def test_what_cannot_work_is_said(make, words):
    with pytest.raises(SettingsError, match=words):
        make()


def test_strangers_are_not_unmasked():
    with pytest.raises(UsageError, match=r"Clients \[9\] are not in round 3"):
        Masking(numbers=NUMBERS[32]).bind(range(4), 7, 3).check([0, 1, 2, 9])
