"""Walks through the batches of a data set: makes the steps, and has them updated and recorded."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from samestep.agree.meeting import Outcome, Part
from samestep.core.randomness import seed_step
from samestep.core.whole_update import WholeUpdate
from samestep.data.shard import Shard
from samestep.data.split import Slice
from samestep.errors import BudgetError, UsageError
from samestep.loop.evaluation import on_device
from samestep.loop.feed import Feed, Reading
from samestep.loop.pending import Trained
from samestep.loop.rounds import ClientWalk
from samestep.loop.session import Session
from samestep.loop.step import Choices, Driver, Step, request_of


@dataclass(frozen=True)
class Walk:
    """One call of `run.steps`: what it reads, and how."""

    feed: Feed
    source: Any
    reading: Reading

    def stream(
        self, replicas: range, slices: Iterator[Slice], ahead: deque[Slice], claims: bool
    ) -> Generator[tuple[Slice, Any], None, None]:
        """Return the shards of `replicas`, lazily; `ahead` takes the slices asked for. The caller removes them.

        Where workers claim shards, nothing is read before.
        """

        def taken() -> Iterator[Slice]:
            for batch in slices:
                ahead.append(batch)
                yield batch

        if claims:
            return ((batch, ()) for batch in taken())
        return self.feed.batches(self.source, taken(), replace(self.reading, replicas=replicas))

    def read(self, replicas: range, batch: Slice) -> Sequence[Shard | None]:
        """Return the shards of `replicas` of one batch, now."""
        reading = replace(self.reading, loaders=0, replicas=replicas)
        ((_, shards),) = self.feed.batches(self.source, iter([batch]), reading)
        return shards

    def step(self, driver: Driver, batch: Slice, shards: Sequence[Shard | None] | None) -> Step:
        """Return the step of a batch."""
        return Step(driver, batch, shards)


class Stepping:
    """One worker's way through its steps.

    Attributes:
        session: the run.
    """

    def __init__(self, session: Session):
        self.session = session
        session.whereabouts = self._whereabouts
        self._step: Step | None = None
        self._walk: Walk | ClientWalk | None = None

    def check_outside_shard(self, name: str) -> None:
        """Check that the user's code is between steps, as a call of `name` needs.

        Raises:
            UsageError: it is inside a shard.
        """
        if self._step is not None and self._step.replica is not None:
            raise UsageError(
                f"{name} was called inside a shard, where workers differ in what they run. Call it between steps."
            )

    def _whereabouts(self) -> str:
        if self._step is None or self._step.left_in is None:
            return ""
        return f"this happened in {self._step.describe(self._step.left_in)}"

    def walk(self, walk: Walk | ClientWalk, slices: Iterator[Slice]) -> Iterator[Step]:
        """Yield the steps of `slices`; those that a resumed run has behind it without shards."""
        session, clock, crew = self.session, self.session.clock, self.session.crew
        while session.replaying:
            batch = next(slices, None)
            if batch is None:
                self._after_step(last=True)
                return
            yield from self._one(walk, batch, None)
            self._after_step(last=False)
        ahead: deque[Slice] = deque()
        claims = session.agreed.claims
        if claims and isinstance(walk, Walk) and walk.reading.loaders:
            session.record.note(
                f"loaders={walk.reading.loaders} has no effect under agree={session.agreed.recipe!r}: a shard is read "
                f"when a worker claims it."
            )
        is_first, divided = True, crew.num_regroups
        stream = walk.stream(crew.replicas, slices, ahead, claims)
        try:
            while True:
                if crew.num_regroups != divided:
                    # Other replicas fall to this worker now, also of what was read ahead.
                    stream.close()
                    slices, divided = itertools.chain(tuple(ahead), slices), crew.num_regroups
                    ahead.clear()
                    stream = walk.stream(crew.replicas, slices, ahead, claims)
                begin, worked = time.perf_counter(), clock.worked()
                clock.begin_step(session.record.num_steps, is_first)
                is_first = False
                before = clock.to("data")
                try:
                    loaded = next(stream, None)
                except BudgetError:
                    self._after_step(last=True)
                    raise
                finally:
                    clock.to(before)
                if loaded is None:
                    break
                batch, shards = loaded
                ahead.popleft()
                yield from self._one(walk, batch, self._on_device(shards))
                taken = time.perf_counter() - begin
                session.record.timed(batch.size, taken)
                num_shards = sum(shard is not None and shard.size > 0 for shard in shards)
                crew.balance.took(num_shards, clock.worked() - worked, taken)
                self._after_step(last=False)
        finally:
            stream.close()
        self._after_step(last=True)

    def update(self, step: Step, part: Part, choices: Choices) -> Outcome:
        """Make one update for `step`, or give what was recorded of it."""
        session, model = self.session, self.session.model
        assert model is not None and self._walk is not None
        feed = self._walk.feed
        index = _index_of([t.optimizer for t in model.trained], choices.optimizer)
        optimizer, scaler = model.trained[index].optimizer, choices.scaler
        if scaler is not None and not scaler.is_enabled():
            scaler = None
        if scaler is not None:
            _require_registered(scaler, model.others)

        def make() -> list:
            return session.agreed.update(request_of(step, index, choices, feed.number), part).to_values()

        for hook in _user_hooks(_global_optimizer_pre_hooks, optimizer._optimizer_step_pre_hooks):
            hook(optimizer, (), {})
        before = session.clock.to("update")
        try:
            outcome = Outcome(*session.recorded("update", make, choices.where))
        finally:
            session.clock.to(before)
        session.clock.end_step()
        update = Trained(feed, step.slice, index, step.pass_, choices.where)
        if step.pass_ == 0:
            # Here, not when the step ends: a loop may be left by `break` after its update.
            session.record.num_steps += 1
        session.pending.add(update)
        session.pending.take(outcome)
        for state in model.states if not outcome.skipped else ():
            state.commit()
        if choices.transform is not None or isinstance(model.trained[index].update, WholeUpdate):
            # User code ran on the owners alone, and may have drawn random numbers there.
            seed_step(session.recipe.seed, step.number)
        if scaler is not None and not update.is_left_out(outcome):
            _update_scale(scaler, optimizer, outcome.skipped, session.worker.device)
        # What a scheduler looks at before it warns that the optimizer never stepped.
        vars(optimizer)["_opt_called"] = True
        for hook in _user_hooks(optimizer._optimizer_step_post_hooks, _global_optimizer_post_hooks):
            hook(optimizer, (), {})
        return outcome

    def read(self, batch: Slice) -> Sequence[Shard | None]:
        """Return the shards of a batch that were not read ahead."""
        assert self._walk is not None
        return self._on_device(self._walk.read(self.session.crew.replicas, batch))

    def read_one(self, batch: Slice, replica: int) -> Shard | None:
        """Return the shard of one replica, whoever plays it."""
        assert self._walk is not None
        return self._on_device(self._walk.read(range(replica, replica + 1), batch))[0]

    def ids(self, batch: Slice, start: int, stop: int) -> Any:
        """Return the sample ids at positions [start, stop) of the batch's epoch."""
        assert self._walk is not None
        return self._walk.feed.order(batch.epoch).ids(start, stop)

    def _one(self, walk: Walk | ClientWalk, batch: Slice, shards: Sequence[Shard | None] | None) -> Iterator[Step]:
        """Yield one step and see that it was updated."""
        seed_step(self.session.recipe.seed, batch.number)
        self._walk = walk
        self._step = step = walk.step(self, batch, shards)
        yield step
        if not step.updated:
            raise UsageError(
                f"Step {batch.number} was not updated. Call step.update() after `for batch in step: ...`, once for "
                f"each time the step is iterated."
            )
        self.session.tell(step.number, batch.epoch, step.loss)
        self._step = None

    def _after_step(self, last: bool) -> None:
        if self.session.replaying:
            if last and self.session.pending:
                self.session.pending.settle()
            self.session.replay.reach("after_step")
        else:
            if last:
                self.session.pending.settle()
            self.session.keeper.after_step(last)
            if not last:
                self.session.crew.rebalance(self.session.record.num_steps)

    def _on_device(self, shards: Sequence[Shard | None]) -> Sequence[Shard | None]:
        device = self.session.worker.device
        if device == "cpu":
            return shards
        return [s and replace(s, batch=on_device(s.batch, device)) for s in shards]


def _index_of(optimizers: Sequence[torch.optim.Optimizer], given: torch.optim.Optimizer | None) -> int:
    if given is None:
        if len(optimizers) > 1:
            raise UsageError(f"{len(optimizers)} optimizers are replicated: say which one, step.update(optimizer).")
        return 0
    for index, optimizer in enumerate(optimizers):
        if optimizer is given:
            return index
    raise UsageError("step.update was given an optimizer that was not in run.replicate(...).")


def _update_scale(scaler: Any, optimizer: Any, overflowed: bool, device: str) -> None:
    """Let a GradScaler grow or shrink its scale, as after its own step."""
    if scaler._scale is None:
        scaler._lazy_init_scale_growth_tracker(torch.device(device))
    found = torch.full((), float(overflowed), device=device)
    scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {torch.device(device): found}
    scaler.update()


def _require_registered(scaler: Any, others: Sequence[Any]) -> None:
    if all(other is not scaler for other in others):
        raise UsageError("Give the GradScaler to run.replicate(model, optimizer, scaler), so that it is saved too.")


def _user_hooks(*hooks: Mapping[int, Callable]) -> list[Callable]:
    """Return the step hooks that the user registered, on an optimizer and on all, without ours."""
    return [hook for some in hooks for hook in some.values() if hook.__module__ != "samestep.core.model"]
