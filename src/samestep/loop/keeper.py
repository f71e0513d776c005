"""Keeps the state of a run, in files and in memory, and brings it back.

A run that goes on executes its script again from the first line. The keeper gives the ledger to replay, and loads the
state at the point of the script where it was kept.

    in files     every so many steps or seconds, when `run.steps` ends, when main ends, and where the user asks;
                 while training waits, or beside it (`Background`)
    in memory    about every 0.2 s, so that a fleet which loses a worker starts again where it was

The supervisor may order the run to stop, or to go on with another number of workers. All workers hear of it at the
same call, and leave at the end of the step, once the state is in files, or in memory.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from samestep.core.calls import Calls, Halted, line_of_user
from samestep.core.clock import Clock
from samestep.core.group import Group
from samestep.core.snapshot import FROM_MEMORY, Snapshots
from samestep.core.worker import Wish
from samestep.data.proof import SampleCount
from samestep.errors import SettingsError, StorageError
from samestep.loop.archive import Archive
from samestep.loop.background import Background
from samestep.loop.feed import Feed
from samestep.loop.interval import Interval
from samestep.loop.mismatch import Conditions
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
    feeds: dict[Any, Feed]

    @property
    def archive(self) -> Archive:
        """Saves and restores the model."""


class Keeper:
    """One worker's side of keeping a run."""

    def __init__(self, run: Kept, supervision: Supervision):
        """Keep `run`, also in memory if `supervision` has any, and end it when its orders say so."""
        self._run = run
        self._snapshots = snapshots = supervision.snapshots
        self._orders = supervision.orders
        self._saved: checkpoint.Checkpoint | None = None
        self._last_write = -1
        self._snapshot_due = 0.0
        self._snapshot_step = -1
        self._interval = Interval(run.keeping.every_seconds)
        # Calls that an earlier fleet has made and reported; until then this one is silent.
        self._num_known = snapshots.num_calls if snapshots is not None else 0
        self._background: Background | None = None
        if run.keeping.async_checkpoints and snapshots is not None and supervision.writer is not None:
            self._background = Background(run.group.worker, run.calls, run.record.saves, snapshots, supervision.writer)
        elif run.keeping.async_checkpoints:
            run.record.note(
                "async_checkpoints has no effect here: only workers that samestep itself has started, in the first "
                "launch() of a script, have a writer. Training waits while a checkpoint is written."
            )

    @property
    def saved(self) -> checkpoint.Checkpoint | None:
        """What the run goes on from, until the script has come to the point where it was made."""
        return self._saved

    @property
    def num_snapshot_bytes(self) -> int:
        """Memory that is taken to survive dead workers."""
        return self._snapshots.num_bytes if self._snapshots is not None else 0

    @property
    def silent(self) -> bool:
        """Whether what happens now was reported before: in a replay, and until a dead fleet's steps are made again."""
        return self._saved is not None or len(self._run.ledger) < self._num_known

    def resume(self) -> None:
        """Begin to replay what an earlier fleet left in memory, or the checkpoint that was asked for, if any.

        Raises:
            CheckpointError: there is no good one. MismatchError: see `Conditions.resume`.
        """
        if self._num_known and self._resume_after_death():
            return
        run, keeping = self._run, self._run.keeping
        if keeping.resume is None:
            if keeping.checkpoint is not None and checkpoint.steps_in(keeping.checkpoint):
                raise SettingsError(
                    f"You set checkpoint={keeping.checkpoint!r}, which holds checkpoints of an earlier run. Go on "
                    f"from them with --resume {keeping.checkpoint}, or name another folder."
                )
            return
        saved, skipped = checkpoint.load_newest(keeping.resume)
        for path, reason in skipped:
            run.record.note(f"Checkpoint {path} was skipped: {reason}")
        self._begin_replay(saved)
        if run.group.worker.is_first:
            for path, _ in skipped:
                checkpoint.set_aside(path)
        run.record.note(f"Resumed from {saved.path}, after step {saved.step}.")

    def took(self, num_calls: int) -> None:
        """Take note of how many calls the run has recorded."""
        if self._snapshots is None or not self._run.group.worker.is_first:
            return
        self._snapshots.num_calls = num_calls
        if num_calls == self._num_known:
            self._run.record.caught_up()

    def reach(self, made_by: str) -> bool:
        """Restore the state if the script has come to where it was kept; return whether.

        Args:
            made_by: what the script is doing: "after_step", "save", "finish".
        """
        saved = self._saved
        if saved is None or self._run.ledger.replaying or saved.facts["made_by"] != made_by:
            return False
        self._saved = None
        self._run.archive.restore(saved)
        for feed, read in zip(self._run.feeds.values(), saved.facts["reads"], strict=True):
            feed.restore(SampleCount.from_state(read) if self._run.group.worker.is_first else SampleCount())
        self._run.clock.add(saved.facts["elapsed"])
        done, folder = self._run.record.num_steps, self._run.keeping.checkpoint
        is_written = folder is None or saved.path != FROM_MEMORY or checkpoint.path_of(folder, done).exists()
        # A writer of a fleet that has died may publish it between the looks of two workers.
        is_written = bool(self._run.group.exchange(b"1" if is_written else b"")[0])
        self._last_write = done if is_written else -1
        if self._num_known and len(self._run.ledger) >= self._num_known:
            self._run.record.caught_up()
        return True

    def after_step(self, last: bool) -> None:
        """Keep the state if it is due: every so many steps, when `run.steps` ends, and by order.

        Raises:
            Halted: the workers were ordered to leave.
        """
        if self._saved is not None:
            self.reach("after_step")
            return
        keeping, done = self._run.keeping, self._run.record.num_steps
        stops = self._run.calls.heard(Wish.STOP)
        # Without a snapshot, another number of workers would have nothing to go on from.
        scales = self._run.calls.heard(Wish.SCALE) and self._snapshots is not None
        if (stops or scales) and self._orders is not None and self._run.group.worker.is_first:
            self._orders.reached()
        due = self._run.calls.heard(Wish.SAVE) or last or keeping.is_due(done)
        if stops:
            self.at_end("after_step")
        elif keeping.checkpoint is not None and due and done != self._last_write:
            self._write_or_lend(keeping.checkpoint)
        if self._snapshots is not None:
            self._snapshot_if_due(self._snapshots, at_once=scales and not stops)
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
        """
        run = self._run
        try:
            trouble = run.archive.save(folder, run.record.num_steps, self._facts(made_by, "run.save"), keep)
        except StorageError as error:
            if made_by == "save":
                raise
            run.record.saves.failed(error)
            return
        if folder == run.keeping.checkpoint:
            self._last_write = run.record.num_steps
            run.record.saves.worked(self._last_write, trouble)

    def _write_or_lend(self, folder: str) -> None:
        """Write the checkpoint that is due, or let it be written beside training."""
        run, background = self._run, self._background
        if background is None:
            self.write(folder, "after_step", run.keeping.keep)
        elif background.is_free(run.record.num_steps):
            self._snapshot(background.snapshots)
            self._last_write = run.record.num_steps
            background.begin(folder, self._last_write, run.keeping.keep)

    def _resume_after_death(self) -> bool:
        """Begin to replay the newest snapshot, or checkpoint, of a fleet that has died; return whether there is any."""
        assert self._snapshots is not None
        saved = self._snapshots.newest()
        folder = self._run.keeping.checkpoint
        if saved is None and folder is not None and checkpoint.steps_in(folder):
            saved, _ = checkpoint.load_newest(folder)
        if saved is None:
            return False
        self._begin_replay(saved)
        return True

    def _begin_replay(self, saved: checkpoint.Checkpoint) -> None:
        self._run.conditions.resume(saved)
        self._run.ledger = Ledger.from_facts(saved.facts["ledger"])
        self._saved = saved
        # None may write, or set files aside, before all have read.
        self._run.group.exchange(b"")

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
        run.archive.snapshot(snapshots, run.record.num_steps, self._facts("after_step", "run.steps (snapshot)"))
        now = time.perf_counter()
        self._snapshot_step = run.record.num_steps
        self._snapshot_due = now + max(_SNAPSHOT_SECONDS, _SNAPSHOT_SHARE * (now - begin))

    def _facts(self, made_by: str, kind: str) -> dict[str, Any]:
        """Return what the run needs to go on, beside the state. Collective."""
        run = self._run
        met = run.calls.meet(kind, line_of_user(), [feed.read.state_dict() for feed in run.feeds.values()])
        return {
            **run.conditions.facts(),
            "ledger": run.ledger.to_facts(),
            "made_by": made_by,
            "reads": [total.state_dict() for total in totals([value for value, _ in met])],
            "elapsed": run.clock.elapsed(),
        }


def totals(reads: list[list[dict[str, int]]]) -> list[SampleCount]:
    """Return what all workers read, for each data set; `reads` holds, per worker, one state of `SampleCount` each."""
    return [sum(map(SampleCount.from_state, column), SampleCount()) for column in zip(*reads, strict=True)]
