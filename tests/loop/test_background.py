"""Checkpoints beside training hold what those hold for which training waits, however slow their writer is."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest
import torch
from zoo import Perceptron, classes_loss, vectors

from samestep.core.fakes import run_threads
from samestep.core.group import Solo
from samestep.core.randomness import seed_start
from samestep.core.snapshot import Snapshots
from samestep.errors import CheckpointError, SettingsError
from samestep.loop import interval, keeper
from samestep.loop.recipe import Keeping, Recipe
from samestep.loop.run import Run
from samestep.loop.session import Session
from samestep.loop.supervision import Supervision
from samestep.measure.summary import rows
from samestep.settings.checkpoints import write_lent
from samestep.storage import checkpoint

STEPS = 12
DIGESTS = ("weights_digest", "optimizer_digest", "samples_digest")


class LateWriter:
    """A writer that begins `delay` steps after it was ordered to, in the calls of the first worker."""

    def __init__(self, delay=0):
        self.snapshots = Snapshots()
        self.delay = delay
        self.ordered = []
        self.answers = []
        self.fails_at = {}
        self._left = 0

    def write(self, order):
        self.ordered.append(order)
        self._left = self.delay
        self.step_passes()

    def step_passes(self):
        if self.snapshots.lender is not None and self._left == 0:
            order = self.ordered[-1]
            self.answers.append(self.fails_at.get(order["step"]) or write_lent(self.snapshots, order))
            self.snapshots.take_back()
        self._left -= 1

    def answer(self):
        return self.answers.pop() if self.answers else None

    def close(self):
        self.snapshots.close()


class Notes:
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)

    def progress(self, frame):
        pass

    def trace(self, frame):
        pass

    def recorded(self, num_calls):
        pass

    def caught_up(self):
        pass


@pytest.fixture
def writer():
    made = LateWriter()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def a_snapshot_in_every_step(monkeypatch):
    monkeypatch.setattr(keeper, "_SNAPSHOT_SECONDS", 0.0)
    monkeypatch.setattr(keeper, "_SNAPSHOT_SHARE", 0)


def train(keeping, workers=1, writer=None, steps=STEPS):
    """Train; return the facts and the notes of the first worker."""
    reporter = Notes()

    def main(run, is_first):
        model = Perceptron()
        run.replicate(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        for step in run.steps(vectors(), batch_size=19, steps=steps):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update()
            if writer is not None and is_first:
                writer.step_passes()
        # The real one is a process of its own.
        while writer is not None and is_first and writer.snapshots.lender is not None:
            writer.step_passes()

    def one(group):
        seed_start(0)
        ties = {"snapshots": writer.snapshots, "writer": writer} if writer is not None else {}
        session = Session(Recipe(replicas=4), keeping, group, Supervision(reporter=reporter, **ties))
        return session.finish(main(Run(session), group.worker.is_first))

    return (one(Solo()) if workers == 1 else run_threads(one, workers)[0]), reporter.notes


def beside(folder, every=3):
    return Keeping(checkpoint=str(folder), every=every, keep=99, async_checkpoints=True)


def steps_of(folder: Path) -> list[int]:
    return [checkpoint.read(path).step for path in checkpoint.steps_in(folder)]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("delay", [0, 2, 5])
def test_they_hold_the_same_bytes_and_resumed_is_never_stopped(tmp_path, writer, workers, delay):
    """A late writer begins when the snapshots that follow have been written to all the memory there is."""
    writer.delay = delay
    calm, _ = train(Keeping(checkpoint=str(tmp_path / "sync"), every=6, keep=99), workers)
    facts, notes = train(beside(tmp_path / "async", every=6), workers, writer)
    assert notes == [] and (facts["saves"], facts["saves_skipped"]) == (2, 0)
    assert [order["step"] for order in writer.ordered] == [6, 12]
    assert steps_of(tmp_path / "async") == steps_of(tmp_path / "sync") == [6, 12]
    for step in (6, 12):
        ours, theirs = (checkpoint.path_of(tmp_path / name, step) for name in ("async", "sync"))
        names = [checkpoint.WEIGHTS, checkpoint.STATE]
        assert filecmp.cmpfiles(ours, theirs, names, shallow=False)[0] == names
        resumed, _ = train(Keeping(resume=str(ours)), workers=3 - workers)
        assert [resumed[name] for name in DIGESTS] == [calm[name] for name in DIGESTS] == [facts[n] for n in DIGESTS]
        assert resumed["samples"] == calm["samples"], "what was read before it was resumed counts too"


def test_training_does_not_wait_for_a_slow_writer(tmp_path, writer):
    writer.delay = 5
    facts, _ = train(beside(tmp_path), writer=writer)
    # Ordered after step 3, written in step 9: what was due after 6 was skipped.
    assert [order["step"] for order in writer.ordered] == [3, 9]
    # The last one was due while that of step 9 was still on its way, so training waited for it.
    assert steps_of(tmp_path) == [3, 9, 12]
    assert (facts["saves"], facts["saves_failed"], facts["saves_skipped"]) == (3, 0, 2)
    assert dict(rows(facts))["checkpoints"] == "2 were due while the one before was still being written"


def test_a_step_that_was_skipped_is_made_up_for_before_the_next_is_due(tmp_path, writer):
    writer.delay = 6
    facts, _ = train(beside(tmp_path, every=5), writer=writer, steps=14)
    # Written in step 11, heard of after it, made up for after the next.
    assert [order["step"] for order in writer.ordered] == [5, 12]
    assert steps_of(tmp_path) == [5, 12, 14]
    assert facts["saves_skipped"] == 2, "those of steps 10 and 14"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fails_is_told_and_tried_again(tmp_path, writer, workers):
    writer.fails_at = {6: {"message": "It could not be written.", "reason": "No space (ENOSPC)"}}
    facts, (failed, again) = train(beside(tmp_path), workers, writer)
    assert steps_of(tmp_path) == [3, 9, 12]
    assert failed.startswith("SAVING FAILS. It could not be written.") and "(that of step 3)" in failed
    assert "Saving works again: the checkpoint of step 9" in again
    assert (facts["saves"], facts["saves_failed"], facts["saving_fails"]) == (4, 1, "")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_last_one_is_written_again_if_the_writer_failed(tmp_path, writer, workers):
    writer.fails_at = {12: {"message": "It could not be written.", "reason": "killed"}}
    facts, _ = train(beside(tmp_path), workers, writer)
    assert steps_of(tmp_path) == [3, 6, 9, 12]
    assert (facts["saves"], facts["saves_failed"], facts["saving_fails"]) == (5, 1, "")


def test_old_ones_that_cannot_be_deleted_are_told(tmp_path, writer):
    writer.fails_at = {6: {"step": 6, "trouble": ["An old checkpoint could not be deleted.", "busy"]}}
    _, (note,) = train(beside(tmp_path), writer=writer)
    assert note.startswith("An old checkpoint could not be deleted. The new one is good")


def test_another_runs_checkpoint_in_the_way_is_an_error(tmp_path, writer):
    train(beside(tmp_path), writer=writer, steps=3)
    checkpoint.write(tmp_path, step=6, weights={"x": torch.ones(3)}, state={}, facts={})
    keeping = Keeping(
        checkpoint=str(tmp_path), every=3, async_checkpoints=True, resume=str(checkpoint.path_of(tmp_path, 3))
    )
    with pytest.raises(CheckpointError, match="another run wrote it"):
        train(keeping, writer=writer)


def test_without_a_writer_training_waits_and_that_is_said_once(tmp_path):
    facts, (note,) = train(beside(tmp_path))
    assert "async_checkpoints has no effect here" in note
    assert steps_of(tmp_path) == [3, 6, 9, 12] and facts["saves"] == 4


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_so_many_seconds_apart(tmp_path, writer, workers, is_async, monkeypatch):
    """The clock of the first worker alone decides; here it says three times that the time has come."""
    passed = iter([False, False, True, False, True, True])
    monkeypatch.setattr(interval.Interval, "has_passed", lambda self: self._seconds == 90 and next(passed, False))
    keeping = Keeping(checkpoint=str(tmp_path), every="1.5m", keep=99, async_checkpoints=is_async)
    calm, _ = train(Keeping(), workers)
    facts, _ = train(keeping, workers, writer if is_async else None)
    wanted = [4, 6, 7, 12] if workers == 1 else steps_of(tmp_path)
    assert steps_of(tmp_path) == wanted and wanted[-1] == 12 and len(wanted) > 1
    assert facts["weights_digest"] == calm["weights_digest"]


def test_an_interval_passes_again_and_again(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(interval.time, "monotonic", lambda: now[0])
    made, never = interval.Interval(10), interval.Interval(None)
    seen = []
    for now[0] in (105, 110, 111, 119, 121, 145, 146, 155):
        seen.append(made.has_passed())
        assert not never.has_passed()
    assert seen == [False, True, False, False, True, True, False, True]


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("1.5m", 90), ("2h", 7200)])
def test_times(text, seconds):
    assert Keeping(checkpoint="x", every=text).every_seconds == seconds


@pytest.mark.parametrize("text", ["30", "0s", "s", "-1s", "10 m", "1d", "", 1.5])
def test_no_times(text):
    with pytest.raises(SettingsError, match=r"You set every=.*a whole number of steps.*'30s', '10m' or '2h'"):
        Keeping(checkpoint="x", every=text)
