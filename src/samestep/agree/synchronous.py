"""Synchronous agreement: one update from all replicas' gradients, as one big batch would make it.

The hops of a step, numbered as in `samestep.core`:

    [4] meet     every worker tells its losses, counts, used parameters and what is not finite; all gradients are
                 published
    [5] reduce   owners add the nodes of their units along the tree
    [6] clip     norms per tensor, added in parameter order; one factor for all (only if asked for)
    [7] update   owners run the optimizer in place
    [8] commit   all see the new weights
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from samestep.agree.agreement import Agreement, Live
from samestep.agree.leaves import CodedLeaves, Leaves
from samestep.agree.meeting import Meeting, Outcome, Part, Request, absent_of, problem_of, terms_of, unit_of
from samestep.agree.reduction import Reduced, Reduction
from samestep.codecs import Codec
from samestep.core.model import Options, Trained
from samestep.core.worker import Wish
from samestep.errors import SettingsError
from samestep.storage import wire


@dataclass(frozen=True)
class Synchronous(Agreement):
    """All replicas agree at every step. The default.

    Args:
        codec: how each replica's gradient is compressed, with error feedback where that leaves something out; not at
            all by default.
    """

    codec: Codec | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.codec, Codec | None):
            raise SettingsError(f"You set Synchronous(codec={self.codec!r}); use samestep.codecs.Int8() or alike.")

    def prepare(self, options: Options) -> Options:
        return options if self.codec is None else replace(options, many_arrivals=True, all_update=True)

    def bind(self, model, group, calls, clock, tolerance=None, allowance=None) -> LiveSynchronous:
        return LiveSynchronous(self, model, group, calls, clock, tolerance, allowance)


class LiveSynchronous(Live):
    """One worker's side of synchronous agreement."""

    def __init__(self, *bound: Any):
        super().__init__(*bound)
        codec = self.within.codec
        # Elsewhere what a codec keeps of a replica stays where its worker is.
        self.can_move = codec is None or self.group.shares_memory
        coded = None if codec is None else CodedLeaves(codec, self.model, self.group, self.calls)
        self._reduction = Reduction(self.group, self.calls, self.clock)
        self._leaves = coded if coded is not None else Leaves(self.model)

    @property
    def within(self) -> Synchronous:
        """How replicas agree at every step."""
        assert isinstance(self.recipe, Synchronous)
        return self.recipe

    def begin_pass(self) -> None:
        self._leaves.begin_pass()
        self.model.buffers.begin_pass()

    def begin_shard(self, index: int, replica: int) -> None:
        self._leaves.begin_shard(index)

    def end_shard(self, replica: int) -> None:
        self._leaves.end_shard(replica)

    def share(self, weight: float, size: int, counted: bool) -> float:
        return weight / (unit_of(size) if counted else size)

    def reseat(self) -> None:
        self._leaves.reseat()

    def state(self) -> tuple[dict[str, torch.Tensor], Any]:
        return self._leaves.state()

    def load(self, tensors: Mapping[str, torch.Tensor], values: Any) -> None:
        self._leaves.load(tensors, values)

    def take_over(self, values: Any) -> None:
        self._leaves.take_over(values)

    def facts(self) -> dict[str, Any]:
        num_bytes = self._leaves.num_bytes()
        return {} if num_bytes is None else {"agreement": repr(self.recipe), "bytes_per_replica": num_bytes}

    def update(self, request: Request, part: Part) -> Outcome:
        self._leaves.send(request)
        outcome = self._update(request, part)
        self._leaves.made(request)
        return outcome

    def _update(self, request: Request, part: Part) -> Outcome:
        trained = self.model.trained[request.optimizer]
        presence = trained.gradients.presence()
        bad = [[trained.replicas[shard], *which] for shard, *which in trained.gradients.not_finite()]
        integrity = self.model.integrity
        folds = integrity.publish(request.optimizer)
        if self.group.worker.is_first and integrity.is_due:
            self.calls.ask(Wish.VERIFY)
        alone = self.group.worker.size == 1
        terms = terms_of(request, trained.optimizer, self.tolerance, self.allowance, alone)
        own = [bad, trained.gradients.finite.huge, folds]
        met = Meeting.hold(self.calls, request, part, terms, own, presence or b"")
        self.clock.to("update")
        when = f"before the update of step {request.seeds[1]}"
        folds_of = [folds for _, _, folds in met.own]
        if not integrity.verify(self.calls, "step.update (verify)", when, request.optimizer, folds_of):
            self.model.guard.check()
        met.check(trained.optimizer, self.tolerance, self.allowance)
        trained.reload_if_stale()
        if met.is_empty:
            self.model.buffers.restore()
            return met.outcome(None if request.clip_norm is None else math.nan, skipped=True)
        # Shards were scaled for the batch as it was planned; what was left out of it counts for nothing.
        unit = unit_of(request.num_samples) if met.counted else request.num_samples
        reduced = None
        bad = [one for found, _, _ in met.own for one in found]
        problem = None if request.scaled else problem_of(request, trained, met.losses, bad)
        if problem is None:
            if trained.area is not None:
                trained.area.collect()
            huge = any(huge for _, huge, _ in met.own)
            factor = unit / (met.total * request.scale) if met.counted else unit / met.total / request.scale
            # Who updates alone finds by itself what is missing.
            frames = met.frames if len(met.frames) == len(trained.num_nodes) else [b""]
            reduced = self._reduction.make(trained, request, absent_of(frames, trained), factor, huge)
            problem = reduced.problem
        if problem is not None and not request.scaled:
            # All workers know it, and none will read what another folded: no further meeting is needed.
            self.tolerance.check(request.optimizer, problem.words, problem.advice)
            self.model.buffers.restore()
        else:
            self.model.buffers.merge(met.samples, met.changed)
            self._commit(request, trained, reduced if problem is None else None)
        # A snapshot at the end of this step is to hold what was looked at.
        integrity.updated(self.calls.heard(Wish.VERIFY) or self.calls.stands(Wish.SNAPSHOT))
        norm = None if request.clip_norm is None else reduced.norm if reduced is not None else math.nan
        words = problem.words if problem is not None and not request.scaled else ""
        return met.outcome(norm, problem is not None, words)

    def _commit(self, request: Request, trained: Trained, reduced: Reduced | None) -> None:
        """Update the weights, or leave them where `reduced` is None; meet when all are done."""
        notice = None
        if reduced is not None:
            self.model.guard.open()
            if reduced.ready is not None:
                trained.update.apply_ready(reduced.ready)
            else:
                trained.update.apply(trained.sums, reduced.absent, reduced.factor)
            trained.share()
            notice = trained.update.notice()
            self._leaves.keep(request)
        frame = b"" if notice is None else wire.pack(notice)
        met = self.calls.meet("step.update (commit)", request.where, None, frame)
        self.clock.to("update")
        notices = [f for _, f in met] if len(met) == len(trained.num_nodes) else [frame]
        trained.update.settle([wire.unpack(f) if f else None for f in notices])
        self.model.guard.accept_update()
