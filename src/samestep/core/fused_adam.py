"""The fused kernel of Adam and AdamW, called directly.

`step` of torch's optimizers does the same after 80 microseconds of Python per call (checks, profiler, hooks, grouping),
and an owner calls it once per cache-sized chunk: at 100 MiB that was a quarter of the whole update. The arguments are
those that `step` would pass, so bits are the same. Whatever is not the plain case is left to `step`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

_KERNELS = {torch.optim.Adam: "_fused_adam_", torch.optim.AdamW: "_fused_adamw_"}
_REFUSED = ("capturable", "differentiable", "amsgrad")


class FusedAdam:
    """One group's pieces of one chunk, with their state."""

    def __init__(self, pieces: Sequence[torch.Tensor], states: Sequence[Mapping[str, torch.Tensor]]):
        """Take pieces and states as they are; whoever replaces a state tensor makes a new one of these."""
        self._pieces = list(pieces)
        self._means = [state["exp_avg"] for state in states]
        self._squares = [state["exp_avg_sq"] for state in states]
        self._steps = [state["step"] for state in states]

    @classmethod
    def of(cls, pieces: Sequence[torch.Tensor], state: Mapping[torch.Tensor, dict]) -> FusedAdam | None:
        """Return it for `pieces`, or None if some have no state yet."""
        found = [state.get(piece) for piece in pieces]
        states = [each for each in found if each]
        return cls(pieces, states) if len(states) == len(found) else None

    def step(self, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any], gradients: list) -> None:
        """Update the pieces with one gradient each, of the piece's dtype and shape.

        Args:
            optimizer: the user's.
            settings: its group, for which `fits` holds.
            gradients: one per piece.
        """
        kernel = _KERNELS[type(optimizer)]
        if settings.get("decoupled_weight_decay"):
            kernel = "_fused_adamw_"
        beta1, beta2 = settings["betas"]
        torch._foreach_add_(self._steps, 1)
        getattr(torch, kernel)(
            self._pieces,
            gradients,
            self._means,
            self._squares,
            [],
            self._steps,
            lr=settings["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=settings["weight_decay"],
            eps=settings["eps"],
            amsgrad=False,
            maximize=settings["maximize"],
            grad_scale=None,
            found_inf=None,
        )


def fits(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether every group of `optimizer` is the plain case. Takes a microsecond; groups may change."""
    return (
        type(optimizer) in _KERNELS
        and getattr(optimizer, "grad_scale", None) is None
        and getattr(optimizer, "found_inf", None) is None
        and all(map(_is_plain, optimizer.param_groups))
    )


def _is_plain(group: Mapping[str, Any]) -> bool:
    return (
        group.get("fused") is True
        and type(group["lr"]) is float
        and all(type(beta) is float for beta in group["betas"])
        and not any(group[name] for name in _REFUSED)
    )
