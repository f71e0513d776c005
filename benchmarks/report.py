"""Tables of measured figures, for a terminal and for a document."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import rich.box
import rich.console
import rich.table


@dataclass
class Table:
    """Rows of words under a title.

    Attributes:
        title: what the table shows.
        columns: names of the columns; the first is left-aligned, the others to the right.
        rows: one word per column.
        notes: sentences below it.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rich(self) -> rich.table.Table:
        """Return the table for a terminal."""
        table = rich.table.Table(
            title=self.title, caption="\n".join(self.notes), title_justify="left", box=rich.box.SIMPLE
        )
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Return the table for a document."""
        ruler = ["---"] + ["---:"] * (len(self.columns) - 1)
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, ruler, *self.rows)]
        return "\n".join([f"## {self.title}", "", *lines, "", *(f"{note}\n" for note in self.notes)])


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Return the median of `values`, with the range where there are several."""
    middle = form.format(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({form.format(min(values))} to {form.format(max(values))})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return ours / theirs, round by round: machines drift, rounds are short."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def machine() -> list[str]:
    """Return sentences about where and when this was measured."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "samestep"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} (from source)")
    num_cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    lines = [
        f"Measured {date.today().isoformat()} on {cpu_model()}, {num_cores} cores; {', '.join(versions)}; "
        f"{platform.system()} {platform.release()}.",
        f"Load average before: {load:.1f}.",
    ]
    if load > 0.5:
        lines.append("The machine was busy with other work, so absolute figures are too low and ratios uncertain.")
    return lines


def cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def show(tables: Sequence[Table], where: Sequence[str]) -> None:
    """Print everything."""
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=140)
    for line in where:
        console.print(line)
    for table in tables:
        console.print(table.rich())


def store(tables: Sequence[Table], where: Sequence[str], path: Path) -> None:
    """Write everything as a document."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    title = path.stem.replace("-", " ").replace("_", " ")
    head = [f"# Measured: {title}", "", *where, "", f"Command: `python benchmarks/{' '.join(words)}`", ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*head, *(table.markdown() for table in tables)]))
