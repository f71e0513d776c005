"""A training of 100 steps in which a worker hangs once, in the way that its argument names. Prints a digest.

hanging.py KIND MARK      MARK: a file that says that it has happened
"""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import samestep

KIND, MARK = sys.argv[1], Path(sys.argv[2])
AT_STEP, NUM_STEPS, BUSY_SECONDS = 30, 100, 3.0


def first_time():
    """Whether nobody was here before, in this fleet or an earlier one."""
    try:
        os.close(os.open(MARK, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def hang():
    if KIND == "sleep":
        time.sleep(1e6)  # line: sleep
    elif KIND == "lock":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()  # line: lock
    elif KIND == "loop":
        while True:
            sum(range(1000))  # line: loop
    elif KIND == "gil":
        libc = ctypes.PyDLL(None)
        while True:
            libc.sleep(1_000_000)  # line: gil
    elif KIND == "deaf":
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        ctypes.PyDLL(None).sleep(1_000_000)
    elif KIND == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)  # line: stop
    elif KIND == "outside":
        MARK.write_text(str(os.getpid()))


class Samples:
    """Samples, of which one takes for ever the first time, where the kind is "loader"."""

    def __init__(self):
        self.x = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
        self.num_read = 0

    def __len__(self):
        return 256

    def __getitem__(self, index):
        self.num_read += 1
        if KIND == "loader" and self.num_read == 400 and first_time():
            time.sleep(1e6)  # line: loader
        return self.x[index], index % 4


def long_work(run, model, data):
    """Take long wherever a run may."""

    def slow(batch):
        time.sleep(BUSY_SECONDS / 4)
        return F.cross_entropy(model(batch[0]), batch[1])

    run.mean(slow, data, 64)
    run.once(lambda: time.sleep(BUSY_SECONDS))
    if run.worker.rank == 1:
        time.sleep(BUSY_SECONDS)
    run.save(f"{MARK}-saved")


def main(run):
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    run.replicate(model, torch.optim.Adam(model.parameters(), lr=1e-2))
    data = Samples()
    if KIND == "busy" and run.worker.rank == 1:
        time.sleep(BUSY_SECONDS)
    for step in run.steps(data, 32, steps=NUM_STEPS, loaders=int(KIND == "loader")):
        for x, y in step:
            if KIND == "outside":
                time.sleep(0.005)
            if KIND == "busy" and step.number == 0 and run.worker.rank == 1:
                time.sleep(BUSY_SECONDS)
            is_due = run.worker.rank == run.worker.size - 1 and step.number == AT_STEP
            if is_due and KIND not in ("none", "loader", "busy") and first_time():
                hang()
            step.backward(F.cross_entropy(model(x), y))
        step.update()
        if MARK.exists() and step.number == AT_STEP + 1 and run.worker.rank == 0:
            Path(f"{MARK}-back").touch()
        if KIND == "busy" and step.number == AT_STEP:
            long_work(run, model, data)
    print("digest", run.digest())


samestep.launch(main, replicas=4)
