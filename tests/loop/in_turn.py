"""A fleet whose workers take turns without threads or processes: the real run, steps, feeds and ledger; no mathematics.

Each worker has a `Session` and a `Run` of its own. What the script does is one operation after the other, and each is
done by worker 0, then by worker 1, ...: so a worker's messages can be answered with those of the workers before it. An
update needs what later workers have read, too: it is looked up once all have run through their shards.

The model, the optimizer and the files are stand-ins. A step's loss is the mean of the samples that were read for it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from playing import replaced

import samestep.loop.feed as feed_module
import samestep.loop.record as record_module
import samestep.loop.run as run_module
import samestep.loop.session as session_module
import samestep.loop.step as step_module
from samestep.agree.allowance import Allowance
from samestep.agree.meeting import Outcome
from samestep.agree.nonfinite import Tolerance
from samestep.core.division import Division
from samestep.core.group import Solo
from samestep.core.randomness import seed_start
from samestep.core.worker import Worker
from samestep.data.source import Source
from samestep.loop.recipe import Keeping, Recipe
from samestep.loop.run import Run
from samestep.loop.session import Session
from samestep.storage.checkpoint import Checkpoint

_MASK = (1 << 64) - 1


class Numbers(Source):
    """Sample i is the number `first` + i; some cannot be read."""

    def __init__(self, first: int, num_samples: int, bad: frozenset[int]):
        self.first, self.num_samples, self.bad = first, num_samples, bad

    def fetch(self, ids: np.ndarray, seed: int, epoch: int, seed_sample: Any) -> list[int]:
        if self.bad.intersection(ids.tolist()):
            raise ValueError("broken")
        return [self.first + sample for sample in ids.tolist()]


class Turns(Solo):
    """The group of one worker: knows the messages of those before it, and takes its own for those of the rest."""

    def __init__(self, worker: Worker, told: list[list[bytes]]):
        super().__init__(worker)
        self._told = told

    def exchange(self, message: bytes) -> list[bytes]:
        mine = self._told[self.worker.rank]
        mine.append(message)
        number = len(mine) - 1
        return [self._told[rank][number] if rank < self.worker.rank else message for rank in range(self.worker.size)]


def nothing(*args: Any) -> None:
    """Stand in for a method without a result."""


class Player:
    """One worker: its run, and the loop over steps that it is in."""

    def __init__(self, session: Session):
        self.session = session
        self.run = Run(session)
        self.loop: Iterator | None = None


class Agreed:
    """Stands in for `LiveSynchronous`: adds up what all workers have read."""

    def __init__(self, fleet: Fleet, rule: Any):
        self.fleet = fleet
        self.tolerance = Tolerance("stop")
        self.allowance = Allowance(rule)
        self.begin_pass = self.begin_shard = self.leave_shard = self.end_shard = self.settle = self.end = nothing
        self.facts = dict
        self.can_move = True
        self.claims = False
        self.drained = contextlib.nullcontext

    def update(self, request: Any, part: Any) -> Outcome:
        parts, values = self.fleet.parts, self.fleet.values
        bad = [one for _, theirs in parts for one in theirs]
        self.allowance.check(request.data, bad)
        read = sum(count for (count, _), _ in parts), sum(hashed for (_, hashed), _ in parts) & _MASK
        if request.seeds[2]:
            read = 0, 0
        loss = math.fsum(values) / len(values) if values else math.nan
        return Outcome(loss, None, {}, len(bad) == request.num_samples, "", read, bad)


class Fleet:
    """Some workers of a run.

    Attributes:
        players: the workers.
        saved: what checkpoints were written, as facts; filled by `Archive`.
        parts: of the step at hand, what each worker read and could not read.
        values: of the step at hand, the samples that were read.
        operation: number of the script's operation at hand; set by the script.
        restored: in which of them each worker restored the state.
    """

    def __init__(self, replicas: int, workers: int, rule: Any, resumed: dict[str, Any] | None = None):
        """Start workers; they resume from the facts of a checkpoint, if given."""
        told: list[list[bytes]] = [[] for _ in range(workers)]
        self.operation = 0
        self.restored: list[int] = []
        self.saved: list[dict[str, Any]] = []
        self.parts: list[tuple[tuple[int, int], list]] = []
        self.values: list[int] = []
        self.players = []
        for rank in range(workers):
            group: Any = Turns(Worker(rank=rank, size=workers), told)
            group.fleet = self
            session = Session(Recipe(replicas=replicas, seed=5), Keeping(checkpoint="/nowhere", every=1), group)
            session.model = session.crew.model = _model(Division.even(workers, replicas))
            session.crew.agreed = Agreed(self, rule)
            if resumed is not None:
                session.replay._begin_replay(_checkpoint(resumed))
            self.players.append(Player(session))

    @property
    def replaying(self) -> bool:
        """Whether the next call is read from the ledger."""
        return self.players[0].session.replaying

    def open(self, data: Any, **settings: Any) -> None:
        """Begin a loop over steps."""
        for player in self.players:
            self._begin(player)
            player.loop = iter(player.run.steps(data, **settings))

    def step(self, num_passes: int) -> tuple[Any, list[int] | None]:
        """Make one step; return what the script sees of it ("end": there is none) and the samples that were read."""
        steps = [self._next(player) for player in self.players]
        if steps[0] is None:
            assert steps == [None] * len(steps), "workers differ in whether there is a step"
            return "end", None
        was_replayed = steps[0]._shards is None
        for number in range(num_passes):
            drawn, batches = [], []
            for player, step in zip(self.players, steps, strict=True):
                self._begin(player)
                batches.append([value for batch in step for value in batch])
                drawn.append(float(torch.rand(())))
            is_replayed = steps[0]._shards is None
            if not is_replayed and number == 0:
                self.parts = [(step_module.count_read(s.epoch, s._shards), list(s._part.bad)) for s in steps]
            if not is_replayed:
                self.values = [value for batch in batches for value in batch]
            for player, step in zip(self.players, steps, strict=True):
                self._begin(player)
                step.update()
        told = [
            (s.number, s.epoch, s.ends_epoch, s.size, s.loss, s.bad_samples, s.skipped, draw)
            for s, draw in zip(steps, drawn, strict=True)
        ]
        return _same(told), None if was_replayed else sorted(self.values)

    def leave(self) -> None:
        """Leave the loop over steps."""
        for player in self.players:
            if player.loop is not None:
                player.loop.close()
            player.loop = None

    def once(self, value: int) -> Any:
        """Call `run.once`."""
        return self._call(lambda run: run.once(lambda: [value, float(torch.rand(()))]))

    def mean(self, value: int) -> Any:
        """Call `run.mean`."""
        return self._call(lambda run: run.mean(lambda batch: value, [0], 1))

    def save(self) -> None:
        """Call `run.save`."""
        for player in self.players:
            player.run.save("elsewhere")

    def finish(self) -> dict[str, Any]:
        """End the script; return the facts that must be the same for every worker."""
        self.leave()
        names = ("samples_digest", "samples_exactly_once", "samples_sentence", "steps")
        finished = []
        for player in self.players:
            facts = player.session.finish(None)
            finished.append({name: facts[name] for name in names})
        return _same(finished)

    def _call(self, call: Any) -> Any:
        results = []
        for player in self.players:
            self._begin(player)
            results.append((call(player.run), float(torch.rand(()))))
        return _same(results)

    def _next(self, player: Player) -> Any:
        self._begin(player)
        assert player.loop is not None
        step = next(player.loop, None)
        if step is None:
            player.loop = None
        return step

    def _begin(self, player: Player) -> None:
        """Begin a worker's turn with generators of its own: what is drawn alike must be seeded by the run."""
        seed_start(1000 + player.session.worker.rank)


def _same(told: list) -> Any:
    assert all(repr(one) == repr(told[0]) for one in told), f"workers were told different things: {told}"
    return told[0]


def _model(division: Division) -> Any:
    optimizer = SimpleNamespace(_optimizer_step_pre_hooks={}, _optimizer_step_post_hooks={})
    gradients = SimpleNamespace(begin_pass=nothing, begin_shard=nothing, end_shard=nothing)
    update = SimpleNamespace(full_state=dict)
    return SimpleNamespace(
        modules=[],
        others=[],
        states=[],
        division=division,
        divide=nothing,
        trained=[SimpleNamespace(optimizer=optimizer, gradients=gradients, update=update)],
        buffers=SimpleNamespace(begin_pass=nothing, begin_shard=nothing, end_shard=nothing),
        integrity=SimpleNamespace(
            verify=nothing,
            withdraw_if_damaged=nothing,
            facts=lambda: {"updates": 0, "updates_verified": 0, "verify_seconds": 0.0},
        ),
        named_tensors=list,
        state_bytes=lambda: 0,
        release=nothing,
    )


class Archive:
    """Stands in for files: keeps the facts of each checkpoint."""

    def __init__(self, model: Any, group: Any, agreed: Any):
        self._group = group

    def save(self, folder: str, step: int, facts: dict[str, Any], keep: int | None) -> None:
        if self._group.worker.is_first:
            self._group.fleet.saved.append(facts)

    def restore(self, saved: Checkpoint) -> None:
        """Nothing is trained; note what the script was doing."""
        self._group.fleet.restored.append(self._group.fleet.operation)


class Evaluation:
    """Stands in for the evaluation: its function is called once."""

    def __init__(self, *args: Any):
        pass

    def mean(self, fn: Any, calls: Any, where: str) -> float:
        return float(fn(None))


@contextmanager
def stand_ins() -> Iterator[None]:
    """Put the stand-ins in place."""
    with ExitStack() as stack:
        for owner, name, new in (
            (session_module, "Archive", Archive),
            (run_module, "Evaluation", Evaluation),
            (record_module, "pss_bytes", nothing),
            # Of user code it would be taken in a process of its own.
            (feed_module, "fingerprint", lambda source, *rest: [str(len(source))]),
        ):
            stack.enter_context(replaced(owner, name, new))
        yield


def _checkpoint(facts: dict[str, Any]) -> Checkpoint:
    return Checkpoint(path=Path("memory"), step=0, weights={}, state={}, facts=facts, weights_digest="")
