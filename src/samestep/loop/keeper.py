"""Keeps the state of a run, in files and in memory, so that it can be brought back (`replay`).

    in files     every so many steps, when `run.steps` ends, when main ends, and where the user asks
    in memory    about every 0.2 s, so that a fleet which cannot go on starts again where it was

The supervisor may order the run to stop, to go on with another number of workers, or to take some in. All workers hear
of it at the same call, and obey at the end of the step, once the state is in files, or in memory.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from samestep.agree.agreement import Live
from samestep.core.calls import Calls, Halted, line_of_user
from samestep.core.clock import Clock
from samestep.core.group import Group
from samestep.core.integrity import Integrity
from samestep.core.snapshot import Snapshots
from samestep.core.worker import Wish
from samestep.errors import CheckpointError, StorageError
from samestep.loop.archive import Archive
from samestep.loop.background import Background
from samestep.loop.crew import Crew
from samestep.loop.interval import Interval
from samestep.loop.mismatch import Conditions
from samestep.loop.newcomer import let_in, who_joins
from samestep.loop.recipe import Keeping
from samestep.loop.record import Record
from samestep.loop.supervision import Supervision
from samestep.storage import checkpoint
from samestep.storage.ledger import Ledger

_SNAPSHOT_SECONDS = 0.2
_SNAPSHOT_SHARE = 100
"""Snapshots are at least so long apart, and so many times what one takes: about 1 % of the time."""


class Kept(Protocol):
    """What is kept of a run (`Session`)."""

    keeping: Keeping
    group: Group
    calls: Calls
    clock: Clock
    ledger: Ledger
    record: Record
    conditions: Conditions
    crew: Crew

    @property
    def agreed(self) -> Live:
        """How replicas agree."""

    @property
    def archive(self) -> Archive:
        """Saves and restores the model."""

    def of_first(self, kind: str, make: Callable[[], Any]) -> Any:
        """Return on every worker what `make` gives on the first."""

    @property
    def integrity(self) -> Integrity:
        """Finds bits that flipped."""


class Keeper:
    """One worker's side of keeping a run."""

    def __init__(self, run: Kept, supervision: Supervision):
        """Keep `run`, also in memory if `supervision` has any, and end it when its orders say so."""
        self._run = run
        self._snapshots = snapshots = supervision.snapshots
        self._orders = supervision.orders
        self._last_write = -1
        self._snapshot_due = 0.0
        self._snapshot_step = -1
        self._interval = Interval(run.keeping.every_seconds)
        self._background: Background | None = None
        if run.keeping.async_checkpoints and snapshots is not None and supervision.writer is not None:
            self._background = Background(run.group, run.calls, run.record.saves, snapshots, supervision.writer)
        elif run.keeping.async_checkpoints:
            run.record.note(
                "async_checkpoints has no effect here: only workers that samestep itself has started, in the first "
                "launch() of a script, have a writer. Training waits while a checkpoint is written."
            )

    @property
    def num_snapshot_bytes(self) -> int:
        """Memory that is taken to survive dead workers."""
        return self._snapshots.num_bytes if self._snapshots is not None else 0

    def after_step(self, last: bool) -> None:
        """Keep the state if it is due: every so many steps, when `run.steps` ends, and by order.

        Raises:
            Halted: the workers were ordered to leave.
        """
        keeping, done = self._run.keeping, self._run.record.num_steps
        stops = self._run.calls.heard(Wish.STOP)
        # Without a snapshot, another number of workers would have nothing to go on from.
        scales = self._run.calls.heard(Wish.SCALE) and self._snapshots is not None
        joins = self._run.calls.heard(Wish.JOIN)
        if self._run.calls.heard(Wish.ANSWER):
            self._run.crew.regroup()
        if (stops or scales) and self._orders is not None and self._run.group.worker.is_first:
            self._orders.reached()
        due = self._run.calls.heard(Wish.SAVE) or last or keeping.is_due(done)
        if stops:
            self.at_end("after_step")
        elif keeping.checkpoint is not None and due and done != self._last_write:
            self._write_or_lend(keeping.checkpoint)
        if self._snapshots is not None:
            may_join = joins and not last and not stops and not scales
            joining = who_joins(self._run, self._orders, self._snapshots) if may_join else []
            self._snapshot_if_due(self._snapshots, at_once=bool(joining) or (scales and not stops))
            if joining:
                let_in(self._run, self._snapshots, joining, done, self._last_write)
        self._insist()
        # A stop may have been ordered while the state was kept in memory.
        if scales and not stops and self._run.calls.heard(Wish.STOP):
            self.at_end("after_step")
        if self._run.group.worker.is_first and keeping.checkpoint is not None:
            overdue = self._background is not None and self._background.is_overdue()
            if self._interval.has_passed() or overdue:
                self._run.calls.ask(Wish.SAVE)
        if stops or scales:
            self._run.calls.halt(Halted())

    def at_end(self, made_by: str = "finish") -> None:
        """Keep the state of a run that ends here in a file, and see everything written.

        Args:
            made_by: see `reach`.
        """
        folder, background = self._run.keeping.checkpoint, self._background
        if folder is None:
            return
        done = self._run.record.num_steps
        if background is not None and not background.settle(wait=done == self._last_write):
            self._last_write = -1
        if done != self._last_write:
            self.write(folder, made_by, self._run.keeping.keep)
        if background is not None:
            background.settle(wait=True)

    def write(self, folder: str, made_by: str, keep: int | None) -> None:
        """Write a checkpoint. Collective.

        Args:
            folder: where to.
            made_by: see `reach`.
            keep: how many checkpoints to keep there, or None for all.

        Raises:
            StorageError: the disk did not take what the user asked to be saved. Otherwise it is told, and tried again.
            IntegrityError: memory changed by itself since the last update.
        """
        run, done = self._run, self._run.record.num_steps
        run.integrity.verify(run.calls, "run.save (verify)", f"before the checkpoint of step {done}")
        try:
            with run.agreed.drained():
                trouble = run.archive.save(folder, done, self._facts(made_by, "run.save"), keep)
        except StorageError as error:
            if made_by == "save":
                raise
            run.record.saves.failed(error)
            return
        run.integrity.withdraw_if_damaged(functools.partial(_set_aside, checkpoint.path_of(folder, done)))
        if folder == run.keeping.checkpoint:
            self._last_write = done
            run.record.saves.worked(self._last_write, trouble)

    def go_on(self, last_write: int, is_kept: bool = False) -> None:
        """Take note of what there is at the step that the run goes on from.

        Args:
            last_write: step of the last checkpoint in the run's folder.
            is_kept: this step is in memory.
        """
        self._last_write = last_write
        if is_kept:
            self._snapshot_step = self._run.record.num_steps
        self._insist()

    def _insist(self) -> None:
        """See that what the next checkpoint holds is looked at before."""
        keeping = self._run.keeping
        if keeping.checkpoint is not None:
            self._run.integrity.insists = keeping.is_due(self._run.record.num_steps + 1)

    def _write_or_lend(self, folder: str) -> None:
        """Write the checkpoint that is due, or let it be written beside training."""
        run, background = self._run, self._background
        if background is None:
            self.write(folder, "after_step", run.keeping.keep)
        elif background.is_free(run.record.num_steps):
            self._snapshot(background.snapshots)
            self._last_write = run.record.num_steps
            background.begin(folder, self._last_write, run.keeping.keep)

    def _snapshot_if_due(self, snapshots: Snapshots, at_once: bool) -> None:
        """Keep the state in memory if the first worker asked for it in this step; let it ask for the next step."""
        run = self._run
        if run.calls.heard(Wish.SNAPSHOT) or at_once:
            # A checkpoint of this step may have made it.
            if self._snapshot_step != run.record.num_steps:
                self._snapshot(snapshots)
        elif run.group.worker.is_first and time.perf_counter() >= self._snapshot_due:
            run.calls.ask(Wish.SNAPSHOT)

    def _snapshot(self, snapshots: Snapshots) -> None:
        """Keep the state in memory. Collective."""
        run, begin = self._run, time.perf_counter()
        done = run.record.num_steps

        def keep() -> None:
            run.integrity.verify(run.calls, "run.steps (verify)", f"after the update of step {done - 1}")
            with run.agreed.drained():
                run.archive.snapshot(snapshots, done, self._facts("after_step", "run.steps (snapshot)"))

        run.crew.surviving(keep)
        # A bit may have flipped while it was copied.
        run.integrity.withdraw_if_damaged(functools.partial(snapshots.withdraw, done))
        now = time.perf_counter()
        self._snapshot_step = done
        self._snapshot_due = now + max(_SNAPSHOT_SECONDS, _SNAPSHOT_SHARE * (now - begin))

    def _facts(self, made_by: str, kind: str) -> dict[str, Any]:
        """Return what the run needs to go on, beside the state. Collective."""
        run = self._run
        run.calls.meet(kind, line_of_user())
        return {
            **run.conditions.facts(),
            "ledger": run.ledger.to_facts(),
            "made_by": made_by,
            "elapsed": run.clock.elapsed(),
        }


def _set_aside(path: Path) -> None:
    """Rename a checkpoint that may hold what is wrong; another worker may have done it."""
    with contextlib.suppress(CheckpointError):
        checkpoint.set_aside(path)
