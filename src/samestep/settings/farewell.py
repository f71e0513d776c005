"""What a run that a signal has ended says last: what was kept, and how to go on."""

from __future__ import annotations

from dataclasses import replace

from samestep.launching.verdict import Outcome


def with_farewell(outcome: Outcome) -> Outcome:
    """Return the outcome of a run; where a signal ended it, its message says what is kept."""
    if outcome.ended_by is None:
        return outcome
    return replace(outcome, message=f"{outcome.message} {farewell(outcome.run_folder)}")


def farewell(folder: str | None) -> str:
    """Return what is kept in the folder for checkpoints.

    Args:
        folder: None where none was set.
    """
    if folder is None:
        return "Nothing is kept, because no checkpoint folder was set (--checkpoint DIR)."
    from samestep.storage.checkpoint import steps_in

    steps = steps_in(folder)
    if not steps:
        return f"Nothing is kept: no checkpoint had been written to {folder} yet."
    number = int(steps[-1].name.rpartition("-")[2])
    return f"What is kept is the checkpoint after step {number}: go on with --resume {folder}."
