"""The fingerprint: tells other data apart, is the same for the same data, and leaves no trace."""

from __future__ import annotations

import multiprocessing
import random
import time

import numpy as np
import pytest
import torch

from samestep.core.randomness import seed_sample
from samestep.data import fingerprint as module
from samestep.data.fingerprint import agree, chosen, fingerprint
from samestep.data.source import as_source
from samestep.storage.digest import state_digest


def of(data, collate=None):
    return fingerprint(as_source(data, collate), state_digest, seed_sample)


def columns(num_samples=40):
    g = torch.Generator().manual_seed(0)
    return torch.randn(num_samples, 3, generator=g), torch.arange(num_samples)


@pytest.mark.parametrize("num_samples", [0, 1, 2, 3, 4, 5, 64, 65, 1_000, 10**12])
def test_chosen_samples(num_samples):
    pieces = chosen(num_samples)
    ids = [i for piece in pieces for i in piece.tolist()]
    assert len(ids) == len(set(ids)) == min(num_samples, 64)
    assert all(0 <= i < num_samples for i in ids)
    assert [len(piece) for piece in pieces[:4]] == [1] * min(num_samples, 4)
    assert {0, num_samples - 1} <= set(ids) or not num_samples
    assert [piece.tolist() for piece in chosen(num_samples)] == [piece.tolist() for piece in pieces]


@pytest.mark.parametrize("sample", range(40))
def test_every_chosen_sample_counts(sample):
    x, y = columns()
    changed = x.clone()
    changed[sample, 1] += 1e-6
    assert agree(of((x, y)), of((x.clone(), y.clone())))
    assert not agree(of((x, y)), of((changed, y)))


def test_form_counts_too():
    x, y = columns()
    known = of((x, y))
    assert not agree(known, of((x.double(), y)))
    assert not agree(known, of((x[:, :2], y)))
    assert not agree(known, of((y, x)))
    assert not agree(of({"a": x}), of({"b": x}))


def test_the_same_content_in_another_container(tmp_path):
    x, y = columns(1000)
    known = of((x, y))
    mapped = np.memmap(tmp_path / "x", dtype=np.float32, mode="w+", shape=(1000, 3))
    mapped[:] = x.numpy()
    assert len(known) == 5
    assert of((mapped, y)) == known
    assert of(torch.utils.data.TensorDataset(x, y)) == known
    listed = of([(x[i], int(y[i])) for i in range(1000)])
    assert listed == known[:4]


def test_large_rows_are_not_all_read(monkeypatch):
    x, _ = columns(1000)
    monkeypatch.setattr(module, "_MAX_BYTES", 12 * 7)
    asked = []
    source = as_source(x)
    fetch = source.fetch
    source.fetch = lambda ids, *rest: (asked.append(len(ids)), fetch(ids, *rest))[1]
    fingerprint(source, state_digest, seed_sample)
    assert asked == [1, 1, 1, 1, 7]


class Augmented:
    """Draws from every global generator, and from one of its own where it is told to."""

    def __init__(self, own=False, shift=0.0):
        self.own = np.random.default_rng(0) if own else None
        self.shift = shift
        self.num_read = 0

    def __len__(self):
        return 30

    def __getitem__(self, i):
        self.num_read += 1
        drawn = torch.rand(2) + random.random() + np.random.rand() + self.shift
        return drawn if self.own is None else drawn + self.own.random(), i


def positions():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.parametrize("data", [Augmented(), Augmented(own=True), columns()], ids=["global", "own", "columns"])
def test_nothing_moves(data):
    seed_sample(1, 2, 3)
    own = data.own.bit_generator.state if getattr(data, "own", None) else None
    before = positions()
    of(data)
    assert positions() == before
    assert getattr(data, "num_read", 0) == 0
    if own is not None:
        assert data.own.bit_generator.state == own
    assert multiprocessing.active_children() == []


def test_augmentation_by_global_generators_is_content():
    first = of(Augmented())
    random.random()
    assert len(first) == 4
    assert of(Augmented()) == first
    assert not agree(first, of(Augmented(shift=0.5)))


def test_generators_of_its_own_leave_the_length_alone():
    assert of(Augmented(own=True)) == []


class Reads:
    def __init__(self, read):
        self.read = read

    def __len__(self):
        return 9

    def __getitem__(self, i):
        return self.read(i)


def test_what_has_no_digest():
    assert of(Reads(lambda i: i), collate=lambda samples: {1, 2}) == []


def test_text_and_numbers_have_one():
    known = of(Reads(lambda i: {"text": "a" * i, "score": i / 3}))
    assert len(known) == 4
    assert not agree(known, of(Reads(lambda i: {"text": "a" * i + "b", "score": i / 3})))


def test_a_sample_that_fails_is_left_to_training():
    def read(i):
        if i == 8:
            raise ValueError("planted")
        return i

    assert len(of(Reads(read))) == 1
    assert agree(of(Reads(read)), of(Reads(lambda i: i)))


def test_slow_data_is_given_up(monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.3)
    begin = time.monotonic()
    found = of(Reads(lambda i: (time.sleep(60 if i == 8 else 0), i)[1]))
    assert time.monotonic() - begin < 20
    assert len(found) <= 1
    assert agree(found, of(Reads(lambda i: i)))
    assert multiprocessing.active_children() == []


def test_agreement_is_in_what_both_have():
    assert agree([], ["a"])
    assert agree(["a", "b"], ["a"])
    assert not agree(["a", "b"], ["a", "c", "d"])
