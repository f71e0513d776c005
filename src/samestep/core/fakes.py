"""Fakes of the seam: workers as threads of one process, and wrappers that count, fail or delay.

    run_threads(fn, 4)                  fn(group) in 4 threads that share memory; returns the 4 results
    Counting(group)                     calls, and bytes that came from other workers, by kind
    Failing(group, "exchange", 3)       the third exchange raises
    Delaying(group, 0.01)               every call takes 10 ms longer

A wrapper sees four kinds of call: "exchange", "post", "collect" (of its gradient areas) and "share".

[Note: one thread at a time]
torch's, NumPy's and Python's global generators belong to the process, and training code seeds them. So the threads
take turns: one runs until its next `exchange`, then hands the baton to the next rank, and each finds the generators
as it left them. A run of threads is therefore as repeatable as one thread.
"""

from __future__ import annotations

import random
import threading
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from samestep.core.group import GradientArea, Group, SharedMemoryGroup, aligned_zeros
from samestep.core.worker import Worker
from samestep.errors import MismatchError, PeerError

T = TypeVar("T")
_Generators = tuple[torch.Tensor, list[torch.Tensor], Any, Any]

KINDS = ("exchange", "post", "collect", "share")
"""The kinds of call that the wrappers tell apart."""


def thread_groups(size: int, device: str = "cpu") -> list[Group]:
    """Return the groups of `size` workers, each to be used in a thread of its own.

    The threads take turns only from their first `exchange` on; `run_threads` makes them do so from the start.
    """
    stage = _Stage(size)
    return [_ThreadGroup(Worker(rank=r, size=size, device=device, local_rank=r), stage) for r in range(size)]


def run_threads(fn: Callable[[Group], T], size: int, device: str = "cpu") -> list[T]:
    """Call `fn(group)` for each of `size` workers, in threads that take turns; return the results in rank order.

    A worker that raises, or returns while others still exchange, makes their `exchange` raise `PeerError`. The global
    generators are afterwards as they were before.

    Raises:
        Exception: the first error of a worker that is not a `PeerError`, or else the first error.
    """
    groups = thread_groups(size, device)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def play(group: _ThreadGroup) -> None:
        try:
            group.enter(generators)
            results[group.worker.rank] = fn(group)
        except BaseException as error:
            errors.append(error)
        finally:
            group.leave()

    generators = _generators()
    threads = [threading.Thread(target=play, args=(g,), name=f"worker-{g.worker.rank}", daemon=True) for g in groups]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        _restore(generators)
    causes = [error for error in errors if not isinstance(error, PeerError)]
    if errors:
        raise (causes or errors)[0]
    return results


class _Stage:
    """What the threads of one group share: whose turn it is, the messages of this round, the memories."""

    def __init__(self, size: int):
        self.condition = threading.Condition()
        self.turn = 0
        self.gone = [False] * size
        self.round: list[bytes | None] = [None] * size
        self.memories: list[torch.Tensor] = []

    def pass_on(self) -> None:
        """Give the turn to the next worker that is still there. Call it with the condition held."""
        size = len(self.gone)
        later = [(self.turn + i) % size for i in range(1, size + 1)]
        self.turn = next((w for w in later if not self.gone[w]), self.turn)
        self.condition.notify_all()


class _ThreadGroup(SharedMemoryGroup):
    """The group of one thread. See [Note: one thread at a time]."""

    def __init__(self, worker: Worker, stage: _Stage):
        self.worker = worker
        self._stage = stage
        self._num_allocated = 0

    def enter(self, generators: _Generators) -> None:
        """Wait for this worker's first turn, and begin it with `generators`."""
        with self._stage.condition:
            self._stage.condition.wait_for(self._has_turn)
        _restore(generators)

    def leave(self) -> None:
        """Hand the turn on for good."""
        with self._stage.condition:
            self._stage.gone[self.worker.rank] = True
            if self._has_turn():
                self._stage.pass_on()

    def exchange(self, message: bytes) -> list[bytes]:
        rank, stage = self.worker.rank, self._stage
        with stage.condition:
            stage.condition.wait_for(self._has_turn)
            self._check_all_there()
            messages = stage.round
            messages[rank] = bytes(message)
            if None not in messages:
                stage.round = [None] * self.worker.size
            self._pause()
            # Another may have been in `wait_until` meanwhile, and came back without a message.
            while None in messages:
                self._check_all_there()
                self._pause()
        return [m for m in messages if m is not None]

    def wait_until(self, holds: Callable[[], bool]) -> None:
        with self._stage.condition:
            self._stage.condition.wait_for(self._has_turn)
            while not holds():
                self._check_all_there()
                self._pause()

    def allocate(self, num_bytes: int, name: str = "") -> torch.Tensor:
        memories = self._stage.memories
        with self._stage.condition:
            if self._num_allocated == len(memories):
                memories.append(aligned_zeros(num_bytes, self.worker.device))
            memory = memories[self._num_allocated]
            self._num_allocated += 1
        if memory.numel() != num_bytes:
            raise MismatchError(
                f"Worker {self.worker.rank} asks for {num_bytes} bytes where another asked for {memory.numel()}. "
                f"Every worker must allocate the same sizes in the same order."
            )
        return memory

    def _pause(self) -> None:
        """Let the others go on until it is this worker's turn again. Call it with the condition held."""
        generators = _generators()
        self._stage.pass_on()
        self._stage.condition.wait_for(self._has_turn)
        _restore(generators)

    def _has_turn(self) -> bool:
        return self._stage.turn == self.worker.rank

    def _check_all_there(self) -> None:
        gone = [w for w, is_gone in enumerate(self._stage.gone) if is_gone]
        if gone:
            raise PeerError(f"Worker {self.worker.rank} exchanges, but worker {gone[0]} has ended. Look at its error.")


class _Wrapper(Group):
    """A group that does something before or after each call of another one."""

    def __init__(self, group: Group):
        self.inner = group
        self.worker = group.worker
        self.shares_memory = group.shares_memory
        self.exclusive = group.exclusive

    @abstractmethod
    def before(self, kind: str) -> None:
        """Called before each call of a kind in `KINDS`."""

    def after(self, kind: str, num_bytes: int) -> None:
        """Called after it; `num_bytes` came from other workers."""

    def exchange(self, message: bytes) -> list[bytes]:
        self.before("exchange")
        replies = self.inner.exchange(message)
        self.after("exchange", sum(len(m) for w, m in enumerate(replies) if w != self.worker.rank))
        return replies

    def post(self, message: bytes, lengths: Sequence[int]) -> Callable[[], list[bytes]]:
        self.before("post")
        wait = self.inner.post(message, lengths)
        self.after("post", sum(lengths) - len(message))
        return wait

    def allocate(self, num_bytes: int, name: str = "") -> torch.Tensor:
        return self.inner.allocate(num_bytes, name)

    def gradient_area(
        self,
        num_bytes: int,
        buffers_of: Sequence[int],
        nodes_of: Sequence[Sequence[int]],
        runs: Sequence[range],
        name: str = "",
    ) -> GradientArea:
        return _WrappedArea(self.inner.gradient_area(num_bytes, buffers_of, nodes_of, runs, name), self)

    def share(self, memory: torch.Tensor, runs: Sequence[range]) -> None:
        self.before("share")
        self.inner.share(memory, runs)
        others = sum(len(run) for w, run in enumerate(runs) if w != self.worker.rank)
        self.after("share", 0 if self.shares_memory else others)

    def beside(self, at_close: Callable[[], None]) -> Group:
        return self.inner.beside(at_close)

    def protect(self, memory: torch.Tensor, read_only: bool) -> None:
        self.inner.protect(memory, read_only)

    def wait_until(self, holds: Callable[[], bool]) -> None:
        self.inner.wait_until(holds)

    def wake(self) -> None:
        self.inner.wake()

    def close(self) -> None:
        self.inner.close()


class _WrappedArea(GradientArea):
    def __init__(self, area: GradientArea, wrapper: _Wrapper):
        self._area = area
        self._wrapper = wrapper
        self.mine = area.mine
        self.nodes = area.nodes

    def collect(self) -> None:
        rank = self._wrapper.worker.rank
        self._wrapper.before("collect")
        self._area.collect()
        others = sum(node.numel() for w, nodes in enumerate(self.nodes) if w != rank for node in nodes)
        self._wrapper.after("collect", others)


class Counting(_Wrapper):
    """Counts what a worker asks of its group.

    Attributes:
        num_calls: calls, by kind.
        num_bytes: bytes that this worker got from others, by kind. Where memory is shared these are the bytes of
            others' gradients that it reads ("collect"), and sharing weights moves none ("share").
    """

    def __init__(self, group: Group):
        super().__init__(group)
        self.num_calls: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self.num_bytes: Counter[str] = Counter(dict.fromkeys(KINDS, 0))

    def before(self, kind: str) -> None:
        self.num_calls[kind] += 1

    def after(self, kind: str, num_bytes: int) -> None:
        self.num_bytes[kind] += num_bytes


class Failing(_Wrapper):
    """Raises instead of making one call."""

    def __init__(self, group: Group, kind: str, at_call: int, error: BaseException | None = None):
        """Plant a failure.

        Args:
            group: the group to wrap.
            kind: one of `KINDS`.
            at_call: which call of that kind fails, counted from 1.
            error: what it raises; a `PeerError` by default.

        Raises:
            ValueError: there is no such kind.
        """
        super().__init__(group)
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}.")
        self._kind = kind
        self._num_left = at_call
        self._error = error if error is not None else PeerError(f"Planted: {kind} number {at_call} fails.")

    def before(self, kind: str) -> None:
        if kind == self._kind:
            self._num_left -= 1
            if self._num_left == 0:
                raise self._error


class Delaying(_Wrapper):
    """Sleeps before each call, so that one worker lags behind the others."""

    def __init__(self, group: Group, seconds: float):
        super().__init__(group)
        self._seconds = seconds

    def before(self, kind: str) -> None:
        time.sleep(self._seconds)


def _generators() -> _Generators:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def _restore(generators: _Generators) -> None:
    cpu, cuda, numpy_state, python_state = generators
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    np.random.set_state(numpy_state)
    random.setstate(python_state)
