"""The law: audits change no bit, and a worker that computes wrong is found and named before the weights are touched."""

from __future__ import annotations

import itertools
import math
import os
import platform
import re
import zlib
from contextlib import contextmanager, suppress
from functools import partialmethod
from typing import Any

import pytest
import torch
from loops import LOOPS, training
from playing import play, play_one, replaced
from zoo import Convolutional, Perceptron, classes_loss, images, vectors

import samestep.core.gradients as gradients_module
import samestep.loop.run as run_module
import samestep.loop.step as step_module
from samestep.core.audit import Account, Draw, checksum, draw, is_due, odd_ones
from samestep.core.buffers import Buffers
from samestep.core.fakes import run_threads
from samestep.core.gradients import Gradients
from samestep.core.group import Solo
from samestep.core.randomness import seed_shard
from samestep.errors import IntegrityError, SamestepError, SettingsError
from samestep.loop.audits import Audits
from samestep.loop.run import Run
from samestep.loop.stepping import Stepping


@contextmanager
def audited(share: float):
    """Let every `run.replicate` ask for audits; give the audits of all workers."""
    made: list[Audits] = []

    class Noted(Audits):
        def __init__(self, *args: Any):
            super().__init__(*args)
            made.append(self)

    with (
        replaced(Run, "replicate", partialmethod(Run.replicate, audit=share)),
        replaced(run_module, "Audits", Noted),
    ):
        yield made


def assert_unchanged(main: Any, replicas: int, workers: int, num_audits: int | None = None) -> None:
    """The law: with every pass audited, `main` comes to what it comes to without."""
    plainly = play(main, replicas, 1)
    with audited(1) as made:
        watched = play(main, replicas, workers)
    assert watched.as_words() == plainly.as_words()
    assert watched.exactly_once
    counts = {one.num_agreed for one in made}
    assert len(made) == workers and len(counts) == 1
    assert counts == {num_audits} if num_audits is not None else counts.pop() > 0


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_no_bit_changes(workers):
    assert_unchanged(training("convolutional", "adamw"), 8, workers, 3)


NUM_PASSES = {
    "adversarial": 6,
    "tokens_counted": None,
    "autocast_float16_scaled": None,
    "buffers_meant": 3,
    "checkpointed_reentrant": None,
    "more_replicas_than_samples": 4,
    "empty_and_scattered_parameters": 2,
    "frozen_and_thawed": 4,
}


@pytest.mark.parametrize("name", NUM_PASSES)
def test_no_bit_changes_in(name):
    assert_unchanged(LOOPS[name].main, 8, 3, NUM_PASSES[name])


def test_a_lone_replica_is_computed_twice():
    assert_unchanged(training("perceptron", "adamw"), 1, 1, 3)


class Files:
    """Images some of which cannot be read."""

    def __len__(self):
        return 53

    def __getitem__(self, i):
        if i % 7 == 3:
            raise ValueError("broken")
        x, y = images()
        return x[i] + 0.01 * torch.randn(()), y[i]


def skipping(run):
    """Samples that cannot be read, others that draw random numbers, loader processes, gradients that are not finite."""
    model = Convolutional()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run.replicate(model, optimizer, on_bad_sample="skip", nonfinite="skip")
    told = []
    for step in run.steps(Files(), batch_size=9, epochs=1, loaders=1 if run.worker.is_first else 0):
        for batch in step:
            step.backward(classes_loss(model, batch) * (math.nan if step.number == 2 else 1.0))
        step.update()
        told.append([step.loss, step.skipped, step.bad_samples, run.digest()])
    return told


def test_no_bit_changes_where_samples_and_updates_are_skipped():
    assert_unchanged(skipping, 8, 2)


def between(run):
    """What a script can see between the shards and the update."""
    model = Convolutional()
    run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    told = []
    for step in run.steps(images(), batch_size=19, steps=4):
        for batch in step:
            step.backward(classes_loss(model, batch))
            step.mean(drawn=torch.rand(()))
        told.append([model.norm.running_mean.clone(), model.norm.num_batches_tracked.clone(), torch.rand(())])
        assert all(p.grad is None for p in model.parameters())
        step.update()
        told.append([step.loss, step.means])
    return told


def test_nothing_is_to_be_seen_after_the_shards():
    assert_unchanged(between, 4, 1, 4)


def test_a_share_of_the_passes_is_audited():
    steps = [step for step in range(32_000) if is_due(1 / 64, (5, step, 0))]
    assert 400 < len(steps) < 600
    assert steps != [step for step in range(32_000) if is_due(1 / 64, (5, step, 1))]
    assert all(is_due(1, (5, step, 0)) and not is_due(0, (5, step, 0)) for step in range(1_000))


def test_every_replica_and_pair_is_drawn():
    runs = [range(3), range(3, 6), range(6, 8)]
    drawn = [draw((5, step, 0), range(1, 8), runs) for step in range(1_000)]
    assert {one.replica for one in drawn} == set(range(1, 8))
    assert {(one.player, one.auditor) for one in drawn} == {(a, b) for a in range(3) for b in range(3) if a != b}
    assert all(one.replica in runs[one.player] for one in drawn)
    assert draw((5, 0, 0), [2], [range(4)]) == Draw(replica=2, player=0, auditor=0)


@pytest.mark.parametrize("share", [-0.1, 1.1, 2, math.nan, True, "1/64"])
def test_a_share_that_is_none(share):
    def main(run):
        model = Perceptron()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), audit=share)

    with pytest.raises(SettingsError, match=r"You set audit=.*1/64"):
        play_one(Solo(), main, 2)


# --------------------------------------------------------------------------------------- a worker that computes wrong


def flipped(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient with one bit of one element flipped."""
    wrong = gradient.clone()
    wrong.view(torch.int32).view(-1)[-1] ^= 1
    return wrong


def wrong_on(run, rank: int, tries: range, what: str = "gradient") -> Any:
    """Train; worker `rank` computes wrong in those of its shards, as it counts them."""
    model = Perceptron()
    run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), audit=1)
    num_shards = 0

    def hook(gradient):
        is_wrong = run.worker.rank == rank and num_shards - 1 in tries
        return flipped(gradient) if is_wrong and what == "gradient" else gradient

    model.inner.weight.register_hook(hook)
    model.last.bias.register_hook(hook)
    weights: list[torch.Tensor] = []
    try:
        for step in run.steps(vectors(), batch_size=19, steps=12):
            weights = [p.detach().clone() for p in model.parameters()]
            for batch in step:
                num_shards += 1
                loss = classes_loss(model, batch)
                if what == "loss" and run.worker.rank == rank:
                    loss = loss + (math.ulp(1.0) * 2**29 * loss.detach())
                step.backward(loss)
            step.update()
    except IntegrityError as error:
        assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
        with pytest.raises(IntegrityError):
            run.once(lambda: 1)
        return str(error)
    return ""


def words_of(workers: int, **settings: Any) -> str:
    """Return the message, which must be the same on all workers; empty where there is no error."""

    def main(group):
        found: list[str] = []
        with suppress(IntegrityError):
            play_one(group, lambda run: found.append(wrong_on(run, **settings)), 6)
            assert not found[0], "the script swallowed the error, and went on"
        return found[0]

    messages = run_threads(main, workers) if workers > 1 else [main(Solo())]
    assert len(set(messages)) == 1
    return messages[0]


def place(rank: int) -> str:
    return re.escape(f"worker {rank} (host {platform.node()}, pid {os.getpid()}, cpu)")


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_worker_that_always_computes_wrong_is_named(rank):
    words = words_of(3, rank=rank, tries=range(1000))
    assert re.search(r"In step \d+, replica \d+ \(samples .*\), worker", words), words
    assert "in the gradient of 'inner.weight' and 1 more of 6 parameters. Then all workers" in words
    assert re.search(rf"Not the bits of the majority: {place(rank)} in 2 of 2 tries\. The processor", words), words
    assert len(re.findall(place(rank), words)) == 2


def test_of_two_workers_that_stick_to_their_results_none_is_named():
    words = words_of(2, rank=1, tries=range(1000))
    assert re.search(place(0), words) and re.search(place(1), words)
    assert "No result has a majority; with three workers or more" in words


def test_of_two_workers_one_that_was_wrong_once_is_named():
    # In the first step, whose third replica is its own, and is checked by the other.
    words = words_of(2, rank=1, tries=range(3))
    assert re.search(rf"Not the bits of the majority: {place(1)} in 1 of 2 tries", words), words


def test_a_lone_worker_that_was_wrong_once_is_found():
    words = words_of(1, rank=0, tries=range(6, 7))
    assert re.search(rf"{place(0)} came to different bits in two tries, in the gradient", words), words
    assert re.search(rf"Not the bits of the majority: {place(0)} in 1 of 3 tries", words), words


def test_a_loss_that_is_wrong_is_found():
    words = words_of(3, rank=2, tries=range(0), what="loss")
    assert "in the loss. Then all workers" in words


def test_all_is_well_without_a_fault():
    assert words_of(2, rank=7, tries=range(0)) == ""


def account(*gradients: list, data: str = "d", losses: Any = ()) -> Account:
    return Account(samples="s", data=data, losses=[list(losses)], gradients=[list(g) for g in gradients])


def test_differences_in_words():
    names = [["a", "b"], ["c"]]
    whole = account([[0, 5], [1, 6]], [[0, 7]])
    assert whole.differences(account([[0, 5], [1, 6]], [[0, 7]]), names) == ""
    assert whole.differences(account([[0, 5], [1, 6]], []), names) == "the gradient of 'c'"
    assert whole.differences(account([[1, 7]], [[0, 7]]), names) == "the gradient of 'a' and 1 more of 3 parameters"
    other = account([[0, 5], [1, 6]], [[0, 8]], data="e", losses=["0x0"])
    assert whole.differences(other, names) == "the data, the loss and the gradient of 'c'"


def test_a_majority_names_the_others():
    a, b, c = (account([[0, i]]) for i in range(3))
    assert odd_ones([(0, a), (1, b), (0, a), (1, b), (2, a)]) == {1: 2}
    assert odd_ones([(0, b), (1, a), (0, a), (1, a), (2, a)]) == {0: 1}
    assert odd_ones([(0, a), (1, b), (0, a), (1, b)]) is None
    assert odd_ones([(0, a), (0, b), (0, c)]) is None
    assert odd_ones([(0, a), (1, b), (0, c), (1, a), (2, a)]) == {1: 1, 0: 1}


def test_a_checksum_knows_every_bit_and_place_and_no_strides():
    gradient = torch.randn(40, 30, generator=torch.Generator().manual_seed(3))
    known = checksum(gradient)
    assert checksum(gradient.t().contiguous().t()) == known == checksum(gradient.clone())
    assert checksum(-gradient) != known != checksum(gradient.flip(0))
    assert checksum(flipped(gradient)) != known
    assert checksum(torch.zeros(3)) != checksum(-torch.zeros(3))
    for shape in ((), (0,), (0, 3), (1, 5)):
        plain = torch.randn(shape, generator=torch.Generator().manual_seed(4))
        assert checksum(plain) == zlib.crc32(plain.numpy().tobytes())
    assert checksum(gradient.bfloat16()) == zlib.crc32(gradient.bfloat16().view(torch.int16).numpy().tobytes())


# -------------------------------------------------------------------------------- bugs planted in the audit itself


def no_bit_changes():
    assert_unchanged(training("convolutional", "adamw"), 8, 2)


def buffers_matter():
    assert_unchanged(LOOPS["buffers_meant"].main, 8, 2)


def nothing_is_to_be_seen():
    assert_unchanged(between, 4, 1)


def wrong_is_found():
    assert re.search(place(1), words_of(3, rank=1, tries=range(1000)))


@contextmanager
def left_as_they_are(buffers):
    yield


def drifting(seed, step, pass_, replica, calls=itertools.count()):  # noqa: B008
    seed_shard(seed + next(calls), step, pass_, replica)


def shared_part(again):
    """Return an `_again` whose losses, means and samples go where those of the worker's own shards go."""

    def playing(step, replica):
        mine = step._part
        with replaced(step_module, "Part", lambda: mine):
            return (yield from again(step, replica))

    return playing


PLANTED: dict[str, tuple[Any, str, Any, Any]] = {
    "results are not compared": (Account, "differences", lambda *rest: "", wrong_is_found),
    "checksums see nothing": (gradients_module, "checksum", lambda gradient: 0, wrong_is_found),
    "the audited shard is added": (Gradients, "begin_aside", lambda self: None, no_bit_changes),
    "its losses and means count": (step_module, "_again", shared_part(step_module._again), nothing_is_to_be_seen),
    "its buffers stay": (Buffers, "aside", left_as_they_are, nothing_is_to_be_seen),
    "it begins with other buffers": (Buffers, "begin_shard", lambda self, replica: None, buffers_matter),
    "it draws other numbers": (step_module, "seed_shard", drifting, no_bit_changes),
    "it reads another shard": (Stepping, "read_one", lambda self, batch, replica: self.read(batch)[0], no_bit_changes),
    "generators stay where it left them": (step_module, "seed_step", lambda *rest: None, nothing_is_to_be_seen),
}


@pytest.mark.parametrize("law", list(dict.fromkeys(law for *_, law in PLANTED.values())))
def test_no_bug_no_finding(law):
    law()


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug):
    owner, name, new, law = PLANTED[bug]
    with replaced(owner, name, new), pytest.raises((AssertionError, SamestepError)):
        law()
