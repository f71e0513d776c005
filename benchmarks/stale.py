"""Stale against synchronous steps where one of two workers is slowed down: throughput, and accuracy.

    python benchmarks/stale.py --rounds 3 --slow 3

The digits example's network and data. The second worker sleeps in each of its shards until the shard has taken `slow`
times as long. Rounds alternate between the two ways to agree, with another seed each. Times are from the third step to
the end of the steps, when everything is in the weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch.nn import functional as F

import samestep

EXAMPLES = Path(__file__).parents[1] / "examples"
NUM_WARM = 3


def main(run: samestep.Run, args: argparse.Namespace) -> None:
    sys.path.insert(0, str(EXAMPLES))
    import digits

    train, held_out = digits.load_data()
    model = digits.Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=digits.LEARNING_RATE)
    num_steps = args.epochs * -(-len(train[0]) // digits.BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, digits.LEARNING_RATE, total_steps=num_steps)
    agree = samestep.Synchronous() if args.agree == "synchronous" else samestep.Stale(args.bound, record=args.record)
    run.replicate(model, optimizer, scheduler, agree=agree)
    slow = args.slow if run.worker.rank == 1 else 1.0
    begin = num_samples = 0.0
    for step in run.steps(train, digits.BATCH_SIZE, args.epochs):
        if step.number == NUM_WARM:
            begin = time.perf_counter()
        for images, labels in step:
            before = time.perf_counter()
            step.backward(F.cross_entropy(model(images), labels))
            time.sleep((slow - 1) * (time.perf_counter() - before))
        step.update()
        scheduler.step()
        num_samples += step.size if step.number >= NUM_WARM else 0
    seconds = time.perf_counter() - begin

    def is_right(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (model(batch[0]).argmax(dim=1) == batch[1]).float()

    accuracy = run.mean(is_right, held_out, batch_size=45)
    if run.worker.is_first:
        facts = {"agree": args.agree, "samples_per_second": num_samples / seconds, "accuracy": accuracy}
        print("\n" + json.dumps(facts), flush=True)


def measure(agree: str, seed: int, args: argparse.Namespace) -> dict:
    """Run one contestant in a process of its own."""
    command = [sys.executable, __file__, "--agree", agree, "--seed", str(seed), "--bound", str(args.bound)]
    command += ["--slow", str(args.slow), "--epochs", str(args.epochs)]
    with tempfile.TemporaryDirectory() as folder:
        schedule = Path(folder) / "schedule"
        done = subprocess.run([*command, "--record", str(schedule)], capture_output=True, text=True, check=True)
        facts = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
        if schedule.exists():
            lags = Counter(lag for line in schedule.read_text().splitlines()[1:] for lag in json.loads(line))
            facts["staleness"] = {lag: round(lags[lag] / lags.total(), 3) for lag in sorted(lags)}
    return facts


def compare(args: argparse.Namespace) -> None:
    found: dict[str, list[dict]] = {"synchronous": [], "stale": []}
    for seed in range(args.rounds):
        for agree in found:
            found[agree].append(measure(agree, seed, args))
            print(json.dumps(found[agree][-1]), flush=True)
    ratios = [
        b["samples_per_second"] / a["samples_per_second"]
        for a, b in zip(found["synchronous"], found["stale"], strict=True)
    ]
    print(f"\nbound={args.bound}, second worker slowed {args.slow:g}x, {args.epochs} epochs, {args.rounds} rounds")
    for agree, facts in found.items():
        speed = statistics.median(f["samples_per_second"] for f in facts)
        accuracy = statistics.mean(f["accuracy"] for f in facts)
        print(f"{agree:12} {speed:8.0f} samples/s   {accuracy:.2%} of held-out digits")
    print(f"ratio of throughput: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agree", choices=["synchronous", "stale"], help="run one contestant only")
    parser.add_argument("--bound", type=int, default=4)
    parser.add_argument("--slow", type=float, default=3.0)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", help="file for the schedule of stale steps")
    chosen = parser.parse_args()
    if chosen.agree is None:
        compare(chosen)
    else:
        samestep.launch(lambda run: main(run, chosen), replicas=8, workers=2, seed=chosen.seed)
