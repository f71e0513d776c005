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


def agree_on(group: Group, wanted: Mapping[Slot, Description]) -> dict[Slot, Description]:
    """Return the slots that any worker wants, in one order on every worker. Collective."""
    union: dict[Slot, Description] = {}
    for message in group.exchange(wire.pack(dict(wanted))):
        union.update(wire.unpack(message))
    return {slot: union[slot] for slot in sorted(union)}


def make_places(group: Group, slots: Mapping[Slot, Description]) -> dict[Slot, torch.Tensor]:
    """Return a zero tensor in the group's memory for each slot, each on 64 bytes. Collective."""
    offsets, end = {}, 0
    for slot, (dtype, shape, _) in slots.items():
        offsets[slot] = end
        end += align(_num_bytes(dtype, shape))
    memory = group.allocate(end)
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
