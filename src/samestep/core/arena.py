"""The arena: workers of one host reach each other through shared memory.

The launcher makes `Handles` before it forks the workers: one anonymous memory for control, one for data, and one
eventfd per worker. Nothing has a name, so nothing can be left behind, and no container limit on named shared memory
applies. Each worker opens them as an `Arena`.

Control block, one line of 64 bytes per worker, int64 words:

    [0] arrived    number of exchanges this worker has entered; written by it alone, only ever rises
    [1] [2]        length of its message in an even / odd exchange
    [3] asleep     1 while it blocks on its eventfd
    [4] [5]        what it keeps read-only, and whether it crashed by writing there (`pages`)
    [6] deaths     exits in this slot that the supervisor has seen; written by it alone

and one line before them: [0] the word that `Handles.abort` sets: a worker is gone.

[Note: two message buffers]
A worker may enter exchange k+1 while another still reads the messages of exchange k, so messages of odd and even
exchanges have their own buffers. It cannot enter k+2 before the other has entered k+1, which it does after reading.

[Note: workers that die]
The supervisor marks a worker dead after its process is gone, so its line does not change any more. An exchange that it
has entered is complete without it: its message lies there. The first one that it has not entered cannot be completed,
so every survivor finds the same one, and raises `WorkerLost` once all survivors are there (outside of `mendable()` it
gives up). `reform` then agrees on who is left, and on the deaths that this answers; only further ones count from then
on. While it is under way others may die, and be seen by some survivors only; so each tells whom it counts in, and all
try again, one exchange later, until all tell the same.

[Note: order of stores]
A worker writes its message, then its `arrived`. x86 makes stores visible in program order. Where the CPU does not
promise this, both sides pass through a system call on the eventfd, which orders them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import platform
import select
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch

from samestep.core.deaths import Deaths
from samestep.core.group import SharedMemoryGroup, WorkerLost, align, aligned_zeros
from samestep.core.pages import WROTE, Pages
from samestep.core.regions import Regions
from samestep.core.worker import Worker
from samestep.errors import PeerError, SettingsError

_LINE = 64
_WORDS = _LINE // 8
_PAGES = 4
_DEATHS = 6
_MESSAGE_BYTES = 1 << 16
_SPIN_SECONDS = 50e-6
_YIELD_SECONDS = 1e-3
_BLOCK_SECONDS = 0.05
_ORDERED_STORES = platform.machine() in ("x86_64", "AMD64", "i686")


class Handles:
    """What workers of one host inherit: descriptors of the control block and the data, and their wake-up events."""

    def __init__(self, control: int, data: int, events: tuple[int, ...]):
        self.control = control
        self.data = data
        self.events = events

    @classmethod
    def create(cls, num_workers: int) -> Handles:
        """Make the shared memory for `num_workers` workers. Call it before forking them.

        Raises:
            SettingsError: the system has no anonymous shared memory.
        """
        if not hasattr(os, "memfd_create") or not hasattr(os, "eventfd"):
            raise SettingsError(
                f"You asked for {num_workers} workers on {platform.system()}, where workers cannot share memory yet. "
                f"Use --workers 1, or start the script with torchrun."
            )
        control = os.memfd_create("samestep-control", os.MFD_CLOEXEC)
        data = os.memfd_create("samestep-data", os.MFD_CLOEXEC)
        os.ftruncate(control, _control_bytes(num_workers))
        events = tuple(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(num_workers))
        return cls(control, data, events)

    def abort(self) -> None:
        """Tell every worker that waits, or will wait, that one of them is gone."""
        with mmap.mmap(self.control, _LINE) as memory:
            memory[:8] = (1).to_bytes(8, "little")
        for event in self.events:
            os.eventfd_write(event, 1)

    def mark_dead(self, slot: int) -> None:
        """Tell the others that worker `slot` is gone. Call it after its exit was awaited."""
        start = _LINE * (1 + slot) + 8 * _DEATHS
        with mmap.mmap(self.control, _control_bytes(len(self.events))) as memory:
            deaths = int.from_bytes(memory[start : start + 8], "little") + 1
            memory[start : start + 8] = deaths.to_bytes(8, "little")
        for event in self.events:
            os.eventfd_write(event, 1)

    def wrote_protected(self, rank: int) -> bool | None:
        """Return whether worker `rank`, which crashed, had written to memory that was read-only; None: it may have."""
        start = _LINE * (1 + rank) + 8 * _PAGES
        with mmap.mmap(self.control, _control_bytes(len(self.events)), prot=mmap.PROT_READ) as memory:
            closed, fault = (int.from_bytes(memory[at : at + 8], "little") for at in (start, start + 8))
        if fault or not closed:
            return fault == WROTE
        return None

    def close(self) -> None:
        """Close this process's descriptors. The memory goes with the last process that holds it."""
        for descriptor in (self.control, self.data, *self.events):
            os.close(descriptor)


class Arena(SharedMemoryGroup):
    """One worker's view of the shared memory of its host.

    Attributes:
        slot: this worker's line in the control block; it stays when ranks change.
        members: slots of the workers that take part, in rank order.
        count: exchanges entered so far.
        deaths: of workers of this host.
    """

    loses_workers = True

    def __init__(
        self, worker: Worker, handles: Handles, give_up: Callable[[], NoReturn] | None = None, joins: bool = False
    ):
        """Open the arena.

        Args:
            worker: this worker. Its `size` may be smaller than the number of workers the handles were made for.
            handles: as inherited from the launcher.
            give_up: ends this process where another is lost and nobody is prepared; None raises a `PeerError`.
            joins: the others are under way already: alone, with memory of its own, until `join`.
        """
        self._handles = handles
        self._device = worker.device
        self._give_up = give_up
        self._num_mendable = 0
        self._joining: set[int] = set()
        self.slot = worker.local_rank if joins else worker.rank
        self._block = mmap.mmap(handles.control, _control_bytes(len(handles.events)))
        self._words = memoryview(self._block).cast("q")
        self._messages = memoryview(self._block)[_messages_start(len(handles.events)) :]
        self._mine = _WORDS * (1 + self.slot)
        self._is_outside = joins
        self._is_whole = not joins
        self._seat([self.slot] if joins else list(range(worker.size)))
        self.count = self._words[self._mine]
        self.deaths = Deaths(self._words, _WORDS + _DEATHS, _WORDS, len(handles.events))
        self._regions = Regions(handles.data)
        self._pages = Pages(self._words, self._mine + _PAGES)
        self._poll = select.poll()
        self._poll.register(handles.events[self.slot], select.POLLIN)
        self.exclusive = _Lock(handles.control)

    @contextlib.contextmanager
    def mendable(self) -> Iterator[None]:
        self._num_mendable += 1
        try:
            yield
        finally:
            self._num_mendable -= 1

    def reform(self, value: Any, joining: Sequence[int] = ()) -> list[Any]:
        """Agree on who takes part from now on, after a death or when others join. Collective.

        Args:
            value: JSON values for the others.
            joining: slots that come in, behind the others; they call `join` at the same time.

        Returns:
            The values of all members, in rank order.
        """
        before = self.members
        while True:
            self._joining = set(joining)
            deaths, answered = self.deaths.counts(), self.deaths.answered
            self._seat([slot for slot in (*before, *joining) if deaths[slot] == answered[slot]])
            memory = [self._regions.to_facts(), self._is_whole, deaths]
            told: list[Any] = []
            # Who was left out while it joined may read what is meant for others.
            with contextlib.suppress(WorkerLost, *([] if self.slot in before else [ValueError])), self.mendable():
                told = list(map(json.loads, self.exchange(json.dumps([self.members, memory, value]).encode())))
            if told and all(members == self.members for members, _, _ in told):
                break
            # Who joins cannot know what the others do now, so it is left out, and comes again another time.
            if self.slot not in before:
                self.lose("A worker died while this one joined.")
            joining = ()
        self._joining = set()
        # Those who came last are behind the others.
        regions, is_whole, self.deaths.answered = told[0][1]
        if not is_whole:
            self.lose("All workers that knew the state are gone.")
        self._regions.go_on_with(regions)
        return [value for _, _, value in told]

    def join(self, offer: dict[str, Any]) -> list[Any]:
        """Come in, as one of those whom the members let in with `reform(..., joining)`.

        Args:
            offer: `count`, `members` and `answered` of a member, as they are before that call; and `joining`.

        Returns:
            The values of all members.
        """
        self._is_outside = False
        self.members, self.count, self.deaths.answered = offer["members"], offer["count"], offer["answered"]
        return self.reform(None, offer["joining"])

    def settle(self) -> None:
        """Take note that this worker knows all that the others know: it could go on alone."""
        self._is_whole = True

    def exchange(self, message: bytes) -> list[bytes]:
        if self._is_outside:
            # Nothing is written: the members would take a number of its own for its arrival.
            return [message]
        num_rounds = 1 + max(0, len(message) - 1) // (_MESSAGE_BYTES - 1)
        if num_rounds == 1:
            replies, most = self._round(message, 1)
            if most == 1:
                return replies
        else:
            first = message[: _MESSAGE_BYTES - 1]
            replies, most = self._round(first, num_rounds)
        # Some message is longer than a buffer: everybody saw the number of rounds and takes part in all of them.
        for start in range(_MESSAGE_BYTES - 1, most * (_MESSAGE_BYTES - 1), _MESSAGE_BYTES - 1):
            more, _ = self._round(message[start : start + _MESSAGE_BYTES - 1], 1)
            replies = [a + b for a, b in zip(replies, more, strict=True)]
        return replies

    def allocate(self, num_bytes: int, name: str = "") -> torch.Tensor:
        if self._is_outside:
            return aligned_zeros(num_bytes)
        memory = self._regions.known(name, num_bytes)
        if memory is None:
            region = self._regions.take(name, num_bytes, makes=self.worker.is_first)
            self.exchange(b"")
            memory = self._regions.map(region)
        return torch.frombuffer(memory, dtype=torch.uint8)[:num_bytes]

    def protect(self, memory: torch.Tensor, read_only: bool) -> None:
        # Each allocation is a mapping of its own, so its pages hold nothing else.
        self._pages.protect(memory, read_only)

    def close(self) -> None:
        self._words.release()
        self._messages.release()
        self._block.close()
        # The data maps are referred to by tensors; they go when those go.
        self._regions.close()

    def _seat(self, members: list[int]) -> None:
        """Take part with `members` from now on."""
        rank, size = members.index(self.slot), len(members)
        self.members = members
        self.worker = Worker(rank=rank, size=size, device=self._device, local_rank=self.slot)
        self._lines = [_WORDS * (1 + slot) for slot in members]
        self._others = [line for line in self._lines if line != self._mine]
        # More workers than cores: a spinning worker would keep the one it waits for from running.
        self._spin_seconds = _SPIN_SECONDS if size <= len(os.sched_getaffinity(0)) else 0.0

    def lose(self, why: str) -> NoReturn:
        """Give up: who supervises the run starts all anew."""
        if self._give_up is not None:
            self._give_up()
        raise PeerError(why)

    def wait_until(self, holds: Callable[[], bool]) -> None:
        words, begin = self._words, time.perf_counter()
        while not holds():
            if words[0] or any(self.deaths.has_died(slot) for slot in self.members):
                self.lose("Another worker of this run has died.")
            if time.perf_counter() - begin < _YIELD_SECONDS:
                os.sched_yield()
                continue
            words[self._mine + 3] = 1
            # As in an exchange: should the flag be missed, the timeout ends the nap.
            if not holds() and self._poll.poll(_BLOCK_SECONDS * 1e3):
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._handles.events[self.slot])
            words[self._mine + 3] = 0

    def _round(self, message: bytes, num_rounds: int) -> tuple[list[bytes], int]:
        """Exchange messages that fit a buffer; also return the largest `num_rounds` that a worker announced."""
        words, parity = self._words, self.count & 1
        length = len(message)
        base = parity * len(self._handles.events)
        if length:
            start = (base + self.slot) * _MESSAGE_BYTES
            self._messages[start : start + length] = message
        words[self._mine + 1 + parity] = length | num_rounds << 32
        self.count += 1
        if not _ORDERED_STORES:
            os.eventfd_write(self._handles.events[self.slot], 1)
        words[self._mine] = self.count
        self._wait(self.count)
        replies, most = [], 1
        for slot, line in zip(self.members, self._lines, strict=True):
            entry = words[line + 1 + parity]
            size, rounds = entry & 0xFFFFFFFF, entry >> 32
            most = rounds if rounds > most else most
            start = (base + slot) * _MESSAGE_BYTES
            replies.append(bytes(self._messages[start : start + size]) if size else b"")
        return replies, most

    def _wait(self, count: int) -> None:
        """Return once every worker has entered exchange `count`: spin, then yield, then block."""
        words = self._words
        waiting = [line for line in self._others if words[line] < count]
        if not waiting:
            self.wake()
            return
        begin = time.perf_counter()
        while True:
            waiting = [line for line in waiting if words[line] < count]
            if not waiting:
                break
            waited = time.perf_counter() - begin
            if waited < self._spin_seconds:
                continue
            if waited < _YIELD_SECONDS:
                os.sched_yield()
                continue
            self._block_until(waiting, count)
        # Two that arrive last at once may each have missed the other, so whoever saw all arrive looks for sleepers.
        self.wake()
        if not _ORDERED_STORES:
            os.sched_yield()

    def _block_until(self, waiting: list[int], count: int) -> None:
        words = self._words
        if words[0]:
            raise PeerError("Another worker of this run is gone.")
        # In this order: a dead worker's last store came before its mark. Not while another is on its way: it may still
        # read what the next exchange but one writes over. Who is to join reads nothing before it is in; and it may wait
        # for an offer that the dead one was to make.
        known = [line for line in waiting if line // _WORDS - 1 not in self._joining]
        if all(self.deaths.has_died(line // _WORDS - 1) and words[line] < count for line in known or waiting):
            if self._num_mendable:
                raise WorkerLost
            self.lose("Another worker of this run has died.")
        words[self._mine + 3] = 1
        # Looked at once more after the flag is up. Should the flag still be missed, the timeout ends the nap.
        if any(words[line] < count for line in waiting) and self._poll.poll(_BLOCK_SECONDS * 1e3):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._handles.events[self.slot])
        words[self._mine + 3] = 0

    def wake(self) -> None:
        words = self._words
        for slot, line in zip(self.members, self._lines, strict=True):
            if words[line + 3] and line != self._mine:
                os.eventfd_write(self._handles.events[slot], 1)


class _Lock:
    """Held by one process at a time; the kernel takes it from one that dies."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def __enter__(self) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)

    def __exit__(self, *error: object) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN)


def _messages_start(num_workers: int) -> int:
    return align(_LINE * (1 + num_workers))


def _control_bytes(num_workers: int) -> int:
    return _messages_start(num_workers) + 2 * num_workers * _MESSAGE_BYTES
