"""The gradients of updates that are under way: each has its place until its update is made.

on one host     every replica's, in shared memory        (bound + 1) * replicas buffers
between hosts   the nodes of the tree that this worker folds, and what owners are sent of all others
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from samestep.core import tree
from samestep.core.fold import Fold
from samestep.core.gradients import Gradients
from samestep.core.group import GradientArea, Group
from samestep.core.model import Model
from samestep.core.tree import Leaf, Script


class _Places(GradientArea):
    """Gradient buffers that everybody sees: all as nodes, or those of one update."""

    def __init__(self, mine: Sequence):
        self.mine = list(mine)
        self.nodes = [[buffer] for buffer in self.mine]

    def collect(self) -> None:
        pass


class Shelf(ABC):
    """Where one worker folds the gradients of the updates that it has come to, and finds the sums of each.

    Attributes:
        num_bytes: what it takes, of all workers together where they share memory, else of this one.
        num_sums: how many sums an update adds.
    """

    num_bytes: int
    num_sums: int

    def __init__(self, model: Model, group: Group, bound: int):
        """Find out how much room it takes; none is made yet.

        Args:
            model: what is trained, by one optimizer.
            group: the workers.
            bound: how many updates are under way while gradients of one more are made.
        """
        self._model = model
        self._group = group
        self._trained = model.trained[0]
        self._num_kept = bound + 1
        self._many = self._trained.gradients.is_many
        self._folds: list[Fold] = []

    @abstractmethod
    def open(self) -> None:
        """Find the memory, in the group as it is now, and let gradients be folded there. Collective."""

    @abstractmethod
    def leaf(self, number: int, replica: int) -> int:
        """Return which leaf of `Gradients` a replica that is played here is in update `number`."""

    @abstractmethod
    def replica(self, leaf: int) -> int:
        """Return the replica that a leaf is."""

    @abstractmethod
    def missing(self, number: int, replicas: Iterable[int]) -> list[tuple[int, str]]:
        """Return the parameters that the sums lack which this worker has folded for update `number`.

        Args:
            number: the update.
            replicas: that this worker has played.

        Returns:
            (number of the sum, its parameters as the bits of a hexadecimal number).
        """

    def fold(self, number: int) -> Fold:
        """Return the sum of the gradients of update `number`, which all workers have told of. Collective."""
        return self._folds[number % self._num_kept]

    def _lacking(self, buffer: int) -> str:
        return f"{sum(1 << parameter for parameter in self._trained.gradients.missing(buffer)):x}"


class SharedShelf(Shelf):
    """Every replica's gradients, where every worker finds them."""

    def __init__(self, model: Model, group: Group, bound: int):
        super().__init__(model, group, bound)
        self.num_sums = model.division.num_replicas
        self._num_leaves = self._num_kept * self.num_sums
        self.num_bytes = self._num_leaves * self._trained.weights.layout.sum_bytes

    def open(self) -> None:
        trained, num_bytes = self._trained, self._trained.weights.layout.sum_bytes
        memory = self._group.allocate(self.num_bytes, "stale gradients")
        sums = [memory[i * num_bytes :][:num_bytes] for i in range(self._num_leaves)]
        trained.gradients.close()
        leaves = tuple(Leaf(i, ()) for i in range(self._num_leaves))
        script = Script(leaves, (), tuple(range(self._num_leaves)), self._num_leaves)
        trained.gradients = Gradients(trained.weights, script, _Places(sums), self._many)
        order = tree.fold_order([range(r, r + 1) for r in range(self.num_sums)], self.num_sums)
        self._folds.clear()
        for number in range(self._num_kept):
            mine = _Places(sums[number * self.num_sums : (number + 1) * self.num_sums])
            self._folds.append(Fold(trained.weights, self._group.worker.rank, mine, order))

    def leaf(self, number: int, replica: int) -> int:
        return number % self._num_kept * self.num_sums + replica

    def replica(self, leaf: int) -> int:
        return leaf % self.num_sums

    def missing(self, number: int, replicas: Iterable[int]) -> list[tuple[int, str]]:
        return [(replica, self._lacking(self.leaf(number, replica))) for replica in replicas]


class SentShelf(Shelf):
    """The nodes that this worker folds, for each update under way; each is sent to the owners when it is made."""

    def __init__(self, model: Model, group: Group, bound: int):
        """See `Shelf`; `group` is the one by which they are sent, beside the script's."""
        super().__init__(model, group, bound)
        rank, runs = group.worker.rank, model.division.runs
        self._replicas = runs[rank]
        scripts = [tree.script_of(run, model.division.num_replicas) for run in runs]
        self._script, self._num_nodes = scripts[rank], [len(script.nodes) for script in scripts]
        self.num_sums = sum(self._num_nodes)
        self._first_sum = sum(self._num_nodes[:rank])
        layout = self._trained.weights.layout
        received = len(layout.sum_runs[rank]) * (self.num_sums - self._num_nodes[rank])
        self.num_bytes = self._num_kept * (layout.sum_bytes * self._num_nodes[rank] + received)
        self._areas: list[GradientArea] = []

    def open(self) -> None:
        trained, layout = self._trained, self._trained.weights.layout
        nodes = [range(count) for count in self._num_nodes]
        self._areas = [
            self._group.gradient_area(layout.sum_bytes, self._num_nodes, nodes, layout.sum_runs)
            for _ in range(self._num_kept)
        ]
        trained.gradients.close()
        trained.area = None
        places = _Places([buffer for area in self._areas for buffer in area.mine])
        trained.gradients = Gradients(trained.weights, _repeated(self._script, self._num_kept), places, self._many)
        order = tree.fold_order(self._model.division.runs, self._model.division.num_replicas)
        self._folds = [Fold(trained.weights, self._group.worker.rank, area, order) for area in self._areas]
        trained.sums = self._folds[0]  # lets go of what there was before

    def leaf(self, number: int, replica: int) -> int:
        return number % self._num_kept * len(self._replicas) + replica - self._replicas.start

    def replica(self, leaf: int) -> int:
        return self._replicas[leaf % len(self._replicas)]

    def missing(self, number: int, replicas: Iterable[int]) -> list[tuple[int, str]]:
        first = number % self._num_kept * self._script.num_buffers
        buffers = enumerate(self._script.node_buffers, self._first_sum)
        return [(node, self._lacking(first + buffer)) for node, buffer in buffers]

    def fold(self, number: int) -> Fold:
        self._areas[number % self._num_kept].collect()
        return super().fold(number)


def _repeated(script: Script, count: int) -> Script:
    """Return how a worker folds its leaves into as many sets of buffers."""
    firsts = range(0, count * script.num_buffers, script.num_buffers)
    return Script(
        leaves=tuple(
            Leaf(first + leaf.buffer, tuple((first + target, first + source) for target, source in leaf.merges))
            for first in firsts
            for leaf in script.leaves
        ),
        nodes=(),
        node_buffers=tuple(first + buffer for first in firsts for buffer in script.node_buffers),
        num_buffers=count * script.num_buffers,
    )
