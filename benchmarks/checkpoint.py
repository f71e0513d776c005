"""How long training stops for a checkpoint: written while it waits, beside it, and a bare copy of the same bytes.

python benchmarks/checkpoint.py
python benchmarks/checkpoint.py --rounds 5 --store docs/measured/checkpoint.md

A stall is the time between two steps where a checkpoint is due, less that between other steps. The copy is timed in
the same process, before each checkpoint, from and to memory that is in use already.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from report import Table, machine, ratios, show, spread, store
from torch.nn import functional as F

import samestep

EVERY = 20
NUM_CHECKPOINTS = 5
NUM_WARM = 2
"""Checkpoints that are not counted: they find memory that was never touched."""
WIDTH, NUM_LAYERS = 1448, 12
AIM = 1.2
WAYS = {
    "waits": ("--every", str(EVERY)),
    "beside": ("--every", str(EVERY), "--async-checkpoints"),
    "none": None,
}


def train(run: samestep.Run) -> dict:
    """Train a model of 25 million parameters with Adam; return what the first worker saw."""
    torch.manual_seed(0)
    layers = [layer for _ in range(NUM_LAYERS) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 8))
    run.replicate(model, torch.optim.Adam(model.parameters(), lr=1e-4))
    data = torch.randn(512, WIDTH), torch.randint(8, (512,))
    sizes = [p.numel() for p in model.parameters()] * 3  # weights and the two moments
    sources, targets = ([torch.zeros(size) for size in sizes] for _ in range(2))
    gaps: dict[bool, list[float]] = {True: [], False: []}
    copies, ended, begun = [], 0.0, 0.0
    for step in run.steps(data, batch_size=16, steps=EVERY * (NUM_WARM + NUM_CHECKPOINTS) + 2):
        now, before = time.perf_counter(), step.number
        if before == EVERY * NUM_WARM + 1:
            begun = now
        if before > EVERY * NUM_WARM:
            gaps[before % EVERY == 0].append(now - ended)
        for x, y in step:
            step.backward(F.cross_entropy(model(x), y))
        step.update()
        if (before + 1) % EVERY == 0 and run.worker.is_first:
            copies.append(_timed_copy(sources, targets))
        ended = time.perf_counter()
    usual = median(gaps[False])
    return {
        "stalls": [gap - usual for gap in gaps[True]],
        "copies": copies[NUM_WARM:],
        "seconds_per_step": (ended - begun - sum(copies[NUM_WARM:])) / (EVERY * NUM_CHECKPOINTS + 1),
        "num_bytes": 4 * sum(sizes),
    }


def _timed_copy(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> float:
    begin = time.perf_counter()
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
    return time.perf_counter() - begin


def played(options: tuple[str, ...] | None, num_workers: int) -> dict:
    """Play a run in a process of its own; return what `train` returned."""
    with tempfile.TemporaryDirectory() as folder:
        kept = ("--checkpoint", f"{folder}/kept", *options) if options is not None else ()
        shape = ("--workers", str(num_workers), "--summary", f"{folder}/facts.json")
        command = [sys.executable, "-m", "samestep", "run", __file__, *shape, *kept, "--", "--train"]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        facts = json.loads(Path(folder, "facts.json").read_text())
    if facts["saves_skipped"] > 1:  # the last one, at the end of the run, may be
        raise SystemExit(f"{facts['saves_skipped']} checkpoints were skipped: this disk is too slow for EVERY={EVERY}.")
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--store", metavar="FILE.md")
    args = parser.parse_args()
    seen: dict[str, list[dict]] = {way: [] for way in WAYS}
    for number in range(args.rounds):
        for way, options in WAYS.items():
            seen[way].append(facts := played(options, args.workers))
            stall = f"stalls {median(facts['stalls']):.3f} s, copy {median(facts['copies']):.3f} s"
            print(f"round {number + 1}, {way}: {stall}, step {facts['seconds_per_step']:.3f} s", flush=True)
    num_bytes = seen["none"][0]["num_bytes"]
    stalls = {way: [median(facts["stalls"]) for facts in seen[way]] for way in ("waits", "beside")}
    copies = [median(facts["copies"]) for facts in seen["beside"]]
    times = ratios(stalls["beside"], copies)
    table = Table(
        f"Checkpoints of {num_bytes:,} bytes after every {EVERY} steps, {args.workers} workers",
        ["checkpoint", "stall, s", "times a bare copy", "seconds per step, all included"],
    )
    titles = {"waits": "while training waits", "beside": "beside training (--async-checkpoints)"}
    for way, title in titles.items():
        steps = [facts["seconds_per_step"] for facts in seen[way]]
        times_copy = ratios(stalls[way], [median(facts["copies"]) for facts in seen[way]])
        row = [title, spread(stalls[way], "{:.3f}"), spread(times_copy, "{:.2f}"), spread(steps, "{:.3f}")]
        table.rows.append(row)
    table.rows.append(["a bare copy of the same bytes", spread(copies, "{:.3f}"), "1", ""])
    steps = [facts["seconds_per_step"] for facts in seen["none"]]
    table.rows.append(["none", "", "", spread(steps, "{:.3f}")])
    verdict = "reached" if median(times) <= AIM else "missed"
    table.notes.append(f"Aim: beside training at most {AIM:g} times the copy: {verdict}.")
    table.notes.append("Each figure is the median of the rounds; a round's is the median of its checkpoints.")
    where = machine()
    show([table], where)
    if args.store:
        store([table], where, Path(args.store))


if __name__ == "__main__":
    if "--train" in sys.argv:
        print(json.dumps(samestep.launch(train, replicas=2)))
    else:
        main()
