"""The law: replicas may move from worker to worker after any step, and no bit changes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import LOOPS, training
from playing import play, play_one, replaced
from restless import restless
from test_groups_alike import returned
from test_resume import eventful
from zoo import Convolutional, Perceptron, classes_loss, images, vectors

import samestep.loop.balance as balance_module
import samestep.loop.crew as crew_module
from samestep.core.buffers import Buffers
from samestep.core.division import Division
from samestep.core.group import Group, Solo
from samestep.core.model import Model, Options, Trained
from samestep.core.randomness import seed_start
from samestep.loop.crew import Crew
from samestep.loop.recipe import Keeping, Recipe
from samestep.loop.run import Run
from samestep.loop.session import Session


def read_ahead(run: Run) -> Any:
    """Loaders read ahead what falls to another worker by the time it is played."""
    model = Convolutional()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run.replicate(model, optimizer)
    told = []
    for step in run.steps(images(), batch_size=11, steps=5, loaders=1):
        for batch in step:
            step.backward(classes_loss(model, batch))
            step.mean(drawn=torch.rand(()))
        step.update()
        told.append([step.loss, step.means, run.digest()])
    return told


MAINS = {
    "eventful": eventful,
    "adversarial": LOOPS["adversarial"].main,
    "clipped": LOOPS["clipped"].main,
    "unknown": LOOPS["unknown_separable_optimizer"].main,
    "transformer": training("transformer", "adafactor", epochs=2),
    "read ahead": read_ahead,
}


@pytest.mark.parametrize(("name", "workers"), [*((name, 3) for name in MAINS if name != "read ahead"), ("clipped", 5)])
def test_moves_change_no_bit(name, workers):
    calm = play(MAINS[name], 8, 1)
    with restless() as balances:
        moved = play(MAINS[name], 8, workers)
    assert all(balance.moves for balance in balances) and len(balances) == workers
    assert moved.as_words() == calm.as_words()


def test_as_many_workers_as_replicas_leave_nothing_to_move():
    with restless() as balances:
        play(MAINS["clipped"], 3, 3)
    assert not any(balance.moves for balance in balances)


def test_a_moved_run_resumes(tmp_path):
    calm = play(eventful, 8, 1).as_words()
    with restless() as balances:
        assert play(eventful, 8, 3, keeping=Keeping(checkpoint=str(tmp_path), every=1, keep=1000)).as_words() == calm
        assert play(eventful, 8, 2, keeping=Keeping(resume=str(_nth(tmp_path, 4)))).as_words() == calm
    assert all(balance.moves for balance in balances)
    assert play(eventful, 8, 1, keeping=Keeping(resume=str(_nth(tmp_path, 5)))).as_words() == calm


def _nth(folder: Path, number: int) -> Path:
    return sorted(folder.glob("step-*"))[number]


# ------------------------------------------------------------------------------------------------ planted faults


def nothing(*args: Any, **settings: Any) -> None:
    """Stand in for a method."""


@contextmanager
def gradients_stay() -> Iterator[None]:
    with replaced(Trained, "divide", nothing):
        yield


@contextmanager
def buffers_stay() -> Iterator[None]:
    """The first division is right, the later ones do not count."""
    old = Buffers.reseat

    def reseat(self, division):
        if not hasattr(self, "_runs"):
            old(self, division)

    with replaced(Buffers, "reseat", reseat):
        yield


@contextmanager
def reading_stays() -> Iterator[None]:
    """What was read ahead is played, whoever should play it now."""
    Crew.num_regroups = property(lambda self: 0, nothing)
    try:
        yield
    finally:
        del Crew.num_regroups


FAULTS = {made.__name__: made for made in (gradients_stay, buffers_stay, reading_stays)}


def plays(group: Group, names: list[str], fault: str) -> dict[str, str]:
    """Program of a worker: play scripts while replicas move, with a fault planted or without."""
    with restless() as balances, FAULTS.get(fault, nullcontext)():
        told = {name: play_one(group, MAINS[name], 5).as_words() for name in names}
    assert all(balance.moves for balance in balances)
    return told


@pytest.fixture(scope="module")
def alone() -> dict[str, str]:
    return {name: play(MAINS[name], 5, 1).as_words() for name in ("eventful", "read ahead", "transformer")}


@pytest.mark.parametrize(("kind", "names"), [("arena", ["read ahead"]), ("gloo", ["eventful", "transformer"])])
def test_moves_in_processes(fleet, alone, kind, names):
    for told in returned(fleet.outcomes(plays, kind, 3, limit_seconds=240, names=names, fault="")):
        assert told == {name: alone[name] for name in names}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fleet, alone, fault):
    outcomes = fleet.outcomes(plays, "gloo", 2, limit_seconds=240, names=["eventful"], fault=fault)
    assert any(outcome.get("returned") != {"eventful": alone["eventful"]} for outcome in outcomes)


# ------------------------------------------------------------------------------------------------ a slow worker


def with_a_slow_worker(group: Group, num_steps: int | None) -> dict[str, Any]:
    """Program of a worker: the second one sleeps in each shard; go on until replicas have moved, or so many steps."""
    seed_start(0)
    session = Session(Recipe(replicas=6), Keeping(), group)
    run = Run(session)
    model = Perceptron()
    run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    moves = session.crew.balance.moves
    with replaced(balance_module, "_SECONDS", 0.0):
        for step in run.steps(vectors(), batch_size=18, steps=num_steps or 4000):
            for batch in step:
                time.sleep(0.02 if run.worker.rank == 1 else 0)
                step.backward(classes_loss(model, batch))
            step.update()
            # All weigh the same numbers, so this is the same on every worker.
            if moves and moves[0].seconds_since:
                break
    facts = session.finish(None)
    return {key: facts[key] for key in ("steps", "weights_digest", "moves")}


@pytest.mark.parametrize("kind", ["arena", "gloo"])
def test_replicas_move_away_from_a_slow_worker(fleet, kind):
    first, second = returned(fleet.outcomes(with_a_slow_worker, kind, 2, limit_seconds=240, num_steps=None))
    assert first["weights_digest"] == with_a_slow_worker(Solo(), first["steps"])["weights_digest"]
    move = first["moves"][0]
    assert (move["step"], move["replicas_before"]) == (second["moves"][0]["step"], [3, 3])
    assert move["step"] >= 32
    assert move["replicas_after"][1] < 3
    assert "from worker 1" in move["words"]
    assert move["time_since"] is not None


def test_nothing_moves_without_room():
    with restless() as balances, replaced(crew_module, "free_bytes", lambda device: 1000):
        play(MAINS["clipped"], 8, 3)
    assert not any(balance.moves for balance in balances)


def gradient_bytes(group: Group) -> list[list[int]]:
    """Program of a worker: for some divisions, the memory that is foreseen for gradients, and what they take of it."""
    model = torch.nn.Linear(300, 100)
    replicated = Model([model, torch.optim.SGD(model.parameters(), lr=0.1)], group, Options(num_replicas=8))
    told = []
    for counts in ((2, 3, 3), (1, 1, 6), (3, 3, 2), (5, 2, 1)):
        replicated.divide(Division(counts))
        area = replicated.trained[0].area
        received = [node for rank, nodes in enumerate(area.nodes) if rank != group.worker.rank for node in nodes]
        taken = sum(memory.numel() for memory in [*area.mine, *([] if group.shares_memory else received)])
        told.append([replicated.gradient_bytes(Division(counts))[group.worker.rank], taken])
    return told


@pytest.mark.parametrize("kind", ["arena", "gloo"])
def test_memory_that_a_move_takes_is_known_before(fleet, kind):
    """Else it could run out."""
    workers = returned(fleet.outcomes(gradient_bytes, kind, 3))
    for told in zip(*workers, strict=True):
        foreseen, taken = zip(*told, strict=True)
        if kind == "arena":
            # They share memory, so each foresees what all take.
            foreseen, taken = foreseen[:1], (sum(taken),)
        assert all(f >= t > f / 4 for f, t in zip(foreseen, taken, strict=True)), told
