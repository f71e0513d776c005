"""How far an optimizer's update reaches: told from its class, or tried."""

from __future__ import annotations

import pytest
import torch
from optimizers import Averaging, Coupled
from torch import nn

from samestep.core.optimizers import Kind, bare_copy, fingerprint, kind_of, separates, settings_of
from samestep.errors import UsageError

ELEMENT = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD"]


def two(sizes=((40, 30), (7,))) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(size)) for size in sizes]


@pytest.mark.parametrize("name", ELEMENT)
def test_element_kinds_treat_every_element_alone(name):
    """Halves of a tensor, each updated by itself, end as the whole does."""
    made = getattr(torch.optim, name)
    whole = nn.Parameter(torch.linspace(-1, 1, 4096))
    halves = [nn.Parameter(half.clone()) for half in whole.detach().split(2048)]
    together, apart = made([whole], lr=0.01), made(halves, lr=0.01)
    assert kind_of(together) is Kind.ELEMENT
    for _ in range(4):
        gradient = torch.randn(4096)
        whole.grad = gradient.clone()
        for half, part in zip(halves, gradient.split(2048), strict=True):
            half.grad = part.clone()
        together.step()
        apart.step()
    assert torch.equal(whole, torch.cat(halves))


def test_every_class_of_torch_is_known():
    """A class that torch adds is tried, not guessed; this test tells that one came."""
    known = {*ELEMENT, "Adafactor", "Muon", "SparseAdam", "LBFGS", "Optimizer"}
    found = {n for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)}
    assert found <= known


def test_whole_tensors():
    assert kind_of(torch.optim.Adafactor(two())) is Kind.TENSOR
    if hasattr(torch.optim, "Muon"):
        assert kind_of(torch.optim.Muon(two([(4, 5), (6, 7)]))) is Kind.TENSOR


class Renamed(torch.optim.AdamW):
    """A subclass may do anything."""


class Clipping(torch.optim.SGD):
    """Looks at all gradients before it steps."""

    def step(self, closure=None):
        nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], 1.0)
        return super().step(closure)


class Counting(torch.optim.SGD):
    """Keeps a number on itself, so its steps are not independent."""

    num_steps = 0

    def step(self, closure=None):
        self.num_steps += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.num_steps
        return super().step(closure)


class Noisy(torch.optim.SGD):
    """Draws from the global generator, in the order of its parameters."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(torch.randn_like(p), alpha=0.01)


class Broken(torch.optim.SGD):
    """Cannot be tried on small copies."""

    def step(self, closure=None):
        raise RuntimeError("not here")


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (Averaging, Kind.TENSOR),
        (Renamed, Kind.TENSOR),
        (Coupled, Kind.WHOLE),
        (Clipping, Kind.WHOLE),
        (Counting, Kind.WHOLE),
        (Noisy, Kind.WHOLE),
        (Broken, Kind.WHOLE),
    ],
)
def test_unknown_classes_are_tried(made, kind):
    parameters = two()
    values = [p.detach().clone() for p in parameters]
    optimizer = made(parameters, lr=0.01)
    before = torch.get_rng_state()
    assert kind_of(optimizer) is kind
    assert separates(optimizer) is (kind is Kind.TENSOR)
    assert torch.equal(before, torch.get_rng_state()), "the trial drew random numbers"
    assert all(torch.equal(a, b) for a, b in zip(values, parameters, strict=True)), "the trial touched the weights"
    assert not optimizer.state
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize("made", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_refused_by_name(made):
    with pytest.raises(UsageError, match=made.__name__):
        kind_of(made(two()))


def test_bare_copy_leaves_hooks_state_and_schedulers_behind():
    parameters = two()
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    called = []
    optimizer.register_step_pre_hook(lambda *a: called.append(1))
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer._opt_called = True
    twin = bare_copy(optimizer)
    twin.step()
    assert not called
    assert not optimizer.state
    assert twin.param_groups is optimizer.param_groups


def test_fingerprint_tells_settings_apart():
    def made(**settings):
        return torch.optim.AdamW([{"params": p} for p in two()], **settings)

    plain = fingerprint(made(lr=0.1))
    assert plain == fingerprint(made(lr=0.1))
    others = [{"lr": 0.1000001}, {"lr": 0.1, "betas": (0.9, 0.99)}, {"lr": 0.1, "amsgrad": True}]
    assert all(fingerprint(made(**settings)) != plain for settings in others)
    assert settings_of(made(lr=torch.tensor(0.25)))[1]["lr"] == 0.25
