"""Values with tensors, sent between a worker and its loader processes.

The tensors lie in one anonymous memory whose descriptor travels over the connection; the receiver maps it. So bulk
data is written once and never passes through a pipe, a message is small whatever it carries, and no memory ever has
a name: whoever is killed, nothing stays behind, and the size of /dev/shm is no limit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import torch

from samestep.data.tensors import ALIGNMENT, aligned, is_dense, map_leaves


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies in the memory that travels beside the message."""

    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: Sequence[int]
    stride: Sequence[int]
    requires_grad: bool


def send(connection: Connection, value: Any) -> None:
    """Send a value. Either all of it goes out or an exception comes before any byte.

    Args:
        connection: one end of a `multiprocessing.Pipe`.
        value: anything that multiprocessing can send. Plain CPU tensors in mappings, sequences and dataclasses
            travel in shared memory.

    Raises:
        OSError: no memory, or the other end is gone.
        Exception: whatever an object raises that cannot be sent.
    """
    places: list[_Place] = []
    tensors: list[torch.Tensor] = []

    def place(tensor: torch.Tensor) -> Any:
        if type(tensor) is not torch.Tensor or not is_dense(tensor) or tensor.is_quantized or tensor.numel() == 0:
            return tensor
        tensors.append(aligned(tensor.detach().resolve_conj().resolve_neg()))
        places.append(_place_after(places, tensors[-1], tensor.requires_grad))
        return places[-1]

    message = map_leaves(value, torch.Tensor, place)
    if not places:
        connection.send((message, 0))
        return
    descriptor = os.memfd_create("samestep-parcel", os.MFD_CLOEXEC)
    try:
        # Written, not mapped: the kernel fills pages twice as fast as page faults would.
        for where, tensor in zip(places, tensors, strict=True):
            _write(descriptor, where.offset, tensor)
        connection.send((message, places[-1].offset + places[-1].num_bytes))
        send_handle(connection, descriptor, None)
    finally:
        os.close(descriptor)


def receive(connection: Connection) -> Any:
    """Return the next value that the other end sent. Each tensor starts on 64 bytes.

    Raises:
        EOFError, OSError: the other end is gone.
        Exception: whatever an object raises that cannot be rebuilt.
    """
    message, num_bytes = connection.recv()
    if num_bytes == 0:
        return message
    descriptor = recv_handle(connection)
    try:
        memory = torch.from_file(f"/proc/self/fd/{descriptor}", shared=True, size=num_bytes, dtype=torch.uint8).numpy()
    finally:
        os.close(descriptor)

    def tensor_at(where: _Place) -> torch.Tensor:
        num_items = where.num_bytes // where.dtype.itemsize
        flat = torch.frombuffer(memory, dtype=where.dtype, count=num_items, offset=where.offset)
        return flat.as_strided(where.shape, where.stride).requires_grad_(where.requires_grad)

    return map_leaves(message, _Place, tensor_at)


def _place_after(places: list[_Place], tensor: torch.Tensor, requires_grad: bool) -> _Place:
    end = places[-1].offset + places[-1].num_bytes if places else 0
    return _Place(
        offset=end + -end % ALIGNMENT,
        num_bytes=tensor.untyped_storage().nbytes(),
        dtype=tensor.dtype,
        shape=tuple(tensor.shape),
        stride=tensor.stride(),
        requires_grad=requires_grad,
    )


def _write(descriptor: int, offset: int, tensor: torch.Tensor) -> None:
    rest = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().data
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written
