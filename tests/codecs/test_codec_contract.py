"""Every codec keeps every law; those that only some have are here one by one."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator

import codec_laws
import pytest
import torch
from codec_laws import ALL, CODECS, KEY, LAWS, round_trip, values
from hypothesis import given, settings
from hypothesis import strategies as st

from samestep.codecs import BFloat16, Codec, Exact, Feedback, Float16, Int4, Int8, PowerSGD, RandomK, Sign, TopK
from samestep.codecs.noise import Noise, seed_of
from samestep.errors import MismatchError, SettingsError


def classes_of(above: type) -> Iterator[type[Codec]]:
    for below in above.__subclasses__():
        yield from classes_of(below)
        if not inspect.isabstract(below) and below.__module__.startswith("samestep."):
            yield below


def test_every_codec_is_looked_at():
    assert set(classes_of(Codec)) == set(CODECS)
    assert set(CODECS) - {Feedback} == set(codec_laws.BOUNDS)
    assert all(kind.__doc__ and "Error:" in kind.__doc__ for kind in CODECS)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("codec", ALL, ids=repr)
def test_law(codec: Codec, law):
    law(codec)


PINNED_NOISE = [36191, 30949, 35744, 35121]
PINNED = {
    "Int8(block=256, stochastic=True)": "7ee2f8ad77c78492",
    "Int4(block=128, stochastic=True)": "9c4ff48f63e8b902",
    "TopK(share=0.1)": "f8f0c1caa030b688",
    "RandomK(share=0.1)": "afcc052c1e04721c",
    "Sign(block=64)": "70ddb7b482334300",
}


@pytest.mark.parametrize("codec", ALL, ids=repr)
def test_chunks(codec: Codec, monkeypatch: pytest.MonkeyPatch):
    codec_laws.ignores_chunks(codec, monkeypatch)


BAD = [
    (lambda: Int8(block=0), "block=0"),
    (lambda: Int8(block=3), "block=3"),
    (lambda: Int8(block=256.0), "block=256.0"),
    (lambda: Int4(block=-2), "block=-2"),
    (lambda: Sign(block=12), "block=12"),
    (lambda: Sign(block=0), "block=0"),
    (lambda: TopK(0), "share=0"),
    (lambda: TopK(1.5), "share=1.5"),
    (lambda: TopK(float("nan")), "share=nan"),
    (lambda: RandomK(share=-0.1), "share=-0.1"),
    (lambda: RandomK("1%"), "share='1%'"),
    (lambda: PowerSGD(0), "rank=0"),
    (lambda: PowerSGD(2.5), "rank=2.5"),
    (lambda: Feedback(Int8), "Int8"),
    (lambda: Feedback(Feedback(Int8())), "Feedback"),
    (lambda: Feedback(Int8(), warm_up=-1), "warm_up=-1"),
    (lambda: Int8().encode(torch.arange(5)), "torch.int64"),
    (lambda: TopK().encode(torch.eye(3).to_sparse()), "torch.sparse_coo"),
    (lambda: Exact().encode(torch.zeros(3, dtype=torch.complex64)), "torch.complex64"),
]


@pytest.mark.parametrize(("make", "says"), BAD, ids=[says for _, says in BAD])
def test_bad_arguments(make, says: str):
    with pytest.raises(SettingsError) as caught:
        make()
    assert says in str(caught.value)


@pytest.mark.parametrize("codec", ALL, ids=repr)
def test_bytes_of_another_tensor(codec: Codec):
    payload = codec.encode(values((40, 30)), KEY)
    for wrong, shape in [(payload[:-1], (40, 30)), (payload, (41, 31)), (payload.view(torch.int8), (40, 30))]:
        with pytest.raises(MismatchError, match=r"bytes, but got"):
            codec.decode(wrong, shape)


FLOATS = st.one_of(st.floats(width=32), st.floats(-10, 10, width=32), st.sampled_from([0.0, -0.0, 1e-45, 3.4e38]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(ALL), st.lists(FLOATS, max_size=40), st.integers(0, 2**64))
def test_any_elements(codec: Codec, elements: list[float], key: int):
    """The bound holds, or what is decoded is not finite; never one for a tensor that is not."""
    tensor = torch.tensor(elements)
    decoded = round_trip(codec, tensor, (key,))
    inner = codec.codec if isinstance(codec, Feedback) else codec
    if not torch.isfinite(tensor).all():
        assert not torch.isfinite(decoded).all()
    elif torch.isfinite(decoded).all():
        codec_laws.BOUNDS[type(inner)](inner, tensor.double(), decoded.double())
    else:
        assert isinstance(inner, BFloat16 | Float16)


# ----------------------------------------------------------------------------------------------------------- integers


def test_only_the_block_is_lost_that_is_not_finite():
    tensor = values((1000,))
    tensor[300] = float("inf")
    for codec in (Int8(block=100), Int4(block=100), Sign(block=8)):
        lost = ~torch.isfinite(round_trip(codec, tensor))
        block = codec.block
        assert torch.equal(torch.nonzero(lost)[:, 0], torch.arange(300 // block * block, 300 // block * block + block))


def test_whole_numbers_are_exact():
    tensor = torch.arange(-127.0, 128)
    for codec in (Int8(), Int8(stochastic=False)):
        assert torch.equal(round_trip(codec, tensor), tensor)
    assert torch.equal(round_trip(Int4(), torch.arange(-7.0, 8)), torch.arange(-7.0, 8))


def test_an_elements_noise_does_not_depend_on_the_others():
    """Block by block: what comes later in a tensor does not change what comes before."""
    tensor = values((1024,))
    long = round_trip(Int8(), tensor)
    assert torch.equal(round_trip(Int8(), tensor[:512]), long[:512])


# ------------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_of_equal_elements_the_first_are_sent(share: float):
    tensor = torch.ones(100) * torch.tensor([1.0, -1.0]).repeat(50)
    sent = torch.nonzero(round_trip(TopK(share), tensor))[:, 0]
    assert torch.equal(sent, torch.arange(round(100 * share)))
    tensor[70] = 2
    sent = torch.nonzero(round_trip(TopK(0.03), tensor))[:, 0]
    assert sent.tolist() == [0, 1, 70]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_every_element_has_the_same_chance(share: float):
    count, num_keys = 50, 800
    hits = torch.zeros(count)
    for number in range(num_keys):
        sent = round_trip(RandomK(share), torch.ones(count), (number,))
        assert int(sent.sum()) == round(share * count), "an element was drawn twice"
        hits += sent
    spread = (share * (1 - share) / num_keys) ** 0.5
    assert ((hits / num_keys - share).abs() < 5.5 * spread).all()


def test_a_damaged_list_of_positions():
    codec = TopK(0.01)
    payload = codec.encode(values((1000,)))
    payload[-1] = 255
    with pytest.raises(MismatchError, match="positions"):
        codec.decode(payload, (1000,))


def test_positions_take_the_shorter_form():
    assert TopK(0.01).num_bytes((1000,)) == 10 * (4 + 4)
    assert TopK(0.5).num_bytes((1000,)) == 500 * 4 + 125
    assert TopK(1e-9).num_bytes((1 << 33,)) == 9 * 4 + (1 << 30), "positions do not fit into 4 bytes"


# --------------------------------------------------------------------------------------------------------------- rank


def matrix_of_rank(rank: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return values((rows, rank), dtype, 1) @ values((rank, columns), dtype, 2)


@pytest.mark.parametrize("scale", [1, 1e-20, 1e-33, 1e30])
def test_low_rank_is_met_at_once(scale: float):
    for rank in (1, 3):
        matrix = matrix_of_rank(rank, 50, 40) * scale
        decoded = round_trip(PowerSGD(3), matrix)
        assert float((decoded / scale - matrix / scale).norm()) < 1e-4 * float((matrix / scale).norm())


def test_the_error_is_what_the_projection_leaves():
    matrix = values((50, 40), torch.float64)
    codec = PowerSGD(3)
    payload = codec.encode(matrix, KEY)
    right = payload.view(torch.float64)[50 * 3 :]
    error = (matrix - codec.decode(payload, matrix.shape, matrix.dtype)).norm() ** 2
    assert torch.isclose(error, matrix.norm() ** 2 - right.norm() ** 2, rtol=1e-10)


def test_rounds_come_near_the_best_approximation():
    """The power iteration goes on from round to round: that is what Q is kept for."""
    matrix = values((60, 40), torch.float64) + 8 * matrix_of_rank(2, 60, 40, torch.float64)
    codec, best = PowerSGD(2), torch.linalg.svdvals(matrix)[2:].norm()
    state = codec.fresh(matrix.shape, matrix.dtype)
    errors = []
    for number in range(8):
        payload = codec.encode(matrix * (-1) ** number * 1e3**number, KEY, state)
        decoded = codec.decode(payload, matrix.shape, matrix.dtype) * (-1) ** number / 1e3**number
        errors.append(float((matrix - decoded).norm()))
    assert errors[-1] < 1.0001 * best < errors[0]


def test_what_goes_as_it_is():
    codec = PowerSGD(4)
    for shape in [(), (1000,), (1, 1000), (1000, 1), (5, 4), (0, 7)]:
        assert codec.num_bytes(shape) == Exact().num_bytes(shape)
        assert codec.fresh(shape) == {}
        assert torch.equal(round_trip(codec, values(shape)), values(shape))
    assert codec.num_bytes((64, 3, 3, 3)) == (64 + 27) * 4 * 4
    assert codec.num_bytes((2, 1000)) == 2000 * 4, "two factors of rank 2 would be larger"


def test_a_matrix_may_vanish_and_come_back():
    codec, shape = PowerSGD(2), (30, 20)
    state = codec.fresh(shape)
    for _ in range(2):
        assert not codec.decode(codec.encode(torch.zeros(shape), KEY, state), shape).any()
    matrix = matrix_of_rank(2, *shape)
    for _ in range(2):
        decoded = codec.decode(codec.encode(matrix, KEY, state), shape)
    assert float((decoded - matrix).norm()) < 1e-4 * float(matrix.norm())


# -------------------------------------------------------------------------------------------------------------- other


def test_what_overflows_is_seen():
    assert round_trip(Float16(), torch.tensor([70_000.0]))[0] == float("inf")


def test_bits_do_not_change_between_releases():
    """A recipe's result would change with them. (PowerSGD's come from the linear algebra library.)"""
    assert Noise(seed_of(KEY)).uint16(4).tolist() == PINNED_NOISE
    tensor = (torch.arange(1000) ** 2 % 37 - 18).float()
    found = {
        repr(codec): hashlib.sha256(codec.encode(tensor, KEY).numpy().tobytes()).hexdigest()[:16]
        for codec in (Int8(), Int4(), TopK(0.1), RandomK(0.1), Sign(64))
    }
    assert found == PINNED
