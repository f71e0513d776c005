"""Epsilon against closed forms and another library; the budget stops in time; noise is what was asked for."""

import math
import sys

import pytest
import torch

from samestep.errors import BudgetError, SettingsError
from samestep.federated import privacy as module
from samestep.federated.extra import extra_module
from samestep.federated.privacy import Privacy


def exact_epsilon(mu, delta):
    """The epsilon of a normal mechanism whose means are `mu` deviations apart (Balle, Wang 2018)."""

    def normal(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    lo, hi = 0.0, 1e3
    for _ in range(100):
        middle = (lo + hi) / 2
        spent = normal(mu / 2 - middle / mu) - math.exp(middle) * normal(-mu / 2 - middle / mu) if middle < 700 else 0.0
        lo, hi = (middle, hi) if spent > delta else (lo, middle)
    return hi


def check_against_closed_form(noise, num_rounds, sampling):
    """With everybody in every round nothing is sampled, and rounds add up exactly."""
    sensitivity = 1 if sampling == "poisson" else 2
    exact = exact_epsilon(sensitivity * math.sqrt(num_rounds) / noise, 1e-5)
    found = Privacy(1.0, noise, 1e-5, sampling=sampling).epsilon(num_rounds, 1.0)
    assert exact <= found <= 1.15 * exact


@pytest.mark.parametrize("sampling", ["poisson", "fixed"])
@pytest.mark.parametrize("noise, num_rounds", [(5.0, 1), (5.0, 50), (20.0, 100)])
def test_epsilon_bounds_the_closed_form_closely(noise, num_rounds, sampling):
    check_against_closed_form(noise, num_rounds, sampling)


def test_a_planted_wrong_sensitivity_is_found(monkeypatch):
    right = module._epsilon
    monkeypatch.setattr(module, "_epsilon", lambda noise, *rest: right(2 * noise, *rest))
    with pytest.raises(AssertionError):
        check_against_closed_form(5.0, 50, "fixed")


@pytest.mark.parametrize(
    "noise, rate, num_rounds, other", [(1.0, 0.3, 100, 24.50596), (1.0, 0.01, 1000, 2.1014), (2.0, 0.1, 200, 3.6797)]
)
def test_epsilon_agrees_with_opacus(noise, rate, num_rounds, other):
    """Figures of RDPAccountant of Opacus 1.6.0 (more orders, so a little less) for the same sampling."""
    assert other * (1 - 1e-4) <= Privacy(1.0, noise, 1e-5).epsilon(num_rounds, rate) <= other * 1.01


def test_more_rounds_and_larger_samples_cost_and_noise_pays():
    base = Privacy(1.0, 1.0, 1e-5)
    assert base.epsilon(0, 0.1) == 0
    assert base.epsilon(10, 0.1) < base.epsilon(11, 0.1) < base.epsilon(11, 0.2)
    assert Privacy(1.0, 2.0, 1e-5).epsilon(10, 0.1) < base.epsilon(10, 0.1) < Privacy(1.0, 1.0, 1e-7).epsilon(10, 0.1)
    assert Privacy(1.0, 1.0, 1e-5, sampling="fixed").epsilon(10, 0.1) > base.epsilon(10, 0.1)
    assert Privacy(1.0, 0.0, 1e-5).epsilon(1, 0.1) == math.inf


def test_training_stops_before_the_budget_is_exceeded():
    privacy = Privacy(1.0, 1.0, 1e-5, budget=8.0)
    most = privacy.num_rounds(0.3)
    assert most > 1 and privacy.epsilon(most, 0.3) <= 8.0 < privacy.epsilon(most + 1, 0.3)
    for done in range(1, most + 1):
        privacy.check(done, 0.3)
    with pytest.raises(
        BudgetError, match=rf"budget=8\): with {most + 1} rounds .* so training stops after {most}, where"
    ):
        privacy.check(most + 1, 0.3)
    assert Privacy(1.0, 0.5, 1e-5, budget=0.01).num_rounds(1.0) == 0
    free = Privacy(1.0, 0.0, 1e-5)
    free.check(10**9, 0.3)
    assert free.num_rounds(0.3) is None


def noise_of(privacy, length, start=0, **where):
    flat = torch.zeros(length)
    privacy.add_noise(flat, start=start, **{"divisor": 4.0, "seed": 1, "round": 2, "parameter": 3, **where})
    return flat


def test_noise_has_the_stated_deviation_and_looks_normal():
    flat = noise_of(Privacy(3.0, 2.0, 1e-5), 200_000).double() / (2.0 * 3.0 / 4.0)
    assert abs(flat.mean()) < 5 / math.sqrt(200_000)
    assert abs(flat.square().mean() - 1) < 5 * math.sqrt(2 / 200_000)
    assert abs(flat.pow(4).mean() - 3) < 5 * math.sqrt(96 / 200_000)
    for bound, share in ((1.0, 0.317311), (2.0, 0.0455), (3.0, 0.0027)):
        found = float((flat.abs() > bound).double().mean())
        assert abs(found - share) < 5 * math.sqrt(share / 200_000)
    for distance in (1, 4096, 8192):
        assert abs((flat[:-distance] * flat[distance:]).mean()) < 5 / math.sqrt(200_000 - distance)


def test_any_part_of_the_noise_is_part_of_the_whole():
    privacy = Privacy(1.0, 1.0, 1e-5)
    whole = noise_of(privacy, 30_000)
    for start, stop in ((0, 1), (8191, 8193), (100, 20_000), (16_384, 30_000), (29_999, 30_000)):
        assert torch.equal(noise_of(privacy, stop - start, start), whole[start:stop])
    for other in ({"seed": 2}, {"round": 3}, {"parameter": 4}):
        assert not (noise_of(privacy, 30_000, **other) == whole).any()


def test_noise_is_added_to_what_is_there_and_0_adds_nothing():
    flat = torch.full((10,), 5.0)
    Privacy(1.0, 0.0, 1e-5).add_noise(flat, divisor=1.0, seed=0, round=0, parameter=0)
    assert torch.equal(flat, torch.full((10,), 5.0))
    Privacy(1.0, 1e-3, 1e-5).add_noise(flat, divisor=1.0, seed=0, round=0, parameter=0)
    assert 0 < (flat - 5).abs().max() < 0.01


def test_updates_are_clipped_to_the_stated_norm():
    privacy = Privacy(2.0, 1.0, 1e-5)
    update = [torch.full((100,), 3.0), torch.full((7,), -4.0)]
    factor = privacy.prepare(update)
    assert sum(float((flat * factor).double().square().sum()) for flat in update) == pytest.approx(4.0)
    assert privacy.prepare([torch.full((4,), 0.5)]) == 1.0
    assert privacy.prepare([torch.tensor([math.nan])]) == 0.0


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((0.0, 1.0, 1e-5), "clip=0.0"),
        ((1.0, -1.0, 1e-5), "noise=-1.0"),
        ((1.0, 1.0, 1.0), "delta=1.0"),
        ((1.0, 1.0, 1e-5, 0.0), "budget=0.0"),
        ((1.0, 0.0, 1e-5, 1.0), "budget=1.0\\) with noise=0"),
        ((1.0, 1.0, 1e-5, None, "some"), "sampling='some'"),
    ],
)
def test_what_cannot_work_is_said(arguments, words):
    with pytest.raises(SettingsError, match=words):
        Privacy(*arguments)


def test_a_rate_that_is_none_is_refused():
    with pytest.raises(SettingsError, match="sampling rate of 0"):
        Privacy(1.0, 1.0, 1e-5).epsilon(1, 0)


def test_without_the_extra_one_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    extra_module.cache_clear()
    with pytest.raises(SettingsError, match=r"needs the package dp-accounting.*pip install 'samestep\[privacy\]'"):
        Privacy(1.0, 1.2345, 1e-5).epsilon(1, 0.5)
    extra_module.cache_clear()
