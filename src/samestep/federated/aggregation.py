"""How the updates of a round's clients become one: a mean, or what stands liars.

                 streams   held at once           what a liar can do
    WeightedMean  yes      one sum                anything
    NormBound     yes      one sum                shift the mean by limit x its share of the weight
    TrimmedMean   no       a block of all clients nothing beyond the honest ones' range, up to `share` of liars
    Median        no       a block of all clients the same, up to half

What streams is folded client by client, each update scaled by `prepare` first. What needs all clients combines them
block by block: element i of the result is a function of column i, so any division into blocks gives the same bits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from samestep.core.norms import block_squares
from samestep.errors import SettingsError


class Aggregation(ABC):
    """A frozen recipe for one update from many.

    Attributes:
        needs_all: whether the updates of all clients must be held at once, a block of elements at a time; if not,
            the weighted mean of prepared updates is the result, and they can be added as they come.
        uses_weights: whether a client counts by its weight; if not, each client counts once, because a number of
            samples is a client's own claim.
    """

    needs_all: ClassVar[bool]
    uses_weights: ClassVar[bool]

    def prepare(self, update: Sequence[torch.Tensor]) -> float:
        """Return the factor to scale one client's whole update by, before it is weighted and added.

        Args:
            update: the client's update, one flat tensor per parameter, in parameter order.

        Returns:
            A factor in 0 .. 1. 0 means: leave this client's update out (it may hold NaN, which no factor cures).
        """
        return 1.0

    @abstractmethod
    def combine(self, stack: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        """Return one update from a block of all clients' prepared updates.

        Sums are done in float64, in an order that depends on the number of clients alone. What sorts takes memory for
        about four times the stack more.

        Args:
            stack: [clients, elements], floating point, clients in ascending order of their ids. Not changed.
            weights: [clients], 0 or more; ignored unless `uses_weights`.

        Returns:
            [elements], of the stack's dtype.

        Raises:
            SettingsError: too few clients for this recipe.
        """


@dataclass(frozen=True)
class WeightedMean(Aggregation):
    """The mean, each client weighted by its number of samples (McMahan et al. 2017)."""

    needs_all: ClassVar[bool] = False
    uses_weights: ClassVar[bool] = True

    def combine(self, stack: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        """Return the weighted mean over clients, added in client order."""
        return _weighted_mean(stack, weights)


@dataclass(frozen=True)
class NormBound(Aggregation):
    """The weighted mean of updates whose norm is at most `limit`; larger ones are scaled down (Sun et al. 2019).

    Args:
        limit: largest norm of one client's update, over all its parameters together.

    Raises:
        SettingsError: `limit` is not a positive number.
    """

    limit: float
    needs_all: ClassVar[bool] = False
    uses_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise SettingsError(f"You set NormBound(limit={self.limit}); the limit of a norm must be above 0.")

    def prepare(self, update: Sequence[torch.Tensor]) -> float:
        """Return min(1, limit / norm), or 0 for an update that is not finite."""
        return clip_factor(update, self.limit)

    def combine(self, stack: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        """Return the weighted mean over prepared updates, added in client order."""
        return _weighted_mean(stack, weights)


@dataclass(frozen=True)
class TrimmedMean(Aggregation):
    """Per element: the mean without the largest and the smallest `share` of clients (Yin et al. 2018).

    As many are left out at each end as `share` of the clients, rounded up. NaN counts as larger than any number.
    Clients count once each, whatever their weights.

    Args:
        share: share of clients left out at each end, 0 to below 0.5; at least the share of liars to stand.

    Raises:
        SettingsError: `share` outside of that.
    """

    share: float = 0.1
    needs_all: ClassVar[bool] = True
    uses_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.share < 0.5:
            raise SettingsError(
                f"You set TrimmedMean(share={self.share}), the share of clients left out at each end; it must be 0 or "
                f"more and below 0.5, or nobody would be left. Median() is what it comes to near 0.5."
            )

    def num_trimmed(self, num_clients: int) -> int:
        """Return how many of `num_clients` are left out at each end.

        Raises:
            SettingsError: nobody would be left.
        """
        # 0.1 * 30 is a little above 3 in floating point.
        number = math.ceil(self.share * num_clients - 1e-9)
        if 2 * number >= num_clients:
            raise SettingsError(
                f"You set TrimmedMean(share={self.share}), which leaves out {number} of {num_clients} clients at each "
                f"end: nobody is left. Take at least {2 * number + 1} clients per round, or Median()."
            )
        return number

    def combine(self, stack: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        """Return the trimmed mean over clients, added in ascending order of values."""
        number = self.num_trimmed(len(stack))
        middle = _sorted(stack)[number : len(stack) - number]
        return _sum_of_rows(middle).div_(len(middle)).to(stack.dtype)


@dataclass(frozen=True)
class Median(Aggregation):
    """Per element: the median, which fewer than half of the clients cannot move beyond the others' values.

    With an even number of clients, the mean of the two in the middle. NaN counts as larger than any number. Clients
    count once each, whatever their weights.
    """

    needs_all: ClassVar[bool] = True
    uses_weights: ClassVar[bool] = False

    def combine(self, stack: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        """Return the median over clients."""
        if not len(stack):
            raise SettingsError("Median() of no clients: at least one must deliver its update.")
        middle = _sorted(stack)[(len(stack) - 1) // 2 : len(stack) // 2 + 1]
        return _sum_of_rows(middle).div_(len(middle)).to(stack.dtype)


def clip_factor(update: Sequence[torch.Tensor], limit: float) -> float:
    """Return the factor that brings an update's norm to at most `limit`: min(1, limit / norm).

    Squares are added in fixed blocks, then in float64 in parameter order: the same bits wherever it is computed.

    Args:
        update: one flat tensor per parameter, in parameter order.
        limit: the largest norm.

    Returns:
        The factor; 0 for an update that holds NaN or infinity.
    """
    blocks = block_squares(lambda: [list(update)])
    norm = math.sqrt(math.fsum(square for squares in blocks for square in squares.tolist()))
    if not math.isfinite(norm):
        return 0.0
    return 1.0 if norm <= limit else limit / norm


def _weighted_mean(stack: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    total = math.fsum(weights)
    if len(weights) != len(stack) or not total > 0 or min(weights) < 0:
        raise SettingsError(
            f"A weighted mean of {len(stack)} clients needs as many weights, none below 0 and not all 0; they are "
            f"{list(weights)[:8]}."
        )
    out = torch.zeros(stack.shape[1], dtype=torch.float64, device=stack.device)
    for row, weight in zip(stack, weights, strict=True):
        # Two operations: fused into one, they would round otherwise at the end of a vector than within it.
        out.add_(row.double() * weight)
    return out.div_(total).to(stack.dtype)


def _sorted(stack: torch.Tensor) -> torch.Tensor:
    """Return the stack with each column in ascending order, NaN last."""
    # Columns become rows: sorting along memory is several times as fast.
    return stack.t().contiguous().sort(dim=1).values.t()


def _sum_of_rows(rows: torch.Tensor) -> torch.Tensor:
    # torch.sum's order depends on shapes; one addition after the other does not.
    out = rows[0].double()
    for row in rows[1:]:
        out = out.add_(row)
    return out
