"""The outcome of `samestep chaos` as a table."""

from __future__ import annotations

import statistics

from rich.console import Console
from rich.table import Table

from samestep.settings import Chaos

_COMPARED = {
    "weights_digest": "weights",
    "optimizer_digest": "optimizer state",
    "samples_digest": "samples",
    "samples_exactly_once": "samples exactly once",
    "steps": "steps",
    "result": "result",
}


def report(chaos: Chaos, console: Console | None = None) -> int:
    """Print what was injected and what came of it. Returns the exit code: 0 if the results are the same."""
    out = console if console is not None else Console(highlight=False)
    table = Table("fault", "what", "workers", "at call", "noticed after", "next call after")
    for number, strike in enumerate(chaos.strikes, 1):
        workers = ", ".join(map(str, strike.ranks))
        noticed, recovered = _seconds(strike.noticed_after), _seconds(strike.recovered_after)
        table.add_row(str(number), strike.fault.kind, workers, str(strike.num_calls), noticed, recovered)
    out.print(table)
    times = sorted(s.recovered_after for s in chaos.strikes if s.recovered_after is not None)
    if times:
        out.print(f"Back after {_seconds(statistics.median(times))} (median), {_seconds(times[-1])} (longest).")
    if chaos.disturbed is None:
        out.print(f"[red]The run under faults did not finish (exit code {chaos.code}).[/red]")
        out.print(chaos.message, markup=False)
        return 1
    wrong = [
        f"{words}: {chaos.disturbed[key]} under faults, {chaos.undisturbed[key]} without"
        for key, words in _COMPARED.items()
        if chaos.disturbed[key] != chaos.undisturbed[key]
    ]
    for line in wrong:
        out.print(f"[red]{line}[/red]")
    if wrong:
        return 1
    out.print(f"The same as without faults: {', '.join(_COMPARED.values())}.")
    out.print(f"{chaos.disturbed['samples_sentence']}; weights {chaos.disturbed['weights_digest']}")
    return 0


def _seconds(value: float | None) -> str:
    if value is None:
        return "never"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"
