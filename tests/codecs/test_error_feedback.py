"""Error feedback: nothing is lost, nothing that is not finite is kept, and it does what it is for."""

from __future__ import annotations

import codec_laws
import pytest
import torch
from codec_laws import ALL, KEY, values

from samestep.codecs import Codec, Exact, Feedback, Float16, Int4, Int8, PowerSGD, RandomK, Sign, TopK
from samestep.errors import MismatchError, NonFiniteError

BIASED = [codec for codec in ALL if not codec.unbiased and not isinstance(codec, Feedback)]


def nearest_point(codec: Codec, num_steps: int = 300) -> float:
    """Descend to a point over two replicas whose own minima are apart; return how far off the mean of them it ends.

    The codec takes each replica's gradient, decoded ones are averaged. Rates fall, so that noise dies out.
    """
    shape = (12, 10)
    minima = [3 * values(shape, seed=number) for number in range(2)]
    weights = torch.zeros(shape)
    states = [codec.fresh(shape) for _ in minima]
    for step in range(num_steps):
        total = torch.zeros(shape)
        for replica, (minimum, state) in enumerate(zip(minima, states, strict=True)):
            payload = codec.encode(weights - minimum, (0, step, replica, 0), state)
            total += codec.decode(payload, shape)
        weights -= 0.2 / (1 + step / 40) * total / len(minima)
    target = torch.stack(minima).mean(0)
    return float((weights - target).norm() / target.norm())


@pytest.mark.parametrize(
    "codec", [Int8(), Int4(), Int4(stochastic=False), TopK(0.1), RandomK(0.3), Sign(), PowerSGD(2)], ids=repr
)
def test_training_gets_there(codec: Codec):
    assert nearest_point(Feedback(codec)) < 0.1


@pytest.mark.parametrize("codec", [TopK(0.1), Sign(), PowerSGD(1)], ids=repr)
def test_without_it_training_ends_elsewhere(codec: Codec):
    """Else the test above would say nothing."""
    assert nearest_point(codec) > 4 * nearest_point(Feedback(codec))


def test_a_long_sum_is_met_however_coarse_each_round():
    """Gradients too small for float16 arrive in the end."""
    tensor = torch.full((10,), 1e-9)
    feedback, total = Feedback(Float16()), torch.zeros(10)
    state = feedback.fresh(tensor.shape)
    for number in range(1000):
        total += feedback.decode(feedback.encode(tensor, (number,), state), tensor.shape)
    assert torch.allclose(total, torch.full((10,), 1e-6), rtol=0.1, atol=0)


def test_it_is_exact_while_it_warms_up():
    feedback = Feedback(Sign(), warm_up=3)
    tensor = values((40, 30))
    state = feedback.fresh(tensor.shape)
    for step in range(5):
        codec = feedback.at(step)
        payload = codec.encode(tensor, (0, step), state)
        assert len(payload) == codec.num_bytes(tensor.shape)
        exact = step < 3
        assert len(payload) == (Exact() if exact else Sign()).num_bytes(tensor.shape)
        assert torch.equal(codec.decode(payload, tensor.shape), tensor) is exact
        assert bool(state["residual"].any()) is not exact
    assert Feedback(Sign()).at(0) == Feedback(Sign())


def test_the_state_of_the_codec_goes_on_through_the_warm_up():
    feedback = Feedback(PowerSGD(2), warm_up=1)
    state = feedback.fresh((40, 30))
    begin = state["q"]
    feedback.at(0).encode(values((40, 30)), KEY, state)
    assert state["q"] is begin
    feedback.at(1).encode(values((40, 30)), KEY, state)
    assert state["q"] is not begin


@pytest.mark.parametrize("codec", BIASED, ids=repr)
def test_a_bad_round_is_not_kept(codec: Codec):
    """After a NaN that was skipped, training goes on as if it had not been."""
    feedback = Feedback(codec)
    bad = values((40, 30), seed=2)
    bad[3, 4] = float("nan")
    rounds = [values((40, 30), seed=1), values((40, 30), seed=3)]
    with_it, without = feedback.fresh((40, 30)), feedback.fresh((40, 30))
    for number, tensor in enumerate(rounds):
        expected = feedback.encode(tensor, (number,), without)
        assert torch.equal(feedback.encode(tensor, (number,), with_it), expected)
        assert not torch.isfinite(feedback.decode(feedback.encode(bad, KEY, with_it), (40, 30))).all()


def test_a_residual_that_is_not_finite():
    feedback = Feedback(Int8())
    state = feedback.fresh((5,))
    state["residual"][2] = float("inf")
    with pytest.raises(NonFiniteError, match=r"residual of a tensor of shape \(5,\)"):
        feedback.encode(torch.ones(5), KEY, state)


def test_a_round_that_is_taken_back():
    feedback = Feedback(PowerSGD(2))
    state = feedback.fresh((40, 30))
    feedback.encode(values((40, 30), seed=1), KEY, state)
    kept = dict(state)
    first = feedback.encode(values((40, 30), seed=2), KEY, state)
    again = feedback.encode(values((40, 30), seed=2), KEY, kept)
    assert torch.equal(first, again)
    assert torch.equal(state["residual"], kept["residual"]) and torch.equal(state["q"], kept["q"])


@pytest.mark.parametrize("codec", [Feedback(Int8()), Feedback(PowerSGD(2), warm_up=1)], ids=repr)
def test_a_state_that_is_missing_begins_anew(codec: Codec):
    states = [{}, codec.fresh((40, 30))]
    for step in range(3):
        first, second = (codec.at(step).encode(values((40, 30), seed=step), (step,), state) for state in states)
        assert torch.equal(first, second)
    assert states[0].keys() == states[1].keys()


def test_a_state_of_another_tensor():
    for codec, name in [(Feedback(Int8()), "residual"), (PowerSGD(2), "q")]:
        with pytest.raises(MismatchError, match=f"{name!r} of shape"):
            codec.encode(values((40, 30)), KEY, codec.fresh((1, 30) if name == "residual" else (30, 40)))


def test_the_residual_has_the_sum_dtype():
    assert Feedback(Int8()).fresh((3,), torch.bfloat16)["residual"].dtype == torch.float32
    assert Feedback(Int8()).fresh((3,), torch.float64)["residual"].dtype == torch.float64
    codec_laws.conserves_with_feedback(Int8())
