"""How long a run takes to go on after the death of a worker, and until it has all its workers again.

python benchmarks/recovery.py
python benchmarks/recovery.py --kills 200 --store docs/measured/recovery.md

Trains a small network (train_bare.py) and kills a random worker, again and again, each time some while after the one
before is replaced. A replacement executes the script from its first line, and is told what became of each step so far:
the line through (steps so far, seconds until the fleet is whole) tells what one of these costs, and what a replacement
costs without any.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from report import Table, machine, show, spread, store
from soak import SAME, Fault, Round, Strike, Weather, play

from samestep.launching import environment, zygote
from samestep.launching.script import Script

SCRIPT = Path(__file__).parent / "train_bare.py"
AIMS = {"median": 0.3, "p99": 1.0, "whole": 1.0, "replayed": 50e-6}
"""Seconds: from a kill to the next step, median and 99th percentile; to a whole fleet; per step that is replayed."""


@dataclass
class Killer(Weather):
    """Kills a random worker `every` seconds after the fleet became whole; what comes back is noted.

    Attributes:
        whole: seconds from each kill until its worker was replaced.
        starts_again: the last kill made all start again.
    """

    whole: dict[int, float] = field(default_factory=dict)
    starts_again: bool = False

    def poll(self, now: float, victims: Sequence[Any]) -> None:
        count = self.snapshots.num_calls
        last = self.strikes[-1] if self.strikes else None
        is_down = last is not None and last.recovered_after is None and last.noticed_after is not None
        if last is not None and is_down and count > last.num_calls:
            last.recovered_after = now - last.at
            if self.due == float("inf") and self.starts_again:
                self.due = now + self.every
        alive = [victim for victim in victims if victim.is_alive]
        if now >= self.due and len(alive) == len(victims) and count:
            victim = self.draw.choice(alive)
            self.strikes.append(Strike(Fault("kill"), (victim.rank,), now, count))
            victim.send_signal(9)
            # Until it is heard that the worker is back.
            self.due, self.starts_again = float("inf"), False

    def hear(self, text: str, now: float) -> None:
        if text.endswith("is back."):
            self.whole[len(self.strikes) - 1] = now - self.strikes[-1].at
            self.due = now + self.every
        # Then all are there once there is a new step.
        self.starts_again |= "start again" in text


def line_of(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the value at 0 and the slope of the line through points that is robust (Theil and Sen)."""
    slopes = [(b - d) / (a - c) for i, (a, b) in enumerate(points) for c, d in points[:i] if a != c]
    slope = statistics.median(slopes)
    return statistics.median(b - slope * a for a, b in points), slope


def tables(rounds: Sequence[tuple[Round, dict[int, float]]], num_workers: int) -> list[Table]:
    """Return what there is to show."""
    next_step = sorted(s.recovered_after for r, _ in rounds for s in r.strikes if s.recovered_after is not None)
    points = [(float(r.strikes[i].num_calls), seconds) for r, whole in rounds for i, seconds in whole.items()]
    p99 = next_step[min(len(next_step) - 1, int(0.99 * len(next_step)))]
    start, slope = line_of(points)
    rows = [
        ("kill to the next step, median", statistics.median(next_step), AIMS["median"], "{:.3f} s"),
        ("kill to the next step, 99th percentile", p99, AIMS["p99"], "{:.3f} s"),
        ("kill to a whole fleet, at step 0", start, AIMS["whole"], "{:.3f} s"),
        ("and for each step so far", slope * 1e6, AIMS["replayed"] * 1e6, "{:.1f} us"),
    ]
    table = Table(f"{len(next_step)} kills, {num_workers} workers", ["", "measured", "aim: at most"])
    for name, value, aim, form in rows:
        verdict = "reached" if value <= aim else "missed"
        table.rows.append([name, form.format(value), f"{form.format(aim)}, {verdict}"])
    seconds = [whole for _, whole in points]
    table.notes.append(
        f"To the next step: {spread(next_step, '{:.3f}')} s. To a whole fleet: {spread(seconds, '{:.3f}')} s, after "
        f"{min(p for p, _ in points):,.0f} to {max(p for p, _ in points):,.0f} recorded calls."
    )
    wrong = [word for r, _ in rounds for word in r.wrong]
    table.notes.append(
        "Weights, state, samples and steps: " + ("; ".join(wrong) if wrong else "as undisturbed, to the bit.")
    )
    return [table]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--every", type=float, default=0.7, help="seconds from a whole fleet to the next kill")
    parser.add_argument("--epochs", type=int, default=800, help="of each training, of 16 steps")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--store", metavar="FILE.md")
    args = parser.parse_args()
    where = machine()
    program = Script(path=str(SCRIPT), argv=(str(SCRIPT), str(args.epochs)))
    program.check()
    environment.prepare()
    zygote.warm()
    from samestep.settings.entry import _WARM, _keep

    zygote.warm(_WARM)
    _keep(program)
    calm = play(program, args.workers)
    assert not calm.wrong, calm.wrong
    draw, rounds = random.Random(args.seed), []
    while sum(len(r.strikes) for r, _ in rounds) < args.kills:
        killer = Killer(args.every, draw, time.monotonic() + 1.0)
        made = play(program, args.workers, killer)
        made.wrong += [f"{key} differs" for key in SAME if made.facts and made.facts[key] != calm.facts[key]]
        rounds.append((made, killer.whole))
        print(f"{made.seconds:.1f} s, {len(made.strikes)} kills: {'; '.join(made.wrong) or 'same bits'}", flush=True)
    shown = tables(rounds, args.workers)
    show(shown, where)
    if args.store:
        store(shown, where, Path(args.store))
    sys.exit(any(r.wrong for r, _ in rounds))


if __name__ == "__main__":
    main()
