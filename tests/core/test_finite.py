"""What is not finite is found in every dtype and memory order; what is finite is not, however large."""

from __future__ import annotations

import math

import pytest
import torch

import samestep.core.finite as module
from samestep.core.finite import Finite, chunks_of

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
ORDERS = {
    "plain": lambda t: t,
    "transposed": lambda t: t.t(),
    "strided": lambda t: t[::2, 1:],
    "number": lambda t: t[1, 1],
    "expanded": lambda t: t[1, 1].expand(3, 4),
}


@pytest.fixture(params=[0, 4_096], autouse=True)
def small(request, monkeypatch):
    """Small gradients are looked at together; here also one by one."""
    monkeypatch.setattr(module, "_SMALL", request.param)


def found(gradient: torch.Tensor, at_once: bool) -> tuple[list[list[int]], bool]:
    """Return what is said of a gradient that stands between two good ones, and whether it is taken for huge."""
    good = torch.ones(3, dtype=gradient.dtype)
    finite = Finite([torch.ones(3)])
    if at_once:
        finite.look_at_all([good, gradient, None, good])
    else:
        for index, one in ((0, good), (1, gradient), (3, good)):
            finite.look(0, index, one)
        finite.end_shard()
    return finite.found(), finite.huge


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_is_looked_at(dtype, order, at_once):
    base = torch.randn(41, 37).to(dtype)
    base[1, 1] = 0.5
    assert found(ORDERS[order](base), at_once) == ([], False)
    for bad in (math.nan, math.inf, -math.inf):
        spoilt = base.clone()
        spoilt[(1, 1) if order in ("number", "expanded") else (40, 36)] = bad
        assert found(ORDERS[order](spoilt), at_once) == ([[0, 1, 1, 1]], False)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_are_finite(dtype, at_once):
    largest = torch.full((300,), torch.finfo(dtype).max, dtype=dtype)
    bad, huge = found(largest, at_once)
    assert bad == []
    assert huge or dtype == torch.float16, "their sum may overflow"
    assert found(torch.empty(0, dtype=dtype), at_once) == ([], False)


def test_dtypes_may_be_mixed():
    finite = Finite([torch.ones(3)])
    for index, dtype in enumerate(DTYPES):
        finite.look(0, index, torch.tensor([1.0, math.nan if index == 2 else 1.0], dtype=dtype))
    finite.end_shard()
    assert (finite.found(), finite.huge) == ([[0, 2, 2, 1]], False)


def test_sums_for_half_weights_are_always_looked_at():
    finite = Finite([torch.ones(2), torch.ones(2, dtype=torch.float16)])
    assert finite.huge
    finite.begin_pass()
    assert finite.huge
    assert not Finite([torch.ones(2, dtype=torch.bfloat16)]).huge


def test_what_was_seen_is_told_by_leaf_and_forgotten():
    finite = Finite([torch.ones(2)])
    bad, large = torch.tensor([1.0, math.nan]), torch.tensor([1e30, 1.0])
    for leaf, parameter in ((2, 5), (0, 3), (2, 1), (2, 4)):
        finite.look(leaf, parameter, bad)
    finite.look(1, 1, large)
    finite.end_shard()
    assert finite.found() == [[0, 3, 3, 1], [2, 1, 5, 3]]
    assert finite.huge
    finite.begin_pass()
    assert (finite.found(), finite.huge) == ([], False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copied_in_pieces(dtype, monkeypatch):
    """The whole is copied, and looked at: at the ends of pieces, and in the short one at the end."""
    monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    place = torch.zeros(7, 11, dtype=dtype)
    chunks = chunks_of(place)
    assert [len(chunk) for chunk in chunks] == [16, 16, 16, 16, 13]
    finite = Finite([place])
    for bad in (1.0, math.nan, -math.inf, torch.finfo(dtype).max):
        for where in (0, 15, 16, 63, 64, 76):
            gradient = torch.randn(7, 11, dtype=dtype)
            gradient.view(-1)[where] = bad
            finite.begin_pass()
            finite.copy(2, 1, gradient, chunks)
            assert torch.equal(place.nan_to_num(), gradient.nan_to_num())
            assert finite.found() == ([] if math.isfinite(bad) else [[2, 1, 1, 1]])
            assert finite.huge == (math.isfinite(bad) and bad != 1.0)
    finite.begin_pass()
    finite.copy(0, 0, torch.full((7, 11), 1e16, dtype=dtype), chunks)
    assert not finite.huge


def test_what_is_not_copied_in_pieces(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert chunks_of(torch.zeros(8, 8)) is not None
    assert chunks_of(torch.zeros(7, 9)) is None
    assert chunks_of(torch.zeros(16, 8).t()) is None
    assert chunks_of(torch.zeros(64, dtype=torch.bfloat16)) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert chunks_of(torch.zeros(8, 8)) is None


def test_a_device_is_asked_once():
    """On an accelerator the sizes wait until they are asked for: the same is found."""
    finite = Finite([torch.ones(2)])
    finite._waits = True
    for parameter, gradient in enumerate([torch.ones(3), torch.tensor([math.nan, 1.0]), torch.empty(0)]):
        finite.look(0, parameter, gradient)
    finite.look(1, 2, torch.tensor([-math.inf]))
    assert finite.found() == [[0, 1, 1, 1], [1, 2, 2, 1]]
    assert not finite.huge
    finite.look(1, 0, torch.tensor([-3e38, 1.0]))
    assert finite.found() == [[0, 1, 1, 1], [1, 2, 2, 1]]
    assert finite.huge
