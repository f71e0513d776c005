"""The law: what is not finite never reaches the weights, and updates are skipped alike by any number of workers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from playing import assert_same_bits, play, replaced
from refusing import made, refused, train
from test_resume import assert_resumed_is_never_stopped
from zoo import Convolutional, Perceptron, classes_loss, images, vectors

import samestep.core.finite as finite
from samestep.errors import MismatchError, NonFiniteError
from samestep.loop.recipe import Keeping

FLEETS = [(8, 1), (8, 2), (8, 3), (8, 8), (5, 1), (5, 2), (1, 1)]


class _Spoilt(torch.autograd.Function):
    """Adds nothing to a loss, and `bad` to one element of a parameter's gradient."""

    @staticmethod
    def forward(ctx, loss, parameter, bad):
        ctx.bad, ctx.like = bad, parameter
        return loss.clone()

    @staticmethod
    def backward(ctx, slope):
        gradient = torch.zeros_like(ctx.like)
        gradient.view(-1)[-1] = ctx.bad
        return slope, gradient, None


def spoilt(loss: torch.Tensor, parameter: torch.Tensor, bad: float) -> torch.Tensor:
    """Return `loss`; backward from it also adds `bad` to the last element of the parameter's gradient."""
    return _Spoilt.apply(loss, parameter, bad)


def state(model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return copies of all weights, buffers, and optimizer state."""
    states = [v for o in optimizers for p in model.parameters() for v in o.state.get(p, {}).values()]
    return [t.detach().clone() for t in (*model.state_dict().values(), *states)]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def skipping(
    run,
    *,
    bad: float = math.nan,
    rule: Any = "skip",
    choices: Any = None,
    make_optimizer: Any = torch.optim.AdamW,
) -> Any:
    """Two epochs; the gradient of one sample is not finite, nor is the loss of another one in the second epoch."""
    model = Convolutional()
    optimizer = make_optimizer(model.parameters(), lr=3e-3)
    run.replicate(model, optimizer, nonfinite=rule)
    x, y = images()
    data = x, y, torch.arange(len(x))
    told = []
    for step in run.steps(data, batch_size=19, epochs=2):
        before = state(model, optimizer)
        seen, is_replayed = 0, True
        for *batch, ids in step:
            is_replayed = False
            loss = classes_loss(model, batch)
            seen += bool((ids == 33).any()) + bool((ids == 7).any()) * step.epoch
            if (ids == 33).any():
                loss = spoilt(loss, model.inner.weight, bad)
            if (ids == 7).any() and step.epoch == 1:
                loss = loss * math.inf
            step.backward(loss)
            step.mean(seen=seen > 0, drawn=torch.rand(()))
        step.update(**(choices or {}))
        is_bad = step.means["seen"] > 0
        assert step.skipped == is_bad
        unchanged = equal(before, state(model, optimizer))
        assert is_replayed or unchanged == is_bad, "weights, buffers or state changed in a skipped step"
        told.append([step.number, step.loss, step.means["drawn"], step.skipped, run.digest(), float(torch.rand(()))])
        told.append(step.grad_norm if choices and "clip_norm" in choices else None)
    assert all(bool(torch.isfinite(t).all()) for t in state(model, optimizer))
    return told


def same_bits_if_skipped(folder) -> None:
    """The law, as the planted faults hold it."""
    played = assert_same_bits(skipping, [(8, 1), (8, 3)])
    assert any(skipped for _, _, _, skipped, *_ in played.result[::2])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_skipped_alike(bad):
    played = assert_same_bits(partial(skipping, bad=bad), FLEETS)
    flags = [entry[3] for entry in played.result[::2]]
    assert played.steps == len(flags) == 6
    assert 2 <= sum(flags) <= 3


CHOICES = {
    "clipped": {"choices": {"clip_norm": 0.5}},
    "measured": {"choices": {"clip_norm": math.inf}},
    "transformed": {"choices": {"transform": lambda name, g: g + 0.01 * torch.randn_like(g)}},
    "whole": {"make_optimizer": torch.optim.Adafactor},
    "some in a row": {"rule": 3},
}


@pytest.mark.parametrize("name", CHOICES)
def test_skipped_alike_with(name):
    assert_same_bits(partial(skipping, **CHOICES[name]), [(8, 1), (8, 3), (1, 1)])


def test_resumed_across_skipped_steps(tmp_path):
    assert_resumed_is_never_stopped(skipping, tmp_path, 5, [2, 1, 3])


def test_nothing_changes_where_all_is_finite():
    def main(run, rule):
        model, _ = made(run, nonfinite=rule)
        train(run, model)

    assert play(partial(main, rule="stop"), 4, 2).as_words() == play(partial(main, rule="skip"), 4, 2).as_words()


def failing_from(run, first: int, last: int, rule: Any, steps: int = 9) -> list[bool]:
    """Gradients of steps `first` to `last` are not finite."""
    model, _ = made(run, nonfinite=rule)
    told = []
    for step in run.steps(vectors(), batch_size=19, steps=steps):
        for batch in step:
            loss = classes_loss(model, batch)
            step.backward(spoilt(loss, model.first.bias, math.nan) if first <= step.number <= last else loss)
        step.update()
        told.append(step.skipped)
    return told


def small_ones_too(folder) -> None:
    """The law: it holds for a gradient of a few elements as for a large one."""
    refused(NonFiniteError, ["'first.bias' is NaN or infinite in step 2"], lambda r: failing_from(r, 2, 2, "stop"))


def test_some_in_a_row():
    assert play(lambda run: failing_from(run, 2, 4, 3), 4, 2).result == [False] * 2 + [True] * 3 + [False] * 4
    words = ["'first.bias' is NaN or infinite in step 5, replica 0 ", "3 updates in a row", "nonfinite=3"]
    refused(NonFiniteError, words, lambda run: failing_from(run, 2, 5, 3))
    refused(NonFiniteError, ["step 3, ", "update before was skipped"], lambda run: failing_from(run, 2, 5, 1))


def test_some_in_a_row_across_a_resume(tmp_path):
    """Skips before the checkpoint count."""
    with pytest.raises(NonFiniteError, match="step 5, "):
        play(
            lambda run: failing_from(run, 2, 6, 3), 4, 2, keeping=Keeping(checkpoint=str(tmp_path), every=1, keep=1000)
        )
    found = sorted(tmp_path.glob("step-*"))
    assert len(found) == 5
    for path in found:
        keeping = Keeping(resume=str(path))
        with pytest.raises(NonFiniteError, match=r"step 5, .*3 updates in a row"):
            play(lambda run: failing_from(run, 2, 6, 3), 4, 1, keeping=keeping)
        assert play(lambda run: failing_from(run, 2, 6, "skip"), 4, 1, keeping=keeping).result.count(True) == 5


def test_resumed_under_a_rule_that_does_not_skip(tmp_path):
    keeping = Keeping(checkpoint=str(tmp_path), every=2, keep=1000)
    play(lambda run: failing_from(run, 2, 3, "skip", steps=6), 4, 2, keeping=keeping)
    early, late = sorted(tmp_path.glob("step-*"))[:2]
    with pytest.raises(MismatchError, match=r"skipped an update .*'first.bias'.* step 2, .*nonfinite='stop'"):
        play(lambda run: failing_from(run, 2, 3, "stop", steps=6), 4, 1, keeping=Keeping(resume=str(late)))
    with pytest.raises(NonFiniteError, match="step 2, "):
        play(lambda run: failing_from(run, 2, 3, "stop", steps=6), 4, 1, keeping=Keeping(resume=str(early)))


def adversarial(run, rule: Any = 2) -> Any:
    """Two optimizers in turn. The second one's gradients fail in some steps; others' gradients are dropped."""
    first, second = Perceptron(), Perceptron()
    of_first = torch.optim.Adam(first.parameters(), lr=1e-3)
    of_second = torch.optim.SGD(second.parameters(), lr=0.05, momentum=0.9)
    run.replicate(first, second, of_first, of_second, nonfinite=rule)
    told = []
    for step in run.steps(vectors(), batch_size=19, steps=6):
        for batch in step:
            loss = classes_loss(first, batch)
            # Not of the optimizer that is updated now: dropped, and no reason to skip.
            step.backward(spoilt(loss, second.last.bias, math.nan))
        step.update(of_first)
        told.append(step.skipped)
        for batch in step:
            loss = classes_loss(first, batch) + classes_loss(second, batch)
            step.backward(spoilt(loss, second.last.weight, math.nan) if step.number in (1, 3, 4) else loss)
        step.update(of_second)
        told.append([step.skipped, run.digest()])
    return told


def test_two_optimizers(tmp_path):
    played = assert_same_bits(adversarial, [(8, 1), (8, 2), (8, 3), (1, 1)])
    assert played.result[::2] == [False] * 6
    assert [skipped for skipped, _ in played.result[1::2]] == [False, True, False, True, True, False]
    # Updates of the other optimizer in between do not end a row.
    refused(NonFiniteError, ["'1:last.weight'", "step 4, "], partial(adversarial, rule=1))
    assert_resumed_is_never_stopped(adversarial, tmp_path, 4, [2, 1])


def stops_and_names(folder) -> None:
    """The law: an error names step, replica, samples, and the first parameter."""

    def main(run):
        model, _ = made(run)
        data = (*vectors(), torch.arange(53))
        for step in run.steps(data, batch_size=19, steps=3, shuffle=False):
            for *batch, ids in step:
                loss = classes_loss(model, batch)
                if (ids == 33).any():
                    loss = spoilt(spoilt(loss, model.inner.weight, math.inf), model.last.bias, math.nan)
                step.backward(loss)
            step.update()

    words = [r"gradients of 2 parameters, 'inner\.weight' to 'last\.bias'", r"step 1, replica 3 \(samples .*\b33\b"]
    refused(NonFiniteError, words, main, workers=(1, 3, 4))
    refused(NonFiniteError, ["step 1, replica 0 "], main, workers=(1,), replicas=1)


def test_stops_and_names():
    stops_and_names(None)


def copied_in_pieces(folder) -> None:
    """The laws, where all but the smallest gradients are copied in pieces; and that makes no difference."""
    whole = play(skipping, 4, 2).as_words()
    with replaced(finite, "CHUNK", 1024):
        assert play(skipping, 4, 2).as_words() == whole
        assert_same_bits(partial(skipping, bad=math.inf), [(4, 1), (4, 3), (4, 4)])
        stops_and_names(folder)
        sums_are_looked_at(folder)
        assert_same_bits(half_weights, [(4, 1), (4, 4)])


def half_weights(run) -> Any:
    return large(run, 5e3 * 16, dtype=torch.float16)


def test_copied_in_pieces():
    assert torch.get_num_threads() == 1, "else nothing is copied in pieces"
    copied_in_pieces(None)


# ------------------------------------------------------------------------------------------- large, and still finite


def large(run, size: float, rule: Any = "skip", times: int = 1, dtype: Any = None, **choices: Any) -> Any:
    """One element's gradient has `size` in each replica; it arrives `times` in each."""
    model = Perceptron().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-38 if dtype is None else 1e-3)
    run.replicate(model, optimizer, nonfinite=rule)
    told = []
    for step in run.steps(vectors(), batch_size=16, steps=2):
        for x, y in step:
            for _ in range(times):
                step.backward(spoilt(classes_loss(model, (x.to(dtype), y)), model.inner.weight, size / step.size))
        step.update(**choices)
        told.append([step.skipped, run.digest()])
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    return told


BIG = [(8, 1), (8, 2), (8, 3), (5, 1), (5, 2)]


def sums_are_looked_at(folder) -> None:
    """The law: where each replica's gradient is finite and their sum is not, the weights stay."""
    (first, second) = assert_same_bits(partial(large, size=1.5e38 * 16), BIG[:2]).result
    assert first[0], "a sum that overflows was used"
    assert first == second


def test_sums_that_overflow():
    sums_are_looked_at(None)
    (told, _) = assert_same_bits(partial(large, size=1.5e38 * 16), BIG).result
    assert told[0]
    words = [r"gradient of 'inner\.weight', summed over the replicas, is NaN or infinite in step 0"]
    refused(NonFiniteError, words, partial(large, size=1.5e38 * 16, rule="stop"))
    told, _ = assert_same_bits(partial(large, size=1.5e38 * 16, clip_norm=1.0), BIG).result
    assert told[0]


@pytest.mark.parametrize("clip_norm", [None, 1.0, math.inf])
def test_large_gradients_are_legal(clip_norm):
    """Their squares overflow, they do not."""
    first, second = assert_same_bits(partial(large, size=1e37 * 16, rule="stop", clip_norm=clip_norm), BIG).result
    assert (first[1] != second[1]) == (clip_norm != 1.0), "the rate is too small for a clipped gradient to count"


def test_half_weights():
    """Sums are in float32, and rounded to float16: that may overflow."""
    half = partial(large, dtype=torch.float16, rule="skip")
    first, second = assert_same_bits(partial(half, size=3e4 * 16), BIG).result
    assert first[0] and first == second, "8 x 30,000 is no float16"
    first, second = assert_same_bits(partial(half, size=5e3 * 16), BIG).result
    assert not first[0]
    assert first[1] != second[1]
    first, _ = assert_same_bits(partial(half, size=3e4 * 16, clip_norm=1.0), BIG).result
    assert not first[0], "clipped, it fits"


def test_transform_that_makes_nan():
    def main(run, rule, **choices):
        model, _ = made(run, nonfinite=rule)
        told = []
        for step in run.steps(vectors(), batch_size=19, steps=3):
            for batch in step:
                step.backward(classes_loss(model, batch))
            wrong = step.number == 1
            step.update(transform=lambda name, g, wrong=wrong: g / 0 if wrong and name == "last.bias" else g, **choices)
            told.append([step.skipped, run.digest()])
        return told

    for choices in ({}, {"clip_norm": 1.0}):
        played = assert_same_bits(partial(main, rule="skip", **choices), [(4, 1), (4, 3)])
        assert [skipped for skipped, _ in played.result] == [False, True, False]
    refused(NonFiniteError, [r"'last\.bias', after transform, .* step 1"], partial(main, rule="stop"))


def test_a_scaler_is_left_to_skip_by_itself():
    """Under "stop", an overflow of scaled gradients skips the update and shrinks the scale, as before."""

    def main(run):
        model = Perceptron()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        run.replicate(model, optimizer, scaler, nonfinite="stop")
        told = []
        for step in run.steps(vectors(), batch_size=19, steps=4):
            for batch in step:
                loss = scaler.scale(classes_loss(model, batch))
                step.backward(spoilt(loss, model.first.bias, math.inf) if step.number in (1, 2) else loss)
            step.update(scaler=scaler)
            told.append([step.skipped, scaler.get_scale()])
        return told

    played = assert_same_bits(main, [(4, 1), (4, 3)])
    assert played.result == [[False, 2.0**10], [True, 2.0**9], [True, 2.0**8], [False, 2.0**8]]
