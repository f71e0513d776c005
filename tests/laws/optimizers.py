"""Optimizers that samestep has never heard of."""

from __future__ import annotations

import torch


class Averaging(torch.optim.Optimizer):
    """Each tensor alone: its state holds a tensor, a number and a text."""

    def __init__(self, parameters, lr: float = 0.1):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(average=torch.zeros_like(p), steps=0, phase="new")
                state["steps"] += 1
                state["phase"] = "even" if state["steps"] % 2 == 0 else "odd"
                state["average"].lerp_(p.grad, 1 / state["steps"])
                p.sub_(state["average"] / (1e-8 + state["average"].norm()), alpha=group["lr"])


class Coupled(torch.optim.Optimizer):
    """The step of each tensor depends on all of them, and the rate it finds is kept in the group."""

    def __init__(self, parameters, lr: float = 0.1):
        super().__init__(parameters, {"lr": lr, "distance": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            used = [p for p in group["params"] if p.grad is not None]
            total = sum(float(p.grad.double().square().sum()) for p in used)
            group["distance"] += total**0.5
            group["lr"] = 0.05 / (1.0 + group["distance"])
            for p in used:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                    state["first"] = p.clone()
                state["momentum"] = state["momentum"] * 0.9 + p.grad
                p.sub_(state["momentum"], alpha=group["lr"])
