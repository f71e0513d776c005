"""Runs a training under random faults, many times, and compares each with the undisturbed run of one worker.

    python tests/faults/campaign.py --cases 1000 --seed 7

A case: 1 to 5 workers, 1 to 6 faults at uniformly random instants. Each fault is armed in the worker that it strikes:
a timer whose signal the kernel delivers wherever the worker then is, in Python or in C. Prints one JSON line per case
and one at the end. One process forks all fleets, so a case takes about a second.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from dataclasses import dataclass
from typing import Any

KINDS = ("kill", "segv", "exit", "stop")
KEYS = ("weights_digest", "optimizer_digest", "samples_digest", "samples_exactly_once", "steps", "result")


@dataclass(frozen=True)
class Fault:
    """One fault: seconds after the case began, the worker's rank, and what happens to it."""

    at: float
    rank: int
    kind: str


def main(run: Any, num_epochs: int = 12) -> dict[str, Any]:
    """Train with what is hard to bring back: Python variables, a scheduler, an average of weights, early stopping."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(256, 16, generator=generator), torch.randint(4, (256,), generator=generator)
    model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4))
    average = nn.Linear(64, 4)
    average.load_state_dict(model[4].state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    run.replicate(model, optimizer, scheduler, average)
    losses, best, bad, epochs = [], 9.0, 0, 0
    for _ in range(num_epochs):
        for step in run.steps((x, y), 24, epochs=1):
            for a, b in step:
                step.backward(F.cross_entropy(model(a), b))
            step.update(clip_norm=1.0)
            losses.append(step.loss)
            with torch.no_grad():
                for mine, theirs in zip(average.parameters(), model[4].parameters(), strict=True):
                    mine.lerp_(theirs, 0.1)
        scheduler.step()
        accuracy = run.mean(lambda batch: (model(batch[0]).argmax(1) == batch[1]).float(), (x, y), 50)
        epochs += 1
        best, bad = (step.loss, 0) if step.loss < best else (best, bad + 1)
        if bad > 6:
            break
    total = float(sum(p.double().sum() for p in average.parameters()).detach())
    return {"losses": sum(losses), "best": best, "accuracy": accuracy, "average": total, "epochs": epochs}


def body(begun: mmap.mmap, faults: tuple[Fault, ...], options: Any, context: Any) -> None:
    """Be a worker, with the next fault meant for it armed."""
    from samestep.settings import seat

    since = struct.unpack("d", begun[:8])[0]
    coming = [f for f in faults if f.rank == context.rank and since + f.at > time.monotonic()]
    if coming:
        arm(coming[0].kind, since + coming[0].at - time.monotonic())
    seat.take_part(context, main, options)


def arm(kind: str, seconds: float) -> None:
    """Let a fault strike this process after some seconds."""
    strikes = {
        "segv": lambda *_: ctypes.string_at(0),
        "exit": lambda *_: os._exit(7),
        "stop": lambda *_: os.kill(os.getpid(), signal.SIGSTOP),
    }
    # Without a handler the signal ends the process where it stands; with one, at the next line of Python.
    signal.signal(signal.SIGALRM, strikes.get(kind, signal.SIG_DFL))
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))


class Listener:
    """Takes what a run tells."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] | None = None
        self.notes: list[str] = []
        self.steps: list[int] = []

    @property
    def deaths(self) -> list[str]:
        """What was told of deaths."""
        return [n for n in self.notes if not n.endswith("is back.") and "Replicas moved after" not in n]

    def frame(self, frame: Any) -> bool:
        if frame.kind == "finished":
            self.facts = frame.info["facts"]
        elif frame.kind == "note":
            self.notes.append(frame.info["text"])
        elif frame.kind == "progress":
            self.steps.append(frame.info["step"])
        return False

    def output(self, stream: int, data: bytes) -> None:
        pass


def play(num_workers: int, faults: tuple[Fault, ...]) -> tuple[Any, Listener, float]:
    """Run one case."""
    from samestep.launching.output import Plumbing
    from samestep.launching.supervisor import supervise
    from samestep.settings.entry import _fleet
    from samestep.settings.options import Options

    options, listener, begun = Options(workers=num_workers, replicas=5, hang_after=1.0), Listener(), mmap.mmap(-1, 8)
    begin = time.monotonic()
    begun[:8] = struct.pack("d", begin)
    fleet = _fleet(functools.partial(body, begun, faults, options), options, Plumbing(hidden=True))
    try:
        outcome = supervise(fleet, num_workers, listener)
    finally:
        if fleet.snapshots is not None:
            fleet.snapshots.close()
    return outcome, listener, time.monotonic() - begin


def violations(outcome: Any, listener: Listener, expected: dict[str, Any], num_faults: int) -> list[str]:
    """Compare a case with the undisturbed run; return what is wrong."""
    from samestep.launching.restarts import IN_VAIN

    wrong = []
    if outcome.code == 1 and "came no further" in outcome.message and len(listener.deaths) >= IN_VAIN - 1:
        # So many faults in a row, before the next call was recorded, look like a script that always crashes there.
        return []
    if outcome.code or outcome.message:
        wrong.append(f"ended with code {outcome.code}: {outcome.message[-300:]}")
    if listener.facts is None:
        return [*wrong, "did not finish"]
    wrong += [
        f"{key}: {listener.facts[key]}, not {expected[key]}" for key in KEYS if listener.facts[key] != expected[key]
    ]
    if listener.steps != sorted(listener.steps):
        wrong.append(f"progress went back: {listener.steps}")
    if len(listener.deaths) > num_faults:
        wrong.append(f"{len(listener.deaths)} deaths for {num_faults} faults: {listener.deaths}"[:600])
    if os.listdir("/proc/self/task") != [str(os.getpid())]:
        wrong.append("a thread is left")
    try:
        os.waitpid(-1, os.WNOHANG)
        wrong.append("a process is left")
    except ChildProcessError:
        pass
    return wrong


def case_of(seed: int, span: float) -> tuple[int, tuple[Fault, ...]]:
    """Return the workers and the faults of a case."""
    draw = random.Random(seed)
    num_workers = draw.randint(1, 5)
    faults = [
        Fault(draw.uniform(0, span), draw.randrange(num_workers), draw.choices(KINDS, (8, 2, 2, 1))[0])
        for _ in range(draw.randint(1, 6))
    ]
    return num_workers, tuple(sorted(faults, key=lambda fault: fault.at))


def campaign(num_cases: int, seed: int) -> int:
    """Run the cases; return how many were wrong."""
    from samestep.launching import environment, zygote

    environment.prepare()
    zygote.warm()
    from samestep.settings.entry import _WARM

    zygote.warm(_WARM)
    outcome, undisturbed, _ = play(1, ())
    assert outcome.code == 0, outcome.message
    expected = undisturbed.facts
    _, _, span = play(3, ())
    num_wrong = num_deaths = 0
    open_before = len(os.listdir("/proc/self/fd"))
    for case in range(seed, seed + num_cases):
        num_workers, faults = case_of(case, span * 1.5)
        outcome, listener, seconds = play(num_workers, faults)
        wrong = violations(outcome, listener, expected, len(faults))
        if len(os.listdir("/proc/self/fd")) > open_before:
            wrong.append("descriptors are left")
        deaths = len(listener.deaths)
        num_wrong, num_deaths = num_wrong + bool(wrong), num_deaths + deaths
        print(
            json.dumps(
                {"case": case, "workers": num_workers, "deaths": deaths, "seconds": round(seconds, 2), "wrong": wrong}
            )
        )
        sys.stdout.flush()
    print(json.dumps({"cases": num_cases, "deaths": num_deaths, "wrong": num_wrong}))
    return num_wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    sys.exit(min(campaign(chosen.cases, chosen.seed), 1))
