"""Digests: equal exactly when the bits are; whatever the strides, the pieces and the order of keys."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samestep.storage import digest as digest_module
from samestep.storage.digest import DIGEST_CHARS, joined_digest, pieces, state_digest, tensor_digest, tensors_digest

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex32, torch.complex64, torch.complex128),
]
SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 0, 4), (2, 3, 4)]


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits of a dtype (0 and 1 for booleans)."""
    generator = torch.Generator().manual_seed(seed)
    top = 2 if dtype == torch.bool else 256
    flat = torch.randint(0, top, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return flat.view(dtype).reshape(shape)


def bits_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_sha256_of_dtype_shape_and_bytes(dtype, shape):
    tensor = tensor_of(dtype, shape)
    words = f"{str(dtype).split('.')[1]}[{', '.join(map(str, shape))}]\n".encode()
    assert tensor_digest(tensor) == hashlib.sha256(words + bits_of(tensor)).hexdigest()[:32]
    assert DIGEST_CHARS == 32


def test_every_dtype_and_shape_differs_though_the_bytes_are_the_same():
    zeros = [torch.zeros(48, dtype=torch.uint8).view(dtype) for dtype in DTYPES]
    shapes = [torch.zeros(shape) for shape in [(6,), (6, 1), (1, 6), (2, 3), (3, 2), (0, 6), (6, 0), (0,), ()]]
    digests = [tensor_digest(t) for t in zeros + shapes]
    assert len(set(digests)) == len(digests)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 10**6), st.data())
def test_one_bit_differs(dtype, seed, data):
    tensor = tensor_of(dtype, (3, 4), seed)
    flipped = tensor.clone()
    flat = flipped.view(-1).view(torch.uint8)
    byte = data.draw(st.integers(0, flat.numel() - 1))
    bit = 0 if dtype == torch.bool else data.draw(st.integers(0, 7))
    flat[byte] ^= 1 << bit
    assert tensor_digest(tensor) != tensor_digest(flipped)
    flat[byte] ^= 1 << bit
    assert tensor_digest(tensor) == tensor_digest(flipped)


def test_signed_zeros_and_nan_payloads_differ():
    bits = torch.tensor([0, -(2**31), 0x7FC00000, 0x7FC00001], dtype=torch.int32)
    digests = {tensor_digest(value) for value in bits.view(torch.float32)}
    assert len(digests) == 4


STRIDED = {
    "transposed": lambda t: t.t(),
    "every other row": lambda t: t[::2],
    "every third column": lambda t: t[:, 1::3],
    "permuted": lambda t: t.reshape(4, 10, 30).permute(2, 0, 1),
    "channels last": lambda t: t.reshape(2, 5, 4, 30).contiguous(memory_format=torch.channels_last),
    "expanded": lambda t: t[:1].expand(50, -1),
    "expanded inside": lambda t: t[:, :1].expand(-1, 70),
    "shifted": lambda t: t.reshape(-1)[3:],
    "one element": lambda t: t[3:4, 5],
    "one row": lambda t: t.t()[None, None, :, 3],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128, torch.bool], ids=str)
@pytest.mark.parametrize("view", STRIDED)
@pytest.mark.parametrize("piece_bytes", [1, 16, 100, 4 << 20])
def test_strides_and_pieces_do_not_matter(dtype, view, piece_bytes, monkeypatch):
    strided = STRIDED[view](tensor_of(dtype, (40, 30)))
    dense = strided.clone(memory_format=torch.contiguous_format)
    whole = tensor_digest(dense)
    monkeypatch.setattr(digest_module, "_PIECE_BYTES", piece_bytes)
    assert tensor_digest(strided) == whole == tensor_digest(dense)
    assert b"".join(map(bytes, pieces(strided))) == bits_of(dense)
    assert max(len(piece) for piece in pieces(strided)) <= max(piece_bytes, dtype.itemsize)


def test_lazy_conjugates_negatives_and_parameters():
    z = tensor_of(torch.complex64, (5,)).nan_to_num()
    assert z.conj().is_conj() and z.conj().imag.is_neg()
    assert tensor_digest(z.conj()) == tensor_digest(z.conj().resolve_conj()) != tensor_digest(z)
    assert tensor_digest(z.conj().imag) == tensor_digest(-z.imag)
    assert tensor_digest(torch._neg_view(torch.ones(3))) == tensor_digest(-torch.ones(3))
    weight = torch.nn.Parameter(torch.randn(3))
    assert tensor_digest(weight) == tensor_digest(weight.data)


def test_contiguous_memory_is_not_copied():
    tensor = torch.zeros(3 << 20)
    for piece in pieces(tensor):
        assert not piece.readonly
        piece[0] = 1
    firsts = tensor.view(torch.uint8)[:: 4 << 20]
    assert firsts.tolist() == [1, 1, 1] and tensor.view(torch.uint8).sum() == 3


STRANGE = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.empty(3, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize("kind", STRANGE)
def test_tensors_without_plain_bytes_are_refused(kind):
    with pytest.raises(TypeError, match="no plain bytes.*dense"):
        tensor_digest(STRANGE[kind]())


def test_names_and_order_count():
    a, b = torch.ones(2), torch.zeros(2)
    variants = [
        [("a", a), ("b", b)],
        [("b", b), ("a", a)],
        [("a", b), ("b", a)],
        [("a", a), ("c", b)],
        [("a", a)],
        [("aa", a), ("b", b)],
        [],
    ]
    assert len({tensors_digest(v) for v in variants}) == len(variants)
    assert tensors_digest(iter(variants[0])) == tensors_digest([("a", a.clone()), ("b", b.clone())])
    assert joined_digest([("a", tensor_digest(a)), ("b", tensor_digest(b))]) == tensors_digest(variants[0])
    assert joined_digest([("ab", "c")]) != joined_digest([("a", "bc")])


def test_state_of_an_optimizer():
    def state(num_steps, **settings_):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), **settings_)
        for _ in range(num_steps):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        return optimizer.state_dict()

    first, again = state(3, lr=0.1), state(3, lr=0.1)
    again["state"] = dict(reversed(again["state"].items()))
    again["param_groups"] = [dict(reversed(group.items())) for group in again["param_groups"]]
    assert list(again["state"]) != list(first["state"])
    assert state_digest(first) == state_digest(again)
    assert len({state_digest(s) for s in (first, state(2, lr=0.1), state(3, lr=0.2), state(3, lr=0.1, eps=1e-7))}) == 4
    again["state"][1]["exp_avg"][0] = torch.nextafter(again["state"][1]["exp_avg"][0], torch.tensor(9.0))
    assert state_digest(first) != state_digest(again)


def test_plain_values_count_by_type_and_exact_value():
    values = [
        *(None, True, False, 1, 0, 1.0, 0.0, -0.0, math.nan, math.inf, -math.inf, 2**80, "1", "", b"1", b"", "None"),
        *([], {}, [[]], [{}], {1: 2}, {"1": 2}, {1.0: 2}, [1, 2], [[1], 2], [1, [2]], [12], ["a", "b"], ["ab"]),
        *(torch.tensor(1.0), torch.tensor(1), 0.1, 0.1 + 2**-56, {"a": {"b": 1}}, {"a": {}, "b": 1}),
    ]
    digests = [state_digest({"x": value}) for value in values]
    assert len(set(digests)) == len(values)
    assert state_digest({"x": (1, 2)}) == state_digest({"x": [1, 2]})
    assert state_digest({"x": np.float64(0.5)}) == state_digest({"x": 0.5})
    assert state_digest({"x": np.arange(3)}) == state_digest({"x": torch.arange(3)})
    assert state_digest(OrderedDict(b=1, a=2)) == state_digest({"a": 2, "b": 1})


def test_the_place_of_a_foreign_value_is_named():
    with pytest.raises(TypeError, match=r"state\['groups'\]\[1\]\['f'\] is a function"):
        state_digest({"groups": [{}, {"f": lambda: None}]})
