"""Outer optimizers: how the mean of what replicas did by themselves changes the weights that all start from.

The gradient that they are given is the weights before minus the mean of the replicas' weights, so that a plain step of
length 1 moves the weights to that mean.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from samestep.errors import SettingsError

Parameters = list[torch.nn.Parameter]


@dataclass(frozen=True)
class Outer(ABC):
    """An outer optimizer, as plain data."""

    @abstractmethod
    def make(self, parameters: Parameters) -> torch.optim.Optimizer:
        """Return the optimizer of `parameters`."""


@dataclass(frozen=True)
class Average(Outer):
    """The weights become the mean of the replicas' weights (local SGD, FedAvg: McMahan et al. 2017)."""

    def make(self, parameters: Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1.0)


@dataclass(frozen=True)
class Momentum(Outer):
    """SGD with momentum (SlowMo: Wang et al. 2020; FedAvgM: Hsu et al. 2019)."""

    lr: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _check(self, lr=self.lr > 0, momentum=0 <= self.momentum < 1)

    def make(self, parameters: Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum)


@dataclass(frozen=True)
class Nesterov(Outer):
    """SGD with Nesterov's momentum, as in DiLoCo (Douillard et al. 2023)."""

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _check(self, lr=self.lr > 0, momentum=0 < self.momentum < 1)

    def make(self, parameters: Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, nesterov=True)


@dataclass(frozen=True)
class Adaptive(Outer):
    """Adam (FedAdam, of FedOpt: Reddi et al. 2021; their epsilon is as large as 1e-3)."""

    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-3

    def __post_init__(self) -> None:
        _check(self, lr=self.lr > 0, betas=all(0 <= b < 1 for b in self.betas), eps=self.eps > 0)

    def make(self, parameters: Parameters) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr, betas=self.betas, eps=self.eps)


_RANGES = {
    "lr": "above 0",
    "momentum": "at least 0 (Nesterov: above 0) and below 1",
    "betas": "two numbers of at least 0 and below 1",
    "eps": "above 0",
}


def _check(outer: Any, **good: bool) -> None:
    for name, is_good in good.items():
        value = getattr(outer, name)
        if not is_good or (isinstance(value, float) and not math.isfinite(value)):
            raise SettingsError(f"You set {type(outer).__name__}({name}={value!r}); it must be {_RANGES[name]}.")
