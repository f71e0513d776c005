"""Makes updates of what all workers have told, once their gradients are there.

    on one host     one worker makes an update, alone, mostly the last that comes to it
    between hosts   all make it, each what it owns

An update is made with what the script has set when it asked for it: its own call's arguments, its own optimizer's
settings then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from samestep.agree.agreement import Live
from samestep.agree.allowance import Allowance
from samestep.agree.meeting import Meeting, Problem, Request, problem_of, unit_of
from samestep.agree.reduction import Reduced, Reduction
from samestep.agree.shelf import Shelf
from samestep.agree.versions import Versions
from samestep.core.anyone_update import AnyoneUpdate
from samestep.core.calls import Calls
from samestep.core.clock import Clock
from samestep.core.fold import Absent
from samestep.core.group import Group, Solo
from samestep.core.worker import Worker
from samestep.errors import SamestepError

Verdict = Sequence[Any]
"""What became of an update: whether it was skipped, the norm of its gradients (None if not asked for), what was not
finite, and what to do about that; JSON values."""


@dataclass(frozen=True)
class Asked:
    """A call of `step.update`: its arguments, and the settings of each of the optimizer's groups then."""

    request: Request
    settings: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, request: Request, optimizer: torch.optim.Optimizer) -> Asked:
        """Take the settings of `optimizer` as they are now."""
        settings = [
            {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}
            for group in optimizer.param_groups
        ]
        return cls(request, settings)


class Maker:
    """Makes updates alone."""

    def __init__(self, live: Live, versions: Versions, shelf: Shelf):
        """Make updates of the weights in `versions`, of the gradients in `shelf`."""
        self._live = live
        self._versions = versions
        self._shelf = shelf
        self._trained = live.model.trained[0]
        solo = Solo(Worker(device=live.group.worker.device))
        self._reduction = Reduction(solo, Calls(solo, live.clock), live.clock)
        # How much may be left out is judged where the script hears of it: it counts what it has heard of.
        self._lenient = Allowance("skip")

    def make(self, number: int, asked: Asked, met: Meeting) -> Verdict:
        """Make update `number`, or skip it. The verdict says nothing of a `problem`."""
        # What does not fit together is an error on every worker, when it hears of it.
        verdict, samples = [True, None, "", ""], None
        try:
            met.check(self._trained.optimizer, self._live.tolerance, self._lenient)
        except SamestepError:
            pass
        else:
            verdict, samples = self._updated(number, asked, met)
        self._versions.keep(number + 1, self._versions.merged(number, samples))
        return verdict

    def problem(self, request: Request, met: Meeting) -> Problem | None:
        """Return which loss or gradient of an update is not finite, if any."""
        if met.is_empty:
            return None
        return problem_of(request, self._trained, met.losses, [one for found, *_ in met.own for one in found])

    def _updated(self, number: int, asked: Asked, met: Meeting) -> tuple[list[Any], dict[int, int] | None]:
        """Update the newest weights; return the verdict, and the samples of each replica if they were changed."""
        request, trained = asked.request, self._trained
        norm = None if request.clip_norm is None else math.nan
        if met.is_empty or self.problem(request, met) is not None:
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
        update = self._trained.update
        assert isinstance(update, AnyoneUpdate)
        self._live.model.guard.open()
        update.take_turn()
        self._step(reduced)
        unused = {parameter for parameter, sums in reduced.absent.items() if len(sums) == self._shelf.num_sums}
        update.end_turn([i for i in range(len(self._trained.weights.parameters)) if i not in unused])

    def _step(self, reduced: Reduced) -> None:
        """Update what this worker owns."""
        if reduced.ready is not None:
            self._trained.update.apply_ready(reduced.ready)
        else:
            self._trained.update.apply(self._trained.sums, reduced.absent, reduced.factor)

    @contextmanager
    def _settings(self, asked: Asked) -> Iterator[None]:
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


class OwnersMaker(Maker):
    """Makes this worker's part of updates, together with the other owners."""

    def __init__(self, live: Live, versions: Versions, shelf: Shelf, group: Group):
        """See `Maker`; `group` is that of those who make updates."""
        super().__init__(live, versions, shelf)
        self._group = group
        clock = Clock()
        self._reduction = Reduction(group, Calls(group, clock), clock)

    def _apply(self, reduced: Reduced) -> None:
        update = self._trained.update
        self._step(reduced)
        update.notice()
        update.settle(())
        self._trained.weights.share(self._group)
