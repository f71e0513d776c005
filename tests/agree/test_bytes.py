"""What crosses from one worker to another where memory is not shared, counted where it is handed to torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from playing import play_one
from torch import nn

import samestep
from samestep.agree.local import LiveLocal
from samestep.agree.synchronous import LiveSynchronous
from samestep.codecs import BFloat16, Feedback, Int8, PowerSGD, Sign, TopK

REPLICAS, STEPS = 5, 12
MEETING_BYTES = 1500
"""What workers tell each other beside weights and gradients takes less, per step and other worker."""

WAYS: dict[str, Any] = {
    "as they are": samestep.Synchronous(),
    "int8": samestep.Synchronous(codec=Int8()),
    "sign, warmed up": samestep.Synchronous(codec=Feedback(Sign(), warm_up=3)),
    "PowerSGD": samestep.Synchronous(codec=PowerSGD(rank=2)),
    "local": samestep.Local(every=4),
    "local in fragments, bf16": samestep.Local(every=5, fragments=3, codec=BFloat16()),
    "local, warmed up, top-k": samestep.Local(every=4, warm_up=2, codec=TopK(share=0.1)),
    "local, overlapped, int8": samestep.Local(every=4, fragments=2, delay=3, codec=Int8()),
}


class Sent:
    """Counts bytes that this process sends to others."""

    def __init__(self) -> None:
        self.num_bytes = 0
        all_to_all, batch = dist.all_to_all_single, dist.batch_isend_irecv

        def counted_all_to_all(into: torch.Tensor, given: torch.Tensor, **options: Any) -> Any:
            self.num_bytes += given[:1].nbytes * (len(given) - 1)
            return all_to_all(into, given, **options)

        def counted_batch(operations: list[dist.P2POp]) -> Any:
            self.num_bytes += sum(one.tensor.nbytes for one in operations if one.op is dist.isend)
            return batch(operations)

        dist.all_to_all_single, dist.batch_isend_irecv = counted_all_to_all, counted_batch


def bytes_of(group, names: list[str], plant: bool = False) -> dict[str, list[int]]:
    """Program of a worker: return how many bytes it sent to the other under some ways, and what was due."""
    sent, found = Sent(), {}
    if plant:
        plant_weights_that_cross()

    def main(run: samestep.Run) -> list[int]:
        model = nn.Sequential(nn.Linear(64, 160), nn.Tanh(), nn.Linear(160, 160), nn.Tanh(), nn.Linear(160, 4))
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), agree=WAYS[name])
        x = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
        before = sent.num_bytes
        for step in run.steps(x, batch_size=20, steps=STEPS):
            for rows in step:
                step.backward(model(rows).square().mean())
            step.update()
        return [sent.num_bytes - before, due(run)]

    for name in names:
        found[name] = play_one(group, main, REPLICAS).result
    return found


def due(run: samestep.Run) -> int:
    """Return what one of two workers is to send for gradients and weights, by what the recipe states."""
    stated = run._session.agreed.facts().get("bytes_per_replica")
    if stated is not None:
        return stated * len(run._session.crew.replicas)
    # What it has folded, to the owners; and the weights that it owns, to the other.
    rank, trained = run.worker.rank, run.model.trained[0]
    layout = trained.weights.layout
    folded = trained.num_nodes[rank] * (layout.sum_bytes - len(layout.sum_runs[rank]))
    return STEPS * (folded + len(layout.runs[rank]))


def plant_weights_that_cross() -> None:
    """Let the weights cross after every update that nobody needs."""
    for live in (LiveSynchronous, LiveLocal):

        def update(self, *args, _update=live.update):
            outcome = _update(self, *args)
            self.model.share_weights()
            return outcome

        live.update = update


def wrong(name: str, told: list[dict[str, list[int]]]) -> list[str]:
    """Return what is not as stated, of each worker."""
    found = []
    for rank, (crossed, stated) in enumerate(one[name] for one in told):
        if not stated <= crossed <= stated + STEPS * MEETING_BYTES:
            found.append(f"worker {rank} of 2 sent {crossed} bytes under {WAYS[name]}, which states {stated}")
    return found


@pytest.fixture(scope="module")
def told(fleet) -> list[dict[str, list[int]]]:
    return fleet.play(bytes_of, "gloo", 2, names=list(WAYS))


@pytest.mark.parametrize("name", WAYS)
def test_what_crosses_is_what_is_stated(told, name):
    assert not wrong(name, told)


def test_the_bound_leaves_no_room_for_weights(told):
    plain = max(crossed for crossed, _ in (one["as they are"] for one in told))
    assert plain / STEPS > 50 * MEETING_BYTES
    for name in WAYS.keys() - {"as they are"}:
        assert max(one[name][0] for one in told) < 0.7 * plain, name


def test_weights_that_cross_without_need_are_found(fleet):
    told = fleet.play(bytes_of, "gloo", 2, names=["int8", "local, overlapped, int8"], plant=True)
    assert all(wrong(name, told) for name in told[0])
