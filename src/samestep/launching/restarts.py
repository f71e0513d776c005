"""Whether a fleet that lost a worker is started again. Pure: no I/O, no clock."""

from __future__ import annotations

IN_VAIN = 3
"""Fleets that may die one after the other without one more recorded call than before."""


class Restarts:
    """The deaths of one run.

    Attributes:
        count: fleets that were started again.
        came_again: the error that ended the run was that of the fleet before, at the same place.
    """

    def __init__(self) -> None:
        self.count = 0
        self.came_again = False
        self._num_in_vain = 0
        self._most_calls = 0
        self._last_error: tuple[str, int] | None = None

    @property
    def in_vain(self) -> bool:
        """Whether the last fleets died without getting any further than those before."""
        return self._num_in_vain >= IN_VAIN

    def allow(self, num_calls: int, error: str = "") -> bool:
        """Decide after a worker's death, or an error of the script that may pass.

        Args:
            num_calls: calls that the run has recorded so far.
            error: the error; empty after a death.

        Returns:
            Whether to start again: not where the last fleets died without getting any further than those before, nor
            after an error that has come before the first call, or at the same call twice.
        """
        if error:
            last, self._last_error = self._last_error, (error, num_calls)
            # A worker may fail in a step before the first has recorded the call that ended the step before.
            self.came_again = last is not None and last[0] == error and abs(last[1] - num_calls) <= 1
            if self.came_again or not num_calls:
                return False
        self._num_in_vain = 0 if num_calls > self._most_calls else self._num_in_vain + 1
        self._most_calls = max(self._most_calls, num_calls)
        if self.in_vain:
            return False
        self.count += 1
        return True
