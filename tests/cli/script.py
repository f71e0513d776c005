"""A small training script; its arguments choose what it does besides."""

import json
import os
import sys
import time

import torch

import samestep
from samestep.launching.context import current

mode, rest = (sys.argv[1:] or [""])[0], sys.argv[2:]
settings = {name: int(value) for name, value in (word.split("=") for word in rest)}


def listening():
    """Descriptors of this worker and its supervisor that are listening sockets."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with open(f"/proc/net/{table}") as lines:
            inodes |= {line.split()[9] for line in lines if line.split()[3] == "0A"}
    held = set()
    for pid in (os.getpid(), os.getppid()):
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            try:
                held.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
            except OSError:
                continue
    return [inode for inode in inodes if f"socket:[{inode}]" in held]


def train(run, steps=4):
    model = torch.nn.Linear(4, 3)
    run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.randn(64, 4)
    for step in run.steps((x,), batch_size=16, steps=steps):
        for (shard,) in step:
            loss = model(shard).square().mean()
            if mode == "uneven" and step.number == 2:
                loss = loss * (1 + run.worker.size)
            step.backward(loss)
        step.update()
        if mode == "sleeps":
            sys.stdout.write(f"step {step.number}\n")
            time.sleep(60)
    return run.digest()


def main(run):
    if mode == "fails" and run.worker.rank == run.worker.size - 1:
        raise ValueError("planted")
    result = {
        "digest": train(run),
        "workers": run.worker.size,
        "argv": sys.argv[1:],
        "path": sys.path[0],
        "threads": torch.get_num_threads(),
        "listening": listening(),
    }
    return result


def second(run):
    return {"again": train(run)}


def third(run):
    train(run)
    return object()


if __name__ == "__main__":
    print("before")
    print(json.dumps(samestep.launch(main, **{"replicas": 4, **settings}), default=str))
    if mode == "twice":
        print(json.dumps(samestep.launch(second, **{"replicas": 4, **settings})))
        print(json.dumps(samestep.launch(third, **{"replicas": 4, **settings})))
    print("after" if current() is None else "after in a worker")
    if mode == "exits":
        sys.exit(5)
