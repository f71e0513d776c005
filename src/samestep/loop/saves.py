"""What became of the checkpoints that a run writes by itself: a disk that fails does not end the training.

It is told loudly instead: when the reason is new, and when saving works again; the summary counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from samestep.errors import StorageError


class Saves:
    """Counts saves, and tells of those that failed.

    Args:
        note: takes a sentence for the user.
    """

    def __init__(self, note: Callable[[str], None]):
        self._note = note
        self._num_worked = 0
        self._num_failed = 0
        self._num_skipped = 0
        self._failing = ""
        self._trouble = ""
        self._last_step: int | None = None
        self._skipped_step = -1

    def failed(self, error: StorageError) -> None:
        """Take a save that failed."""
        self._num_failed += 1
        if error.reason != self._failing:
            last = f" (that of step {self._last_step})" if self._last_step is not None else ""
            self._note(
                f"SAVING FAILS. {error} Training goes on, and each later save tries again. Until one works, a stop "
                f"loses what was trained after the newest good checkpoint{last}."
            )
        self._failing = error.reason

    def skipped(self, step: int) -> None:
        """Take a save that was due after `step` while the one before was still being written beside training."""
        self._num_skipped += step != self._skipped_step
        self._skipped_step = step

    def worked(self, step: int, trouble: StorageError | None) -> None:
        """Take a save that worked.

        Args:
            step: committed steps.
            trouble: why old checkpoints could not be deleted, if they could not.
        """
        if self._failing:
            failed = f"{self._num_failed} of {self._num_failed + self._num_worked + 1} saves failed so far"
            self._note(f"Saving works again: the checkpoint of step {step} is written ({failed}).")
        self._num_worked += 1
        self._failing, self._last_step = "", step
        reason = trouble.reason if trouble is not None else ""
        if trouble is not None and reason != self._trouble:
            self._note(f"{trouble} The new one is good, and training goes on; the old ones take space until then.")
        self._trouble = reason

    def facts(self) -> dict[str, Any]:
        """Return how many saves there were, how many of them failed, and why the last one did ("" if it worked).

        Also how many more were due and skipped.
        """
        return {
            "saves": self._num_worked + self._num_failed,
            "saves_failed": self._num_failed,
            "saving_fails": self._failing,
            "saves_skipped": self._num_skipped,
        }
