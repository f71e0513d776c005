"""The law: arena = gloo = threads = alone, in real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from loops import LOOPS, training
from playing import Played, play, play_one

from samestep.loop.recipe import Keeping

MAINS = {
    **{name: loop.main for name, loop in LOOPS.items()},
    "perceptron-adamw": training("perceptron", "adamw"),
    "convolutional-sgd": training("convolutional", "sgd"),
    "transformer-adafactor": training("transformer", "adafactor"),
    "odd-adamw": training("odd", "adamw"),
}
RESUMED = ("convolutional-sgd", "transformer-adafactor", "unknown_separable_optimizer")


def plays(group, replicas: int) -> dict[str, str]:
    """Program of a worker: play every script in turn."""
    return {name: play_one(group, main, replicas).as_words() for name, main in MAINS.items()}


def saves_or_resumes(group, folder: str, resume: bool) -> dict[str, str]:
    """Program of a worker: play some scripts, and write checkpoints or go on from their second ones."""
    told = {}
    for name in RESUMED:
        here = Path(folder) / name
        keeping = Keeping(checkpoint=str(here), every=1, keep=1000)
        if resume:
            keeping = Keeping(resume=str(sorted(here.glob("step-*"))[1]))
        told[name] = play_one(group, MAINS[name], 5, keeping=keeping).as_words()
    return told


def returned(outcomes: list[dict]) -> list:
    for rank, outcome in enumerate(outcomes):
        assert "returned" in outcome, f"worker {rank}: {outcome.get('traceback', outcome)}"
        assert outcome["left"] == [], f"worker {rank} left something behind"
    return [outcome["returned"] for outcome in outcomes]


@pytest.fixture(scope="module")
def alone() -> dict[str, Played]:
    return {name: play(main, 5, 1).as_words() for name, main in MAINS.items()}


@pytest.mark.parametrize(
    ("kind", "size"),
    [("arena", 3), ("gloo", 3), *(pytest.param(kind, 2, marks=pytest.mark.long) for kind in ("arena", "gloo"))],
)
def test_processes_are_as_one_worker(fleet, alone, kind, size):
    for told in returned(fleet.outcomes(plays, kind, size, limit_seconds=240, replicas=5)):
        for name, words in told.items():
            assert words == alone[name], name


@pytest.mark.parametrize(("first", "second"), [("arena", "gloo"), ("gloo", "arena")])
def test_one_goes_on_where_another_stopped(fleet, alone, tmp_path, first, second):
    saved = returned(fleet.outcomes(saves_or_resumes, first, 2, folder=str(tmp_path), resume=False))
    resumed = returned(fleet.outcomes(saves_or_resumes, second, 3, folder=str(tmp_path), resume=True))
    for told in saved + resumed:
        assert told == {name: alone[name] for name in RESUMED}
