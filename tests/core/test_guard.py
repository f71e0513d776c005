"""The guard: weights that were changed outside of update are found and named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from samestep.core.group import Solo
from samestep.core.guard import Guard
from samestep.core.layout import lay_out
from samestep.core.weights import Weights, shape_of
from samestep.errors import EditedWeightsError


@pytest.fixture
def watched():
    module = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10).bfloat16(), nn.Linear(1, 1).double())
    names, parameters = zip(*module.named_parameters(), strict=True)
    weights = Weights(Solo(), names, parameters, lay_out([shape_of(p, True) for p in parameters], 1))
    return module, Guard([module], [weights]), weights


EDITS = {
    "add_": lambda m: torch.no_grad()(m[1].weight.add_)(1.0),
    "data": lambda m: m[1].weight.data.mul_(2.0),
    "detach": lambda m: m[1].weight.detach().zero_(),
    "numpy": lambda m: m[1].weight.detach().view(torch.int16).numpy().__setitem__(slice(None), 3),
    "dlpack": lambda m: torch.from_dlpack(m[1].weight.detach()).fill_(5.0),
    "set data": lambda m: setattr(m[1].weight, "data", m[1].weight.data.clone()),
    "replaced": lambda m: setattr(m[1], "weight", nn.Parameter(m[1].weight.data)),
    "removed": lambda m: m[1]._parameters.pop("weight"),
    "load": lambda m: m[1].load_state_dict({k: torch.zeros_like(v) for k, v in m[1].state_dict().items()}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_are_found(watched, edit):
    module, guard, _ = watched
    guard.check()
    EDITS[edit](module)
    with pytest.raises(EditedWeightsError, match=r"'1\.weight'.*run\.edit"):
        guard.check()


def test_reading_is_no_edit(watched):
    module, guard, _ = watched
    module[0](torch.randn(3, 30)).sum().backward()
    module.state_dict()
    module[0].weight.detach().numpy().copy()
    module.zero_grad()
    module.eval().requires_grad_(False)
    guard.check()


def test_what_is_accepted_is_right(watched):
    module, guard, weights = watched
    with torch.no_grad():
        module[0].weight.add_(1.0)
    guard.accept()
    guard.check()
    weights.memory.zero_()
    before = module[0].weight._version
    guard.accept_update()
    guard.check()
    assert module[0].weight._version > before, "autograd was not told"


def test_an_update_between_forward_and_backward_is_found_by_autograd(watched):
    module, guard, weights = watched
    x = torch.randn(3, 30, requires_grad=True)
    out = module[0](x).square().sum()
    weights.memory.zero_()
    guard.accept_update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


class Noting(Solo):
    """Notes which memories are read-only."""

    def __init__(self):
        super().__init__()
        self.closed = set()

    def protect(self, memory, read_only):
        (self.closed.add if read_only else self.closed.discard)(memory.data_ptr())


def test_weights_are_read_only_except_between_open_and_accept(watched):
    module, _, weights = watched
    group, everything = Noting(), {weights.memory.data_ptr()}
    guard = Guard([module], [weights], group)
    assert group.closed == everything
    guard.check()
    assert group.closed == everything
    guard.open()
    assert not group.closed
    guard.accept_update()
    assert group.closed == everything
