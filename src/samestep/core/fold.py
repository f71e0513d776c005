"""Owners add the workers' nodes along the rest of the tree, a cache-sized chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch

from samestep.core.group import GradientArea, aligned_zeros
from samestep.core.layout import Piece
from samestep.core.tree import Expression, without
from samestep.core.weights import Weights, sum_dtype

Absent = Mapping[int, tuple[int, ...]]
"""For parameters that some nodes hold no sum of: those nodes."""


class Fold:
    """The gradient sums of the pieces that this worker owns.

    `chunk(i)` adds the nodes of the i-th chunk in scratch memory that the next chunk overwrites.

    Attributes:
        pieces: for each chunk, the tensors that `chunk` returns where every node is present.
    """

    def __init__(self, weights: Weights, rank: int, area: GradientArea, order: Expression):
        layout = weights.layout
        self._order = order
        self._cached_without = lru_cache(maxsize=64)(lambda absent: without(order, set(absent)))
        self._chunks = layout.chunks[rank]
        self._parameters = [[piece.parameter for piece in chunk] for chunk in self._chunks]
        self._nodes = [node for worker in area.nodes for node in worker]
        self._first_byte = layout.sum_runs[rank].start
        self._layout = layout
        self._dtypes = [sum_dtype(p.dtype) for p in weights.parameters]
        spans = [self._span(chunk) for chunk in self._chunks]
        longest = max((len(span) for span in spans), default=0)
        device = str(weights.memory.device)
        self._scratch = [aligned_zeros(longest, device) for _ in range(_depth(order))]
        self._programs: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = []
        self.pieces: list[list[torch.Tensor | None]] = []
        for chunk, span in zip(self._chunks, spans, strict=True):
            dtype = self._dtypes[chunk[0].parameter]
            sources = [node[span.start : span.stop].view(dtype) for node in self._nodes]
            scratch = [memory[: len(span)].view(dtype) for memory in self._scratch]
            program: list[tuple] = []
            result = _compile(order, sources, scratch, program)
            self._programs.append(program)
            self.pieces.append([self._within(result, span.start, piece) for piece in chunk])

    def chunk(self, index: int, absent: Absent, factor: float) -> list[torch.Tensor | None]:
        """Add the nodes of chunk `index` and scale by `factor`.

        Returns:
            One flat tensor per piece, None where no replica used the parameter. It may be a node itself: not to be
            written to.
        """
        if absent and not absent.keys().isdisjoint(self._parameters[index]):
            return [_scaled(self._piece(piece, absent, index), factor) for piece in self._chunks[index]]
        program = self._programs[index]
        for left, right, out in program:
            torch.add(left, right, out=out)
        if factor == 1.0:
            return self.pieces[index]
        if not program:
            return [_scaled(piece, factor) for piece in self.pieces[index]]
        program[-1][2].mul_(factor)
        return self.pieces[index]

    def _piece(self, piece: Piece, absent: Absent, index: int) -> torch.Tensor | None:
        order = self._cached_without(absent.get(piece.parameter, ()))
        if order is None:
            return None
        sources = [self._slice(node, piece) for node in self._nodes]
        start = self._span(self._chunks[index]).start
        scratch = [self._within(memory.view(self._dtypes[piece.parameter]), start, piece) for memory in self._scratch]
        program: list[tuple] = []
        result = _compile(order, sources, scratch, program)
        for left, right, out in program:
            torch.add(left, right, out=out)
        return result

    def _span(self, chunk: Sequence[Piece]) -> range:
        """Return the bytes of `chunk` within this worker's run, a whole number of elements."""
        return range(self._start(chunk[0]), self._start(chunk[-1]) + self._length(chunk[-1]))

    def _start(self, piece: Piece) -> int:
        shape = self._layout.shapes[piece.parameter]
        return self._layout.sum_offsets[piece.parameter] + piece.start * shape.sum_bytes - self._first_byte

    def _length(self, piece: Piece) -> int:
        return (piece.stop - piece.start) * self._layout.shapes[piece.parameter].sum_bytes

    def _slice(self, node: torch.Tensor, piece: Piece) -> torch.Tensor:
        start = self._start(piece)
        return node[start : start + self._length(piece)].view(self._dtypes[piece.parameter])

    def _within(self, chunk: torch.Tensor, chunk_start: int, piece: Piece) -> torch.Tensor:
        """Return the part of a chunk-long tensor that belongs to `piece`."""
        first = (self._start(piece) - chunk_start) // chunk.element_size()
        return chunk[first : first + piece.stop - piece.start]


class HeldFold:
    """The gradient sums of a lone worker: one node, held in autograd's own tensors."""

    def __init__(self, chunks: Sequence[Sequence[Piece]], held: Callable[[], Sequence[torch.Tensor | None]]):
        self._chunks = chunks
        self._held = held

    def chunk(self, index: int, absent: Absent, factor: float) -> list[torch.Tensor | None]:
        """Return one flat sum per piece of chunk `index`, scaled, None where no replica used the parameter."""
        sums = []
        held = self._held()
        for piece in self._chunks[index]:
            whole = held[piece.parameter]
            if whole is not None:
                length = piece.stop - piece.start
                if length == whole.numel() and whole.is_contiguous():
                    whole = whole.view(-1)
                else:
                    whole = whole.as_strided((length,), (1,), whole.storage_offset() + piece.start)
            sums.append(whole if factor == 1.0 else _scaled(whole, factor))
        return sums


def _scaled(tensor: torch.Tensor | None, factor: float) -> torch.Tensor | None:
    return tensor if tensor is None or factor == 1.0 else tensor * factor


def _depth(order: Expression) -> int:
    """Return how many scratch buffers the sum needs."""
    if isinstance(order, int):
        return 0
    left, right = order
    return max(1, _depth(left), _depth(right) + (0 if isinstance(left, int) else 1))


def _compile(order: Expression, sources: list, scratch: list, program: list, level: int = 0) -> torch.Tensor:
    """Append the additions that make the sum as (left, right, out); return the tensor that holds it afterwards."""
    if isinstance(order, int):
        return sources[order]
    left = _compile(order[0], sources, scratch, program, level)
    right_level = level if isinstance(order[0], int) else level + 1
    right = _compile(order[1], sources, scratch, program, right_level)
    program.append((left, right, scratch[level]))
    return scratch[level]
