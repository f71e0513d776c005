"""A fault planted in each mechanism makes a law fail; a set of laws that lets one live is too weak."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from loops import LOOPS, training
from playing import assert_same_bits, play, replaced
from test_alignment import play_shifted
from test_evaluation import assert_exact
from test_nonfinite import copied_in_pieces, same_bits_if_skipped, small_ones_too, stops_and_names, sums_are_looked_at
from test_one_big_batch import _count_words, _words_loss, assert_equal_to_big_batch, doubled, maker
from test_plain_loop import assert_equal_to_plain_loop
from test_resume import assert_resumed_is_never_stopped, eventful
from test_samples import assert_each_exactly_once
from zoo import MODELS, classes_loss, vectors

import samestep.agree.meeting as meeting
import samestep.agree.reduction as reduction
import samestep.agree.synchronous as synchronous
import samestep.core.element_update as element_update
import samestep.core.finite as finite
import samestep.core.fold as fold
import samestep.core.gradients as gradients
import samestep.core.guard as guard
import samestep.core.layout as layout
import samestep.core.model as core_model
import samestep.core.randomness as randomness
import samestep.core.tree as tree
import samestep.core.weights as weights
import samestep.core.whole_update as whole_update
import samestep.data.proof as proof
import samestep.data.source as source
import samestep.loop.archive as archive
import samestep.loop.evaluation as evaluation
import samestep.loop.feed as feed
import samestep.loop.step as step_module
import samestep.storage.ledger as ledger
from samestep.core.buffers import Buffers
from samestep.core.randomness import key
from samestep.data.split import shard_bounds
from samestep.errors import EditedWeightsError, SamestepError, UsageError

# ------------------------------------------------------------------------------------------------------------ laws


def same_bits(model: str, optimizer: str, fleets=((8, 1), (8, 3))) -> Callable:
    return lambda folder: assert_same_bits(training(model, optimizer), fleets)


def same_bits_of(loop: str, fleets=((8, 1), (8, 3))) -> Callable:
    return lambda folder: assert_same_bits(LOOPS[loop].main, fleets)


def big_batch(folder, clip_norm=None) -> None:
    _, data, loss_of = MODELS["perceptron"]
    assert_equal_to_big_batch(
        maker(zoo.Perceptron, "sgd"),
        lambda step, m, batch: step.backward(10 * loss_of(m, batch)),
        lambda m, batch: 10 * loss_of(m, batch),
        data=doubled(data()),
        batch_size=19,
        replicas=8,
        workers=2,
        clip_norm=clip_norm,
    )


def big_batch_of_words(folder) -> None:
    assert_equal_to_big_batch(
        maker(zoo.Transformer, "sgd"),
        _count_words,
        _words_loss,
        data=zoo.texts(),
        batch_size=19,
        replicas=8,
        workers=2,
    )


def plain_loop(folder) -> None:
    def make():
        model = zoo.Convolutional()
        return model, torch.optim.AdamW(model.parameters(), lr=3e-3)

    assert_equal_to_plain_loop(make, zoo.images(), classes_loss)


def resumed(folder) -> None:
    assert_resumed_is_never_stopped(eventful, folder, 3, [2, 1])


def samples(folder) -> None:
    assert_each_exactly_once(37, 11, 4, 3)


def aligned(folder) -> None:
    assert play_shifted("perceptron", 4, 4, 2).as_words() == play_shifted("perceptron", 0, 0, 2).as_words()


def evaluated(folder) -> None:
    assert_exact(7)


class Seen(torch.nn.Module):
    """Its buffer is the mean of what a shard saw."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(20, 5)
        self.register_buffer("center", torch.zeros(20, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.center.add_(x.detach().double().mean(0))
        self.count += len(x)
        return self.body(x)


def buffers_are_means_over_samples(folder) -> None:
    """The law: after a step a floating buffer is the mean over samples, an integer one the first replica's."""

    def main(run):
        model = Seen()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
        told = []
        for step in run.steps(vectors(), batch_size=19, epochs=1, shuffle=False):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update()
            told.append((model.center.clone(), int(model.count)))
        return told

    center, count = torch.zeros(20, dtype=torch.float64), 0
    for number, (theirs, counted) in enumerate(play(main, 8, 3).result):
        rows = vectors()[0][number * 19 : (number + 1) * 19]
        center += rows.double().mean(0)
        count += len(rows) // 8
        torch.testing.assert_close(theirs, center, rtol=1e-6, atol=1e-6)
        assert counted == count


def shards_draw_numbers_of_their_own(folder) -> None:
    """The law: every generator draws other numbers in each step, pass and replica, and the same in a second run."""

    def main(run):
        model = torch.nn.Linear(20, 5)
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
        told = []
        for step in run.steps(vectors(), batch_size=19, steps=3):
            for _ in range(2):
                for batch in step:
                    told.append([float(torch.rand(())), float(np.random.rand()), random.random()])
                    step.backward(classes_loss(model, batch))
                step.update()
        return told

    first, second = play(main, 8, 1), play(main, 8, 1)
    assert first.as_words() == second.as_words()
    assert len(first.result) == 3 * 2 * 8
    for column in zip(*first.result, strict=True):
        assert len(set(column)) == len(column), "two shards drew the same number"
    assert play(main, 8, 1, seed=1).result[0] != first.result[0]


def second_arrival_is_refused(folder) -> None:
    """The law: a gradient that arrives twice in a shard is folded whole, or refused by name."""

    def main(run, arrivals):
        model = torch.nn.Linear(20, 5)
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), arrivals=arrivals)
        for step in run.steps(vectors(), batch_size=19, steps=3):
            for batch in step:
                step.backward(classes_loss(model, batch))
                if step.number:
                    step.backward(classes_loss(model, batch))
            step.update()

    refused = False
    try:
        play(partial(main, arrivals="auto"), 8, 1)
    except UsageError as error:
        refused = ("'weight'" in str(error) or "'bias'" in str(error)) and "arrivals='many'" in str(error)
    assert refused, "the second arrival was lost without a word"
    assert_same_bits(partial(main, arrivals="many"), [(8, 1), (8, 3)])


def edits_are_found(folder) -> None:
    def main(run):
        model = zoo.Perceptron()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for step in run.steps(vectors(), batch_size=19, steps=3):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update()
            if step.number == 0:
                model.inner.weight.data.clamp_(-0.01, 0.01)

    found = False
    try:
        play(main, 8, 2)
    except EditedWeightsError as error:
        found = "inner.weight" in str(error)
    assert found, "an edit through .data was not found"


def halves_are_added_as_floats(folder) -> None:
    """The law: gradients of half-precision weights are added in float32, in the shape of the tree."""

    def main(run):
        model = torch.nn.Linear(20, 5).bfloat16()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
        step = next(iter(run.steps(vectors(), batch_size=16, steps=1)))
        leaves = []
        for x, y in step:
            loss = torch.nn.functional.cross_entropy(model(x.bfloat16()), y)
            share = torch.tensor(len(x) / step.size)
            leaves.append(torch.autograd.grad(loss.float(), model.weight, share, retain_graph=True)[0].float())
            step.backward(loss)
        told = {}
        step.update(transform=lambda name, gradient: told.setdefault(name, gradient.clone()))
        return leaves, told["weight"]

    leaves, total = play(main, 8, 1).result
    while len(leaves) > 1:
        leaves = [left + right for left, right in zip(leaves[::2], leaves[1::2], strict=True)]
    assert total.dtype == torch.float32
    assert torch.equal(total, leaves[0])


def every_element_has_one_owner(folder) -> None:
    shapes = [layout.Shape(60_000, 4, 4), layout.Shape(7, 4, 4), layout.Shape(700_000, 4, 4)]
    for num_workers in (1, 2, 3, 5):
        laid = layout.lay_out(shapes, num_workers)
        owned = sorted((p.parameter, p.start, p.stop) for chunks in laid.chunks for chunk in chunks for p in chunk)
        for number, shape in enumerate(shapes):
            mine = [(start, stop) for parameter, start, stop in owned if parameter == number]
            assert [start for start, _ in mine] == [0, *[stop for _, stop in mine[:-1]]]
            assert mine[-1][1] == shape.num_elements


OWN_LAWS = [
    second_arrival_is_refused,
    buffers_are_means_over_samples,
    shards_draw_numbers_of_their_own,
    edits_are_found,
    halves_are_added_as_floats,
    every_element_has_one_owner,
]


# ---------------------------------------------------------------------------------------------------------- faults


@dataclass(frozen=True)
class Fault:
    """An attribute of `owner` is replaced by `make(what it was)`; `law` must find it."""

    owner: Any
    name: str
    make: Callable[[Any], Any]
    law: Callable[[Any], None]


def nothing(old):
    return lambda *args, **kwargs: None


def left_to_right(old):
    def faulty(runs, num_leaves):
        total = 0
        for node in range(1, sum(len(tree.nodes_of(run, num_leaves)) for run in runs)):
            total = (total, node)
        return total

    return faulty


def mean_of_means(old):
    def faulty(self, loss, count=None):
        self._count = self.size / self._num_replicas
        return old(self, loss, count)

    return faulty


def first_block_is_nobodys(old):
    def faulty(shapes, begin, end):
        pieces = old(shapes, begin, end)
        return [p for p in pieces if p.start == 0 or p.start != begin[1]]

    return faulty


def updated_twice(old):
    def faulty(self, *args):
        old(self, *args)
        if self._group.worker.rank == 1:
            old(self, *args)

    return faulty


def a_block_has_two_owners(old):
    """The second worker takes the first block of the first one, too."""

    def faulty(shapes, begin, end):
        pieces = old(shapes, begin, end)
        return pieces if begin == (0, 0) else [old(shapes, (0, 0), end)[0], *pieces]

    return faulty


def sizes_as_if_equal(old):
    return lambda self, counts, changed: old(self, dict.fromkeys(counts, 1), changed)


def without_replica(old):
    return lambda *parts: old(*parts[:4], 0) if parts[0] == 3 else old(*parts)


def one_too_far(old):
    return lambda start, stop, n: [(a + (a < b - 1), b) for a, b in old(start, stop, n)]


def always_from_zero(old):
    return property(lambda self: 0)


def samples_for_words(old):
    return lambda self: (float(self.request.num_samples), True)


def norm_of_squares(old):
    return lambda read: [blocks * 2 for blocks in old(read)]


def whole_runs(old):
    def whole(flat):
        return np.array([float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2])

    return lambda read: [whole(flat) for flats in read() for flat in flats]


def batches_weigh_alike(old):
    return lambda value, count: old(value, count) / count


def drops_last_batch(old):
    def faulty(self, *args):
        old(self, *args)
        self._mine = self._mine[:-1] or self._mine

    return faulty


def forgets_what_was_read(old):
    def faulty(self, kind, where):
        value = old(self, kind, where)
        return [*value[:5], [0, 0], *value[6:]] if kind == "update" else value

    return faulty


def forgets_buffers(old):
    return lambda self: {n: t for n, t in old(self).items() if "running" not in n}


def copied_blindly(old):
    def faulty(self, *args):
        self._look_closer, looked = (lambda *args: None), self._look_closer
        old(self, *args)
        self._look_closer = looked

    return faulty


def large_is_forgotten(old):
    def faulty(self, *args):
        old(self, *args)
        self.huge = False

    return faulty


def unscaled_once(old):
    return lambda self, index, absent, factor: old(self, index, absent, 1.0)


FAULTS = {
    "tree: nodes added from left to right": Fault(tree, "fold_order", left_to_right, same_bits("perceptron", "sgd")),
    "tree: a merge is left out": Fault(
        tree, "_lowest_free", lambda old: lambda used: 0, same_bits("perceptron", "sgd")
    ),
    "weights: a mean of means": Fault(step_module.Step, "backward", mean_of_means, big_batch),
    "weights: samples where words count": Fault(meeting.Meeting, "_total", samples_for_words, big_batch_of_words),
    "weights: the divisor is left out": Fault(fold.Fold, "chunk", unscaled_once, big_batch_of_words),
    "buffers: shards weigh alike": Fault(Buffers, "merge", sizes_as_if_equal, buffers_are_means_over_samples),
    "buffers: never merged": Fault(Buffers, "merge", nothing, same_bits("convolutional", "sgd")),
    "buffers: a shard begins where the last one ended": Fault(
        Buffers, "begin_shard", nothing, same_bits("convolutional", "sgd")
    ),
    "randomness: shards are not seeded": Fault(step_module, "seed_shard", nothing, same_bits("convolutional", "sgd")),
    "randomness: replicas draw the same": Fault(randomness, "key", without_replica, shards_draw_numbers_of_their_own),
    "randomness: transforms depend on the owner": Fault(
        reduction, "seed_transform", nothing, same_bits_of("transformed")
    ),
    "randomness: the rest of a step is not seeded": Fault(
        step_module, "seed_step", nothing, same_bits_of("epochs_one_by_one")
    ),
    "data: shards begin too late": Fault(feed, "shard_bounds", one_too_far, samples),
    "data: epochs begin anew": Fault(proof.Coverage, "next_epoch", always_from_zero, same_bits_of("epochs_one_by_one")),
    "data: what was read is forgotten at a resume": Fault(ledger.Ledger, "next", forgets_what_was_read, resumed),
    "ownership: a block is nobody's": Fault(layout, "_pieces", first_block_is_nobodys, same_bits("perceptron", "sgd")),
    "ownership: a block has two owners": Fault(layout, "_pieces", a_block_has_two_owners, every_element_has_one_owner),
    "ownership: a block is updated twice": Fault(
        element_update.ElementUpdate, "apply", updated_twice, same_bits("perceptron", "sgd")
    ),
    "gradients: a second arrival is lost": Fault(
        gradients._Sums,
        "arrive",
        lambda old: lambda self, p: old(self, p) if self.arrivals == 0 else None,
        second_arrival_is_refused,
    ),
    "gradients: who used a parameter is not told": Fault(
        synchronous, "absent_of", lambda old: lambda frames, trained: {}, same_bits_of("frozen_and_thawed")
    ),
    "gradients: halves are added as halves": Fault(
        weights, "sum_dtype", lambda old: lambda dtype: dtype, halves_are_added_as_floats
    ),
    "nonfinite: gradients are not looked at": Fault(finite.Finite, "look", nothing, stops_and_names),
    "nonfinite: a worker looks at its first shard alone": Fault(
        finite.Finite,
        "look",
        lambda old: lambda self, leaf, *args: old(self, leaf, *args) if leaf == 0 else None,
        stops_and_names,
    ),
    "nonfinite: small gradients are not looked at": Fault(finite.Finite, "end_shard", nothing, small_ones_too),
    "nonfinite: pieces are copied, and not looked at": Fault(finite.Finite, "copy", copied_blindly, copied_in_pieces),
    "nonfinite: a lone worker does not look": Fault(finite.Finite, "look_at_all", nothing, stops_and_names),
    "nonfinite: large gradients are not told": Fault(
        finite.Finite, "_look_closer", large_is_forgotten, sums_are_looked_at
    ),
    "nonfinite: owners do not look at sums": Fault(reduction.Reduction, "_overflow", nothing, sums_are_looked_at),
    "nonfinite: what was seen is not forgotten": Fault(finite.Finite, "begin_pass", nothing, same_bits_if_skipped),
    "nonfinite: buffers of a skipped update stay": Fault(Buffers, "restore", nothing, same_bits_if_skipped),
    "alignment: inputs stay where they are": Fault(source, "aligned", lambda old: lambda tensor: tensor, aligned),
    "guard: owners do not look": Fault(guard._Samples, "check", nothing, edits_are_found),
    "optimizer: state is not shared": Fault(element_update.ElementUpdate, "_place", nothing, plain_loop),
    "optimizer: numbers are not told": Fault(
        whole_update.WholeUpdate,
        "settle",
        lambda old: (
            lambda self, notices: old(self, [n if n is None else {**n, "numbers": {}, "settings": {}} for n in notices])
        ),
        same_bits_of("unknown_coupled_optimizer"),
    ),
    "optimizer: one that couples is taken for separable": Fault(
        core_model,
        "kind_of",
        lambda old: lambda o: core_model.Kind("tensor"),
        same_bits_of("unknown_coupled_optimizer"),
    ),
    "optimizer: one that looks at tensors is taken by elements": Fault(
        core_model, "kind_of", lambda old: lambda o: core_model.Kind("element"), same_bits("perceptron", "adafactor")
    ),
    "clip: the norm is wrong": Fault(reduction, "block_squares", norm_of_squares, partial(big_batch, clip_norm=0.5)),
    "clip: the norm depends on owners": Fault(reduction, "block_squares", whole_runs, same_bits_of("clipped")),
    "evaluation: a mean of means": Fault(evaluation, "_sum", batches_weigh_alike, evaluated),
    "evaluation: a batch is left out": Fault(evaluation.Evaluation, "__init__", drops_last_batch, evaluated),
    "evaluation: the mode stays": Fault(
        evaluation, "evaluating", lambda old: lambda modules: torch.no_grad(), evaluated
    ),
    "checkpoint: buffers are forgotten": Fault(archive.Archive, "_tensors", forgets_buffers, resumed),
    "checkpoint: optimizer state is forgotten": Fault(archive.Archive, "_restore_optimizer", nothing, resumed),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name, tmp_path):
    fault = FAULTS[name]
    old = fault.owner.__dict__[fault.name]
    new = fault.make(old.fget if isinstance(old, property) else old)
    if fault.owner in (tree, weights, randomness) or fault.name == "evaluating":
        patched = replaced_everywhere(fault.name, old, new)
    else:
        patched = replaced(fault.owner, fault.name, new)
    with patched, pytest.raises((AssertionError, SamestepError)):
        fault.law(tmp_path)


def replaced_everywhere(name: str, old: Any, new: Any):
    """Replace a function also in the modules that imported it by name."""
    stack = ExitStack()
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("samestep") and getattr(module, name, None) is old:
            stack.enter_context(replaced(module, name, new))
    return stack


@pytest.mark.parametrize("law", OWN_LAWS, ids=lambda law: law.__name__)
def test_laws_of_this_file_hold(law, tmp_path):
    law(tmp_path)


def test_bounds_are_those_of_the_promise():
    """The planted data fault is one only if the true bounds cover all."""
    assert [b for bounds in shard_bounds(3, 40, 5) for b in range(*bounds)] == list(range(3, 40))
    assert key(1, 2) != key(2, 1)
