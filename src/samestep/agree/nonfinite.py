"""What becomes of an update whose losses or gradients are NaN or infinite: the run stops, or the update is skipped."""

from __future__ import annotations

import math
from typing import Literal

from samestep.errors import MismatchError, NonFiniteError, SettingsError

Nonfinite = Literal["stop", "skip"] | int
"""Stop the run, skip such updates, or skip at most so many in a row."""


class Tolerance:
    """How many updates may be skipped; counts those that were, in a row, for each optimizer.

    Attributes:
        rule: as given.
    """

    def __init__(self, rule: Nonfinite):
        """Take the user's choice.

        Raises:
            SettingsError: it is none.
        """
        is_count = isinstance(rule, int) and not isinstance(rule, bool) and rule >= 1
        if not is_count and rule not in ("stop", "skip"):
            raise SettingsError(
                f"You set nonfinite={rule!r}; use 'stop', 'skip', or how many updates in a row may be skipped (1 or "
                f"more)."
            )
        self.rule = rule
        self._most = math.inf if rule == "skip" else 0 if rule == "stop" else int(rule)
        self._in_row: dict[int, int] = {}

    def check(self, optimizer: int, problem: str, advice: str) -> None:
        """Check that the update of `optimizer` at hand may be skipped.

        Args:
            optimizer: its index.
            problem: one sentence: what is not finite, and where.
            advice: one sentence or more: what to do about it.

        Raises:
            NonFiniteError: it may not.
        """
        in_row = self._in_row.get(optimizer, 0)
        if in_row < self._most:
            return
        if in_row:
            skipped = f"{in_row} updates in a row were" if in_row > 1 else "The update before was"
            raise NonFiniteError(f"{problem} {skipped} skipped, and you set nonfinite={self.rule}. {advice}")
        raise NonFiniteError(f"{problem} {advice} To skip such updates: run.replicate(..., nonfinite='skip').")

    def count(self, optimizer: int, problem: str, where: str) -> None:
        """Take what became of an update of `optimizer`, made just now or recorded by the run that is resumed.

        Args:
            optimizer: its index.
            problem: why it was skipped; empty if it was not.
            where: line of the script.

        Raises:
            MismatchError: it was skipped, and may not be.
        """
        in_row = self._in_row.get(optimizer, 0) + 1 if problem else 0
        if in_row > self._most:
            raise MismatchError(
                f"The checkpoint's run skipped an update at {where} ({problem.removesuffix('.')}), and you set "
                f"nonfinite={self.rule!r}, which does not. Set it as it was, or start anew in another folder."
            )
        self._in_row[optimizer] = in_row
