"""The laws of stale steps: a function of recipe and schedule, every gradient applied once, nobody too far ahead."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loops import LOOPS
from playing import Played, play, replaced
from refusing import made, refused, train
from test_resume import assert_resumed_is_never_stopped
from zoo import Convolutional, Perceptron, classes_loss, images, vectors

import samestep.agree.maker as maker
import samestep.agree.pipeline as pipeline
import samestep.agree.schedule as schedule
import samestep.agree.versions as versions
from samestep.agree.board import Board
from samestep.agree.stale import Stale
from samestep.agree.synchronous import Synchronous
from samestep.core import tree
from samestep.core.anyone_update import AnyoneUpdate
from samestep.core.element_update import ElementUpdate
from samestep.core.worker import Worker
from samestep.errors import EditedWeightsError, MismatchError, NonFiniteError, SettingsError, UsageError
from samestep.loop.recipe import Keeping
from samestep.loop.run import Run

REPLICAS = 5
BOUND = 2


def pause(run: Run, chance: random.Random) -> None:
    """Let the other workers go on for some turns, as a worker does that is slow."""
    turns = iter([False] * chance.choice((0, 0, 2 * run.worker.rank)) + [True])
    if run.worker.size > 1 and run._session.group.shares_memory:
        run._session.group.wait_until(lambda: next(turns))


def uneven(agree: Any, seed: int = 0, seen: dict | None = None) -> Any:
    """A script whose workers come to their shards in another order with each seed. All that it sees is its result."""

    def main(run: Run) -> Any:
        chance = random.Random(f"{seed} {run.worker.rank}")
        model = Convolutional()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        halve = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.8)
        run.replicate(model, optimizer, halve, agree=agree)
        told: list[Any] = []
        for step in run.steps(images(), batch_size=17, epochs=2):
            told.append(run.mean(lambda b: classes_loss(model, b), images(), 20) if step.number % 4 == 3 else None)
            for batch in step:
                pause(run, chance)
                step.backward(classes_loss(model, batch))
                step.mean(drawn=torch.rand(()))
                if seen is not None:
                    seen[step.number, step._replica] = batch
            step.update(clip_norm=0.5 if step.number % 2 else math.inf)
            halve.step()
            told.append([step.loss, step.means["drawn"], step.grad_norm, run.digest()])
        return told, run.mean(lambda b: classes_loss(model, b), images(), 20)

    return main


def lags_in(path: Path) -> list[list[int]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def recorded(folder: Path, workers: int, seed: int = 0) -> tuple[Played, Path]:
    """Play with few rules, and note the schedule."""
    path = folder / f"schedule {workers} {seed}"
    return play(uneven(Stale(bound=BOUND, record=str(path)), seed), REPLICAS, workers), path


# ------------------------------------------------------------------------------------------------------------ laws


def with_agree(main: Any, agree: Any) -> Any:
    """Return a script that replicates under another way to agree."""

    def other(run: Run) -> Any:
        replicate = run.replicate
        run.replicate = lambda *things, **settings: replicate(*things, **{**settings, "agree": agree})  # type: ignore
        return main(run)

    return other


LIKE_SYNCHRONOUS = {
    "uneven": uneven(None),
    **{
        name: LOOPS[name].main
        for name in ("transformed", "tokens_counted", "frozen_and_thawed", "edited", "more_replicas_than_samples")
    },
}


def assert_like_synchronous(main: Any) -> None:
    expected = play(with_agree(main, Synchronous()), REPLICAS, 1)
    for workers in (1, 3):
        played = play(with_agree(main, Stale(bound=0)), REPLICAS, workers)
        assert played.as_words() == expected.as_words(), f"bound=0 on {workers} workers is not synchronous"


def assert_replayed(folder: Path) -> None:
    """A schedule, however it came about, gives the same bits on any number of workers."""
    played, path = recorded(folder, 3)
    assert played.exactly_once
    lags = {lag for line in lags_in(path) for lag in line}
    assert max(lags) == BOUND and len(lags) > 2, f"too tame a schedule to tell anything: {lags}"
    for workers in (1, 2):
        again = play(uneven(Stale(bound=BOUND, replay=str(path)), seed=7), REPLICAS, workers)
        assert again.as_words() == played.as_words(), f"replayed on {workers} workers"


def assert_anyone_can_make_it(folder: Path) -> None:
    """Workers make the updates by turns, also those that have run ahead; and it comes to the same."""
    advance = pipeline.Pipeline.advance

    def by_turns(self) -> None:
        worker = self._live.group.worker
        if self._board.committed % worker.size == worker.rank:
            advance(self)

    def wait(self, number: int, may_help: Any) -> None:
        turns = iter((False, True))
        self._group.wait_until(lambda: next(turns))

    played, path = recorded(folder, 2)
    with replaced(pipeline.Pipeline, "advance", by_turns), replaced(Board, "wait", wait):
        again = play(uneven(Stale(bound=BOUND, replay=str(path)), seed=7), REPLICAS, 3)
    assert again.as_words() == played.as_words()


def assert_each_gradient_once(folder: Path) -> None:
    """Hold a run against plain steps: each of all shards' gradients, on the weights that the schedule says."""
    path = folder / "schedule"
    chance = {rank: random.Random(rank) for rank in range(3)}
    seen: dict[tuple[int, int], Any] = {}
    weights: list[torch.Tensor] = []

    def make() -> tuple[Perceptron, torch.optim.Optimizer]:
        model = Perceptron()
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def main(run: Run) -> None:
        model, optimizer = make()
        weights[:] = [p.detach().clone() for p in model.parameters()]
        run.replicate(model, optimizer, agree=Stale(bound=BOUND, record=str(path)))
        for step in run.steps(vectors(), batch_size=15, steps=9):
            for batch in step:
                pause(run, chance[run.worker.rank])
                step.backward(classes_loss(model, batch))
                seen[step.number, step._replica] = batch
            step.update()
        if run.worker.is_first:
            weights.extend(p.detach().clone() for p in model.parameters())

    play(main, 3, 3)
    model, optimizer = make()
    parameters = list(model.parameters())
    known = [weights[: len(parameters)]]
    for number, lags in enumerate(lags_in(path)):
        gradients = []
        for replica, lag in enumerate(lags):
            batch = seen[number, replica]
            with torch.no_grad():
                for parameter, value in zip(parameters, known[number - lag], strict=True):
                    parameter.copy_(value)
            size = sum(len(seen[number, r][0]) for r in range(3))
            loss = classes_loss(model, batch) * (len(batch[0]) / size)
            gradients.append(torch.autograd.grad(loss, parameters))
        order = tree.fold_order([range(r, r + 1) for r in range(3)], 3)
        for index, (parameter, value) in enumerate(zip(parameters, known[number], strict=True)):
            with torch.no_grad():
                parameter.copy_(value)
            parameter.grad = _added(order, [g[index] for g in gradients])
        optimizer.step()
        known.append([p.detach().clone() for p in parameters])
    assert any(lag for line in lags_in(path) for lag in line)
    for ours, theirs in zip(known[-1], weights[len(parameters) :], strict=True):
        assert torch.equal(ours, theirs), "an update was not what its gradients are"


def _added(order: Any, gradients: list[torch.Tensor]) -> torch.Tensor:
    if isinstance(order, int):
        return gradients[order]
    return _added(order[0], gradients) + _added(order[1], gradients)


@pytest.mark.parametrize("name", LIKE_SYNCHRONOUS)
def test_bound_zero_is_synchronous(name):
    assert_like_synchronous(LIKE_SYNCHRONOUS[name])


def test_replayed_to_the_bit(tmp_path):
    assert_replayed(tmp_path)


def test_anyone_can_make_an_update(tmp_path):
    assert_anyone_can_make_it(tmp_path)


def test_each_gradient_is_applied_once(tmp_path):
    assert_each_gradient_once(tmp_path)


def test_a_replayed_run_is_resumed_as_if_never_stopped(tmp_path):
    _, path = recorded(tmp_path, 2)
    main = uneven(Stale(bound=BOUND, replay=str(path)))
    assert_resumed_is_never_stopped(main, tmp_path / "kept", REPLICAS, [2, 1, 3], stride=3)


def test_a_free_run_is_resumed_with_its_schedule(tmp_path):
    played, _ = recorded(tmp_path, 2)
    agree = Stale(bound=BOUND, record=str(tmp_path / "again"))
    keeping = Keeping(checkpoint=str(tmp_path / "kept"), every=3)
    play(uneven(agree), REPLICAS, 2, keeping=keeping)
    (tmp_path / "again").unlink()
    saved = sorted((tmp_path / "kept").glob("step-*"))[0]
    resumed = play(uneven(agree, seed=3), REPLICAS, 3, keeping=Keeping(resume=str(saved)))
    assert resumed.exactly_once and resumed.steps == played.steps
    assert len(lags_in(tmp_path / "again")) == played.steps
    again = play(uneven(Stale(bound=BOUND, replay=str(tmp_path / "again"))), REPLICAS, 1)
    assert again.weights == resumed.weights


def test_what_is_known_late(tmp_path):
    """The loss after step n is that of step n - bound; at the end of the steps nothing is under way."""
    played, _ = recorded(tmp_path, 3)
    told = [entry for entry in played.result[0] if isinstance(entry, list)]
    assert [math.isnan(loss) for loss, *_ in told] == [n < BOUND for n in range(len(told))]
    synchronous = play(uneven(Synchronous()), REPLICAS, 1)
    assert told[BOUND][0] == synchronous.result[0][1][0], "the first step sees the same weights in any case"


def test_left_by_break():
    def main(run: Run) -> Any:
        model, _ = made(run, agree=Stale(bound=BOUND))
        for _ in range(2):
            for step in run.steps(vectors(), batch_size=9, epochs=1):
                for batch in step:
                    step.backward(classes_loss(model, batch))
                step.update()
                if step.number % 6 == 4:
                    break
        return run.digest()

    for workers in (1, 2):
        played = play(main, 4, workers)
        assert played.exactly_once and played.steps > 5


def test_scaled_by_staleness(tmp_path):
    """On weights that lack one update a gradient counts half."""
    path = tmp_path / "schedule"
    path.write_text('{"format": "samestep schedule 1", "replicas": 1, "bound": 1}\n[0]\n[1]\n')

    def main(run: Run, scale: Any) -> Any:
        model = torch.nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            model.weight.zero_()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=1.0), agree=agree)
        for step in run.steps(torch.ones(4, 1), batch_size=2, steps=2):
            for x in step:
                step.backward(model(x).mean())
            step.update()
        return model.weight.item()

    for scale, expected in ((None, -2.0), ("inverse", -1.5)):
        agree = Stale(bound=1, scale=scale, replay=str(path))
        assert play(lambda run, scale=scale: main(run, scale), 1, 1).result == expected


# -------------------------------------------------------------------------------------------------- planted faults


def applied_twice():
    apply = ElementUpdate.apply

    def twice(self, sums, absent, factor):
        apply(self, sums, absent, factor)
        apply(self, sums, absent, factor)

    return replaced(ElementUpdate, "apply", twice)


def stale_gradients_dropped():
    absent_of = maker.Maker._absent

    def dropped(self, met):
        late = {replica for _, _, lags, _ in met.own for replica, lag in lags if lag == 1}
        everything = range(len(self._trained.weights.parameters))
        return {**absent_of(self, met), **({i: tuple(late) for i in everything} if late else {})}

    return replaced(maker.Maker, "_absent", dropped)


def other_version_in_a_replay():
    return replaced(schedule.Schedule, "lag", lambda self, number, replica: 0)


def version_overwritten_early():
    point = versions.Versions.point
    return replaced(versions.Versions, "point", lambda self, version: point(self, version + 1))


def made_before_all_have_told():
    return replaced(Board, "is_told", lambda self, number: bool(self._arrived.max() > number))


def nobody_waits():
    return replaced(pipeline.Pipeline, "await_commit", lambda self, number: self.advance())


def settings_of_whoever_makes_it():
    class Now:
        def __init__(self, *asked: Any): ...
        def __enter__(self) -> None: ...
        def __exit__(self, *error: Any) -> None: ...

    return replaced(maker.Maker, "_settings", Now)


def state_of_its_own():
    link = AnyoneUpdate._link

    def apart(self):
        if not self._linked:
            link(self)
            self._known = {p: {k: v.clone() for k, v in known.items()} for p, known in self._known.items()}

    return replaced(AnyoneUpdate, "_link", apart)


FAULTS = {
    "an update is applied twice": (applied_twice, assert_each_gradient_once),
    "a stale gradient is dropped": (stale_gradients_dropped, assert_each_gradient_once),
    "a shard is played on another version": (version_overwritten_early, assert_each_gradient_once),
    "an update is made before all shards are there": (made_before_all_have_told, assert_each_gradient_once),
    "a worker runs too far ahead": (nobody_waits, assert_each_gradient_once),
    "each worker has optimizer state of its own": (state_of_its_own, assert_anyone_can_make_it),
    "the schedule is not kept to": (other_version_in_a_replay, assert_replayed),
    "an update is made with later settings": (settings_of_whoever_makes_it, assert_anyone_can_make_it),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, tmp_path):
    plant, law = FAULTS[fault]
    with plant(), pytest.raises((AssertionError, json.JSONDecodeError)):
        law(tmp_path)


# ------------------------------------------------------------------------------------------------------- bad input


def test_not_finite(tmp_path):
    """It is found when the update is known, and names step and replica; or such updates are skipped alike."""

    def main(run: Run, nonfinite: Any, path: str) -> Any:
        model, _ = made(run, agree=Stale(bound=2, replay=path), nonfinite=nonfinite)
        told = []
        for step in run.steps(vectors(), batch_size=19, steps=8):
            for batch in step:
                bad = step.number == 3 and step._replica == 1
                step.backward(classes_loss(model, batch) * (math.nan if bad else 1.0))
            step.update()
            told.append([step.number, step.skipped])
        return told

    path = tmp_path / "schedule"
    path.write_text('{"format": "samestep schedule 1", "replicas": 4, "bound": 2}\n' + "[0, 0, 0, 0]\n" * 8)
    for workers in (1, 3):
        with pytest.raises(NonFiniteError, match="step 3, replica 1"):
            play(lambda run: main(run, "stop", str(path)), 4, workers)
        played = play(lambda run: main(run, "skip", str(path)), 4, workers)
        assert [number for number, skipped in played.result if skipped] == [5]
        assert played.exactly_once


@pytest.mark.parametrize("arguments", [{"bound": -1}, {"bound": 2.5}, {"bound": True}, {"scale": "linear"}])
def test_arguments(arguments):
    with pytest.raises(SettingsError, match=next(iter(arguments))):
        Stale(**arguments)


def test_refused(tmp_path):
    agree = Stale(bound=2)

    def two(run: Run) -> None:
        one, other = Perceptron(), Perceptron()
        first, second = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (one, other))
        run.replicate(one, other, first, second, agree=agree)

    def scaled(run: Run) -> None:
        scaler = torch.amp.GradScaler("cpu")
        model = Perceptron()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), scaler, agree=agree)
        for step in run.steps(vectors(), batch_size=19, steps=1):
            for batch in step:
                step.backward(scaler.scale(classes_loss(model, batch)))
            step.update(scaler=scaler)

    refused(UsageError, ["2 optimizers", "Synchronous"], two)
    refused(UsageError, ["GradScaler", "bfloat16"], scaled)
    refused(UsageError, ["Adafactor"], lambda run: made(run, torch.optim.Adafactor, agree=agree))
    missing = Stale(bound=2, replay=str(tmp_path / "nothing"))
    refused(SettingsError, ["replay", "read as a schedule"], lambda run: made(run, agree=missing))
    recorded(tmp_path, 1)
    other = Stale(bound=1, replay=str(tmp_path / "schedule 1 0"))
    refused(SettingsError, ["'bound': 2", "'bound': 1"], lambda run: made(run, agree=other))
    with pytest.raises(SettingsError, match="cuda:0.*on CPUs"):
        agree.bind(None, SimpleNamespace(worker=Worker(device="cuda:0")), None, None)


def test_other_recipe_than_the_checkpoints(tmp_path):
    play(uneven(Stale(bound=1)), REPLICAS, 1, keeping=Keeping(checkpoint=str(tmp_path)))
    with pytest.raises(MismatchError, match=r"bound=1.*bound=2"):
        play(uneven(Stale(bound=2)), REPLICAS, 1, keeping=Keeping(resume=str(tmp_path)))


def test_edits_outside_of_edit():
    def main(run: Run, what: str) -> None:
        model = Convolutional()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), agree=Stale(bound=2))

        def edit(step: Any) -> None:
            with torch.no_grad():
                if step.number == 3 and what == "weight":
                    model.inner.weight.add_(1.0)
                elif step.number == 3:
                    model.norm.running_mean.add_(1.0)

        train(run, model, after=edit, steps=6, data=images())

    refused(EditedWeightsError, ["inner.weight"], lambda run: main(run, "weight"))
    refused(EditedWeightsError, ["buffer", "run.edit"], lambda run: main(run, "buffer"))


def test_new_kinds_of_state():
    def main(run: Run) -> None:
        model, optimizer = made(run, agree=Stale(bound=2))

        def speed_up(step: Any) -> None:
            optimizer.param_groups[0]["momentum"] = 0.9

        train(run, model, after=speed_up, steps=6)

    refused(UsageError, ["SGD", "momentum"], main)
