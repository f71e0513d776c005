"""One line that tells how far a run is: kept at the bottom of a terminal, or printed now and then elsewhere."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from typing import Any, TextIO

from samestep.units import count_in_words, seconds_in_words

_PLAIN_SECONDS = 10.0
"""Between two lines where there is no terminal."""
_ERASE = "\r\x1b[2K"
_BAR_WIDTH = 20


class Progress:
    """Shows frames of a run, and lets what the script prints pass above.

    There is no thread: the line is drawn when something arrives. Where nobody can read it any more (the terminal was
    closed, `tee` has ended, the log's disk is full) the run goes on without.
    """

    def __init__(
        self,
        title: str,
        stream: TextIO,
        *,
        is_live: bool,
        clock: Callable[[], float] = time.monotonic,
        write_to: Callable[[int, bytes], None] | None = None,
    ):
        """Begin with nothing shown.

        Args:
            title: name of what runs.
            stream: where the line goes.
            is_live: `stream` is a terminal, whose last line can be redrawn.
            clock: seconds.
            write_to: writes bytes of the script to its stream (1 stdout, 2 stderr).
        """
        self._title = title
        self._stream = stream
        self._is_live = is_live
        self._clock = clock
        self._write_to = write_to if write_to is not None else _write_all
        self._told_at = clock()
        self._first: tuple[int, float] | None = None
        self._line = ""
        self._is_drawn = False
        self._at_line_start = True

    def update(self, frame: dict[str, Any]) -> None:
        """Take how far the run is.

        Args:
            frame: step, steps (planned or None), epoch, epochs, loss, samples_per_second, logged; any may be missing.
                Losses and logged numbers are shown to four digits.
        """
        self._line = line_of(self._title, {**frame, "seconds_left": self._left(frame)}, with_bar=self._is_live)
        if self._is_live:
            self._draw()
        elif self._clock() - self._told_at >= _PLAIN_SECONDS:
            self._told_at = self._clock()
            self._put(self._line + "\n")

    def say(self, text: str) -> None:
        """Show a sentence that stays."""
        self._erase()
        self._put(text + "\n")
        self._draw()

    def write(self, stream: int, data: bytes) -> None:
        """Let bytes that the script printed pass, at once. The line comes back when they end a line."""
        if not data:
            return
        self._erase()
        with contextlib.suppress(OSError):
            self._write_to(stream, data)
        self._at_line_start = data.endswith(b"\n")
        self._draw()

    def close(self) -> None:
        """Take the line away."""
        self._erase()
        if self._is_live and not self._at_line_start:
            self._put("\n")
            self._at_line_start = True
        self._line = ""

    def _left(self, frame: dict[str, Any]) -> float | None:
        """Seconds to the last planned step at the pace seen so far."""
        step, steps = frame.get("step"), frame.get("steps")
        if step is None or not steps:
            return None
        if self._first is None:
            self._first = (step, self._clock())
        done, seconds = step - self._first[0], self._clock() - self._first[1]
        return max(0, steps - step) * seconds / done if done > 0 else None

    def _draw(self) -> None:
        if self._is_live and self._line and self._at_line_start:
            width = shutil.get_terminal_size().columns - 1
            self._put(_ERASE + self._line[:width])
            self._is_drawn = True

    def _erase(self) -> None:
        if self._is_drawn:
            self._put(_ERASE)
            self._is_drawn = False

    def _put(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()


def line_of(title: str, frame: dict[str, Any], *, with_bar: bool = False) -> str:
    """Return the line for a frame: "digits.py  step 120 of 600  epoch 3 of 12  loss 0.1234  1,234 samples/s"."""
    step, steps, speed = frame.get("step"), frame.get("steps"), frame.get("samples_per_second")
    parts = [title]
    if with_bar and step is not None and steps:
        filled = min(_BAR_WIDTH, _BAR_WIDTH * step // steps)
        parts.append("█" * filled + "░" * (_BAR_WIDTH - filled))
    for name, value, planned in (("step", step, steps), ("epoch", frame.get("epoch"), frame.get("epochs"))):
        if value is not None:
            parts.append(f"{name} {count_in_words(value)}" + (f" of {count_in_words(planned)}" if planned else ""))
    if frame.get("loss") is not None:
        parts.append(f"loss {frame['loss']:.4g}")
    if speed:
        parts.append(f"{count_in_words(round(speed))} samples/s")
    if frame.get("seconds_left") is not None:
        parts.append(f"{seconds_in_words(frame['seconds_left'])} left")
    parts.extend(f"{name} {_short(value)}" for name, value in (frame.get("logged") or {}).items())
    return "  ".join(parts)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
