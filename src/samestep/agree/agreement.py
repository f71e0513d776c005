"""What the ways to agree have in common: a frozen recipe, and the live form that a step talks to.

for x, y in step:          begin_pass, then for each shard played here: begin_shard, the user's code, end_shard
    step.backward(loss)    the loss times `share` goes backward
step.update()              update
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from samestep.agree.allowance import Allowance
from samestep.agree.meeting import Outcome, Part, Request
from samestep.agree.nonfinite import Tolerance
from samestep.core.calls import Calls
from samestep.core.clock import Clock
from samestep.core.group import Group
from samestep.core.model import Model, Options


@dataclass(frozen=True)
class Agreement(ABC):
    """How replicas agree: plain data, the same on every worker."""

    def prepare(self, options: Options) -> Options:
        """Return how the model is to be replicated for it."""
        return options

    @abstractmethod
    def bind(
        self,
        model: Model,
        group: Group,
        calls: Calls,
        clock: Clock,
        tolerance: Tolerance | None = None,
        allowance: Allowance | None = None,
    ) -> Live:
        """Return the live form for one worker. Collective.

        Args:
            model: what was replicated.
            group: the workers.
            calls: where they meet.
            clock: takes the time.
            tolerance: what becomes of updates that are not finite; they stop the run by default.
            allowance: what becomes of samples that cannot be read; they stop the run by default.
        """


class Playing(ABC):
    """One worker's side of agreeing: what a step calls.

    Attributes:
        recipe: what it is the live form of.
        model, group, calls, clock, tolerance, allowance: as given to `bind`.
        can_move: whether replicas can be played by other workers from one step to the next.
        sums_gradients: whether there is one update, from the sum of all replicas' gradients.
        claims: whether workers claim the shards of a pass one by one, as they come free, instead of playing fixed runs
            of replicas; and come to the end of a pass without meeting.
        overlaps: whether a step may begin before the update of the one before is made.
    """

    can_move = True
    sums_gradients = True
    claims = False
    overlaps = False

    def __init__(
        self,
        recipe: Agreement,
        model: Model,
        group: Group,
        calls: Calls,
        clock: Clock,
        tolerance: Tolerance | None = None,
        allowance: Allowance | None = None,
    ):
        self.recipe = recipe
        self.model = model
        self.group = group
        self.calls = calls
        self.clock = clock
        self.tolerance = tolerance if tolerance is not None else Tolerance("stop")
        self.allowance = allowance if allowance is not None else Allowance("stop")

    @abstractmethod
    def begin_pass(self) -> None:
        """Begin to play the shards of a pass; what was played since the last update is void."""

    def claim(self) -> int | None:
        """Return a replica whose shard of this pass this worker shall play now; None if none is left."""
        return None

    @abstractmethod
    def begin_shard(self, index: int, replica: int) -> None:
        """Begin the shard of `replica`, the one number `index` of those that this worker plays."""

    def leave_shard(self) -> None:  # noqa: B027
        """The user's code has ended, or was left, in a shard."""

    @abstractmethod
    def end_shard(self, replica: int) -> None:
        """End it; also where it was empty."""

    def share(self, weight: float, size: int, counted: bool) -> float:
        """Return what a loss is multiplied by before it goes backward.

        Args:
            weight: items that it is the mean of.
            size: samples of the batch.
            counted: whether the user counted the items.

        Returns:
            1, so that gradients are those of the shard's mean, unless they are added up over replicas.
        """
        return 1.0

    @abstractmethod
    def update(self, request: Request, part: Part) -> Outcome:
        """Make one update, or skip it. Collective.

        Raises:
            EditedWeightsError: weights were changed outside of it.
            DataError: more samples were left out than are allowed.
            IntegrityError: memory changed by itself since the update before.
            NonFiniteError: a loss or gradient is NaN or infinite, and the update may not be skipped.
            UsageError, MismatchError: the workers' parts do not fit together.
        """


class Live(Playing):
    """One worker's side of agreeing: also what is kept from step to step, and how it comes to rest."""

    def settle(self) -> None:
        """Bring into the weights what replicas have done by themselves, if anything. Collective."""

    def late(self) -> list[Outcome]:
        """Return, after `settle`, what became of the updates that `update` has not told yet."""
        return []

    @contextmanager
    def drained(self) -> Iterator[None]:
        """Let no update be under way inside the `with` block, and the weights be the newest. Collective."""
        yield

    def spread(self) -> None:
        """Let replicas go on from the weights as they are now."""

    def reseat(self) -> None:
        """Take the replicas that fall to this worker now; the model has done so. Collective."""

    def state(self) -> tuple[dict[str, torch.Tensor], Any]:
        """Return, for checkpoints, what it keeps from step to step: tensors by name, and plain values. Collective."""
        return {}, None

    def load(self, tensors: Mapping[str, torch.Tensor], values: Any) -> None:
        """Take back what `state` gave; without it, start from the weights as they are now. Collective."""

    def adopt(self, tensors: Mapping[str, torch.Tensor], values: Any) -> None:
        """Take what `state` gave in a run at another point, of which only the state is wanted. Collective."""
        self.load(tensors, values)

    def take_over(self, values: Any) -> None:
        """Take, in a worker that joins, the plain values that `state` gave; tensors lie in the group's memory."""

    def end(self) -> None:
        """Main has ended: take leave of whoever is beyond this run. Collective."""

    def facts(self) -> dict[str, Any]:
        """Return what the summary of the run says about it. Collective."""
        return {}
