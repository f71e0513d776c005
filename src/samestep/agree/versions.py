"""The newest versions of weights and buffers, and the buffers of shards that are under way.

Version v is what v updates have made. A shard of update n is played on a version from n - bound to n; it lies there,
unchanged, until update v + bound is committed, which needs that shard. So shards are played on the very memory that
updates write to: no copy is made for them, and nobody writes where somebody reads.

    versions     bound + 1 copies of weights and buffers          version modulo bound + 1

They lie in memory that all workers share, or, between hosts, in that of each.
"""

from __future__ import annotations

import torch

from samestep.agree.shelf import Shelf
from samestep.core.buffers import Buffers
from samestep.core.group import Group, align
from samestep.core.memory import check_fits
from samestep.core.model import Model
from samestep.core.weights import placed


class Versions:
    """The memory of updates that are under way, as one worker sees it.

    Attributes:
        memory: all versions, uint8.
        num_bytes: what all of it takes with the gradients, of all workers together where they share memory, else of
            this one.
        writes: whether this worker writes what is to be the same for all: the first, or each where memory is its own.
    """

    def __init__(self, model: Model, group: Group, beside: Group, bound: int, shelf: Shelf):
        """Make room, and let every version be the weights and buffers as they are. Collective.

        Args:
            model: what is trained, by one optimizer.
            group: the workers.
            beside: by which those who make updates reach each other; `group` where memory is shared.
            bound: how many updates may be under way.
            shelf: where their gradients are.

        Raises:
            SettingsError: there is too little memory.
        """
        self._model = model
        self._group = group
        self._beside = beside
        self._shelf = shelf
        self._trained = model.trained[0]
        self._num_kept = bound + 1
        layout, self._buffer_bytes = self._trained.weights.layout, align(model.buffers.num_bytes)
        self._stride = layout.num_bytes + self._buffer_bytes
        self._num_ends = self._num_kept * model.division.num_replicas
        self.num_bytes = self._num_kept * self._stride + self._num_ends * self._buffer_bytes + shelf.num_bytes
        self.writes = group.worker.is_first or not group.shares_memory
        if self.writes:
            check_fits(self.num_bytes, f"Stale(bound={bound}) with {model.division.num_replicas} replicas")
        self.open()
        if self.writes:
            self.keep_all(model.buffers)
        group.exchange(b"")

    def open(self) -> None:
        """Find the memory, in the group as it is now. Collective."""
        trained, weights = self._trained, self._trained.weights
        layout, buffer_bytes = weights.layout, self._buffer_bytes
        self.memory = self._group.allocate(self._num_kept * self._stride, "stale versions")
        starts = [number * self._stride for number in range(self._num_kept)]
        self._views = [
            [placed(self.memory, start + offset, v) for v, offset in zip(weights.views, layout.offsets, strict=True)]
            for start in starts
        ]
        self._buffers = [self.memory[s + layout.num_bytes :][: self._model.buffers.num_bytes] for s in starts]
        if buffer_bytes:
            self._met = self._group.allocate(self._num_ends * buffer_bytes, "stale buffers")
        self._shelf.open()
        trained.area_bytes = self.num_bytes

    def enter(self, version: int) -> None:
        """Let the user's parameters and buffers be those of a version."""
        self.point(version)
        if self._buffer_bytes:
            self._model.buffers.restore(self._buffers[version % self._num_kept])

    def point(self, version: int) -> None:
        """Let the user's parameters be those of a version."""
        views = self._views[version % self._num_kept]
        for parameter, view in zip(self._trained.weights.parameters, views, strict=True):
            parameter.data = view

    def enter_newest(self, version: int) -> None:
        """Let the user's parameters lie where the newest are made, and buffers be those of the newest, `version`."""
        self.enter(version)
        for parameter, view in zip(self._trained.weights.parameters, self._trained.weights.views, strict=True):
            parameter.data = view

    def buffers_differ(self, version: int) -> bool:
        """Return whether the user's buffers are not those of a version."""
        if not self._buffer_bytes:
            return False
        return not torch.equal(self._model.buffers.now, self._buffers[version % self._num_kept])

    def publish(self, number: int, replica: int) -> None:
        """Keep the buffers as a replica's shard in update `number` has left them."""
        if self._buffer_bytes:
            self._end(number, replica).copy_(self._model.buffers.now)

    def keep(self, version: int, buffers: torch.Tensor | None) -> None:
        """Keep the newest weights, and these buffers, as a version."""
        start = version % self._num_kept * self._stride
        weights = self._trained.weights.memory
        self.memory[start : start + weights.numel()].copy_(weights)
        if buffers is not None:
            self._buffers[version % self._num_kept].copy_(buffers)

    def keep_all(self, buffers: Buffers) -> None:
        """Let every version be the newest weights, and these buffers."""
        for version in range(self._num_kept):
            self.keep(version, buffers.now if self._buffer_bytes else None)

    def merged(self, number: int, samples: dict[int, int] | None) -> torch.Tensor | None:
        """Return the buffers after update `number`; None if there are none at all. Collective between hosts.

        Args:
            number: the update.
            samples: of each replica that had any; None: the update is skipped.
        """
        if not self._buffer_bytes:
            return None
        before = self._buffers[number % self._num_kept]
        if not samples:
            return before
        self._gather(number)
        total = sum(samples.values())
        ends = [self._end(number, replica) for replica in sorted(samples)]
        merged = torch.empty_like(before)
        self._model.buffers.join(ends, [samples[r] / total for r in sorted(samples)], merged)
        return merged

    def _gather(self, number: int) -> None:
        """Let this worker see the buffers that the replicas' shards in update `number` have left. Collective."""
        num_bytes, division = self._buffer_bytes, self._model.division
        first = number % self._num_kept * division.num_replicas
        runs = [range(run.start * num_bytes, run.stop * num_bytes) for run in division.runs]
        self._beside.share(self._met[first * num_bytes :], runs)

    def _end(self, number: int, replica: int) -> torch.Tensor:
        """Return where the buffers are kept as a replica's shard in update `number` has left them."""
        index = number % self._num_kept * self._model.division.num_replicas + replica
        return self._met[index * self._buffer_bytes :][: self._model.buffers.num_bytes]
