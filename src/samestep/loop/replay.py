"""Brings a run back: from a checkpoint, from what a dead fleet left in memory, or into a fleet that is at work.

The script is executed again from its first line. Committed calls return what the ledger recorded; where the script
comes to the point at which the state was kept, the state is loaded, and from then on everything is real.
"""

from __future__ import annotations

from typing import Any, Protocol

from samestep.core.clock import Clock
from samestep.core.group import Group
from samestep.core.snapshot import FROM_MEMORY
from samestep.errors import SettingsError
from samestep.loop.archive import Archive
from samestep.loop.crew import Crew
from samestep.loop.keeper import Keeper
from samestep.loop.mismatch import Conditions
from samestep.loop.newcomer import Newcomer
from samestep.loop.recipe import Keeping
from samestep.loop.record import Record
from samestep.loop.supervision import Supervision
from samestep.storage import checkpoint
from samestep.storage.ledger import Ledger


class Replayed(Protocol):
    """The run that is brought back (`Session`)."""

    keeping: Keeping
    group: Group
    clock: Clock
    ledger: Ledger
    record: Record
    conditions: Conditions
    crew: Crew

    @property
    def archive(self) -> Archive:
        """Saves and restores the model."""

    def of_first(self, kind: str, make: Any) -> Any:
        """Return on every worker what `make` gives on the first."""


class Replay:
    """One worker's way back.

    Attributes:
        newcomer: brings this worker into a run that is under way; None once, or where, it is a member.
    """

    def __init__(self, run: Replayed, keeper: Keeper, supervision: Supervision):
        """Bring `run` back, where there is anything to bring back; `keeper` goes on from there."""
        self._run = run
        self._keeper = keeper
        self._snapshots = snapshots = supervision.snapshots
        self._reporter = supervision.reporter
        self._saved: checkpoint.Checkpoint | None = None
        # Calls that an earlier fleet has made and reported; until then this one is silent.
        self._num_known = snapshots.num_calls if snapshots is not None else 0
        self.newcomer: Newcomer | None = None
        if supervision.joins:
            assert snapshots is not None
            self.newcomer = Newcomer(run, snapshots, supervision.reporter)

    @property
    def saved(self) -> checkpoint.Checkpoint | None:
        """What the run goes on from, until the script has come to the point where it was made."""
        return self._saved

    @property
    def silent(self) -> bool:
        """Whether what happens now was reported before: in a replay, and until a dead fleet's steps are made again."""
        return self._saved is not None or len(self._run.ledger) < self._num_known

    def begin(self) -> None:
        """Begin to replay what an earlier fleet left in memory, or the checkpoint that was asked for, if any.

        Raises:
            CheckpointError: there is no good one. MismatchError: see `Conditions.resume`.
        """
        if self.newcomer is not None:
            self._begin_replay(self.newcomer.first())
            return
        if self._num_known and self._begin_after_death():
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
        # A writer of a fleet that has died may publish it between the looks of two workers.
        is_written = bool(self._run.group.exchange(b"1" if is_written else b"")[0])
        self._keeper.go_on(done if is_written else -1)
        if self._num_known and len(self._run.ledger) >= self._num_known:
            self._run.record.caught_up()
        return True

    def _come_in(self, newcomer: Newcomer) -> bool:
        """Go on in what the members have done since, or meet them; return whether."""
        self._saved = saved = newcomer.further()
        if self._run.ledger.replaying:
            return False
        # Before the members go on: they will write to that memory again.
        self._run.archive.take_over(saved)
        self._run.clock.add(saved.facts["elapsed"])
        self._keeper.go_on(newcomer.come_in(), is_kept=True)
        self._saved = self.newcomer = None
        self._run.record.caught_up()
        return True

    def _begin_after_death(self) -> bool:
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
