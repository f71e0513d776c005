"""Flips bits in the memory of real runs, and compares each run with the undisturbed one of one worker.

    python tests/faults/flip_campaign.py --cases 500 --seed 7

A case: 1 to 4 workers, and one random bit of the weights, the optimizer state, a gradient sum, or the state that is
kept in memory, flipped after a random update, in a window in which that memory must not change. A worker flips bits in
the part that it looks at itself, so that the window is known exactly. Every update is verified here, and the state is
kept all the time, whatever it costs. Prints one JSON line per case and one at the end.
`--without` plants a bug that the campaign must find.
"""

from __future__ import annotations

import argparse
import functools
import json
import mmap
import os
import random
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from campaign import KEYS, Listener, main

WHERE = ("memory", "memory", "memory", "gradient", "copied", "kept")
"""memory: weights and optimizer state. copied: these too, just before they are copied to be kept. kept: the copy."""
WINDOWS = ("updated", "before", "met")
"""Right after the update, just before the next meeting, right after it (where a worker owns no gradient: before it)."""


@dataclass(frozen=True)
class Flip:
    """One flip: after how many updates, by which worker, where, in which window, and what decides the bit."""

    after: int
    rank: int
    where: str
    window: str
    seed: int


class Planter:
    """Flips one bit in this worker, once over all fleets of a run."""

    def __init__(self, flip: Flip, struck: mmap.mmap):
        self.flip = flip
        self.struck = struck

    def due(self, integrity: Any, *places: str) -> bool:
        """Return whether the flip is due in this window, and has not struck yet."""
        where = self.flip.where if self.flip.where in ("copied", "kept") else self.flip.window
        return where in places and not self.struck[0] and integrity.num_updates >= self.flip.after

    def strike(self, words: Any) -> None:
        """Flip a random bit of some words (int64)."""
        draw = random.Random(self.flip.seed)
        words = [w for w in words if len(w)]
        if not words:
            return
        chosen = draw.choices(words, [len(w) for w in words])[0]
        chosen.view("uint64")[draw.randrange(len(chosen))] ^= 1 << draw.randrange(64)
        self.struck[0] = 1

    def in_memory(self, integrity: Any) -> None:
        """Flip a bit of what this worker watches."""
        if integrity.is_watching:
            self.strike([memory._words for memory in integrity._memories])

    def in_gradients(self, integrity: Any, nodes: Any) -> None:
        """Flip a bit of gradient sums."""
        if integrity.is_watching:
            self.strike([node.numpy().view("int64") for node in nodes])

    def in_kept(self, snapshots: Any) -> None:
        """Flip a bit of the newest state that is kept, and die with all others, so that it is needed."""
        import numpy as np

        number = 0 if snapshots._words[0] > snapshots._words[1] else 1
        memory = mmap.mmap(snapshots._memories[number], 0)
        self.strike([np.frombuffer(memory, np.int64, snapshots._words[5 + number] // 8)])
        supervisor = os.getppid()
        workers = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        for pid in sorted(map(int, workers), key=lambda pid: pid == os.getpid()):
            os.kill(pid, signal.SIGKILL)


def arm(planter: Planter) -> None:
    """Let the flip strike in this process."""
    from samestep.core.integrity import Integrity
    from samestep.core.snapshot import Snapshots

    updated, publish, verify, write = Integrity.updated, Integrity.publish, Integrity.verify, Snapshots.write
    known: list[Any] = []

    is_gradient = planter.flip.where == "gradient"

    def after_update(self: Any, wanted: bool) -> None:
        updated(self, wanted)
        known[:] = [self]
        if not is_gradient and planter.due(self, "updated"):
            planter.in_memory(self)

    def before_meeting(self: Any, index: int) -> Any:
        if not is_gradient and planter.due(self, "before"):
            planter.in_memory(self)
        folds = publish(self, index)
        area = self._updated[index].area
        early = WINDOWS if area is not None and not area.nodes[0][0].numel() else ("updated", "before")
        if is_gradient and planter.due(self, *early):
            # What this worker has made, and others are about to read.
            planter.in_gradients(self, area.mine)
        return folds

    def after_meeting(self: Any, calls: Any, kind: str, *rest: Any) -> bool:
        if kind == "step.update (verify)" and planter.due(self, "met"):
            if is_gradient:
                # What others have made, and this worker is about to read.
                planter.in_gradients(self, [node for nodes in self._updated[0].area.nodes for node in nodes])
            else:
                planter.in_memory(self)
        return verify(self, calls, kind, *rest)

    def while_kept(self: Any, *arguments: Any) -> int:
        if known and planter.due(known[0], "copied"):
            planter.in_memory(known[0])
        num_bytes = write(self, *arguments)
        if known and planter.due(known[0], "kept"):
            planter.in_kept(self)
        return num_bytes

    Integrity.updated, Integrity.publish, Integrity.verify = after_update, before_meeting, after_meeting
    Snapshots.write = while_kept


def body(flip: Flip | None, struck: mmap.mmap, options: Any, context: Any) -> None:
    """Be a worker; flip the bit if it is this one's to flip. Only the first writes what is kept."""
    from samestep.settings import seat

    if flip is not None and context.rank == (0 if flip.where in ("copied", "kept") else flip.rank):
        arm(Planter(flip, struck))
    seat.take_part(context, functools.partial(main, num_epochs=6), options)


def play(num_workers: int, flip: Flip | None) -> tuple[Any, Listener, bool]:
    """Run one case; return how it ended, what it told, and whether a bit was flipped."""
    from samestep.launching.output import Plumbing
    from samestep.launching.supervisor import supervise
    from samestep.settings.entry import _fleet
    from samestep.settings.options import Options

    options, listener, struck = Options(workers=num_workers, replicas=5), Listener(), mmap.mmap(-1, 8)
    fleet = _fleet(functools.partial(body, flip, struck, options), options, Plumbing(hidden=True))
    try:
        outcome = supervise(fleet, num_workers, listener)
    finally:
        fleet.snapshots.close()
    return outcome, listener, bool(struck[0])


def violations(flip: Flip, outcome: Any, listener: Listener, expected: dict[str, Any]) -> list[str]:
    """Compare a case with the undisturbed run; return what is wrong."""
    wrong = []
    if outcome.code or outcome.message:
        wrong.append(f"ended with code {outcome.code}: {outcome.message[-300:]}")
    word = {
        "memory": ("A bit of the parameter", "A bit of the optimizer state"),
        "copied": ("A bit of the parameter", "A bit of the optimizer state"),
        "gradient": ("A bit of the gradient sum of replica",),
        "kept": ("is damaged and not used",),
    }[flip.where]
    if not any(w in note for w in word for note in listener.notes):
        wrong.append(f"not named: {listener.notes}")
    if sum("start again" in note for note in listener.notes) != 1:
        wrong.append(f"not started again once: {listener.notes}")
    if listener.facts is None:
        return [*wrong, "did not finish"]
    return wrong + [
        f"{key}: {listener.facts[key]}, not {expected[key]}" for key in KEYS if listener.facts[key] != expected[key]
    ]


def case_of(seed: int) -> tuple[int, Flip]:
    """Return the workers and the flip of a case."""
    draw = random.Random(seed)
    where = draw.choice(WHERE)
    num_workers = draw.randint(2 if where == "gradient" else 1, 4)
    window = draw.choice(WINDOWS)
    return num_workers, Flip(draw.randint(1, 55), draw.randrange(num_workers), where, window, draw.getrandbits(32))


def plant_bug(without: str) -> None:
    """Leave out a part of the mechanism."""
    from samestep.core import integrity, snapshot

    if without == "compare":
        integrity.Integrity.verify = lambda self, *rest: False
    elif without == "withdraw":
        snapshot.Snapshots.withdraw = lambda self, step: None
    elif without == "fold":
        snapshot.fold = lambda *rest: 0


def campaign(num_cases: int, seed: int, without: str = "", where: str = "") -> int:
    """Run the cases; return how many were wrong."""
    from samestep.launching import environment, zygote

    environment.prepare()
    zygote.warm()
    from samestep.settings.entry import _WARM

    zygote.warm(_WARM)
    from samestep.core import integrity
    from samestep.loop import keeper

    # Whatever the machine's speed: verify every update, and keep the state after every other step.
    integrity._SHARE = keeper._SNAPSHOT_SECONDS = keeper._SNAPSHOT_SHARE = 0
    plant_bug(without)
    outcome, undisturbed, _ = play(1, None)
    assert outcome.code == 0, outcome.message
    expected = undisturbed.facts
    assert without == "compare" or expected["updates_verified"] == expected["updates"]
    num_wrong = num_struck = num_played = 0
    for case in range(seed, seed + num_cases):
        num_workers, flip = case_of(case)
        if where not in ("", flip.where):
            continue
        outcome, listener, struck = play(num_workers, flip)
        wrong = violations(flip, outcome, listener, expected) if struck else []
        num_wrong, num_struck, num_played = num_wrong + bool(wrong), num_struck + struck, num_played + 1
        print(json.dumps({"case": case, "workers": num_workers, **asdict(flip), "struck": struck, "wrong": wrong}))
        sys.stdout.flush()
    print(json.dumps({"cases": num_played, "flips": num_struck, "wrong": num_wrong}))
    return num_wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", default="", choices=("", "compare", "withdraw", "fold"))
    parser.add_argument("--where", default="", choices=("", *WHERE), help="play only the cases that flip a bit there")
    chosen = parser.parse_args()
    sys.exit(min(campaign(chosen.cases, chosen.seed, chosen.without, chosen.where), 1))
