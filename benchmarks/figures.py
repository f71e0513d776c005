"""What was measured, as tables: medians, ratios, and what we aim for."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from reduce import SIZES
from report import Table, ratios, spread
from workloads import WORKLOADS

from samestep.units import bytes_in_words

Rounds = Sequence[Mapping[str, Any]]

AIMS = {
    ("mlp", "ddp"): 1.5,
    ("cnn", "ddp"): 1.1,
    ("gpt", "ddp"): 1.0,
    ("mlp", "threads"): 0.9,
    ("cnn", "threads"): 1.0,
    ("gpt", "threads"): 1.0,
}
"""Least ratio of speeds, (workload, peer)."""

REDUCE_AIMS = {"64 KiB": 10.0, "25 MiB": 4.0, "100 MiB": 4.0}
UPDATE_AIMS = {"64 KiB": 3.0, "25 MiB": 4.0, "100 MiB": 2.7}
BOUND_AIM = 0.7


def of(rounds: Rounds, name: str) -> list[float]:
    """Return one figure of every round."""
    return [facts[name] for facts in rounds]


def judged(ratio: float, aim: float) -> str:
    """Return whether an aim was reached, in words."""
    return f"{aim:g}, {'reached' if ratio >= aim else 'missed'}"


def speed(by_workload: Mapping[str, Mapping[str, Rounds]], titles: Mapping[str, str]) -> Table:
    """Samples per second of every contestant."""
    table = Table("Samples per second", ["workload", *titles.values(), "loss, least to most"])
    for workload, facts in by_workload.items():
        speeds = [spread(of(facts[name], "samples_per_second"), "{:,.0f}") for name in titles]
        losses = [statistics.median(of(facts[name], "loss")) for name in titles]
        table.rows.append([WORKLOADS[workload].title, *speeds, f"{min(losses):.2f} to {max(losses):.2f}"])
    table.notes.append("Everybody trains with the fused AdamW. The losses show that the work is the same.")
    return table


def peers(by_workload: Mapping[str, Mapping[str, Rounds]]) -> Table:
    """Ratios of speed: ours to the peers', and the price of eight replicas."""
    table = Table("Ratios of speed", ["workload", "against", "8 replicas", "replicas = workers", "aim"])
    for workload, facts in by_workload.items():
        ours, theirs = of(facts["ours"], "samples_per_second"), of(facts["workers"], "samples_per_second")
        for name, title in (("ddp", "DDP + gloo"), ("threads", "one process, all threads")):
            peer = of(facts[name], "samples_per_second")
            promised, plain = ratios(ours, peer), ratios(theirs, peer)
            aim = AIMS[workload, name]
            verdict = f"{judged(statistics.median(promised), aim)}; {judged(statistics.median(plain), aim)}"
            table.rows.append([WORKLOADS[workload].title, title, spread(promised), spread(plain), verdict])
        table.rows.append(
            [WORKLOADS[workload].title, "replicas = workers", spread(ratios(ours, theirs)), "1", "report"]
        )
    table.notes.append("Verdicts are for 8 replicas, then for replicas = workers.")
    return table


def update(arena: Rounds, gloo: Rounds, num_workers: int) -> list[Table]:
    """Reduce and update alone."""
    times = Table(
        f"Reduce and update alone, {num_workers} workers, milliseconds",
        ["gradient", "reduce", "all-reduce", "gloo all-reduce", "update", "clipped update", "gloo + fused AdamW"],
    )
    faster = Table("Times faster than gloo", ["gradient", "reduce", "all-reduce", "aim", "update", "aim"])
    bandwidth = statistics.median(of(arena, "bandwidth"))
    bound = Table(
        "Share of the memory's bandwidth",
        ["gradient", "update", "clipped update", "gloo + fused AdamW", "aim", "aim, clipped"],
        notes=[
            f"The workers together reach {bytes_in_words(bandwidth)}/s in plain loops of torch. An update must move "
            f"(P + 6) N bytes, with clipping (2 P + 6) N, for N bytes of gradients and P workers; gloo's column counts "
            f"the same (P + 6) N, so columns compare."
        ],
    )
    for size, num_bytes in SIZES.items():
        ours, theirs = of(arena, size), of(gloo, size)
        kinds = ("reduce", "all-reduce", "update", "clipped update")
        mine = {kind: [facts[kind] * 1e3 for facts in ours] for kind in kinds}
        peer = {kind: [facts[kind] * 1e3 for facts in theirs] for kind in ("all-reduce", "update")}
        shown = [spread(mine[k], "{:.3g}") for k in kinds]
        shown.insert(2, spread(peer["all-reduce"], "{:.3g}"))
        times.rows.append([size, *shown, spread(peer["update"], "{:.3g}")])
        alone = ratios(peer["all-reduce"], mine["reduce"])
        stored = ratios(peer["all-reduce"], mine["all-reduce"])
        whole = ratios(peer["update"], mine["update"])
        faster.rows.append(
            [
                size,
                spread(alone, "{:.1f}"),
                spread(stored, "{:.1f}"),
                judged(statistics.median(alone), REDUCE_AIMS[size]),
                spread(whole, "{:.1f}"),
                judged(statistics.median(whole), UPDATE_AIMS[size]),
            ]
        )
        if size == "64 KiB":
            continue
        shares = [
            share(factor * num_bytes, times_taken, bandwidth)
            for factor, times_taken in (
                (num_workers + 6, mine["update"]),
                (2 * num_workers + 6, mine["clipped update"]),
                (num_workers + 6, peer["update"]),
            )
        ]
        bound.rows.append([size, *(f"{s:.0%}" for s in shares), *(judged(s, BOUND_AIM) for s in shares[:2])])
    times.notes.append(
        "reduce: each sum is made once, in its owner's cache, where the optimizer reads it; all-reduce: sums are "
        "stored for all to read; update: all that `step.update()` does."
    )
    return [times, faster, bound]


def share(num_bytes: float, milliseconds: Sequence[float], bandwidth: float) -> float:
    """Return which part of the bandwidth was used."""
    return num_bytes / (statistics.median(milliseconds) / 1e3) / bandwidth


def overhead(ours: Rounds, plain: Rounds, num_tensors: int) -> Table:
    """What one worker with one replica pays above the plain loop."""
    aim = 0.3 + 0.006 * num_tensors
    mine = [s * 1e3 for s in of(ours, "seconds_per_step")]
    theirs = [s * 1e3 for s in of(plain, "seconds_per_step")]
    extra = [a - b for a, b in zip(mine, theirs, strict=True)]
    reached = "reached" if statistics.median(extra) <= aim else "missed"
    return Table(
        f"One worker, one replica, against the plain loop; {num_tensors} small tensors, milliseconds per step",
        ["samestep", "plain loop", "difference", "aim: at most"],
        [[spread(mine), spread(theirs), spread(extra), f"{aim:.1f}, {reached}"]],
    )


def start(facts: Mapping[str, Rounds], titles: Mapping[str, str]) -> Table:
    """Seconds from the command to the end of the first step of the CNN."""
    plain = of(facts["plain"], "first_step_seconds")
    aims = {"run": 1.3, "script": 2.0}
    table = Table(
        "Seconds to the first step, digits CNN", ["command", "seconds", "times the plain script", "aim: at most"]
    )
    for name, title in titles.items():
        seconds = of(facts[name], "first_step_seconds")
        times = ratios(seconds, plain)
        aim = aims.get(name)
        verdict = "" if aim is None else f"{aim}, {'reached' if statistics.median(times) <= aim else 'missed'}"
        table.rows.append([title, spread(seconds, "{:.1f}"), spread(times), verdict])
    return table


def memory(ours: Mapping[str, Any], theirs: Mapping[str, Any], titles: Mapping[str, str]) -> Table:
    """Memory of all workers, and of the training state per parameter."""
    num_parameters = ours["num_parameters"]
    state, ddp_state = ours["state_bytes"] / num_parameters, 4 * 16
    return Table(
        "Memory, wide MLP",
        ["", "all workers", "training state per parameter", "aim: at most"],
        [
            [
                titles["ours"],
                bytes_in_words(ours["pss_bytes"]),
                f"{state:.1f} bytes",
                f"30.8 bytes, {'reached' if state <= 30.8 else 'missed'}",
            ],
            [titles["ddp"], bytes_in_words(theirs["pss_bytes"]), f"{ddp_state} bytes (weights, gradients, AdamW)", ""],
        ],
        [
            "All workers: the sum of their proportional set sizes, torch and data included, at its highest (samestep) "
            "or after the last step (DDP)."
        ],
    )
