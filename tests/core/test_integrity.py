"""Memory that changes between two updates is found, named and told apart from what the script does."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from samestep.agree.synchronous import Synchronous
from samestep.core import integrity as integrity_module
from samestep.core.calls import Calls
from samestep.core.clock import Clock
from samestep.core.fakes import run_threads
from samestep.core.group import Solo
from samestep.core.integrity import _Memory, fold
from samestep.core.model import Model, Options
from samestep.core.worker import Wish
from samestep.errors import EditedWeightsError, IntegrityError
from samestep.loop.archive import Archive
from samestep.loop.recipe import Keeping, Recipe
from samestep.loop.run import Run
from samestep.loop.session import Session


@pytest.fixture(autouse=True)
def every_update(monkeypatch):
    monkeypatch.setattr(integrity_module, "_SHARE", 0)


@pytest.mark.parametrize("bit", range(64))
def test_every_flipped_bit_changes_the_fold(bit):
    words = np.random.default_rng(bit).integers(-(2**63), 2**63 - 1, 1_000)
    before = fold(words)
    words.view(np.uint64)[bit * 7] ^= np.uint64(1 << bit)
    assert fold(words) != before
    assert integrity_module._is_bit(fold(words) - before)


def test_what_a_write_leaves_is_no_bit():
    draw = random.Random(0)
    assert not any(integrity_module._is_bit(draw.getrandbits(62) * 6 + 3) for _ in range(1_000))
    assert not integrity_module._is_bit(0)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_every_word_is_looked_at_by_one_worker_and_named(size):
    memory = torch.zeros(64 * 20, dtype=torch.uint8)
    names = {0: "a", 64: "b", 64 * 9: "c", 64 * 19: "d"}
    parts = [_Memory(memory, names, rank, size) for rank in range(size)]
    for part in parts:
        part.take()
    for byte in range(0, len(memory), 8):
        memory[byte + 3] ^= 16
        found = [finding for part in parts for finding in part.changes()]
        assert found == [[names[max(start for start in names if start <= byte)], True]]
        memory[byte + 3] ^= 16
    assert not any(part.changes() for part in parts)


def made(wanted=True):
    module = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    optimizer = torch.optim.Adam(module.parameters())
    group, clock = Solo(), Clock()
    calls = Calls(group, clock)
    model = Model([module, optimizer], group, Options(num_replicas=1, verifies=wanted))
    Synchronous().bind(model, group, calls, clock)
    model.integrity.watch()
    return module, model.integrity, calls


def flip(tensor, element=3, bit=12):
    tensor.detach().view(torch.int32).numpy().reshape(-1)[element] ^= 1 << bit


def test_a_flip_comes_again_until_the_run_ends():
    module, integrity, calls = made()
    assert integrity.verify(calls, "test", "now")
    withdrawn = []
    integrity.withdraw_if_damaged(lambda: withdrawn.append(1))
    flip(module[1].weight)
    with pytest.raises(IntegrityError, match=r"A bit of the parameter '1\.weight' flipped.*worker 0 found it now"):
        integrity.verify(calls, "test", "now")
    assert withdrawn == [1]
    with pytest.raises(IntegrityError):
        calls.meet("anything", "")


def test_what_was_kept_before_the_folds_is_not_withdrawn():
    module, integrity, calls = made()
    withdrawn = []
    integrity.withdraw_if_damaged(lambda: withdrawn.append(1))
    integrity.watch()
    flip(module[1].weight)
    with pytest.raises(IntegrityError):
        integrity.verify(calls, "test", "now")
    assert not withdrawn


def test_an_edit_is_told_as_one():
    module, integrity, calls = made()
    module[0].weight.data.mul_(3.0)
    with pytest.raises(EditedWeightsError, match=r"'0\.weight'.*run\.edit"):
        integrity.verify(calls, "test", "now")


def test_a_write_that_the_guard_does_not_see_is_told_as_one():
    module, integrity, calls = made()
    flip(module[0].weight, 1, 3)
    flip(module[0].weight, 1, 4)
    flip(module[1].weight, 1, 9)
    with pytest.raises(IntegrityError, match=r"overwritten: the parameter '0\.weight' and 1 more.*NumPy"):
        integrity.verify(calls, "test", "now")


def test_switched_off_it_sees_nothing():
    module, integrity, calls = made(wanted=False)
    flip(module[1].weight)
    assert not integrity.verify(calls, "test", "now") and not integrity.is_due


@pytest.mark.parametrize("kind", ["element", "whole"])
@pytest.mark.parametrize("size", [1, 2])
def test_edits_of_the_state_by_the_script_are_its_own(kind, size):
    def play(group):
        session = Session(Recipe(replicas=2), Keeping(), group)
        run = Run(session)
        module = nn.Linear(6, 3)
        nn.init.constant_(module.weight, 0.5), nn.init.zeros_(module.bias)
        made = torch.optim.Adam if kind == "element" else torch.optim.Adafactor
        optimizer = made(module.parameters())
        run.replicate(module, optimizer)
        x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
        for step in run.steps((x,), 4, epochs=3):
            for (a,) in step:
                step.backward(module(a).square().mean())
            step.update()
            if step.number == 4:
                for state in optimizer.state.values():
                    for value in state.values():
                        value.zero_()
            if step.number == 6:
                optimizer.load_state_dict(optimizer.state_dict())
        facts = session.finish(None)
        return facts["updates"], facts["updates_verified"]

    for counts in run_threads(play, size):
        assert counts == (9, 9)


def train(tmp_path, on_step):
    """Train for 10 steps with a checkpoint after every third; call `on_step(step, module)` after each update."""
    session = Session(Recipe(replicas=2), Keeping(checkpoint=str(tmp_path), every=3), Solo())
    run = Run(session)
    module = nn.Linear(6, 3)
    run.replicate(module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9))
    for step in run.steps((torch.ones(40, 6),), 4, epochs=1):
        for (a,) in step:
            step.backward(module(a).square().mean())
        step.update()
        on_step(step.number, module)
    return session.finish(None)


def names(folder):
    return sorted(
        path.name.rpartition("-")[0] if "damaged" in path.name else path.name for path in folder.glob("*step-*")
    )


def test_a_checkpoint_is_looked_at_before_whatever_it_costs(tmp_path, monkeypatch):
    monkeypatch.setattr(integrity_module, "_SHARE", 1e9)
    with pytest.raises(IntegrityError, match="'weight' flipped in memory; worker 0 found it before the checkpoint of"):
        train(tmp_path, lambda step, module: flip(module.weight) if step == 5 else None)
    assert names(tmp_path) == ["step-00000003"]


def test_a_checkpoint_during_which_a_bit_flipped_is_set_aside(tmp_path, monkeypatch):
    save = Archive.save

    def flips(self, folder, step, *rest):
        if step == 6:
            flip(self._model.trained[0].weights.parameters[0])
        return save(self, folder, step, *rest)

    monkeypatch.setattr(Archive, "save", flips)
    with pytest.raises(IntegrityError, match="before the update of step 6"):
        train(tmp_path, lambda step, module: None)
    assert names(tmp_path) == ["damaged-step-00000006", "step-00000003"]


def test_without_a_flip_every_update_is_verified(tmp_path):
    facts = train(tmp_path, lambda step, module: None)
    assert (facts["updates"], facts["updates_verified"]) == (10, 10)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (6, 9, 10)]


def test_the_cost_decides_when_the_next_is_due(monkeypatch):
    _, integrity, calls = made()
    assert integrity.is_due, "what one costs is not known yet"
    integrity.verify(calls, "test", "now")
    integrity.updated(False)
    assert integrity.is_due and not integrity.is_watching, "there was none before"
    monkeypatch.setattr(integrity_module, "_SHARE", 1e9)
    integrity.watch()
    assert not integrity.is_due, "the one on its way is to be paid first"
    integrity.verify(calls, "test", "now")
    integrity.updated(False)
    assert not integrity.is_due and not integrity.is_watching
    integrity.insists = True
    integrity.updated(False)
    assert integrity.is_watching
    assert Wish.VERIFY not in (Wish.SNAPSHOT, Wish.STOP, Wish.SCALE)
