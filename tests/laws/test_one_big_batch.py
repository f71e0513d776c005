"""The law: a step is the one that a single big batch would make, to 1e-12 in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from playing import play
from torch.nn import functional as F
from zoo import MODELS, OPTIMIZERS, Perceptron, Transformer, texts, vectors

from samestep.core.randomness import seed_start

TOLERANCE = 1e-12


def assert_equal_to_big_batch(make: Callable, given: Callable, whole: Callable, **settings) -> None:
    """Hold the law.

    Args:
        make: () -> (model, optimizer).
        given: (step, model, batch) -> None; calls backward for a shard.
        whole: (model, batch) -> the loss of the whole batch.
        settings: data, batch_size, replicas, workers, clip_norm.
    """
    data, batch_size, clip_norm = settings["data"], settings["batch_size"], settings.get("clip_norm")

    def main(run):
        model, optimizer = make()
        run.replicate(model, optimizer)
        told = []
        for step in run.steps(data, batch_size=batch_size, epochs=1, shuffle=False):
            for batch in step:
                given(step, model, batch)
            step.update(clip_norm=clip_norm)
            told.append(step.loss)
        return told, [p.detach().clone() for p in model.parameters()]

    losses, weights = play(main, settings["replicas"], settings["workers"]).result
    seed_start(0)
    model, optimizer = make()
    for number, loss in enumerate(losses):
        rows = slice(number * batch_size, (number + 1) * batch_size)
        expected = whole(model, tuple(column[rows] for column in data))
        assert loss == pytest.approx(float(expected.detach()), abs=TOLERANCE, rel=TOLERANCE)
        optimizer.zero_grad()
        expected.backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
    moved = False
    for (name, parameter), weight in zip(model.named_parameters(), weights, strict=True):
        torch.testing.assert_close(weight, parameter.detach(), rtol=TOLERANCE, atol=TOLERANCE, msg=name)
        moved |= bool(parameter.grad is not None and parameter.grad.abs().max() > 1e-6)
    assert moved, "nothing was trained, so nothing was shown"


def doubled(data: tuple) -> tuple:
    return tuple(c.double() if c.is_floating_point() else c for c in data)


def maker(model: Callable, optimizer: str) -> Callable:
    """Return what makes a float64 model in eval mode, so that statistics and dropout do not depend on shards."""

    def make():
        made = model().double().eval()
        return made, OPTIMIZERS[optimizer](made.parameters())

    return make


@pytest.mark.parametrize(("replicas", "workers"), [(8, 3), (5, 2)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_uneven_shards(model, optimizer, replicas, workers):
    make, data, loss_of = MODELS[model]
    assert_equal_to_big_batch(
        maker(make, optimizer),
        lambda step, m, batch: step.backward(loss_of(m, batch)),
        loss_of,
        data=doubled(data()),
        batch_size=19,
        replicas=replicas,
        workers=workers,
    )


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_empty_shards(optimizer, workers):
    _, data, loss_of = MODELS["perceptron"]
    assert_equal_to_big_batch(
        maker(Perceptron, optimizer),
        lambda step, m, batch: step.backward(loss_of(m, batch)),
        loss_of,
        data=tuple(c[:10] for c in doubled(data())),
        batch_size=3,
        replicas=8,
        workers=workers,
    )


def _words_loss(model, batch):
    words, targets = batch
    return F.cross_entropy(model(words).flatten(0, 1), targets.flatten())


def _count_words(step, model, batch):
    count = int((batch[1] != -100).sum())
    if count:
        step.backward(_words_loss(model, batch), count=count)
    else:
        step.backward(model(batch[0]).sum() * 0, count=0)


@pytest.mark.parametrize("batch_size", [19, 7])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("clip_norm", [None, 0.2])
def test_counted_words(workers, clip_norm, batch_size):
    assert_equal_to_big_batch(
        maker(Transformer, "adamw"),
        _count_words,
        _words_loss,
        data=texts(),
        batch_size=batch_size,
        replicas=8,
        workers=workers,
        clip_norm=clip_norm,
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("workers", [1, 3])
def test_clipped(optimizer, workers):
    _, _, loss_of = MODELS["odd"]
    assert_equal_to_big_batch(
        maker(MODELS["odd"][0], optimizer),
        lambda step, m, batch: step.backward(10 * loss_of(m, batch)),
        lambda m, batch: 10 * loss_of(m, batch),
        data=doubled(vectors()),
        batch_size=19,
        replicas=8,
        workers=workers,
        clip_norm=0.5,
    )


def _twice(step, model, batch):
    x, y = batch
    step.backward(F.cross_entropy(model(x), y))
    step.backward(0.3 * model(x).square().mean(1))


def _once(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y) + 0.3 * model(x).square().mean()


@pytest.mark.parametrize("workers", [1, 3])
def test_two_backward_calls_of_which_one_is_a_vector(workers):
    data = doubled(vectors())
    assert_equal_to_big_batch(
        maker(Perceptron, "adamw"), _twice, _once, data=data, batch_size=19, replicas=8, workers=workers
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_vector_of_words(workers):
    """More losses than samples, so that each counts as an item."""

    def given(step, model, batch):
        words, targets = batch
        step.backward(F.cross_entropy(model(words).flatten(0, 1), targets.clamp(min=0).flatten(), reduction="none"))

    assert_equal_to_big_batch(
        maker(Transformer, "sgd"),
        given,
        MODELS["transformer"][2],
        data=texts(),
        batch_size=19,
        replicas=8,
        workers=workers,
    )
