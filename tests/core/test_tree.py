"""The tree: one shape, however the leaves are divided among workers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samestep.core.tree import fold_order, middle, nodes_of, script_of, without
from samestep.core.worker import run_of


def shape(lo: int, hi: int) -> str:
    """The sum over leaves, written out, by the definition of the design."""
    if hi - lo == 1:
        return str(lo)
    power = 1
    while power * 2 < hi - lo:
        power *= 2
    return f"({shape(lo, lo + power)}+{shape(lo + power, hi)})"


def played(num_leaves: int, num_workers: int) -> str:
    """What the workers and the owner really add, written out."""
    runs = [run_of(w, num_workers, num_leaves) for w in range(num_workers)]
    nodes: list[str] = []
    for run in runs:
        script = script_of(run, num_leaves)
        buffers: list[str | None] = [None] * script.num_buffers
        for leaf, step in zip(run, script.leaves, strict=True):
            held = buffers[step.buffer]
            buffers[step.buffer] = str(leaf) if held is None else f"({held}+{leaf})"
            for target, source in step.merges:
                buffers[target], buffers[source] = f"({buffers[target]}+{buffers[source]})", None
        assert len(script.nodes) == len(script.node_buffers)
        nodes += [buffers[b] for b in script.node_buffers]
        assert [b for b in buffers if b is not None and b not in nodes] == [], "a sum was left in a buffer"

    def written(order) -> str:
        return nodes[order] if isinstance(order, int) else f"({written(order[0])}+{written(order[1])})"

    return written(fold_order(runs, num_leaves))


@given(st.data(), st.integers(1, 40))
def test_shape_does_not_depend_on_workers(data, num_leaves):
    num_workers = data.draw(st.integers(1, num_leaves))
    assert played(num_leaves, num_workers) == shape(0, num_leaves)


def test_eight_and_five_leaves():
    assert shape(0, 8) == "(((0+1)+(2+3))+((4+5)+(6+7)))"
    assert [middle(0, n) for n in (2, 3, 4, 5, 8, 9)] == [1, 2, 2, 4, 4, 8]
    assert nodes_of(range(3), 5) == [(0, 2), (2, 3)]
    assert nodes_of(range(3, 5), 5) == [(3, 4), (4, 5)]
    assert nodes_of(range(2, 2), 5) == []


@given(st.data(), st.integers(1, 64))
def test_few_buffers_and_nodes(data, num_leaves):
    num_workers = data.draw(st.integers(1, num_leaves))
    bound = max(1, 2 * (num_leaves - 1).bit_length())
    for w in range(num_workers):
        script = script_of(run_of(w, num_workers, num_leaves), num_leaves)
        assert len(script.nodes) <= bound
        assert script.num_buffers <= bound
        covered = list(itertools.chain.from_iterable(range(lo, hi) for lo, hi in script.nodes))
        assert covered == list(run_of(w, num_workers, num_leaves))


@pytest.mark.parametrize("num_workers", [1, 2, 4, 8])
def test_power_of_two_workers_have_one_node_each(num_workers):
    for w in range(num_workers):
        assert len(script_of(run_of(w, num_workers, 8), 8).nodes) == 1


def test_nodes_that_are_absent_add_nothing():
    order = fold_order([run_of(w, 4, 4) for w in range(4)], 4)
    assert order == ((0, 1), (2, 3))
    assert without(order, {1}) == (0, (2, 3))
    assert without(order, {2, 3}) == (0, 1)
    assert without(order, {0, 1, 3}) == 2
    assert without(order, {0, 1, 2, 3}) is None
