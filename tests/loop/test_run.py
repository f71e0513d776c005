"""What a script is told while it runs, and what is left afterwards."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from playing import play
from torch import nn
from zoo import Perceptron, classes_loss, vectors

from samestep.core.fakes import Counting, run_threads
from samestep.core.group import Solo
from samestep.core.randomness import seed_start
from samestep.loop.recipe import Keeping, Recipe
from samestep.loop.run import Run
from samestep.loop.session import Session, TraceEnded
from samestep.loop.supervision import Supervision


class Telling:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.frames, self.notes, self.traces = [], [], []

    def progress(self, frame):
        self.frames.append(frame)

    def note(self, text):
        self.notes.append(text)

    def trace(self, frame):
        self.traces.append(frame)


def training(run, steps=3, after=lambda step, optimizer: None):
    model = Perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run.replicate(model, optimizer)
    for step in run.steps(vectors(), batch_size=19, steps=steps):
        for batch in step:
            step.backward(classes_loss(model, batch))
        step.update()
        after(step, optimizer)
    return model, optimizer


def session_of(group, keeping=None, reporter=None, replicas=4) -> Session:
    seed_start(0)
    return Session(Recipe(replicas=replicas), keeping or Keeping(), group, Supervision(reporter=reporter or Telling()))


def test_facts_of_a_run():
    def one(group):
        session = session_of(group)
        run = Run(session)
        training(run, after=lambda step, optimizer: run.log(rate=0.5, loss=step.loss))
        return session.finish(None)

    facts, *others = run_threads(one, 2)
    assert (facts["steps"], facts["replicas"], facts["workers"], facts["samples"]) == (3, 4, 2, 53)
    assert facts["samples_exactly_once"] is True
    assert "53 of 53 samples exactly once" in facts["samples_sentence"]
    assert facts["logged"].keys() == {"rate", "loss"}
    assert facts["state_bytes"] > 0
    assert set(facts["seconds"]) == {"data", "compute", "wait", "update", "other"}
    assert others[0]["weights_digest"] == facts["weights_digest"]


def test_first_worker_alone_reports():
    reporters = [Telling(), Telling()]
    run_threads(lambda group: training(Run(session_of(group, reporter=reporters[group.worker.rank]))), 2)
    assert reporters[0].frames[0]["step"] == 1
    assert reporters[0].frames[0]["steps"] == 3
    assert reporters[1].frames == reporters[1].notes == []


def test_trace_ends_after_its_steps():
    reporter = Telling()
    with pytest.raises(TraceEnded):
        training(Run(session_of(Solo(), Keeping(trace=2), reporter)), steps=5)
    assert [frame["step"] for frame in reporter.traces] == [0, 1]
    assert reporter.traces[0]["tensors"].keys() == reporter.traces[1]["tensors"].keys()
    assert reporter.traces[0]["tensors"]["last.bias"] != reporter.traces[1]["tensors"]["last.bias"]


def test_elapsed_is_the_same_everywhere():
    def main(run):
        seconds = []
        training(run, after=lambda step, optimizer: seconds.append(run.elapsed))
        assert seconds == sorted(seconds)
        return seconds

    assert len(play(main, 4, 3).result) == 3


def test_hooks_of_the_user_run_once_per_update():
    def main(run):
        called = []
        model = Perceptron()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.register_step_pre_hook(lambda *a: called.append("before"))
        optimizer.register_step_post_hook(lambda *a: called.append("after"))
        run.replicate(model, optimizer)
        for step in run.steps(vectors(), batch_size=19, steps=2):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update()
        return called

    assert play(main, 4, 2).result == ["before", "after"] * 2


def test_others_gradients_are_dropped():
    """An update of one optimizer leaves the other's weights, and its gradients do not leak into the next pass."""

    def main(run):
        a, b = nn.Linear(20, 5), nn.Linear(20, 5)
        ours, theirs = torch.optim.SGD(a.parameters(), lr=0.1), torch.optim.SGD(b.parameters(), lr=0.1)
        run.replicate(a, b, ours, theirs)
        still = b.weight.detach().clone()
        for step in run.steps(vectors(), batch_size=19, steps=1, shuffle=False):
            for x, y in step:
                step.backward(nn.functional.cross_entropy(a(x), y) + nn.functional.cross_entropy(b(x), y))
            step.update(ours)
            assert torch.equal(b.weight, still)
            for x, y in step:
                step.backward(nn.functional.cross_entropy(b(x), y))
            step.update(theirs)
        plain = nn.Linear(20, 5)
        plain.load_state_dict({"weight": still, "bias": b.bias.detach()})
        x, y = (column[:19] for column in vectors())
        loss = nn.functional.cross_entropy(nn.functional.linear(x, still.requires_grad_(), bias0(run)), y)
        loss.backward()
        torch.testing.assert_close(b.weight.detach(), still.detach() - 0.1 * still.grad, rtol=1e-5, atol=1e-6)

    def bias0(run):
        seed_start(0)
        nn.Linear(20, 5)
        return nn.Linear(20, 5).bias.detach()

    play(main, 4, 2)


def test_afterwards_model_and_optimizer_are_the_users_own():
    session = session_of(Solo())
    model, optimizer = training(Run(session))
    session.finish(None)
    before = model.inner.weight.detach().clone()
    classes_loss(model, vectors()).backward()
    optimizer.step()
    assert not torch.equal(model.inner.weight, before)
    kept = weakref.ref(model.inner.weight), weakref.ref(session)
    del model, optimizer, session
    gc.collect()
    assert [ref() for ref in kept] == [None, None], "the run keeps its weights alive"


def test_few_meetings_per_step():
    """Two a step: one before the reduction, one to commit. One more where memory is looked at."""

    def one(group):
        counting = Counting(group)
        calls = []
        training(
            Run(session_of(counting)),
            steps=6,
            after=lambda step, optimizer: calls.append(counting.num_calls["exchange"]),
        )
        return calls

    for calls in run_threads(one, 2):
        assert all(b - a in (2, 3) for a, b in itertools.pairwise(calls[2:]))


def test_optimizer_state_is_complete_on_every_worker():
    def main(run):
        states = []
        training(run, after=lambda step, optimizer: states.append(optimizer.state_dict()["state"]))
        assert states[-1].keys() == set(range(6))
        return states

    assert play(main, 4, 3).as_words() == play(main, 4, 1).as_words()


def test_state_loaded_by_the_user_is_taken_over():
    def main(run):
        def restart(step, optimizer):
            if step.number == 1:
                state = optimizer.state_dict()
                for entry in state["state"].values():
                    entry["exp_avg"] = torch.ones_like(entry["exp_avg"])
                optimizer.load_state_dict(state)

        model, _ = training(run, steps=4, after=restart)
        return model.last.bias.detach().clone()

    played = [play(main, 4, workers) for workers in (1, 2, 3)]
    assert len({p.as_words() for p in played}) == 1
    assert not torch.equal(played[0].result, play(lambda run: training(run, steps=4)[0].last.bias.clone(), 4, 1).result)
