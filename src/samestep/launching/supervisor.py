"""The zygote after forking: watches its children until all have ended, and ends them together when one fails.

frames of a worker   seated, imports, progress, note, trace, finished, wants, halted, left, exit, error, done
a worker's end       told by its pidfd, so no pid is ever mistaken for another
one failure          SIGTERM to the rest, SIGKILL half a second later
a signal             the first lets the workers finish their step, the second ends them at once
"""

from __future__ import annotations

import contextlib
import functools
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from samestep.core.worker import Wish
from samestep.guarding.crash import Crash
from samestep.guarding.fence import Fence
from samestep.guarding.stack import StackFile
from samestep.launching import zygote
from samestep.launching.channel import Frame, channel
from samestep.launching.context import WorkerContext
from samestep.launching.control import Control
from samestep.launching.failure import SETTINGS_CODE, Failure
from samestep.launching.imports import Imports
from samestep.launching.injector import Injector
from samestep.launching.leftovers import end_orphans
from samestep.launching.orders import Orders
from samestep.launching.output import Plumbing, WorkerOutput, keep
from samestep.launching.restarts import IN_VAIN, Restarts
from samestep.launching.signals import signals_into
from samestep.launching.verdict import Action, Outcome, Verdict
from samestep.launching.writer import Writer

_PATIENCE = 0.5
"""Seconds between SIGTERM and SIGKILL."""
_GRACE = 2.0
"""Seconds that the others get to do what one worker did: leave with `sys.exit`, or tell why a peer is gone."""
_STEP = 3.0
"""Seconds that workers have to come to the end of their step when the run is to end."""
_POLL = 0.002
"""Seconds between looks at whether a fault is due."""


class Watcher(Protocol):
    """Who is told what the workers say."""

    def frame(self, frame: Frame) -> bool:
        """Take a frame (seated, progress, note, trace, finished). True ends the run here, without an error."""

    def output(self, stream: int, data: bytes) -> None:
        """Take what the first worker printed, where it is read through a pipe (1 stdout, 2 stderr)."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What to start.

    Attributes:
        body: what each worker does.
        context: facts for each worker's context, beside rank, number, sender and what is shared.
        share: makes what the workers share, given their number; the result has `close()`, and `wrote_protected(rank)`:
            whether that worker, which has died, wrote to read-only memory (None: it may have).
        plumbing: what happens to the first worker's output.
        run_folder: where the others' output goes; None keeps it only after a failure.
        snapshots: where the newest state is kept; with it, a fleet that loses a worker is started again.
        num_oom_kills: tells how often the kernel has killed a process for want of memory.
        injector: what strikes the workers on purpose (`samestep chaos`).
        orders: what workers are told while they run; with it, and `snapshots`, a signal lets them finish their step.
        control: where the user's commands come in.
        writer: writes checkpoints beside training.
    """

    body: zygote.Body
    context: dict[str, Any] = field(default_factory=dict)
    share: Callable[[int], Any] | None = None
    plumbing: Plumbing = field(default_factory=Plumbing)
    run_folder: str | None = None
    snapshots: Snapshots | None = None
    injector: Injector | None = None
    num_oom_kills: Callable[[], int] = int
    orders: Orders | None = None
    control: Control | None = None
    writer: Writer | None = None

    @property
    def can_finish(self) -> bool:
        """Whether there is anything to keep at the end of a step: not before the run has recorded a call."""
        return self.orders is not None and self.snapshots is not None and self.snapshots.num_calls > 0

    def scaled(self, num_workers: int) -> Fleet:
        """Return the fleet with another number of workers, whatever the script says."""
        options = {**self.context.get("options", {}), "workers": num_workers}
        return replace(self, context={**self.context, "options": options})


class Snapshots(Protocol):
    """Where a run keeps its newest state outside of the workers."""

    @property
    def num_calls(self) -> int:
        """Calls that the run has recorded."""


def supervise(fleet: Fleet, num_workers: int, watcher: Watcher) -> Outcome:
    """Start a fleet and return when its last process is gone.

    A script may want more workers than were started before it ran; then it is started again with that many. A fleet
    that lost a worker is started again from the newest state, unless it is in vain; one that was ordered to scale, with
    the number that was ordered.

    Raises:
        SettingsError: this process must not fork.
    """
    zygote.adopt_orphans()
    restarts, fence, imports = Restarts(), Fence(), Imports()
    received: list[int] = []
    with signals_into(received) as wake:
        while True:
            outcome = _Supervisor(fleet, num_workers, watcher, restarts, fence, imports).run(received, wake)
            if outcome.wants is None and not outcome.restarts:
                if fleet.writer is not None:
                    fleet.writer.finish(received, wake, functools.partial(_note, watcher))
                return outcome
            num_workers = outcome.wants or num_workers
            if fleet.control is not None and outcome.wants is not None and fleet.control.scaled():
                fleet = fleet.scaled(num_workers)
                watcher.frame(Frame("scaled", {"num_workers": num_workers}))


class _Member:
    """One worker, seen from outside."""

    def __init__(self, rank: int, plumbing: Plumbing):
        self.rank = rank
        self.output = WorkerOutput(rank, plumbing)
        self.stack = StackFile(rank)
        self.sender, self.receiver = channel()
        self.pid = 0
        self.pidfd = -1
        self.is_alive = False
        self.told_end = False

    def send_signal(self, number: int) -> None:
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        self.output.close()
        self.stack.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)


class _Supervisor:
    """One fleet, from fork to the last exit."""

    def __init__(
        self, fleet: Fleet, num_workers: int, watcher: Watcher, restarts: Restarts, fence: Fence, imports: Imports
    ):
        self._fleet = fleet
        self._watcher = watcher
        self._restarts = restarts
        self._fence = fence
        self._imports = imports
        self._num_workers = num_workers
        self._members: list[_Member] = []
        self._shared: Any = None
        self._selector = selectors.DefaultSelector()
        self._verdict = Verdict(num_workers)
        self._signals: list[int] = []
        self._num_oom_kills = fleet.num_oom_kills()
        self._run_folder = fleet.run_folder
        self._is_ending = False
        self._keeps_state = True
        self._deadline: float | None = None

    def run(self, signals: list[int], wake: socket.socket) -> Outcome:
        """Fork, watch, and give the outcome when every process is gone and every descriptor closed.

        Args:
            signals: those that have come, and will come.
            wake: becomes readable when one comes.
        """
        shared = self._fleet.share(self._num_workers) if self._fleet.share and self._num_workers > 1 else None
        self._shared = shared
        self._signals = signals
        try:
            self._selector.register(wake, selectors.EVENT_READ, lambda: wake.recv(64))
            if self._fleet.control is not None:
                self._on_readable(self._fleet.control, self._fleet.control.serve, self._signals)
            if self._fleet.writer is not None:
                self._fleet.writer.begin()
                self._on_readable(self._fleet.writer, self._fleet.writer.serve)
            try:
                self._start(shared)
                self._watch()
            finally:
                self._end_all()
            outcome = replace(self._verdict.outcome(), run_folder=self._run_folder)
            if self._starts_again(outcome):
                return replace(outcome, restarts=True)
            if self._restarts.came_again:
                text = "samestep: it came again after a new start, at the same place."
                outcome = replace(outcome, message=f"{outcome.message}\n{text}")
            elif self._restarts.in_vain:
                text = f"samestep: the last {IN_VAIN} times the run came no further than before, so it has ended."
                outcome = replace(outcome, message=f"{outcome.message}\n{text}")
            return _with_output(outcome, [member.output for member in self._members], self._run_folder)
        finally:
            for member in self._members:
                member.close()
            self._selector.close()
            if shared is not None:
                shared.close()

    def _starts_again(self, outcome: Outcome) -> bool:
        snapshots = self._fleet.snapshots
        if snapshots is None or not self._keeps_state or outcome.died is None:
            return False
        if not self._restarts.allow(snapshots.num_calls, outcome.error):
            return False
        text = f"{outcome.died} All workers start again from the newest state."
        self._watcher.frame(Frame("note", {"text": f"samestep: {text}"}))
        return True

    def _start(self, shared: Any) -> None:
        zygote.check_one_task()
        zygote.freeze()
        self._fence.begin(self._num_workers)
        if self._fleet.orders is not None:
            self._fleet.orders.begin()
        for rank in range(self._num_workers):
            self._members.append(_Member(rank, self._fleet.plumbing))
        for member in self._members:
            context = WorkerContext(
                rank=member.rank,
                num_forked=self._num_workers,
                sender=member.sender,
                shared=shared,
                pulse=self._fence.pulses.of(member.rank),
                **self._fleet.context,
            )
            become = functools.partial(self._become, member)
            member.pid = zygote.fork_worker(context, self._fleet.body, become)
            member.pidfd = os.pidfd_open(member.pid)
            member.is_alive = True
        for member in self._members:
            member.sender.close()
            member.output.forked()
            self._on_readable(member.pidfd, self._ended, member)
            self._on_readable(member.receiver, self._hear, member)
            for stream, pipe in member.output.pipes.items():
                self._on_readable(pipe, self._show, member, stream)

    def _on_readable(self, source: Any, act: Callable[..., None], *arguments: Any) -> None:
        self._selector.register(source, selectors.EVENT_READ, lambda: act(*arguments))

    def _become(self, me: _Member) -> None:
        """In the forked worker: keep my ends, close what belongs to the supervisor and to the others."""
        me.output.enter()
        me.stack.enter()
        self._selector.close()
        if self._fleet.control is not None:
            self._fleet.control.abandon()
        if self._fleet.writer is not None:
            self._fleet.writer.abandon()
        for member in self._members:
            member.receiver.close()
            if member is not me:
                member.sender.close()
                member.stack.close()
            member.output.close()
            if member.pidfd >= 0:
                os.close(member.pidfd)

    def _watch(self) -> None:
        while any(member.is_alive for member in self._members):
            self._inject()
            trial = self._imports.due(time.monotonic(), self._restarts.count > 0)
            if trial is not None:
                self._on_readable(trial, self._tried, trial)
            timeout = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            if self._fleet.injector is not None:
                timeout = _POLL if timeout is None else min(timeout, _POLL)
            for event, _ in self._selector.select(self._fence.timeout(timeout)):
                event.data()
            while self._signals:
                if self._is_ending:
                    self._deadline = time.monotonic()
                self._do(self._verdict.interrupted(self._signals.pop(0), self._fleet.can_finish))
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._deadline_passed()
            if self._fleet.writer is not None:
                self._fleet.writer.look(time.monotonic())
            hung = None if self._is_ending else self._fence.look(time.monotonic(), self._members, self._run_folder)
            if hung is not None:
                self._verdict.hung(*hung)
                self._members[hung[0]].send_signal(signal.SIGKILL)

    def _inject(self) -> None:
        injector = self._fleet.injector
        if injector is None or self._is_ending:
            return
        recovered = injector.poll(time.monotonic(), self._members)
        if recovered is not None:
            number, ranks = len(injector.strikes), ", ".join(map(str, recovered.ranks))
            text = f"Fault {number} of {len(injector.faults)}: {recovered.fault.kind} (worker {ranks}), recovered after"
            seconds = f"{recovered.recovered_after:.2f} s."
            self._watcher.frame(Frame("note", {"text": f"{text} {seconds}"}))

    def _hear(self, member: _Member) -> None:
        for frame in member.receiver.frames():
            self._do(self._take(member, frame))
        if member.receiver.at_end:
            _forget(self._selector, member.receiver)

    def _take(self, member: _Member, frame: Frame) -> Action:
        member.told_end |= frame.kind in ("error", "exit", "done", "left")
        if frame.kind == "error":
            return self._verdict.failed(Failure(**frame.info))
        if frame.kind == "exit":
            return self._verdict.left(member.rank, frame.info)
        if frame.kind == "wants":
            return self._verdict.wants(frame.info["num_workers"])
        if frame.kind == "imports":
            self._imports.hear(frame.info["names"], time.monotonic())
            return Action.GO_ON
        if frame.kind == "halted":
            return self._verdict.halted(self._fleet.control.target if self._fleet.control is not None else None)
        if frame.kind == "seated":
            self._run_folder = frame.info.get("run_folder") or self._run_folder
            self._keeps_state = frame.info.get("keeps_state", True)
            self._fence.seated(frame.info.get("call", 0), frame.info.get("hang_after"))
        if self._fleet.control is not None:
            self._fleet.control.hear(frame)
        if frame.kind not in ("done", "left") and self._watcher.frame(frame):
            return Action.END_NOW
        return Action.GO_ON

    def _tried(self, trial: int) -> None:
        _forget(self._selector, trial)
        self._imports.tried()

    def _show(self, member: _Member, stream: int) -> None:
        data = member.output.read(stream)
        if data:
            self._watcher.output(stream, data)
        else:
            _forget(self._selector, member.output.pipes[stream])

    def _ended(self, member: _Member) -> None:
        _forget(self._selector, member.pidfd)
        _, status = os.waitpid(member.pid, 0)
        member.is_alive = False
        if self._fleet.injector is not None:
            self._fleet.injector.ended(time.monotonic())
        self._hear(member)
        _forget(self._selector, member.receiver)
        for stream, pipe in member.output.pipes.items():
            self._show(member, stream)
            _forget(self._selector, pipe)
        if not self._is_ending:
            wrote = self._shared.wrote_protected(member.rank) if self._shared is not None else False
            by_kernel = self._fleet.num_oom_kills() > self._num_oom_kills
            crash = Crash(dump=member.output.stack(), wrote_protected=wrote, by_kernel=by_kernel)
            self._do(self._verdict.died(member.rank, member.pid, status, member.told_end, crash))
            if self._verdict.has_failed and self._fleet.can_finish and not self._verdict.is_interrupted:
                # The others start again as well: nothing of theirs is worth the wait.
                for other in self._members:
                    other.send_signal(signal.SIGKILL)

    def _do(self, action: Action) -> None:
        if action is Action.END_SOON and self._deadline is None:
            self._deadline = time.monotonic() + _GRACE
        if action is Action.FINISH and self._fleet.orders is not None and not self._is_ending:
            self._fleet.orders.give(Wish.STOP)
            self._deadline = time.monotonic() + _STEP
            text = "samestep: The run ends after this step. Once more (Ctrl-C) ends it at once."
            self._watcher.frame(Frame("note", {"text": text}))
        if action in (Action.END_NOW, Action.END_AT_ONCE) and not self._is_ending:
            self._is_ending = True
            self._deadline = time.monotonic() + _PATIENCE
            if self._fleet.orders is not None:
                self._fleet.orders.end()
            for member in self._members:
                member.send_signal(signal.SIGTERM)
        if action is Action.END_AT_ONCE:
            self._deadline = time.monotonic()

    def _deadline_passed(self) -> None:
        orders = self._fleet.orders
        if not self._is_ending and orders is not None and orders.is_reached and self._verdict.may_write:
            # A large checkpoint takes as long as it takes.
            self._deadline = None
            text = "samestep: The checkpoint is still being written. Once more (Ctrl-C) ends the run without it."
            self._watcher.frame(Frame("note", {"text": text}))
            return
        if not self._is_ending:
            self._do(self._verdict.waited())
            return
        self._deadline = None
        for member in self._members:
            member.send_signal(signal.SIGKILL)

    def _end_all(self) -> None:
        """Leave no process: workers first, then what they left behind."""
        for member in self._members:
            if member.is_alive:
                member.send_signal(signal.SIGKILL)
                os.waitpid(member.pid, 0)
                member.is_alive = False
        self._imports.close()
        writer = self._fleet.writer
        if writer is not None and self._verdict.is_hurried:
            writer.kill()
        patience = 0.2 if self._verdict.is_hurried else 1.0
        end_orphans(gently=not self._is_ending, patience=patience, spared=writer.pid if writer is not None else 0)


def _with_output(outcome: Outcome, outputs: list[WorkerOutput], run_folder: str | None) -> Outcome:
    """Keep what the other workers printed where that may help, and say where."""
    has_begun = outcome.code != SETTINGS_CODE
    if not (outcome.has_failed and has_begun) and run_folder is None:
        return outcome
    place = keep(outputs, run_folder)
    if place is None or not outcome.has_failed or not has_begun:
        return outcome
    note = f"samestep: what the other workers printed is in {place}"
    return replace(outcome, message=f"{outcome.message}\n{note}")


def _note(watcher: Watcher, text: str) -> None:
    watcher.frame(Frame("note", {"text": f"samestep: {text}"}))


def _forget(selector: selectors.BaseSelector, source: Any) -> None:
    with contextlib.suppress(KeyError, ValueError):
        selector.unregister(source)
