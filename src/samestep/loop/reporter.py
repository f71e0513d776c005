"""Where a run tells how far it is. The launcher gives one that writes to its supervisor."""

from __future__ import annotations

from typing import Any, Protocol


class Reporter(Protocol):
    """Takes facts from the first worker; calls are cheap and never block for long."""

    def progress(self, frame: dict[str, Any]) -> None:
        """Take how far the run is: step, steps, epoch, epochs, loss, samples_per_second, logged."""

    def note(self, text: str) -> None:
        """Take a sentence for the user."""

    def trace(self, frame: dict[str, Any]) -> None:
        """Take the digests of one step: step, loss, tensors."""

    def caught_up(self) -> None:
        """Take note that a run which was interrupted has come to where it was: prints count again."""

    def take_over(self) -> None:
        """Take note that this worker is the first from now on: the one before it is gone."""

    def ready(self) -> None:
        """Take note that this worker, which joins a run, has caught up as far as it can alone."""

    def mended(self, info: dict[str, Any]) -> None:
        """Take note that the members go on without some: first (slot), members (slots), dead (slots), step."""

    def joined(self, info: dict[str, Any]) -> None:
        """Take note that others have come in: members (slots), step."""


class Silent:
    """A reporter that drops everything."""

    def progress(self, frame: dict[str, Any]) -> None:
        """Drop it."""

    def note(self, text: str) -> None:
        """Drop it."""

    def trace(self, frame: dict[str, Any]) -> None:
        """Drop it."""

    def caught_up(self) -> None:
        """Drop it."""

    def take_over(self) -> None:
        """Drop it."""

    def ready(self) -> None:
        """Drop it."""

    def mended(self, info: dict[str, Any]) -> None:
        """Drop it."""

    def joined(self, info: dict[str, Any]) -> None:
        """Drop it."""
