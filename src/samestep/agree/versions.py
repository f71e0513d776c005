"""The newest versions of weights and buffers, and the gradients of shards that are under way, in shared memory.

Version v is what v updates have made. A shard of update n is played on a version from n - bound to n; it lies there,
unchanged, until update v + bound is committed, which needs that shard. So shards are played on the very memory that all
workers see: no copy is made for them, and nobody writes where somebody reads. A gradient has its place until its update
is committed.

    versions     bound + 1 copies of weights and buffers          version modulo bound + 1
    gradients    (bound + 1) * replicas gradient buffers          likewise
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from samestep.core import tree
from samestep.core.buffers import Buffers
from samestep.core.fold import Fold
from samestep.core.gradients import Gradients
from samestep.core.group import GradientArea, Group, align
from samestep.core.memory import check_fits
from samestep.core.model import Model
from samestep.core.tree import Leaf, Script
from samestep.core.weights import placed


class _Places(GradientArea):
    """Gradient buffers that everybody sees: all as nodes, or those of one update."""

    def __init__(self, mine: Sequence[torch.Tensor]):
        self.mine = list(mine)
        self.nodes = [[buffer] for buffer in self.mine]

    def collect(self) -> None:
        pass


class Versions:
    """The memory of updates that are under way, as one worker sees it.

    Attributes:
        memory: all versions, uint8.
        num_bytes: what all of it takes, of all workers together.
    """

    def __init__(self, model: Model, group: Group, bound: int):
        """Make room, and let every version be the weights and buffers as they are. Collective.

        Raises:
            SettingsError: there is too little memory.
        """
        self._model = model
        self._group = group
        self._trained = model.trained[0]
        self._num_kept = bound + 1
        self._many = self._trained.gradients.is_many
        layout, self._buffer_bytes = self._trained.weights.layout, align(model.buffers.num_bytes)
        self._stride = layout.num_bytes + self._buffer_bytes
        self._num_leaves = self._num_kept * model.division.num_replicas
        self.num_bytes = self._num_kept * self._stride + self._num_leaves * (layout.sum_bytes + self._buffer_bytes)
        if group.worker.is_first:
            check_fits(self.num_bytes, f"Stale(bound={bound}) with {model.division.num_replicas} replicas")
        self.open()
        if group.worker.is_first:
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
        shelf = self._group.allocate(self._num_leaves * layout.sum_bytes, "stale gradients")
        sums = [shelf[i * layout.sum_bytes :][: layout.sum_bytes] for i in range(self._num_leaves)]
        ends = self._group.allocate(self._num_leaves * buffer_bytes, "stale buffers") if buffer_bytes else shelf
        self._ends = [ends[i * buffer_bytes :][: self._model.buffers.num_bytes] for i in range(self._num_leaves)]
        trained.gradients.close()
        leaves = tuple(Leaf(i, ()) for i in range(self._num_leaves))
        script = Script(leaves, (), tuple(range(self._num_leaves)), self._num_leaves)
        trained.gradients = Gradients(weights, script, _Places(sums), self._many)
        trained.area_bytes = self.num_bytes
        num_replicas = self._model.division.num_replicas
        order = tree.fold_order([range(r, r + 1) for r in range(num_replicas)], num_replicas)
        self._folds = []
        for number in range(self._num_kept):
            mine = _Places(sums[number * num_replicas : (number + 1) * num_replicas])
            self._folds.append(Fold(weights, self._group.worker.rank, mine, order))

    def leaf(self, number: int, replica: int) -> int:
        """Return where the gradient of a replica in update `number` is kept."""
        return number % self._num_kept * self._model.division.num_replicas + replica

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
            self._ends[self.leaf(number, replica)].copy_(self._model.buffers.now)

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

    def fold(self, number: int) -> Fold:
        """Return the sum of the gradients of update `number`."""
        return self._folds[number % self._num_kept]

    def merged(self, number: int, samples: dict[int, int] | None) -> torch.Tensor | None:
        """Return the buffers after update `number`; None if there are none at all.

        Args:
            number: the update.
            samples: of each replica that had any; None: the update is skipped.
        """
        if not self._buffer_bytes:
            return None
        before = self._buffers[number % self._num_kept]
        if not samples:
            return before
        total = sum(samples.values())
        ends = [self._ends[self.leaf(number, replica)] for replica in sorted(samples)]
        merged = torch.empty_like(before)
        self._model.buffers.join(ends, [samples[r] / total for r in sorted(samples)], merged)
        return merged
