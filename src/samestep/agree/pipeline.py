"""Updates under way, as one worker sees them: told, made later (`maker`), heard of then.

    arrive     tell this worker's part of an update
    advance    make the updates that all have told of, in order, where that is for the script's own thread to do
    collect    take what became of an update, the same on every worker

An update is made with what one worker, or each, has set. So the script must do the same on every worker, as ever; parts
tell, and `collect` compares.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from samestep.agree.agreement import Live
from samestep.agree.board import Board
from samestep.agree.courier import Courier
from samestep.agree.maker import Asked, Maker
from samestep.agree.meeting import Meeting, Outcome, Part, Request, terms_of
from samestep.agree.schedule import Schedule

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


class Pipeline:
    """The updates that one worker has asked for.

    Attributes:
        number: how many updates this worker has come to.
        is_idle: whether none is under way.
    """

    def __init__(self, live: Live, board: Board | Courier, maker: Maker, schedule: Schedule):
        """Begin with none."""
        self._live = live
        self._board = board
        self._maker = maker
        self._schedule = schedule
        self._trained = live.model.trained[0]
        self._asked: dict[int, Asked] = {}
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
        self._asked[self.number] = Asked.of(request, optimizer)
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
            self.make(number)
            self._live.clock.to(before)

    def collect(self, until: int) -> None:
        """Take what became of the updates before number `until`, which are made.

        Raises:
            SamestepError: the workers' parts of one do not fit together. The same on every worker.
        """
        live = self._live
        while self._num_heard < until:
            number = self._num_heard
            met, calls = self._met(number, self._asked[number].request)
            live.calls.end(calls)
            met.check(self._trained.optimizer, live.tolerance, live.allowance)
            skipped, norm, words, advice = json.loads(self._board.verdict(number))
            problem = self._maker.problem(self._asked[number].request, met)
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
        self._board.rest()

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

    def _met(self, number: int, request: Request) -> tuple[Meeting, list[Any]]:
        """Return what the workers told of an update, and their calls."""
        parts = [json.loads(part) for part in self._board.parts(number)]
        return Meeting(request, [(value, b"") for _, value in parts]), [call for call, _ in parts]

    def make(self, number: int) -> None:
        """Make update `number`, which all have told of."""
        asked = self._asked[number]
        # Words that name samples are found in `collect`: what they look at belongs to the script's thread.
        request = replace(asked.request, describe=str)
        met, _ = self._met(number, request)
        verdict = self._maker.make(number, replace(asked, request=request), met)
        self._board.commit(number, json.dumps(verdict).encode())
