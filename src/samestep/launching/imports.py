"""Libraries that a script imports, imported by the zygote too, so that a fleet which starts again need not.

A worker tells which installed libraries the script has loaded. A child tries first: what starts a thread on import,
fails or takes very long would spoil the zygote, and is left to the workers. The own files of a script are not imported.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import sysconfig
import time
from collections.abc import Collection, Sequence

from samestep.launching import zygote
from samestep.launching.output import Muted

PATIENCE = 30.0
"""Seconds that a run has to last before it is worth while: importing takes time from the workers."""
MOST_SECONDS = 5.0
"""Of imports that the supervisor makes itself; meanwhile it hears nothing."""


def learned(known: Collection[str]) -> list[str]:
    """Return the installed modules that this process has imported, in order, but for those in `known`."""
    paths = sysconfig.get_paths()
    roots = tuple({os.path.join(paths[name], "") for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    return [
        name
        for name, module in list(sys.modules.items())
        if name not in known and name != "__main__" and _origin(module).startswith(roots)
    ]


class Imports:
    """What the zygote takes over from the script, over all fleets of a run."""

    def __init__(self) -> None:
        self._names: Sequence[str] = ()
        self._tried: Sequence[str] = ()
        self._heard_at: float | None = None
        self._pid = 0
        self._pidfd = -1

    def hear(self, names: Sequence[str], now: float) -> None:
        """Take what a worker has told.

        Args:
            names: of modules.
            now: seconds of the monotonic clock.
        """
        if self._pid and list(names) == list(self._tried):
            # A fleet that starts again tells the same as the one before.
            return
        self._names = names
        self._heard_at = now

    def due(self, now: float, has_died: bool) -> int | None:
        """Let a child try to import what was heard, if it is time to; return its pidfd, for a selector.

        Args:
            now: seconds of the monotonic clock.
            has_died: whether a fleet of this run has died already, so that another may.
        """
        if self._pid or self._heard_at is None or not (has_died or now - self._heard_at > PATIENCE):
            # One at a time: a selector still holds the pidfd of the one that is under way.
            return None
        self._heard_at, self._tried = None, self._names
        self._pid = _try_in_child(self._tried)
        self._pidfd = os.pidfd_open(self._pid)
        return self._pidfd

    def tried(self) -> None:
        """The child has ended: import the same if it could."""
        status = self._end(kill=False)
        if status == 0:
            take(self._tried)

    def close(self) -> None:
        """End the child, if there is one."""
        self._end(kill=True)

    def _end(self, kill: bool) -> int | None:
        """Return the child's exit status; None if there is none, or somebody else has waited for it."""
        if not self._pid:
            return None
        if kill:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        status = None
        with contextlib.suppress(ChildProcessError):
            _, status = os.waitpid(self._pid, 0)
        os.close(self._pidfd)
        self._pid, self._pidfd = 0, -1
        return status


def take(names: Sequence[str]) -> None:
    """Import `names`; what they print is dropped, and one that fails is left out."""
    muted = Muted()
    try:
        for name in names:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    finally:
        muted.end()


def _try_in_child(names: Sequence[str]) -> int:
    """Fork a child that imports `names`; its exit code is 0 if this process may do the same. Returns its pid."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        zygote.die_with(parent)
        os.nice(19)
        begin = time.process_time()
        take(names)
        zygote.check_one_task()
        code = 0 if time.process_time() - begin < MOST_SECONDS else 1
    except BaseException:
        code = 1
    finally:
        os._exit(code)


def _origin(module: object) -> str:
    spec = getattr(module, "__spec__", None)
    return str(getattr(spec, "origin", None) or "")
