"""Stale steps: workers go on without waiting for the slowest, on weights that lack its latest updates.

    shard     on one host: claimed by whoever is free, played on the newest weights there are
              between hosts: played by whom it falls to, on the weights that the script sees
    update    told; the worker goes on once the update `bound` before it is made
              on one host: made by one worker, alone
              between hosts: sums go to the owners, and what these make of their weights to all, beside the next steps

Every update is made of all replicas' gradients of its step, added along the tree, each exactly once, in the order of
the steps: only the weights that a gradient was computed on may be up to `bound` updates old. This is stale synchronous
parallel (Ho et al. 2013); on one host with work shared out dynamically, so that a slow worker plays fewer shards. The
result is a function of the recipe and of the schedule: for each shard, which version of the weights it was played on.
`record` writes it down, and `replay` plays every shard on that very version again, on any number of workers, with the
same bits. Between hosts the schedule is always the same.

What the script sees between two steps is the same on every worker: the weights, losses and means of the update `bound`
before, which all know to be made.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from samestep.agree.agreement import Agreement, Live
from samestep.agree.board import Board
from samestep.agree.courier import Courier
from samestep.agree.maker import Maker, OwnersMaker
from samestep.agree.meeting import Outcome, Part, Request, unit_of
from samestep.agree.pipeline import Pipeline, Shards
from samestep.agree.schedule import Schedule
from samestep.agree.shelf import SentShelf, SharedShelf, Shelf
from samestep.agree.versions import Versions
from samestep.core.element_update import ElementUpdate
from samestep.core.group import Group
from samestep.core.model import Model, Options
from samestep.core.worker import Wish
from samestep.errors import EditedWeightsError, SettingsError, UsageError

_MOST = 255
"""Updates. A lag is kept in one byte; a bound above the number of steps in a second pays nowhere."""


@dataclass(frozen=True)
class Stale(Agreement):
    """Replicas agree at every step, on gradients of weights that may be some updates old.

    Args:
        bound: how many updates the weights of a shard may lack; between hosts, how many they do. 0 is synchronous, to
            the bit.
        scale: "inverse" multiplies a shard's gradient by 1 / (1 + updates that its weights lacked) (Zhang et al. 2016).
        record: file to write the schedule to.
        replay: file with a schedule to go by; beyond its end shards are free.
    """

    bound: int = 4
    scale: Literal["inverse"] | None = None
    record: str | None = field(default=None, repr=False)
    replay: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.bound, int) or isinstance(self.bound, bool) or not 0 <= self.bound <= _MOST:
            raise SettingsError(f"You set Stale(bound={self.bound!r}); it must be a whole number from 0 to {_MOST}.")
        if self.scale not in (None, "inverse"):
            raise SettingsError(f"You set Stale(scale={self.scale!r}); use None or 'inverse'.")
        if self.record is not None and self.record == self.replay:
            raise SettingsError(f"You set Stale(record={self.record!r}, replay={self.replay!r}): use two files.")

    def prepare(self, options: Options) -> Options:
        return replace(options, beside=True)

    def bind(self, model, group, calls, clock, tolerance=None, allowance=None) -> LiveStale:
        self._check(model, group)
        made = OnOneHost if group.shares_memory else BetweenHosts
        return made(self, model, group, calls, clock, tolerance, allowance)

    def _check(self, model: Model, group: Group) -> None:
        """Refuse what it cannot do."""
        if group.worker.device != "cpu":
            raise SettingsError(
                f"You set agree={self!r} and device={group.worker.device!r}: Stale works on CPUs so far. Use "
                f"Synchronous(), or Local(every=...)."
            )
        if len(model.trained) > 1:
            raise UsageError(
                f"You set agree={self!r} with {len(model.trained)} optimizers: Stale takes one. Put the parameters "
                f"into groups of one optimizer, or use Synchronous()."
            )
        trained = model.trained[0]
        if not isinstance(trained.update, ElementUpdate):
            raise UsageError(
                f"You set agree={self!r} with {type(trained.optimizer).__name__}, whose update of one element depends "
                f"on others: under Stale updates are made while shards are played, away from the parameters. Use SGD, "
                f"AdamW, or another of torch's optimizers by element, or Synchronous()."
            )


class _UnderWay(Live):
    """What Stale keeps from step to step, and how it comes to rest.

    Attributes:
        shelf, versions, board, pipeline: of the updates that are under way; see their classes.
    """

    recipe: Stale
    shelf: Shelf
    versions: Versions
    board: Board | Courier
    pipeline: Pipeline

    def __init__(self, *bound: Any):
        super().__init__(*bound)
        recipe, model = self.recipe, self.model
        is_first = self.group.worker.is_first
        self.schedule = Schedule(
            model.division.num_replicas, recipe.bound, recipe.record if is_first else None, recipe.replay
        )
        self._open()
        # Since the steps came to rest last, the script has known this version.
        self._rested = 0

    @abstractmethod
    def _open(self) -> None:
        """Make room for updates under way. Collective."""

    @property
    def visible(self) -> int:
        """The version of the weights that the script sees between two steps."""
        return max(self.pipeline.number - self.recipe.bound, self._rested)

    def show(self) -> None:
        """Let the script see what it is to see between two steps."""
        self.versions.enter(self.visible)
        self.model.guard.follow()

    def settle(self) -> None:
        self.pipeline.drain()
        self._rested = self.pipeline.number
        self._show_newest()

    def late(self) -> list[Outcome]:
        return self.pipeline.late()

    @contextmanager
    def drained(self) -> Iterator[None]:
        self.pipeline.drain()
        # It may have been asked for several times while it was on its way.
        self.calls.heard(Wish.SNAPSHOT)
        self._show_newest()
        try:
            yield
        finally:
            self.show()

    def spread(self) -> None:
        if self.versions.writes:
            self.versions.keep_all(self.model.buffers)
        self.group.exchange(b"")
        self._rested = self.pipeline.number
        self._show_newest()

    def state(self) -> tuple[dict[str, torch.Tensor], Any]:
        values = {"rested": self._rested, "lags": self.schedule.lags, "pipeline": self.pipeline.to_values()}
        return {"versions": self.versions.memory}, values

    def load(self, tensors: Mapping[str, torch.Tensor], values: Any) -> None:
        if values is None:
            self.group.exchange(b"")
            self.spread()
            return
        if self.versions.writes:
            self.versions.memory.copy_(tensors["versions"])
        self.take_over(values)
        self.board.reset(self.pipeline.number)

    def adopt(self, tensors: Mapping[str, torch.Tensor], values: Any) -> None:
        self.load({}, None)

    def take_over(self, values: Any) -> None:
        self._rested = values["rested"]
        self.schedule.load(values["lags"])
        self.pipeline.load(values["pipeline"])

    def _show_newest(self) -> None:
        self.versions.enter_newest(self.pipeline.number)
        self.model.guard.follow()
        self.model.guard.accept()


class LiveStale(_UnderWay):
    """One worker's side of stale steps."""

    can_move = False
    sums_gradients = False
    overlaps = True

    def __init__(self, *bound: Any):
        super().__init__(*bound)
        self._lags: dict[int, int] = {}
        self._lag = 0

    def begin_pass(self) -> None:
        self.model.guard.check_traces()
        if self.versions.buffers_differ(self.visible):
            raise EditedWeightsError(
                f"A buffer was changed between two steps, under agree={self.recipe!r}, where shards start from "
                f"buffers as old as their weights. Put it into `with run.edit():`."
            )
        # Other workers write to the newest weights at any time; what they lie in is not watched.
        if self.model.integrity.is_watching:
            self.model.integrity.watch(False)
        self.show()
        self.model.trained[0].gradients.begin_pass()
        self._lags.clear()

    @property
    @abstractmethod
    def _free(self) -> int:
        """The version that a shard is played on where no schedule says so."""

    def begin_shard(self, index: int, replica: int) -> None:
        number = self.pipeline.number
        lag = self.schedule.lag(number, replica)
        if lag is None:
            version = self._free
        else:
            version = number - lag
            self.pipeline.await_commit(version - 1)
        self._lag = self._lags[replica] = number - version
        assert 0 <= self._lag <= self.recipe.bound, "a shard is played on weights that are too old"
        self.versions.enter(version)
        self.model.trained[0].gradients.begin_shard(self.shelf.leaf(number, replica))

    def leave_shard(self) -> None:
        self.versions.point(self.visible)

    def end_shard(self, replica: int) -> None:
        self.model.trained[0].gradients.end_shard()
        self.versions.publish(self.pipeline.number, replica)
        self.show()

    def share(self, weight: float, size: int, counted: bool) -> float:
        share = weight / (unit_of(size) if counted else size)
        return share / (1 + self._lag) if self.recipe.scale == "inverse" else share

    def update(self, request: Request, part: Part) -> Outcome:
        trained, number = self.model.trained[0], self.pipeline.number
        if request.scaled:
            raise UsageError(
                f"You gave step.update a GradScaler at {request.where} under agree={self.recipe!r}: whether a "
                f"gradient overflowed is known only some updates later. Use bfloat16 without a scaler, or "
                f"Synchronous()."
            )
        if trained.stale:
            raise UsageError(
                f"A state was loaded into {type(trained.optimizer).__name__} after run.replicate, under "
                f"agree={self.recipe!r}, where updates may be under way. Load it before run.replicate."
            )
        trained.reload_if_stale()
        self.model.guard.check_traces()
        bad = [[self.shelf.replica(leaf), *which] for leaf, *which in trained.gradients.not_finite()]
        missing = self.shelf.missing(number, self._lags)
        shards = Shards(bad, trained.gradients.finite.huge, list(self._lags.items()), missing)
        self.pipeline.arrive(request, part, shards)
        due = number - self.recipe.bound
        self.pipeline.await_commit(due)
        self.pipeline.collect(due + 1)
        self.show()
        return self.pipeline.give(due, request)

    def facts(self) -> dict[str, Any]:
        return {
            "agreement": repr(self.recipe),
            "staleness": self.schedule.histogram(),
            "stale_bytes": self.versions.num_bytes,
            "stale_per_worker": not self.claims,
            "fixed_schedule": not self.claims and self.recipe.replay is None,
        }


class OnOneHost(LiveStale):
    """Where workers share memory: they claim shards as they come free, and any of them makes an update."""

    claims = True
    board: Board

    def _open(self) -> None:
        model, group, bound = self.model, self.group, self.recipe.bound
        self.shelf = SharedShelf(model, group, bound)
        self.versions = Versions(model, group, group, bound, self.shelf)
        self.board = Board(group, model.division.num_replicas, bound)
        self.pipeline = Pipeline(self, self.board, Maker(self, self.versions, self.shelf), self.schedule)

    @property
    def _free(self) -> int:
        return self.board.newest

    def claim(self) -> int | None:
        return self.board.claim(self.pipeline.number)

    def reseat(self) -> None:
        if not self.pipeline.is_idle:
            self.group.lose("A worker is gone, and updates were under way.")
        self.versions.open()
        self.board.open(self.pipeline.number)
        self.show()


class BetweenHosts(LiveStale):
    """Where they do not: each plays its own replicas, and owns a part of the weights, which it updates and serves."""

    def _open(self) -> None:
        model, bound = self.model, self.recipe.bound
        self.board = courier = Courier(self.group, bound)
        self.shelf = SentShelf(model, courier.group, bound)
        self.versions = Versions(model, self.group, courier.group, bound, self.shelf)
        maker = OwnersMaker(self, self.versions, self.shelf, courier.group)
        self.pipeline = Pipeline(self, courier, maker, self.schedule)
        courier.serve(self.pipeline.make)

    @property
    def _free(self) -> int:
        return self.visible

    def update(self, request: Request, part: Part) -> Outcome:
        if request.transform is not None and self.recipe.bound:
            raise UsageError(
                f"You gave step.update a transform at {request.where} under agree={self.recipe!r} between hosts, where "
                f"it would be called while shards are played, and may draw the random numbers that are theirs. Leave "
                f"it out, or use Synchronous()."
            )
        return super().update(request, part)
