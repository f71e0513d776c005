"""Values become words within the stated error; sums of words are exact within the stated capacity."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samestep.errors import NonFiniteError, SettingsError
from samestep.federated.fixed_point import FixedPoint

numbers_of = st.builds(
    FixedPoint,
    limit=st.floats(1e-6, 1e6),
    bits=st.integers(2, 32),
    modulus_bits=st.sampled_from([32, 64]),
    rounding=st.sampled_from(["stochastic", "nearest"]),
)


@settings(max_examples=100, deadline=None)
@given(numbers_of, st.integers(0, 1000), st.sampled_from([torch.float32, torch.float64]))
def test_the_error_is_as_stated(numbers, seed, dtype):
    values = (torch.rand(300, generator=torch.Generator().manual_seed(seed)).to(dtype) * 3 - 1.5) * numbers.limit
    values[:4] = torch.tensor([0.0, numbers.limit, -numbers.limit, math.nextafter(0, 1)], dtype=dtype)
    before = values.clone()
    words = numbers.encode(values, (seed,))
    assert words.dtype == numbers.dtype and torch.equal(values, before)
    assert int(words.abs().max()) <= numbers.levels
    clipped = values.double().clamp(-numbers.limit, numbers.limit)
    assert float((numbers.decode(words) - clipped).abs().max()) <= numbers.error * (1 + 1e-9)
    assert words[0] == 0


@settings(max_examples=50, deadline=None)
@given(numbers_of, st.data())
def test_sums_within_the_capacity_are_exact(numbers, data):
    num_clients = data.draw(st.integers(1, min(numbers.capacity, 30)))
    values = torch.full((4,), numbers.limit) * torch.tensor([1.0, -1.0, 0.5, 0.0])
    words = [numbers.encode(values, (client,)) for client in range(num_clients)]
    total = torch.zeros(4, dtype=numbers.dtype)
    for part in words:
        numbers.add(total, part)
    assert total.tolist() == [sum(int(part[i]) for part in words) for i in range(4)]
    numbers.check_capacity(numbers.capacity)


def test_one_more_than_the_capacity_is_refused_and_would_wrap():
    numbers = FixedPoint(limit=1.0, bits=31)
    total, one = torch.zeros(1, dtype=torch.int32), numbers.encode(torch.ones(1))
    for _ in range(numbers.capacity + 1):
        numbers.add(total, one)
    assert total.item() < 0
    with pytest.raises(SettingsError, match="at most 2 clients can be added, but a round has 3.*modulus_bits=64"):
        numbers.check_capacity(numbers.capacity + 1)


def test_stochastic_rounding_is_unbiased_and_of_its_draws_alone():
    numbers = FixedPoint(limit=127.0, bits=8)
    words = numbers.encode(torch.full((100_000,), 0.3), (1, 2))
    assert set(words.tolist()) == {0, 1}
    assert abs(words.double().mean().item() - 0.3) < 5 * math.sqrt(0.21 / 100_000)
    assert torch.equal(words, numbers.encode(torch.full((100_000,), 0.3), (1, 2)))
    assert not torch.equal(words, numbers.encode(torch.full((100_000,), 0.3), (1, 3)))
    assert not torch.equal(words[: 1 << 15], words[1 << 16 : (1 << 16) + (1 << 15)]), "chunks share no draws"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_word(bad):
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        FixedPoint(limit=1.0).encode(torch.tensor([0.0, bad]))


@pytest.mark.parametrize(
    "setting", [{"limit": 0.0}, {"bits": 1}, {"bits": 33}, {"modulus_bits": 16}, {"rounding": "up"}]
)
def test_what_cannot_work_is_said(setting):
    ((name, value),) = setting.items()
    with pytest.raises(SettingsError, match=f"You set {name}={value!r}"):
        FixedPoint(**{"limit": 1.0, **setting})
