"""samestep against plain DDP over gloo, and against one process with all threads: same work, in turn, several rounds.

    python benchmarks/compare.py                             everything; took 13 minutes on two cores
    python benchmarks/compare.py --quick                     one short round
    python benchmarks/compare.py --parts steps --workloads mlp --rounds 9
    python benchmarks/compare.py --store docs/measured/compare.md

Figures are medians over rounds. A ratio is the median of the ratios within each round, because machines drift.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contestants
import figures
from contestants import Contestant
from report import Table, machine, show, store
from workloads import WORKLOADS

Rounds = list[dict[str, Any]]
"""Facts of one contestant, one entry per round."""

STEPPED = ("cnn", "mlp", "gpt")
NUM_WARM = 4


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to measure.

    Attributes:
        rounds: how often each contestant runs.
        workers: processes, where there are several.
        scale: factor on the number of timed steps.
        workloads: which models.
        one_thread: whether one process with one thread runs, too.
    """

    rounds: int
    workers: int
    scale: float
    workloads: tuple[str, ...]
    one_thread: bool

    def steps(self, workload: str) -> tuple[str, ...]:
        """Return the options that name a workload and its length."""
        num_steps = max(2, round(WORKLOADS[workload].num_steps * self.scale))
        return "--workload", workload, "--warm", str(NUM_WARM), "--steps", str(num_steps)


def in_turn(
    entrants: Mapping[str, Contestant], rounds: int, what: str, arguments: tuple[str, ...] = ()
) -> dict[str, Rounds]:
    """Run all contestants, one after the other, `rounds` times."""
    facts: dict[str, Rounds] = {name: [] for name in entrants}
    for number in range(rounds):
        for name, entrant in entrants.items():
            begin = time.monotonic()
            facts[name].append(entrant.run(*arguments))
            print(
                f"{what}, round {number + 1} of {rounds}: {entrant.title}, {time.monotonic() - begin:.1f} s",
                file=sys.stderr,
            )
    return facts


def measure_steps(plan: Plan) -> list[Table]:
    """Whole steps of real models."""
    entrants = {
        "ours": contestants.samestep_run("samestep, 8 replicas", plan.workers, 8),
        "workers": contestants.samestep_run("samestep, replicas = workers", plan.workers, "workers"),
        "ddp": contestants.ddp("DDP + gloo", plan.workers),
        "threads": contestants.one_process("one process, all threads", plan.workers),
    }
    if plan.one_thread:
        entrants["thread"] = contestants.one_process("one process, 1 thread", 1)
    titles = {name: entrant.title for name, entrant in entrants.items()}
    by_workload = {
        workload: in_turn(entrants, plan.rounds, WORKLOADS[workload].title, plan.steps(workload))
        for workload in plan.workloads
    }
    return [figures.speed(by_workload, titles), figures.peers(by_workload)]


def measure_update(plan: Plan) -> list[Table]:
    """Reduce and update alone, against the memory's bandwidth."""
    entrants = {"arena": contestants.reduce_in_arena(plan.workers), "gloo": contestants.reduce_with_gloo(plan.workers)}
    rounds = min(3, plan.rounds)
    facts = in_turn(entrants, rounds, "reduce and update", ("--rounds", str(max(3, round(15 * plan.scale)))))
    return figures.update(facts["arena"], facts["gloo"], plan.workers)


def measure_overhead(plan: Plan) -> list[Table]:
    """One worker and one replica against the plain loop."""
    entrants = {
        "ours": contestants.samestep_run("samestep, 1 worker, 1 replica", 1, 1),
        "plain": contestants.one_process("plain loop", 1),
    }
    facts = in_turn(entrants, min(3, plan.rounds), WORKLOADS["small"].title, plan.steps("small"))
    return [figures.overhead(facts["ours"], facts["plain"], num_tensors=100)]


def measure_start(plan: Plan) -> list[Table]:
    """Seconds from the command to the end of the first step."""
    entrants = {
        "run": contestants.samestep_run("samestep run", plan.workers, 8),
        "script": contestants.samestep_script("python script.py, samestep"),
        "plain": contestants.one_process("python script.py, plain", 1),
        "ddp": contestants.ddp("torchrun, DDP + gloo", plan.workers),
    }
    titles = {name: entrant.title for name, entrant in entrants.items()}
    short = ("--workload", "cnn", "--warm", "1", "--steps", "1")
    return [figures.start(in_turn(entrants, min(3, plan.rounds), "first step", short), titles)]


def measure_memory(plan: Plan) -> list[Table]:
    """Memory of four workers that train the wide MLP."""
    entrants = {
        "ours": contestants.samestep_run("samestep, 4 workers, 8 replicas", 4, 8),
        "ddp": contestants.ddp("DDP + gloo, 4 processes", 4),
    }
    titles = {name: entrant.title for name, entrant in entrants.items()}
    facts = in_turn(entrants, 1, "memory", ("--workload", "mlp", "--warm", "2", "--steps", "2"))
    return [figures.memory(facts["ours"][0], facts["ddp"][0], titles)]


PARTS: dict[str, Callable[[Plan], list[Table]]] = {
    "steps": measure_steps,
    "update": measure_update,
    "overhead": measure_overhead,
    "start": measure_start,
    "memory": measure_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of timed steps")
    parser.add_argument("--quick", action="store_true", help="one round of a third of the steps: does it run at all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--workloads", nargs="+", choices=STEPPED, default=list(STEPPED))
    parser.add_argument("--one-thread", action="store_true", help="also one process with one thread")
    parser.add_argument("--store", type=Path, help="write a document")
    args = parser.parse_args()
    plan = Plan(
        rounds=1 if args.quick else args.rounds,
        workers=args.workers,
        scale=args.scale / 3 if args.quick else args.scale,
        workloads=tuple(args.workloads),
        one_thread=args.one_thread,
    )
    where = machine()
    tables = [table for part in args.parts for table in PARTS[part](plan)]
    show(tables, where)
    if args.store is not None:
        store(tables, where, args.store)


if __name__ == "__main__":
    main()
