"""The campaigns against checkpoints find nothing, and each finds a fault that is planted. Long form: by hand."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import checkpoint_campaign as campaign
import pytest
from power_cut import Disk, Recorder
from system_calls import intercepted

from samestep.storage import checkpoint, checkpoint_file, tensor_file


def test_killed_before_and_after_each_system_call(tmp_path):
    """In a process of its own: it forks."""
    source = str(Path(checkpoint.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, campaign.__file__, "--parts", "kills"],
        env={**os.environ, "PYTHONPATH": source, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["wrong"] == 0 and seen["cases"] == sum(seen["points"].values()) > 150
    for name in ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir"):
        assert seen["points"][f"before-{name}"] and seen["points"][f"after-{name}"], name


def test_each_system_call_failing(tmp_path):
    cases, wrongs = campaign.failure_campaign(tmp_path, (errno.ENOSPC, errno.EIO))
    assert not wrongs, "\n".join(wrongs)
    assert cases > 200


def test_short_writes(tmp_path):
    cases, wrongs = campaign.short_campaign(tmp_path)
    assert not wrongs, "\n".join(wrongs)
    assert cases > 40


def test_files_cut_short_by_the_kernel(tmp_path):
    source = str(Path(checkpoint.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, campaign.__file__, "--parts", "limits"],
        env={**os.environ, "PYTHONPATH": source, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["cases"] > 12


def test_power_cuts(tmp_path):
    cases, wrongs = campaign.power_campaign(tmp_path, draws=4)
    assert not wrongs, "\n".join(wrongs)
    assert cases > 300


def test_the_recorder_of_power_cuts_misses_nothing(tmp_path):
    """Its model, played to the end with every change kept, is the folder that is there."""
    folder = campaign.folder_with(tmp_path / "run", 1, 2, 3)
    recorder = Recorder(folder)
    with intercepted(recorder):
        campaign.save_and_keep(folder, 4)
    (tmp_path / "left").mkdir()
    Disk(recorder, len(recorder.ops)).lay_out(tmp_path / "left", random.Random(0), 1.0)

    def content(root):
        return {str(p.relative_to(root)): p.is_file() and p.read_bytes() for p in root.rglob("*")}

    assert content(tmp_path / "left") == content(folder)
    assert {path.name for path in checkpoint.steps_in(folder)} == {f"step-0000000{step}" for step in (2, 3, 4)}


def test_damage(tmp_path):
    tally = campaign.damage_campaign(tmp_path, cases=500)
    assert not tally.wrongs, "\n".join(tally.wrongs)
    assert set(tally.cases) == {damage.__name__ for damage in campaign.DAMAGES}
    assert tally.found > 480 and sum(tally.unchanged.values()) < 20


# Planted faults: a campaign that lets one live is too weak.


@contextlib.contextmanager
def unsynced_file(path):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    yield lambda content: checkpoint_file._write_all(descriptor, content)
    os.close(descriptor)


@contextlib.contextmanager
def careless_file(path):
    """Believes that fsync always works."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    yield lambda content: checkpoint_file._write_all(descriptor, content)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def use_file(patch, file):
    patch.setattr(checkpoint, "new_file", file)
    patch.setattr(tensor_file, "new_file", file)


def write_in_place(patch):
    """Publishes first, and fills then."""
    real = checkpoint._fill

    def fill(temporary, step, *content):
        target = temporary.parent / f"step-{step:08d}"
        os.rename(temporary, target)
        real(target, step, *content)
        os.mkdir(temporary)

    patch.setattr(checkpoint, "_fill", fill)


POWER = {
    "folders are not synced": lambda p: p.setattr(checkpoint, "sync_folder", lambda folder: None),
    "files are not synced": lambda p: use_file(p, unsynced_file),
    "the new folder is not synced": lambda p: p.setattr(
        checkpoint, "sync_folder", lambda f: None if f.name.endswith(".tmp") else checkpoint_file.sync_folder(f)
    ),
    "the run's folder is not synced": lambda p: p.setattr(
        checkpoint, "sync_folder", lambda f: checkpoint_file.sync_folder(f) if f.name.endswith(".tmp") else None
    ),
}


@pytest.mark.parametrize("fault", POWER)
def test_power_cuts_find_a_missing_sync(tmp_path, monkeypatch, fault):
    POWER[fault](monkeypatch)
    assert campaign.power_campaign(tmp_path)[1]


def one_write(descriptor, content):
    os.write(descriptor, content)


def test_short_writes_find_a_writer_that_does_not_look(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_file, "_write_all", one_write)
    assert campaign.short_campaign(tmp_path)[1]


def test_failing_calls_find_a_writer_that_does_not_look(tmp_path, monkeypatch):
    use_file(monkeypatch, careless_file)
    assert campaign.failure_campaign(tmp_path, (errno.EIO,))[1]


def test_failing_calls_find_a_step_filled_in_place(tmp_path, monkeypatch):
    campaign.folder_with(tmp_path / "base", 1, 2, 3)
    monkeypatch.setattr(campaign, "folder_with", lambda folder, *steps: folder)
    write_in_place(monkeypatch)
    assert any("is torn" in wrong for wrong in campaign.failure_campaign(tmp_path, (errno.EIO,))[1])


BLIND = {
    "tensors": lambda p: p.setattr(tensor_file.TensorHasher, "digest", lambda self: "0" * 32),
    "facts": lambda p: p.setattr(checkpoint, "bytes_digest", lambda content: "0" * 32),
}


@pytest.mark.parametrize("fault", BLIND)
def test_damage_finds_a_reader_that_does_not_look(tmp_path, monkeypatch, fault):
    BLIND[fault](monkeypatch)
    tally = campaign.damage_campaign(tmp_path, cases=130)
    assert any("does not see it" in wrong for wrong in tally.wrongs)
