"""What ways to train 1,000 clients come to on digits split by label skew: accuracy, seconds, memory.

python benchmarks/federated.py
python benchmarks/federated.py --only FedAvg --rounds 50 --store docs/measured/federated.md

The clients and the network are those of examples/federated_digits.py. A client that lies sends 10 times what it did,
the other way round.
"""

from __future__ import annotations

import argparse
import functools
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from report import Table, machine, show, store
from torch import nn
from torch.nn import functional as F

import samestep

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from federated_digits import NUM_CLIENTS, NUM_HELD_OUT, SKEW, load_data

ADAM = samestep.Adaptive(lr=0.02)
MASKING = samestep.Masking(numbers=samestep.FixedPoint(limit=1.0))
WAYS: dict[str, dict[str, Any]] = {
    "FedAvg": {"sample": 0.2, "lr": 0.5},
    "FedProx, mu 0.1": {"sample": 0.2, "lr": 0.5, "proximal": 0.1},
    "FedAvgM": {"sample": 0.2, "lr": 0.2, "outer": samestep.Momentum(lr=1.0, momentum=0.9)},
    "FedAdam": {"sample": 0.2, "outer": ADAM},
    "FedAdam, a third of the clients lost": {"sample": 0.2, "outer": ADAM, "drop": 0.33},
    "FedAdam, 10 % of the clients lie": {"sample": 0.2, "outer": ADAM, "lie": 0.1},
    "the same, NormBound(0.5)": {"sample": 0.2, "outer": ADAM, "lie": 0.1, "aggregate": samestep.NormBound(0.5)},
    "the same, TrimmedMean(0.1)": {"sample": 0.2, "outer": ADAM, "lie": 0.1, "aggregate": samestep.TrimmedMean(0.1)},
    "FedAdam, secure, 10 % lost": {"sample": 0.2, "outer": ADAM, "drop": 0.1, "secure": MASKING},
    "FedAdam, private": {
        "sample": 0.2,
        "outer": ADAM,
        "privacy": samestep.Privacy(clip=0.5, noise=1.0, delta=1e-4),
    },
}


def main(way: dict[str, Any], rounds: int, run: samestep.Run) -> dict[str, Any]:
    """Train; return the accuracy at the end, the first round from 95 % on, and seconds."""
    way = dict(way)
    share, lr = way.pop("lie", 0.0), way.pop("lr", 0.1)
    train, held_out = load_data()
    clients = samestep.Clients.by_label_skew(train, train[1], NUM_CLIENTS, alpha=SKEW, seed=0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds)
    federated = samestep.Federated(clients, **way)
    run.replicate(model, optimizer, scheduler, agree=federated)

    def is_right(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (model(batch[0]).argmax(dim=1) == batch[1]).float()

    begin, reached = time.perf_counter(), 0
    for step in run.steps(clients, batch_size=16, epochs=2, steps=rounds):
        for images, labels in step:
            loss = F.cross_entropy(model(images), labels)
            step.backward(loss)
            if step.client < share * NUM_CLIENTS:
                for parameter in model.parameters():
                    parameter.grad *= -10
        step.update()
        scheduler.step()
        if step.number % 5 == 4:
            accuracy = run.mean(is_right, held_out, batch_size=NUM_HELD_OUT // 8)
            reached = reached or (step.number + 1 if accuracy >= 0.95 else 0)
    privacy = way.get("privacy")
    epsilon = 0.0 if privacy is None else privacy.epsilon(rounds, federated.rate)
    return {"accuracy": accuracy, "reached": reached, "seconds": time.perf_counter() - begin, "epsilon": epsilon}


def cpu_seconds() -> float:
    """Return what all processes that have ended took: what others do on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(WAYS))
    parser.add_argument("--store", type=Path)
    args = parser.parse_args()
    rows, where = [], machine()
    for name in args.only:
        before = cpu_seconds()
        told = samestep.launch(functools.partial(main, WAYS[name], args.rounds), workers=args.workers, seed=0)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        reached = str(told["reached"]) if told["reached"] else "not"
        note = f"epsilon {told['epsilon']:.1f} at delta 1e-4" if told["epsilon"] else ""
        rows.append(
            [
                name,
                f"{told['accuracy']:.1%}",
                reached,
                f"{told['seconds']:.0f}",
                f"{cpu_seconds() - before:.0f}",
                f"{peak:.0f}",
                note,
            ]
        )
    title = f"{NUM_CLIENTS:,} clients, {args.rounds} rounds, {args.workers} workers"
    headings = [
        "way",
        "held-out accuracy",
        "95 % at round",
        "seconds",
        "CPU seconds",
        "MB of the largest process so far",
        "",
    ]
    tables = [Table(title, headings, rows)]
    show(tables, where)
    if args.store:
        store(tables, where, args.store)
