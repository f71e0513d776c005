"""Orders from outside: all workers hear them at the same call, and leave at the end of the same step."""

import functools

import pytest
import torch
from playing import play
from zoo import Perceptron, classes_loss, vectors

from samestep.core.calls import Halted
from samestep.core.fakes import run_threads
from samestep.core.group import Solo
from samestep.core.randomness import seed_start
from samestep.core.snapshot import Snapshots
from samestep.core.worker import Wish
from samestep.loop.recipe import Keeping, Recipe
from samestep.loop.run import Run
from samestep.loop.session import Session
from samestep.loop.supervision import Supervision
from samestep.storage.checkpoint import steps_in


class Given:
    """Orders that stand from a moment on that each worker sees at another time."""

    def __init__(self, wish):
        self.wish = wish
        self.since = None
        self.num_reached = 0

    def pending(self):
        return self.wish if self.since else 0

    def reached(self):
        self.num_reached += 1


def trained(run, given=None, at=2):
    model = Perceptron()
    run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in run.steps(vectors(), batch_size=19, steps=6):
        for batch in step:
            if given is not None and step.number == at and run.worker.is_first:
                given.since = True
            step.backward(classes_loss(model, batch))
        step.update()
        if step.number == at and given is not None:
            assert run.once(lambda: 7) == 7
    return run.digest()


def halted_by(given, keeping, snapshots, size, at=2):
    def one(group):
        seed_start(0)
        session = Session(Recipe(replicas=4), keeping, group, Supervision(snapshots=snapshots, orders=given))
        run = Run(session)
        try:
            try:
                trained(run, given, at)
            except Exception as error:
                raise AssertionError("an order is no error") from error
        except Halted:
            with pytest.raises(Halted):
                run.once(lambda: 7)
            with pytest.raises(Halted):
                session.finish(None)
            return session.record.num_steps
        return None

    return run_threads(one, size)


@pytest.mark.parametrize("size", [1, 3])
def test_a_stop_finishes_the_step_and_writes_a_checkpoint(tmp_path, size):
    given = Given(Wish.STOP)
    assert halted_by(given, Keeping(checkpoint=str(tmp_path)), Snapshots(), size) == [3] * size
    assert given.num_reached == 1
    assert [path.name for path in steps_in(tmp_path)] == ["step-00000003"]
    undisturbed = functools.partial(trained, given=Given(0))
    resumed = play(undisturbed, 4, 2, keeping=Keeping(resume=str(tmp_path)))
    assert resumed.result == play(undisturbed, 4, 1).result


def test_a_stop_without_a_folder_leaves_too():
    assert halted_by(Given(Wish.STOP), Keeping(), None, 2) == [3, 3]


@pytest.mark.parametrize("size", [1, 3])
def test_to_scale_keeps_the_step_in_memory(tmp_path, size):
    snapshots = Snapshots()
    assert halted_by(Given(Wish.SCALE), Keeping(checkpoint=str(tmp_path)), snapshots, size) == [3] * size
    saved = snapshots.newest()
    assert saved is not None and saved.step == 3
    assert steps_in(tmp_path) == []


def test_a_run_that_is_scaled_after_its_last_step_still_writes_its_last_checkpoint(tmp_path):
    snapshots, keeping = Snapshots(), Keeping(checkpoint=str(tmp_path))
    assert halted_by(Given(Wish.SCALE), keeping, snapshots, 2, at=5) == [6, 6]
    assert steps_in(tmp_path) == []
    seed_start(0)
    session = Session(Recipe(replicas=4), keeping, Solo(), Supervision(snapshots=snapshots))
    session.finish(trained(Run(session), Given(0), at=5))
    assert [path.name for path in steps_in(tmp_path)] == ["step-00000006"]


def test_to_scale_without_memory_is_not_heard():
    assert halted_by(Given(Wish.SCALE), Keeping(), None, 2) == [None, None]


def test_a_stop_outranks_to_scale(tmp_path):
    keeping = Keeping(checkpoint=str(tmp_path))
    assert halted_by(Given(Wish.STOP | Wish.SCALE), keeping, Snapshots(), 2) == [3, 3]
    assert [path.name for path in steps_in(tmp_path)] == ["step-00000003"]
