"""The laws of stale steps where workers share no memory: the same bits as one host's for the same schedule."""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import LOOPS
from playing import play, play_one, replaced
from refusing import made, train
from test_stale_steps import applied_twice, lags_in, recorded, uneven, with_agree
from zoo import Convolutional, classes_loss, images, vectors

from samestep.agree.maker import Maker, OwnersMaker
from samestep.agree.shelf import SentShelf, Shelf
from samestep.agree.stale import Stale
from samestep.agree.synchronous import Synchronous
from samestep.agree.versions import Versions
from samestep.loop.recipe import Keeping
from samestep.loop.run import Run

REPLICAS, BOUND = 5, 2


def eventful(agree: Any) -> Any:
    """A script with buffers, a scheduler, clipping, evaluations and an edit. All that it sees is its result."""

    def main(run: Run) -> Any:
        model = Convolutional()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        halve = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.8)
        run.replicate(model, optimizer, halve, agree=agree)
        told: list[Any] = []
        for _ in range(2):
            for step in run.steps(images(), batch_size=9, epochs=1):
                told.append(run.mean(lambda b: classes_loss(model, b), images(), 20) if step.number % 4 == 3 else None)
                for batch in step:
                    step.backward(classes_loss(model, batch))
                    step.mean(drawn=torch.rand(()))
                step.update(clip_norm=0.5 if step.number % 2 else math.inf)
                halve.step()
                told.append([step.loss, step.means["drawn"], step.grad_norm, run.digest()])
                if step.number == 3:
                    with run.edit():
                        model.inner.weight.mul_(0.9)
        return told, run.mean(lambda b: classes_loss(model, b), images(), 20)

    return main


LIKE_SYNCHRONOUS = {
    "eventful": eventful(None),
    **{
        name: LOOPS[name].main
        for name in ("transformed", "tokens_counted", "frozen_and_thawed", "edited", "more_replicas_than_samples")
    },
}
RECORDED = "frozen_and_thawed", "tokens_counted", "more_replicas_than_samples"
"""Some parameters have no gradient, shards weigh differently, or are empty."""


# ------------------------------------------------------------------------------------------------------------ laws


def plays(group, folder: str) -> dict[str, str]:
    """Program of a worker: what must come out as it does on one host; everything where there are two workers."""
    size = group.worker.size
    record = Stale(bound=BOUND, record=f"{folder}/record {size}")
    mains = {"stale": eventful(record)}
    if size == 2:
        mains["replayed"] = uneven(Stale(bound=BOUND, replay=f"{folder}/schedule 3 0"))
        mains |= {name: with_agree(main, Stale(bound=0)) for name, main in LIKE_SYNCHRONOUS.items()}
        for name in RECORDED:
            agree = Stale(bound=BOUND, scale="inverse", record=f"{folder}/record {name}")
            mains[f"stale {name}"] = with_agree(LOOPS[name].main, agree)
    return {name: play_one(group, main, REPLICAS).as_words() for name, main in mains.items()}


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """What it must come to, as one host plays it, and a folder with the schedules that this goes by."""
    folder = tmp_path_factory.mktemp("schedules")
    # After the edit that follows step 3, and after the first epoch, nothing is under way.
    lags = [[lag] * REPLICAS for lag in (0, 1, 2, 2, 0, 1, 0, 1, 2, 2, 2, 2)]
    head = {"format": "samestep schedule 1", "replicas": REPLICAS, "bound": BOUND}
    (folder / "constant").write_text("".join(json.dumps(line) + "\n" for line in (head, *lags)))
    stale = play(eventful(Stale(bound=BOUND, replay=str(folder / "constant"))), REPLICAS, 1)
    expected = {"stale": stale.as_words(), "replayed": recorded(folder, 3)[0].as_words()}
    for name, main in LIKE_SYNCHRONOUS.items():
        expected[name] = play(with_agree(main, Synchronous()), REPLICAS, 1).as_words()
    return folder, expected


@pytest.mark.parametrize("size", [1, 2, 3])
def test_bits_are_those_of_one_host(fleet, here, size):
    folder, expected = here[0], dict(here[1])
    for told in fleet.play(plays, "gloo", size, limit_seconds=120, folder=str(folder)):
        for name in RECORDED if size == 2 else ():
            agree = Stale(bound=BOUND, scale="inverse", replay=str(folder / f"record {name}"))
            expected[f"stale {name}"] = play(with_agree(LOOPS[name].main, agree), REPLICAS, 1).as_words()
        for name, words in told.items():
            assert words == expected[name], name
        assert lags_in(folder / f"record {size}") == lags_in(folder / "constant")


def plays_unevenly(group, bound: int, record: str) -> str:
    """Program of a worker: its two threads stop now and then, each at other places than in other workers."""
    chance = random.Random(group.worker.rank)

    def halting(owner: Any, name: str) -> Any:
        act = owner.__dict__[name]

        def halt() -> None:
            if chance.random() < 0.4:
                time.sleep(chance.random() * 5e-3)

        def halted(self: Any, *arguments: Any) -> Any:
            halt()
            result = act(self, *arguments)
            halt()
            return result

        return replaced(owner, name, halted)

    with halting(Maker, "make"), halting(SentShelf, "fold"), halting(Versions, "keep"), halting(Versions, "enter"):
        return play_one(group, eventful(Stale(bound=bound, record=record)), REPLICAS).as_words()


@pytest.mark.parametrize(("size", "bound"), [(3, 1), (2, 4)])
def test_nobodys_pace_changes_the_result(fleet, tmp_path, size, bound):
    path = str(tmp_path / "schedule")
    told = fleet.play(plays_unevenly, "gloo", size, bound=bound, record=path)
    assert told == [play(eventful(Stale(bound=bound, replay=path)), REPLICAS, 1).as_words()] * size


def saves_or_resumes(group, folder: str, resume: str) -> str:
    keeping = Keeping(resume=resume) if resume else Keeping(checkpoint=folder, every=4, keep=100)
    return play_one(group, eventful(Stale(bound=BOUND)), REPLICAS, keeping=keeping).as_words()


def test_resumed_is_never_stopped(fleet, here, tmp_path):
    """Neither on other hosts, nor from what one host has saved."""
    folder, expected = here
    sent, shared = tmp_path / "sent", tmp_path / "shared"
    told = fleet.play(saves_or_resumes, "gloo", 2, folder=str(sent), resume="")
    replay = Stale(bound=BOUND, replay=str(folder / "constant"))
    play(eventful(replay), REPLICAS, 1, keeping=Keeping(checkpoint=str(shared), every=5, keep=100))
    # Two updates before each of these were made since the script rested.
    for size, path in ((3, next(sent.glob("step-*8"))), (2, next(shared.glob("step-*10")))):
        told += fleet.play(saves_or_resumes, "gloo", size, folder="", resume=str(path))
    assert set(told) == {expected["stale"]}


def goes_on(group) -> list[int]:
    """Program of a worker: its update 0 is not made before the script has come back from `bound` updates."""
    told: list[int] = []
    may_be_made = threading.Event()
    make = OwnersMaker.make

    def held(self: Any, *update: Any) -> Any:
        may_be_made.wait()
        return make(self, *update)

    def look(step: Any) -> None:
        told.append(run_of[0]._session.agreed.board.committed)
        if step.number == BOUND - 1:
            may_be_made.set()

    run_of: list[Run] = []

    def main(run: Run) -> None:
        run_of.append(run)
        model, _ = made(run, agree=Stale(bound=BOUND))
        train(run, model, after=look, steps=BOUND + 2)

    with replaced(Maker, "make", held):
        play_one(group, main, 4)
    return told


def test_the_script_goes_on_before_the_update_is_made(fleet):
    for told in fleet.play(goes_on, "gloo", 2):
        assert told[:BOUND] == [0] * BOUND
        assert all(committed > number - BOUND for number, committed in enumerate(told)), "a worker ran too far ahead"


# ---------------------------------------------------------------------------------------------------------- errors


def ends_badly(group, how: str) -> None:
    """Program of a worker: something goes wrong in step 3, in the last worker only where that can be."""
    is_last = group.worker.rank == group.worker.size - 1

    def main(run: Run) -> None:
        model, optimizer = made(run, agree=Stale(bound=BOUND))

        def strike(step: Any, batch: Any, loss: torch.Tensor) -> torch.Tensor:
            if step.number == 3 and is_last and how == "death":
                os._exit(7)
            if step.number == 3 and is_last and how == "error":
                raise ZeroDivisionError("mine")
            if step.number == 3 and is_last and how == "settings":
                optimizer.param_groups[0]["lr"] = 0.5
            return loss * (math.nan if step.number == 3 and step.replica == 1 and how == "nan" else 1.0)

        train(run, model, inside=strike, steps=9)

    play_one(group, main, 4)


def test_a_lost_worker_ends_the_others(fleet):
    for how in ("death", "error"):
        first, last = fleet.outcomes(ends_badly, "gloo", 2, how=how)
        assert first.get("raised", [])[:1] == ["PeerError"], first
        assert first["left"] == [], "a thread or a socket is left"
        assert last.get("exit") == 7 if how == "death" else last["raised"][0] == "ZeroDivisionError"


def test_errors_are_the_same_on_all(fleet):
    for how, error, words in (
        ("nan", "NonFiniteError", "step 3, replica 1"),
        ("settings", "MismatchError", "worker 1 updates with other settings of SGD"),
    ):
        outcomes = fleet.outcomes(ends_badly, "gloo", 2, how=how)
        assert [o.get("raised", [""])[0] for o in outcomes] == [error] * 2, outcomes
        assert all(words in o["message"] and o["left"] == [] for o in outcomes), outcomes


def skips(group) -> list[int]:
    def main(run: Run) -> list[int]:
        model, _ = made(run, agree=Stale(bound=BOUND), nonfinite="skip")
        skipped: list[int] = []
        for step in run.steps(vectors(), batch_size=19, steps=8):
            for batch in step:
                bad = step.number == 3 and step.replica == 1
                step.backward(classes_loss(model, batch) * (math.nan if bad else 1.0))
            step.update()
            skipped += [step.number] if step.skipped else []
        return skipped

    return play_one(group, main, 4).result


def test_an_update_that_is_not_finite_is_skipped_by_all(fleet):
    assert fleet.play(skips, "gloo", 2) == [[3 + BOUND]] * 2


class Spoiled:
    """Vectors of which some cannot be read."""

    def __len__(self) -> int:
        return 53

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index in (7, 30, 41):
            raise OSError(f"sector {index}")
        return vectors()[0][index], vectors()[1][index]


def leaves_out(group, allowed: Any) -> list[Any]:
    def main(run: Run) -> list[Any]:
        model, _ = made(run, agree=Stale(bound=BOUND), on_bad_sample=allowed)
        bad: list[Any] = []
        for step in run.steps(Spoiled(), batch_size=9, epochs=1):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update()
            bad += list(step.bad_samples)
        return [bad, run.digest()]

    return play_one(group, main, 4).result


def test_bad_samples_are_left_out_as_far_as_allowed(fleet):
    told = fleet.play(leaves_out, "gloo", 2, allowed="skip") + fleet.play(leaves_out, "gloo", 3, allowed=3)
    assert told == [told[0]] * 5 and told[0][0]
    for outcome in fleet.outcomes(leaves_out, "gloo", 2, allowed=2):
        assert outcome["raised"][0] == "DataError" and "3 samples of your data" in outcome["message"], outcome
        assert outcome["left"] == []


def transforms(group) -> None:
    def main(run: Run) -> None:
        model, _ = made(run, agree=Stale(bound=BOUND))
        for step in run.steps(vectors(), batch_size=19, steps=2):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update(transform=lambda name, gradient: gradient)

    play_one(group, main, 4)


def keeps_state_of_replicas(group) -> None:
    def main(run: Run) -> None:
        made(run, agree=Stale(bound=BOUND))
        run.per_replica(lambda replica: {"hidden": torch.zeros(1)})

    play_one(group, main, 4)


def test_refused(fleet):
    for program, words in ((transforms, "transform"), (keeps_state_of_replicas, "steps overlap")):
        (outcome,) = fleet.outcomes(program, "gloo", 1)
        assert outcome["raised"][0] == "UsageError" and words in outcome["message"], outcome


# -------------------------------------------------------------------------------------------------- planted faults


def too_new_a_version():
    point = Versions.point
    return replaced(Versions, "point", lambda self, version: point(self, version + 1))


def sums_are_not_sent():
    return replaced(SentShelf, "fold", Shelf.fold)


def buffers_are_not_sent():
    return replaced(Versions, "_gather", lambda self, number: None)


def weights_are_not_sent():
    def alone(self, reduced):
        self._trained.update.apply(self._trained.sums, reduced.absent, reduced.factor)
        self._trained.update.notice()

    return replaced(OwnersMaker, "_apply", alone)


def settings_of_the_start():
    class Now:
        def __init__(self, *asked: Any): ...
        def __enter__(self) -> None: ...
        def __exit__(self, *error: Any) -> None: ...

    return replaced(Maker, "_settings", Now)


FAULTS = {
    fault.__name__: fault
    for fault in (
        applied_twice,
        too_new_a_version,
        sums_are_not_sent,
        buffers_are_not_sent,
        weights_are_not_sent,
        settings_of_the_start,
    )
}


def plays_with(group, fault: str) -> str:
    """Program of a worker: play, with a fault planted, or none."""
    if not fault:
        return play_one(group, eventful(Stale(bound=BOUND)), REPLICAS).as_words()
    with FAULTS[fault]():
        return play_one(group, eventful(Stale(bound=BOUND)), REPLICAS).as_words()


@pytest.fixture(scope="module")
def sound(fleet) -> list[str]:
    return fleet.play(plays_with, "gloo", 2, fault="")


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fleet, sound, fault):
    outcomes = fleet.outcomes(plays_with, "gloo", 2, fault=fault)
    for outcome in outcomes:
        # Workers whose weights differ in the end say so.
        words = outcome.get("returned", outcome.get("message"))
        assert words is not None and words != sound[0], outcome
