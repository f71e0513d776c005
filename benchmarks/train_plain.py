"""A plain PyTorch loop: alone, with some threads, or under torchrun with DDP. Prints one JSON line per process.

Data come from memory by an index of the batch, the cheapest way there is.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

import torch
from stopwatch import Stopwatch, tell
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from workloads import WORKLOADS, optimizer_of


def batches(num_samples: int, batch_size: int, num_steps: int) -> Iterator[torch.Tensor]:
    """Yield the ids of each batch; short batches are left out."""
    step = 0
    while True:
        order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(step))
        for start in range(0, num_samples - batch_size + 1, batch_size):
            if step == num_steps:
                return
            yield order[start : start + batch_size]
            step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--warm", type=int, default=4, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, required=True, help="timed steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bucket-view", action="store_true", help="DDP: gradients are views of its buckets")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rank, num_workers = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    workload = WORKLOADS[args.workload]
    torch.manual_seed(0)
    stopwatch = Stopwatch(args.warm)
    inputs, targets = workload.data()
    model = workload.model()
    in_group = "RANK" in os.environ
    if in_group:
        distributed.init_process_group("gloo")
        model = DistributedDataParallel(model, gradient_as_bucket_view=args.bucket_view)
    optimizer = optimizer_of(model)
    size = workload.batch_size
    for ids in batches(len(targets), size, args.warm + args.steps):
        mine = ids[rank * size // num_workers : (rank + 1) * size // num_workers]
        loss = workload.loss(model, inputs[mine], targets[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        stopwatch.lap(loss.item())
    if in_group:
        distributed.barrier()
    tell({"rank": rank, **stopwatch.facts(size)})
    if in_group:
        # Memory counts in part for each process while all are there.
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
