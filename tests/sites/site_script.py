"""A site as a user writes it, that can be told to die: `samestep run site_script.py -- AT NAME SECRET FLAGS...`

FLAGS: folder:place:nth:rank, kill the worker of that rank at the nth call of a place, once for all processes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import samestep
from samestep.sites.errand import Errand
from samestep.sites.recipe import LiveSites
from samestep.sites.site import Site

AT, NAME, SECRET, *FLAGS = sys.argv[1:] if __name__ == "__main__" else ("127.0.0.1:1", "nobody", "")
PLACES = {
    "give": (Errand, "give"),
    "ask": (Errand, "_ask"),
    "encode": (Site, "_encoded"),
    "land": (Site, "_land"),
    "visit": (LiveSites, "_visit"),
}


def strike(run: samestep.Run, flag: str) -> None:
    """Kill this process just before a call, or just after it ("after" before the name)."""
    folder, place, nth, rank = flag.split(":")
    owner, name = PLACES[place.removeprefix("after ")]
    original, calls = getattr(owner, name), Counter()
    mark = Path(folder) / f"{NAME} {place} {nth} {rank}"

    def struck(self, *args, **options):
        calls[place] += 1
        is_due = calls[place] == int(nth) and run.worker.rank == int(rank) and not mark.exists()
        made = original(self, *args, **options) if place.startswith("after ") else None
        if is_due:
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return made if place.startswith("after ") else original(self, *args, **options)

    setattr(owner, name, struck)


def train(run: samestep.Run, way: samestep.Sites, number: int) -> str:
    """Train a network on the data of one site; return a digest of the weights."""
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(160, 6, generator=generator), torch.randint(3, (160,), generator=generator)
    model = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run.replicate(model, optimizer, agree=way)
    for step in run.steps((x, y), 16, epochs=3):
        for a, b in step:
            step.backward(F.cross_entropy(model(a), b))
        step.update()
    return run.digest()


def way_of(at: str, name: str, secret: str | None) -> samestep.Sites:
    codec, outer = samestep.codecs.Int8(block=16), samestep.Nesterov(0.7, 0.5)
    return samestep.Sites(at, name, every=5, outer=outer, codec=codec, back=codec, secret=secret)


def main(run: samestep.Run) -> str:
    for flag in FLAGS:
        strike(run, flag)
    return train(run, way_of(AT, NAME, SECRET or None), ord(NAME))


if __name__ == "__main__":
    samestep.launch(main, replicas=4, seed=3)
