"""The law: resumed at any step and on any number of workers = never stopped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import LOOPS, Counters, training
from playing import play
from zoo import MODELS, OPTIMIZERS, Convolutional, classes_loss, images, vectors

from samestep.loop.recipe import Keeping


def eventful(run) -> Any:
    """A script with state of its own: an EMA, early stopping, recorded results, several epochs by hand."""
    model = Convolutional()
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    run.replicate(model, average, optimizer, plateau)
    losses, best, bad = [], float("inf"), 0
    for _ in range(4):
        for step in run.steps(images(), batch_size=19, epochs=1):
            for batch in step:
                step.backward(classes_loss(model, batch))
                step.mean(drawn=torch.rand(()))
            step.update(clip_norm=1.0)
            with torch.no_grad():
                for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
                    ours.lerp_(theirs, 0.2)
            losses.append([step.loss, step.grad_norm, step.means["drawn"]])
            if step.number == 4:
                losses.append(run.once(lambda: {"words": "kept", "drawn": torch.rand(2)}))
        error = run.mean(lambda b: classes_loss(average, b), images(), batch_size=9)
        found = run.gather(lambda b: model(b[0]).argmax(1), images(), batch_size=9)
        plateau.step(error)
        losses.append([error, found.sum(), run.digest(), float(torch.rand(()))])
        best, bad = (error, 0) if error < best - 0.05 else (best, bad + 1)
        if bad > 1:
            break
    return losses, [p.detach().clone() for p in average.parameters()]


def adversarial(run) -> Any:
    return LOOPS["adversarial"].main(run)


def scaled(run) -> Any:
    return LOOPS["autocast_float16_scaled"].main(run)


def unknown(run) -> Any:
    return LOOPS["unknown_separable_optimizer"].main(run)


def coupled(run) -> Any:
    return LOOPS["unknown_coupled_optimizer"].main(run)


def rate_is_a_tensor(run) -> Any:
    return LOOPS["rate_is_a_tensor"].main(run)


def edited(run) -> Any:
    return LOOPS["edited"].main(run)


def two_data_sets(run) -> Any:
    """Shuffled and not, in turn, with a batch size that grows."""
    model = Counters()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    run.replicate(model, optimizer)
    told = []
    other = tuple(column[:23] for column in vectors())
    for _ in range(2):
        for data, shuffle in ((vectors(), True), (other, False)):
            for step in run.steps(data, batch_size=lambda n: 17 + n, epochs=1, shuffle=shuffle):
                for batch in step:
                    step.backward(classes_loss(model, batch))
                step.update()
                told.append(step.loss)
    return told


def assert_resumed_is_never_stopped(main, folder: Path, replicas: int, workers: list[int], stride: int = 1) -> None:
    """Hold the law: write a checkpoint after each step, go on from each."""
    expected = play(main, replicas, 1)
    kept = play(main, replicas, workers[0], keeping=Keeping(checkpoint=str(folder), every=1, keep=1000))
    assert kept.as_words() == expected.as_words(), "writing checkpoints changed the run"
    found = sorted(folder.glob("step-*"))
    assert len(found) == expected.steps
    for number, path in enumerate(found[::stride]):
        count = workers[number % len(workers)]
        resumed = play(main, replicas, count, keeping=Keeping(resume=str(path)))
        assert resumed.as_words() == expected.as_words(), f"resumed from {path.name} on {count} workers"


def broken_off(run) -> Any:
    """Leaves an epoch by break, right after an update, and begins the next."""
    model = Convolutional()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    run.replicate(model, optimizer)
    told = []
    for epoch in range(3):
        for step in run.steps(images(), batch_size=9, epochs=1):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update()
            told.append([step.number, step.epoch, step.loss])
            if step.number == 1 + 4 * epoch:
                break
        told.append(run.mean(lambda b: classes_loss(model, b), images(), batch_size=20))
    return told


def assert_broken_off_can_be_resumed(folder: Path) -> None:
    """No checkpoint is written by a step that was left by break; from all others the run goes on."""
    expected = play(broken_off, 4, 1)
    kept = play(broken_off, 4, 2, keeping=Keeping(checkpoint=str(folder), every=1, keep=1000))
    assert kept.as_words() == expected.as_words()
    found = sorted(folder.glob("step-*"))
    assert found
    for number, path in enumerate(found):
        resumed = play(broken_off, 4, 1 + number % 3, keeping=Keeping(resume=str(path)))
        assert resumed.as_words() == expected.as_words(), path.name


def test_left_by_break(tmp_path):
    assert_broken_off_can_be_resumed(tmp_path)


MAINS = {
    main.__name__: main
    for main in (eventful, adversarial, scaled, unknown, coupled, rate_is_a_tensor, edited, two_data_sets)
}


@pytest.mark.parametrize("main", MAINS)
def test_scripts(main, tmp_path):
    assert_resumed_is_never_stopped(MAINS[main], tmp_path, 5, [2, 1, 3])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_models_and_optimizers(model, optimizer, tmp_path):
    assert_resumed_is_never_stopped(training(model, optimizer), tmp_path, 4, [3, 2, 1])


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop"])
def test_every_state(name, tmp_path):
    def main(run):
        model = MODELS["odd"][0]()
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3)
        run.replicate(model, optimizer)
        told = []
        for step in run.steps(vectors(), batch_size=19, steps=3):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update()
            told.append(step.loss)
        return told

    assert_resumed_is_never_stopped(main, tmp_path, 3, [2, 1])


def saving(folder: str):
    """Return a script that saves where it likes: between an update and what follows it, and between epochs."""

    def main(run) -> Any:
        model = Convolutional()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        run.replicate(model, optimizer, decay)
        told = []
        for epoch in range(2):
            for step in run.steps(images(), batch_size=19, epochs=1):
                for batch in step:
                    step.backward(classes_loss(model, batch))
                step.update()
                if step.number in (1, 4):
                    run.save(f"{folder}/{step.number}")
                decay.step()
                told.append([step.loss, decay.get_last_lr()])
            told.append(run.mean(lambda b: classes_loss(model, b), images(), batch_size=9))
            run.save(f"{folder}/epoch{epoch}")
            told.append(float(torch.rand(())))
        return told

    return main


def test_saved_by_the_user(tmp_path):
    first = play(saving(str(tmp_path / "a")), 5, 2)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["1", "4", "epoch0", "epoch1"]
    for number, name in enumerate(("1", "4", "epoch0", "epoch1")):
        keeping = Keeping(resume=str(tmp_path / "a" / name))
        resumed = play(saving(str(tmp_path / f"from-{name}")), 5, 1 + number % 3, keeping=keeping)
        assert resumed.as_words() == first.as_words(), name


def test_resumed_twice(tmp_path):
    """A resumed run writes checkpoints that can be resumed from in turn."""
    expected = play(eventful, 5, 1)
    play(eventful, 5, 2, keeping=Keeping(checkpoint=str(tmp_path / "a"), every=2, keep=1000))
    first = sorted((tmp_path / "a").glob("step-*"))[1]
    keeping = Keeping(checkpoint=str(tmp_path / "b"), every=1, keep=1000, resume=str(first))
    assert play(eventful, 5, 3, keeping=keeping).as_words() == expected.as_words()
    for path in sorted((tmp_path / "b").glob("step-*"))[::3]:
        assert play(eventful, 5, 1, keeping=Keeping(resume=str(path))).as_words() == expected.as_words()


def test_weights_alone_load_into_plain_torch(tmp_path):
    from safetensors.torch import load_file

    def main(run):
        model = Convolutional()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.05))
        for step in run.steps(images(), batch_size=19, steps=2):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update()
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    trained = play(main, 4, 2, keeping=Keeping(checkpoint=str(tmp_path))).result
    (path,) = tmp_path.glob("step-*")
    plain = Convolutional()
    plain.load_state_dict(load_file(path / "weights.safetensors"))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, trained[name]), name


def test_loaded_without_going_back(tmp_path):
    """run.load takes weights and state, not the position."""

    def main(run):
        model = Convolutional()
        run.replicate(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
        told = []
        for step in run.steps(images(), batch_size=19, epochs=2):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update()
            if step.number == 1:
                run.save(str(tmp_path / f"workers-{run.worker.size}"))
                told.append(run.digest())
            if step.number == 3:
                run.load(str(tmp_path / f"workers-{run.worker.size}"))
                told.append(run.digest())
        return told

    played = [play(main, 4, workers) for workers in (1, 2)]
    assert played[0].as_words() == played[1].as_words()
    assert played[0].result[0] == played[0].result[1]
