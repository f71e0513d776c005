"""What every codec promises; each law is a function that fails by an assertion, as `test_planted_codecs.py` shows."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import torch

from samestep import codecs
from samestep.codecs import (
    BFloat16,
    Codec,
    Exact,
    Feedback,
    Float16,
    Int4,
    Int8,
    PowerSGD,
    RandomK,
    Sign,
    TopK,
)
from samestep.codecs.codec import sum_dtype

KEY = (0, 3, 1, 2)

CODECS: dict[type[Codec], list[Codec]] = {
    BFloat16: [BFloat16()],
    Exact: [Exact()],
    Feedback: [Feedback(Int8()), Feedback(PowerSGD(2)), Feedback(TopK(0.1))],
    Float16: [Float16()],
    Int4: [Int4(), Int4(block=6), Int4(stochastic=False)],
    Int8: [Int8(), Int8(block=6), Int8(block=2, stochastic=False)],
    PowerSGD: [PowerSGD(), PowerSGD(rank=1)],
    RandomK: [RandomK(0.1), RandomK(0.6), RandomK(1)],
    Sign: [Sign(), Sign(block=16)],
    TopK: [TopK(), TopK(0.3), TopK(1.0)],
}
"""Each class of codecs, and the ones that stand for it."""

ALL = [codec for group in CODECS.values() for codec in group]
SHAPES = [(), (0,), (1,), (2,), (7,), (256,), (1000,), (0, 5), (1, 9), (3, 4), (40, 30), (8, 3, 3, 3), (1, 1, 1)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DRAWS = (Int8, Int4, RandomK)
"""Codecs whose bytes depend on the key, if they are not told to round to nearest."""


def values(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)


def round_trip(codec: Codec, tensor: torch.Tensor, key: tuple[int, ...] = KEY) -> torch.Tensor:
    return codec.decode(codec.encode(tensor, key), tensor.shape, tensor.dtype)


def draws(codec: Codec) -> bool:
    inner = codec.codec if isinstance(codec, Feedback) else codec
    return isinstance(inner, DRAWS) and getattr(inner, "stochastic", True)


# ------------------------------------------------------------------------------------------------------------- bytes


def states_its_bytes(codec: Codec) -> None:
    for shape in SHAPES:
        for dtype in DTYPES:
            for tensor in (values(shape, dtype), torch.zeros(shape, dtype=dtype)):
                payload = codec.encode(tensor, KEY)
                assert payload.dtype == torch.uint8 and payload.dim() == 1 and payload.is_contiguous()
                assert len(payload) == codec.num_bytes(shape, dtype), (shape, dtype)
                decoded = codec.decode(payload, shape, dtype)
                assert decoded.shape == tensor.shape and decoded.is_contiguous()
                assert decoded.dtype == sum_dtype(dtype)


def owns_its_memory(codec: Codec) -> None:
    tensor = values((40, 30))
    kept = tensor.clone()
    payload = codec.encode(tensor, KEY)
    before = payload.clone()
    assert torch.equal(tensor, kept), "encoding wrote to the tensor"
    tensor.zero_()
    assert torch.equal(payload, before), "the payload is the tensor's memory"
    decoded = codec.decode(payload, tensor.shape)
    decoded.fill_(3)
    assert torch.equal(payload, before), "the decoded tensor is the payload's memory"


def reads_any_message(codec: Codec) -> None:
    """A payload in the middle of a message, at an odd address, decodes to the same bits."""
    tensor = values((40, 30))
    payload = codec.encode(tensor, KEY)
    message = torch.cat([torch.zeros(3, dtype=torch.uint8), payload, torch.zeros(5, dtype=torch.uint8)])
    inside = message[3 : 3 + len(payload)]
    assert torch.equal(codec.decode(inside, tensor.shape), codec.decode(payload, tensor.shape))


# ------------------------------------------------------------------------------------------------------------- bound


def _blocks(flat: torch.Tensor, block: int | None, of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return one number per element: what `of` says of its block."""
    parts = flat.split(block or max(1, len(flat)))
    return torch.cat([of(part).expand(len(part)) for part in parts]) if len(flat) else flat


def _check_elements(bound: Callable[[Codec, torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    def check(codec: Codec, x: torch.Tensor, y: torch.Tensor) -> None:
        # To rounding: that of the largest of what is subtracted here, in the sum dtype or in float32.
        assert ((x - y).abs() <= bound(codec, x) * (1 + 1e-6) + x.abs() * 1e-6 + 1e-45).all(), codec

    return check


def _check_integers(largest: int) -> Callable[..., None]:
    def bound(codec: Int8 | Int4, x: torch.Tensor) -> torch.Tensor:
        scales = _blocks(x, codec.block, lambda part: part.abs().max() / largest)
        return scales * (1 if codec.stochastic else 0.5)

    return _check_elements(bound)


def _check_share(codec: TopK | RandomK, x: torch.Tensor, y: torch.Tensor) -> None:
    sent = y != 0
    assert torch.equal(y[sent], x[sent])
    count = min(len(x), max(1, round(codec.share * len(x))))
    assert int(sent.sum()) == min(count, int((x != 0).sum())) or isinstance(codec, RandomK)
    assert int(sent.sum()) <= count
    if isinstance(codec, TopK) and sent.any() and not sent.all():
        assert x[~sent].abs().max() <= x[sent].abs().min()


def _check_sign(codec: Sign, x: torch.Tensor, y: torch.Tensor) -> None:
    _check_elements(lambda codec, x: torch.maximum(x.abs(), _blocks(x, codec.block, lambda part: part.abs().mean())))(
        codec, x, y
    )
    size = x.abs().max() if len(x) else 0
    if 1e-30 < size < 1e30:
        squares = _blocks(x, codec.block, lambda part: (part**2).mean() - part.abs().mean() ** 2).sum()
        assert torch.isclose(((x - y) ** 2).sum(), squares, rtol=1e-4, atol=0)


def _check_power(codec: PowerSGD, x: torch.Tensor, y: torch.Tensor) -> None:
    scale = max(1e-300, float(x.abs().max())) if len(x) else 1
    assert ((x - y) / scale).norm() <= (x / scale).norm() * (1 + 1e-5)


BOUNDS: dict[type[Codec], Callable[..., None]] = {
    BFloat16: _check_elements(lambda codec, x: torch.clamp(x.abs() / 256, min=2.0**-134)),
    Exact: _check_elements(lambda codec, x: torch.zeros_like(x)),
    Float16: _check_elements(lambda codec, x: torch.clamp(x.abs() / 2048, min=2.0**-25)),
    Int4: _check_integers(7),
    Int8: _check_integers(127),
    PowerSGD: _check_power,
    RandomK: _check_share,
    Sign: _check_sign,
    TopK: _check_share,
}
"""The bound of each docstring, as (codec, what was encoded, what was decoded), flat and in float64."""


def keeps_its_bound(codec: Codec) -> None:
    """On ordinary tensors, and on zeros, denormal and very large elements, alone and together."""
    inner = codec.codec if isinstance(codec, Feedback) else codec
    largest = {Float16: 60_000.0, BFloat16: 3.3e38}.get(type(inner), float(torch.finfo(torch.float32).max))
    for shape in SHAPES:
        x = values(shape)
        for tensor in (x, x * 1e-42, x * 1e-37, torch.zeros(shape), torch.full(shape, -largest), x.sign() * largest):
            if isinstance(inner, PowerSGD) and tensor.numel() and tensor.abs().max() > 1e38:
                tensor = tensor * 0.01  # sums over rows have to fit
            if torch.isfinite(tensor).all():
                decoded = round_trip(codec, tensor)
                assert torch.isfinite(decoded).all(), (shape, tensor)
                BOUNDS[type(inner)](inner, tensor.double().reshape(-1), decoded.double().reshape(-1))
    for scale in (1, 1e-300, 1e200):
        tensor = values((30, 40), torch.float64) * scale
        if type(inner) not in (Float16, BFloat16) or scale == 1:
            BOUNDS[type(inner)](inner, tensor.reshape(-1), round_trip(codec, tensor).reshape(-1))
    steep = torch.logspace(-44, 38, 600)
    if type(inner) is not Float16:
        BOUNDS[type(inner)](inner, steep.double(), round_trip(codec, steep).double())


def zeros_stay(codec: Codec) -> None:
    for shape in SHAPES:
        assert not round_trip(codec, torch.zeros(shape)).any()


# --------------------------------------------------------------------------------------------------------------- key


def depends_on_its_arguments_alone(codec: Codec) -> None:
    """Not on the global generators, nor on what was encoded before; and none is touched."""
    tensor = values((40, 30))
    torch.manual_seed(1)
    first = codec.encode(tensor, KEY)
    torch.manual_seed(2)
    np.random.seed(2)
    random.seed(2)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    codec.encode(values((17,)), (5,))
    assert torch.equal(codec.encode(tensor, KEY), first)
    codec.decode(first, tensor.shape)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
    assert random.getstate() == states[2]


def draws_from_its_key(codec: Codec) -> None:
    tensor = values((40, 30))
    first = codec.encode(tensor, KEY)
    for place in range(len(KEY)):
        other = tuple(part + (index == place) for index, part in enumerate(KEY))
        assert torch.equal(codec.encode(tensor, other), first) is not draws(codec), f"part {place} of the key"


def is_unbiased_if_it_says_so(codec: Codec) -> None:
    if not codec.unbiased:
        return
    block = getattr(codec, "block", 8)
    pattern = values((block,)).double()
    num_keys, num_rows = 60, 1 + 12_000 // block
    total = torch.zeros(block, dtype=torch.float64)
    for number in range(num_keys):
        total += round_trip(codec, pattern.repeat(num_rows), (number,)).view(num_rows, block).sum(0)
    error = total / (num_keys * num_rows) - pattern
    scale = pattern.abs().max() / {Int8: 127, Int4: 7}.get(type(codec), 1e12)
    # A rounded element strays by at most half a scale; six times that of the mean.
    assert (error.abs() <= 3 * scale / (num_keys * num_rows) ** 0.5 + 1e-15).all(), error / scale


# ------------------------------------------------------------------------------------------------------------ layout


def ignores_strides_and_dtypes(codec: Codec) -> None:
    plain = values((4, 6, 5, 3))
    expected = codec.encode(plain, KEY)
    wide = torch.zeros(4, 6, 5, 6)
    wide[..., ::2] = plain
    ways = {
        "channels last": plain.contiguous(memory_format=torch.channels_last),
        "strided": wide[..., ::2],
        "transposed": plain.transpose(0, 3).contiguous().transpose(0, 3),
        "needs gradients": plain.clone().requires_grad_(),
    }
    for offset in (1, 3, 8):
        memory = torch.empty(plain.numel() + offset)
        ways[f"at {4 * offset} bytes"] = memory[offset:].copy_(plain.view(-1)).view(plain.shape)
    for name, way in ways.items():
        assert torch.equal(codec.encode(way, KEY), expected), name
    for dtype in (torch.float16, torch.bfloat16):
        narrow = plain.to(dtype)
        assert torch.equal(codec.encode(narrow, KEY), codec.encode(narrow.float(), KEY)), dtype


def ignores_chunks(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """How much is encoded at once is a matter of speed."""
    tensor = values((50, 41))
    whole = codec.encode(tensor, KEY)
    decoded = codec.decode(whole, tensor.shape)
    with monkeypatch.context() as patch:
        patch.setattr(codecs.integer, "CHUNK", 24)
        patch.setattr(codecs.sign, "CHUNK", 32)
        assert torch.equal(codec.encode(tensor, KEY), whole)
        assert torch.equal(codec.decode(whole, tensor.shape), decoded)


# -------------------------------------------------------------------------------------------------------- non-finite


def shows_what_is_not_finite(codec: Codec) -> None:
    for shape in [(), (3,), (1000,), (40, 30)]:
        for wrong in (float("nan"), float("inf"), -float("inf")):
            for place in {0, values(shape).numel() // 2, values(shape).numel() - 1}:
                tensor = values(shape)
                tensor.view(-1)[place] = wrong
                state = codec.fresh(shape)
                kept = {name: entry.clone() for name, entry in state.items()}
                payload = codec.encode(tensor, KEY, state)
                assert not torch.isfinite(codec.decode(payload, shape)).all(), (shape, wrong, place)
                for name, entry in state.items():
                    assert torch.equal(entry, kept[name]), f"{name} changed"


# ------------------------------------------------------------------------------------------------------------- state


def keeps_no_secrets(codec: Codec) -> None:
    """All that is remembered lies in the state, whose tensors are never written to: a round can be taken back."""
    shape = (40, 30)
    state = codec.fresh(shape)
    codec.encode(values(shape, seed=1), KEY, state)
    kept = dict(state)
    copies = {name: entry.clone() for name, entry in state.items()}
    later = codec.encode(values(shape, seed=2), KEY, state)
    assert all(torch.equal(kept[name], copies[name]) for name in copies), "a tensor of the state was written to"
    for name, entry in codec.fresh(shape).items():
        assert state[name].shape == entry.shape and state[name].dtype == entry.dtype
    codec.encode(values(shape, seed=3), KEY, dict(codec.fresh(shape)))
    assert torch.equal(codec.encode(values(shape, seed=2), KEY, copies), later)


# ---------------------------------------------------------------------------------------------------------- feedback

SUMS_EXACTLY = (Exact, BFloat16, Float16, TopK, RandomK)
"""What these lose of whole numbers is a number of the dtype."""


def conserves_with_feedback(codec: Codec) -> None:
    """What was decoded and the residual are what was given: to the bit where arithmetic is exact, else to rounding."""
    codec = codec.codec if isinstance(codec, Feedback) else codec
    feedback = Feedback(codec)
    exact = isinstance(codec, SUMS_EXACTLY)
    dtype = torch.float32 if exact else torch.float64
    for shape in [(40, 30), (8, 3, 3, 3), (257,), (), (0, 4)]:
        state = feedback.fresh(shape, dtype)
        given, decoded = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        for number in range(12):
            tensor = values(shape, dtype, seed=number)
            tensor = (tensor * 200).round() if exact else tensor
            payload = feedback.encode(tensor, (0, number, 0, 0), state)
            given += tensor
            decoded += feedback.decode(payload, shape, dtype)
            total = decoded + state["residual"]
            assert torch.equal(total, given) if exact else torch.allclose(total, given, rtol=0, atol=1e-11), number


# ------------------------------------------------------------------------------------------------------------- data


def is_plain_data(codec: Codec) -> None:
    assert eval(repr(codec), vars(codecs)) == codec
    again = pickle.loads(pickle.dumps(codec))
    assert again == codec and hash(again) == hash(codec)
    assert torch.equal(again.encode(values((40, 30)), KEY), codec.encode(values((40, 30)), KEY))
    for field in fields(codec):
        with pytest.raises(FrozenInstanceError):
            setattr(codec, field.name, 1)
    with pytest.raises(FrozenInstanceError):
        codec.anything = 1


LAWS: list[Callable[[Codec], None]] = [
    states_its_bytes,
    owns_its_memory,
    reads_any_message,
    keeps_its_bound,
    zeros_stay,
    depends_on_its_arguments_alone,
    draws_from_its_key,
    is_unbiased_if_it_says_so,
    ignores_strides_and_dtypes,
    shows_what_is_not_finite,
    keeps_no_secrets,
    conserves_with_feedback,
    is_plain_data,
]
