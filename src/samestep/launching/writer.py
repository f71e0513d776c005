"""The writer: a process beside the workers that takes one checkpoint from memory to the disk, and ends.

    first worker    lends a snapshot, and sends an order through a socket that outlives it
    supervisor      forks the writer; sees it end, finish without progress, or die; takes the snapshot back
    writer          writes, leaves an answer in memory that all share, and ends; it ends with its supervisor

It is not the child of a worker, which has threads and may die: a write goes on when all workers start again. It knows
nothing of checkpoints but what it is given: a function that writes.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from samestep.errors import SettingsError
from samestep.launching import zygote
from samestep.launching.signals import ENDING

SILENCE = 600.0
"""Seconds without a byte written after which it counts as hung. A disk may take minutes to flush what it was given."""
_LOOK = 1.0
"""Seconds between looks at its progress."""
_TOLD_AFTER = 3.0
"""Seconds that the end of a run waits for it before that is told."""
_MOST_BYTES = 1 << 17
"""Longest order, and longest answer: there are paths of 4,096 characters, and JSON may need six bytes for each."""
_LONGEST_REASON = 1000
_NICE = 5
"""It takes time that workers do not need rather than theirs."""

Order = dict[str, Any]
Answer = dict[str, Any]


class Writer:
    """The writer of one run, over all of its fleets.

    Attributes:
        pid: of the process at work; 0 if there is none.
    """

    def __init__(
        self,
        act: Callable[[Order], Answer],
        release: Callable[[], None],
        lender: Callable[[], int | None],
        silence: float = SILENCE,
    ):
        """Make it before forking: supervisor and workers have it in common.

        Args:
            act: does what was ordered, in the process beside; returns the answer.
            release: called by the supervisor when that has ended.
            lender: returns the slot of the worker that has made something ready to be written, None if none has.
            silence: seconds, see `SILENCE`.
        """
        self.pid = 0
        self._act = act
        self._release = release
        self._lender = lender
        self._silence = silence
        self._orders, self._desk = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._desk.setblocking(False)
        self._page = mmap.mmap(-1, _MOST_BYTES)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._desk, selectors.EVENT_READ)
        self._pidfd = -1
        self._order: Order = {}
        self._num_written: int | None = None
        self._progress_at = self._next_look = 0.0
        self._is_hung = False

    def write(self, order: Order) -> None:
        """In a worker: order something. Not before the answer to the last order was taken, or `release` called."""
        self._orders.send(json.dumps(order).encode())

    def answer(self) -> Answer | None:
        """In a worker: take the answer to the last order, None if there is none."""
        size = int.from_bytes(self._page[:8], "little")
        if not size:
            return None
        answer: Answer = json.loads(self._page[8 : 8 + size])
        self._page[:8] = bytes(8)
        return answer

    def fileno(self) -> int:
        """Return a descriptor that is readable when there is something to serve."""
        return self._selector.fileno()

    def begin(self, slot: int | None = None) -> None:
        """Take up what a worker that is gone has ordered, or died in the middle of ordering.

        Args:
            slot: of that worker; None if all are gone.
        """
        self.serve()
        if not self.pid and slot in (None, self._lender()):
            self._release()

    def serve(self) -> None:
        """Take an order, or the end of the process."""
        for key, _ in self._selector.select(0):
            if key.fd == self._pidfd:
                self._ended()
            else:
                self._start(json.loads(self._desk.recv(_MOST_BYTES)))

    def look(self, now: float) -> None:
        """Kill the process if it is hung.

        Args:
            now: seconds of the monotonic clock.
        """
        if not self.pid or now < self._next_look:
            return
        self._next_look = now + min(_LOOK, self._silence / 4)
        num_written = _num_written(self.pid)
        if num_written is None or num_written != self._num_written:
            self._num_written, self._progress_at = num_written, now
        elif now - self._progress_at >= self._silence:
            self._is_hung = True
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def finish(self, received: list[int], wake: socket.socket, tell: Callable[[str], None]) -> None:
        """When the last worker is gone: let what was ordered be written, unless a signal comes, and close everything.

        Args:
            received: signals that have come, and will come.
            wake: becomes readable when one comes.
            tell: takes a sentence for the user.
        """
        self.begin()
        told_at = time.monotonic() + _TOLD_AFTER
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            selector.register(wake, selectors.EVENT_READ)
            while self.pid and not received:
                for key, _ in selector.select(_LOOK):
                    if key.fileobj is wake:
                        wake.recv(64)
                self.serve()
                self.look(time.monotonic())
                if time.monotonic() >= told_at:
                    told_at = float("inf")
                    tell("A checkpoint is still being written. Ctrl-C ends the run without it.")
        self.kill()
        self._orders.close()
        self.abandon()

    def kill(self) -> None:
        """End the process at once, if there is one, and forget what was ordered."""
        with contextlib.suppress(BlockingIOError):
            self._desk.recv(_MOST_BYTES)
        if self.pid:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._ended()

    def abandon(self) -> None:
        """In a forked worker: give up what belongs to the supervisor."""
        self._selector.close()
        self._desk.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)

    def _start(self, order: Order) -> None:
        self._order = order
        parent = os.getpid()
        try:
            zygote.check_one_task()
            pid = os.fork()
        except (SettingsError, OSError) as error:
            self._put(self._failed(str(error)))
            self._release()
            return
        if pid == 0:
            self._work(parent)
        self.pid, self._pidfd = pid, os.pidfd_open(pid)
        self._selector.register(self._pidfd, selectors.EVENT_READ)
        self._num_written, self._is_hung, self._next_look = None, False, 0.0

    def _work(self, parent: int) -> None:
        """In the new process: do what was ordered."""
        try:
            zygote.die_with(parent)
            signal.set_wakeup_fd(-1)
            for number in ENDING:
                # They are for the supervisor, though they may have been sent to every process.
                signal.signal(number, signal.SIG_IGN)
            with contextlib.suppress(OSError), open("/proc/self/comm", "w") as name:
                name.write("samestep-writer")
            os.nice(_NICE)
            try:
                self._put(self._act(self._order))
            except Exception as error:
                self._put(self._failed(f"{type(error).__name__}: {error}"))
        finally:
            os._exit(0)

    def _ended(self) -> None:
        """Take the end of the process: it has left an answer, or died."""
        _, status = os.waitpid(self.pid, 0)
        self._selector.unregister(self._pidfd)
        os.close(self._pidfd)
        self.pid, self._pidfd = 0, -1
        if not int.from_bytes(self._page[:8], "little"):
            self._put(self._failed(self._why(status)))
        self._release()

    def _why(self, status: int) -> str:
        if self._is_hung:
            return f"the process that wrote it wrote nothing for {self._silence:g} s, and was killed"
        if os.WIFSIGNALED(status):
            return f"the process that wrote it was killed ({signal.Signals(os.WTERMSIG(status)).name})"
        return f"the process that wrote it ended with exit code {os.waitstatus_to_exitcode(status)}"

    def _failed(self, reason: str) -> Answer:
        place = f"step {self._order['step']} to {self._order['folder']}"
        reason = reason.rstrip(".")[:_LONGEST_REASON]
        what = f"The checkpoint of {place} could not be written: {reason}. Earlier checkpoints are untouched."
        return {"message": what, "reason": reason}

    def _put(self, answer: Answer) -> None:
        text = json.dumps(answer).encode()
        self._page[8 : 8 + len(text)] = text
        # Last: with its length the answer is there.
        self._page[:8] = len(text).to_bytes(8, "little")


def _num_written(pid: int) -> int | None:
    """Return how many bytes a process has written, None if the system does not tell."""
    try:
        with open(f"/proc/{pid}/io") as file:
            return int(dict(line.split(": ") for line in file)["wchar"])
    except (OSError, KeyError, ValueError):
        return None
