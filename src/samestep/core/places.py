"""Places for optimizer state in the group's memory, so that every worker of a host sees all of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from samestep.core.group import Group, align
from samestep.storage import wire

Slot = tuple[int, str]
"""A state tensor: (parameter, key)."""

Description = tuple[str, tuple[int, ...], tuple[int, ...]]
"""What a state tensor looks like: dtype, shape, strides."""


def describe(tensor: torch.Tensor) -> Description:
    """Return what is needed to make a place for `tensor`."""
    return wire.name_of(tensor.dtype), tuple(tensor.shape), tuple(tensor.stride())


class Places:
    """The optimizer state that lies in the group's memory, made in batches as the optimizer makes its state.

    Attributes:
        found: the tensor of each slot.
    """

    def __init__(self, group: Group, name: str):
        """Begin with none; `name` tells the memories of one optimizer from those of others."""
        self._group = group
        self._name = name
        self._batches: list[tuple[int, dict[Slot, Description]]] = []
        self._num_made = 0
        self.found: dict[Slot, torch.Tensor] = {}

    def clear(self) -> None:
        """Forget them all. Their memory stays: the user may hold the tensors."""
        self._batches.clear()
        self.found = {}

    def add(self, wanted: Mapping[Slot, Description]) -> dict[Slot, torch.Tensor]:
        """Make a zero tensor for each slot that any worker wants, and return these. Collective."""
        union: dict[Slot, Description] = {}
        for message in self._group.exchange(wire.pack(dict(wanted))):
            union.update(wire.unpack(message))
        self._num_made += 1
        self._batches.append((self._num_made, {slot: union[slot] for slot in sorted(union)}))
        return self._open(*self._batches[-1])

    def reseat(self) -> None:
        """Let workers that have joined the group find all of them. Collective."""
        told = wire.pack([self._num_made, [[number, slots] for number, slots in self._batches]])
        self._num_made, batches = wire.unpack(self._group.exchange(told)[0])
        if [number for number, _ in batches] == [number for number, _ in self._batches]:
            return
        self.clear()
        for number, slots in batches:
            self._batches.append((number, slots))
            self._open(number, slots)

    def _open(self, number: int, slots: Mapping[Slot, Description]) -> dict[Slot, torch.Tensor]:
        places = _make(self._group, slots, f"{self._name} {number}")
        self.found.update(places)
        return places


def _make(group: Group, slots: Mapping[Slot, Description], name: str) -> dict[Slot, torch.Tensor]:
    """Return a tensor in the group's memory for each slot, each on 64 bytes. Collective."""
    offsets, end = {}, 0
    for slot, (dtype, shape, _) in slots.items():
        offsets[slot] = end
        end += align(_num_bytes(dtype, shape))
    memory = group.allocate(end, name)
    places = {}
    for slot, (dtype, shape, stride) in slots.items():
        flat = memory[offsets[slot] : offsets[slot] + _num_bytes(dtype, shape)].view(wire.dtype_named(dtype))
        places[slot] = flat.as_strided(shape, stride)
    return places


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    num_bytes = wire.dtype_named(dtype).itemsize
    for size in shape:
        num_bytes *= size
    return num_bytes
