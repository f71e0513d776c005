"""Checkpoints beside training: the state is copied to memory, and a writer takes it from there to the disk.

    training    keeps a snapshot, lends it to the writer, and goes on; the snapshots that follow are kept elsewhere
    writer      a process of its own: files, fsync, rename, the oldest deleted; then the snapshot is taken back
    training    hears what became of it, at the end of a later step

Training never waits for the writer but where the run ends. A checkpoint that is due while the one before is still
being written is skipped, and the newest state is written as soon as the writer is free.
"""

from __future__ import annotations

import os
import time
from typing import Any

from samestep.core.calls import Calls, line_of_user
from samestep.core.group import Group
from samestep.core.snapshot import Snapshots
from samestep.errors import CheckpointError, StorageError
from samestep.loop.saves import Saves
from samestep.loop.supervision import Writer

_POLL = 0.005
"""Seconds between looks at whether the writer is done."""
_CALL = "run.steps (checkpoint)"


class Background:
    """One worker's side of it. The first worker speaks with the writer.

    Attributes:
        snapshots: where the state is kept that is lent.
    """

    def __init__(self, group: Group, calls: Calls, saves: Saves, snapshots: Snapshots, writer: Writer):
        self.snapshots = snapshots
        self._group = group
        self._calls = calls
        self._saves = saves
        self._writer = writer
        self._is_late = False
        self._has_failed = False

    def is_free(self, step: int) -> bool:
        """Return whether the checkpoint of `step` can begin; if not, it is counted as skipped. Collective."""
        free = True
        if self._group.worker.is_first:
            self._hear()
            free = self.snapshots.lender is None
            self._is_late = not free
            if not free:
                self._saves.skipped(step)
        return bool(self._calls.meet(_CALL, line_of_user(), free)[0][0])

    def begin(self, folder: str, step: int, keep: int | None) -> None:
        """Let the newest snapshot, just made, be written; see `Archive.save`."""
        if not self._group.worker.is_first:
            return
        self._has_failed = False
        self.snapshots.lend(self._group.slot)
        self._writer.write({"cwd": _here(), "folder": folder, "step": step, "keep": keep})

    def is_overdue(self) -> bool:
        """In the first worker: hear what is new; return whether the writer is free for what was skipped."""
        self._hear()
        return self._is_late and self.snapshots.lender is None

    def settle(self, wait: bool) -> bool:
        """Hear what became of the last checkpoint; return False if it failed. Collective.

        Args:
            wait: until it is written, or has failed.
        """
        if self._group.worker.is_first:
            while wait and self.snapshots.lender is not None:
                time.sleep(_POLL)
            self._hear()
        return bool(self._calls.meet(_CALL, line_of_user(), not self._has_failed)[0][0])

    def _hear(self) -> None:
        """Take the writer's answer.

        Raises:
            CheckpointError: the checkpoint cannot be written, on whatever disk.
        """
        answer = None if self.snapshots.lender is not None else self._writer.answer()
        if answer is None:
            return
        if "message" not in answer:
            self._saves.worked(answer["step"], _trouble(answer["trouble"]))
            return
        self._has_failed = True
        if answer["reason"] is None:
            raise CheckpointError(answer["message"])
        self._saves.failed(StorageError(answer["message"], answer["reason"]))


def _trouble(told: list[Any] | None) -> StorageError | None:
    return StorageError(*told) if told is not None else None


def _here() -> str | None:
    """Return the working directory, None if it is gone."""
    try:
        return os.getcwd()
    except OSError:
        return None
