"""Rounds that overlap with the steps after them, `Local(delay=...)`; test_laws.py holds that bits stay the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playing import play, play_one, replaced
from torch import nn
from ways import script

import samestep
from samestep.agree.own import Own
from samestep.agree.rounds import Rounds
from samestep.codecs import TopK
from samestep.errors import SettingsError
from samestep.loop.recipe import Keeping

# ----------------------------------------------------------------------------------------------- against plain torch

ROWS, REPLICAS, STEPS, RATE, OUTER = 12, 4, 17, 0.05, 0.6
"""Of the script: samples per step, replicas, steps, and learning rates."""


def counted(step: int, replica: int) -> int:
    """Return what a shard counts for: another share of the whole in every step."""
    return 1 + (5 * step + 3 * replica) % 7


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(ROWS * STEPS, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x, x.sum(1, keepdim=True) + torch.arange(len(x))[:, None] % REPLICAS


def weights_seen(way: samestep.Local) -> list[list[torch.Tensor]]:
    """Return the weights that a script sees after every step, and at the end."""

    def main(run):
        model = nn.Linear(3, 1).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=RATE), agree=way)
        seen = []
        for step in run.steps(data(), batch_size=ROWS, steps=STEPS, shuffle=False):
            for x, y in step:
                step.backward((model(x) - y).square().mean(), count=counted(step.number, step.replica))
            step.update()
            seen.append([p.detach().clone() for p in model.parameters()])
        return [*seen, [p.detach().clone() for p in model.parameters()]]

    return play(main, REPLICAS, 2).result


def weights_expected(way: samestep.Local) -> Iterator[list[torch.Tensor]]:
    """Yield the same, as the words in the documentation have it; each parameter is a fragment."""
    x, y = data()
    start = [torch.full((1, 3), 0.5, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)]
    own = [[w.clone() for w in start] for _ in range(REPLICAS)]
    since: list[dict[int, int]] = [{}, {}]
    under_way: list[tuple[int, int, list[torch.Tensor], dict[int, int]]] = []

    def end(fragment: int, anchors: list[torch.Tensor], items: dict[int, int]) -> None:
        total = sum(items.values())
        mean = sum(anchor * items[r] / total for r, anchor in enumerate(anchors))
        start[fragment] = start[fragment] - OUTER * (start[fragment] - mean)
        for r in range(REPLICAS):
            own[r][fragment] = start[fragment] + (own[r][fragment] - anchors[r])

    def begin(fragment: int, at: int) -> tuple[int, int, list[torch.Tensor], dict[int, int]]:
        items, since[fragment] = since[fragment], {}
        return at, fragment, [own[r][fragment] for r in range(REPLICAS)], items

    for step in range(STEPS):
        for r in range(REPLICAS):
            rows = slice(step * ROWS + r * ROWS // REPLICAS, step * ROWS + (r + 1) * ROWS // REPLICAS)
            own[r] = [w.requires_grad_() for w in own[r]]
            loss = (torch.nn.functional.linear(x[rows], *own[r]) - y[rows]).square().mean()
            gradients = torch.autograd.grad(loss, own[r])
            own[r] = [w.detach() - RATE * g for w, g in zip(own[r], gradients, strict=True)]
            for items in since:
                items[r] = items.get(r, 0) + counted(step, r)
        for round_ in [u for u in under_way if u[0] + way.delay == step]:
            under_way.remove(round_)
            end(*round_[1:])
        for fragment in way.due(step):
            if step < way.warm_up:
                end(*begin(fragment, step)[1:])
            else:
                under_way.append(begin(fragment, step))
        yield [w.clone() for w in start]
    for round_ in under_way:
        end(*round_[1:])
    for fragment in range(2):
        if since[fragment]:
            end(*begin(fragment, STEPS)[1:])
    yield start


def equals_plain_torch(**settings: Any) -> None:
    """The law: weights are those of the definition."""
    way = samestep.Local(fragments=2, outer=samestep.Momentum(lr=OUTER, momentum=0.0), **settings)
    for seen, expected in zip(weights_seen(way), weights_expected(way), strict=True):
        for one, other in zip(seen, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"every": 4, "delay": 1},
        {"every": 4, "delay": 3},
        {"every": 5, "delay": 3, "warm_up": 3},
        {"every": 20, "delay": 19},
    ],
    ids=str,
)
def test_weights_are_those_of_the_definition(settings):
    equals_plain_torch(**settings)


# ------------------------------------------------------------------------------------------------------------ faults


def counts_again(old: Callable) -> Callable:
    def faulty(self, fragments, is_late):
        begun = old(self, fragments, is_late)
        for round_ in begun if is_late else ():
            self.since[round_.fragment] = dict(round_.items)
        return begun

    return faulty


def counts_what_came_later(old: Callable) -> Callable:
    def faulty(self, rounds, where):
        for round_ in rounds:
            for replica, count in self.since[round_.fragment].items():
                round_.items[replica] += count
        return old(self, rounds, where)

    return faulty


FAULTS: dict[str, tuple[type, str, Callable]] = {
    "what was done meanwhile is lost": (Own, "go_on", lambda old: Own.begin),
    "what was done meanwhile is in the round too": (
        Own,
        "difference",
        lambda old: lambda self, index, anchored=False: old(self, index),
    ),
    "samples count in two rounds": (Rounds, "_begin", counts_again),
    "samples count in the round before": (Rounds, "_end", counts_what_came_later),
    "rounds end at once": (samestep.Local, "delay_of", lambda old: lambda self, update: 0),
    "rounds of the warm-up are late": (samestep.Local, "delay_of", lambda old: lambda self, update: self.delay),
    "what is under way at the end is forgotten": (
        Rounds,
        "settle",
        lambda old: lambda self, where: (self.drop(), old(self, where)),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name):
    owner, method, make = FAULTS[name]
    with replaced(owner, method, make(getattr(owner, method))), pytest.raises(AssertionError):
        equals_plain_torch(every=5, delay=3, warm_up=3)


# ------------------------------------------------------------------------------------------------------- other hosts

WAY = samestep.Local(every=4, fragments=2, delay=3, outer=samestep.Nesterov(0.5, 0.5), codec=TopK(share=0.3))


def comes_and_goes(folder: str) -> Callable:
    """Return a `main` that saves in the middle of a round, comes back to it in the middle of another, and leaves."""

    def after(run, step, model):
        if step.number == 2:
            run.save(f"{folder}/saved")
        if step.number == 5:
            run.load(f"{folder}/saved")

    return script(WAY, steps=9, after=after)


def leaves_early(run: samestep.Run) -> list[float]:
    """Leave the steps while a round is under way, so that nobody waits for what was sent."""
    model = nn.Linear(6, 1)
    run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), agree=WAY)
    seen = []
    for step in run.steps(torch.ones(40, 6), batch_size=8, steps=5):
        for x in step:
            step.backward(model(x).square().mean())
        step.update()
        seen.append(step.loss)
        if step.number == 2:
            break
    return seen


def interrupted(group, folder: str) -> list[str]:
    """Program of a worker: play all of them, and go on from checkpoints that hold rounds under way."""
    waited = watch_posts(group)
    words = [play_one(group, comes_and_goes(f"{folder}/load"), 5).as_words()]
    assert waited and all(waited), "what is not waited for would be taken for what is posted next"
    words.append(play_one(group, leaves_early, 5).as_words())
    main = script(WAY, steps=8)
    words.append(play_one(group, main, 5, keeping=Keeping(checkpoint=f"{folder}/run", every=1, keep=100)).as_words())
    for step in (2, 4, 7):
        (path,) = Path(folder, "run").glob(f"step-*{step}")
        words.append(play_one(group, main, 5, keeping=Keeping(resume=str(path))).as_words())
    return words


def watch_posts(group) -> list[bool]:
    """Return a list that tells of each post of a group from now on whether it was waited for."""
    waited: list[bool] = []
    post = group.post

    def watched(message, lengths):
        number, wait = len(waited), post(message, lengths)
        waited.append(False)

        def told():
            waited[number] = True
            return wait()

        return told

    group.post = watched
    return waited


def test_between_hosts_a_round_under_way_is_kept_and_sent_anew(fleet, tmp_path):
    alone = interrupted_alone(tmp_path / "alone")
    for words in fleet.play(interrupted, "gloo", 2, folder=str(tmp_path / "hosts")):
        assert words == alone


def dies_before_the_first_round(group) -> None:
    def after(run, step, model):
        if step.number == 2 and run.worker.rank == 1:
            Rounds._begin = lambda self, fragments, is_late: os._exit(7) if fragments else []

    play_one(group, script(samestep.Local(every=4, delay=2), after=after), 4)


def test_a_death_before_the_first_round_is_not_waited_for(fleet):
    first, last = fleet.outcomes(dies_before_the_first_round, "gloo", 2, limit_seconds=30)
    assert first.get("raised", [])[:1] == ["PeerError"] and last == {"exit": 7, "left": []}, first


def interrupted_alone(folder: Path) -> list[str]:
    """Return what one worker comes to; a run that goes on comes to what it would have come to."""
    mains = comes_and_goes(str(folder)), leaves_early, script(WAY, steps=8)
    loaded, left, whole = (play(main, 5, 1).as_words() for main in mains)
    return [loaded, left, whole, whole, whole, whole]


def test_steps_that_are_left_early_end_with_a_round_too():
    """What replicas have done by themselves is in the weights, however the steps end."""
    for way in (WAY, samestep.Local(every=4)):

        def main(run, way=way, steps=5, last=2):
            model = nn.Linear(6, 1)
            run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), agree=way)
            for _ in range(2):
                for step in run.steps(torch.ones(40, 6), batch_size=8, steps=steps, shuffle=False):
                    for x in step:
                        step.backward(model(x).square().mean())
                    step.update()
                    if step.number % 3 == last:
                        break

        left, ended = play(main, 4, 2), play(lambda run, main=main: main(run, steps=3, last=None), 4, 2)
        assert left.weights == ended.weights


# ------------------------------------------------------------------------------------------------------------- words


def test_the_round_before_must_be_over():
    for every, delay in ((4, 4), (1, 1)):
        with pytest.raises(SettingsError, match=rf"delay={delay}, every={every}.*Set delay below every"):
            samestep.Local(every=every, delay=delay)
    for delay in (-1, 0.5, True):
        with pytest.raises(SettingsError, match="delay="):
            samestep.Local(delay=delay)


def test_a_checkpoint_of_another_delay_is_refused(tmp_path):
    kept = Keeping(checkpoint=str(tmp_path), every=1, keep=100)
    play(script(samestep.Local(every=4, delay=2), steps=5), 4, 1, keeping=kept)
    with pytest.raises(samestep.MismatchError, match="delay=2.*delay=1"):
        play(script(samestep.Local(every=4, delay=1), steps=5), 4, 1, keeping=Keeping(resume=str(tmp_path)))
