"""The signals that end a run, collected instead of obeyed at once."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ECHO = 0.2
"""Seconds in which further signals are the first one again: `timeout` and other wrappers send it twice."""


@contextlib.contextmanager
def signals_into(received: list[int]) -> Iterator[socket.socket]:
    """Collect signals in a list, and give a socket that becomes readable when one comes."""
    near, far = socket.socketpair()
    far.setblocking(False)
    first = float("inf")

    def take(number: int, _: Any) -> None:
        nonlocal first
        now = time.monotonic()
        is_echo = now < first + _ECHO and now >= first
        first = min(first, now)
        if not is_echo:
            received.append(number)

    before = {number: signal.signal(number, take) for number in ENDING}
    before_fd = signal.set_wakeup_fd(far.fileno())
    try:
        yield near
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        near.close()
        far.close()
