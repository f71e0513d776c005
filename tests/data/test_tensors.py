"""Batches as trees: walked without loss, and every tensor in memory of its own that starts on 64 bytes."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from samestep.data.tensors import aligned, leaves_of, map_leaves, rows_of

Pair = namedtuple("Pair", "left right")


@dataclass(frozen=True, slots=True)
class Frozen:
    image: Any
    name: str = "a"
    derived: Any = field(default=None, init=False)


def shifted(num_bytes, dtype=torch.float32, num=6):
    memory = torch.zeros(64 + num_bytes + num * dtype.itemsize + 64, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + num_bytes
    return memory[start : start + num * dtype.itemsize].view(dtype)


def double(tree):
    return map_leaves(tree, torch.Tensor, lambda tensor: tensor * 2)


ONE, TWO = torch.ones(2), torch.full((2,), 2.0)


@pytest.mark.parametrize(
    ("tree", "doubled"),
    [
        (ONE, TWO),
        ([ONE, 5, "x"], [TWO, 5, "x"]),
        ((ONE, None), (TWO, None)),
        (Pair(ONE, [ONE]), Pair(TWO, [TWO])),
        ({"a": ONE, 3: (ONE,)}, {"a": TWO, 3: (TWO,)}),
        (OrderedDict(b=ONE, a=ONE), OrderedDict(b=TWO, a=TWO)),
        (UserDict(a=ONE), UserDict(a=TWO)),
        (MappingProxyType({"a": ONE}), {"a": TWO}),
        ({"deep": [Pair(Frozen(ONE), 1)]}, {"deep": [Pair(Frozen(TWO), 1)]}),
    ],
)
def test_trees_keep_their_shape(tree, doubled):
    result = double(tree)
    assert type(result) is type(doubled)
    assert repr(result) == repr(doubled)
    assert all(torch.equal(leaf, ONE) for leaf in leaves_of(tree, torch.Tensor)), "the original was changed"


@pytest.mark.parametrize("tree", [[1, "a"], {"a": (1, [2])}, Frozen(3), Pair(1, 2), 7, None, torch.Size([2, 3])])
def test_what_holds_no_tensor_comes_back_as_it_is(tree):
    assert double(tree) is tree


@pytest.mark.parametrize("num_bytes", [8, 16, 32, 56])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8, torch.bfloat16, torch.bool])
def test_misaligned_tensors_are_copied(num_bytes, dtype):
    tensor = shifted(num_bytes, dtype)
    copy = aligned(tensor)
    assert tensor.data_ptr() % 64 == num_bytes
    assert copy.data_ptr() % 64 == 0
    assert torch.equal(copy, tensor)


def test_parts_of_a_larger_tensor_are_copied():
    whole = torch.zeros(64, 64)
    for part in (whole[:1], whole[16:32], whole[0]):
        copy = aligned(part)
        assert copy.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
        assert copy.untyped_storage().nbytes() == part.numel() * 4


def test_tensors_that_own_aligned_memory_are_not_copied():
    for tensor in (torch.zeros(5), torch.zeros(2, 3, 4).permute(2, 0, 1), torch.empty(0), torch.tensor(3)):
        assert aligned(tensor) is tensor


def test_copies_keep_strides_and_the_wish_for_gradients():
    pixels = torch.zeros(9, 3, 4, 4).contiguous(memory_format=torch.channels_last)[1:]
    assert aligned(pixels).stride() == pixels.stride()
    assert aligned(pixels).is_contiguous(memory_format=torch.channels_last)
    weight = shifted(4).requires_grad_()
    assert aligned(weight).requires_grad
    assert aligned(weight).is_leaf
    assert aligned(torch.ones(1).expand(7)).untyped_storage().nbytes() == 28


def test_what_has_no_dense_memory_is_left_alone():
    sparse = torch.eye(3).to_sparse()
    meta = torch.empty(3, device="meta")
    assert aligned(sparse) is sparse
    assert aligned(meta) is meta


@pytest.mark.parametrize("make", [torch.from_numpy, lambda array: array, lambda array: array[:, ::-1]])
def test_rows(make):
    array = np.arange(60, dtype=np.int32).reshape(10, 6)
    ids = np.array([7, 0, 7, 9])
    rows = rows_of(make(array), ids)
    assert rows.dtype == torch.int32
    assert np.array_equal(rows.numpy(), np.asarray(make(array))[ids])
    assert aligned(rows) is rows
