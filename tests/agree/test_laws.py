"""The laws that every way to agree keeps, each way found by its name in `ways`."""

from __future__ import annotations

import itertools

import pytest
import torch
from playing import play, play_one
from ways import WAYS, script

import samestep
from samestep.codecs import Exact
from samestep.loop.recipe import Keeping

ALL = pytest.mark.parametrize("name", WAYS)


def plays(group, names: list[str]) -> dict[str, str]:
    """Program of a worker: play the script in each of some ways."""
    return {name: play_one(group, script(WAYS[name]), 5).as_words() for name in names}


def returned(outcomes: list[dict]) -> list:
    for rank, outcome in enumerate(outcomes):
        assert "returned" in outcome, f"worker {rank}: {outcome.get('traceback', outcome)}"
        assert outcome["left"] == [], f"worker {rank} left something behind"
    return [outcome["returned"] for outcome in outcomes]


@ALL
def test_same_bits_for_any_number_of_workers(name):
    alone = play(script(WAYS[name]), 5, 1)
    for workers in (2, 3, 5):
        assert play(script(WAYS[name]), 5, workers).as_words() == alone.as_words()


@pytest.mark.parametrize(("kind", "size"), [("arena", 3), ("gloo", 2)])
def test_processes_are_as_one_worker(fleet, kind, size):
    names = list(WAYS)
    alone = {name: play(script(WAYS[name]), 5, 1).as_words() for name in names}
    for told in returned(fleet.outcomes(plays, kind, size, limit_seconds=240, names=names)):
        for name, words in told.items():
            assert words == alone[name], name


@ALL
def test_a_resumed_run_is_as_one_that_never_stopped(name, tmp_path):
    main = script(WAYS[name], steps=8)
    kept = Keeping(checkpoint=str(tmp_path / "run"), every=1, keep=1000)
    whole = play(main, 4, 2, keeping=kept)
    for step, workers in ((2, 3), (7, 1)):
        (folder,) = (tmp_path / "run").glob(f"step-*{step}")
        resumed = play(main, 4, workers, keeping=Keeping(resume=str(folder)))
        assert resumed.as_words() == whole.as_words(), step


@ALL
def test_every_way_learns(name):
    seen, _ = play(script(WAYS[name], steps=40, normed=False, clip_norm=None, decay=1.0), 4, 1).result
    assert sum(loss for loss, _ in seen[35:40]) < 0.4 * sum(loss for loss, _ in seen[:5])


def test_rounds_of_one_step_are_synchronous():
    def weights(way):
        return play(script(way, optimizer="plain", normed=False, clip_norm=None), 4, 2).result[1]

    for one, other in zip(weights(samestep.Local(every=1)), weights(samestep.Synchronous()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_codec_that_loses_nothing_changes_nothing():
    main = script(samestep.Synchronous(codec=Exact()))
    assert play(main, 4, 3).as_words() == play(script(samestep.Synchronous()), 4, 3).as_words()


def test_the_last_round_comes_at_the_end_of_the_steps():
    early = play(script(samestep.Local(every=8), steps=8), 4, 2)
    late = play(script(samestep.Local(every=100), steps=8), 4, 2)
    assert early.weights == late.weights


def test_between_rounds_the_weights_stay():
    kept = []

    def after(run, step, model):
        kept.append(model[0].weight.detach().clone())

    play(script(samestep.Local(every=3), steps=7, after=after), 4, 1)
    stays = [torch.equal(one, other) for one, other in itertools.pairwise(kept)]
    assert stays == [True, False, True, True, False, True]


OUTER = samestep.Local(every=3, outer=samestep.Nesterov(lr=0.5, momentum=0.9))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("first", "then"), [(samestep.Synchronous(), OUTER), (OUTER, samestep.Synchronous())])
def test_another_way_starts_from_the_weights_alone(first, then, optimizer, tmp_path):
    """An outer optimizer does not take the state of the user's for its own, nor the other way round."""
    path, seen = str(tmp_path / "saved"), []

    def save(run, step, model):
        if step.number == 3:
            run.save(path)

    def load(run, step, model):
        if step.number == 1:
            run.load(path)
            seen.append(run.model.trained[0].update.full_state())
        if step.number == 2:
            seen.append(run.model.trained[0].update.full_state())

    play(script(first, steps=4, optimizer=optimizer, after=save), 4, 1)
    play(script(then, steps=3, optimizer=optimizer, after=load), 4, 1)
    assert seen[0] == {} and seen[1] != {}


def test_what_was_done_before_a_load_counts_in_no_round(tmp_path):
    path = str(tmp_path / "saved")

    def load(run, step, model):
        if step.number == 3:
            run.load(path)

    def main(run):
        result = script(samestep.Local(every=9), steps=4, after=load)(run)
        return result, run._session.agreed.facts()["rounds"]

    play(script(samestep.Synchronous(), steps=1, after=lambda run, step, model: run.save(path)), 4, 1)
    assert play(main, 4, 2).result[1] == 0
