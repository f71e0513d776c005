"""What becomes of samples that cannot be read: the run stops, or they are left out, as many as are allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from samestep.errors import DataError, MismatchError, SettingsError

OnBadSample = Literal["stop", "skip"] | int
"""Stop the run, leave such samples out, or leave out at most so many different ones."""

Bad = Sequence[tuple[int, str]]
"""Samples that could not be read: id, and what the reading ended with."""

_NUM_NAMED = 3


class Allowance:
    """How many samples may be left out; counts those that were, each once in however many epochs.

    Attributes:
        rule: as given.
    """

    def __init__(self, rule: OnBadSample = "stop"):
        """Take the user's choice.

        Raises:
            SettingsError: it is none.
        """
        is_count = isinstance(rule, int) and not isinstance(rule, bool) and rule >= 1
        if not is_count and rule not in ("stop", "skip"):
            raise SettingsError(
                f"You set on_bad_sample={rule!r}; use 'stop', 'skip', or how many different samples may be left out "
                f"(1 or more)."
            )
        self.rule = rule
        self._most = math.inf if rule == "skip" else 0 if rule == "stop" else int(rule)
        self._known: dict[tuple[int, int], str] = {}

    @property
    def skips(self) -> bool:
        """Whether a sample that cannot be read may be left out at all."""
        return self._most > 0

    def check(self, data: int, bad: Bad) -> None:
        """Check that the samples at hand may be left out.

        Args:
            data: number of the data set in the run.
            bad: its samples that could not be read for this step.

        Raises:
            DataError: there would be more than are allowed.
        """
        known = self._with(data, bad)
        if len(known) <= self._most:
            return
        raise DataError(
            f"{len(known)} sample{'s' * (len(known) > 1)} of your data could not be read, and you set "
            f"on_bad_sample={self.rule!r}. The last: {_last_of(known)}. Mend the data, or allow more: "
            f"run.replicate(..., on_bad_sample={2 * len(known)})."
        )

    def count(self, data: int, bad: Bad, where: str) -> None:
        """Take the samples that a step left out, made just now or recorded by the run that is resumed.

        Args:
            data: number of the data set in the run.
            bad: its samples that could not be read.
            where: line of the script.

        Raises:
            MismatchError: they were left out, and may not be.
        """
        if not bad:
            return
        self._known = self._with(data, bad)
        if len(self._known) > self._most:
            raise MismatchError(
                f"The checkpoint's run left out bad samples, {len(self._known)} up to {where} (the last: "
                f"{_last_of(self._known)}), and you set on_bad_sample={self.rule!r}. Set it as it was, or start anew "
                f"in another folder."
            )

    def _with(self, data: int, bad: Bad) -> dict[tuple[int, int], str]:
        return {**self._known, **{(data, sample): error for sample, error in bad}} if bad else self._known


def _last_of(known: dict[tuple[int, int], str]) -> str:
    last = list(known.items())[-_NUM_NAMED:]
    return "; ".join(f"sample {sample}: {error.removesuffix('.')}" for (_, sample), error in last)
