"""What it brings that replicas move away from a slow worker, and what it costs where none is slow.

python benchmarks/slow_worker.py
python benchmarks/slow_worker.py --rounds 5 --slow 1 2 3 --store docs/measured/slow-worker.md

The second worker sleeps after each shard, so that it takes so many times as long. Timed are the steps after the first
move, which comes within the warm ones.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from compare import in_turn
from contestants import Contestant
from figures import of
from report import Table, machine, ratios, show, spread, store
from workloads import WORKLOADS

NUM_WARM = 48
"""Steps before the timed ones: the first move takes two windows of 16, or of half a second where that is more."""


def entrant(title: str, num_workers: int, option: str) -> Contestant:
    """Return `samestep run` with 8 replicas and a further option."""
    shape = ("--workers", str(num_workers), "--replicas", "8", "--summary", "{summary}")
    return Contestant(
        title=title,
        before=(sys.executable, "-m", "samestep", "run", *shape, option),
        script="train_samestep.py",
        options=("--",),
        writes_summary=True,
    )


def moves_in_words(rounds: list[dict[str, Any]]) -> str:
    """Return how replicas were divided in the end, in each round."""
    ends = ["-".join(map(str, facts["moves"][-1]["replicas_after"])) if facts["moves"] else "even" for facts in rounds]
    return ", ".join(ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="timed steps")
    parser.add_argument("--slow", type=float, nargs="+", default=[1.0, 3.0], metavar="X")
    parser.add_argument("--workload", choices=list(WORKLOADS), default="cnn")
    parser.add_argument("--store", metavar="FILE.md")
    args = parser.parse_args()
    entrants = {"on": entrant("--balance", args.workers, "--balance")}
    entrants["off"] = entrant("--no-balance", args.workers, "--no-balance")
    workload = WORKLOADS[args.workload]
    columns = ["the second worker takes", "--balance", "--no-balance", "ratio", "replicas in the end"]
    table = Table(f"Seconds per step, {workload.title}, {args.workers} workers, 8 replicas", columns)
    for slow in args.slow:
        arguments = ("--workload", args.workload, "--warm", str(NUM_WARM), "--steps", str(args.steps))
        facts = in_turn(entrants, args.rounds, f"{slow:g} times", (*arguments, "--slow", str(slow)))
        on, off = of(facts["on"], "seconds_per_step"), of(facts["off"], "seconds_per_step")
        ratio = ratios(on, off)
        cells = [spread(on, "{:.4f}"), spread(off, "{:.4f}"), spread(ratio, "{:.2f}"), moves_in_words(facts["on"])]
        table.rows.append([f"{slow:g} times as long" if slow != 1 else "as long as the other", *cells])
        print(f"{slow:g} times: {statistics.median(ratio):.2f} of the time", file=sys.stderr)
    table.notes.append("A ratio is the median of the ratios within each round, because machines drift.")
    where = machine()
    show([table], where)
    if args.store:
        store([table], where, Path(args.store))


if __name__ == "__main__":
    main()
