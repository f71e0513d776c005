"""Updates under way, as one worker sees them: told, made by whoever is there, heard of later.

    arrive     tell this worker's part of an update
    advance    make the updates that all have told of, in order: one worker each, as Synchronous makes them alone
    collect    take what became of an update, the same on every worker

A worker makes an update with what the script has set when it came to it: its own call's arguments, its own optimizer's
settings then. So the script must do the same on every worker, as ever; parts tell, and `collect` compares.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from samestep.agree.agreement import Live
from samestep.agree.allowance import Allowance
from samestep.agree.board import Board
from samestep.agree.courier import Courier
from samestep.agree.meeting import Meeting, Outcome, Part, Problem, Request, problem_of, terms_of, unit_of
from samestep.agree.reduction import Reduced, Reduction
from samestep.agree.schedule import Schedule
from samestep.agree.shelf import Shelf
from samestep.agree.versions import Versions
from samestep.core.anyone_update import AnyoneUpdate
from samestep.core.calls import Calls
from samestep.core.clock import Clock
from samestep.core.fold import Absent
from samestep.core.group import Solo
from samestep.core.model import Trained
from samestep.core.worker import Worker
from samestep.errors import SamestepError

_MEETING = "step.update"


@dataclass(frozen=True)
class Shards:
    """What a worker found in the shards of an update that it played.

    Attributes:
        bad: [replica, first parameter, last parameter, number of parameters] of what is not finite.
        huge: whether sums may overflow.
        lags: (replica, updates that its weights lacked).
        missing: (number of a sum that it has folded, parameters which that lacks, as bits: `Shelf.missing`).
    """

    bad: Sequence[Sequence[int]]
    huge: bool
    lags: Sequence[tuple[int, int]]
    missing: Sequence[tuple[int, str]]

    def to_values(self) -> list[Any]:
        """Return it as JSON values."""
        return [self.bad, self.huge, self.lags, self.missing]


@dataclass(frozen=True)
class _Asked:
    """A call of `step.update`: its arguments, and the settings of each of the optimizer's groups then."""

    request: Request
    settings: Sequence[Mapping[str, Any]]


class Pipeline:
    """The updates that one worker has asked for.

    Attributes:
        number: how many updates this worker has come to.
        is_idle: whether none is under way.
    """

    def __init__(self, live: Live, board: Board | Courier, versions: Versions, shelf: Shelf, schedule: Schedule):
        """Begin with none."""
        self._live = live
        self._board = board
        self._versions = versions
        self._shelf = shelf
        self._schedule = schedule
        self._trained = live.model.trained[0]
        solo = Solo(Worker(device=live.group.worker.device))
        self._reduction = Reduction(solo, Calls(solo, live.clock), live.clock)
        # What was left out of a batch is judged by the script's thread, in `collect`; it may be late, or early.
        self._lenient = Allowance("skip")
        self._asked: dict[int, _Asked] = {}
        self._heard: deque[tuple[Outcome, str]] = deque()
        self.number = 0
        self._num_heard = 0
        self._num_given = 0

    @property
    def is_idle(self) -> bool:
        return not self._asked

    def arrive(self, request: Request, part: Part, shards: Shards) -> None:
        """Ask for an update, and tell this worker's part of it."""
        live, optimizer = self._live, self._trained.optimizer
        settings = [
            {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}
            for group in optimizer.param_groups
        ]
        self._asked[self.number] = _Asked(request, settings)
        call = live.calls.begin(_MEETING, request.where)
        terms = terms_of(request, optimizer, live.tolerance, live.allowance, live.group.worker.size == 1)
        told = [call, Meeting.told(part, terms, shards.to_values())]
        self._board.arrive(self.number, json.dumps(told, separators=(",", ":")).encode())
        self.number += 1
        self.advance()

    def await_commit(self, number: int) -> None:
        """Return once update `number` is made; make it, and those before, where nobody else does."""
        before = self._live.clock.to("wait")
        while not self._board.is_committed(number):
            self.advance()
            self._board.wait(number, lambda: self._board.committed < self.number)
        self._live.clock.to(before)

    def advance(self) -> None:
        """Make the updates that can be made now."""
        while (number := self._board.committed) < self.number and self._board.take(number):
            before = self._live.clock.to("update")
            self._make(number)
            self._live.clock.to(before)

    def collect(self, until: int) -> None:
        """Take what became of the updates before number `until`, which are made.

        Raises:
            SamestepError: the workers' parts of one do not fit together. The same on every worker.
        """
        live = self._live
        while self._num_heard < until:
            number = self._num_heard
            met, calls = self._met(number)
            live.calls.end(calls)
            met.check(self._trained.optimizer, live.tolerance, live.allowance)
            skipped, norm, words, advice = json.loads(self._board.verdict(number))
            problem = self._problem(number, met)
            if problem is not None:
                words, advice = problem.words, problem.advice
            self._heard.append((met.outcome(norm, skipped, words), advice))
            lags = {replica: lag for _, _, told, _ in met.own for replica, lag in told}
            self._schedule.add([lags[replica] for replica in sorted(lags)])
            live.model.integrity.num_updates += 1
            del self._asked[number]
            self._num_heard += 1

    def give(self, number: int, request: Request) -> Outcome:
        """Return what became of update `number`, if that was not given yet; if there is none, that nothing is known.

        Raises:
            NonFiniteError: something was not finite, and the update may not be skipped.
        """
        if number < self._num_given:
            norm = None if request.clip_norm is None else math.nan
            return Outcome(math.nan, norm, {}, skipped=False, is_known=False)
        self._num_given += 1
        outcome, advice = self._heard.popleft()
        if outcome.problem:
            self._live.tolerance.check(request.optimizer, outcome.problem, advice)
        return outcome

    def drain(self) -> None:
        """Have everything made that was asked for. Collective."""
        self.await_commit(self.number - 1)
        self.collect(self.number)

    def late(self) -> list[Outcome]:
        """Return what became of all that was heard of and not given.

        Raises:
            NonFiniteError: see `give`.
        """
        outcomes = []
        for outcome, advice in self._heard:
            if outcome.problem:
                self._live.tolerance.check(0, outcome.problem, advice)
            outcomes.append(outcome)
        self._heard.clear()
        self._num_given = self.number
        return outcomes

    def to_values(self) -> list[Any]:
        """Return, when drained, what is needed to go on."""
        return [self.number, self._num_given, [[outcome.to_values(), advice] for outcome, advice in self._heard]]

    def load(self, values: Sequence[Any]) -> None:
        """Go on from what `to_values` gave."""
        self.number, self._num_given, heard = values
        self._num_heard = self.number
        self._heard = deque((Outcome(*outcome), advice) for outcome, advice in heard)
        self._asked.clear()

    def _met(self, number: int) -> tuple[Meeting, list[Any]]:
        """Return what the workers told of an update, and their calls."""
        parts = [json.loads(part) for part in self._board.parts(number)]
        return Meeting(self._asked[number].request, [(value, b"") for _, value in parts]), [call for call, _ in parts]

    def _make(self, number: int) -> None:
        """Make update `number`: this worker alone."""
        met, _ = self._met(number)
        # What does not fit together is an error on every worker, in `collect`.
        verdict, samples = [True, None, "", ""], None
        try:
            met.check(self._trained.optimizer, self._live.tolerance, self._lenient)
        except SamestepError:
            pass
        else:
            verdict, samples = self._updated(number, met)
        self._versions.keep(number + 1, self._versions.merged(number, samples))
        self._board.commit(number, json.dumps(verdict).encode())

    def _updated(self, number: int, met: Meeting) -> tuple[list[Any], dict[int, int] | None]:
        """Update the newest weights; return the verdict, and the samples of each replica if they were changed."""
        asked, trained = self._asked[number], self._trained
        request = asked.request
        norm = None if request.clip_norm is None else math.nan
        if met.is_empty:
            return [True, norm, "", ""], None
        if self._problem(number, met) is not None:
            return [True, norm, "", ""], None
        absent = self._absent(met)
        trained.sums = self._shelf.fold(number)
        factor = unit_of(request.num_samples) / met.total if met.counted else request.num_samples / met.total
        with self._settings(asked):
            reduced = self._reduction.make(trained, request, absent, factor, any(huge for _, huge, *_ in met.own))
            norm = None if request.clip_norm is None else reduced.norm
            if reduced.problem is not None:
                return [True, norm, reduced.problem.words, reduced.problem.advice], None
            self._apply(reduced)
        return [False, norm, "", ""], met.samples

    def _apply(self, reduced: Reduced) -> None:
        """Let the weights be updated."""
        trained, update = self._trained, self._trained.update
        assert isinstance(update, AnyoneUpdate)
        self._live.model.guard.open()
        update.take_turn()
        _make_of(reduced, trained)
        unused = {parameter for parameter, sums in reduced.absent.items() if len(sums) == self._shelf.num_sums}
        update.end_turn([i for i in range(len(trained.weights.parameters)) if i not in unused])

    def _problem(self, number: int, met: Meeting) -> Problem | None:
        """Return which loss or gradient of update `number` is not finite, if any."""
        if met.is_empty:
            return None
        bad = [one for found, *_ in met.own for one in found]
        return problem_of(self._asked[number].request, self._trained, met.losses, bad)

    @contextmanager
    def _settings(self, asked: _Asked) -> Iterator[None]:
        """Let the optimizer have the settings that it had when the update was asked for."""
        groups = self._trained.applied.param_groups
        now = [dict(group) for group in groups]
        for group, settings in zip(groups, asked.settings, strict=True):
            group.update(settings)
        try:
            yield
        finally:
            for group, settings in zip(groups, now, strict=True):
                group.update(settings)

    def _absent(self, met: Meeting) -> Absent:
        """Return, for parameters that some sums lack, those sums."""
        num_parameters = len(self._trained.weights.parameters)
        missing = {index: int(bits, 16) for *_, told in met.own for index, bits in told}
        absent: dict[int, tuple[int, ...]] = {}
        for index in range(self._shelf.num_sums):
            bits = missing.get(index, (1 << num_parameters) - 1)
            for parameter in range(num_parameters) if bits else ():
                if bits >> parameter & 1:
                    absent[parameter] = (*absent.get(parameter, ()), index)
        return absent


class SentPipeline(Pipeline):
    """The updates where workers share no memory: each makes its part of every one, in a thread of its own."""

    def __init__(self, live: Live, courier: Courier, versions: Versions, shelf: Shelf, schedule: Schedule):
        """Begin with none."""
        super().__init__(live, courier, versions, shelf, schedule)
        self._courier = courier
        clock = Clock()
        self._reduction = Reduction(courier.group, Calls(courier.group, clock), clock)
        courier.serve(self._make)

    def drain(self) -> None:
        super().drain()
        self._courier.rest()

    def _apply(self, reduced: Reduced) -> None:
        update = self._trained.update
        _make_of(reduced, self._trained)
        update.notice()
        update.settle(())
        self._trained.weights.share(self._courier.group)


def _make_of(reduced: Reduced, trained: Trained) -> None:
    """Update what this worker owns."""
    if reduced.ready is not None:
        trained.update.apply_ready(reduced.ready)
    else:
        trained.update.apply(trained.sums, reduced.absent, reduced.factor)
