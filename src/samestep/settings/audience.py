"""What the user is shown while a run goes on, and at its end. Prints are the script's; the rest goes to stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from samestep.launching.channel import Frame
from samestep.launching.output import Plumbing
from samestep.measure.progress import Progress
from samestep.measure.summary import show, store


def plumbing() -> Plumbing:
    """Return how the first worker's prints get past a status line: through a pipe where both share a terminal."""
    is_live = os.isatty(2)
    return Plumbing(pipe_stdout=is_live and os.isatty(1), pipe_stderr=is_live)


class Audience:
    """Watches one run for a person.

    Attributes:
        result: what the user's function returned, packed; None until it has.
        facts: of each launch call that has finished, by its number.
    """

    def __init__(self, title: str):
        self.result: bytes | None = None
        self.facts: dict[int, dict[str, Any]] = {}
        self._scaled: list[int] = []
        self._progress = Progress(title, sys.stderr, is_live=os.isatty(2))

    def frame(self, frame: Frame) -> bool:
        """Take what a worker says."""
        if frame.kind == "progress":
            self._progress.update(frame.info)
        elif frame.kind == "note":
            self._progress.say(frame.info["text"])
        elif frame.kind == "scaled":
            self._scaled.append(frame.info["num_workers"])
            self._progress.say(f"samestep: Now {_workers_in_words(self._scaled[-1])}.")
        elif frame.kind == "finished":
            if frame.info["warning"]:
                self._progress.say(frame.info["warning"])
            self.result = frame.blob
            # A run that was started again may finish a call twice.
            self.facts[frame.info["call"]] = facts = frame.info["facts"]
            if self._scaled:
                words = ", then ".join(map(_workers_in_words, self._scaled))
                facts["notes"] = [*(facts.get("notes") or ()), f"Scaled while it ran, to {words}."]
        return False

    def output(self, stream: int, data: bytes) -> None:
        """Take what the first worker printed."""
        self._progress.write(stream, data)

    def close(self) -> None:
        """Take the progress line away."""
        self._progress.close()

    def end(self, summary_path: str | None = None) -> None:
        """Show the summary of every launch call, and write the last one's facts to a file.

        Raises:
            SettingsError: the file cannot be written.
        """
        self.close()
        # Whether anybody can read it or not (a closed terminal), the run has ended well.
        with contextlib.suppress(OSError):
            for facts in self.facts.values():
                show(facts, sys.stderr)
        if summary_path is not None and self.facts:
            store(self.facts[max(self.facts)], summary_path)


def _workers_in_words(count: int) -> str:
    return f"{count} worker{'s' * (count != 1)}"


class TraceAudience:
    """Watches one run of `samestep verify`: collects digests, shows nothing.

    Attributes:
        steps: one frame per committed step: step, loss, tensors.
    """

    def __init__(self, num_steps: int):
        self.steps: list[dict[str, Any]] = []
        self._num_steps = num_steps

    def frame(self, frame: Frame) -> bool:
        """Take what a worker says; enough steps end the run."""
        if frame.kind == "trace":
            self.steps.append(frame.info)
        return len(self.steps) >= self._num_steps

    def output(self, stream: int, data: bytes) -> None:
        """Drop it."""


class LaunchedAudience:
    """Stands in for a supervisor in a run that another launcher started."""

    def __init__(self, title: str):
        self._title = title
        self._reporter: PrintingReporter | None = None

    def reporter(self, is_first: bool) -> PrintingReporter:
        """Return where this worker's progress goes."""
        self._reporter = PrintingReporter(Progress(self._title, sys.stderr, is_live=False), is_first)
        return self._reporter

    def finished(self, facts: dict[str, Any]) -> None:
        """Show the summary."""
        show(facts, sys.stderr)


class PrintingReporter:
    """Prints progress from inside the first worker."""

    def __init__(self, progress: Progress, is_first: bool):
        self._progress = progress
        self._is_first = is_first

    def progress(self, frame: dict[str, Any]) -> None:
        """Take how far the run is."""
        if self._is_first:
            self._progress.update(frame)

    def note(self, text: str) -> None:
        """Take a sentence for the user."""
        if self._is_first:
            self._progress.say(text)

    def trace(self, frame: dict[str, Any]) -> None:
        """Drop it: only `samestep verify` asks for it."""

    def caught_up(self) -> None:
        """Drop it: nothing restarts these workers."""
