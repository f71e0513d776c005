"""What samestep knows of optimizers: how far the update of one element depends on others.

    element   an element's update depends on that element alone: large tensors are divided among owners
    tensor    it depends on the whole tensor: tensors are divided among owners
    whole     it may depend on anything: one owner runs the optimizer

Unknown classes are tried on small copies (`separates`) to see whether they are of the `tensor` kind.
"""

from __future__ import annotations

import copy
import enum
import zlib
from collections import defaultdict
from typing import Any

import torch

from samestep.errors import UsageError


class Kind(enum.Enum):
    """How far one element's update reaches."""

    ELEMENT = "element"
    TENSOR = "tensor"
    WHOLE = "whole"


_ELEMENT = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")
_TENSOR = ("Adafactor", "Muon")
_PROBE_STEPS = 6
_PROBE_SCALES = (1e-4, 1.0, 1e4)


def kind_of(optimizer: torch.optim.Optimizer) -> Kind:
    """Return the kind of `optimizer`.

    Raises:
        UsageError: it cannot be replicated: it needs a closure, or sparse gradients.
    """
    cls = type(optimizer)
    if cls is torch.optim.LBFGS:
        raise UsageError(
            "LBFGS calls the loss several times per step through a closure, which a replicated step cannot do. "
            "Use another optimizer (SGD, AdamW, ...)."
        )
    if cls is torch.optim.SparseAdam:
        raise UsageError(
            "SparseAdam needs sparse gradients, which cannot be added in the order of the tree. "
            "Use Adam, and sparse=False in the Embedding."
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise UsageError("differentiable=True keeps a graph through the update; samestep cannot. Leave it out.")
    if cls.__module__.startswith("torch.optim."):
        if cls.__name__ in _ELEMENT:
            return Kind.ELEMENT
        if cls.__name__ in _TENSOR:
            return Kind.TENSOR
    return Kind.TENSOR if separates(optimizer) else Kind.WHOLE


def separates(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether updating all parameters in one call gives the same bits as one call per parameter.

    Tried on small copies, at several gradient scales, for a few steps. An optimizer that keeps anything on itself or
    in its groups between steps does not separate.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            return all(_separates_at(optimizer, scale) for scale in _PROBE_SCALES)
    except Exception:
        return False


def _separates_at(optimizer: torch.optim.Optimizer, scale: float) -> bool:
    together, apart = _small_copy(optimizer), _small_copy(optimizer)
    generator = torch.Generator().manual_seed(0)
    ours = [p for group in together.param_groups for p in group["params"]]
    theirs = [p for group in apart.param_groups for p in group["params"]]
    if len(ours) < 2:
        return True
    before = _settings(together)
    for _ in range(_PROBE_STEPS):
        gradients = [torch.randn(p.shape, generator=generator).to(p.dtype) * scale for p in ours]
        for parameter, gradient in zip(ours, gradients, strict=True):
            parameter.grad = gradient.clone()
        together.step()
        for index, gradient in enumerate(gradients):
            for parameter in theirs:
                parameter.grad = None
            theirs[index].grad = gradient.clone()
            apart.step()
    same = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return same and _settings(together) == before


def _settings(optimizer: torch.optim.Optimizer) -> str:
    """Return what an optimizer keeps outside `state`, as text."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    own = {
        k: v
        for k, v in vars(optimizer).items()
        if k not in ("param_groups", "state") and isinstance(v, int | float | str | list | dict | torch.Tensor)
    }
    own.pop("_opt_called", None)
    return repr((groups, {k: v for k, v in own.items() if not k.endswith("hooks")}))


def _small_copy(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    generator = torch.Generator().manual_seed(1)
    small = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            shape = [min(size, 3 + index) for index, size in enumerate(p.shape)]
            values = torch.randn(shape, generator=generator).to(p.dtype)
            small[p] = torch.nn.Parameter(values)
    twin = bare_copy(optimizer)
    twin.__dict__.update(
        {k: copy.deepcopy(v) for k, v in vars(optimizer).items() if k not in ("param_groups", "state", "step")}
    )
    twin.param_groups = [
        {**copy.deepcopy({k: v for k, v in g.items() if k != "params"}), "params": [small[p] for p in g["params"]]}
        for g in optimizer.param_groups
    ]
    twin.state = defaultdict(dict)
    return twin


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the settings of each group: numbers, text, tuples of these; a tensor of one element as a number."""
    return [{k: _plain(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def fingerprint(optimizer: torch.optim.Optimizer) -> int:
    """Return a number that differs between optimizers of other settings. Takes microseconds."""
    return zlib.crc32(repr(settings_of(optimizer)).encode())


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return float(value) if value.numel() == 1 else tuple(value.shape)
    return value if isinstance(value, bool | int | float | str | tuple | None) else type(value).__name__


def bare_copy(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return an optimizer of the same class and attributes, without the user's hooks and with no state.

    Its groups are those of `optimizer` (the same objects); a scheduler's wrapper around `step` stays behind.
    """
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(vars(optimizer))
    twin.__dict__.pop("step", None)
    twin._optimizer_step_pre_hooks = type(optimizer._optimizer_step_pre_hooks)()
    twin._optimizer_step_post_hooks = type(optimizer._optimizer_step_post_hooks)()
    twin.state = defaultdict(dict)
    return twin


def apart_copy(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return an optimizer of the same state, whose settings stay when those of `optimizer` are changed."""
    twin = bare_copy(optimizer)
    twin.state = optimizer.state
    twin.param_groups = [dict(group) for group in optimizer.param_groups]
    return twin
