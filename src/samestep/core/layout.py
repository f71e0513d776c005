"""Where the parameters of one optimizer lie in memory, and which worker owns which part of them.

Parameters lie one after the other, each on a multiple of 64 bytes. Each worker owns one contiguous run of elements,
about equal in size. A run is cut into *pieces* (a whole tensor, or a block of one: what one optimizer call updates)
and pieces are gathered into *chunks* that stay in cache between the fold and the update. Pure arithmetic.

[Note: blocks and bits]
An element's new value must not depend on who owns it. PyTorch's CPU kernels treat the last few elements of a tensor
with scalar code, so pieces are cut at multiples of 1,024 elements, where no kernel has such a remainder. With more
than one thread, a kernel divides a tensor among its threads at places that depend on the length, so then the cuts
are the same for every number of workers: multiples of `PIECE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

ALIGNMENT = 64
GRANULE = 16_384
"""Elements. Runs start at a multiple of it within a tensor; norms are summed in blocks of it."""
PIECE = 262_144
"""Elements. The longest piece, and the most elements of a chunk: 1 MiB of float32, larger than the cost of a call."""


@dataclass(frozen=True)
class Shape:
    """What the layout needs to know of one parameter.

    Attributes:
        num_elements: its length.
        item_bytes: bytes of one element.
        sum_bytes: bytes of one element of its gradient sum (4 where the parameter is half precision).
        family: pieces of different families never share a chunk (one per dtype).
        divisible: whether its elements may have different owners.
    """

    num_elements: int
    item_bytes: int
    sum_bytes: int
    family: str = ""
    divisible: bool = True


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of parameter `parameter`."""

    parameter: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """The memory and the owners of one optimizer's parameters.

    Attributes:
        shapes: one per parameter.
        offsets: byte where each parameter starts in the weights' memory.
        num_bytes: length of the weights' memory.
        sum_offsets: byte where each parameter starts in a gradient buffer.
        sum_bytes: length of a gradient buffer.
        chunks: for each worker, its chunks: lists of pieces in memory order.
        runs: for each worker, the bytes of the weights' memory it owns.
        sum_runs: for each worker, the bytes of a gradient buffer it owns.
    """

    shapes: tuple[Shape, ...]
    offsets: tuple[int, ...]
    num_bytes: int
    sum_offsets: tuple[int, ...]
    sum_bytes: int
    chunks: tuple[tuple[tuple[Piece, ...], ...], ...]
    runs: tuple[range, ...]
    sum_runs: tuple[range, ...]


def lay_out(shapes: Sequence[Shape], num_workers: int, *, granule: int = GRANULE) -> Layout:
    """Lay out parameters and divide them among workers.

    Args:
        shapes: the parameters, in order.
        num_workers: how many workers share the update; the memory layout does not depend on it.
        granule: elements; a divisible tensor's owners change only at its multiples. See [Note: blocks and bits].
    """
    offsets, num_bytes = _place(shapes, [s.item_bytes for s in shapes])
    sum_offsets, sum_bytes = _place(shapes, [s.sum_bytes for s in shapes])
    bounds = [_bound(shapes, num_workers, w, granule) for w in range(num_workers + 1)]
    pairs = list(pairwise(bounds))
    return Layout(
        shapes=tuple(shapes),
        offsets=tuple(offsets),
        num_bytes=num_bytes,
        sum_offsets=tuple(sum_offsets),
        sum_bytes=sum_bytes,
        chunks=tuple(tuple(_chunks(shapes, _pieces(shapes, a, b))) for a, b in pairs),
        runs=tuple(
            range(_byte(a, offsets, num_bytes, 0, shapes), _byte(b, offsets, num_bytes, 0, shapes)) for a, b in pairs
        ),
        sum_runs=tuple(
            range(_byte(a, sum_offsets, sum_bytes, 1, shapes), _byte(b, sum_offsets, sum_bytes, 1, shapes))
            for a, b in pairs
        ),
    )


Bound = tuple[int, int]
"""A place between two elements: (parameter, element)."""


def _place(shapes: Sequence[Shape], item_bytes: Sequence[int]) -> tuple[list[int], int]:
    offsets, end = [], 0
    for shape, size in zip(shapes, item_bytes, strict=True):
        offsets.append(end)
        end += -(-shape.num_elements * size // ALIGNMENT) * ALIGNMENT
    return offsets, end


def _bound(shapes: Sequence[Shape], num_workers: int, worker: int, granule: int) -> Bound:
    """Return where the run of `worker` starts: near its even share, at a place where owners may change."""
    total = sum(s.num_elements for s in shapes)
    target, before = total * worker // num_workers, 0
    if worker == num_workers:
        return len(shapes), 0
    for index, shape in enumerate(shapes):
        if target < before + shape.num_elements:
            inside = target - before
            step = granule if shape.divisible else shape.num_elements
            element = (inside + step // 2) // step * step
            return (index + 1, 0) if element >= shape.num_elements else (index, element)
        before += shape.num_elements
    return len(shapes), 0


def _byte(bound: Bound, offsets: Sequence[int], end: int, kind: int, shapes: Sequence[Shape]) -> int:
    index, element = bound
    if index == len(shapes):
        return end
    return offsets[index] + element * (shapes[index].sum_bytes if kind else shapes[index].item_bytes)


def _pieces(shapes: Sequence[Shape], begin: Bound, end: Bound) -> list[Piece]:
    pieces = []
    for index in range(begin[0], min(end[0] + 1, len(shapes))):
        start = begin[1] if index == begin[0] else 0
        stop = end[1] if index == end[0] else shapes[index].num_elements
        while start < stop:
            cut = min(stop, (start // PIECE + 1) * PIECE) if shapes[index].divisible else stop
            pieces.append(Piece(index, start, cut))
            start = cut
    return pieces


def _chunks(shapes: Sequence[Shape], pieces: Sequence[Piece]) -> list[tuple[Piece, ...]]:
    chunks: list[tuple[Piece, ...]] = []
    chunk: list[Piece] = []
    size = 0
    for piece in pieces:
        length = piece.stop - piece.start
        family = shapes[piece.parameter].family
        if chunk and (size + length > PIECE or family != shapes[chunk[0].parameter].family):
            chunks.append(tuple(chunk))
            chunk, size = [], 0
        chunk.append(piece)
        size += length
    return [*chunks, tuple(chunk)] if chunk else chunks
