"""Trains under Stale on started workers: python stale_script.py FACTS WORKERS record|replay SCHEDULE [DIE_AT]

A worker may kill itself inside a shard of a step, once.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import samestep


def meet_death(rank, marker):
    """Kill the second worker; the first keeps its shard until then, so that the second comes to have one."""
    if rank == 1:
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def main(run, agree, die_at, marker):
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run.replicate(model, optimizer, agree=agree)
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(96, 8, generator=generator), torch.randint(0, 3, (96,), generator=generator)
    losses = []
    for step in run.steps(data, batch_size=24, epochs=10):
        for x, y in step:
            if 0 <= die_at <= step.number and not marker.exists():
                meet_death(run.worker.rank, marker)
            step.backward(F.cross_entropy(model(x), y))
        step.update(clip_norm=1.0)
        losses.append(repr(step.loss))
    return {"losses": losses, "digest": run.digest()}


if __name__ == "__main__":
    facts, workers, way, schedule, *rest = sys.argv[1:]
    chosen = samestep.Stale(bound=3, **{way: schedule})
    die_step = int(rest[0]) if rest else -1
    done = samestep.launch(
        lambda run: main(run, chosen, die_step, Path(facts + ".died")), replicas=4, workers=int(workers), seed=0
    )
    Path(facts).write_text(json.dumps(done))
