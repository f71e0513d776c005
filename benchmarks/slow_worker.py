"""What it brings that replicas move away from a slow worker, and what it costs where none is slow.

python benchmarks/slow_worker.py
python benchmarks/slow_worker.py --slow 1 2 3 --pairs 20 --store docs/measured/slow-worker.md

The second worker sleeps after each shard, so that it takes so many times as long. Once replicas have moved, the run
goes on in blocks of steps, in turn with the division that was found and with the even one; if they have not, in turn
with balance and without. So what else the machine does meets both alike.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from report import Table, machine, ratios, show, spread, store
from workloads import WORKLOADS, optimizer_of

import samestep
from samestep.core.division import Division

NUM_REPLICAS = 8
MOST_WARM, BLOCK = 80, 16


def main(slow: float, args: argparse.Namespace, run: samestep.Run) -> dict[str, Any]:
    """Train; return the division that was found, when, and seconds per step of the blocks with it and without."""
    workload = WORKLOADS[args.workload]
    data, model = workload.data(), workload.model()
    run.replicate(model, optimizer_of(model))
    crew = run._session.crew

    def play(num_steps: int, is_enough: Callable[[], bool] = lambda: False) -> float:
        """Make steps; return the median of what they took, but for the first."""
        laps = []
        for step in run.steps(data, workload.batch_size, steps=num_steps, drop_last=True):
            for inputs, targets in step:
                begin = time.perf_counter()
                step.backward(workload.loss(model, inputs, targets))
                if run.worker.rank == 1:
                    time.sleep((slow - 1) * (time.perf_counter() - begin))
            step.update()
            laps.append(time.perf_counter())
            if is_enough():
                break
        return statistics.median(b - a for a, b in pairwise(laps)) if len(laps) > 1 else 0.0

    even = Division.even(run.worker.size, NUM_REPLICAS)
    # All workers weigh the same numbers, so this is the same on each.
    play(MOST_WARM, lambda: bool(crew.balance.moves))
    found, moves = crew.model.division, crew.balance.moves
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    for number in range(args.pairs):
        for name, division in (("on", found), ("off", even))[:: -1 if number % 2 else 1]:
            crew.balance = type(crew.balance)(wanted=found == even and name == "on")
            crew.model.divide(division)
            seconds[name].append(play(BLOCK))
    return {"moved_after": moves[0].step if moves else 0, "counts": list(found.counts), **seconds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=8, help="blocks of each kind")
    parser.add_argument("--slow", type=float, nargs="+", default=[1.0, 2.0, 3.0], metavar="X")
    parser.add_argument("--workload", choices=list(WORKLOADS), default="cnn")
    parser.add_argument("--store", metavar="FILE.md")
    args = parser.parse_args()
    columns = ["the second worker takes", "replicas moved", "balanced", "even", "ratio", "the least there could be"]
    title = f"Seconds per step, {WORKLOADS[args.workload].title}, {args.workers} workers, {NUM_REPLICAS} replicas"
    table, where = Table(title, columns), machine()
    for slow in args.slow:
        made = functools.partial(main, slow, args)
        told = samestep.launch(made, replicas=NUM_REPLICAS, workers=args.workers)
        ratio = ratios(told["on"], told["off"])
        costs = [slow if rank == 1 else 1.0 for rank in range(args.workers)]
        best = Division.by_cost(costs, NUM_REPLICAS).seconds(costs)
        least = best / Division.even(args.workers, NUM_REPLICAS).seconds(costs)
        moved = f"to {told['counts']} after step {told['moved_after']}" if told["moved_after"] else "no"
        cells = [spread(told["on"], "{:.4f}"), spread(told["off"], "{:.4f}"), spread(ratio, "{:.2f}"), f"{least:.2f}"]
        table.rows.append([f"{slow:g} times as long" if slow != 1 else "as long as the other", moved, *cells])
    table.notes.append(f"Blocks of {BLOCK} steps, one of each kind in turn; a ratio is the median over the pairs.")
    show([table], where)
    if args.store:
        store([table], where, Path(args.store))
