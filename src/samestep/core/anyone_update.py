"""Update by elements that any worker can make, alone: every worker owns everything.

Optimizers make their state when they first step. Here that happens on one worker, while the others do something else;
so all state has its places beforehand, found out on small parameters of the same kind. A parameter's places count only
once it was updated for the first time: until then the optimizer is shown no state, and makes what it begins with.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from samestep.core.element_update import ElementUpdate, _description, _place_of, _without_hooks
from samestep.core.group import Group
from samestep.core.optimizers import bare_copy
from samestep.core.places import Description, Slot
from samestep.core.update import State
from samestep.core.weights import Weights
from samestep.errors import UsageError


class AnyoneUpdate(ElementUpdate):
    """Steps a twin of the user's optimizer on everything; its state is shared by the workers' twins."""

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Weights, group: Group, name: str = "state"):
        self._flags_name = f"{name} made"
        self._linked = b""
        self._is_made = torch.empty(0)
        self._has_places = False
        super().__init__(optimizer, weights, group, name)
        if not self._has_places:
            self._prepare(())

    def _cut(self) -> None:
        super()._cut()
        # Empty parameters have no pieces.
        self._owned = {piece.parameter for piece, _ in self._pairs}

    def take_turn(self) -> None:
        """Take what other workers have made of the state since this one has updated last."""
        self._link()
        for piece, shadow in self._pairs:
            if piece.start and self._linked[piece.parameter]:
                # Each piece of a parameter has its number of steps of its own; that of the first is in its place.
                for key, value in self._twin.state[shadow].items():
                    if value.dim() == 0:
                        value.copy_(self.places.found[piece.parameter, key])

    def end_turn(self, updated: Collection[int]) -> None:
        """Let the others find what was made of the state of some parameters.

        Raises:
            UsageError: the optimizer keeps something new there.
        """
        if self.notice() is not None:
            raise UsageError(
                f"{type(self._optimizer).__name__} has begun to keep more state than at run.replicate, and other "
                f"workers are under way with what they know of it. Set momentum, amsgrad and alike before."
            )
        for parameter in self._owned & set(updated):
            self._is_made[parameter] = 1

    def reseat(self) -> None:
        self._cut()
        self.places.reseat()
        self._open()
        # None may go on to an update before all have read what they take over.
        self._group.exchange(b"")

    def load(self, state: State) -> None:
        super().load(state)
        self._prepare([index for index, values in state.items() if values])

    def full_state(self) -> State:
        self._group.exchange(b"")
        flags = self._is_made.tolist()
        self._optimizer.state.clear()
        self._show({slot: place for slot, place in self.places.found.items() if flags[slot[0]]})
        return {
            index: dict(self._optimizer.state[p])
            for index, p in enumerate(self._weights.parameters)
            if self._optimizer.state.get(p)
        }

    def was_cleared(self) -> bool:
        return False

    def _prepare(self, made: Collection[int]) -> None:
        """Make places for all state that there will be. Collective.

        Args:
            made: parameters whose state is known, and in its places.
        """
        known: dict[Any, dict[str, torch.Tensor]] = {}
        wanted: dict[Slot, Description] = {}
        for index, parameter in enumerate(self._weights.parameters):
            number = self._group_of[id(parameter)]
            kind = number, parameter.dtype, parameter.dim() == 0
            if kind not in known:
                known[kind] = _state_of_one(self._optimizer, *kind)
            for key, value in known[kind].items():
                if (index, key) not in self.places.found:
                    wanted[index, key] = _description(self._weights.views[index], value)
        self.places.add(wanted)
        self._has_places = True
        self._open()
        if self._group.worker.is_first:
            self._is_made.zero_()
            for index in made:
                self._is_made[index] = 1
        self._group.exchange(b"")

    def _open(self) -> None:
        """Find the places of this worker's pieces."""
        self._is_made = self._group.allocate(max(1, len(self._weights.parameters)), self._flags_name)
        keys: dict[int, list[str]] = {}
        for parameter, key in self.places.found:
            keys.setdefault(parameter, []).append(key)
        for piece, _ in self._pairs:
            known = self._known[piece] = {}
            for key in keys.get(piece.parameter, ()):
                place = self.places.found[piece.parameter, key]
                known[key] = _place_of(piece, place, place) if place.dim() or not piece.start else place.clone()
        self._linked = b""

    def _link(self) -> None:
        """Let the optimizer see the state of the parameters that were updated before, and of no other."""
        flags = bytes(self._is_made.tolist())
        if flags == self._linked:
            return
        self._linked = flags
        self._twin.state.clear()
        for piece, shadow in self._pairs:
            if flags[piece.parameter]:
                self._twin.state[shadow].update(self._known[piece])
        self._states = self._fused = None
        self.settle(())


def _state_of_one(
    optimizer: torch.optim.Optimizer, group: int, dtype: torch.dtype, is_number: bool
) -> dict[str, torch.Tensor]:
    """Return the state that `optimizer` makes for a small parameter in one of its groups."""
    parameter = torch.zeros(() if is_number else (2,), dtype=dtype)
    parameter.grad = torch.zeros_like(parameter)
    twin = bare_copy(optimizer)
    own = optimizer.param_groups[group]
    settings = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in own.items() if k != "params"}
    twin.param_groups = [{**settings, "params": [parameter]}]
    with torch.no_grad():
        _without_hooks(type(twin).step)(twin)
    return {key: value for key, value in twin.state[parameter].items() if isinstance(value, torch.Tensor)}
