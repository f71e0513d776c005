"""Losses over the whole batch, and state that each replica keeps."""

from __future__ import annotations

import pytest
import torch
from playing import play
from torch import nn
from torch.nn import functional as F
from ways import samples

import samestep
from samestep.core.per_replica import PerReplica
from samestep.errors import UsageError
from samestep.loop.gathering import Gathering
from samestep.loop.recipe import Keeping


def contrastive(rows: torch.Tensor) -> torch.Tensor:
    """Each row of the first half of columns is to find its own second half among all."""
    one, other = F.normalize(rows[:, :4]), F.normalize(rows[:, 4:])
    return F.cross_entropy(one @ other.T * 5, torch.arange(len(rows)))


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))


def whole_batch(run, normed=False, agree=None, shuffle=False):
    model = network()
    if normed:
        model = nn.Sequential(model[0], nn.BatchNorm1d(16), nn.Dropout(0.3), *model[1:])
    run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.5), agree=agree)
    losses = []
    for step in run.steps((samples()[0],), batch_size=23, epochs=2, shuffle=shuffle, drop_last=normed):
        for (x,) in step.twice():
            rows = step.gather(model(x))
            step.backward(contrastive(rows), whole=True)
        step.update()
        losses.append(step.loss)
    return losses, [p.detach().clone() for p in model.parameters()]


def test_a_loss_over_the_whole_batch_is_that_of_one_big_batch():
    losses, weights = play(whole_batch, 4, 3).result
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, expected = samples()[0], []
    for _ in range(2):
        for start in range(0, len(x), 23):
            optimizer.zero_grad()
            loss = contrastive(model(x[start : start + 23]))
            loss.backward()
            optimizer.step()
            expected.append(float(loss.detach()))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    for one, other in zip(weights, model.parameters(), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-5)


def normed(run):
    return whole_batch(run, normed=True, shuffle=True)


def test_its_bits_do_not_depend_on_workers():
    alone = play(normed, 5, 1).as_words()
    assert [play(normed, 5, workers).as_words() for workers in (2, 5)] == [alone] * 2


def test_rows_of_others_are_needed(monkeypatch):
    monkeypatch.setattr(Gathering, "share", lambda self, calls: setattr(self, "is_first", False))
    alone = play(normed, 4, 1).as_words()
    assert play(normed, 4, 2).as_words() != alone


def test_what_cannot_be_gathered_is_refused():
    with pytest.raises(UsageError, match=r"one update for all replicas \(here agree=Local"):
        play(lambda run: whole_batch(run, agree=samestep.Local(every=2)), 4, 1)

    def outside(run):
        model = network()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.5))
        for step in run.steps((samples()[0],), batch_size=23, steps=1):
            for (x,) in step:
                step.gather(model(x))

    with pytest.raises(UsageError, match="outside of `for batch in step.twice"):
        play(outside, 4, 1)


def remembering(run, agree=None, steps=9):
    """A network that is told what its replica saw before."""
    model = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 1))
    run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), agree=agree)
    memory = run.per_replica(lambda replica: {"seen": torch.zeros(1) + replica, "noise": torch.randn(2)})
    told = []
    for step in run.steps(samples(72), batch_size=24, steps=steps):
        for x, y in step:
            said = model(torch.cat([x, memory["seen"].expand(len(x), 1)], 1))
            step.mean(seen=memory["seen"], noise=memory["noise"][0])
            step.backward((said - y).square().mean())
            memory["seen"] = memory["seen"] * 0.9 + x.mean() + step.replica
        step.update()
        told.append(dict(step.means))
    return told


@pytest.mark.parametrize("agree", [samestep.Synchronous(), samestep.Local(every=3)], ids=["synchronous", "local"])
def test_state_goes_with_its_replica(agree, tmp_path):
    def main(run):
        return remembering(run, agree)

    whole = play(main, 4, 1, keeping=Keeping(checkpoint=str(tmp_path / "run"), every=1, keep=100))
    assert len({told["seen"] for told in whole.result}) == len(whole.result)
    assert len({told["noise"] for told in whole.result}) == 1
    for workers in (2, 4):
        assert play(main, 4, workers).as_words() == whole.as_words()
    (folder,) = (tmp_path / "run").glob("step-*5")
    assert play(main, 4, 3, keeping=Keeping(resume=str(folder))).as_words() == whole.as_words()


def test_state_that_is_not_kept_is_found(monkeypatch):
    whole = play(remembering, 4, 2).as_words()
    monkeypatch.setattr(PerReplica, "commit", lambda self: None)
    assert play(remembering, 4, 2).as_words() != whole


def test_states_of_replicas_are_alike():
    def main(run):
        model = network()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.5))
        run.per_replica(lambda replica: {"h": torch.zeros(replica + 1)})

    with pytest.raises(UsageError, match=r"made h \(2,\) float32 for replica 1, and h \(1,\) float32 for replica 0"):
        play(main, 4, 1)

    def outside(run):
        model = network()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.5))
        run.per_replica(lambda replica: {"h": torch.zeros(1)})["h"]

    with pytest.raises(UsageError, match="outside of `for batch in step`"):
        play(outside, 4, 1)


def test_batch_norm_that_talks_by_itself_is_refused():
    def main(run):
        model = nn.Sequential(nn.Linear(6, 4), nn.SyncBatchNorm(4))
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.5))

    with pytest.raises(UsageError, match="'1' is a SyncBatchNorm"):
        play(main, 4, 1)
