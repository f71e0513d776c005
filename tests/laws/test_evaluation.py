"""The law: evaluation is exact: every sample once, whatever the workers and the batch size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from playing import EIGHT, assert_same_bits, play
from torch.nn import functional as F
from zoo import Convolutional, images


def evaluating(batch_size: int):
    """Return a script that only evaluates; its model is in train mode, but for one part."""

    def main(run):
        model = Convolutional()
        model.norm.eval()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
        modes: list = []

        def losses(batch):
            modes.append((model.training, model.norm.training, model.dropout.training, torch.is_grad_enabled()))
            return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

        told = {
            "mean": run.mean(losses, images(), batch_size),
            "of means": run.mean(lambda b: losses(b).mean(), images(), batch_size),
            "of floats": run.mean(lambda b: float(losses(b).mean()), images(), batch_size),
            "named": run.mean(lambda b: {"loss": losses(b), "hits": _hits(model, b)}, images(), batch_size),
            "tensor": run.gather(losses, images(), batch_size),
            "array": torch.from_numpy(run.gather(lambda b: losses(b).numpy(), images(), batch_size)),
            "list": run.gather(lambda b: [float(x) for x in losses(b)], images(), batch_size),
            "tuple": run.gather(lambda b: tuple(x.item() for x in losses(b)), images(), batch_size),
            "noise": run.gather(lambda b: torch.rand(len(b[0])), images(), batch_size),
        }
        # With few batches some workers have none.
        assert set(modes) == {(False, False, False, False)} or (not modes and run.worker.size > 1)
        assert (model.training, model.norm.training, model.dropout.training) == (True, False, True)
        assert torch.is_grad_enabled()
        model.eval()
        with torch.no_grad():
            told["plain"] = F.cross_entropy(model(images()[0]), images()[1], reduction="none")
            told["plain hits"] = _hits(model, images())
        return told

    return main


def _hits(model, batch):
    return (model(batch[0]).argmax(1) == batch[1]).float()


def assert_exact(batch_size: int) -> None:
    """The law: the same bits on any number of workers, and what plain code computes."""
    told = assert_same_bits(evaluating(batch_size), EIGHT).result
    plain, hits = told["plain"].double(), told["plain hits"].double()
    for name in ("mean", "of means", "of floats"):
        assert told[name] == pytest.approx(float(plain.mean()), rel=1e-6), name
    assert told["named"]["loss"] == told["mean"]
    assert told["named"]["hits"] == pytest.approx(float(hits.mean()), abs=1e-12)
    assert told["tensor"].shape == (len(plain),)
    torch.testing.assert_close(told["tensor"].double(), plain, rtol=1e-5, atol=1e-6)
    assert told["mean"] == math.fsum(told["tensor"].double().tolist()) / len(plain)
    assert torch.equal(told["array"], told["tensor"])
    assert told["list"] == told["tuple"] == told["tensor"].tolist()
    assert len(set(told["noise"].tolist())) > 0.9 * len(plain), "batches drew the same numbers"


@pytest.mark.parametrize("batch_size", [1, 7, 53, 100])
def test_exact(batch_size):
    assert_exact(batch_size)


def test_modes_come_back_after_an_error():
    def main(run):
        model = Convolutional()
        model.norm.eval()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.raises(ZeroDivisionError):
            run.mean(lambda b: 1 / 0, images(), 9)
        assert (model.training, model.norm.training, model.dropout.training) == (True, False, True)
        assert torch.is_grad_enabled()

    play(main, 2, 1)


def test_other_kinds_of_data():
    class Numbers:
        def __len__(self):
            return 11

        def __getitem__(self, i):
            return {"x": np.float64(i), "y": i}

    def main(run):
        model = torch.nn.Linear(1, 1)
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
        return (
            run.mean(lambda b: b["x"], Numbers(), 4),
            run.gather(lambda b: [{"y": int(y), "text": "é"} for y in b["y"]], Numbers(), 4),
            run.mean(lambda b: b.float(), torch.arange(11), 4),
        )

    mean, rows, other = assert_same_bits(main, [(8, 1), (8, 2), (8, 5)]).result
    assert mean == other == 5.0
    assert rows == [{"y": i, "text": "é"} for i in range(11)]


def test_recorded_once():
    """run.once runs on the first worker alone and gives its result to all, with generators as they should be."""

    def main(run):
        model = torch.nn.Linear(1, 1)
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
        called = []

        def work():
            called.append(run.worker.rank)
            torch.rand(run.worker.rank + 3)
            return {"tensor": torch.arange(3), "tuple": (1, None, "x"), "bytes": b"ab", "rank": run.worker.rank}

        result = run.once(work)
        assert called == ([0] if run.worker.rank == 0 else [])
        assert result["tuple"] == (1, None, "x")
        return result["rank"], str(result["bytes"]), result["tensor"], float(torch.rand(()))

    assert assert_same_bits(main, [(8, 1), (8, 3)]).result[0] == 0
