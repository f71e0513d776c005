"""Commands that speak to live runs: list, scale, stop."""

from __future__ import annotations

import sys
from typing import Any

from samestep.errors import WorkerError
from samestep.settings import ask_run, find_run, live_runs
from samestep.units import count_in_words, seconds_in_words


def listed() -> tuple[int, str]:
    """Print one line per live run. Returns exit code and what went wrong."""
    runs = live_runs()
    if not runs:
        return 0, "samestep: No run of yours is live on this host."
    rows = [("run", "workers", "step", "samples/s", "running for"), *map(_row, runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0, ""


def scale(prefix: str, num_workers: int, seconds: float) -> tuple[int, str]:
    """Let a run go on with another number of workers, and wait until it does.

    Raises:
        SettingsError: no such run, or it refuses. WorkerError: it ended, or has not come to the end of its step yet.
    """
    name = find_run(prefix)
    answer = _ask(name, {"ask": "scale", "workers": num_workers}, seconds, "will be scaled then")
    count = answer["workers"]
    print(f"{name}: now {count} worker{'s' * (count != 1)}.")
    return 0, ""


def stop(prefix: str, seconds: float) -> tuple[int, str]:
    """End a run, and wait for its end.

    Raises:
        SettingsError: no such run. WorkerError: it has not ended yet.
    """
    name = find_run(prefix)
    print(f"{name}: {_ask(name, {'ask': 'stop'}, seconds, 'will end then')['message']}")
    return 0, ""


def _ask(name: str, facts: dict[str, Any], seconds: float, what: str) -> dict[str, Any]:
    print(f"samestep: {name} is asked; it answers at the end of its step.", file=sys.stderr)
    try:
        return ask_run(name, facts, seconds)
    except TimeoutError:
        raise WorkerError(
            f"{name} has not come to the end of its step within {seconds:g} s. It {what}; `samestep ps` tells."
        ) from None
    except OSError as error:
        raise WorkerError(f"{name} ended before it answered ({error}).") from None


def _row(run: dict[str, Any]) -> tuple[str, ...]:
    step, steps, speed, seconds = (run.get(key) for key in ("step", "steps", "samples_per_second", "seconds"))
    return (
        str(run["name"]),
        str(run["workers"]) if run.get("workers") else "-",
        (f"{step} of {steps}" if steps else str(step)) if step else "-",
        count_in_words(round(speed)) if speed else "-",
        seconds_in_words(seconds) if seconds is not None else "does not answer",
    )
