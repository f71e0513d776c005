"""Keeps the state of a run, in files and in memory, and brings it back.

A run that goes on executes its script again from the first line. The keeper gives the ledger to replay, and loads the
state at the point of the script where it was kept.

    in files     every so many steps, when `run.steps` ends, when main ends, and where the user asks
    in memory    about every 0.2 s, so that a fleet which loses a worker starts again where it was

The supervisor may order the run to stop, or to go on with another number of workers. All workers hear of it at the
same call, and leave at the end of the step, once the state is in files, or in memory.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from samestep.core.calls import Calls, Halted, line_of_user
from samestep.core.clock import Clock
from samestep.core.group import Group
from samestep.core.integrity import Integrity
from samestep.core.snapshot import FROM_MEMORY, Snapshots
from samestep.core.worker import Wish
from samestep.errors import CheckpointError, SettingsError, StorageError
from samestep.loop.archive import Archive
from samestep.loop.crew import Crew
from samestep.loop.mismatch import Conditions
from samestep.loop.newcomer import Newcomer, let_in, who_joins
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
    def archive(self) -> Archive:
        """Saves and restores the model."""

    def of_first(self, kind: str, make: Callable[[], Any]) -> Any:
        """Return on every worker what `make` gives on the first."""

    @property
    def integrity(self) -> Integrity:
        """Finds bits that flipped."""


class Keeper:
    """One worker's side of keeping a run.

    Attributes:
        newcomer: brings this worker into a run that is under way; None once, or where, it is a member.
    """

    def __init__(self, run: Kept, supervision: Supervision):
        """Keep `run`, also in memory if `supervision` has any, and end it when its orders say so."""
        self._run = run
        self._snapshots = snapshots = supervision.snapshots
        self._orders = supervision.orders
        self._reporter = supervision.reporter
        self.newcomer: Newcomer | None = None
        if supervision.joins:
            assert snapshots is not None
            self.newcomer = Newcomer(run, snapshots, supervision.reporter)
        self._saved: checkpoint.Checkpoint | None = None
        self._last_write = -1
        self._snapshot_due = 0.0
        # Calls that an earlier fleet has made and reported; until then this one is silent.
        self._num_known = snapshots.num_calls if snapshots is not None else 0

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
        if self.newcomer is not None:
            self._begin_replay(self.newcomer.first())
            return
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
        if self._snapshots is None:
            return
        if not self._run.group.worker.is_first:
            self._reporter.recorded(num_calls)
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
        if self.newcomer is not None:
            return self._come_in(self.newcomer)
        self._saved = None
        self._run.archive.restore(saved)
        self._run.clock.add(saved.facts["elapsed"])
        done, folder = self._run.record.num_steps, self._run.keeping.checkpoint
        is_written = folder is None or saved.path != FROM_MEMORY or checkpoint.path_of(folder, done).exists()
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
        joins = self._run.calls.heard(Wish.JOIN)
        if self._run.calls.heard(Wish.ANSWER):
            self._run.crew.regroup()
        if (stops or scales) and self._orders is not None and self._run.group.worker.is_first:
            self._orders.reached()
        due = last or stops or (keeping.every is not None and done % keeping.every == 0)
        if keeping.checkpoint is not None and due and done != self._last_write:
            self.write(keeping.checkpoint, "after_step", keeping.keep)
        if self._snapshots is not None:
            joining = who_joins(self._run, self._orders) if joins and not last and not stops and not scales else []
            self._snapshot_if_due(self._snapshots, at_once=bool(joining) or (scales and not stops))
            if joining:
                let_in(self._run, self._snapshots, joining, done, self._last_write)
        self._insist()
        # A stop may have been ordered while the state was kept in memory.
        late = scales and not stops and self._run.calls.heard(Wish.STOP)
        if keeping.checkpoint is not None and late and done != self._last_write:
            self.write(keeping.checkpoint, "after_step", keeping.keep)
        if stops or scales:
            self._run.calls.halt(Halted())

    def at_end(self) -> None:
        """Keep the state of a run whose main has ended."""
        folder = self._run.keeping.checkpoint
        if folder is not None and self._run.record.num_steps != self._last_write:
            self.write(folder, "finish", self._run.keeping.keep)

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

    def _insist(self) -> None:
        """See that what the next checkpoint holds is looked at before."""
        keeping = self._run.keeping
        if keeping.checkpoint is not None and keeping.every is not None:
            self._run.integrity.insists = (self._run.record.num_steps + 1) % keeping.every == 0

    def _come_in(self, newcomer: Newcomer) -> bool:
        """Go on in what the members have done since, or meet them; return whether."""
        self._saved = saved = newcomer.further()
        if self._run.ledger.replaying:
            return False
        # Before the members go on: they will write to that memory again.
        self._run.archive.take_over(saved)
        self._run.clock.add(saved.facts["elapsed"])
        self._last_write = newcomer.come_in()
        self._saved = self.newcomer = None
        self._insist()
        self._run.record.caught_up()
        return True

    def _resume_after_death(self) -> bool:
        """Begin to replay the newest snapshot, or checkpoint, of a fleet that has died; return whether there is any."""
        assert self._snapshots is not None
        saved = self._snapshots.newest()
        folder = self._run.keeping.checkpoint
        if saved is None and folder is not None and checkpoint.steps_in(folder):
            saved, _ = checkpoint.load_newest(folder)
        for step in self._snapshots.damaged:
            self._run.record.note(f"The state after step {step} that was kept in memory is damaged and not used.")
        if saved is None:
            return False
        self._begin_replay(saved)
        for step in self._snapshots.damaged:
            # Now that all have read, let it be written over first.
            self._snapshots.withdraw(step)
        return True

    def _begin_replay(self, saved: checkpoint.Checkpoint) -> None:
        self._run.conditions.resume(saved)
        self._run.ledger = Ledger.from_facts(saved.facts["ledger"])
        self._saved = saved
        # None may write, or set files aside, before all have read.
        self._run.group.exchange(b"")

    def _snapshot_if_due(self, snapshots: Snapshots, at_once: bool) -> None:
        """Keep the state in memory if the first worker asked for it in this step; let it ask for the next step."""
        run, begin = self._run, time.perf_counter()
        if run.calls.heard(Wish.SNAPSHOT) or at_once:
            done = run.record.num_steps

            def keep() -> None:
                run.integrity.verify(run.calls, "run.steps (verify)", f"after the update of step {done - 1}")
                run.archive.snapshot(snapshots, done, self._facts("after_step", "run.steps (snapshot)"))

            run.crew.surviving(keep)
            # A bit may have flipped while it was copied.
            run.integrity.withdraw_if_damaged(functools.partial(snapshots.withdraw, done))
            now = time.perf_counter()
            self._snapshot_due = now + max(_SNAPSHOT_SECONDS, _SNAPSHOT_SHARE * (now - begin))
        elif run.group.worker.is_first and begin >= self._snapshot_due:
            run.calls.ask(Wish.SNAPSHOT)

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
