"""The checkpoints of a folder as a table, and what an export took, in words."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from samestep.units import bytes_in_words


def show_list(items: Sequence[Any], console: Console | None = None) -> int:
    """Print checkpoints at a glance. Returns the exit code.

    Args:
        items: `samestep.storage.stock.Item` of each, oldest first.
        console: where to print; default standard output.
    """
    out = _console(console)
    table = Table("checkpoint", "written", "tensors", "size", "weights digest", "")
    for item in items:
        written = datetime.fromtimestamp(item.written).isoformat(" ", "seconds") if item.written is not None else ""
        size = bytes_in_words(item.num_bytes) if item.num_bytes else ""
        state = "[red]damaged[/red]" if item.problem else "whole"
        table.add_row(item.path.name, written, str(item.num_tensors or ""), size, item.weights_digest, state)
    out.print(table)
    _say_problems(items, out)
    out.print("By manifest and sizes only; `samestep checkpoint verify` reads every byte.")
    return 0


def show_verified(items: Sequence[Any], console: Console | None = None) -> int:
    """Print which checkpoints are good. Returns the exit code: 1 if any is bad.

    Args:
        items: as in `show_list`, read in full.
        console: where to print; default standard output.
    """
    out = _console(console)
    table = Table("checkpoint", "tensors", "size", "weights digest", "")
    for item in items:
        size = bytes_in_words(item.num_bytes) if item.num_bytes else ""
        state = "[red]damaged[/red]" if item.problem else "[green]good[/green]"
        table.add_row(item.path.name, str(item.num_tensors or ""), size, item.weights_digest, state)
    out.print(table)
    _say_problems(items, out)
    num_bad = sum(bool(item.problem) for item in items)
    out.print(f"{num_bad} of {len(items)} damaged." if num_bad else f"All {len(items)} good: every byte was read.")
    return 1 if num_bad else 0


def show_export(exported: Any, path: str, console: Console | None = None) -> int:
    """Print what was exported. Returns the exit code.

    Args:
        exported: a `samestep.storage.stock.Exported`.
        path: the file.
        console: where to print; default standard output.
    """
    out = _console(console)
    for skipped in exported.skipped:
        out.print(f"[yellow]Skipped[/yellow] {escape(skipped.path.name)}: {escape(skipped.reason)}")
    size = bytes_in_words(exported.num_bytes)
    out.print(f"{exported.num_tensors} tensors ({size}) of {escape(str(exported.source))} are in {escape(path)}.")
    if exported.as_bytes:
        names = escape(", ".join(exported.as_bytes))
        out.print(f"As bytes (uint8, one more dimension), for not every reader knows their dtype: {names}")
    return 0


def _console(given: Console | None) -> Console:
    # A pipe has no width of its own, and paths must not be cut there.
    if given is not None:
        return given
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=120)


def _say_problems(items: Sequence[Any], out: Console) -> None:
    for item in items:
        if item.problem:
            out.print(f"[red]{escape(item.path.name)}[/red]: {escape(item.problem)}")
