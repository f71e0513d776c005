"""Reduce alone, and reduce with the update, of one gradient: the arena against gloo. Prints one JSON line.

    reduce          ours: every sum is made once, by its owner, in cache, where the optimizer reads it
    all-reduce      ours: the sums are stored where every worker can read them; gloo: `all_reduce` in place
    update          ours: `step.update()` as a run makes it, but for the user's call; gloo: `all_reduce`, then every
                    process runs the fused AdamW on its own copy
    clipped update  ours: the same, with the global norm

Without --gloo it forks the workers itself, so that nothing but the mechanism is timed.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable

import torch
from bandwidth import measure, median_seconds
from stopwatch import tell
from torch import distributed, nn

KIB, MIB = 1 << 10, 1 << 20
SIZES = {"64 KiB": 64 * KIB, "25 MiB": 25 * MIB, "100 MiB": 100 * MIB}
INNER = {"64 KiB": 50, "25 MiB": 2, "100 MiB": 1}


class One(nn.Module):
    """A model of one tensor."""

    def __init__(self, num_bytes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_bytes // 4))


def ours(num_workers: int, num_rounds: int) -> None:
    """Fork the workers and wait for them."""
    from samestep.core.arena import Handles

    handles = Handles.create(num_workers)
    pids = []
    for rank in range(num_workers):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                play(rank, num_workers, num_rounds, handles)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        pids.append(pid)
    failed = False
    for _ in pids:
        _, status = os.wait()
        if status:
            failed = True
            handles.abort()
    handles.close()
    sys.exit(int(failed))


def play(rank: int, num_workers: int, num_rounds: int, handles: object) -> None:
    """Be one worker."""
    from samestep.core.arena import Arena
    from samestep.core.worker import Worker

    group = Arena(Worker(rank=rank, size=num_workers, local_rank=rank), handles)

    def meet() -> None:
        group.exchange(b"")

    facts: dict[str, object] = {}
    for name, num_bytes in SIZES.items():
        facts[name] = {
            kind: median_seconds(work, meet, num_rounds, INNER[name])
            for kind, work in arena_works(group, num_workers, num_bytes).items()
        }
    facts["bandwidth"] = measure(meet, num_workers)
    if rank == 0:
        tell(facts)


def arena_works(group: object, num_workers: int, num_bytes: int) -> dict[str, Callable[[], object]]:
    """Return what is timed, for a gradient of `num_bytes` that has been folded into the arena."""
    from samestep.agree.meeting import Part, Request
    from samestep.agree.synchronous import Synchronous
    from samestep.core.calls import Calls
    from samestep.core.clock import Clock
    from samestep.core.model import Model, Options

    torch.manual_seed(0)
    module = One(num_bytes)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    model = Model([module, optimizer], group, Options(num_replicas=num_workers))
    clock = Clock()
    agreed = Synchronous().bind(model, group, Calls(group, clock), clock)
    trained, rank = model.trained[0], group.worker.rank
    trained.gradients.begin_pass()
    trained.gradients.begin_shard(0)
    module.weight.grad = torch.randn(num_bytes // 4) * 1e-3
    trained.gradients.end_shard()
    stored = group.allocate(num_bytes).view(torch.float32)
    chunks = trained.weights.layout.chunks[rank]
    part = Part(losses=[(rank, 1.0, 1.0)], counted=False, samples={rank: 1})

    def request(clip_norm: float | None) -> Request:
        return Request(
            where="",
            optimizer=0,
            clip_norm=clip_norm,
            scale=1.0,
            scaled=False,
            transform=None,
            seeds=(0, 0, 0),
            num_samples=num_workers,
            describe=str,
        )

    def reduce() -> None:
        group.exchange(b"")
        trained.area.collect()
        for index in range(len(chunks)):
            trained.sums.chunk(index, {}, 1.0)

    def all_reduce() -> None:
        group.exchange(b"")
        trained.area.collect()
        for index, chunk in enumerate(chunks):
            for piece, total in zip(chunk, trained.sums.chunk(index, {}, 1.0), strict=True):
                stored[piece.start : piece.stop].copy_(total)
        group.exchange(b"")

    plain, clipped = request(None), request(1e-3)
    return {
        "reduce": reduce,
        "all-reduce": all_reduce,
        "update": lambda: agreed.update(plain, part),
        "clipped update": lambda: agreed.update(clipped, part),
    }


def gloo(num_rounds: int) -> None:
    """Be one process of gloo's group; started by torchrun."""
    distributed.init_process_group("gloo")
    facts = {}
    for name, num_bytes in SIZES.items():
        module = One(num_bytes)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
        # Zeros, because the sum of sums of other numbers would overflow before the rounds are over.
        gradient = module.weight.grad = torch.zeros(num_bytes // 4)

        def update(gradient: torch.Tensor = gradient, optimizer: torch.optim.Optimizer = optimizer) -> None:
            distributed.all_reduce(gradient)
            optimizer.step()

        works = {"all-reduce": lambda gradient=gradient: distributed.all_reduce(gradient), "update": update}
        facts[name] = {k: median_seconds(w, distributed.barrier, num_rounds, INNER[name]) for k, w in works.items()}
    if distributed.get_rank() == 0:
        tell(facts)
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gloo", action="store_true", help="measure gloo, under torchrun")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each figure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.gloo:
        gloo(args.rounds)
    else:
        ours(args.workers, args.rounds)


if __name__ == "__main__":
    main()
