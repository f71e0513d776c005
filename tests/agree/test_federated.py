"""The laws of federated averaging: as a plain program that trains one client after the other, on any workers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from playing import play, play_one, replaced
from torch import nn
from torch.nn import functional as F

import samestep
from samestep.agree.pooling import Noisy
from samestep.core.buffers import Buffers
from samestep.core.group import Solo
from samestep.core.randomness import seed_start
from samestep.federated.cohort import Cohort
from samestep.federated.masking import MaskedRound
from samestep.loop.recipe import Keeping, Recipe
from samestep.loop.rounds import ClientWalk
from samestep.loop.run import Run
from samestep.loop.session import Session
from samestep.storage.checkpoint import load_newest

LENGTHS = (1, 7, 2, 3, 5, 1, 4, 2)
SECURE = samestep.Masking(numbers=samestep.FixedPoint(limit=2.0, bits=24, modulus_bits=64))
WAYS: dict[str, dict[str, Any]] = {
    "FedAvg": {"sample": 0.6},
    "FedProx with momentum, drop-outs, stragglers": {
        "sample": 5,
        "outer": samestep.Momentum(),
        "proximal": 0.5,
        "drop": 0.3,
        "deadline": 12.0,
        "spread": 2.0,
    },
    "FedAdam": {"sample": 0.4, "outer": samestep.Adaptive(lr=0.05)},
    "trimmed mean": {"drop": 0.1, "aggregate": samestep.TrimmedMean(0.2)},
    "secure": {"drop": 0.1, "secure": SECURE},
    "private": {"sample": 0.6, "privacy": samestep.Privacy(clip=0.5, noise=0.3, delta=1e-3)},
    "private and secure": {
        "sample": 0.9,
        "secure": SECURE,
        "privacy": samestep.Privacy(clip=0.5, noise=0.3, delta=1e-3, sampling="fixed"),
    },
}


def datasets(lengths: tuple[int, ...] = LENGTHS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the data of each client: inputs [samples, 4], labels [samples]."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for length in lengths:
        x = torch.randn(length, 4, generator=generator)
        made.append((x, (x[:, 0] > x[:, 1]).long()))
    return made


def net(normed: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6) if normed else nn.Tanh(), nn.Dropout(0.1), nn.Linear(6, 2))


def script(
    way: dict[str, Any],
    rounds: int = 4,
    epochs: int = 2,
    batch_size: int = 2,
    lr: float = 0.1,
    make: Callable = net,
    clients: samestep.Clients | None = None,
    **settings: Any,
) -> Callable:
    """Return a `main` that trains under `Federated(**way)`; it returns what it saw, and the weights."""

    def main(run: samestep.Run) -> Any:
        given = clients if clients is not None else samestep.Clients.of(datasets())
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        run.replicate(model, optimizer, scheduler, agree=samestep.Federated(given, **way), **settings)
        seen = []
        for step in run.steps(given, batch_size=batch_size, epochs=epochs, steps=rounds):
            for x, y in step:
                loss = F.cross_entropy(model(x), y)
                step.backward(loss)
                step.mean(twice=2 * loss, drawn=torch.rand(()))
            step.update()
            scheduler.step()
            seen.append([step.loss, step.means, step.clients, step.lost, step.size, step.skipped])
        return seen, [tensor.detach().clone() for tensor in model.state_dict().values()]

    return main


def weights_of(way: dict[str, Any], workers: int = 1, **settings: Any) -> list[torch.Tensor]:
    return play(script(way, **settings), 1, workers).result[1]


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def facts_of(main: Callable, keeping: Keeping | None = None) -> dict[str, Any]:
    """Play `main` on one worker; return the facts of the summary."""
    seed_start(0)
    session = Session(Recipe(replicas=1), keeping or Keeping(), Solo())
    return session.finish(main(Run(session)))


# --- any workers, resumed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
def test_same_bits_for_any_number_of_workers(name):
    make = partial(net, normed=True) if name == "FedAdam" else net
    # A batch of one has no variance to normalise by.
    clients = samestep.Clients.of(datasets((2, 4, 2, 6, 4, 2))) if name == "FedAdam" else None
    main = script(WAYS[name], rounds=2, make=make, clients=clients)
    alone = play(main, 1, 1)
    assert alone.exactly_once
    for workers in (2, 3) if name == "FedAvg" else (3,):
        assert play(main, 1, workers).as_words() == alone.as_words(), workers


@pytest.mark.parametrize("name", ["FedAdam", "private"])
def test_a_resumed_run_is_as_one_that_never_stopped(name, tmp_path):
    main = script(WAYS[name])
    kept = Keeping(checkpoint=str(tmp_path / "run"), every=1, keep=1000)
    whole = play(main, 1, 2, keeping=kept)
    (folder,) = (tmp_path / "run").glob("step-*2")
    resumed = play(main, 1, 3, keeping=Keeping(resume=str(folder)))
    assert resumed.as_words() == whole.as_words()


def plays(group, names: list[str]) -> dict[str, str]:
    """Program of a worker: play the script in each of some ways."""
    return {name: play_one(group, script(WAYS[name], rounds=2), 1).as_words() for name in names}


@pytest.mark.parametrize("kind", ["arena", "gloo"])
def test_processes_are_as_one_worker(fleet, kind):
    names = ["FedProx with momentum, drop-outs, stragglers", "trimmed mean", "secure", "private"]
    names = names[: 2 if kind == "arena" else 4]
    alone = {name: play(script(WAYS[name], rounds=2), 1, 1).as_words() for name in names}
    for outcome in fleet.outcomes(plays, kind, 2, limit_seconds=240, names=names):
        assert outcome.get("returned") == alone, outcome.get("traceback", outcome)


# --- what is computed -----------------------------------------------------------------------------------------------


def plainly(way: dict[str, Any], rounds: int, epochs: int, lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    """Train client after client with full batches and plain SGD, by hand; return the weights."""
    torch.manual_seed(0)
    recipe = samestep.Federated(len(lengths), **way)
    model = linear()
    outer = recipe.outer.make(list(model.parameters()))
    for number in range(rounds):
        cohort = recipe.cohort(number, 0, lengths, epochs)
        start = [p.detach().clone() for p in model.parameters()]
        totals = [torch.zeros_like(p) for p in start]
        for client in cohort.delivering:
            x, y = datasets(lengths)[client]
            own = copy.deepcopy(model)
            for _ in range(epochs):
                own.zero_grad()
                F.cross_entropy(own(x), y).backward()
                with torch.no_grad():
                    for p, first in zip(own.parameters(), start, strict=True):
                        p -= 0.1 * (p.grad + recipe.proximal * (p - first))
            share = lengths[client] / sum(lengths[c] for c in cohort.delivering)
            for total, first, p in zip(totals, start, own.parameters(), strict=True):
                total += share * (first - p.detach())
        if cohort.delivering:
            for p, total in zip(model.parameters(), totals, strict=True):
                p.grad = total
            outer.step()
    return [p.detach() for p in model.parameters()]


def linear() -> nn.Module:
    """A network whose weights do not depend on the generators."""
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.arange(8.0).view(2, 4) / 10)
        model.bias.zero_()
    return model


def full_batches(way: dict[str, Any], rounds: int = 3, epochs: int = 2, workers: int = 2, **settings: Any) -> list:
    """Train as `plainly` does, with samestep."""

    def main(run: samestep.Run) -> Any:
        clients = samestep.Clients.of(datasets())
        model = linear()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run.replicate(model, optimizer, agree=samestep.Federated(clients, **way), **settings)
        for step in run.steps(clients, batch_size=100, epochs=epochs, steps=rounds):
            for x, y in step:
                step.backward(F.cross_entropy(model(x), y))
            step.update()
        return [p.detach().clone() for p in model.parameters()]

    return play(main, 1, workers).result


RECIPES = {
    "FedAvg, all clients": {},
    "sampled, with drop-outs": {"sample": 0.5, "drop": 0.4},
    "too late": {"deadline": 6.0},
    "FedProx": {"proximal": 0.7},
    "momentum": {"sample": 0.5, "outer": samestep.Momentum(lr=0.8, momentum=0.9)},
    "FedAdam": {"sample": 0.5, "outer": samestep.Adaptive(lr=0.1)},
}


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_what_a_plain_program_computes(name):
    close(full_batches(RECIPES[name]), plainly(RECIPES[name], rounds=3, epochs=2))


def test_one_full_batch_of_each_is_one_synchronous_step():
    together = [torch.cat(columns) for columns in zip(*datasets(), strict=True)]
    model = linear()
    F.cross_entropy(model(together[0]), together[1]).backward()
    expected = [(p - 0.1 * p.grad).detach() for p in model.parameters()]
    close(full_batches({}, rounds=1, epochs=1), expected)


def test_the_loss_is_the_mean_over_samples():
    together = [torch.cat(columns) for columns in zip(*datasets(), strict=True)]
    expected = F.cross_entropy(linear()(together[0]), together[1]).item()

    def losses(run: samestep.Run) -> Any:
        clients = samestep.Clients.of(datasets())
        model = linear()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.0), agree=samestep.Federated(clients))
        for step in run.steps(clients, batch_size=3, epochs=2, steps=1):
            for x, y in step:
                loss = F.cross_entropy(model(x), y)
                step.backward(loss)
                step.mean(twice=2 * loss)
            step.update()
        return step.loss, step.means["twice"]

    loss, twice = play(losses, 1, 2).result
    assert loss == pytest.approx(expected, rel=1e-5)
    assert twice == pytest.approx(2 * expected, rel=1e-5)


def test_buffers_are_means_over_samples():
    def main(run: samestep.Run) -> Any:
        clients = samestep.Clients.of(datasets((2, 6)))
        model = nn.Sequential(nn.BatchNorm1d(4, momentum=1.0), nn.Linear(4, 2))
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), agree=samestep.Federated(clients))
        for step in run.steps(clients, batch_size=6, epochs=1, steps=1):
            for x, y in step:
                step.backward(F.cross_entropy(model(x), y))
            step.update()
        return model[0].running_mean.clone()

    together = torch.cat([x for x, _ in datasets((2, 6))])
    for workers in (1, 2):
        torch.testing.assert_close(play(main, 1, workers).result, together.mean(0))


@pytest.mark.parametrize("name", ["secure", "private", "trimmed mean"])
def test_buffers_that_nothing_would_protect_are_refused(name):
    clients = samestep.Clients.of(datasets((2, 4, 2, 6, 4, 2)))
    with pytest.raises(samestep.UsageError, match="track_running_stats=False"):
        play(script(WAYS[name], rounds=1, make=partial(net, normed=True), clients=clients), 1, 2)


def test_a_client_knows_its_name_and_clients_start_alike():
    def main(run: samestep.Run) -> Any:
        clients = samestep.Clients.of(datasets())
        model = linear()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        run.replicate(model, optimizer, agree=samestep.Federated(clients))
        firsts, seen = [], set()
        for step in run.steps(clients, batch_size=1, epochs=1, steps=1):
            for x, y in step:
                if step.client not in seen:
                    firsts.append(model.weight.detach().clone())
                    seen.add(step.client)
                step.backward(F.cross_entropy(model(x), y))
            assert step.client is None
            step.update()
        return firsts, sorted(seen)

    firsts, seen = play(main, 1, 1).result
    assert seen == list(range(len(LENGTHS)))
    assert all(torch.equal(first, linear().weight) for first in firsts)


def test_frozen_parameters_stay_and_one_client_is_enough():
    def make() -> nn.Module:
        model = nn.Sequential(linear(), nn.Linear(2, 2))
        model[0].requires_grad_(False)
        return model

    for way in (WAYS["FedAdam"], WAYS["secure"], WAYS["trimmed mean"], {"sample": 1, "outer": samestep.Momentum()}):
        weights = weights_of(way, workers=2, rounds=2, make=make)
        assert torch.equal(weights[0], linear().weight)
        close(weights, weights_of(way, rounds=2, make=make), rtol=0, atol=0)


def test_bfloat16_clients_are_averaged_in_float32():
    def make() -> nn.Module:
        return nn.Sequential(linear(), nn.Linear(2, 2)).bfloat16()

    data = samestep.Clients.of([(x.bfloat16(), y) for x, y in datasets()])
    for way in (WAYS["FedAvg"], {"aggregate": samestep.Median()}):
        assert play(script(way, rounds=2, make=make, clients=data), 1, 1).as_words() == (
            play(script(way, rounds=2, make=make, clients=data), 1, 2).as_words()
        )


# --- untrusted clients, masks, privacy ------------------------------------------------------------------------------


def lying(lie: float) -> samestep.Clients:
    data = datasets()
    data[3] = (data[3][0] * lie, data[3][1])
    return samestep.Clients.of(data)


@pytest.mark.parametrize("aggregate", [samestep.Median(), samestep.TrimmedMean(0.2), samestep.NormBound(0.05)])
def test_one_liar_does_not_decide(aggregate):
    make, way = linear, {"aggregate": aggregate}
    honest = weights_of(way, rounds=1, make=make, clients=lying(1.0))
    for lie in (1e4, math.nan):
        found = weights_of(way, workers=2, rounds=1, make=make, clients=lying(lie))
        assert all(bool(torch.isfinite(w).all()) for w in found)
        assert max(float((a - b).abs().max()) for a, b in zip(found, honest, strict=True)) < 0.2
    mean = weights_of({}, rounds=1, make=make, clients=lying(1e4))
    assert max(float((a - b).abs().max()) for a, b in zip(mean, honest, strict=True)) > 1


def test_masks_cancel():
    masked, plain = ({"drop": 0.1, **more} for more in ({"secure": SECURE}, {}))
    cohorts = [samestep.Federated(8, **masked).cohort(number, 0, LENGTHS, 2) for number in range(4)]
    assert any(cohort.lost for cohort in cohorts)
    close(weights_of(masked, workers=3), weights_of(plain), atol=1e-4)


def test_noise_is_as_large_as_was_asked_for_and_fresh_in_each_round():
    def make() -> nn.Module:
        return nn.Sequential(linear(), nn.Linear(2, 2), nn.Linear(2, 4_000, bias=False))

    def rounds_of(noise: float) -> list[torch.Tensor]:
        privacy = samestep.Privacy(clip=0.5, noise=noise, delta=1e-3)
        states = []
        for rounds in (1, 2):
            states.append(weights_of({"privacy": privacy, "sample": 0.5}, rounds=rounds, lr=0.0, make=make)[-1])
        return [states[0], states[1] - states[0]]

    (_, still), (first, second) = rounds_of(0.0), rounds_of(2.0)
    assert not still.any()
    start = rounds_of(0.0)[0]
    first = first - start
    # noise * clip / (expected number of clients)
    assert float(first.std()) == pytest.approx(2.0 * 0.5 / 4, rel=0.05)
    assert float(second.std()) == pytest.approx(2.0 * 0.5 / 4, rel=0.05)
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.05


def test_a_round_for_which_nobody_was_drawn_cannot_be_told_from_others():
    privacy = samestep.Privacy(clip=0.5, noise=1.0, delta=1e-3)
    seen, _ = play(script({"sample": 0.05, "privacy": privacy}, rounds=4), 1, 2).result
    assert [] in [entry[2] for entry in seen]
    assert not any(entry[-1] for entry in seen)


def test_a_spent_budget_ends_the_training_and_keeps_it(tmp_path):
    privacy = samestep.Privacy(clip=0.5, noise=2.0, delta=1e-3, budget=4.0)
    allowed = privacy.num_rounds(0.5)
    assert allowed is not None and 1 < allowed < 30
    way = {"sample": 0.5, "privacy": privacy}
    exact = facts_of(script(way, rounds=allowed, epochs=1))
    assert exact["steps"] == allowed
    assert "epsilon" in exact["privacy"]
    with pytest.raises(samestep.BudgetError, match=f"training stops after {allowed}"):
        play(script(way, rounds=30, epochs=1), 1, 2, keeping=Keeping(checkpoint=str(tmp_path)))
    assert load_newest(str(tmp_path))[0].step == allowed


# --- what was read --------------------------------------------------------------------------------------------------


def test_the_summary_says_who_took_part():
    facts = facts_of(script({"sample": 3}, rounds=2))
    cohorts = [samestep.Federated(8, sample=3).cohort(number, 0, LENGTHS, 2) for number in range(2)]
    number = len({client for cohort in cohorts for client in cohort.delivering})
    assert facts["samples_sentence"] == f"{number} clients in 2 rounds; every sample of a client once per local epoch"
    assert facts["samples_exactly_once"]
    assert facts["rounds"] == 2


def test_a_round_tells_its_clients():
    seen, _ = play(script({"sample": 5, "drop": 0.4}, rounds=3), 1, 2).result
    assert len({tuple(clients) for _, _, clients, _, _, _ in seen}) > 1
    for _, _, clients, lost, size, _ in seen:
        assert len(clients) == 5 and set(lost) < set(clients)
        assert size == 2 * sum(LENGTHS[client] for client in clients if client not in lost)
    assert any(lost for _, _, _, lost, _, _ in seen)


def test_a_round_in_which_nobody_delivers_is_skipped():
    seen, weights = play(script({"deadline": 1.0}, rounds=2), 1, 2).result
    assert [entry[-1] for entry in seen] == [True, True]
    assert all(math.isnan(entry[0]) for entry in seen)
    before = play(script({}, rounds=0), 1, 1).result[1]
    close(weights, before, rtol=0, atol=0)


# --- planted faults -------------------------------------------------------------------------------------------------


def test_planted_a_client_counted_twice():
    batches = ClientWalk.batches

    def twice(self, number, client, device):
        yield from batches(self, number, client, device)
        if client == 2:
            yield from batches(self, number, client, device)

    with replaced(ClientWalk, "batches", twice):
        facts = facts_of(script({}, rounds=1))
    assert not facts["samples_exactly_once"]
    assert "8 clients in 1 round: 50 samples were due, 54 read" in facts["samples_sentence"]


def test_planted_weights_that_are_not_the_samples():
    with replaced(Cohort, "share", lambda self, client: 1 / len(self.delivering)), pytest.raises(AssertionError):
        test_it_is_what_a_plain_program_computes("FedAvg, all clients")


def test_planted_a_mask_that_is_not_cancelled():
    with replaced(MaskedRound, "_left_over", lambda self, alive: iter(())), pytest.raises(AssertionError):
        test_masks_cancel()


def test_planted_noise_that_is_the_same_in_each_round():
    begin = Noisy.begin

    def stuck(self, cohort):
        begin(self, cohort)
        self._cohort = Cohort(**{**{f: getattr(cohort, f) for f in Cohort.__dataclass_fields__}, "number": 0})

    with replaced(Noisy, "begin", stuck), pytest.raises(AssertionError):
        test_noise_is_as_large_as_was_asked_for_and_fresh_in_each_round()


def test_planted_buffers_that_are_not_weighted():
    merge = Buffers.merge

    def evenly(self, counts, changed):
        merge(self, dict.fromkeys(counts, 1.0), changed)

    with replaced(Buffers, "merge", evenly), pytest.raises(AssertionError):
        test_buffers_are_means_over_samples()


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"clients": 0}, "1 or more"),
        ({"sample": 0.0}, "sample of 0.0"),
        ({"sample": 1.5}, "sample of 1.5"),
        ({"sample": 9}, "there are 8"),
        ({"proximal": -1.0}, "proximal=-1.0"),
        ({"drop": 1.0}, "drop=1.0"),
        ({"deadline": 0.0}, "deadline=0.0"),
        ({"spread": math.inf}, "spread=inf"),
        ({"outer": torch.optim.SGD}, r"Average\(\)"),
        ({"aggregate": "mean"}, r"Median\(\)"),
        ({"secure": SECURE, "aggregate": samestep.Median()}, "their sum alone"),
        ({"privacy": samestep.Privacy(1.0, 1.0, 1e-3), "aggregate": samestep.NormBound(1.0)}, "clipping bounds"),
    ],
)
def test_settings_that_clash(settings, words):
    with pytest.raises(samestep.SettingsError, match=words):
        samestep.Federated(**{"clients": 8, **settings})


def looping(data: Any, way: Any = None, body: Callable | None = None, **settings: Any) -> Callable:
    """Return a `main` that loops over `data`."""

    def main(run: samestep.Run) -> None:
        model = linear()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), agree=way or samestep.Federated(8))
        for step in run.steps(data, **{"batch_size": 2, "steps": 1, **settings}):
            for x, y in step:
                if body is not None:
                    body(step, model, x, y)
                else:
                    step.backward(F.cross_entropy(model(x), y))
            step.update(**({"clip_norm": 1.0} if body is clipped else {}))

    return main


def clipped(step, model, x, y) -> None:
    step.backward(F.cross_entropy(model(x), y))


def skipping_one(step, model, x, y) -> None:
    if step.client != 4:
        step.backward(F.cross_entropy(model(x), y))


def not_a_number(step, model, x, y) -> None:
    step.backward(F.cross_entropy(model(x), y) * (math.nan if step.client == 4 else 1.0))


CLIENTS = samestep.Clients.of(datasets())
BROKEN = samestep.Clients.of([*datasets()[:7], [(torch.zeros(4), 0), None]])


@pytest.mark.parametrize(
    ("main", "error", "words"),
    [
        (looping(datasets()[0]), samestep.UsageError, r"Clients\.of"),
        (looping(CLIENTS, samestep.Synchronous()), samestep.UsageError, "Clients train in rounds"),
        (looping(samestep.Clients.of(datasets()[:3])), samestep.UsageError, "the same Clients in both places"),
        (looping(CLIENTS, steps=None, epochs=3), samestep.SettingsError, "number of rounds"),
        (looping(CLIENTS, batch_size=0), samestep.SettingsError, "batch_size=0"),
        (looping(CLIENTS, epochs=0), samestep.SettingsError, "epochs=0"),
        (looping(CLIENTS, loaders=2), samestep.SettingsError, "leave these out"),
        (looping(CLIENTS, drop_last=True), samestep.SettingsError, "leave these out"),
        (looping(CLIENTS, body=clipped), samestep.UsageError, "after step.backward"),
        (looping(CLIENTS, body=skipping_one), samestep.UsageError, "round 0, client 4"),
        (looping(CLIENTS, body=not_a_number), samestep.NonFiniteError, "round 0, client 4"),
        (looping(BROKEN), samestep.DataError, "Client 7: "),
    ],
)
def test_bad_input_is_one_clear_error(main, error, words):
    with pytest.raises(error, match=words):
        play(main, 1, 2)


def test_a_round_has_one_update():
    def main(run: samestep.Run) -> None:
        model = linear()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), agree=samestep.Federated(CLIENTS))
        for step in run.steps(CLIENTS, batch_size=2, steps=1):
            for _ in range(2):
                for x, y in step:
                    step.backward(F.cross_entropy(model(x), y))
                step.update()

    with pytest.raises(samestep.UsageError, match="A round has one update"):
        play(main, 1, 1)


def test_bad_samples_may_not_be_left_out():
    with pytest.raises(samestep.SettingsError, match="Leave bad samples out"):
        play(script({}, on_bad_sample="skip"), 1, 1)


def test_two_optimizers_are_refused():
    def main(run: samestep.Run) -> None:
        model = net()
        optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[3])]
        run.replicate(model, *optimizers, agree=samestep.Federated(CLIENTS))

    with pytest.raises(samestep.UsageError, match="2 optimizers"):
        play(main, 1, 1)


def test_state_of_replicas_and_losses_over_the_batch_are_refused():
    def with_state(run: samestep.Run) -> None:
        model = linear()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), agree=samestep.Federated(CLIENTS))
        run.per_replica(lambda replica: {"hidden": torch.zeros(1)})
        run.steps(CLIENTS, batch_size=2, steps=1)

    def twice(run: samestep.Run) -> None:
        model = linear()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), agree=samestep.Federated(CLIENTS))
        for step in run.steps(CLIENTS, batch_size=2, steps=1):
            next(step.twice())

    for main, words in ((with_state, "Clients keep nothing"), (twice, "needs one update for all")):
        with pytest.raises(samestep.UsageError, match=words):
            play(main, 1, 1)


def test_too_few_clients_to_trim_is_the_same_error_on_every_worker():
    with pytest.raises(samestep.SettingsError, match="nobody is left"):
        play(script({"sample": 2, "aggregate": samestep.TrimmedMean(0.4)}), 1, 3)


def test_leaves_are_spread_where_their_number_varies():
    cohort = Cohort(seed=0, number=0, samples=dict.fromkeys((3, 4, 9), 1), lost=frozenset({4}), num_leaves=12)
    assert cohort.client_of == {0: 3, 8: 9}
    assert cohort.share(9) == 0.5
    assert np.isclose(cohort.total, 2.0)
