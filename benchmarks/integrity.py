"""What it costs to look for flipped bits and wrong gradients: ways to fold memory, and whole steps with and without.

python benchmarks/integrity.py
python benchmarks/integrity.py --rounds 9 --workloads cnn gpt --store docs/measured/integrity.md
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import in_turn
from contestants import Contestant
from figures import of
from report import Table, machine, ratios, show, spread, store
from workloads import WORKLOADS

from samestep.units import bytes_in_words

SIZES = (256 << 10, 4 << 20, 256 << 20)
NUM_WARM = 4
CUTS = 8_192
"""Words between two cuts where a fold is asked for by tensor: 64 KiB."""


def ways(words: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Return the ways to fold some memory, by title."""
    tensor, cuts = torch.from_numpy(words), np.arange(0, len(words), CUTS)
    return {
        "sum, cut into tensors (`np.add.reduceat`)": lambda: np.add.reduceat(words, cuts),
        "sum (`np.add.reduce`)": lambda: np.add.reduce(words),
        "sum (`torch.sum`)": lambda: tensor.sum(),
        "exclusive or (`np.bitwise_xor.reduceat`)": lambda: np.bitwise_xor.reduceat(words, cuts),
        "CRC-32 (`zlib.crc32`)": lambda: zlib.crc32(words),
        "SHA-256": lambda: hashlib.sha256(words).digest(),
    }


def folds(num_rounds: int) -> Table:
    """Bytes per second of each way, on one thread, in turn."""
    table = Table("Folding memory, GB/s on one thread", ["way", *map(bytes_in_words, SIZES)])
    rows: dict[str, list[str]] = {}
    for size in SIZES:
        words = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, size // 8)
        speeds: dict[str, list[float]] = {}
        for number in range(num_rounds + 1):
            for title, way in ways(words).items():
                if title == "SHA-256" and size > SIZES[1]:
                    continue
                begin = time.perf_counter()
                way()
                seconds = time.perf_counter() - begin
                if number:
                    speeds.setdefault(title, []).append(size / seconds / 1e9)
        for title in ways(words):
            rows.setdefault(title, []).append(spread(speeds[title], "{:.1f}") if title in speeds else "")
    table.rows += [[title, *row] for title, row in rows.items()]
    table.notes.append("A sum changes by a power of two when one bit flips; that tells a flip from a write.")
    return table


def entrant(title: str, num_workers: int, *options: str) -> Contestant:
    """Return `samestep run` with 8 replicas, and further options of the script."""
    shape = ("--workers", str(num_workers), "--replicas", "8", "--summary", "{summary}")
    return Contestant(
        title=title,
        before=(sys.executable, "-m", "samestep", "run", *shape),
        script="train_samestep.py",
        options=("--", *options),
        writes_summary=True,
    )


def in_turn_with(entrants: dict[str, Contestant], name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return what the contestants measured on a workload."""
    num_steps = str(max(2, round(WORKLOADS[name].num_steps * args.scale)))
    arguments = ("--workload", name, "--warm", str(NUM_WARM), "--steps", num_steps)
    return in_turn(entrants, args.rounds, WORKLOADS[name].title, arguments)


def flips(args: argparse.Namespace) -> Table:
    """Whole steps, with the memory looked at and without."""
    entrants = {
        "on": entrant("verified", args.workers),
        "off": entrant("not verified", args.workers, "--unverified"),
    }
    columns = ["workload", "verified", "not", "ratio", "updates verified", "own time of a worker"]
    table = Table("Seconds per step, looking for flipped bits", columns)
    for name in args.workloads:
        facts = in_turn_with(entrants, name, args)
        on, off = of(facts["on"], "seconds_per_step"), of(facts["off"], "seconds_per_step")
        watched = statistics.median(f["updates_verified"] / f["updates"] for f in facts["on"])
        own = [f["verify_seconds"] / (f["updates"] * f["seconds_per_step"]) for f in facts["on"]]
        shares = [f"{watched:.0%}", spread([100 * share for share in own], "{:.1f}") + " %"]
        title = WORKLOADS[name].title
        forms = (spread(on, "{:.4f}"), spread(off, "{:.4f}"), spread(ratios(on, off), "{:.3f}"))
        table.rows.append([title, *forms, *shares])
    table.notes.append("A ratio is the median of the ratios within each round, because machines drift.")
    table.notes.append("Own time: that of the first worker's thread, also where it spins in a meeting; aim 1 %.")
    return table


def audits(args: argparse.Namespace) -> Table:
    """Whole steps, with one shard computed by a second worker in each, and in none."""
    entrants = {
        "on": entrant("audited", args.workers, "--audit", "1"),
        "off": entrant("not audited", args.workers),
    }
    columns = ["workload", "audit=1", "none", "ratio", "at 1/64, computed"]
    table = Table("Seconds per step, one of 8 shards computed twice", columns)
    for name in args.workloads:
        facts = in_turn_with(entrants, name, args)
        on, off = of(facts["on"], "seconds_per_step"), of(facts["off"], "seconds_per_step")
        share = (statistics.median(ratios(on, off)) - 1) / 64
        forms = (spread(on, "{:.4f}"), spread(off, "{:.4f}"), spread(ratios(on, off), "{:.3f}"))
        table.rows.append([WORKLOADS[name].title, *forms, f"{100 * share:+.2f} %"])
    table.notes.append("A ratio is the median of the ratios within each round, because machines drift.")
    table.notes.append("The others wait while one worker plays a shard more.")
    return table


def main() -> None:
    makers = {"folds": lambda args: folds(4 * args.rounds), "flips": flips, "audits": audits}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scale", type=float, default=2.0, help="factor on the number of timed steps")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--tables", nargs="+", choices=list(makers), default=list(makers))
    parser.add_argument("--store", metavar="FILE.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    where = machine()
    tables = [makers[name](args) for name in args.tables]
    show(tables, where)
    if args.store:
        store(tables, where, Path(args.store))


if __name__ == "__main__":
    main()
