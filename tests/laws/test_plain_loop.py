"""The law: one replica is a plain PyTorch loop given the same batches and seeds, to the bit."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from loops import FEW
from playing import assert_same_bits, play
from torch import nn
from zoo import MODELS, NUM_CLASSES, OPTIMIZERS, classes_loss, vectors

from samestep.core.randomness import key, seed_shard, seed_start, seed_step
from samestep.data.permutation import Permutation

CLASSES: dict[str, list[dict]] = {
    "SGD": [{"lr": 0.05}, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}],
    "Adam": [{"lr": 3e-3}, {"lr": 3e-3, "amsgrad": True, "weight_decay": 0.01, "maximize": True}],
    "AdamW": [{"lr": 3e-3}],
    "NAdam": [{"lr": 3e-3}, {"lr": 3e-3, "decoupled_weight_decay": True}],
    "RAdam": [{"lr": 3e-3}],
    "Adamax": [{"lr": 3e-3}],
    "Adagrad": [{"lr": 1e-2, "initial_accumulator_value": 0.1}],
    "Adadelta": [{"lr": 0.5}],
    "RMSprop": [{"lr": 1e-3}, {"lr": 1e-3, "momentum": 0.9, "centered": True}],
    "Rprop": [{"lr": 1e-3}],
    "ASGD": [{"lr": 1e-2, "t0": 2}],
    "Adafactor": [{"lr": 1e-2}],
    "Muon": [{"lr": 1e-2}],
}
FORMS = ("default", "foreach", "fused")


def cases() -> list:
    """Return (class, settings, form) of all that this torch has."""
    found = []
    for name, variants in CLASSES.items():
        made = getattr(torch.optim, name, None)
        if made is None:
            continue
        known = inspect.signature(made.__init__).parameters
        for number, settings in enumerate(variants):
            for form in FORMS:
                if form == "default":
                    found.append(pytest.param(name, settings, id=f"{name}-{number}-default"))
                elif form in known:
                    found.append(pytest.param(name, {**settings, form: True}, id=f"{name}-{number}-{form}"))
    return found


class Matrices(nn.Module):
    """All parameters are matrices, as some optimizers want them; one has 60,000 elements."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(20, 300, bias=False)
        self.inner = nn.Linear(300, 200, bias=False)
        self.last = nn.Linear(200, NUM_CLASSES, bias=False)
        self.nobody = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return self.last(self.inner(self.first(x).relu()).relu())


def assert_equal_to_plain_loop(make: Callable, data: tuple, loss_of: Callable, clip_norm: float | None = None) -> None:
    """Hold the law: weights and the optimizer's whole state."""

    def main(run):
        model, optimizer = make()
        run.replicate(model, optimizer)
        losses = []
        for step in run.steps(data, batch_size=19, epochs=2):
            for batch in step:
                step.backward(loss_of(model, batch))
            step.update(clip_norm=clip_norm)
            losses.append(step.loss)
        told.append((model, optimizer))
        return losses

    told: list = []
    losses = play(main, 1, 1).result
    model, optimizer = told[0]

    seed_start(0)
    plain, stepper = make()
    number = 0
    for epoch in range(2):
        order = Permutation(len(data[0]), key(6, 0, 0, epoch))
        for start in range(0, len(data[0]), 19):
            ids = torch.from_numpy(order.ids(start, min(start + 19, len(data[0]))))
            batch = tuple(column[ids] for column in data)
            seed_step(0, number)
            seed_shard(0, number, 0, 0)
            stepper.zero_grad()
            loss = loss_of(plain, batch)
            loss.backward()
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
            stepper.step()
            assert losses[number] == float(loss.detach()), f"the loss of step {number}"
            number += 1
    for (name, ours), theirs in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert_same_state(stepper.state_dict(), optimizer.state_dict())


def assert_same_state(ours: dict, theirs: dict) -> None:
    """Compare two `optimizer.state_dict()`."""
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for parameter, state in ours["state"].items():
        other = theirs["state"][parameter]
        assert state.keys() == other.keys()
        for name, value in state.items():
            where = f"{name} of parameter {parameter}"
            if isinstance(value, torch.Tensor):
                assert isinstance(other[name], torch.Tensor), where
                assert (value.dtype, value.shape) == (other[name].dtype, other[name].shape), where
                assert torch.equal(value, other[name]), where
            else:
                assert (type(value), value) == (type(other[name]), other[name]), where


def maker(name: str, settings: dict) -> Callable:
    def make():
        model = Matrices()
        return model, getattr(torch.optim, name)(model.parameters(), **settings)

    return make


@pytest.mark.parametrize(("name", "settings"), cases())
def test_every_optimizer(name, settings):
    assert_equal_to_plain_loop(maker(name, settings), vectors(), classes_loss)


@pytest.mark.parametrize(("name", "settings"), cases())
def test_every_optimizer_on_any_number_of_workers(name, settings):
    def main(run):
        model, optimizer = maker(name, settings)()
        run.replicate(model, optimizer)
        told = []
        for step in run.steps(vectors(), batch_size=19, steps=3):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update(clip_norm=math.inf)
            told.append([step.loss, step.grad_norm])
        return told, optimizer.state_dict()["state"]

    assert_same_bits(main, [fleet for fleet in FEW if fleet in ((8, 1), (8, 3))])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model(model, optimizer):
    make, data, loss_of = MODELS[model]

    def made():
        built = make()
        return built, OPTIMIZERS[optimizer](built.parameters())

    assert_equal_to_plain_loop(made, data(), loss_of)


def test_state_that_was_there_before():
    """A pretrained optimizer, whose step counts are plain numbers, as older versions of torch wrote them."""

    def make():
        model = Matrices()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        classes_loss(model, vectors()).backward()
        optimizer.step()
        optimizer.zero_grad()
        saved = optimizer.state_dict()
        for state in saved["state"].values():
            state["step"] = int(state["step"])
        other = torch.optim.Adam(model.parameters(), lr=3e-3)
        other.load_state_dict(saved)
        return model, other

    assert_equal_to_plain_loop(make, vectors(), classes_loss)
