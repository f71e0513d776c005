"""What it costs, without any fault, that a run survives them: as it comes against --no-protect --hang-after 0.

python benchmarks/protection.py
python benchmarks/protection.py --rounds 9 --workloads cnn gpt --store docs/measured/protection.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from compare import in_turn
from contestants import Contestant
from figures import of
from report import Table, machine, ratios, show, spread, store
from workloads import WORKLOADS

AIMS = {"cnn": 1.02, "gpt": 1.02, "mlp": 1.10}
"""Most that a step may take, times the unprotected one."""
NUM_WARM = 4


def entrant(title: str, num_workers: int, *options: str) -> Contestant:
    """Return `samestep run` with 8 replicas and further options."""
    shape = ("--workers", str(num_workers), "--replicas", "8", "--summary", "{summary}")
    return Contestant(
        title=title,
        before=(sys.executable, "-m", "samestep", "run", *shape, *options),
        script="train_samestep.py",
        options=("--",),
        writes_summary=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scale", type=float, default=2.0, help="factor on the number of timed steps")
    parser.add_argument("--workloads", nargs="+", choices=list(AIMS), default=list(AIMS))
    parser.add_argument("--store", metavar="FILE.md")
    args = parser.parse_args()
    entrants = {
        "on": entrant("protected", args.workers),
        "off": entrant("--no-protect --hang-after 0", args.workers, "--no-protect", "--hang-after", "0"),
    }
    table = Table("Seconds per step, without faults", ["workload", "protected", "not", "ratio", "aim: at most"])
    for name in args.workloads:
        num_steps = str(max(2, round(WORKLOADS[name].num_steps * args.scale)))
        arguments = ("--workload", name, "--warm", str(NUM_WARM), "--steps", num_steps)
        facts = in_turn(entrants, args.rounds, WORKLOADS[name].title, arguments)
        on, off = of(facts["on"], "seconds_per_step"), of(facts["off"], "seconds_per_step")
        ratio = ratios(on, off)
        verdict = "reached" if sorted(ratio)[len(ratio) // 2] <= AIMS[name] else "missed"
        title = WORKLOADS[name].title
        table.rows.append(
            [title, spread(on, "{:.4f}"), spread(off, "{:.4f}"), spread(ratio, "{:.3f}"), f"{AIMS[name]:g}, {verdict}"]
        )
    table.notes.append("A ratio is the median of the ratios within each round, because machines drift.")
    where = machine()
    show([table], where)
    if args.store:
        store([table], where, Path(args.store))


if __name__ == "__main__":
    main()
