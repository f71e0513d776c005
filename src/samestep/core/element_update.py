"""Update by elements: for optimizers that treat every element alone, so large tensors can be divided among owners.

A twin of the user's optimizer steps on *shadows*: flat views of the pieces this worker owns, chunk by chunk, with
the settings of the user's groups. State is created by the optimizer itself for the pieces, then moved into places
that every worker sees: full tensors in `optimizer.state[parameter]`, of which each shadow has its part.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from samestep.core.fused_adam import FusedAdam, fits
from samestep.core.group import Group
from samestep.core.layout import Piece
from samestep.core.memory import give_back
from samestep.core.optimizers import bare_copy
from samestep.core.places import Description, Places, Slot
from samestep.core.update import State, Sums, Update
from samestep.core.weights import Weights
from samestep.storage import wire


class ElementUpdate(Update):
    """Steps a twin of the user's optimizer on the pieces this worker owns."""

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Weights, group: Group, name: str = "state"):
        self._optimizer = optimizer
        self._weights = weights
        self._group = group
        self.places = Places(group, name)
        self._bare_step = _without_hooks(type(optimizer).step)
        self._cut()
        if optimizer.state:
            self.load({i: dict(optimizer.state[p]) for i, p in enumerate(weights.parameters) if optimizer.state.get(p)})

    def _cut(self) -> None:
        """Cut out the pieces that this worker owns, without state."""
        self._twin = bare_copy(self._optimizer)
        self._group_of = {id(p): number for number, g in enumerate(self._optimizer.param_groups) for p in g["params"]}
        chunks = self._weights.layout.chunks[self._group.worker.rank]
        self._pieces: list[list[Piece]] = [list(chunk) for chunk in chunks]
        self._shadows = [[self._shadow(piece) for piece in chunk] for chunk in chunks]
        self._pairs = [
            pair for p, s in zip(self._pieces, self._shadows, strict=True) for pair in zip(p, s, strict=True)
        ]
        self._groups = [self._group_by_settings(p, s) for p, s in zip(self._pieces, self._shadows, strict=True)]
        self._known: dict[Piece, dict[str, torch.Tensor]] = {piece: {} for chunk in chunks for piece in chunk}
        self._states: list[tuple[dict, dict]] | None = None
        self._fused: list[FusedAdam | None] | None = None

    def reseat(self) -> None:
        self._cut()
        self.places.reseat()
        keys: dict[int, list[str]] = {}
        for parameter, key in self.places.found:
            keys.setdefault(parameter, []).append(key)
        for piece, shadow in self._pairs:
            for key in keys.get(piece.parameter, ()):
                place = self.places.found[piece.parameter, key]
                place = _place_of(piece, place, place) if place.dim() or not piece.start else place.clone()
                self._twin.state[shadow][key] = self._known[piece][key] = place
        self._show(self.places.found)
        # None may go on to an update before all have read what they take over.
        self._group.exchange(b"")

    def apply(self, sums: Sums, absent: Any, factor: float) -> None:
        for index, shadows in enumerate(self._shadows):
            self._step(index, sums.chunk(index, absent, factor), shadows)

    def apply_ready(self, gradients: dict[int, torch.Tensor]) -> None:
        for index, (pieces, shadows) in enumerate(zip(self._pieces, self._shadows, strict=True)):
            ready = [gradients.get(p.parameter) for p in pieces]
            cut = [g if g is None else g[p.start : p.stop] for g, p in zip(ready, pieces, strict=True)]
            self._step(index, cut, shadows)

    def notice(self) -> Any:
        fresh = False
        if self._states is None:
            self._states = [(self._twin.state[shadow], self._known[piece]) for piece, shadow in self._pairs]
        for state, known in self._states:
            if len(state) == len(known) and all(map(operator.is_, state.values(), known.values())):
                continue
            for key, value in state.items():
                place = known.get(key)
                if place is None:
                    fresh = True
                elif place is not value:
                    place.copy_(value)
                    state[key] = place
        return "fresh" if fresh and self._group.shares_memory else None

    def settle(self, notices: Sequence[Any]) -> None:
        if any(n is not None for n in notices):
            self._place()
        if self._fused is None and fits(self._optimizer):
            # Where a chunk holds parameters of two groups, or some have no state yet, `step` does it.
            pairs = zip(self._shadows, self._groups, strict=True)
            self._fused = [FusedAdam.of(s, self._twin.state) if len(g) == 1 else None for s, g in pairs]

    def was_cleared(self) -> bool:
        return bool(self.places.found) and not self._optimizer.state

    def full_state(self) -> State:
        if self._group.shares_memory:
            self._group.exchange(b"")
            return {
                index: dict(self._optimizer.state[p])
                for index, p in enumerate(self._weights.parameters)
                if self._optimizer.state.get(p)
            }
        mine = {
            (piece.parameter, piece.start): dict(self._twin.state[shadow])
            for piece, shadow in self._pairs
            if self._twin.state.get(shadow)
        }
        parts: dict[int, dict[int, dict]] = {}
        for message in self._group.exchange(wire.pack(mine)):
            for (parameter, start), state in wire.unpack(message).items():
                parts.setdefault(parameter, {})[start] = state
        return {parameter: _joined(self._weights.views[parameter], parts[parameter]) for parameter in sorted(parts)}

    def load(self, state: State) -> None:
        self._twin.state.clear()
        self._states = self._fused = None
        self.places.clear()
        self._optimizer.state.clear()
        for piece, shadow in self._pairs:
            self._known[piece] = {}
            for key, value in state.get(piece.parameter, {}).items():
                self._twin.state[shadow][key] = self._part(piece, value)
        if self._group.shares_memory:
            self._place()

    def _shadow(self, piece: Piece) -> torch.Tensor:
        flat = self._weights.flat(piece)
        # The state of a single number has no dimensions either; only so does it fit when it is loaded.
        return flat.reshape(()) if self._weights.views[piece.parameter].dim() == 0 else flat

    def _step(self, index: int, gradients: Sequence[torch.Tensor | None], shadows: Sequence[torch.Tensor]) -> None:
        fused = self._fused[index] if self._fused is not None else None
        if fused is not None and fits(self._optimizer) and all(map(_suits, gradients, shadows)):
            fused.step(self._optimizer, self._optimizer.param_groups[self._groups[index][0][0]], list(gradients))
            return
        for shadow, gradient in zip(shadows, gradients, strict=True):
            if gradient is not None and gradient.dtype != shadow.dtype:
                gradient = gradient.to(shadow.dtype)
            if gradient is not None and gradient.dim() != shadow.dim():
                gradient = gradient.reshape(())
            shadow.grad = gradient
        for number, settings in self._groups[index]:
            params = settings["params"]
            settings.update(self._optimizer.param_groups[number])
            settings["params"] = params
        self._twin.param_groups = [settings for _, settings in self._groups[index]]
        self._bare_step(self._twin)

    def _group_by_settings(self, pieces: Sequence[Piece], shadows: Sequence[torch.Tensor]) -> list[tuple[int, dict]]:
        groups: dict[int, dict] = {}
        for piece, shadow in zip(pieces, shadows, strict=True):
            number = self._group_of[id(self._weights.parameters[piece.parameter])]
            groups.setdefault(number, {"params": []})["params"].append(shadow)
        return sorted(groups.items())

    def _place(self) -> None:
        """Move state that has no place yet into the group's memory. Collective."""
        self._fused = None
        wanted: dict[Slot, Description] = {}
        for piece, shadow in self._pairs:
            for key, value in self._twin.state.get(shadow, {}).items():
                if key not in self._known[piece]:
                    wanted[piece.parameter, key] = _description(self._weights.views[piece.parameter], value)
        places = self.places.add(wanted)
        for piece, shadow in self._pairs:
            state = self._twin.state.get(shadow, {})
            for key, value in list(state.items()):
                if (piece.parameter, key) in places and key not in self._known[piece]:
                    place = _place_of(piece, places[piece.parameter, key], value)
                    if place is not value:
                        place.copy_(value)
                    state[key] = self._known[piece][key] = place
        self._group.exchange(b"")
        self._show(places)
        give_back()  # the tensors that the optimizer made

    def _show(self, places: Mapping[Slot, torch.Tensor]) -> None:
        """Let the user's optimizer show whole state tensors."""
        for (parameter, key), place in places.items():
            self._optimizer.state[self._weights.parameters[parameter]][key] = place

    def _part(self, piece: Piece, value: Any) -> torch.Tensor:
        whole = self._weights.views[piece.parameter]
        if not isinstance(value, torch.Tensor):
            return torch.tensor(float(value), dtype=torch.float32)
        value = value.detach()
        if value.dim() == 0 or (value.numel() == 1 and whole.numel() != 1):
            return value.reshape(()).clone()
        ordered = torch.empty_strided(whole.shape, whole.stride(), dtype=value.dtype, device=whole.device)
        ordered.copy_(value.reshape(whole.shape))
        return _flat(ordered, piece.start, piece.stop).clone()


def _suits(gradient: torch.Tensor | None, shadow: torch.Tensor) -> bool:
    return gradient is not None and gradient.dtype == shadow.dtype and gradient.dim() == shadow.dim()


def _without_hooks(step: Callable) -> Callable:
    """Return an optimizer's `step` without torch's wrapper, which profiles it and calls hooks, each time."""
    return step.__wrapped__ if getattr(step, "hooked", False) and hasattr(step, "__wrapped__") else step


def _flat(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return elements [start, stop) of a dense tensor in memory order."""
    return tensor.as_strided((stop - start,), (1,), tensor.storage_offset() + start)


def _description(whole: torch.Tensor, value: torch.Tensor) -> Description:
    if value.dim() == 0:
        return wire.name_of(value.dtype), (), ()
    return wire.name_of(value.dtype), tuple(whole.shape), tuple(whole.stride())


def _place_of(piece: Piece, place: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return this piece's part of a place. A number per parameter is kept by the owner of its first piece.

    The other pieces have it too, and advance it alike.
    """
    if value.dim() == 0:
        return place if piece.start == 0 else value
    return _flat(place, piece.start, piece.stop)


def _joined(whole: torch.Tensor, parts: dict[int, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    state = {}
    for key, first in parts[min(parts)].items():
        if first.dim() == 0:
            state[key] = first
            continue
        joined = torch.empty_strided(whole.shape, whole.stride(), dtype=first.dtype)
        _flat(joined, 0, whole.numel()).copy_(torch.cat([parts[start][key] for start in sorted(parts)]))
        state[key] = joined
    return state
