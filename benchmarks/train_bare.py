"""Trains a small network for so many epochs; nothing is imported, read or computed before `run.replicate`.

samestep run benchmarks/train_bare.py -- 100
"""

from __future__ import annotations

import sys

import torch
from torch.nn import functional as F

import samestep


def main(run: samestep.Run) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(4096, 64, generator=generator), torch.randint(10, (4096,), generator=generator)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run.replicate(model, optimizer)
    for step in run.steps((x, y), batch_size=256, epochs=int(sys.argv[1])):
        for a, b in step:
            step.backward(F.cross_entropy(model(a), b))
        step.update()


if __name__ == "__main__":
    samestep.launch(main)
