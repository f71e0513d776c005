"""Laws that a review found broken: each of these once went wrong without a word."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
import torch
from playing import play
from torch import nn
from torch.nn import functional as F

from samestep.errors import MismatchError, SettingsError, UsageError
from samestep.loop.recipe import Keeping
from samestep.storage import checkpoint

_g = torch.Generator().manual_seed(3)
DATA = torch.randn(48, 6, generator=_g), torch.randint(0, 3, (48,), generator=_g)


def made(run, **settings):
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **settings)
    run.replicate(model, optimizer)
    return model, optimizer


def trained(run, model, step):
    for x, y in step:
        step.backward(F.cross_entropy(model(x), y))
    step.update()


@pytest.mark.parametrize("place", ["before", "between"])
@pytest.mark.parametrize("workers", [1, 2])
def test_resume_from_inside_a_step(place, workers, tmp_path):
    def main(folder):
        def body(run):
            model, _ = made(run)
            for step in run.steps(DATA, batch_size=12, epochs=2):
                if step.number == 3 and place == "before":
                    run.save(folder)
                trained(run, model, step)
                if step.number == 3 and place == "between":
                    run.save(folder)
                trained(run, model, step)
            return step.loss

        return body

    whole = play(main(str(tmp_path / "a")), 4, 1)
    saved = checkpoint.steps_in(tmp_path / "a")[0]
    resumed = play(main(str(tmp_path / "b")), 4, workers, keeping=Keeping(resume=str(saved)))
    assert resumed.exactly_once
    assert resumed.as_words() == whole.as_words()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_generators_after_a_transform_that_draws(workers):
    def main(run):
        model, _ = made(run)
        drawn = []
        for step in run.steps(DATA, batch_size=12, epochs=1):
            for x, y in step:
                step.backward(F.cross_entropy(model(x), y))
            step.update(transform=lambda name, grad: grad + 0.01 * torch.randn(grad.shape))
            drawn.append((float(torch.rand(())), random.random()))
        return drawn

    assert play(main, 4, workers).as_words() == play(main, 4, 1).as_words()


def test_a_backward_that_failed_is_not_committed():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("out of memory, say")

    def main(run):
        model, _ = made(run)
        for step in run.steps(DATA, batch_size=12, epochs=1):
            for x, y in step:
                with contextlib.suppress(RuntimeError):
                    step.backward(F.cross_entropy(model[2](Fails.apply(model[1](model[0](x)))), y))
            step.update()

    with pytest.raises(UsageError, match="backward failed in step 0, replica"):
        play(main, 4, 1)


def test_a_run_does_not_delete_what_it_writes(tmp_path):
    folder = str(tmp_path / "x")
    for step in (8, 10, 12):
        checkpoint.write(folder, step=step, weights={"w": torch.ones(2)}, state={}, facts={})
    path = checkpoint.write(folder, step=2, weights={"w": torch.ones(2)}, state={}, facts={})
    checkpoint.keep(folder, 3, trusted=path)
    assert path in checkpoint.steps_in(folder)


def test_a_new_run_refuses_another_runs_folder(tmp_path):
    folder = str(tmp_path / "x")

    def main(run):
        model, _ = made(run)
        for step in run.steps(DATA, batch_size=12, epochs=1):
            trained(run, model, step)

    play(main, 4, 1, keeping=Keeping(checkpoint=folder))
    with pytest.raises(SettingsError, match="--resume"):
        play(main, 4, 1, keeping=Keeping(checkpoint=folder))
    play(main, 4, 2, keeping=Keeping(checkpoint=folder, resume=folder))


def test_data_that_differs_between_workers():
    def main(run):
        model, _ = made(run)
        size = 48 - 4 * run.worker.rank
        for step in run.steps((DATA[0][:size], DATA[1][:size]), batch_size=12, epochs=1):
            trained(run, model, step)

    with pytest.raises(MismatchError, match="given other data"):
        play(main, 4, 2)


def test_batch_sizes_that_differ_between_workers():
    def main(run):
        model, _ = made(run)
        for step in run.steps(DATA, batch_size=lambda number: 12 - 4 * run.worker.rank, epochs=1):
            trained(run, model, step)

    with pytest.raises(MismatchError, match="batch size"):
        play(main, 4, 2)


def test_parameters_added_after_replicate():
    def main(run):
        model, optimizer = made(run)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        for step in run.steps(DATA, batch_size=12, epochs=1):
            trained(run, model, step)

    with pytest.raises(UsageError, match="after run.replicate"):
        play(main, 4, 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_state_that_the_user_clears(workers):
    def main(clears):
        def body(run):
            model, optimizer = made(run)
            for step in run.steps(DATA, batch_size=12, epochs=2):
                trained(run, model, step)
                if clears and step.number == 3:
                    optimizer.state.clear()
            return len(optimizer.state)

        return body

    cleared = play(main(True), 4, workers)
    assert cleared.result == 4
    assert cleared.weights == play(main(True), 4, 1).weights
    assert cleared.weights != play(main(False), 4, workers).weights


def test_each_call_with_the_same_columns_is_another_epoch():
    def main(run):
        model, _ = made(run)
        orders = []
        for _ in range(3):
            for step in run.steps({"x": DATA[0], "y": DATA[1]}, batch_size=48, epochs=1):
                for batch in step:
                    orders.append(batch["y"].tolist())
                    step.backward(F.cross_entropy(model(batch["x"]), batch["y"]))
                step.update()
        return orders

    orders = play(main, 1, 1).result
    assert len({tuple(order) for order in orders}) == 3


def test_shuffling_may_change_between_calls():
    def main(run):
        model, _ = made(run)
        for settings in ({"steps": 2}, {"epochs": 1, "shuffle": False}, {"steps": 1}):
            for step in run.steps(DATA, batch_size=12, **settings):
                trained(run, model, step)

    assert play(main, 4, 2).exactly_once


def test_named_means_in_another_order():
    def main(run):
        made(run)
        flip = iter([False, True] * 20)

        def fn(batch):
            values = {"a": torch.zeros(len(batch[0])), "b": torch.ones(len(batch[0]))}
            return dict(reversed(values.items())) if next(flip) else values

        means = run.mean(fn, DATA, batch_size=7)
        for step in run.steps(DATA, batch_size=48, epochs=1):
            for _ in step:
                step.backward(torch.zeros((), requires_grad=True) * 1.0)
            step.update()
        return means

    assert play(main, 4, 1).result == {"a": 0.0, "b": 1.0}


def test_losses_with_a_trailing_dimension(tmp_path: Path):
    def main(run):
        model = nn.Linear(6, 1)
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
        target = torch.zeros(1)
        for step in run.steps((DATA[0][:45],), batch_size=12, epochs=1):
            for (x,) in step:
                step.backward(F.mse_loss(model(x), target.expand(len(x), 1), reduction="none"))
            step.update()

    assert play(main, 6, 2).exactly_once
