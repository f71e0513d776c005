"""A disk that fails while a run trains: training goes on, the old checkpoint stays, it is told and counted."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from system_calls import ALLOCATES, CHANGES, intercepted, is_creating
from zoo import Perceptron, classes_loss, vectors

from samestep.core.fakes import run_threads
from samestep.core.group import Solo
from samestep.core.randomness import seed_start
from samestep.errors import CheckpointError, SettingsError
from samestep.loop.recipe import Keeping, Recipe
from samestep.loop.run import Run
from samestep.loop.session import Session
from samestep.loop.supervision import Supervision
from samestep.measure.summary import rows
from samestep.storage import checkpoint

CODES = ["ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES"]


class Disk:
    """A disk that fails with `code` while one is set."""

    def __init__(self):
        self.code = 0

    def __call__(self, name, real, args, kwargs):
        refused = ALLOCATES if self.code in (errno.ENOSPC, errno.EDQUOT) else CHANGES
        if self.code and (name in refused or is_creating(name, args)):
            raise OSError(self.code, os.strerror(self.code))
        return real(*args, **kwargs)


class Notes:
    """A reporter that keeps the notes."""

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


def train(keeping, workers=1, steps=8, before=lambda run, step: None, disk=None):
    """Train with a checkpoint after every step; return the facts and the notes of the first worker."""
    reporter = Notes()

    def main(run):
        model = Perceptron()
        run.replicate(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        for step in run.steps(vectors(), batch_size=19, steps=steps):
            before(run, step)
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update()

    def one(group):
        seed_start(0)
        session = Session(Recipe(replicas=4), keeping, group, Supervision(reporter=reporter))
        return session.finish(main(Run(session)))

    with intercepted(disk or Disk()):
        return (one(Solo()) if workers == 1 else run_threads(one, workers)[0]), reporter.notes


def steps_of(folder: Path) -> list[int]:
    return [checkpoint.read(path).step for path in checkpoint.steps_in(folder)]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("code", CODES)
def test_training_goes_on_and_tells_once(tmp_path, code, workers):
    """The checkpoints of steps 3 to 5 fail."""
    disk, seen = Disk(), []

    def before(run, step):
        disk.code = getattr(errno, code) if 2 <= step.number < 5 else 0
        if step.number == 4:
            seen.append(steps_of(tmp_path))

    expected, _ = train(Keeping(), workers)
    facts, notes = train(Keeping(checkpoint=str(tmp_path), every=1), workers, before=before, disk=disk)
    assert facts["weights_digest"] == expected["weights_digest"] and facts["samples_exactly_once"]
    assert seen[0] == [1, 2], "the old ones stay"
    assert steps_of(tmp_path) == [6, 7, 8]
    assert [name for name in os.listdir(tmp_path) if name.endswith(".tmp")] == []
    failed, again = notes
    assert f"{tmp_path}/step-00000003 could not be written" in failed and f"({code})" in failed
    assert "Training goes on" in failed and "(that of step 2)" in failed
    assert "Saving works again" in again and "step 6" in again and "3 of 6 saves failed" in again
    assert (facts["saves"], facts["saves_failed"], facts["saving_fails"]) == (8, 3, "")
    assert dict(rows(facts))["checkpoints"] == "3 of 8 saves failed; the last one worked"


def test_told_again_when_the_reason_changes(tmp_path):
    disk = Disk()
    codes = [0, errno.ENOSPC, errno.ENOSPC, errno.EIO, errno.EIO, 0, errno.EIO, errno.EIO]

    def before(run, step):
        disk.code = codes[step.number]

    facts, notes = train(Keeping(checkpoint=str(tmp_path), every=1), before=before, disk=disk)
    told = [next(word for word in ("ENOSPC", "EIO", "again") if word in note) for note in notes]
    assert told == ["ENOSPC", "EIO", "again", "EIO"]
    assert steps_of(tmp_path) == [1, 6]
    # The last save is tried again when the loop ends, and when main does.
    assert (facts["saves"], facts["saves_failed"]) == (10, 8)
    assert facts["saving_fails"] == f"{os.strerror(errno.EIO)} (EIO)"
    assert "8 of 10 saves FAILED, the last one too: Input/output error (EIO)" in dict(rows(facts))["checkpoints"]


def test_a_good_run_says_nothing(tmp_path):
    facts, notes = train(Keeping(checkpoint=str(tmp_path), every=1))
    assert notes == [] and (facts["saves"], facts["saves_failed"]) == (8, 0)
    assert "checkpoints" not in dict(rows(facts))


def test_resuming_after_failed_saves_is_never_stopped(tmp_path):
    """From the checkpoint before the fault, and from the one after it."""
    disk = Disk()

    def before(run, step):
        disk.code = errno.ENOSPC if 2 <= step.number < 5 else 0

    keeping = Keeping(checkpoint=str(tmp_path), every=1, keep=99)
    expected, _ = train(keeping, before=before, disk=disk)
    assert steps_of(tmp_path) == [1, 2, 6, 7, 8]
    for step in (2, 6):
        facts, _ = train(Keeping(resume=str(checkpoint.path_of(tmp_path, step))), workers=2)
        for name in ("weights_digest", "optimizer_digest", "samples_digest"):
            assert facts[name] == expected[name]


def test_a_failed_save_that_the_script_catches_is_caught_again_in_a_replay(tmp_path):
    folder, disk, caught = tmp_path / "run", Disk(), []

    def save_where_it_fails(run, step):
        if step.number == 3:
            disk.code = errno.ENOSPC
            try:
                run.save(str(tmp_path / "asked"))
            except CheckpointError as error:
                caught.append(str(error))
            disk.code = 0

    calm, _ = train(Keeping(), steps=8)
    train(Keeping(checkpoint=str(folder), every=1), steps=5, before=save_where_it_fails, disk=disk)
    disk.code = 0
    facts, _ = train(Keeping(resume=str(folder)), steps=8, before=save_where_it_fails, disk=disk)
    assert len(caught) == 2 and caught[0] == caught[1]
    assert facts["weights_digest"] == calm["weights_digest"]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_user_saves_raises(tmp_path, workers):
    disk = Disk()

    def before(run, step):
        if step.number == 2:
            disk.code = errno.ENOSPC
            run.save(str(tmp_path / "mine"))

    with pytest.raises(CheckpointError, match="mine/step-00000002 could not be written: No space left.*ENOSPC"):
        train(Keeping(checkpoint=str(tmp_path / "run"), every=1), workers, before=before, disk=disk)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("code", CODES)
def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_step(tmp_path, code, workers):
    disk, stepped = Disk(), []
    disk.code = getattr(errno, code)
    keeping = Keeping(checkpoint=str(tmp_path / "run"), every=1)
    with pytest.raises(SettingsError, match=rf"You set checkpoint='.*run'.*\({code}\).*Or name another folder"):
        train(keeping, workers, before=lambda run, step: stepped.append(step), disk=disk)
    assert not stepped
    # Nothing is in the way of the next try.
    assert train(keeping, workers)[0]["saves_failed"] == 0


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(SettingsError, match="You set checkpoint="):
        train(Keeping(checkpoint=str(tmp_path / "run")))
    assert (tmp_path / "run").read_text() == "mine"


def test_a_damaged_step_in_the_way(tmp_path):
    """It is never written over, and does not end the training."""
    train(Keeping(checkpoint=str(tmp_path), every=1, keep=99), steps=4)
    (tmp_path / "step-00000003" / "state.safetensors").write_bytes(b"")
    keeping = Keeping(checkpoint=str(tmp_path), every=1, keep=99, resume=str(tmp_path / "step-00000002"))
    facts, notes = train(keeping)
    assert facts["saves_failed"] == 1
    (failed,) = [note for note in notes if "SAVING FAILS" in note]
    assert f"Move {tmp_path}/step-00000003 away" in failed
    assert checkpoint.load_newest(tmp_path)[0].step == 8


def test_another_runs_checkpoint_in_the_way_is_an_error(tmp_path):
    train(Keeping(checkpoint=str(tmp_path), every=1, keep=99), steps=2)
    other = {"x": torch.ones(3)}
    checkpoint.write(tmp_path, step=3, weights=other, state={}, facts={})
    keeping = Keeping(checkpoint=str(tmp_path), every=1, keep=99, resume=str(tmp_path / "step-00000002"))
    with pytest.raises(CheckpointError, match="another run wrote it"):
        train(keeping)


@pytest.mark.parametrize("workers", [1, 2])
def test_old_checkpoints_that_cannot_be_deleted(tmp_path, workers, monkeypatch):
    """The new one is good; it is told once."""
    rename = os.rename

    def stuck(source, target):
        if Path(source).name.startswith("step-"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        rename(source, target)

    monkeypatch.setattr(os, "rename", stuck)
    facts, notes = train(Keeping(checkpoint=str(tmp_path), every=1), workers)
    (note,) = notes
    assert f"An old checkpoint in {tmp_path} could not be deleted: Permission denied (EACCES)" in note
    assert facts["saves_failed"] == 0 and steps_of(tmp_path) == list(range(1, 9))
