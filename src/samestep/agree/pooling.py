"""Where what a round's clients did comes together, and is read as the gradients of an outer optimizer.

    Tree      updates are multiplied by their share and added along the tree of replicas, as they come
    Rows      all updates are held, for a median or a trimmed mean of each element
    Words     updates are masked whole numbers, added modulo a power of two; the masks go from the sum alone
    Noisy     any of these, with noise for differential privacy

Owners of a part of the weights read that part alone. Memory: a tree takes log2(clients) updates per worker, rows one
update per client on each host, words one per worker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from samestep.agree.guest import Difference
from samestep.core.group import Group, align
from samestep.core.layout import Piece
from samestep.core.memory import check_fits
from samestep.core.model import Trained
from samestep.core.weights import sum_dtype
from samestep.federated.aggregation import Aggregation
from samestep.federated.cohort import Cohort
from samestep.federated.masking import MaskedRound, Masking
from samestep.federated.privacy import Privacy

_MOST_ELEMENTS = 1 << 21
"""Of a block of all clients' updates that is combined at once."""

Sums = Sequence[torch.Tensor | None]


class Pool(ABC):
    """One worker's side of where updates meet."""

    @abstractmethod
    def begin(self, cohort: Cohort) -> None:
        """Begin a round; what was given since the last one is void."""

    @abstractmethod
    def add(self, leaf: int, client: int, update: Difference, factor: float) -> None:
        """Take the update of a client.

        Args:
            leaf: its place in the tree.
            client: its id.
            update: what it did; may be changed.
            factor: multiply by this; 0 where the update may not be finite, and does not count.
        """

    @abstractmethod
    def meet(self) -> None:
        """Let owners see what all workers have. Collective, after they have met."""

    @abstractmethod
    def chunk(self, index: int, absent: Any, factor: float) -> Sums:
        """Return one flat update per piece of chunk `index` of those that this worker owns: see `core.update.Sums`."""


class Tree(Pool):
    """Updates are added along the tree."""

    def __init__(self, trained: Trained):
        self._trained = trained

    def begin(self, cohort: Cohort) -> None:
        self._cohort = cohort

    def add(self, leaf: int, client: int, update: Difference, factor: float) -> None:
        if not factor:
            return
        share = factor * self._cohort.share(client)
        for index, (flat, view) in enumerate(zip(update, self._trained.weights.views, strict=True)):
            if flat is not None:
                self._trained.gradients.give(index, flat.mul_(share).as_strided(view.shape, view.stride()))

    def meet(self) -> None:
        if self._trained.area is not None:
            self._trained.area.collect()

    def chunk(self, index: int, absent: Any, factor: float) -> Sums:
        return self._trained.sums.chunk(index, absent, factor)


class Rows(Pool):
    """Updates are held, one row each, for an aggregation that needs all of them.

    Where memory is not shared, every worker is sent all rows.
    """

    def __init__(self, trained: Trained, group: Group, num_leaves: int, aggregation: Aggregation):
        """Make room. Collective.

        Raises:
            SettingsError: it does not fit into memory.
        """
        self._trained = trained
        self._group = group
        self._aggregation = aggregation
        self._row_bytes = align(trained.weights.layout.sum_bytes)
        if group.worker.is_first and group.worker.device == "cpu":
            what = f"{aggregation!r}, which holds the updates of all {num_leaves} clients of a round,"
            check_fits(num_leaves * self._row_bytes, what)
        self._memory = group.allocate(num_leaves * self._row_bytes, "updates of clients")

    def begin(self, cohort: Cohort) -> None:
        self._cohort = cohort

    def add(self, leaf: int, client: int, update: Difference, factor: float) -> None:
        for index, flat in enumerate(update):
            place = self._place(leaf, index, 0, self._trained.weights.views[index].numel())
            if flat is None:
                place.zero_()
            else:
                place.copy_(flat)

    def meet(self) -> None:
        cohort = self._cohort
        # Too few clients are an error on every worker, whatever it owns.
        self._aggregation.combine(torch.zeros(len(cohort.delivering), 1), self._weights)
        size = self._row_bytes
        runs = [range(nodes[0][0] * size, nodes[-1][1] * size) if nodes else range(0) for nodes in self._trained.nodes]
        self._group.share(self._memory, runs)

    def chunk(self, index: int, absent: Any, factor: float) -> Sums:
        chunks = self._trained.weights.layout.chunks[self._group.worker.rank]
        return [self._combined(piece) for piece in chunks[index]]

    @property
    def _weights(self) -> list[float]:
        return [float(self._cohort.samples[client]) for client in self._cohort.delivering]

    def _combined(self, piece: Piece) -> torch.Tensor | None:
        if not self._trained.weights.parameters[piece.parameter].requires_grad:
            return None
        leaves = sorted(self._cohort.client_of)
        length = max(1, _MOST_ELEMENTS // len(leaves))
        parts = []
        for start in range(piece.start, piece.stop, length):
            stop = min(start + length, piece.stop)
            stack = torch.stack([self._place(leaf, piece.parameter, start, stop) for leaf in leaves])
            parts.append(self._aggregation.combine(stack, self._weights))
        return torch.cat(parts)

    def _place(self, leaf: int, index: int, start: int, stop: int) -> torch.Tensor:
        weights = self._trained.weights
        dtype = sum_dtype(weights.views[index].dtype)
        first = leaf * self._row_bytes + weights.layout.sum_offsets[index]
        return self._memory[first + start * dtype.itemsize : first + stop * dtype.itemsize].view(dtype)


class Words(Pool):
    """Updates are masked words; a worker adds those of its clients, and nobody sees those of one."""

    def __init__(self, trained: Trained, group: Group, masking: Masking):
        """Make room. Collective."""
        self._trained = trained
        self._group = group
        self._masking = masking
        self._dtype = masking.numbers.dtype
        self._starts = [0]
        for view in trained.weights.views:
            self._starts.append(self._starts[-1] + view.numel())
        size = group.worker.size
        self._row_bytes = align(self._starts[-1] * self._dtype.itemsize)
        self._memory = group.allocate(size * self._row_bytes, f"masked words of {size}")

    def begin(self, cohort: Cohort) -> None:
        self._cohort = cohort
        self._round: MaskedRound = self._masking.bind(cohort.drawn, cohort.seed, cohort.number)
        self._mine = torch.zeros(self._starts[-1], dtype=self._dtype)
        self._row(self._group.worker.rank).zero_()

    def add(self, leaf: int, client: int, update: Difference, factor: float) -> None:
        cohort, numbers = self._cohort, self._masking.numbers
        words = torch.zeros(self._starts[-1], dtype=self._dtype)
        factor *= cohort.scale(client)
        for index, flat in enumerate(update):
            # One that does not count sends masked zeros: masks of its neighbours wait for it.
            if flat is not None and factor:
                draws = (cohort.seed, cohort.number, client, index)
                words[self._starts[index] : self._starts[index + 1]] = numbers.encode(flat.mul_(factor), draws)
        self._round.mask(client, words)
        numbers.add(self._mine, words)
        # Others read it after they have met.
        self._row(self._group.worker.rank).copy_(self._mine)

    def meet(self) -> None:
        self._round.check(self._cohort.delivering)
        size, length = self._group.worker.size, self._row_bytes
        self._group.share(self._memory, [range(rank * length, (rank + 1) * length) for rank in range(size)])

    def chunk(self, index: int, absent: Any, factor: float) -> Sums:
        chunks = self._trained.weights.layout.chunks[self._group.worker.rank]
        return [self._unmasked(piece) for piece in chunks[index]]

    def _unmasked(self, piece: Piece) -> torch.Tensor | None:
        weights, numbers = self._trained.weights, self._masking.numbers
        if not weights.parameters[piece.parameter].requires_grad:
            return None
        first, end = (self._starts[piece.parameter] + at for at in (piece.start, piece.stop))
        total = torch.zeros(end - first, dtype=self._dtype)
        for rank in range(self._group.worker.size):
            numbers.add(total, self._row(rank)[first:end].cpu())
        self._round.unmask(total, self._cohort.delivering, first)
        mean = numbers.decode(total).div_(self._cohort.total)
        return mean.to(weights.memory.device, sum_dtype(weights.views[piece.parameter].dtype))

    def _row(self, rank: int) -> torch.Tensor:
        row = self._memory[rank * self._row_bytes : (rank + 1) * self._row_bytes]
        return row.view(self._dtype)[: self._starts[-1]]


class Noisy(Pool):
    """Another pool, with noise on what it gives; nothing arrived counts as zero."""

    def __init__(self, pool: Pool, trained: Trained, rank: int, privacy: Privacy):
        self._pool = pool
        self._trained = trained
        self._chunks = trained.weights.layout.chunks[rank]
        self._privacy = privacy

    def begin(self, cohort: Cohort) -> None:
        self._cohort = cohort
        self._pool.begin(cohort)

    def add(self, leaf: int, client: int, update: Difference, factor: float) -> None:
        self._pool.add(leaf, client, update, factor)

    def meet(self) -> None:
        self._pool.meet()

    def chunk(self, index: int, absent: Any, factor: float) -> Sums:
        cohort, weights = self._cohort, self._trained.weights
        noisy: list[torch.Tensor | None] = []
        for piece, flat in zip(self._chunks[index], self._pool.chunk(index, absent, factor), strict=True):
            parameter, view = weights.parameters[piece.parameter], weights.views[piece.parameter]
            if not parameter.requires_grad:
                noisy.append(None)
                continue
            if flat is None:
                length = piece.stop - piece.start
                out = torch.zeros(length, dtype=sum_dtype(view.dtype), device=weights.memory.device)
            else:
                # It may be a node of the tree, which is not to be written to.
                out = flat.clone()
            assert cohort.divisor is not None
            self._privacy.add_noise(
                out,
                divisor=cohort.divisor,
                seed=cohort.seed,
                round=cohort.number,
                parameter=piece.parameter,
                start=piece.start,
            )
            noisy.append(out)
        return noisy
