"""One step as the user's loop sees it: iterate its shards, backward in each, then update.

    for x, y in step:                      one shard per replica played here     hops [1] to [3]
        step.backward(loss)
    step.update()                          hops [4] to [8], in `agree`

A step may be iterated again after an update (a GAN's second pass): the same shards, another pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from samestep.agree.meeting import Outcome, Part, Request
from samestep.core.audit import Account, Draw
from samestep.core.calls import line_of_user
from samestep.core.device import synchronize
from samestep.core.group import WorkerLost
from samestep.core.randomness import seed_shard, seed_step
from samestep.data.loading import Shard
from samestep.data.split import Slice, shard_bounds
from samestep.errors import DataError, UsageError
from samestep.loop.audits import Ear
from samestep.loop.feed import count_read
from samestep.loop.gathering import Gathering
from samestep.loop.session import Session


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What `step.update` was called with, and on which line of the script."""

    where: str
    optimizer: torch.optim.Optimizer | None
    clip_norm: float | None
    scaler: Any
    transform: Callable[[str, torch.Tensor], torch.Tensor] | None


class Driver(Protocol):
    """Who made the step, as the step sees it (`stepping.Stepping`)."""

    session: Session

    def update(self, step: Step, part: Part, choices: Choices) -> Outcome:
        """Make one update for `step`."""

    def read(self, batch: Slice) -> Sequence[Shard | None]:
        """Return the shards of a batch that were not read ahead."""

    def read_one(self, batch: Slice, replica: int) -> Shard | None:
        """Return the shard of one replica, whoever plays it."""

    def ids(self, batch: Slice, start: int, stop: int) -> np.ndarray:
        """Return the sample ids at positions [start, stop) of the batch's epoch."""


class Step:
    """One synchronised update (or several, if iterated again after each).

    Attributes:
        number: counted over the whole run, from 0.
        epoch: counted over the whole run, from 0.
        ends_epoch: whether this is the epoch's last step.
        size: samples in the batch as it was planned, bad ones included.
        bad_samples: after `update`: samples of the batch that could not be read and were left out, id -> error.
        loss: after `update`: weighted mean over the batch.
        grad_norm: after `update(clip_norm=...)`: norm of all gradients before clipping; math.inf only measures.
        means: after `update`: weighted mean of each number given to `mean`.
        skipped: after `update`: whether the weights stayed as they were, because a gradient overflowed under a scaler,
            or was not finite and `run.replicate(nonfinite=...)` lets such updates be skipped, or because every sample
            of the batch was left out; then `loss` is NaN.
        pass_: how many updates this step has made.
        slice: the positions of the data that the batch holds.
        left_in: the replica in whose shard the loop was left, if it was.
    """

    def __init__(self, driver: Driver, slice_: Slice, shards: Sequence[Shard | None] | None):
        self._driver = driver
        self._seed = driver.session.recipe.seed
        self._num_replicas = driver.session.num_replicas
        self.slice = slice_
        self._shards = shards
        self.number = slice_.number
        self.epoch = slice_.epoch
        self.ends_epoch = slice_.ends_epoch
        self.size = slice_.size
        self.pass_ = 0
        self.means: dict[str, float] = {}
        self.bad_samples: dict[int, str] = {}
        self.skipped = False
        self._outcome: Outcome | None = None
        self._part = Part()
        self._replica: int | None = None
        self._broken: int | None = None
        self.left_in: int | None = None
        self._gathering: Gathering | None = None
        self._state = "fresh"

    def __iter__(self) -> Iterator[Any]:
        """Yield the batch of each shard played here.

        Raises:
            UsageError: the step was iterated before and not updated since.
        """
        if self._state not in ("fresh", "updated"):
            raise UsageError(
                f"Step {self.number} was iterated again at {line_of_user()} without step.update() in between, so its "
                f"gradients would count twice. Call step.update() after each iteration."
            )
        self._state = "open"
        if self._shards is None and not self._driver.session.replaying:
            # The replay ended inside this step: its checkpoint was made before an update of it.
            claims = self._driver.session.agreed.claims
            self._shards = () if claims else self._driver.read(self.slice)
            _check_bad_again(self, self._shards)
        if self._shards is None:
            seed_step(self._seed, self.number)
            self._state = "iterated"
            return
        yield from self._play()

    def twice(self) -> Iterator[Any]:
        """Yield the batch of each shard twice, the first time without gradients, so that `gather` knows all rows.

        Raises:
            UsageError: see `__iter__`; or replicas step by themselves, or samples may be left out.
        """
        agreed = self._driver.session.agreed
        if not agreed.sums_gradients or agreed.allowance.skips:
            raise UsageError(
                f"step.twice at {line_of_user()} makes one batch of all shards: it needs one update for all replicas "
                f"(here agree={agreed.recipe!r}) and every sample (here on_bad_sample={agreed.allowance.rule!r})."
            )
        self._gathering = Gathering()
        try:
            yield from self
        finally:
            self._gathering = None

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of all shards, in replica order, for a loss over the whole batch: `backward(whole=True)`.

        Args:
            rows: those of this shard, which keep their graph: (rows, ...); only their number may differ.

        Raises:
            UsageError: called outside of `for batch in step.twice()`, or shards gave other shapes.
        """
        if self._gathering is None or self._replica is None:
            raise UsageError("step.gather was called outside of `for batch in step.twice()`, which plays shards twice.")
        return self._gathering.rows(self._replica, rows)

    def _play(self) -> Iterator[Any]:
        session = self._driver.session
        while True:
            drawn = None
            if session.audits is not None:
                drawn = session.audits.draw((self._seed, self.number, self.pass_), self.slice, self._num_replicas)
            try:
                if self._gathering is not None:
                    yield from _learn_rows(self, self._gathering)
                account = yield from self._play_mine(drawn)
                if session.audits is not None and drawn is not None:
                    again = partial(_again, self, drawn.replica)
                    yield from session.audits.settle(drawn, account, again, self.describe)
                elif session.group.loses_workers and not session.agreed.claims:
                    with session.group.mendable():
                        session.calls.end_shards()
                break
            except WorkerLost:
                assert session.model is not None
                session.model.buffers.restore()
                session.crew.regroup()
            # Who is left divides the shards anew, and plays them all again.
            self._shards = self._driver.read(self.slice)
            _check_bad_again(self, self._shards)
        seed_step(self._seed, self.number)
        self._state = "iterated"

    def _play_mine(self, drawn: Draw | None) -> Generator[Any, None, Account | None]:
        """Yield the batch of each shard that falls to this worker now; return what came of the one that is audited."""
        session = self._driver.session
        model = session.model
        assert model is not None and self._shards is not None
        account, self._part, self._broken = None, Part(), None
        agreed = session.agreed
        agreed.begin_pass()
        for state in model.states:
            state.begin_pass()
        for index, (replica, shard) in enumerate(_claimed(self) if agreed.claims else _assigned(self)):
            agreed.begin_shard(index, replica)
            ear = Ear(model, shard) if drawn is not None and drawn.replica == replica else None
            if shard is not None:
                self._part.bad = [*self._part.bad, *shard.bad]
            if shard is not None and shard.size:
                yield from self._shard(replica, shard)
                if model.buffers.end_shard(replica):
                    self._part.changed.append(replica)
            before = session.clock.to("update")
            agreed.end_shard(replica)
            session.clock.to(before)
            if ear is not None:
                account = ear.account(self._part.losses, replica)
        if session.worker.size > 1:
            # A GPU may still be at it: what its shards take is not to be counted as waiting.
            before = session.clock.to("compute")
            synchronize(session.worker.device)
            session.clock.to(before)
        return account

    def _shard(self, replica: int, shard: Shard, counts: bool = True) -> Iterator[Any]:
        """Yield the batch of one shard. If it `counts`, replicas keep what it does to their state."""
        session = self._driver.session
        model, clock = session.model, session.clock
        assert model is not None
        model.buffers.begin_shard(replica)
        seed_shard(self._seed, self.number, self.pass_, replica)
        self._replica, self._count = replica, len(shard.ids)
        self._part.samples[replica] = self._count
        for state in model.states:
            state.begin_shard(replica)
        if self._gathering is not None:
            self._gathering.begin_shard()
        clock.begin_shard(self.number, replica)
        before = clock.to("compute")
        try:
            yield shard.batch
        except GeneratorExit:
            self.left_in = replica  # by an error, most likely
            raise
        finally:
            session.agreed.leave_shard()
            for state in model.states:
                state.end_shard(replica, counts)
            self._replica = None
            clock.to(before)
            clock.begin_shard(self.number, -1)

    def backward(
        self, loss: torch.Tensor, count: float | None = None, retain_graph: bool = False, whole: bool = False
    ) -> None:
        """Run backward for this shard; call it inside `for ... in step`.

        Args:
            loss: scalar: the mean over the shard, or over `count` items. Or a vector of per-item losses. Several calls
                in a shard add up.
            count: items (tokens) that the loss is the mean of; the batch's gradient is then the mean over all of them.
                In all calls of a step, or in none.
            retain_graph: keep the graph for another call on it in this shard.
            whole: the loss is that of the whole batch, from `gather`, the same in every shard.

        Raises:
            UsageError: called outside a shard, or with something that is no loss.
        """
        if self._replica is None:
            raise UsageError(
                "step.backward was called outside of `for batch in step`. Call it for each shard, inside that loop."
            )
        if self._gathering is not None and self._gathering.is_first:
            return
        if whole and (self._gathering is None or count is not None):
            raise UsageError(
                "whole=True is for losses from step.gather, in `for batch in step.twice()`, without count=."
            )
        loss, count = _as_mean(loss, count, self._count)
        counted = count is not None
        weight = self._count if count is None else count
        if self._part.counted not in (None, counted):
            raise UsageError("count= was given to some calls of step.backward and not to others in one step.")
        self._part.counted = counted
        if count == 0:
            self._part.losses.append((self._replica, 0.0, 0.0))
            return
        self._part.losses.append((self._replica, float(loss.detach()), weight))
        share = 1.0 if whole else self._driver.session.agreed.share(weight, self.size, counted)
        try:
            loss.backward(None if share == 1.0 else torch.full_like(loss, share), retain_graph=retain_graph)
        except BaseException:
            self._broken = self._replica
            raise

    def mean(self, **values: Any) -> None:
        """Note numbers of this shard; after `update`, `step.means` holds their weighted means over the batch.

        Args:
            values: numbers or scalar tensors, each the mean over the shard.
        """
        if self._replica is None:
            raise UsageError("step.mean was called outside of `for batch in step`. Read the result in step.means.")
        if self._gathering is not None and self._gathering.is_first:
            return
        for name, value in values.items():
            number = value.detach() if isinstance(value, torch.Tensor) else value
            self._part.means.setdefault(name, []).append((self._replica, float(number)))

    def update(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        clip_norm: float | None = None,
        scaler: Any = None,
        transform: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Reduce the gradients, update the weights, commit. Called by every worker.

        Args:
            optimizer: the one to update, where several were replicated; other gradients are dropped.
            clip_norm: scale gradients so that their global norm is at most this.
            scaler: a torch.amp.GradScaler that scaled the losses. The weights stay where any gradient overflowed.
            transform: (name, gradient) -> gradient, for each whole mean gradient before clipping.

        Raises:
            UsageError: not all shards were run, or settings clash.
            NonFiniteError: a loss or gradient is NaN or infinite, and the update may not be skipped.
            EditedWeightsError: weights were edited outside of `update` and `run.edit()`.
        """
        where = line_of_user()
        _check_update(self, where, clip_norm)
        choices = Choices(where=where, optimizer=optimizer, clip_norm=clip_norm, scaler=scaler, transform=transform)
        if self.pass_ == 0 and self._shards:
            # Told to all: what a worker has read must not be lost with it.
            self._part.read = count_read(self.epoch, self._shards)
        self._outcome = self._driver.update(self, self._part, choices)
        self.means = self._outcome.means if self._outcome.is_known else _Unknown()
        self.skipped = self._outcome.skipped
        self.bad_samples = dict(self._outcome.bad)
        self._state = "updated"
        self.pass_ += 1

    @property
    def loss(self) -> float:
        return _known(self._outcome, "loss").loss

    @property
    def grad_norm(self) -> float:
        norm = _known(self._outcome, "grad_norm").grad_norm
        if norm is None:
            raise UsageError("step.grad_norm is measured when clip_norm is given; clip_norm=math.inf only measures.")
        return norm

    @property
    def updated(self) -> bool:
        """Whether every iteration of this step was followed by an update."""
        return self._state == "updated"

    @property
    def replica(self) -> int | None:
        """The replica whose shard is being played, inside `for batch in step`; None outside."""
        return self._replica

    def describe(self, replica: int) -> str:
        """Return words that name the shard of `replica`: step, replica, samples."""
        start, stop = shard_bounds(self.slice.start, self.slice.stop, self._num_replicas)[replica]
        ids = self._driver.ids(self.slice, start, stop).tolist()
        shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
        return f"step {self.number}, replica {replica} (samples {shown})"


def _check_update(step: Step, where: str, clip_norm: float | None) -> None:
    """Check that a step can be updated.

    Raises:
        UsageError: it cannot.
    """
    if step._state != "iterated":
        why = "its shards were not all run" if step._state == "open" else "it was not iterated"
        raise UsageError(
            f"step.update() at {where}: {why} (step {step.number}). Run `for batch in step: ...` to its end, "
            f"without break, before step.update()."
        )
    if step._broken is not None:
        raise UsageError(
            f"step.update() at {where}: backward failed in {step.describe(step._broken)}, so its gradient is "
            f"incomplete. Let that error end the run; if memory ran out, use more replicas (smaller shards)."
        )
    if clip_norm is not None and not clip_norm > 0:
        raise UsageError(f"You set clip_norm={clip_norm}; it must be above 0.")


def request_of(step: Step, index: int, choices: Choices, data: int) -> Request:
    """Return the update of optimizer number `index` that was asked for, on data set number `data`."""
    scaled = choices.scaler is not None and choices.scaler.is_enabled()
    return Request(
        where=choices.where,
        optimizer=index,
        clip_norm=choices.clip_norm,
        scale=float(choices.scaler.get_scale()) if scaled else 1.0,
        scaled=scaled,
        transform=choices.transform,
        seeds=(step._seed, step.number, step.pass_),
        num_samples=step.size,
        data=data,
        describe=step.describe,
    )


def _check_bad_again(step: Step, shards: Sequence[Shard | None]) -> None:
    """Check that samples are as good, or bad, as they were for an earlier update of a step.

    Raises:
        DataError: one is not.
    """
    if not step.pass_ or step._driver.session.agreed.overlaps:
        return
    for shard in filter(None, shards):
        now, known = {sample for sample, _ in shard.bad}, set(step.bad_samples)
        if other := (now - known) | (known & set(shard.ids.tolist())):
            raise DataError(
                f"Samples {sorted(other)} could be read for one update of step {step.number}, and not for another. "
                f"What they lie on fails now and then: try again when it does not."
            )


def _known(outcome: Outcome | None, name: str) -> Outcome:
    if outcome is None:
        raise UsageError(f"step.{name} is known after step.update().")
    return outcome


def _assigned(step: Step) -> Iterator[tuple[int, Shard | None]]:
    """Return the shards of the replicas that fall to this worker."""
    assert step._shards is not None
    return zip(step._driver.session.crew.replicas, step._shards, strict=True)


def _claimed(step: Step) -> Iterator[tuple[int, Shard | None]]:
    """Yield shards that nobody else plays, as long as there are any."""
    shards: list[Shard | None] = []
    step._shards = shards
    while (replica := step._driver.session.agreed.claim()) is not None:
        shard = step._driver.read_one(step.slice, replica)
        _check_bad_again(step, [shard])
        shards.append(shard)
        yield replica, shard


def _learn_rows(step: Step, gathering: Gathering) -> Generator[Any, None, None]:
    """Yield the batch of each shard played here, without gradients, and let all workers know what they gathered."""
    session = step._driver.session
    model = session.model
    assert model is not None and step._shards is not None
    gathering.begin()
    model.buffers.begin_pass()
    for state in model.states:
        state.begin_pass()
    with model.buffers.aside(), torch.no_grad():
        for replica, shard in zip(session.crew.replicas, step._shards, strict=True):
            if shard is not None and shard.size:
                yield from step._shard(replica, shard, counts=False)
    with session.group.mendable():
        gathering.share(session.calls)


def _again(step: Step, replica: int) -> Generator[Any, None, Account]:
    """Yield the batch of a shard, whoever plays it, and return what came of it; it counts for nothing."""
    session, model = step._driver.session, step._driver.session.model
    assert model is not None
    before = session.clock.to("data")
    shard = step._driver.read_one(step.slice, replica)
    session.clock.to(before)
    part, step._part = step._part, Part()
    try:
        with model.buffers.aside():
            for trained in model.trained:
                trained.gradients.begin_aside()
            ear = Ear(model, shard)
            if shard is not None and shard.size:
                yield from step._shard(replica, shard, counts=False)
            for trained in model.trained:
                trained.gradients.end_shard()
            return ear.account(step._part.losses, replica)
    finally:
        step._part = part


class _Unknown(dict[str, float]):
    """Means of an update that is not made yet: NaN, whatever the name."""

    def __missing__(self, name: str) -> float:
        return math.nan


def _as_mean(loss: Any, count: float | None, num_samples: int) -> tuple[torch.Tensor, float | None]:
    """Return the loss as a scalar mean, and the count it is the mean of where that is not the samples."""
    if not isinstance(loss, torch.Tensor) or not loss.is_floating_point():
        raise UsageError(f"step.backward needs a floating-point tensor as loss, not {type(loss).__name__}.")
    if not loss.requires_grad:
        raise UsageError("The loss has no graph: was it computed under torch.no_grad(), or detached?")
    if count is not None:
        count = float(count)
        if not 0 <= count < float("inf"):
            raise UsageError(f"count={count}; it must be 0 or more, and finite.")
    if loss.dim() and loss.numel() != 1:
        if count is None:
            count = None if loss.numel() == num_samples else float(loss.numel())
            return loss.float().mean() if loss.element_size() < 4 else loss.mean(), count
        return loss.float().sum() / count if count else loss.float().sum() * 0, count
    loss = loss.reshape(()) if loss.dim() else loss
    # A half-precision loss cannot hold a weight such as 5/37 well.
    return loss.float() if loss.element_size() < 4 else loss, count
