"""The contract of every aggregation, found by reflection, and what each promises against liars."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samestep.errors import SettingsError
from samestep.federated import aggregation
from samestep.federated.aggregation import Aggregation, Median, NormBound, TrimmedMean, WeightedMean, clip_factor

EXAMPLES = [WeightedMean(), NormBound(2.0), TrimmedMean(), TrimmedMean(0.3), TrimmedMean(0.0), Median()]

every = pytest.mark.parametrize("recipe", EXAMPLES, ids=repr)


def stack_of(num_clients, num_elements, dtype=torch.float32, seed=0):
    return torch.randn(num_clients, num_elements, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights_of(num_clients):
    return [float(1 + 7 * i % 5) for i in range(num_clients)]


def prepared(recipe, stack):
    return torch.stack([row * recipe.prepare([row]) for row in stack])


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


def test_every_aggregation_has_an_example():
    assert {type(recipe) for recipe in EXAMPLES} == set(Aggregation.__subclasses__())


@every
def test_is_frozen_data(recipe):
    assert dataclasses.replace(recipe) == recipe and eval(repr(recipe), vars(aggregation)) == recipe
    assert hash(recipe) == hash(dataclasses.replace(recipe))
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.needs_all = True


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_clients_who_agree_are_followed(recipe, dtype):
    update = stack_of(1, 100, dtype)[0] / 10
    result = recipe.combine(update.expand(7, -1), weights_of(7))
    assert result.dtype == dtype and result.shape == update.shape
    torch.testing.assert_close(result, update, rtol=1e-6, atol=0)


def check_blocks(recipe, num_clients, cuts):
    stack, weights = stack_of(num_clients, 64), weights_of(num_clients)
    edges = [0, *sorted(cuts), 64]
    parts = [recipe.combine(stack[:, a:b], weights) for a, b in pairwise(edges)]
    assert same_bits(torch.cat(parts), recipe.combine(stack, weights))


@every
@settings(max_examples=20, deadline=None)
@given(st.integers(5, 40), st.lists(st.integers(1, 63), max_size=5, unique=True))
def test_any_division_into_blocks_gives_the_same_bits(recipe, num_clients, cuts):
    check_blocks(recipe, num_clients, cuts)


def test_a_planted_dependence_on_blocks_is_found(monkeypatch):
    monkeypatch.setattr(aggregation, "_sum_of_rows", lambda rows: rows.double().sum(0) + rows.mean())
    with pytest.raises(AssertionError):
        check_blocks(Median(), 9, [10, 20])


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_stack_is_not_changed(recipe, dtype):
    stack = stack_of(9, 50, dtype)
    before = stack.clone()
    recipe.combine(stack, weights_of(9))
    assert torch.equal(stack, before)


@every
def test_weights_count_where_they_are_said_to(recipe):
    stack = stack_of(9, 50)
    even, uneven = recipe.combine(stack, [1.0] * 9), recipe.combine(stack, weights_of(9))
    assert same_bits(even, uneven) == (not recipe.uses_weights)
    assert same_bits(recipe.combine(stack, [4 * w for w in weights_of(9)]), uneven)


@every
def test_what_streams_is_the_weighted_mean_of_prepared_updates(recipe):
    if recipe.needs_all:
        assert recipe.prepare([stack_of(1, 10)[0]]) == 1.0
        return
    stack, weights = prepared(recipe, stack_of(9, 50)), weights_of(9)
    expected = sum(row.double() * w for row, w in zip(stack, weights, strict=True)) / sum(weights)
    assert same_bits(recipe.combine(stack, weights), expected.float())


def check_liars(recipe, num_honest, num_liars, lie):
    """What liars say moves no element beyond the honest clients' values."""
    honest = stack_of(num_honest, 200)
    stack = torch.cat([honest, torch.full((num_liars, 200), lie)])[
        torch.randperm(num_honest + num_liars, generator=torch.Generator().manual_seed(3))
    ]
    result = recipe.combine(stack, [1.0] * len(stack))
    assert bool(((result >= honest.min(0).values) & (result <= honest.max(0).values)).all())


@pytest.mark.parametrize("lie", [1e30, -1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "recipe, num_honest, num_liars", [(TrimmedMean(0.2), 8, 2), (TrimmedMean(0.1), 9, 1), (Median(), 5, 4)]
)
def test_liars_stay_within_the_honest_range(recipe, num_honest, num_liars, lie):
    check_liars(recipe, num_honest, num_liars, lie)


@pytest.mark.parametrize(
    "recipe, num_honest, num_liars", [(WeightedMean(), 9, 1), (TrimmedMean(0.1), 8, 2), (Median(), 4, 5)]
)
def test_too_many_liars_are_seen_by_that_law(recipe, num_honest, num_liars):
    with pytest.raises(AssertionError):
        check_liars(recipe, num_honest, num_liars, 1e30)


def test_a_liar_shifts_a_bounded_mean_by_its_share_of_the_limit():
    recipe, honest = NormBound(2.0), stack_of(9, 50) / 10
    shares = [torch.cat([honest, lie[None]]) for lie in (torch.full((50,), 1e30), torch.zeros(50))]
    told, silent = (recipe.combine(prepared(recipe, stack), [1.0] * 10) for stack in shares)
    assert float((told - silent).norm()) <= 2.0 / 10 * (1 + 1e-6)


def test_medians_and_trimmed_means_of_known_numbers():
    column = torch.tensor([[5.0], [1.0], [4.0], [2.0], [100.0]])
    assert Median().combine(column, []).item() == 4
    assert Median().combine(column[:4], []).item() == 3
    assert TrimmedMean(0.2).combine(column, []).item() == pytest.approx(11 / 3)
    assert TrimmedMean(0.01).combine(column, []).item() == pytest.approx(11 / 3), "a share above 0 trims at least one"
    assert [TrimmedMean(0.1).num_trimmed(n) for n in (3, 10, 11, 20, 30)] == [1, 1, 2, 2, 3]
    assert 0.07 * 100 > 7 and TrimmedMean(0.07).num_trimmed(100) == 7


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=4), st.floats(1e-3, 1e3), st.floats(-20, 20))
def test_a_clipped_update_has_at_most_that_norm(lengths, limit, magnitude):
    update = [stack_of(1, length, seed=i)[0] * 10.0**magnitude for i, length in enumerate(lengths)]
    norm = math.sqrt(sum(float(flat.double().square().sum()) for flat in update))
    factor = clip_factor(update, limit)
    assert norm * factor <= limit * (1 + 1e-6)
    assert factor == 1.0 if norm <= limit * (1 - 1e-6) else factor == pytest.approx(min(1, limit / norm), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_to_be_left_out(bad):
    update = stack_of(1, 5000)[0]
    update[4321] = bad
    assert NormBound(1.0).prepare([torch.ones(3), update]) == 0.0


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: TrimmedMean(0.5), "share=0.5"),
        (lambda: TrimmedMean(-0.1), "share=-0.1"),
        (lambda: NormBound(0.0), "limit=0.0"),
        (lambda: NormBound(math.nan), "limit=nan"),
        (lambda: TrimmedMean(0.1).combine(torch.ones(2, 3), []), "at least 3 clients"),
        (lambda: Median().combine(torch.ones(0, 3), []), "no clients"),
        (lambda: WeightedMean().combine(torch.ones(2, 3), [1.0]), "2 clients"),
        (lambda: WeightedMean().combine(torch.ones(2, 3), [0.0, 0.0]), "not all 0"),
        (lambda: WeightedMean().combine(torch.ones(2, 3), [2.0, -1.0]), "none below 0"),
    ],
)
def test_what_cannot_work_is_said(make, words):
    with pytest.raises(SettingsError, match=words):
        make()
