"""Strikes a training at every line of our own protocol, and compares each run with the undisturbed one of one worker.

    python -m tests.faults.points                     a sample: each function, in the first and in another worker
    python -m tests.faults.points --all               a kill at every line, in both, before and after a first death
    python -m tests.faults.points --all --kinds stop oserror memory pause

Prints one JSON line per case and one at the end. What strikes where is decided by `striking`; a function that is new in
the protocol is one more word in `PROTOCOL`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).parent))
from campaign import Listener, violations
from striking import KINDS, Board, Point, Strike, Tracer, points_of

PROTOCOL = (
    *("samestep.settings.seat:take_part", "samestep.settings.seat:play", "samestep.settings.seat:_seat"),
    "samestep.settings.seat:_group",
    *(f"samestep.core.arena:Arena.{name}" for name in ("__init__", "exchange", "allocate", "_round", "_wait")),
    *(f"samestep.core.arena:Arena.{name}" for name in ("_block_until", "wake", "_seat", "reform", "join")),
    *("samestep.core.regions:Regions.take", "samestep.core.calls:Calls.end_shards"),
    *("samestep.loop.crew:Crew.surviving", "samestep.loop.crew:Crew.regroup"),
    *("samestep.loop.newcomer:who_joins", "samestep.loop.newcomer:let_in"),
    *(f"samestep.loop.newcomer:Newcomer.{name}" for name in ("first", "further", "come_in", "_await_offer")),
    *("samestep.core.model:Model.reseat", "samestep.core.model:Trained.reseat", "samestep.core.model:Trained._meet"),
    *("samestep.core.element_update:ElementUpdate.reseat", "samestep.core.places:Places.reseat"),
    *("samestep.core.places:Places.add", "samestep.loop.archive:Archive.take_over"),
    *(f"samestep.core.integrity:Integrity.{name}" for name in ("publish", "verify", "updated", "watch", "reseat")),
    *("samestep.core.calls:Calls.meet", "samestep.core.calls:Calls.heard", "samestep.core.calls:Calls.ask"),
    *(f"samestep.core.model:Trained.{name}" for name in ("__init__", "reload_if_stale", "release")),
    *(f"samestep.core.gradients:Gradients.{name}" for name in ("begin_pass", "begin_shard", "end_shard", "presence")),
    *(f"samestep.core.gradients:_Sums.{name}" for name in ("arrive", "fold", "add_leaf", "add")),
    *(f"samestep.core.buffers:Buffers.{name}" for name in ("begin_pass", "end_shard", "merge", "restore")),
    "samestep.core.fold:Fold.chunk",
    *(f"samestep.core.element_update:ElementUpdate.{name}" for name in ("apply", "_step", "notice", "settle")),
    *(f"samestep.core.element_update:ElementUpdate.{name}" for name in ("_place", "full_state", "load")),
    *(f"samestep.agree.synchronous:LiveSynchronous.{name}" for name in ("update", "_update", "_commit")),
    *(f"samestep.agree.reduction:Reduction.{name}" for name in ("make", "_norm")),
    *("samestep.agree.nonfinite:Tolerance.check", "samestep.agree.nonfinite:Tolerance.count"),
    *(f"samestep.core.guard:Guard.{name}" for name in ("check", "open", "accept", "accept_update")),
    *(f"samestep.core.snapshot:Snapshots.{name}" for name in ("write", "newest", "_next", "_map", "num_calls")),
    *(f"samestep.loop.keeper:Keeper.{n}" for n in ("after_step", "at_end", "write", "_snapshot_if_due", "_snapshot")),
    "samestep.loop.keeper:Keeper._facts",
    *(f"samestep.loop.replay:Replay.{n}" for n in ("begin", "took", "reach", "_begin_after_death", "_begin_replay")),
    "samestep.loop.replay:Replay._come_in",
    *(f"samestep.loop.archive:Archive.{name}" for name in ("prepare", "save", "snapshot", "restore", "_first")),
    *(f"samestep.loop.archive:Archive.{name}" for name in ("_write", "_contents", "_restore_optimizer")),
    *(f"samestep.loop.session:Session.{name}" for name in ("recorded", "of_first", "tell", "save", "finish")),
    *(f"samestep.storage.ledger:Ledger.{name}" for name in ("append", "next", "to_facts", "extend", "check_finished")),
    *(f"samestep.loop.stepping:Stepping.{name}" for name in ("walk", "update", "_one")),
    *(f"samestep.loop.step:Step.{name}" for name in ("__iter__", "_play", "backward", "update")),
    *("samestep.loop.feed:Feed.commit", "samestep.loop.feed:Feed.batches", "samestep.loop.feed:count_read"),
    *("samestep.storage.checkpoint:write", "samestep.storage.checkpoint:load_newest"),
    "samestep.launching.channel:Sender.send",
)
"""Where a worker does what the others, its supervisor or those who come after it rely on."""

NUM_WORKERS, NUM_REPLICAS = 2, 5
DEADLINE = 300.0
"""Seconds after which a run counts as hung. It takes one, with a stopped worker two, but 40 on a machine that is
very busy."""


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        writes: whether it writes a checkpoint after every step.
        strikes: what strikes whom.
        num_before: how many of the strikes only lead to where the others are.
    """

    writes: bool
    strikes: tuple[Strike, ...] = ()
    num_before: int = 0


@dataclass(frozen=True)
class Reached:
    """Where a worker came to a point: one of rank `rank`, after `birth` others, `count` times.

    Attributes:
        case: the first run in which it did; a strike there comes on top.
    """

    point: Point
    rank: int
    birth: int
    count: int
    case: Case

    def struck(self, kind: str, draw: random.Random) -> Strike:
        """Return a strike there, at a random one of the times."""
        return Strike(kind, self.rank, self.birth, self.point, draw.randint(1, self.count))


@dataclass
class Played:
    """What became of a run.

    Attributes:
        outcome, listener: how it ended, and what it told.
        seconds: how long it took.
        board: what its workers counted.
        kept: digests of the newest checkpoint; empty without.
        wrong: what it left behind, and what its script saw that must not be.
    """

    outcome: Any
    listener: Listener
    seconds: float
    board: Board
    kept: dict[str, str]
    wrong: list[str]


class TookTooLong(BaseException):
    """A run has not ended in time."""


class Average:
    """A mean of weights over steps: registered, and not a function of what the ledger holds."""

    def __init__(self, weight: Any):
        self.value = weight.detach().clone()

    def take(self, weight: Any) -> None:
        self.value.lerp_(weight.detach(), 0.3)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value.copy_(state["value"])


def main(run: Any, wrong: Callable[[str], None], saves: str | None, num_workers: int) -> dict[str, Any]:
    """Train with what a restart could lose: Python variables, random numbers, buffers, a scheduler, skipped updates.

    Steps take longer while somebody is missing, so that who comes in their place finds the others still there.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    from samestep.errors import StorageError

    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 6, generator=generator), torch.randint(3, (40,), generator=generator)
    x[17, 3] = float("nan")
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    average = Average(model[0].weight)
    run.replicate(model, optimizer, scheduler, average, nonfinite=1)
    losses, noise, skipped = [], 0.0, 0

    def count() -> str:
        if run._session.replaying:
            wrong("run.once was made again in a replay")
        return f"{len(losses)} losses"

    words = [run.once(count)]
    for _ in range(2):
        for step in run.steps((x, y), 10, epochs=1):
            for a, b in step:
                step.backward(F.cross_entropy(model(a), b))
            step.update(clip_norm=0.5)
            scheduler.step()
            average.take(model[0].weight)
            skipped += step.skipped
            losses.append(0.0 if step.skipped else step.loss)
            noise += float(torch.rand(()))
            if run.worker.size < num_workers and not run._session.replaying:
                time.sleep(0.15)
        words.append(run.once(count))
        if saves is not None:
            with contextlib.suppress(StorageError):
                run.save(saves)
    mean = run.mean(lambda batch: model(batch[0].nan_to_num()).argmax(1) == batch[1], (x, y), 15)
    told = {"losses": losses, "noise": noise, "skipped": skipped, "words": words, "mean": mean}
    return {**told, "average": float(average.value.double().sum())}


def body(board: Board, points: Sequence[Point], strikes: Sequence[Strike], folder: str | None, context: Any) -> None:
    """Be a worker that is followed."""
    from samestep.settings import seat
    from samestep.settings.options import Options

    def wrong(words: str) -> None:
        context.sender.send("note", {"text": f"wrong: {words}"})

    snapshots = context.snapshots
    tracer = Tracer(points, board, strikes, context.rank, lambda: snapshots.num_calls)
    saves = os.path.join(folder, "saves") if folder is not None else None
    tracer.start()
    seat.take_part(
        context, functools.partial(main, wrong=wrong, saves=saves, num_workers=context.num_forked), Options()
    )


def hurried(place: str) -> contextlib.ExitStack:
    """Within it, state is kept in memory after every second step, each step is told, and what is slow is left out.

    Args:
        place: where what would go to the folder for temporary files goes.
    """
    from samestep.guarding import fence
    from samestep.loop import keeper, record

    stack = contextlib.ExitStack()
    for owner, name, value in (
        (keeper, "_SNAPSHOT_SECONDS", 0.0),
        (keeper, "_SNAPSHOT_SHARE", 0),
        (fence, "_POLL", 0.1),
        (os, "fsync", lambda descriptor: None),
        (record, "_PROGRESS_SECONDS", 0.0),
        (record, "pss_bytes", lambda: 0),
        (tempfile, "tempdir", place),
    ):
        stack.enter_context(mock.patch.object(owner, name, value))
    return stack


def play(
    case: Case, points: Sequence[Point] = (), num_workers: int = NUM_WORKERS, limit_seconds: float = DEADLINE
) -> Played:
    """Run the training once."""
    from samestep.launching.output import Plumbing
    from samestep.launching.supervisor import supervise
    from samestep.settings.entry import _fleet
    from samestep.settings.options import Options

    board, listener, begin = Board(len(points)), Listener(), time.monotonic()
    descriptors = len(os.listdir("/proc/self/fd"))
    place = tempfile.mkdtemp(prefix="points-")
    folder = os.path.join(place, "run") if case.writes else None
    every = 1 if case.writes else None
    options = Options(workers=num_workers, replicas=NUM_REPLICAS, hang_after=1.0, checkpoint=folder, every=every)
    fleet = _fleet(functools.partial(body, board, points, case.strikes, folder), options, Plumbing(hidden=True))
    outcome, kept = None, {}
    try:
        with hurried(place), deadline(limit_seconds):
            outcome = supervise(fleet, num_workers, listener)
        wrong = [note for note in listener.notes if note.startswith("wrong: ")]
        if folder is not None and listener.facts is not None:
            kept, more = kept_in(Path(folder))
            wrong += more
    except TookTooLong:
        wrong = [f"it has not ended after {limit_seconds} s"]
    finally:
        assert fleet.snapshots is not None
        fleet.snapshots.close()
        shutil.rmtree(place)
    listener.notes = [n for n in listener.notes if "start again" in n or "replicas moved" in n]
    if len(os.listdir("/proc/self/fd")) > descriptors:
        wrong.append("descriptors are left")
    return Played(outcome, listener, time.monotonic() - begin, board, kept, wrong)


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise `TookTooLong` here after some seconds."""

    def late(number: int, frame: Any) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def kept_in(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Return digests of the newest checkpoint of a run that has come to its end, and what is wrong in its folder."""
    from samestep.errors import CheckpointError
    from samestep.storage import checkpoint
    from samestep.storage.digest import tensors_digest

    known = ("step-", ".lock", "saves", "hangs")
    wrong = [f"{name} is left" for name in os.listdir(folder) if not name.startswith(known)]
    try:
        found, skipped = checkpoint.load_newest(folder)
    except CheckpointError as error:
        return {}, [*wrong, f"no checkpoint loads: {error}"]
    wrong += [f"{path.name} is torn: {reason}" for path, reason in skipped]
    kept = {"weights": tensors_digest(found.weights.items()), "state": tensors_digest(found.state.items())}
    return {**kept, "step": str(found.step)}, wrong


def judged(played: Played, case: Case, expected: Played) -> tuple[list[str], bool]:
    """Return what is wrong with a run, and whether what was planned has struck: one death may come before another."""
    strikes = case.strikes
    has_struck = any(played.board.struck(number) is not None for number in range(case.num_before, len(strikes)))
    deadly = [strike for strike in strikes if strike.kind != "pause"]
    if played.outcome is None:
        return played.wrong, has_struck
    too_early = any(played.board.struck(number) == 0 for number in range(len(strikes)))
    if played.outcome.code == 1 and "planted at a point" in played.outcome.message and too_early:
        # An error before the first recorded call is not tried again, and is told.
        return played.wrong, has_struck
    wrong = played.wrong + violations(played.outcome, played.listener, expected.listener.facts, len(deadly))
    if played.kept != expected.kept:
        wrong.append(f"the newest checkpoint is {played.kept}, not {expected.kept}")
    return wrong, has_struck


class Points:
    """Knows all points, which of them are reached in which scene, and what an undisturbed run gives."""

    def __init__(self, functions: Iterable[str] = PROTOCOL):
        self.points = points_of(functions)
        self.expected = {writes: play(Case(writes), num_workers=1) for writes in (False, True)}
        for played in self.expected.values():
            assert played.outcome.code == 0 and not played.wrong, (played.outcome.message, played.wrong)

    def at(self, function: str, text: str) -> Point:
        """Return the first point of a function whose line holds `text`."""
        found = [p for p in self.points if p.function.endswith(function) and text in p.text]
        assert found, f"{function} has no line {text!r}"
        return found[0]

    def scenes(self) -> list[Case]:
        """Return where points are looked for: undisturbed, and with one death early or late, of either worker."""
        update, shard = self.at("Stepping.update", "session, model ="), self.at("Step.backward", "counted = ")
        deaths = [Strike("kill", rank, 0, update, time) for rank, time in ((1, 6), (0, 6), (1, 2))]
        deaths += [Strike("kill", rank, 0, shard, 5) for rank in (0, 1)]
        calm = [Case(writes) for writes in (False, True)]
        return calm + [Case(writes, (death,)) for writes in (False, True) for death in deaths]

    def reached(self) -> list[Reached]:
        """Return every point that a worker comes to in any of the scenes, first those of the undisturbed run."""
        found: dict[tuple[int, int, int], Reached] = {}
        for case in self.scenes():
            played = play(case, self.points)
            for (rank, birth, number), count in played.board.counts().items():
                here = Reached(self.points[number], rank, birth, count, case)
                found.setdefault((birth, number, rank), here)
            played.board.close()
        return [found[key] for key in sorted(found)]

    def judge(self, case: Case, limit_seconds: float = DEADLINE) -> tuple[list[str], bool, float]:
        """Play a case; return what is wrong, whether all of it struck, and its seconds."""
        played = play(case, self.points, limit_seconds=limit_seconds)
        wrong, has_struck = judged(played, case, self.expected[case.writes])
        played.board.close()
        return wrong, has_struck, played.seconds


def every(reached: Sequence[Reached], kinds: Sequence[str], seed: int) -> list[Case]:
    """Return a case for every point, worker and kind."""
    draw = random.Random(seed)
    return [
        Case(at.case.writes, (*at.case.strikes, at.struck(kind, draw)), len(at.case.strikes))
        for at in reached
        for kind in kinds
        if kind != "pause" or not at.birth
    ]


def sample(reached: Sequence[Reached], kinds: Sequence[str], seed: int) -> list[Case]:
    """Return a case for every function and kind: it strikes both workers there, the other one after the first's death.

    Functions that only one of them comes to, or only after a death, are struck once.
    """
    draw, cases = random.Random(seed), []
    functions: dict[str, dict[int, list[Reached]]] = {}
    for at in reached:
        functions.setdefault(at.point.function, {}).setdefault(at.rank, []).append(at)
    for of_rank in functions.values():
        for kind in kinds:
            ranks = draw.sample(sorted(of_rank), len(of_rank))
            first = draw.choice([at for at in of_rank[ranks[0]] if at.birth == of_rank[ranks[0]][0].birth])
            strikes = [*first.case.strikes, first.struck(kind, draw)]
            # The other comes there as well, in this life or the next. Whether more than once is not known.
            birth = first.birth if kind == "pause" else None
            strikes += [Strike(kind, rank, birth, draw.choice(of_rank[rank]).point) for rank in ranks[1:]]
            cases.append(Case(first.case.writes, tuple(strikes), len(first.case.strikes)))
    return cases


@contextlib.contextmanager
def zygote_here() -> Iterator[None]:
    """Be a zygote."""
    from samestep.launching import environment, zygote
    from samestep.launching.leftovers import without_empty_folders

    environment.prepare()
    with without_empty_folders():
        zygote.warm()
        from samestep.settings import origin
        from samestep.settings.entry import _WARM

        zygote.warm(_WARM)
        for file in Path(__file__).parent.glob("*.py"):
            # As `samestep run` does, so that not every worker reads them.
            origin.keep(str(file))
        yield


def campaign(cases: Sequence[Case], points: Points, reached: Sequence[Reached]) -> int:
    """Play the cases; return how many were wrong."""
    num_wrong = num_missed = 0
    for number, case in enumerate(cases):
        wrong, has_struck, seconds = points.judge(case)
        num_wrong, num_missed = num_wrong + bool(wrong), num_missed + (not has_struck)
        told = {"case": number, "strikes": [str(strike) for strike in case.strikes], "writes": case.writes}
        print(json.dumps({**told, "seconds": round(seconds, 2), "struck": has_struck, "wrong": wrong}), flush=True)
    struck = {(strike.point, strike.rank) for case in cases for strike in case.strikes}
    functions = {(point.function, rank) for point, rank in struck}
    never = {point.function for point in points.points} - {at.point.function for at in reached}
    told = {"cases": len(cases), "functions_and_workers": len(functions), "lines_and_workers": len(struck)}
    print(json.dumps({**told, "never_reached": sorted(never), "missed": num_missed, "wrong": num_wrong}))
    return num_wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every line, not one of each function")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["kill"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases of which a strike's description holds this text")
    chosen = parser.parse_args()
    with zygote_here():
        known = Points()
        found = known.reached()
        planned = (every if chosen.all else sample)(found, chosen.kinds, chosen.seed)
        planned = [case for case in planned if any(chosen.only in str(strike) for strike in case.strikes)]
        num_wrong = campaign(planned, known, found)
    sys.exit(min(num_wrong, 1))
