"""Checkpoints of something else, damaged ones, and settings that clash: one clear error each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from playing import play
from refusing import made, refused, train
from torch import nn
from zoo import Convolutional, Perceptron, classes_loss, images

from samestep.errors import CheckpointError, MismatchError, SettingsError
from samestep.loop.recipe import Keeping, Recipe


def saved(tmp_path, replicas=4):
    def main(run):
        model = Convolutional()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        run.replicate(model, optimizer)
        train(run, model, data=images(), steps=4)

    play(main, replicas, 2, keeping=Keeping(checkpoint=str(tmp_path), every=2))
    return str(tmp_path / "step-00000002")


def test_checkpoints_of_something_else(tmp_path):
    keeping = Keeping(resume=saved(tmp_path))

    def script(make=Convolutional, optimizer=torch.optim.AdamW, data=None, steps=4, more=(), batch_size=19):
        def main(run):
            model = make()
            run.replicate(model, optimizer(model.parameters(), lr=1e-3), *more)
            for step in run.steps(data or images(), batch_size=batch_size, steps=steps):
                for batch in step:
                    step.backward(classes_loss(model, batch))
                step.update()

        return main

    class Wider(Convolutional):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(208, 7)

    class More(Convolutional):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(2, 2)

    def once_first(run):
        model = Convolutional()
        run.replicate(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        run.once(lambda: 1)

    fewer = tuple(c[:40] for c in images())
    settings = {"keeping": keeping}
    refused(MismatchError, ["replicas=4 there and 3 here"], script(), replicas=3, **settings)
    refused(MismatchError, ["seed=0 there and 7 here"], script(), seed=7, **settings)
    refused(MismatchError, [r"last\.(weight|bias)", r"\[5, 208\]|\[5\]"], script(Wider), **settings)
    refused(MismatchError, [r"more\.weight", "absent"], script(More), **settings)
    refused(MismatchError, ["AdamW", "SGD"], script(optimizer=torch.optim.SGD), **settings)
    scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    refused(MismatchError, ["0 other registered objects", "1"], script(more=[scheduler]), **settings)
    refused(MismatchError, ["samples=53 there and 40 here"], script(data=fewer), **settings)
    refused(MismatchError, ["batch_size=19 there and 18 here"], script(batch_size=18), **settings)
    refused(MismatchError, ["ended", "update|step-00000002"], script(steps=1), **settings)
    refused(MismatchError, [r"run\.once", r"run\.steps"], once_first, **settings)
    refused(CheckpointError, ["no checkpoint"], script(), keeping=Keeping(resume=str(tmp_path / "nowhere")))


def test_damaged_checkpoint_is_never_loaded(tmp_path):
    path = Path(saved(tmp_path))
    file = path / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    refused(CheckpointError, ["damaged"], lambda run: made(run), keeping=Keeping(resume=str(path)))


def test_states_that_cannot_be_saved(tmp_path):
    class Odd:
        def state_dict(self):
            return {"what": object()}

        def load_state_dict(self, state):
            pass

    def main(run):
        model = Perceptron()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), Odd())
        train(run, model)

    refused(CheckpointError, ["registered object", "object"], main, keeping=Keeping(checkpoint=str(tmp_path)))


def test_saving_elsewhere_does_not_keep_the_run_from_saving(tmp_path):
    def main(run):
        model, _ = made(run)
        train(run, model, after=lambda step: run.save(str(tmp_path / "mine" / str(step.number))))

    play(main, 4, 2, keeping=Keeping(checkpoint=str(tmp_path / "run"), every=1, keep=9))
    assert len(list((tmp_path / "run").glob("step-*"))) == 3


@pytest.mark.parametrize(
    "settings", [{"replicas": 0}, {"replicas": 2.5}, {"replicas": True}, {"threads": 0}, {"seed": 1.5}]
)
def test_recipes(settings):
    (name,) = settings
    with pytest.raises(SettingsError, match=f"{name}="):
        Recipe(**settings)


@pytest.mark.parametrize("settings", [{"every": 0, "checkpoint": "x"}, {"every": 3}])
def test_keeping(settings):
    with pytest.raises(SettingsError, match="every="):
        Keeping(**settings)
