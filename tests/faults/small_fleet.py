"""Workers in an arena, with a supervisor as small as can be: marks the dead, starts replacements, orders them in.

    outcome = SmallFleet(main, 3, strikes).run()

A strike is called in its worker, at every call of the run that it makes with the others: `strike(slot, number)`, where
number counts the calls; it may kill its process. Replacements are not struck unless they are asked to be.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Strike = Callable[[int, int], None]


@dataclass
class Outcome:
    """How a fleet ended.

    Attributes:
        results: what `Session.finish` and main gave, of every worker that came to the end, by slot.
        told: (slot, kind, info) of all that workers told, in the order of its arrival.
        statuses: wait statuses, in the order of the exits: (slot, status).
    """

    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    told: list[tuple[int, str, Any]] = field(default_factory=list)
    statuses: list[tuple[int, int]] = field(default_factory=list)

    def kinds(self, kind: str) -> list[Any]:
        """Return what was told under `kind`."""
        return [info for _, told, info in self.told if told == kind]


class Orders:
    """As `launching.orders`, but for this fleet."""

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")

    def order(self, slots: list[int]) -> None:
        for at, slot in enumerate(slots):
            self._words[2 + at] = slot
        self._words[1] = len(slots)
        self._words[0] = 8 if slots else 0

    def pending(self) -> int:
        return self._words[0]

    def reached(self) -> None:
        pass

    def joiners(self) -> list[int]:
        return [self._words[2 + at] for at in range(self._words[1])]


class Teller:
    """A worker's reporter: lines of JSON."""

    def __init__(self, connection: socket.socket):
        self._file = connection.makefile("w")

    def tell(self, kind: str, info: Any = None) -> None:
        self._file.write(json.dumps([kind, info]) + "\n")
        self._file.flush()

    def progress(self, frame: dict[str, Any]) -> None:
        self.tell("progress", frame["step"])

    def note(self, text: str) -> None:
        self.tell("note", text)

    def trace(self, frame: dict[str, Any]) -> None:
        pass

    def caught_up(self) -> None:
        self.tell("caught_up")

    def recorded(self, num_calls: int) -> None:
        pass

    def take_over(self, num_calls: int) -> None:
        self.tell("take_over", num_calls)

    def ready(self) -> None:
        self.tell("ready")

    def mended(self, info: dict[str, Any]) -> None:
        self.tell("mended", info)

    def joined(self, info: dict[str, Any]) -> None:
        self.tell("joined", info)


class SmallFleet:
    """One run."""

    def __init__(
        self,
        main: Callable[[Any], Any],
        num_workers: int,
        strike: Strike | None = None,
        *,
        replicas: int = 4,
        refills: bool = True,
        strike_joiner: Strike | None = None,
    ):
        from samestep.core.arena import Handles
        from samestep.core.snapshot import Snapshots
        from samestep.launching.zygote import WARM

        # Else each worker spends seconds on it.
        for name in WARM:
            importlib.import_module(name)
        self._main = main
        self._replicas = replicas
        self._strike, self._strike_joiner = strike, strike_joiner
        self._refills = refills
        self._num_workers = num_workers
        self._handles = Handles.create(num_workers)
        self._snapshots = Snapshots()
        self._orders = Orders()
        self._selector = selectors.DefaultSelector()
        self._alive: dict[int, tuple[int, int]] = {}
        self._buffers: dict[int, bytes] = {}
        self._ready: set[int] = set()
        self._members = set(range(num_workers))
        self._outcome = Outcome()

    def run(self, seconds: float = 120.0) -> Outcome:
        """Run to the end of all workers; kills them when it takes longer, and fails."""
        deadline = time.monotonic() + seconds
        try:
            for slot in range(self._num_workers):
                self._fork(slot, joins=False)
            while self._alive:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"still alive: {sorted(self._alive)}; told: {self._outcome.told[-8:]}")
                for key, _ in self._selector.select(0.2):
                    key.data()
        finally:
            for pid, _ in self._alive.values():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            self._selector.close()
            self._handles.close()
            self._snapshots.close()
        return self._outcome

    def _fork(self, slot: int, joins: bool) -> None:
        near, far = socket.socketpair()
        pid = os.fork()
        if not pid:
            code = 1
            try:
                near.close()
                self._live(slot, joins, Teller(far))
                code = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code)
        far.close()
        pidfd = os.pidfd_open(pid)
        self._alive[slot] = pid, pidfd
        self._buffers[slot] = b""
        near.setblocking(False)
        self._selector.register(near, selectors.EVENT_READ, lambda: self._hear(slot, near))
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._ended(slot, near, joins))

    def _live(self, slot: int, joins: bool, teller: Teller) -> None:
        import torch

        from samestep.core.arena import Arena
        from samestep.core.randomness import seed_start
        from samestep.core.worker import Worker
        from samestep.loop.recipe import Keeping, Recipe
        from samestep.loop.run import Run
        from samestep.loop.session import Session
        from samestep.loop.supervision import Supervision

        torch.set_num_threads(1)
        rank, size = (0, 1) if joins else (slot, self._num_workers)

        def give_up() -> None:
            teller.tell("lost")
            os._exit(9)

        group = Arena(Worker(rank=rank, size=size, local_rank=slot), self._handles, give_up, joins=joins)
        supervision = Supervision(reporter=teller, snapshots=self._snapshots, orders=self._orders, joins=joins)
        session = Session(Recipe(replicas=self._replicas), Keeping(), group, supervision)
        strike = self._strike_joiner if joins else self._strike
        if strike is not None:
            _strike_at_calls(session, slot, strike)
        seed_start(0)
        result = self._main(Run(session))
        facts = session.finish(result)
        told = ("weights_digest", "optimizer_digest", "samples_digest", "samples_exactly_once", "steps", "workers")
        teller.tell("end", {"result": result, **{name: facts[name] for name in told}})

    def _hear(self, slot: int, near: socket.socket) -> None:
        if near.fileno() < 0:
            return
        try:
            while data := near.recv(1 << 16):
                self._buffers[slot] += data
        except BlockingIOError:
            pass
        *lines, self._buffers[slot] = self._buffers[slot].split(b"\n")
        for line in lines:
            kind, info = json.loads(line)
            self._outcome.told.append((slot, kind, info))
            if kind == "end":
                self._outcome.results[slot] = info
            elif kind == "ready":
                self._ready.add(slot)
                self._orders.order(sorted(self._ready))
            elif kind == "mended" and self._refills:
                for dead in info["dead"]:
                    if dead not in self._alive:
                        self._fork(dead, joins=True)
            elif kind == "joined":
                self._ready -= set(info["members"])
                self._members = set(info["members"])
                self._orders.order(sorted(self._ready))

    def _ended(self, slot: int, near: socket.socket, joined: bool) -> None:
        pid, pidfd = self._alive[slot]
        _, status = os.waitpid(pid, 0)
        self._hear(slot, near)
        self._selector.unregister(near)
        self._selector.unregister(pidfd)
        near.close()
        os.close(pidfd)
        del self._alive[slot]
        self._ready.discard(slot)
        self._orders.order(sorted(self._ready))
        self._outcome.statuses.append((slot, status))
        if status:
            self._handles.mark_dead(slot)
        self._members.discard(slot)
        if not self._members:
            # The run is over; who has not come in yet will not.
            for its_pid, _ in self._alive.values():
                os.kill(its_pid, signal.SIGKILL)


def _strike_at_calls(session: Any, slot: int, strike: Strike) -> None:
    """Call `strike` before every exchange of this worker."""
    group, number = session.group, [0]
    exchange = group.exchange

    def struck(message: bytes) -> list[bytes]:
        number[0] += 1
        strike(slot, number[0])
        return exchange(message)

    group.exchange = struck


def kill_at(*when: tuple[int, int]) -> Strike:
    """Return a strike that kills (slot, number of the exchange)."""

    def strike(slot: int, number: int) -> None:
        if (slot, number) in when:
            os.kill(os.getpid(), signal.SIGKILL)

    return strike
