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


def end_orphans(gently: bool, patience: float = _PATIENCE, spared: int = 0) -> None:
    """End what workers started and did not end; it has become this process's.

    Args:
        gently: send no signal before the time in which they may end by themselves has passed.
        patience: that time, in seconds.
        spared: pid of a child that goes on; 0 for none.
    """
    deadline = time.monotonic() + patience
    if not gently:
        _signal_children(signal.SIGTERM, spared)
    while _reap_children(spared) and time.monotonic() < deadline:
        time.sleep(0.01)
    while _reap_children(spared):
        _signal_children(signal.SIGKILL, spared)
        time.sleep(0.001)


def _cache_folders() -> list[str]:
    return glob.glob(os.path.join(glob.escape(tempfile.gettempdir()), "torchinductor_*"))


def _reap_children(spared: int) -> bool:
    """Collect children that have ended. Returns whether any is left, but for the one that is spared."""
    left = [pid for pid in _children(spared) if os.waitpid(pid, os.WNOHANG)[0] == 0]
    return bool(left)


def _signal_children(number: int, spared: int) -> None:
    for pid in _children(spared):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _children(spared: int) -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [pid for pid in map(int, file.read().split()) if pid != spared]
