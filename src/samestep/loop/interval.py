"""Time between checkpoints."""

from __future__ import annotations

import time


class Interval:
    """Tells when so many seconds have passed again.

    Args:
        seconds: how many; None for never.
    """

    def __init__(self, seconds: float | None):
        self._seconds = seconds
        self._since = time.monotonic()

    def has_passed(self) -> bool:
        """Return whether the seconds have passed since this was last true."""
        now = time.monotonic()
        if self._seconds is None or now - self._since < self._seconds:
            return False
        self._since = now
        return True
