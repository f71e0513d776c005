"""A script that is played under every way to agree, and the ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import samestep
from samestep.codecs import BFloat16, Feedback, Int4, Int8, PowerSGD, RandomK, Sign, TopK

WAYS: dict[str, Any] = {
    "synchronous": samestep.Synchronous(),
    "synchronous int8": samestep.Synchronous(codec=Int8(block=16)),
    "synchronous bf16": samestep.Synchronous(codec=BFloat16()),
    "synchronous top-k": samestep.Synchronous(codec=TopK(share=0.2)),
    "synchronous sign, warmed up": samestep.Synchronous(codec=Feedback(Sign(), warm_up=3)),
    "synchronous PowerSGD": samestep.Synchronous(codec=PowerSGD(rank=2)),
    "local average": samestep.Local(every=4),
    "local DiLoCo": samestep.Local(every=3, outer=samestep.Nesterov(lr=0.5, momentum=0.5)),
    "local in fragments, 4 bits": samestep.Local(every=5, fragments=3, codec=Int4(block=16)),
    "local warmed up, random-k": samestep.Local(every=4, warm_up=2, codec=Feedback(RandomK(share=0.3))),
    "local in fragments, overlapped, int8": samestep.Local(every=4, fragments=2, delay=3, codec=Int8(block=16)),
    "local FedAdam": samestep.Local(every=2, outer=samestep.Adaptive(lr=0.02)),
}
"""Every way to agree keeps the promise: same bits for any number of workers, for any crash and resume."""

OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
}


def samples(count: int = 70) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs (count, 6) and targets (count, 1)."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    return x, x[:, :1] - x[:, 1:2] / 2


def script(
    way: Any,
    steps: int = 11,
    optimizer: str = "sgd",
    normed: bool = True,
    batch_size: int = 25,
    clip_norm: float | None = 5.0,
    decay: float = 0.5,
    after: Callable | None = None,
    **settings: Any,
) -> Callable:
    """Return a `main` that trains a small network under a way to agree, and returns what it saw.

    Args:
        way: to agree.
        steps, batch_size, clip_norm: of its loop; some shards are uneven, and the last of an epoch is short.
        optimizer: one of `OPTIMIZERS`.
        normed: whether the network has batch normalisation and dropout.
        decay: of the learning rate, every 4 steps.
        after: called with (run, step, model) after every update.
        settings: for `run.replicate`.
    """

    def main(run: samestep.Run) -> Any:
        middle = [nn.BatchNorm1d(16), nn.Dropout(0.2)] if normed else []
        model = nn.Sequential(nn.Linear(6, 16), *middle, nn.Tanh(), nn.Linear(16, 1))
        made = OPTIMIZERS[optimizer](model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(made, 4, gamma=decay)
        run.replicate(model, made, scheduler, agree=way, **settings)
        seen = []
        for step in run.steps(samples(), batch_size=batch_size, steps=steps):
            for x, y in step:
                loss = (model(x) - y).square().mean()
                step.mean(twice=loss * 2)
                step.backward(loss)
            step.update(clip_norm=clip_norm)
            scheduler.step()
            seen.append([step.loss, step.means["twice"]])
            if after is not None:
                after(run, step, model)
        seen.append(run.mean(lambda batch: (model(batch[0]) - batch[1]).square().mean(), samples(), batch_size=16))
        return seen, [p.detach().clone() for p in model.parameters()]

    return main
