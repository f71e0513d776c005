"""Owners update their parameters: what the two ways of doing it have in common.

`ElementUpdate` divides large tensors among owners; `WholeUpdate` lets the user's own optimizer step on whole tensors.
Both write the new weights in place, and keep optimizer state where every worker of a host can see it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from samestep.core.places import Places

State = dict[int, dict[str, Any]]
"""Optimizer state: for each parameter index, tensors and numbers by key."""


class Sums(Protocol):
    """Where an update gets the gradients of a chunk: `Fold` or `HeldFold`."""

    def chunk(self, index: int, absent: Any, factor: float) -> Sequence[torch.Tensor | None]:
        """Return one flat gradient per piece of the chunk."""


class Update(ABC):
    """One worker's part of updating one optimizer's parameters.

    Attributes:
        places: the optimizer's state tensors, as far as they lie in memory that all workers see.
    """

    places: Places

    @abstractmethod
    def apply(self, sums: Sums, absent: Any, factor: float) -> None:
        """Update the pieces this worker owns; gradients are the sums times `factor`."""

    @abstractmethod
    def apply_ready(self, gradients: dict[int, torch.Tensor]) -> None:
        """Update with finished gradients: flat, one per owned parameter (whole tensors only)."""

    @abstractmethod
    def notice(self) -> Any:
        """Return what the others must know after an update (wire-packable), or None. Called once per update."""

    @abstractmethod
    def settle(self, notices: Sequence[Any]) -> None:
        """Act on the notices of all workers. Collective if any is not None."""

    def was_cleared(self) -> bool:
        """Return whether the user emptied the optimizer's state."""
        return False

    @abstractmethod
    def reseat(self) -> None:
        """Take over what this worker owns in the group as it is now; state stays where it is. Collective."""

    @abstractmethod
    def full_state(self) -> State:
        """Return all optimizer state, of all owners. Collective."""

    @abstractmethod
    def load(self, state: State) -> None:
        """Replace the optimizer state. Every worker gives the same. Collective."""
