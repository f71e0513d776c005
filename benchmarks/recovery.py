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
from soak import SAME, Fault, Round, Strike, Weather, opened, play

SCRIPT = Path(__file__).parent / "train_bare.py"
AIMS = {"median": 0.3, "p99": 1.0, "whole": 1.0, "replayed": 50e-6}
"""Seconds: from a kill to the next step, median and 99th percentile; to a whole fleet; per step that is replayed."""


@dataclass
class Killer(Weather):
    """Kills a random worker `every` seconds after the fleet became whole; what comes back is noted.

    Attributes:
        whole: seconds from a kill until its worker was replaced, by the number of the kill.
        again: numbers of the kills after which all started again from the newest state.
    """

    whole: dict[int, float] = field(default_factory=dict)
    again: set[int] = field(default_factory=set)

    def poll(self, now: float, victims: Sequence[Any]) -> None:
        count = self.snapshots.num_calls
        last = self.strikes[-1] if self.strikes else None
        is_down = last is not None and last.recovered_after is None and last.noticed_after is not None
        if last is not None and is_down and count > last.num_calls:
            last.recovered_after = now - last.at
            if len(self.strikes) - 1 in self.again:
                # All are there once there is a new step.
                self.due = now + self.every
        alive = [victim for victim in victims if victim.is_alive]
        if now >= self.due and len(alive) == len(victims) and count:
            victim = self.draw.choice(alive)
            self.strikes.append(Strike(Fault("kill"), (victim.rank,), now, count))
            victim.send_signal(9)
            # Until it is heard that the worker is back.
            self.due = float("inf")

    def hear(self, text: str, now: float) -> None:
        if text.endswith("is back."):
            self.whole[len(self.strikes) - 1] = now - self.strikes[-1].at
            self.due = now + self.every
        if "start again" in text:
            self.again.add(len(self.strikes) - 1)


def line_of(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the value at 0 and the slope of the line through points that is robust (Theil and Sen)."""
    slopes = [(b - d) / (a - c) for i, (a, b) in enumerate(points) for c, d in points[:i] if a != c]
    slope = statistics.median(slopes)
    return statistics.median(b - slope * a for a, b in points), slope


def tables(rounds: Sequence[tuple[Round, Killer]], num_workers: int) -> list[Table]:
    """Return what there is to show."""
    back: dict[bool, list[float]] = {False: [], True: []}
    replayed, points = [], []
    for made, killer in rounds:
        for number, strike in enumerate(made.strikes):
            if strike.recovered_after is None:
                continue
            is_again = number in killer.again
            back[is_again].append(strike.recovered_after)
            if is_again:
                replayed.append((float(strike.num_calls), strike.recovered_after))
            elif number in killer.whole:
                points.append((float(strike.num_calls), killer.whole[number]))
    (start, slope), (again, again_slope) = line_of(points), line_of(replayed)
    every = sorted(back[False] + back[True])
    rows = [
        ("kill to the next step, median", statistics.median(every), AIMS["median"], "{:.3f} s"),
        ("where the others go on, 99th percentile", _last(back[False]), AIMS["p99"], "{:.3f} s"),
        ("where all start again, at step 0", again, AIMS["p99"], "{:.3f} s"),
        ("and for each step so far", again_slope * 1e6, AIMS["replayed"] * 1e6, "{:.0f} us"),
        ("kill to a whole fleet, at step 0", start, AIMS["whole"], "{:.3f} s"),
        ("and for each step so far", slope * 1e6, AIMS["replayed"] * 1e6, "{:.0f} us"),
    ]
    table = Table(f"{len(every)} kills, {num_workers} workers", ["", "measured", "aim: at most"])
    for name, value, aim, form in rows:
        verdict = "reached" if value <= aim else "missed"
        table.rows.append([name, form.format(value), f"{form.format(aim)}, {verdict}"])
    for words, seconds in (("others go on", back[False]), ("all start again, mid-update", back[True])):
        table.notes.append(f"To the next step where {words}: {len(seconds)} kills, {spread(seconds, '{:.3f}')} s.")
    calls = [count for count, _ in (*points, *replayed)]
    table.notes.append(f"To a whole fleet: {spread([s for _, s in points], '{:.3f}')} s.")
    table.notes.append(f"Recorded calls (steps) at the kills: {min(calls):,.0f} to {max(calls):,.0f}.")
    wrong = [word for made, _ in rounds for word in made.wrong]
    same = "; ".join(wrong) if wrong else "as undisturbed, to the bit."
    table.notes.append(f"Weights, state, samples and steps: {same}")
    return [table]


def _last(seconds: Sequence[float]) -> float:
    """Return the 99th percentile."""
    return sorted(seconds)[min(len(seconds) - 1, int(0.99 * len(seconds)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--every", type=float, default=0.7, help="seconds from a whole fleet to the next kill")
    parser.add_argument("--epochs", type=int, default=400, help="of each training, of 16 steps")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--store", metavar="FILE.md")
    args = parser.parse_args()
    where = machine()
    program = opened(SCRIPT, str(args.epochs))
    calm = play(program, args.workers)
    assert not calm.wrong, calm.wrong
    draw, rounds = random.Random(args.seed), []
    while sum(len(r.strikes) for r, _ in rounds) < args.kills:
        killer = Killer(args.every, draw, time.monotonic() + 1.0)
        made = play(program, args.workers, killer)
        made.wrong += [f"{key} differs" for key in SAME if made.facts and made.facts[key] != calm.facts[key]]
        rounds.append((made, killer))
        print(f"{made.seconds:.1f} s, {len(made.strikes)} kills: {'; '.join(made.wrong) or 'same bits'}", flush=True)
    shown = tables(rounds, args.workers)
    show(shown, where)
    if args.store:
        store(shown, where, Path(args.store))
    sys.exit(any(r.wrong for r, _ in rounds))


if __name__ == "__main__":
    main()
