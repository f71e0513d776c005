"""The reduction tree: the one shape in which gradients are added, whoever adds them.

Replicas are leaves 0 .. R-1:

    sum(lo, hi) = leaf lo                        if hi - lo = 1
                  sum(lo, mid) + sum(mid, hi)    with mid = lo + the largest power of two below hi - lo

A worker plays a contiguous run of replicas. The run splits into maximal subtrees, its *nodes*; it adds leaves to
nodes as they come, with a few buffers (`Script`). The owner of a unit adds all workers' nodes along the rest of the
tree (`fold_order`). Pure arithmetic: no torch, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Node = tuple[int, int]
"""A subtree, as the range of leaves [lo, hi) under it."""


def middle(lo: int, hi: int) -> int:
    """Return where the subtree over leaves [lo, hi) divides; hi - lo must be at least 2."""
    return lo + (1 << (hi - lo - 1).bit_length() - 1)


def nodes_of(run: range, num_leaves: int) -> list[Node]:
    """Return the maximal subtrees of the tree over `num_leaves` leaves that lie in `run`, in leaf order."""

    def visit(lo: int, hi: int) -> list[Node]:
        if hi <= run.start or run.stop <= lo:
            return []
        if run.start <= lo and hi <= run.stop:
            return [(lo, hi)]
        mid = middle(lo, hi)
        return visit(lo, mid) + visit(mid, hi)

    return visit(0, num_leaves) if len(run) else []


@dataclass(frozen=True)
class Leaf:
    """What to do when a leaf's gradient arrives.

    Attributes:
        buffer: add the gradient to this buffer, or copy it there if the buffer holds nothing.
        merges: afterwards, in order: add buffer `source` to buffer `target`, as (target, source).
    """

    buffer: int
    merges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Script:
    """How one worker folds its run of leaves.

    Attributes:
        leaves: one entry per leaf of the run, in order.
        nodes: the run's nodes.
        node_buffers: for each node, the buffer that holds it after the last leaf.
        num_buffers: buffers needed; 1 for an empty run, so that an area is never empty.
    """

    leaves: tuple[Leaf, ...]
    nodes: tuple[Node, ...]
    node_buffers: tuple[int, ...]
    num_buffers: int


def script_of(run: range, num_leaves: int) -> Script:
    """Return how the worker that plays `run` folds its leaves: a binary counter over few buffers."""
    leaves: dict[int, Leaf] = {}
    node_buffers: list[int] = []
    used: set[int] = set()
    most = 1

    def visit(lo: int, hi: int, onto: int | None) -> int:
        """Fold [lo, hi) into one buffer and return it; `onto` is the left sibling's buffer, to be added to."""
        nonlocal most
        if hi - lo == 1:
            buffer = onto if onto is not None else _lowest_free(used)
            used.add(buffer)
            most = max(most, len(used))
            leaves[lo] = Leaf(buffer, ())
            return buffer
        mid = middle(lo, hi)
        left = visit(lo, mid, None)
        right = visit(mid, hi, left)
        if right != left:
            leaves[hi - 1] = Leaf(leaves[hi - 1].buffer, (*leaves[hi - 1].merges, (left, right)))
            used.discard(right)
        return left

    nodes = nodes_of(run, num_leaves)
    for lo, hi in nodes:
        node_buffers.append(visit(lo, hi, None))
    return Script(tuple(leaves[i] for i in run), tuple(nodes), tuple(node_buffers), most)


def _lowest_free(used: set[int]) -> int:
    buffer = 0
    while buffer in used:
        buffer += 1
    return buffer


Expression = int | tuple["Expression", "Expression"]
"""A sum over nodes: the index of a node, or (left, right)."""


def fold_order(runs: Sequence[range], num_leaves: int) -> Expression:
    """Return the sum over all workers' nodes, numbered in leaf order, that completes the tree.

    Args:
        runs: the run of each worker; together they cover the leaves, in order.
        num_leaves: number of leaves of the tree.
    """
    numbers = {node: i for i, node in enumerate(node for run in runs for node in nodes_of(run, num_leaves))}

    def visit(lo: int, hi: int) -> Expression:
        if (lo, hi) in numbers:
            return numbers[lo, hi]
        mid = middle(lo, hi)
        return visit(lo, mid), visit(mid, hi)

    return visit(0, num_leaves)


def without(order: Expression, absent: set[int]) -> Expression | None:
    """Return the sum without the nodes in `absent`, which add nothing; None if no node is left."""
    if isinstance(order, int):
        return None if order in absent else order
    left, right = without(order[0], absent), without(order[1], absent)
    if left is None or right is None:
        return right if left is None else left
    return left, right
