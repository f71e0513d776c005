"""The wire: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from samestep.storage import wire

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=80)
    | st.just("$")
)
KEYS = st.text(max_size=4) | st.integers(-3, 3) | st.just("$") | st.tuples(st.integers(0, 2), st.text(max_size=2))
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=20,
)


@given(VALUES)
def test_plain_values_come_back(value):
    back = wire.unpack(wire.pack(value))
    assert back == value
    assert repr(back) == repr(value)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
DTYPES += [torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 5)])
def test_tensors_keep_every_bit(dtype, shape):
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = torch.frombuffer(bytearray(b"\1\0" * (num_bytes + 1)), dtype=torch.uint8)[:num_bytes]
    tensor = raw.view(dtype).reshape(shape)
    back = wire.unpack(wire.pack({"a": [tensor, 1]}))["a"][0]
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert bytes(wire.bytes_of(back)) == bytes(wire.bytes_of(tensor))


def test_strided_tensors_and_arrays():
    tensor = torch.arange(24.0).view(4, 6).t()[::2]
    assert torch.equal(wire.unpack(wire.pack(tensor)), tensor)
    array = np.arange(24.0).reshape(4, 6).T[::2]
    back = wire.unpack(wire.pack(array))
    assert isinstance(back, np.ndarray)
    assert np.array_equal(back, array)
    assert wire.unpack(wire.pack((np.float32(0.1), np.int64(3)))) == (float(np.float32(0.1)), 3)
    special = wire.unpack(wire.pack([math.nan, math.inf, -0.0, 5e-324]))
    assert [x.hex() for x in special] == [x.hex() for x in (math.nan, math.inf, -0.0, 5e-324)]


def test_unpacked_tensors_own_their_memory():
    frame = wire.pack([torch.zeros(4), torch.zeros(4)])
    first, second = wire.unpack(frame)
    first.fill_(9)
    assert second.sum() == 0
    assert wire.unpack(frame)[0].sum() == 0


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 1, 1j, [{"a": (1, object())}], np.array([object()])])
def test_what_cannot_cross_is_named(value):
    with pytest.raises(TypeError, match="value"):
        wire.pack(value)


def test_place_of_what_cannot_cross():
    with pytest.raises(TypeError, match=r"value\['a'\]\[1\] is a set"):
        wire.pack({"a": [1, {2}]})


@given(st.data())
def test_damaged_frames_do_not_crash(data):
    frame = bytearray(wire.pack({"x": [torch.arange(5), "text", (1, {2: b"abc"})]}))
    cut = data.draw(st.integers(0, len(frame)))
    frame = frame[:cut]
    if frame:
        frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ValueError):
        wire.unpack(bytes(frame))


def test_dtype_names():
    assert wire.name_of(torch.bfloat16) == "bfloat16"
    assert wire.dtype_named("int8") is torch.int8
    for name in ("nn", "int77", "load"):
        with pytest.raises(ValueError, match=name):
            wire.dtype_named(name)


@pytest.mark.parametrize("text", [b"1 ", b"[1]2", b'"\xc3\xbc"', b"", b" 1"])
def test_a_text_that_pack_does_not_write_is_no_frame(text):
    with pytest.raises(ValueError):
        wire.unpack(len(text).to_bytes(8, "little") + text)
