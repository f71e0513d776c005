"""The parameters of one optimizer, moved into the group's memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from samestep.core.group import Group
from samestep.core.layout import Layout, Piece, Shape
from samestep.errors import UsageError

_HALF = (torch.float16, torch.bfloat16)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which gradients of parameters of `dtype` are added: halves are added in float32."""
    return torch.float32 if dtype in _HALF else dtype


def shape_of(parameter: torch.Tensor, divisible: bool) -> Shape:
    """Return what the layout needs to know of `parameter`."""
    return Shape(
        num_elements=parameter.numel(),
        item_bytes=parameter.element_size(),
        sum_bytes=sum_dtype(parameter.dtype).itemsize,
        family=str(parameter.dtype),
        divisible=divisible,
    )


def placed(memory: torch.Tensor, offset: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a tensor of the shape and memory order of `like` that lies in `memory`.

    Args:
        memory: uint8.
        offset: bytes, a multiple of 64.
        like: its shape and, where it is dense, its strides are kept; otherwise the result is row-major.
        dtype: of the result; that of `like` by default.
    """
    dtype = dtype if dtype is not None else like.dtype
    flat = memory[offset : offset + like.numel() * dtype.itemsize].view(dtype)
    if is_dense(like):
        return flat.as_strided(like.shape, like.stride())
    return flat.view(like.shape)


def is_dense(tensor: torch.Tensor) -> bool:
    """Return whether the elements of `tensor` fill one stretch of memory, each once, in some order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


class Weights:
    """Parameters in the group's memory: one copy for all workers where they share memory.

    Attributes:
        names: one per parameter, for messages.
        parameters: the user's parameters; their `data` lies in `memory`.
        layout: where each lies and who owns what.
        rank: which of the owners this worker is.
        memory: uint8.
    """

    def __init__(
        self,
        group: Group,
        names: Sequence[str],
        parameters: Sequence[torch.nn.Parameter],
        layout: Layout,
        memory_name: str = "",
    ):
        """Move `parameters` into memory of `group`. Collective; values are those of the first worker."""
        self.names = list(names)
        self.parameters = list(parameters)
        self.layout = layout
        self.rank = group.worker.rank
        self._memory_name = memory_name
        self.memory = group.allocate(layout.num_bytes, memory_name)
        self.views: list[torch.Tensor] = []
        self._move(writes=group.worker.is_first or not group.shares_memory)
        group.exchange(b"")

    def reseat(self, group: Group, layout: Layout) -> None:
        """Divide the same memory among the workers that `group` has now; one that joins takes over what it holds."""
        self.layout = layout
        self.rank = group.worker.rank
        memory = group.allocate(layout.num_bytes, self._memory_name)
        if memory.data_ptr() != self.memory.data_ptr():
            self.memory = memory
            self._move(writes=False)

    def _move(self, writes: bool) -> None:
        """Point the parameters into the memory, where their values are written first if `writes`."""
        self.views.clear()
        for parameter, offset in zip(self.parameters, self.layout.offsets, strict=True):
            view = placed(self.memory, offset, parameter.data)
            if writes:
                view.copy_(parameter.data)
            parameter.data = view
            # A second handle on the same memory: the parameter's own version counter stays the user's alone.
            self.views.append(view.detach())

    def flat(self, piece: Piece) -> torch.Tensor:
        """Return the elements of `piece` in memory order, one-dimensional, sharing memory."""
        shape = self.layout.shapes[piece.parameter]
        start = self.layout.offsets[piece.parameter] + piece.start * shape.item_bytes
        stop = start + (piece.stop - piece.start) * shape.item_bytes
        return self.memory[start:stop].view(self.parameters[piece.parameter].dtype)

    def share(self, group: Group) -> None:
        """Make what the owners wrote visible to every worker."""
        group.share(self.memory, self.layout.runs)


def check_separate(names: Sequence[str], parameters: Sequence[torch.Tensor]) -> None:
    """Refuse parameters that share memory without being the same parameter.

    Raises:
        UsageError: two of them overlap; once moved, they would silently go separate ways.
    """
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name)
        for name, p in zip(names, parameters, strict=True)
        if p.numel() and p.device.type != "meta"
    )
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end:
            raise UsageError(
                f"Parameters {first!r} and {second!r} share memory but are two Parameter objects. "
                f"Tie them by using one object in both places (b.weight = a.weight)."
            )
