"""Local steps: every replica trains by itself for some steps, then all agree on new weights to go on from.

    step     each replica's gradient goes to its own optimizer, which updates its own weights
    round    weights that all started from - own weights = what the replica did; encoded, decoded, and added along the
             tree with the weight of its samples; an outer optimizer makes new weights of it; all go on from these

Local SGD and federated averaging (average), post-local SGD (`warm_up`), SlowMo and DiLoCo (momentum) are one recipe
with different outer optimizers; fragments that meet at different steps, and rounds that overlap with the steps after
them (`delay`), are those of Streaming DiLoCo (Douillard et al. 2025). The weights that the script sees outside of
shards, evaluates and saves are those that all start from. The last round of a `run.steps` comes at its end, however
many steps it is after the one before.

What every step still tells all workers (losses, counts, whether something is not finite) is some hundred bytes, so that
step.loss and the ledger are what they are elsewhere, and a script decides alike on every worker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from samestep.agree.agreement import Agreement, Live
from samestep.agree.apart import Apart
from samestep.agree.coding import Coding
from samestep.agree.meeting import Meeting, Outcome, Part, Request, problem_of, terms_of
from samestep.agree.outer import Average, Outer
from samestep.agree.round import check_apart, mean_norm
from samestep.agree.rounds import Rounds
from samestep.codecs import Codec, Exact
from samestep.core.calls import line_of_user
from samestep.core.model import Options
from samestep.core.worker import Wish
from samestep.errors import SettingsError


@dataclass(frozen=True)
class Local(Agreement):
    """Replicas agree every so many steps.

    Args:
        every: steps from one round to the next.
        outer: what becomes of the mean of what replicas did.
        warm_up: so many first steps each end with a round (post-local SGD: Lin et al. 2020).
        fragments: parts of the model, about equally large, that meet at different steps, each `every` steps.
        codec: how what each replica did is compressed, with error feedback where that leaves something out.
        delay: so many steps after a round is due it ends: what replicas did until it was due goes between hosts while
            they go on, and what they do meanwhile stays theirs and counts in the next round. Below `every`. The rounds
            of `warm_up`, and the last one, are not delayed.
    """

    every: int = 64
    outer: Outer = field(default_factory=Average)
    warm_up: int = 0
    fragments: int = 1
    codec: Codec = field(default_factory=Exact)
    delay: int = 0

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("warm_up", 0), ("fragments", 1), ("delay", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SettingsError(f"You set Local({name}={value!r}); it must be a whole number, {least} or more.")
        if self.fragments > self.every:
            raise SettingsError(
                f"You set Local(fragments={self.fragments}, every={self.every}): there must not be more fragments than "
                f"steps between two rounds."
            )
        if self.delay >= self.every:
            raise SettingsError(
                f"You set Local(delay={self.delay}, every={self.every}): a round would still be under way when the "
                f"next one of the same weights is due. Set delay below every."
            )
        if not isinstance(self.outer, Outer):
            raise SettingsError(f"You set Local(outer={self.outer!r}); use Average(), Nesterov(lr=0.7), or alike.")
        if not isinstance(self.codec, Codec):
            raise SettingsError(f"You set Local(codec={self.codec!r}); use samestep.codecs.Int8() or alike.")

    def prepare(self, options: Options) -> Options:
        return replace(options, outer=self.outer.make, many_arrivals=True, apart=True, all_update=True)

    def bind(self, model, group, calls, clock, tolerance=None, allowance=None) -> LiveLocal:
        return LiveLocal(self, model, group, calls, clock, tolerance, allowance)

    def due(self, update: int) -> list[int]:
        """Return the fragments that meet after update number `update` (from 0)."""
        if update < self.warm_up:
            return list(range(self.fragments))
        now = (update - self.warm_up + 1) % self.every
        return [f for f in range(self.fragments) if f * self.every // self.fragments == now]

    def delay_of(self, update: int) -> int:
        """Return how many updates after that such a round is ended."""
        return 0 if update < self.warm_up else self.delay


class LiveLocal(Live):
    """One worker's side of local steps."""

    recipe: Local
    sums_gradients = False

    def __init__(self, *bound: Any):
        super().__init__(*bound)
        # Elsewhere what a replica has of its own stays where its worker is.
        self.can_move = self.group.shares_memory
        trained, num_replicas = self.model.trained, self.model.division.num_replicas
        numbers, is_late = range(len(trained)), self.recipe.delay > 0
        self._apart = [Apart(self.model, number, self.group, is_late) for number in numbers]
        self._codings = [Coding(self.recipe.codec, self.model, number, self.group) for number in numbers]
        self.model.buffers.spread(range(num_replicas))
        self.group.exchange(b"")
        each = zip(self._apart, self._codings, strict=True)
        self._rounds = [Rounds(self.recipe, self, apart, coding) for apart, coding in each]
        if is_late and not self.group.shares_memory:
            # Connects all while they are here: in the first round, who has died since would be waited for.
            self.group.post(b"", [0] * self.group.worker.size)()

    def begin_pass(self) -> None:
        for apart in self._apart:
            apart.begin_pass()
        self.model.buffers.begin_pass()

    def begin_shard(self, index: int, replica: int) -> None:
        for apart in self._apart:
            apart.enter(replica)

    def leave_shard(self) -> None:
        for apart in self._apart:
            apart.leave()

    def end_shard(self, replica: int) -> None:
        for apart in self._apart:
            apart.leave()
            apart.hold(replica)

    def update(self, request: Request, part: Part) -> Outcome:
        index = request.optimizer
        trained, apart, integrity = self.model.trained[index], self._apart[index], self.model.integrity
        check_apart(self.recipe, request, trained)
        if self.group.worker.is_first and integrity.is_due:
            self.calls.ask(Wish.VERIFY)
        norms = {replica: apart.norm(replica) for replica in part.samples}
        terms = terms_of(request, trained.optimizer, self.tolerance, self.allowance, self.group.worker.size == 1)
        own = [apart.not_finite(norms), list(norms.items())]
        met = Meeting.hold(self.calls, request, part, terms, own)
        self.clock.to("update")
        when = f"before the update of step {request.seeds[1]}"
        if not integrity.verify(self.calls, "step.update (verify)", when, index):
            self.model.guard.check()
        met.check(trained.optimizer, self.tolerance, self.allowance)
        if met.is_empty:
            self.model.buffers.restore()
            return met.outcome(None if request.clip_norm is None else math.nan, skipped=True)
        problem = problem_of(request, trained, met.losses, [one for found, _ in met.own for one in found])
        if problem is not None:
            self.tolerance.check(index, problem.words, problem.advice)
            self.model.buffers.restore()
        else:
            self._step(apart, request, met, norms)
        self._rounds[index].advance(request.where)
        integrity.updated(self.calls.heard(Wish.VERIFY) or self.calls.stands(Wish.SNAPSHOT))
        norm = None if request.clip_norm is None else mean_norm([told for _, told in met.own], met.weights)
        return met.outcome(norm, problem is not None, problem.words if problem is not None else "")

    def settle(self) -> None:
        for rounds in self._rounds:
            if rounds.under_way or any(rounds.since):
                is_watching = self.model.integrity.is_watching
                self.model.integrity.verify(self.calls, "the last round (verify)", "at the end of the steps")
                rounds.settle(line_of_user())
                self.model.integrity.watch(is_watching)

    def spread(self) -> None:
        for apart in self._apart:
            apart.begin(apart.mine)
        self.model.buffers.spread(self._apart[0].mine)
        # See [Note: who dies after a round] in `rounds`: nobody goes on before all have written.
        self.group.exchange(b"")

    def reseat(self) -> None:
        for apart, coding in zip(self._apart, self._codings, strict=True):
            apart.reseat()
            coding.reseat()

    def state(self) -> tuple[dict[str, torch.Tensor], Any]:
        tensors: dict[str, torch.Tensor] = {}
        numbers = []
        for index, apart in enumerate(self._apart):
            own, of_own = apart.state(self._rounds[index].anchored)
            tensors |= {f"{index}.{name}": tensor for name, tensor in own.items()}
            numbers.append(of_own)
            tensors |= {f"codec.{index}.{name}": tensor for name, tensor in self._codings[index].state().items()}
        self.model.buffers.gather_own()
        if self.model.buffers.num_bytes:
            tensors["buffers"] = self.model.buffers.own
        return tensors, {"rounds": [rounds.values() for rounds in self._rounds], "numbers": numbers}

    def load(self, tensors: Mapping[str, torch.Tensor], values: Any) -> None:
        for rounds in self._rounds:
            rounds.drop()
        for index, apart in enumerate(self._apart):
            prefix = f"{index}."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            apart.load(own, values["numbers"][index] if values is not None else ())
            if self.group.worker.is_first or not self.group.shares_memory:
                kept = f"codec.{index}."
                self._codings[index].load({n.removeprefix(kept): t for n, t in tensors.items() if n.startswith(kept)})
        self.group.exchange(b"")
        if values is None:
            self.spread()
        else:
            buffers = self.model.buffers.own
            if buffers.numel() and (self.group.worker.is_first or not self.group.shares_memory):
                buffers.copy_(tensors["buffers"])
            self._count(values)
        self.group.exchange(b"")

    def take_over(self, values: Any) -> None:
        self._count(values)
        for apart, numbers in zip(self._apart, values["numbers"], strict=True):
            apart.take_over(numbers)

    def facts(self) -> dict[str, Any]:
        num_rounds, num_bytes = (sum(getattr(r, name) for r in self._rounds) for name in ("num_rounds", "num_bytes"))
        return {"agreement": repr(self.recipe), "rounds": num_rounds, "bytes_per_replica": num_bytes}

    def _count(self, values: Any) -> None:
        for rounds, known in zip(self._rounds, values["rounds"], strict=True):
            rounds.take(known)

    def _step(self, apart: Apart, request: Request, met: Meeting, norms: Mapping[int, float]) -> None:
        """Let the replicas played here step by themselves. Collective."""
        frame = apart.step(request, norms)
        self.model.buffers.keep(r for r in apart.mine if r in met.changed)
        frames = [frame]
        if self.group.shares_memory:
            # Others must know what a replica has before they play it.
            frames = [theirs for _, theirs in self.calls.meet("step.update (commit)", request.where, None, frame)]
            self.clock.to("update")
        apart.settle(frames)
        self._rounds[request.optimizer].count(met.weights)
