"""The zygote after forking: watches its children until all have ended, and ends them together when one fails.

frames of a worker   seated, imports, progress, note, trace, finished, wants, halted, left, exit, error, done;
                     of survivors, and who joins them: mended, lost, ready, joined
a worker's end       told by its pidfd, so no pid is ever mistaken for another
one failure          SIGTERM to the rest, SIGKILL half a second later
a signal             the first lets the workers finish their step, the second ends them at once

What is to be done about all this is decided in `coordinator`; here it is heard of, and carried out.
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

from samestep.errors import SettingsError
from samestep.guarding.crash import Crash
from samestep.guarding.fence import Fence
from samestep.guarding.stack import StackFile
from samestep.launching import instructions as do
from samestep.launching import zygote
from samestep.launching.channel import Frame, channel
from samestep.launching.context import WorkerContext
from samestep.launching.control import Control
from samestep.launching.coordinator import Coordinator, Setup
from samestep.launching.events import Enough, Event, Exited, Facts, Heard, Hung, Signalled, Tick
from samestep.launching.failure import SETTINGS_CODE
from samestep.launching.imports import Imports
from samestep.launching.injector import Injector
from samestep.launching.leftovers import end_orphans
from samestep.launching.orders import Orders
from samestep.launching.output import Outlet, Plumbing, WorkerOutput, keep
from samestep.launching.restarts import Restarts
from samestep.launching.signals import signals_into
from samestep.launching.verdict import Outcome
from samestep.launching.writer import Writer

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
            whether that worker, which has died, wrote to read-only memory (None: it may have), and, where survivors go
            on, `mark_dead(rank)`: tells the others that it will never come.
        plumbing: what happens to the first worker's output.
        run_folder: where the others' output goes; None keeps it only after a failure.
        snapshots: where the newest state is kept; with it, a fleet that loses a worker is started again.
        num_oom_kills: tells how often the kernel has killed a process for want of memory.
        injector: what strikes the workers on purpose (`samestep chaos`).
        orders: what workers are told while they run; with it, and `snapshots`, a signal lets them finish their step.
        control: where the user's commands come in.
        survivors_go_on: workers can go on without one that has died, and take in another in its place.
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
    survivors_go_on: bool = False
    writer: Writer | None = None

    @property
    def num_calls(self) -> int:
        """Calls that the run has recorded and kept."""
        return self.snapshots.num_calls if self.snapshots is not None else 0

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
            end = _Supervisor(fleet, num_workers, watcher, restarts, fence, imports).run(received, wake)
            if isinstance(end, do.End):
                if fleet.writer is not None:
                    fleet.writer.finish(received, wake, functools.partial(_note, watcher))
                return end.outcome
            num_workers = end.num_workers
            if fleet.control is not None and end.outcome.wants is not None and fleet.control.scaled():
                fleet = fleet.scaled(num_workers)
                watcher.frame(Frame("scaled", {"num_workers": num_workers}))


class _Member:
    """One worker, seen from outside."""

    def __init__(self, rank: int, generation: int, output: WorkerOutput):
        self.rank = rank
        self.generation = generation
        self.output = output
        self.stack = StackFile(rank)
        self.sender, self.receiver = channel()
        self.pid = 0
        self.pidfd = -1
        self.is_alive = False

    def send_signal(self, number: int) -> None:
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def close(self) -> None:
        """Give back its descriptors, but for its output's: the next worker in its place goes on with those."""
        self.sender.close()
        self.receiver.close()
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
        self._outlet = Outlet(fleet.plumbing)
        self._shared: Any = None
        self._selector = selectors.DefaultSelector()
        setup = Setup(
            num_workers=num_workers,
            has_snapshots=fleet.snapshots is not None,
            has_orders=fleet.orders is not None,
            survivors_go_on=fleet.survivors_go_on and num_workers > 1,
            run_folder=fleet.run_folder,
            num_calls=fleet.num_calls,
        )
        self._coordinator = Coordinator(setup, restarts)
        self._signals: list[int] = []
        self._num_oom_kills = fleet.num_oom_kills()
        self._run_folder = fleet.run_folder
        self._deadline: float | None = None
        self._end: do.End | do.StartAgain | None = None

    def run(self, signals: list[int], wake: socket.socket) -> do.End | do.StartAgain:
        """Fork, watch, and return how it ended when every process is gone and every descriptor closed.

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
            for stream, pipe in self._outlet.pipes.items():
                self._on_readable(pipe, self._print, stream)
            if self._fleet.writer is not None:
                self._fleet.writer.begin()
                self._on_readable(self._fleet.writer, self._fleet.writer.serve)
            try:
                zygote.check_one_task()
                zygote.freeze()
                self._fence.begin(self._num_workers)
                if self._fleet.orders is not None:
                    self._fleet.orders.begin()
                for instruction in self._coordinator.begin():
                    self._obey(instruction)
                end = self._watch()
            finally:
                self._end_all()
            if end.outcome.restarts:
                return end
            outputs = [member.output for member in self._members]
            return replace(end, outcome=_with_output(end.outcome, outputs, end.outcome.run_folder))
        finally:
            for member in self._members:
                member.close()
                member.output.close()
            self._outlet.close()
            self._selector.close()
            if shared is not None:
                shared.close()

    def _watch(self) -> do.End | do.StartAgain:
        while self._end is None:
            self._inject()
            has_died = self._restarts.count > 0 or self._coordinator.has_died
            trial = self._imports.due(time.monotonic(), has_died)
            if trial is not None:
                self._on_readable(trial, self._tried, trial)
            timeout = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            if self._signals:
                # They came when the fleet before had just ended.
                timeout = 0.0
            if self._fleet.injector is not None:
                timeout = _POLL if timeout is None else min(timeout, _POLL)
            for event, _ in self._selector.select(self._fence.timeout(timeout)):
                event.data()
            while self._signals and self._end is None:
                self._tell(Signalled(self._signals.pop(0)))
            self._tell(Tick())
            if self._fleet.writer is not None:
                self._fleet.writer.look(time.monotonic())
            if not self._coordinator.ending.has_begun:
                hung = self._fence.look(time.monotonic(), self._members, self._run_folder)
                if hung is not None:
                    rank, message = hung
                    self._tell(Hung(rank, self._members[rank].generation, message))
        return self._end

    def _tell(self, event: Event) -> None:
        """Tell the coordinator what happened, and do what it wants."""
        orders, control = self._fleet.orders, self._fleet.control
        facts = Facts(
            now=time.monotonic(),
            num_calls=self._fleet.num_calls,
            orders=orders.pending() if orders is not None else 0,
            is_reached=orders is not None and orders.is_reached,
            target=control.target if control is not None else None,
        )
        for instruction in self._coordinator.take(event, facts):
            self._obey(instruction)

    def _obey(self, instruction: do.Instruction) -> None:
        orders = self._fleet.orders
        match instruction:
            case do.Fork(slot, generation, True):
                self._replace(slot, generation)
            case do.Fork(slot, generation):
                member = _Member(slot, generation, WorkerOutput(slot))
                self._members.append(member)
                self._fork(member, joins=False)
            case do.Terminate(slot):
                self._members[slot].send_signal(signal.SIGTERM)
            case do.Kill(slot):
                self._members[slot].send_signal(signal.SIGKILL)
            case do.MarkDead(slot):
                self._shared.mark_dead(slot)
            case do.GiveOrder(wish) if orders is not None:
                orders.give(wish)
            case do.Join(slots) if orders is not None:
                orders.joining(slots)
            case do.LetEnd() if orders is not None:
                orders.end()
            case do.Show(frame):
                self._show(frame)
            case do.Note(text):
                self._watcher.frame(Frame("note", {"text": text}))
            case do.Learn(names):
                self._imports.hear(names, time.monotonic())
            case do.Watch(call, hang_after):
                self._fence.seated(call, hang_after)
            case do.SetDeadline(at):
                self._deadline = at
            case do.End() | do.StartAgain():
                self._end = instruction

    def _replace(self, slot: int, generation: int) -> None:
        """Fork a worker in the place of one that has died. One that cannot be forked has died at once."""
        before = self._members[slot]
        try:
            zygote.check_one_task()
            zygote.freeze()
            member = _Member(slot, generation, before.output)
            before.close()
            self._members[slot] = member
            member.output.again()
            self._fork(member, joins=True)
        except (OSError, SettingsError):
            self._tell(Exited(slot, generation, 0, 1 << 8))

    def _fork(self, member: _Member, joins: bool) -> None:
        context = WorkerContext(
            rank=member.rank,
            num_forked=self._num_workers,
            generation=member.generation,
            joins=joins,
            sender=member.sender,
            output=member.output,
            shared=self._shared,
            pulse=self._fence.pulses.of(member.rank),
            **self._fleet.context,
        )
        member.pid = zygote.fork_worker(context, self._fleet.body, functools.partial(self._become, member, joins))
        member.pidfd = os.pidfd_open(member.pid)
        member.is_alive = True
        member.sender.close()
        self._on_readable(member.pidfd, self._ended, member)
        self._on_readable(member.receiver, self._hear, member)

    def _become(self, me: _Member, joins: bool) -> None:
        """In the forked worker: keep my ends, close what belongs to the supervisor and to the others."""
        me.output.enter(self._outlet, is_first=me.rank == 0 and not joins)
        self._outlet.close()
        me.stack.enter()
        self._selector.close()
        if self._fleet.control is not None:
            self._fleet.control.abandon()
        if self._fleet.writer is not None:
            self._fleet.writer.abandon()
        for member in self._members:
            if member is me:
                member.receiver.close()
            else:
                member.output.close()
                member.close()

    def _on_readable(self, source: Any, act: Callable[..., None], *arguments: Any) -> None:
        self._selector.register(source, selectors.EVENT_READ, lambda: act(*arguments))

    def _inject(self) -> None:
        injector = self._fleet.injector
        if injector is None or self._coordinator.ending.has_begun:
            return
        recovered = injector.poll(time.monotonic(), self._members)
        if recovered is not None:
            number, ranks = len(injector.strikes), ", ".join(map(str, recovered.ranks))
            text = f"Fault {number} of {len(injector.faults)}: {recovered.fault.kind} (worker {ranks}), recovered after"
            seconds = f"{recovered.recovered_after:.2f} s."
            self._watcher.frame(Frame("note", {"text": f"{text} {seconds}"}))

    def _hear(self, member: _Member) -> None:
        if member is not self._members[member.rank]:
            return
        for frame in member.receiver.frames():
            self._tell(Heard(member.rank, member.generation, frame))
        if member.receiver.at_end:
            _forget(self._selector, member.receiver)

    def _show(self, frame: Frame) -> None:
        if frame.kind == "seated":
            self._run_folder = frame.info.get("run_folder") or self._run_folder
        if self._fleet.control is not None:
            self._fleet.control.hear(frame)
        if self._watcher.frame(frame):
            self._tell(Enough())

    def _tried(self, trial: int) -> None:
        _forget(self._selector, trial)
        self._imports.tried()

    def _print(self, stream: int) -> None:
        data = self._outlet.read(stream)
        if data:
            self._watcher.output(stream, data)

    def _ended(self, member: _Member) -> None:
        _forget(self._selector, member.pidfd)
        _, status = os.waitpid(member.pid, 0)
        member.is_alive = False
        if self._fleet.injector is not None:
            self._fleet.injector.ended(time.monotonic())
        # What anybody said before it died is told before its death (see `coordinator`).
        for other in list(self._members):
            if other is member or other.is_alive:
                self._hear(other)
        _forget(self._selector, member.receiver)
        for stream in self._outlet.pipes:
            self._print(stream)
        crash = None
        if not self._coordinator.ending.has_begun:
            wrote = self._shared.wrote_protected(member.rank) if self._shared is not None else False
            num_oom_kills = self._fleet.num_oom_kills()
            by_kernel, self._num_oom_kills = num_oom_kills > self._num_oom_kills, num_oom_kills
            crash = Crash(dump=member.output.stack(), wrote_protected=wrote, by_kernel=by_kernel)
            self._fence.renew(member.rank)
        if self._fleet.writer is not None:
            self._fleet.writer.begin(member.rank)
        self._tell(Exited(member.rank, member.generation, member.pid, status, crash))

    def _end_all(self) -> None:
        """Leave no process: workers first, then what they left behind."""
        for member in self._members:
            if member.is_alive:
                member.send_signal(signal.SIGKILL)
                os.waitpid(member.pid, 0)
                member.is_alive = False
        self._imports.close()
        writer, ending = self._fleet.writer, self._coordinator.ending
        if writer is not None and ending.is_hurried:
            writer.kill()
        patience = 0.2 if ending.is_hurried else 1.0
        end_orphans(gently=not ending.has_begun, patience=patience, spared=writer.pid if writer is not None else 0)


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
