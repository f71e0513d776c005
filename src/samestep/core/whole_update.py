"""Update by whole tensors: the user's own optimizer steps, with gradients set on the parameters this worker owns.

For optimizers that look at a tensor as a whole, and (all parameters on one owner) for those that may look at anything.
The state they create is moved into places that every worker sees; numbers they keep in the state or in their groups
are told to the other workers after each update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from samestep.core.group import Group
from samestep.core.layout import Layout
from samestep.core.places import Description, Places, Slot, describe
from samestep.core.update import State, Sums, Update
from samestep.storage import wire


class Held(Protocol):
    """The parameters that are updated, as far as it matters here (`Weights`)."""

    parameters: list[torch.nn.Parameter]
    views: list[torch.Tensor]
    layout: Layout


class WholeUpdate(Update):
    """Steps the user's optimizer on the parameters this worker owns."""

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Held, group: Group, name: str = "state"):
        self._optimizer = optimizer
        self._weights = weights
        self._group = group
        self.places = Places(group, name)
        self._cut()
        self._told: dict[Slot, Any] = {}
        self._settings: list[dict[str, Any]] = []
        if optimizer.state:
            self.load({i: dict(optimizer.state[p]) for i, p in enumerate(weights.parameters) if optimizer.state.get(p)})

    def _cut(self) -> None:
        """Take what this worker owns."""
        self._chunks = self._weights.layout.chunks[self._group.worker.rank]
        self._owned = [piece.parameter for chunk in self._chunks for piece in chunk]

    def reseat(self) -> None:
        self._cut()
        self.places.reseat()
        self._told.clear()
        for (parameter, key), place in self.places.found.items():
            self._optimizer.state[self._weights.parameters[parameter]][key] = place

    def apply(self, sums: Sums, absent: Any, factor: float) -> None:
        gradients = {}
        for index, chunk in enumerate(self._chunks):
            for piece, gradient in zip(chunk, sums.chunk(index, absent, factor), strict=True):
                if gradient is not None:
                    # Kept until the optimizer has stepped, while the chunk's own memory is used again.
                    gradients[piece.parameter] = gradient.clone()
        self.apply_ready(gradients)

    def apply_ready(self, gradients: dict[int, torch.Tensor]) -> None:
        parameters, optimizer = self._weights.parameters, self._optimizer
        self._settings = [_settings(group) for group in optimizer.param_groups]
        hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = type(hooks[0])(), type(hooks[1])()
        try:
            for index, gradient in gradients.items():
                view = self._weights.views[index]
                parameters[index].grad = gradient.to(view.dtype).as_strided(view.shape, view.stride())
            if gradients:
                type(optimizer).step(optimizer)
        finally:
            optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = hooks
            for index in gradients:
                parameters[index].grad = None

    def notice(self) -> Any:
        fresh, numbers = False, {}
        for parameter in self._owned:
            state = self._optimizer.state.get(self._weights.parameters[parameter], {})
            for key, value in state.items():
                slot = parameter, key
                if isinstance(value, torch.Tensor):
                    place = self.places.found.get(slot)
                    if place is None or describe(place)[:2] != describe(value)[:2]:
                        fresh = True
                    elif place is not value:
                        place.copy_(value)
                        state[key] = place
                elif isinstance(value, int | float | str | bool | None) and self._told.get(slot, state) != value:
                    numbers[slot] = self._told[slot] = value
        settings = self._changed_settings() if self._owned else {}
        fresh = fresh and self._group.shares_memory
        return {"fresh": fresh, "numbers": numbers, "settings": settings} if fresh or numbers or settings else None

    def settle(self, notices: Sequence[Any]) -> None:
        for rank, notice in enumerate(notices):
            if notice is None or rank == self._group.worker.rank:
                continue
            for (parameter, key), value in notice["numbers"].items():
                self._optimizer.state[self._weights.parameters[parameter]][key] = value
            for number, changed in notice["settings"].items():
                self._optimizer.param_groups[number].update(changed)
        if any(n is not None and n["fresh"] for n in notices):
            self._place()

    def full_state(self) -> State:
        if self._group.shares_memory:
            self._group.exchange(b"")
            owned: Sequence[int] = range(len(self._weights.parameters))
        else:
            owned = self._owned
        mine = {i: dict(self._optimizer.state.get(self._weights.parameters[i], {})) for i in owned}
        mine = {index: state for index, state in mine.items() if state}
        if self._group.shares_memory:
            return mine
        full: State = {}
        for message in self._group.exchange(wire.pack(mine)):
            full.update(wire.unpack(message))
        return {index: full[index] for index in sorted(full)}

    def load(self, state: State) -> None:
        self.places.clear()
        self._told.clear()
        self._optimizer.state.clear()
        for index, values in state.items():
            if index in self._owned or not self._group.shares_memory:
                target = self._optimizer.state[self._weights.parameters[index]]
                target.update({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in values.items()})
        if self._group.shares_memory:
            self._place()
            for index, values in state.items():
                numbers = {k: v for k, v in values.items() if not isinstance(v, torch.Tensor)}
                self._optimizer.state[self._weights.parameters[index]].update(numbers)

    def _place(self) -> None:
        """Move state tensors that have no fitting place yet into the group's memory. Collective."""
        wanted: dict[Slot, Description] = {}
        for parameter in self._owned:
            for key, value in self._optimizer.state.get(self._weights.parameters[parameter], {}).items():
                if isinstance(value, torch.Tensor) and self.places.found.get((parameter, key)) is not value:
                    dtype, shape, _ = describe(value)
                    wanted[parameter, key] = (dtype, shape, tuple(torch.empty_like(value).stride()))
        places = self.places.add(wanted)
        for slot in wanted:
            places[slot].copy_(self._optimizer.state[self._weights.parameters[slot[0]]][slot[1]])
        self._group.exchange(b"")
        for (parameter, key), place in places.items():
            self._optimizer.state[self._weights.parameters[parameter]][key] = place

    def _changed_settings(self) -> dict[int, dict[str, Any]]:
        changed = {}
        for number, (before, group) in enumerate(zip(self._settings, self._optimizer.param_groups, strict=True)):
            after = _settings(group)
            difference = {k: v for k, v in after.items() if k not in before or not _same(before[k], v)}
            if difference:
                changed[number] = difference
        return changed


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a group's settings that can be told to others."""
    plain = bool, int, float, str, tuple, list, type(None)
    return {
        k: v.clone() if isinstance(v, torch.Tensor) else v
        for k, v in group.items()
        if k != "params" and isinstance(v, (*plain, torch.Tensor))
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    return type(a) is type(b) and a == b
