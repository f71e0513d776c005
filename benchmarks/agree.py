"""What ways to agree learn from the same samples, in how many seconds, and from how many bytes.

    python benchmarks/agree.py --example bytes
    python benchmarks/agree.py --example digits --store docs/measured/agree.md --plot docs/measured/agree.svg

Runs the example's own `main` under each way, one after the other on all cores of this host, as often as `--rounds`
says; all see the same batches. Bytes are those that replicas would send over a network: what each way states.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
import time
from pathlib import Path
from typing import Any

from report import Table, machine, show, spread, store

import samestep
from samestep.codecs import Int8, PowerSGD

HERE = Path(__file__).resolve()
WAYS: dict[str, Any] = {
    "Synchronous()": samestep.Synchronous(),
    "Synchronous(Int8())": samestep.Synchronous(codec=Int8()),
    "Synchronous(PowerSGD(4))": samestep.Synchronous(codec=PowerSGD(rank=4)),
    "Synchronous(PowerSGD(16))": samestep.Synchronous(codec=PowerSGD(rank=16)),
    "Local(8, Int8())": samestep.Local(every=8, codec=Int8()),
    "Local(64, Int8())": samestep.Local(every=64, codec=Int8()),
    "Local(64, Nesterov(0.7), Int8())": samestep.Local(every=64, outer=samestep.Nesterov(), codec=Int8()),
}
COLOURS = "#000000", "#e69f00", "#56b4e9", "#0072b2", "#009e73", "#d55e00", "#cc79a7"
"""Told apart by everybody (Okabe and Ito)."""


def module_of(name: str) -> Any:
    """Return an example as a module."""
    spec = importlib.util.spec_from_file_location(name, HERE.parents[1] / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(run: samestep.Run, name: str, way: str, length: int) -> dict[str, Any]:
    """Run the example's main under a way to agree; return losses, seconds since the first step, bytes, result."""
    losses: list[float] = []
    seconds: list[float] = []
    steps = run.steps

    def watched(*args: Any, **kwargs: Any) -> Any:
        for step in steps(*args, **kwargs):
            yield step
            losses.append(step.loss)
            seconds.append(time.perf_counter())

    watching: Any = run
    watching.replicate = functools.partial(run.replicate, agree=WAYS[way])
    watching.steps = watched
    example = module_of(name)
    result = example.main(run, length, False) if name == "bytes" else example.main(run, length)
    whole = sum(p.numel() * 4 for t in run.model.trained for p in t.weights.views)
    stated = run._session.agreed.facts().get("bytes_per_replica")
    return {
        "losses": losses,
        "seconds": [s - seconds[0] for s in seconds],
        # An update as it is: gradients to their owners, and new weights back, less what stays where it is.
        "bytes": stated if stated is not None else whole * len(losses),
        "result": next(iter(result.values())),
        "num_bytes": whole,
    }


def smooth(values: list[float], width: int) -> list[float]:
    """Return means over the last `width` values."""
    return [statistics.fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def plot(path: Path, found: dict[str, dict[str, Any]], batch_size: int) -> None:
    """Draw loss against samples, and against seconds, as SVG."""
    width, height, margin = 420, 300, 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * width}" height="{height + 24 * len(found)}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
    ]
    curves = {way: smooth(told["losses"], 16) for way, told in found.items()}
    low, high = min(min(c) for c in curves.values()), max(c[min(15, len(c) - 1)] for c in curves.values())
    for number, words in enumerate(("samples", "seconds since the first step")):
        xs = {w: [i * batch_size for i in range(len(curves[w]))] if not number else found[w]["seconds"] for w in found}
        most = max(x[-1] for x in xs.values()) or 1.0
        left = number * width + margin
        inner, tall = width - margin - 14, height - margin - 14
        parts.append(f'<rect x="{left}" y="14" width="{inner}" height="{tall}" fill="none" stroke="#888"/>')
        parts.append(f'<text x="{left + inner / 2}" y="{height - 8}" text-anchor="middle">{words}</text>')
        for share in (0.0, 0.5, 1.0):
            x, y = left + share * inner, 14 + tall - share * tall
            parts.append(f'<text x="{x:.0f}" y="{14 + tall + 14}" text-anchor="middle">{share * most:,.0f}</text>')
            value = low + share * (high - low)
            parts.append(f'<text x="{left - 4}" y="{y + 4:.0f}" text-anchor="end">{value:.2f}</text>')
        for colour, way in zip(COLOURS, found, strict=False):
            pairs = zip(xs[way], curves[way], strict=True)
            points = " ".join(
                f"{left + x / most * inner:.1f},{14 + (high - min(max(y, low), high)) / (high - low) * tall:.1f}"
                for x, y in pairs
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.4"/>')
    for number, (colour, way) in enumerate(zip(COLOURS, found, strict=False)):
        y = height + 16 + 22 * number
        parts.append(f'<line x1="{margin}" y1="{y - 4}" x2="{margin + 24}" y2="{y - 4}" stroke="{colour}"/>')
        parts.append(f'<text x="{margin + 32}" y="{y}">{way}</text>')
    path.write_text("\n".join([*parts, "</svg>", ""]))


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description="Compare what ways to agree learn.")
    parser.add_argument("--example", choices=("bytes", "digits"), default="digits")
    parser.add_argument("--length", type=int, help="steps of bytes (384), epochs of digits (12)")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--store", type=Path, help="file to write the result to")
    parser.add_argument("--plot", type=Path, help="file to draw the losses into")
    args = parser.parse_args()
    length = args.length or (384 if args.example == "bytes" else 12)
    batch_size = module_of(args.example).BATCH_SIZE
    where = machine()
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
    for _ in range(args.rounds):
        for way in args.ways:
            told = functools.partial(train, name=args.example, way=way, length=length)
            found[way].append(samestep.launch(told, replicas=args.replicas, seed=0))
    first = found[args.ways[0]]
    base = statistics.fmean(first[0]["losses"][-32:])
    rows = []
    for way, all_told in found.items():
        told = all_told[0]
        loss = statistics.fmean(told["losses"][-32:])
        speed = [a["seconds"][-1] / b["seconds"][-1] for a, b in zip(first, all_told, strict=True)]
        rows.append(
            [
                f"`{way}`",
                f"{loss:.4f}",
                f"{loss / base - 1:+.1%}",
                f"{told['result']:.4f}",
                spread(speed),
                f"{told['bytes'] / len(told['losses']) / 1e3:,.1f}",
                f"{first[0]['bytes'] / told['bytes']:,.0f}",
            ]
        )
    columns = ["way to agree", "loss, last 32 steps", "against the first", "held out", "speed on this host"]
    columns += ["kB per step and replica", "times fewer"]
    num_steps = len(first[0]["losses"])
    title = f"examples/{args.example}.py, {num_steps} steps of {batch_size} samples, {args.replicas} replicas"
    notes = [
        "Held out: bits per byte (bytes), accuracy (digits).",
        "kB of `Synchronous()`: one gradient of the model as it is.",
        "Local steps: the loss of a step is that of replicas before they step, each on its own weights.",
    ]
    table = Table(title, columns, rows, notes)
    show([table], where)
    if args.plot:
        plot(args.plot, {way: told[0] for way, told in found.items()}, batch_size)
    if args.store:
        store([table], where, args.store)


if __name__ == "__main__":
    main()
