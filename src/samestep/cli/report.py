"""The outcome of `samestep verify` as a table."""

from __future__ import annotations

import hashlib
from typing import Any

from rich.console import Console
from rich.table import Table

from samestep.settings import SUSPECTS, first_difference


def report(traces: dict[int, list[dict[str, Any]]], console: Console | None = None) -> int:
    """Print the comparison. Returns the exit code: 0 if all numbers of workers gave the same bits.

    Args:
        traces: by number of workers, one frame per step.
        console: where to print; default standard output.
    """
    out = console if console is not None else Console(highlight=False)
    difference = first_difference(traces)
    reference = _digest(next(iter(traces.values())))
    table = Table("workers", "steps", "last loss", "digest of all steps", "")
    for count, trace in traces.items():
        digest = _digest(trace)
        loss = f"{trace[-1]['loss']:.6g}" if trace else ""
        table.add_row(
            str(count), str(len(trace)), loss, digest, "same" if digest == reference else "[red]differs[/red]"
        )
    out.print(table)
    if not any(traces.values()):
        out.print("The script made no step, so nothing was compared.")
        return 1
    if difference is None:
        out.print("The same bits at every step, for every number of workers.")
        return 0
    out.print(difference.in_words())
    out.print("The usual suspects:")
    for suspect in SUSPECTS:
        out.print(f"  - {suspect}")
    return 1


def _digest(trace: list[dict[str, Any]]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for frame in trace:
        for name, value in frame["tensors"].items():
            digest.update(f"{frame['step']} {frame['loss']!r} {name} {value}\n".encode())
    return digest.hexdigest()
