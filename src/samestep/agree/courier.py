"""Makes updates beside the steps that follow, where workers share no memory: in a thread of each worker, in order.

The thread meets those of the other workers over a group of its own, so that nothing it sends mixes with what the script
exchanges. Of the script's thread it sees no more than the updates that were asked for; and that one sees which are
made, and what all workers told of them. It lives while there is something to make.

[Note: how long a word stays]
As on a `Board`: a worker reads the word of the update `bound` before its own, and none is asked for further ahead.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from samestep.core.group import Group

_PATIENCE_SECONDS = 5.0
"""For a thread to end where the script has failed. Others may be busy for longer; then it ends with the process."""


class Courier:
    """One worker's updates under way; it has the methods of `Board` that a pipeline calls.

    Attributes:
        group: the workers, for the thread alone.
    """

    def __init__(self, group: Group, bound: int):
        """Begin at update 0. Collective.

        Args:
            group: the workers; the thread gets one beside it.
            bound: how many updates may be under way while one more is asked for.
        """
        self.group = group.beside(self._leave)
        self._make: Callable[[int], None] | None = None
        self._changed = threading.Condition()
        self._asked: deque[tuple[int, bytes]] = deque()
        self._thread = threading.Thread()
        self._is_working = False
        self._error: BaseException | None = None
        self._parts: list[Sequence[bytes]] = [()] * (2 * bound + 2)
        self._verdicts = [b""] * (2 * bound + 2)
        self._committed = 0

    def serve(self, make: Callable[[int], None]) -> None:
        """Say how an update is made, once all have told their parts of it: `make` reads them, and commits it."""
        self._make = make

    @property
    def committed(self) -> int:
        """How many updates are made."""
        with self._changed:
            return self._committed

    def reset(self, number: int) -> None:
        """Go on where `number` updates are made, and none is under way."""
        self._committed = number

    def arrive(self, number: int, part: bytes) -> None:
        """Ask for update `number`, and tell this worker's part of it.

        Raises:
            Exception: what an update before has ended with.
        """
        with self._changed:
            self._check()
            self._asked.append((number, part))
            if not self._is_working:
                self._is_working = True
                # Should the script end in the middle, it ends with the process.
                self._thread = threading.Thread(target=self._work, name="samestep updates", daemon=True)
                self._thread.start()

    def is_committed(self, number: int) -> bool:
        """Return whether update `number` is made.

        Raises:
            Exception: what an update has ended with.
        """
        with self._changed:
            self._check()
            return self._committed > number

    def wait(self, number: int, may_help: Callable[[], bool]) -> None:
        """Return once update `number` is made, or one has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._committed > number or self._error is not None)

    def rest(self) -> None:
        """Return, when all is made that was asked for, once the thread has ended."""
        if self._thread.ident is not None:
            self._thread.join()

    def take(self, number: int) -> bool:
        """Return whether the script's own thread shall make update `number` now: never."""
        return False

    def parts(self, number: int) -> Sequence[bytes]:
        """Return what the workers told of an update, in rank order."""
        return self._parts[number % len(self._parts)]

    def commit(self, number: int, verdict: bytes) -> None:
        """Tell that update `number` is made, and what became of it."""
        with self._changed:
            self._verdicts[number % len(self._verdicts)] = verdict
            self._committed = number + 1
            self._changed.notify_all()

    def verdict(self, number: int) -> bytes:
        """Return what became of an update."""
        return self._verdicts[number % len(self._verdicts)]

    def _leave(self) -> None:
        """End the thread: the group is closed.

        What it waits for is sent by threads that come to the same update, or ends with theirs.
        """
        with self._changed:
            self._asked.clear()
        if self._thread.ident is not None:
            self._thread.join(_PATIENCE_SECONDS)
        # Where it comes from still knows the group, which is not gone before nobody does.
        self._error = None

    def _check(self) -> None:
        if self._error is not None:
            self.rest()
            raise self._error

    def _work(self) -> None:
        """Make what is asked for, until there is nothing left."""
        assert self._make is not None
        while True:
            with self._changed:
                if not self._asked:
                    self._is_working = False
                    return
                number, part = self._asked.popleft()
            try:
                self._parts[number % len(self._parts)] = self.group.exchange(part)
                self._make(number)
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
