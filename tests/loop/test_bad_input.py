"""Bad input gets one clear error, on every worker, and nothing hangs."""

from __future__ import annotations

import math
import re

import pytest
import torch
from loops import updated
from playing import play
from refusing import made, refused, train
from torch import nn
from zoo import Convolutional, Perceptron, classes_loss, vectors

from samestep.core import calls
from samestep.errors import (
    DataError,
    EditedWeightsError,
    MismatchError,
    NonFiniteError,
    SettingsError,
    UsageError,
)

# -------------------------------------------------------------------------------------------------- losses and data


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite(bad):
    data = vectors()[0].clone(), vectors()[1]
    data[0][33, 0] = 7.0

    def main(run):
        model, _ = made(run)

        def spoil(step, batch, loss):
            return loss * bad if step.epoch == 0 and bool((batch[0][:, 0] == 7.0).any()) else loss

        train(run, model, inside=spoil, data=data, steps=6)

    refused(NonFiniteError, [r"loss is (nan|inf)", r"step \d", r"replica \d", r"samples .*\b33\b"], main)


def test_gradient_that_is_not_finite():
    """Though the loss is finite, and whether the norm is measured or not."""

    def main(run, **choices):
        model, _ = made(run)
        for step in run.steps(vectors(), batch_size=19, steps=1):
            for x, y in step:
                loss = classes_loss(model, (x, y))
                step.backward(loss + 0 * (model.last.weight - model.last.weight.detach()).abs().sqrt().sum())
            step.update(**choices)

    words = [r"gradient of 'last\.weight' is NaN or infinite", "step 0, replica 0 ", r"samples \d+", "nonfinite='skip'"]
    refused(NonFiniteError, words, main)
    refused(NonFiniteError, words, lambda run: main(run, clip_norm=1.0))


@pytest.mark.parametrize("rule", ["sometimes", 0, -1, True, 1.5, None])
def test_rule_for_what_is_not_finite(rule):
    refused(SettingsError, ["nonfinite=", "'stop'", "'skip'"], lambda run: made(run, nonfinite=rule))


def test_rules_that_differ_between_workers():
    def main(run):
        model, _ = made(run, nonfinite="skip" if run.worker.is_first else 3)
        train(run, model)

    refused(MismatchError, ["other nonfinite", "worker 0"], main, workers=(2, 3))


def test_data_that_raises():
    class Broken:
        def __len__(self):
            return 20

        def __getitem__(self, i):
            if i == 13:
                raise ValueError("this picture is broken")
            return torch.zeros(20), 0

    def main(run):
        model, _ = made(run)
        train(run, model, data=Broken(), steps=4)

    refused(DataError, ["[Ss]ample 13", "this picture is broken"], main)
    refused(DataError, ["[Ss]ample 13"], lambda run: (made(run), run.mean(lambda b: 0.0, Broken(), 4)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0, "steps": 1}, ["batch_size is 0"]),
        ({"batch_size": 4}, ["neither epochs nor steps"]),
        ({"batch_size": 4, "steps": 1, "epochs": 1}, ["both"]),
        ({"batch_size": lambda n: 4 - n, "steps": 9}, ["batch_size is 0", "step 4"]),
        ({"batch_size": 4, "steps": 1, "loaders": -1}, ["loaders=-1"]),
    ],
)
def test_settings_of_steps(settings, words):
    def main(run):
        model, _ = made(run)
        for step in run.steps(vectors(), **settings):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update()

    refused(SettingsError, words, main)


def test_data_that_cannot_be_split():
    def main(run):
        made(run)
        list(run.steps(iter([1, 2]), batch_size=1, steps=1))

    refused(SettingsError, ["map-style"], main)


# ------------------------------------------------------------------------------------------------- order of calls


def scripts():
    def forgot_update(run):
        model, _ = made(run)
        for step in run.steps(vectors(), batch_size=19, steps=2):
            for batch in step:
                step.backward(classes_loss(model, batch))

    def iterated_twice(run):
        model, _ = made(run)
        for step in run.steps(vectors(), batch_size=19, steps=2):
            for _ in range(2):
                for batch in step:
                    step.backward(classes_loss(model, batch))
            step.update()

    def broke_off(run):
        model, _ = made(run)
        for step in run.steps(vectors(), batch_size=19, steps=2):
            for batch in step:
                step.backward(classes_loss(model, batch))
                break
            step.update()

    def not_iterated(run):
        made(run)
        for step in run.steps(vectors(), batch_size=19, steps=2):
            step.update()

    def updated_twice(run):
        model, _ = made(run)
        train(run, model, after=lambda step: step.update())

    def backward_outside(run):
        model, _ = made(run)
        train(run, model, after=lambda step: step.backward(classes_loss(model, vectors())))

    def no_backward(run):
        model, _ = made(run)
        train(run, model, inside=lambda step, batch, loss: None)

    def own_step(run):
        model, optimizer = made(run)
        train(run, model, after=lambda step: optimizer.step())

    def detached(run):
        model, _ = made(run)
        train(run, model, inside=lambda step, batch, loss: loss.detach())

    def a_number(run):
        model, _ = made(run)
        train(run, model, inside=lambda step, batch, loss: loss.item())

    def loss_too_early(run):
        model, _ = made(run)
        train(run, model, before=lambda step: step.loss)

    def norm_not_measured(run):
        model, _ = made(run)
        train(run, model, after=lambda step: step.grad_norm)

    def mean_outside(run):
        model, _ = made(run)
        train(run, model, after=lambda step: step.mean(x=1.0))

    def evaluated_inside(run):
        model, _ = made(run)
        train(run, model, inside=lambda s, b, loss: run.mean(lambda b: 0.0, vectors(), 8))

    def once_inside(run):
        model, _ = made(run)
        train(run, model, inside=lambda s, b, loss: run.once(lambda: 1))

    def clip_of_nothing(run):
        model, _ = made(run)
        for step in run.steps(vectors(), batch_size=19, steps=2):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update(clip_norm=0.0)

    def counts_mixed(run):
        model, _ = made(run)
        for step in run.steps(vectors(), batch_size=19, steps=2):
            for batch in step:
                step.backward(classes_loss(model, batch))
                step.backward(classes_loss(model, batch), count=3)
            step.update()

    def counts_negative(run):
        model, _ = made(run)
        for step in run.steps(vectors(), batch_size=19, steps=2):
            for batch in step:
                step.backward(classes_loss(model, batch), count=-1)
            step.update()

    def counts_nothing(run):
        model, _ = made(run)
        for step in run.steps(vectors(), batch_size=19, steps=2):
            for batch in step:
                step.backward(classes_loss(model, batch), count=0)
            step.update()

    def scaler_forgotten(run):
        model, _ = made(run)
        for step in run.steps(vectors(), batch_size=19, steps=2):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update(scaler=torch.amp.GradScaler("cpu"))

    def transform_of_wrong_shape(run):
        model, _ = made(run)
        for step in run.steps(vectors(), batch_size=19, steps=2):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update(transform=lambda name, gradient: gradient.sum())

    return [
        (forgot_update, ["Step 0 was not updated", r"step\.update\(\)"]),
        (iterated_twice, ["iterated again at test_bad_input.py"]),
        (broke_off, ["not all run"]),
        (not_iterated, ["not iterated"]),
        (updated_twice, ["step.update"]),
        (backward_outside, ["outside of"]),
        (no_backward, ["backward was not called for step 0, replica 0"]),
        (own_step, [r"SGD\.step\(\)", r"step\.update\(\)"]),
        (detached, ["no graph"]),
        (a_number, ["floating-point tensor"]),
        (loss_too_early, [r"known after step\.update"]),
        (norm_not_measured, ["clip_norm"]),
        (mean_outside, ["outside of"]),
        (evaluated_inside, [r"run\.mean was called inside a shard"]),
        (once_inside, [r"run\.once was called inside a shard"]),
        (clip_of_nothing, ["clip_norm=0.0"]),
        (counts_mixed, ["count= was given to some"]),
        (counts_negative, ["count=-1"]),
        (counts_nothing, ["adds up to 0"]),
        (scaler_forgotten, ["GradScaler"]),
        (transform_of_wrong_shape, ["transform returned a tensor of shape"]),
    ]


@pytest.mark.parametrize(("main", "words"), [pytest.param(m, w, id=m.__name__) for m, w in scripts()])
def test_calls_out_of_order(main, words):
    refused(UsageError, words, main)


# ----------------------------------------------------------------------------------------------- what is replicated


def test_things_that_cannot_be_replicated():
    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def twice(run):
        made(run)
        made(run)

    def no_optimizer(run):
        run.replicate(Perceptron())

    def without_state(run):
        model = Perceptron()
        run.replicate(model, sgd(model), [1, 2])

    def lazy(run):
        model = nn.Sequential(nn.LazyLinear(3))
        run.replicate(model, sgd(model))

    def shared_parameter(run):
        model = Perceptron()
        run.replicate(model, sgd(model), sgd(model))

    def overlapping(run):
        model = nn.ParameterList([nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))])
        model[1].data = model[0].data[2:]
        run.replicate(model, sgd(model))

    def lbfgs(run):
        model = Perceptron()
        run.replicate(model, torch.optim.LBFGS(model.parameters()))

    def sparse_adam(run):
        model = nn.Embedding(5, 3, sparse=True)
        run.replicate(model, torch.optim.SparseAdam(model.parameters()))

    def differentiable(run):
        model = Perceptron()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True))

    def no_arrivals(run):
        made(run, arrivals="few")

    def nothing_at_all(run):
        return 1

    def steps_before(run):
        run.steps(vectors(), batch_size=4, steps=1)

    refused(UsageError, ["called twice"], twice)
    refused(UsageError, ["at least one optimizer"], no_optimizer)
    refused(UsageError, ["list", "state_dict"], without_state)
    refused(UsageError, ["0.weight", "no shape yet"], lazy)
    refused(UsageError, ["Two optimizers hold the same parameter"], shared_parameter)
    refused(UsageError, ["'0'", "'1'", "share memory"], overlapping)
    refused(UsageError, ["LBFGS", "closure"], lbfgs)
    refused(UsageError, ["SparseAdam", "sparse"], sparse_adam)
    refused(UsageError, ["differentiable"], differentiable)
    refused(UsageError, ["arrivals='few'"], no_arrivals)
    refused(UsageError, [r"run\.replicate"], nothing_at_all)
    refused(UsageError, [r"run\.replicate"], steps_before)
    refused(SettingsError, ["buffers="], lambda run: made(run, model=Convolutional, buffers="median"))


def test_sparse_gradients():
    def main(run):
        model = nn.Sequential(nn.Embedding(9, 5, sparse=True), nn.Flatten())
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for step in run.steps((torch.arange(12) % 9, torch.arange(12) % 5), batch_size=6, steps=2):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update()

    refused(UsageError, ["'0.weight' is sparse", "sparse=False"], main)


def test_embedding_that_edits_its_weights_in_forward():
    def main(run):
        model = nn.Sequential(nn.Embedding(9, 5, max_norm=0.5), nn.Flatten())
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for step in run.steps((torch.arange(12) % 9, torch.arange(12) % 5), batch_size=6, steps=2):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update()

    refused(UsageError, ["Embedding '0'", "max_norm=0.5", r"run\.edit\(\)"], main)


def test_several_optimizers():
    def unnamed(run):
        a, b = nn.Linear(20, 5), nn.Linear(20, 5)
        ours, theirs = torch.optim.SGD(a.parameters(), lr=0.1), torch.optim.SGD(b.parameters(), lr=0.1)
        run.replicate(a, b, ours, theirs)
        for step in run.steps(vectors(), batch_size=19, steps=2):
            for batch in step:
                step.backward(classes_loss(a, batch) + classes_loss(b, batch))
            step.update()

    def foreign(run):
        model, _ = made(run)
        other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
        for step in run.steps(vectors(), batch_size=19, steps=2):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update(other)

    refused(UsageError, ["2 optimizers", "step.update"], unnamed)
    refused(UsageError, [r"not in run\.replicate"], foreign)


# -------------------------------------------------------------------------------------------------------- edits


def edits():
    def in_place(model, optimizer):
        with torch.no_grad():
            model.inner.weight.add_(0.01)

    def through_data(model, optimizer):
        model.inner.weight.data.clamp_(-0.01, 0.01)

    def by_vector(model, optimizer):
        nn.utils.vector_to_parameters(torch.zeros(sum(p.numel() for p in model.parameters())), model.parameters())

    def by_numpy(model, optimizer):
        model.inner.weight.detach().numpy()[:] += 0.5

    def replaced(model, optimizer):
        model.inner.weight = nn.Parameter(torch.zeros(200, 300))

    def data_replaced(model, optimizer):
        model.inner.weight.data = torch.zeros(200, 300)

    def initialised(model, optimizer):
        nn.init.zeros_(model.inner.weight)

    def loaded(model, optimizer):
        model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})

    return [in_place, through_data, by_vector, by_numpy, replaced, data_replaced, initialised, loaded]


def editing(edit, inside_edit: bool = False):
    def main(run):
        model, optimizer = made(run)
        told = []
        for step in run.steps(vectors(), batch_size=19, steps=3):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update()
            updated(run, step, told)
            if step.number == 0 and inside_edit:
                with run.edit():
                    edit(model, optimizer)
            elif step.number == 0:
                edit(model, optimizer)
        return told

    return main


@pytest.mark.parametrize("edit", edits())
def test_edits_outside_of_update(edit):
    refused(EditedWeightsError, [r"first\.weight|inner\.weight", r"run\.edit\(\)"], editing(edit))


@pytest.mark.parametrize("edit", [e for e in edits() if e.__name__ != "replaced"])
def test_edits_where_they_belong(edit):
    played = [play(editing(edit, inside_edit=True), 4, workers) for workers in (1, 2, 3)]
    assert len({p.as_words() for p in played}) == 1
    untouched = play(editing(lambda model, optimizer: None, inside_edit=True), 4, 1)
    assert untouched.weights != played[0].weights, "the edit had no effect"


def test_edits_before_the_first_step():
    def main(run):
        model, _ = made(run)
        with torch.no_grad():
            model.inner.weight.zero_()
        train(run, model)

    refused(EditedWeightsError, [r"inner\.weight"], main)


# -------------------------------------------------------------------------------------------- workers that differ


def test_models_that_differ():
    def values(run):
        torch.manual_seed(run.worker.rank)
        made(run)

    def shapes(run):
        model = Perceptron(hidden=300 + run.worker.rank)
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def lengths(run):
        model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(2 + run.worker.rank)])
        for p in model.parameters():
            nn.init.ones_(p)
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))

    refused(MismatchError, ["first.weight", "values", "another model"], values, workers=(2, 3))
    refused(MismatchError, ["first.weight", r"\[30[123], 20\]"], shapes, workers=(2, 3))
    refused(MismatchError, ["2|3|4"], lengths, workers=(2, 3))


def test_optimizers_that_differ():
    """Other settings on one worker would update its part of the weights in another way."""

    def rates(run):
        model = Perceptron()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + run.worker.rank))
        run.replicate(model, optimizer)
        train(run, model)

    def classes(run):
        model = Perceptron()
        optimizer = (torch.optim.SGD if run.worker.rank else torch.optim.Adam)(model.parameters(), lr=0.1)
        run.replicate(model, optimizer)
        train(run, model)

    def later(run):
        model, optimizer = made(run)

        def change(step):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 + run.worker.rank)

        train(run, model, after=change)

    def clipping(run):
        model, _ = made(run)
        for step in run.steps(vectors(), batch_size=19, steps=2):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update(clip_norm=1.0 + run.worker.rank)

    refused(MismatchError, ["other optimizers", "'lr': 0.1"], rates, workers=(2, 3))
    refused(MismatchError, ["other optimizers", "Adam", "SGD"], classes, workers=(2, 3))
    refused(MismatchError, ["other settings of SGD", "'lr': 0.0[123]"], later, workers=(2, 3))
    refused(MismatchError, ["other clip_norm"], clipping, workers=(2, 3))


def test_control_flow_that_differs():
    def another_call(run):
        model, _ = made(run)

        def part(step):
            if run.worker.rank == 1 and step.number == 1:
                run.mean(lambda b: 0.0, vectors(), 8)
            else:
                run.once(lambda: 1)

        train(run, model, after=part)

    def one_more_call(run):
        model, _ = made(run)
        train(run, model, after=lambda step: run.worker.rank == 1 and run.once(lambda: 1))

    for main in (another_call, one_more_call):
        message = refused(MismatchError, ["different calls"], main, workers=(2, 3))
        assert len(set(re.findall(r"\w+\.py:\d+", message))) == 2, message

    def leaves(run):
        model, _ = made(run)
        for step in run.steps(vectors(), batch_size=19, steps=3):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update()
            if run.worker.rank == 1:
                break

    refused(MismatchError, ["different calls", "the end of main", r"step.update \(.+\.py:"], leaves, workers=(2, 3))


def test_a_call_without_a_line_of_the_script_is_named_alone():
    assert calls._with_line("the end of main", "") == "the end of main"
    assert calls._with_line("run.mean", "train.py:7") == "run.mean (train.py:7)"
