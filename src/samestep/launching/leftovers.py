"""What workers, and libraries, leave behind: processes, an empty folder. It ends with the run."""

from __future__ import annotations

import contextlib
import glob
import os
import signal
import tempfile
import time
from collections.abc import Iterator

_PATIENCE = 1.0
"""Seconds. Some orphans clean up by themselves once they find their parent gone."""


@contextlib.contextmanager
def without_empty_folders() -> Iterator[None]:
    """Remove the cache folder that torch's compiler makes on import, if it is new and nothing was compiled."""
    before = set(_cache_folders())
    try:
        yield
    finally:
        for folder in set(_cache_folders()) - before:
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def end_orphans(gently: bool, patience: float = _PATIENCE) -> None:
    """End what workers started and did not end; it has become this process's.

    Args:
        gently: send no signal before the time in which they may end by themselves has passed.
        patience: that time, in seconds.
    """
    deadline = time.monotonic() + patience
    if not gently:
        _signal_children(signal.SIGTERM)
    while _reap_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    while _reap_children():
        _signal_children(signal.SIGKILL)
        time.sleep(0.001)


def _cache_folders() -> list[str]:
    return glob.glob(os.path.join(glob.escape(tempfile.gettempdir()), "torchinductor_*"))


def _reap_children() -> bool:
    """Collect children that have ended. Returns whether any is left."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True


def _signal_children(number: int) -> None:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        for pid in file.read().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), number)
