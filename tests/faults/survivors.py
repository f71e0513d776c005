"""Deaths at chosen places, in workers without a launcher (`small_fleet`): who is left plays on, who is new comes in.

    python tests/faults/survivors.py              prints one JSON line per case
    python tests/faults/survivors.py --planted    one per bug, planted in a case that must be wrong with it

A case names the workers, the places, and how many have to come back before the end. Steps take longer while somebody is
missing, so that replacements find the others still at work.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "laws"))
from small_fleet import Outcome, SmallFleet

MOST_STEPS = 400
PLACES = ("shard", "after", "mean", "move")
WRITING = ("anchor", "go_on", "begin", "residual", "memory", "spread")
"""Further places: just before a worker writes what its replicas go on from, in an update, round or edit."""


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        workers: how many.
        deaths: (slot, step, place): in a shard, after the update, in an evaluation, while replicas move, `WRITING`, or,
            whatever the step, as the first worker that is to let others in ("offer").
        returns: workers to wait for before the run may end.
        optimizer: what is trained with.
        loaders: processes that read ahead.
        audit: share of updates in which one shard is computed twice.
        moves: replicas move at random after every step.
        way: how replicas agree; at every step by default.
        is_lost: nobody can go on; the run is to start again from its newest state, which nobody does here.
    """

    workers: int
    deaths: tuple[tuple[int, int, str], ...] = ()
    returns: int = 0
    optimizer: str = "AdamW"
    loaders: int = 0
    audit: float = 0
    moves: bool = False
    way: str = ""
    is_lost: bool = False

    @property
    def undisturbed(self) -> Case:
        """The same in one worker, without deaths."""
        return Case(1, optimizer=self.optimizer, way=self.way)


CASES = (
    Case(2, ((1, 3, "shard"),)),
    Case(2, ((0, 3, "shard"),)),
    Case(3, ((0, 2, "shard"), (1, 2, "shard"))),
    Case(4, ((1, 2, "shard"), (2, 5, "shard"), (0, 8, "shard"))),
    Case(3, ((2, 4, "after"),)),
    Case(3, ((0, 5, "mean"),)),
    Case(2, ((1, 3, "shard"),), 1),
    Case(2, ((0, 3, "shard"),), 1),
    Case(3, ((0, 3, "shard"), (2, 3, "shard")), 2),
    Case(2, ((1, 3, "shard"),), 1, "SGD", moves=True),
    Case(2, ((0, 3, "shard"),), 1, "Adafactor"),
    Case(3, ((1, 3, "shard"),), 1, "Odd"),
    Case(2, ((1, 3, "shard"),), 1, "AdamW", 2),
    Case(3, ((1, 3, "shard"), (0, 6, "shard")), audit=1),
    Case(3, ((1, 3, "move"), (0, 8, "move")), moves=True),
    Case(3, ((0, 4, "shard"), (1, 9, "after")), way="Local"),
    Case(2, ((1, 4, "shard"),), 1, way="Local"),
    Case(3, ((1, 4, "shard"),), 1, way="Synchronous"),
    Case(3, ((2, 3, "shard"), (0, -1, "offer")), 2),
    Case(2, ((1, 3, "anchor"),), way="Local", is_lost=True),
    Case(2, ((1, 4, "go_on"),), way="Local", is_lost=True),
    Case(2, ((1, 4, "residual"),), way="Local", is_lost=True),
    Case(2, ((1, 5, "begin"),), way="Local", is_lost=True),
    Case(2, ((1, 5, "spread"),), way="Local", is_lost=True),
    Case(2, ((1, 4, "residual"),), way="Synchronous", is_lost=True),
    Case(2, ((1, 4, "memory"),), is_lost=True),
)
"""What the suite plays. "Odd" is an optimizer that samestep does not know, and that looks at all tensors at once."""


def nothing(*args: Any, **options: Any) -> None:
    """Stand in for a method."""


PLANTED = (
    ("buffers stay as the broken pass left them", "core.buffers:Buffers.restore", CASES[0]),
    ("who joins finds no optimizer state", "core.places:Places.reseat", CASES[6]),
    ("who joins counts its own calls", "core.calls:Calls.go_to", CASES[6]),
    ("who joins keeps its own buffers and averages", "loop.archive:Archive.take_over", CASES[6]),
    ("who is left keeps the pieces that it owned", "core.element_update:ElementUpdate.reseat", CASES[0]),
    ("who joins has no weights of each replica", "agree.own:Own.reseat", CASES[16]),
    ("who joins does not know what a codec has left out", "agree.coding:Coding.reseat", CASES[17]),
    ("a round is over before all have written what they go on from", "agree.rounds:Rounds._meet", CASES[19]),
)
"""What is planted, the method that does nothing then, and a case that must show it."""


class Board:
    """Memory that all processes share: which deaths have struck, and how many members the first worker sees."""

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")

    def strike(self, number: int) -> None:
        """Kill this process, unless that death has struck before."""
        if not self._words[number]:
            self._words[number] = 1
            os.kill(os.getpid(), signal.SIGKILL)

    def note(self, size: int) -> None:
        """Note how many take part; count those who have come back."""
        if size > self._words[100] > 0:
            self._words[101] += size - self._words[100]
        self._words[100] = size

    @property
    def num_back(self) -> int:
        """How many have come back."""
        return self._words[101]


def trained(case: Case, board: Board, run: Any) -> dict[str, Any]:
    """Train with what is hard to keep: buffers, random numbers, a scheduler, Python variables, a mean of weights."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(120, 8, generator=generator), torch.randint(3, (120,), generator=generator)
    model = nn.Sequential(nn.Linear(8, 300), nn.BatchNorm1d(300), nn.ReLU(), nn.Dropout(0.2), nn.Linear(300, 3))
    average = nn.Linear(300, 3)
    optimizer = optimizer_of(case.optimizer, model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    if case.moves:
        from restless import Restless

        run._session.crew.balance = Restless()
    run.replicate(model, optimizer, scheduler, average, audit=case.audit, agree=way_of(case.way))
    # Its own meeting after each update would hide that others are missing.
    memory = None if case.way else run.per_replica(lambda replica: {"seen": torch.zeros(1)})
    losses, noise, number = [], 0.0, 0

    def die(place: str) -> None:
        for index, (slot, step, where) in enumerate(case.deaths):
            is_due = (slot, where) == (run.worker.local_rank, place) and step in (number, -1)
            if is_due and not run._session.replaying:
                board.strike(index)

    def accuracy(batch: Any) -> Any:
        die("mean")
        return (model(batch[0]).argmax(1) == batch[1]).float()

    divide = run._session.model.divide

    def move(division: Any) -> None:
        die("move")
        divide(division)

    run._session.model.divide = move
    for place in (*WRITING, "offer"):
        strike_writing(place, die)
    for _ in range(3):
        for step in run.steps((x, y), 20, epochs=1, loaders=case.loaders):
            number = step.number
            for a, b in step:
                die("shard")
                if memory is not None:
                    memory["seen"] = memory["seen"] + a.mean()
                    step.mean(seen=memory["seen"])
                step.backward(F.cross_entropy(model(a), b))
            step.update(clip_norm=1.0)
            losses.append([step.loss, step.means])
            noise += float(torch.rand(()))
            with torch.no_grad():
                for mine, theirs in zip(average.parameters(), model[4].parameters(), strict=True):
                    mine.lerp_(theirs, 0.1)
            die("after")
            wait(case, board, run)
        if case.way == "Local":
            with run.edit():
                model[4].bias.mul_(0.5)
        scheduler.step()
        noise += run.mean(accuracy, (x, y), 50) + run.once(lambda: len(losses))
    mean = float(sum(p.double().sum() for p in average.parameters()).detach())
    return {"losses": losses, "noise": noise, "average": mean, "rate": optimizer.param_groups[0]["lr"]}


def strike_writing(place: str, die: Callable[[str], None]) -> None:
    """Let a worker die at one of `WRITING`, if it is to."""
    from samestep.agree.coding import Coding
    from samestep.agree.local import LiveLocal
    from samestep.agree.own import Own
    from samestep.core.per_replica import PerReplica
    from samestep.core.snapshot import Offers

    owners = {"residual": Coding, "memory": PerReplica, "spread": LiveLocal, "offer": Offers}
    owner = owners.get(place, Own)
    name = {Coding: "commit", PerReplica: "commit", Offers: "make"}.get(owner, place)
    act = getattr(owner, name)

    def struck(self: Any, *given: Any) -> None:
        die(place)
        act(self, *given)

    setattr(owner, name, struck)


def wait(case: Case, board: Board, run: Any) -> None:
    """Take time while somebody is missing who has to come back."""
    if run._session.replaying:
        return
    if run.worker.is_first:
        board.note(run.worker.size)
    if run.worker.size < case.workers and board.num_back < case.returns:
        time.sleep(0.4)


def optimizer_of(name: str, model: Any) -> Any:
    """Return the optimizer of that name."""
    import torch

    class Odd(torch.optim.Optimizer):
        """Divides by the norm of all gradients together, and keeps a number of its own in its group."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.01, "seen": 0.0})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                with_gradient = [p for p in group["params"] if p.grad is not None]
                norm = sum(float(p.grad.double().square().sum()) for p in with_gradient) ** 0.5
                group["seen"] += norm
                for p in with_gradient:
                    held = self.state[p].setdefault("held", torch.zeros_like(p))
                    held.mul_(0.9).add_(p.grad, alpha=1 / (norm + 1 / (1 + group["seen"])))
                    p.sub_(held, alpha=group["lr"])

    made = {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
        "Odd": Odd,
    }
    return made[name](model.parameters())


def way_of(name: str) -> Any:
    """Return the way to agree of that name."""
    import samestep
    from samestep.codecs import Int4, TopK

    made = {
        "": lambda: None,
        "Local": lambda: samestep.Local(every=4, outer=samestep.Nesterov(0.5, 0.5), fragments=2, codec=Int4(), delay=3),
        "Synchronous": lambda: samestep.Synchronous(codec=TopK(share=0.1)),
    }
    return made[name]()


def played(case: Case, seconds: float = 120.0) -> tuple[Outcome, int]:
    """Play a case; return also how many have come back."""
    board = Board()
    outcome = SmallFleet(lambda run: trained(case, board, run), case.workers, replicas=5).run(seconds)
    return outcome, board.num_back


def judged(case: Case, outcome: Outcome, num_back: int, expected: dict[str, Any]) -> list[str]:
    """Return what is wrong with a case."""
    if case.is_lost:
        return [] if outcome.kinds("lost") and not outcome.results else ["the others went on with half of it"]
    wrong = [] if outcome.results else ["nobody came to the end"]
    wrong += ["a worker could not go on"] * bool(outcome.kinds("lost"))
    wrong += [f"{num_back} came back, not {case.returns}"] * (num_back < case.returns)
    num_killed = sum(os.WIFSIGNALED(status) for _, status in outcome.statuses)
    wrong += [f"{num_killed} were killed"] * (num_killed < len(case.deaths))
    moved = any("Replicas moved" in text for text in outcome.kinds("note"))
    wrong += ["replicas did not move" if case.moves else "replicas moved"] * (moved != case.moves)
    for slot, result in outcome.results.items():
        wrong += [f"worker {slot}: {key}" for key in expected if key != "workers" and result[key] != expected[key]]
    return wrong


def main() -> int:
    """Play all cases; return how many were wrong."""

    expected: dict[Case, Any] = {}
    num_wrong = 0
    for case in CASES:
        if case.undisturbed not in expected:
            outcome, _ = played(case.undisturbed)
            expected[case.undisturbed] = outcome.results[0]
        begin = time.monotonic()
        outcome, num_back = played(case)
        wrong = judged(case, outcome, num_back, expected[case.undisturbed])
        num_wrong += bool(wrong)
        told = {"case": repr(case), "seconds": round(time.monotonic() - begin, 2), "wrong": wrong}
        print(json.dumps(told), flush=True)
    return num_wrong


def planted() -> int:
    """Play a case with each bug; return how many were not found."""
    import importlib
    from unittest import mock

    num_alive = 0
    for words, place, case in PLANTED:
        outcome, _ = played(case.undisturbed)
        module, _, path = place.partition(":")
        owner, _, name = path.partition(".")
        with mock.patch.object(getattr(importlib.import_module(f"samestep.{module}"), owner), name, nothing):
            try:
                wrong = judged(case, *played(case, seconds=20.0), outcome.results[0])
            except TimeoutError:
                wrong = ["it has not ended"]
        num_alive += not wrong
        print(json.dumps({"bug": words, "wrong": wrong}), flush=True)
    return num_alive


if __name__ == "__main__":
    sys.exit(min(planted() if "--planted" in sys.argv else main(), 1))
