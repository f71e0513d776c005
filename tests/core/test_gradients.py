"""Gradients of one worker: leaves are sums of all that arrives, folded in the order of the tree."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from samestep.core.gradients import Gradients
from samestep.core.group import Solo
from samestep.core.layout import lay_out
from samestep.core.tree import script_of
from samestep.core.weights import Weights, check_separate, is_dense, placed, shape_of, sum_dtype
from samestep.errors import UsageError


def made(module: nn.Module, num_leaves: int, many: bool = False) -> Gradients:
    names, parameters = zip(*module.named_parameters(), strict=True)
    weights = Weights(Solo(), names, parameters, lay_out([shape_of(p, True) for p in parameters], 1))
    return Gradients(weights, script_of(range(num_leaves), num_leaves), None, many)


def fold(gradients: Gradients, leaves: list) -> list[torch.Tensor | None]:
    """Run one pass; each leaf is a function that calls backward."""
    gradients.begin_pass()
    for index, leaf in enumerate(leaves):
        gradients.begin_shard(index)
        leaf()
        gradients.end_shard()
    return gradients.held()


def scaled(parameter: torch.Tensor, *factors: float):
    """Return a leaf whose gradient arrives once per factor."""

    def leaf():
        for factor in factors:
            (parameter * factor).sum().backward()

    return leaf


def test_sum_has_the_shape_of_the_tree():
    layer = nn.Linear(1, 1, bias=False)
    gradients = made(layer, 5)
    values = torch.tensor([1e8, 1.0, -1e8, 3.0, 1e-3]).tolist()
    for _ in range(3):
        (total,) = fold(gradients, [scaled(layer.weight, value) for value in values])
        a, b, c, d, e = torch.tensor(values)
        assert float(total) == float(((a + b) + (c + d)) + e)
    assert float(((a + b) + (c + d)) + e) != float((((a + b) + c) + d) + e), "the example shows nothing"
    assert layer.weight.grad is None
    assert gradients.presence() is None


def test_all_that_arrives_in_a_shard_is_one_leaf():
    layer = nn.Linear(1, 1, bias=False)
    gradients = made(layer, 2)
    for _ in range(3):
        (total,) = fold(gradients, [scaled(layer.weight, 1e8, 1.0), scaled(layer.weight, -1e8, 5.0)])
        left, right = torch.tensor(1e8) + 1.0, torch.tensor(-1e8) + 5.0
        assert float(total) == float(left + right)


def test_later_second_arrival_is_refused_and_a_new_pass_starts_clean():
    layer = nn.Linear(1, 1, bias=False)
    gradients = made(layer, 2)
    fold(gradients, [scaled(layer.weight, 1.0), scaled(layer.weight, 1.0)])
    with pytest.raises(UsageError, match=r"'weight' arrived twice.*arrivals='many'"):
        fold(gradients, [scaled(layer.weight, 1.0, 1.0)])
    (total,) = fold(gradients, [scaled(layer.weight, 2.0), scaled(layer.weight, 3.0)])
    assert float(total) == 5.0
    lenient = made(layer, 2, many=True)
    gradients.close()
    fold(lenient, [scaled(layer.weight, 1.0), scaled(layer.weight, 1.0)])
    assert float(fold(lenient, [scaled(layer.weight, 1.0, 2.0), scaled(layer.weight, 4.0)])[0]) == 7.0


def test_parameters_that_some_or_all_leaves_do_not_use():
    pair = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
    gradients = made(pair, 3)
    first, second = pair[0].weight, pair[1].weight
    for _ in range(2):
        totals = fold(gradients, [scaled(first, 2.0), lambda: None, scaled(first, 5.0)])
        assert float(totals[0]) == 7.0
        assert totals[1] is None
        assert gradients.presence() == bytes([1, 0])
    assert float(fold(gradients, [scaled(second, 2.0), lambda: None, lambda: None])[1]) == 2.0


def test_frozen_parameters_may_thaw():
    layer = nn.Linear(1, 1)
    layer.bias.requires_grad_(False)
    gradients = made(layer, 1)
    assert fold(gradients, [scaled(layer.weight, 1.0)])[1] is None
    layer.bias.requires_grad_(True)
    assert float(fold(gradients, [scaled(layer.bias, 3.0)])[1]) == 3.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_added_in_float32(dtype):
    layer = nn.Linear(1, 1, bias=False).to(dtype)
    gradients = made(layer, 2)
    (total,) = fold(gradients, [scaled(layer.weight, 1024.0), scaled(layer.weight, 0.5)])
    assert total.dtype == torch.float32 == sum_dtype(dtype)
    assert float(total) == 1024.5


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 2, sparse=True)
    gradients = made(table, 1)
    with pytest.raises(UsageError, match="'weight' is sparse"):
        fold(gradients, [lambda: table(torch.tensor([1])).sum().backward()])


def test_memory_order_is_kept():
    layer = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    expected = layer.weight.detach().clone()
    gradients = made(layer, 1)
    assert torch.equal(layer.weight, expected)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert layer.weight.data_ptr() % 64 == layer.bias.data_ptr() % 64 == 0
    total = fold(gradients, [lambda: (layer.weight * torch.arange(48.0).view(4, 3, 2, 2)).sum().backward()])[0]
    assert total.stride() == layer.weight.stride()
    assert torch.equal(total, torch.arange(48.0).view(4, 3, 2, 2))


def test_dense():
    base = torch.zeros(4, 6)
    assert is_dense(base)
    assert is_dense(base.t())
    assert is_dense(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    assert not is_dense(base[:, :3])
    assert not is_dense(torch.zeros(1).expand(5))
    flat = placed(torch.zeros(96, dtype=torch.uint8), 0, base[:, :3])
    assert flat.shape == (4, 3)
    assert flat.is_contiguous()


def test_overlapping_parameters_are_refused():
    whole = torch.zeros(8)
    with pytest.raises(UsageError, match="'a' and 'b' share memory"):
        check_separate(["a", "b"], [whole[:5], whole[4:]])
    check_separate(["a", "b", "empty"], [whole[:4], whole[4:], whole[:0]])
