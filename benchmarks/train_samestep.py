"""The same training as `train_plain`, with samestep. The first worker prints one JSON line."""

from __future__ import annotations

import argparse

from stopwatch import Stopwatch, tell
from workloads import WORKLOADS, optimizer_of

import samestep
from samestep.core.integrity import Integrity


def main(run: samestep.Run, args: argparse.Namespace) -> None:
    workload = WORKLOADS[args.workload]
    stopwatch = Stopwatch(args.warm)
    data = workload.data()
    model = workload.model()
    optimizer = optimizer_of(model)
    run.replicate(model, optimizer, audit=args.audit)
    num_steps = args.warm + args.steps
    for step in run.steps(data, workload.batch_size, steps=num_steps, drop_last=True):
        for inputs, targets in step:
            step.backward(workload.loss(model, inputs, targets))
        step.update()
        stopwatch.lap(step.loss)
    if run.worker.is_first:
        num_parameters = sum(p.numel() for p in model.parameters())
        tell({"rank": 0, **stopwatch.facts(workload.batch_size), "num_parameters": num_parameters})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--warm", type=int, default=4, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, required=True, help="timed steps")
    parser.add_argument("--unverified", action="store_true", help="do not look for flipped bits")
    parser.add_argument("--audit", type=float, default=0, help="share of updates in which a shard is computed twice")
    chosen = parser.parse_args()
    if chosen.unverified:
        Integrity.watch = lambda self, wanted=True: None  # type: ignore[method-assign]
    samestep.launch(lambda run: main(run, chosen))
