"""The one seam: how the workers of a run reach each other.

Everything that crosses from one worker to another goes through a `Group`. There are four kinds: `Solo` (below),
the arena (one host, shared memory), `torch.distributed` (many hosts, GPUs), and the fakes used by tests.

    exchange        every worker gives a small message and gets all of them, in rank order; also a barrier
    post            every worker gives a message of known length, and gets all of them later
    allocate        memory for weights and optimizer state; one memory for all workers where they share it
    gradient_area   where each worker folds its gradients and each owner reads the folded nodes of its units
    share           after owners wrote their runs of a memory, every worker sees all of it
    beside          where workers send to each other: all of it once more, for one more thread of each
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NoReturn

import torch

from samestep.core.worker import Worker
from samestep.errors import PeerError, UsageError

ALIGNMENT = 64
"""Bytes. Every parameter, state block, gradient area and input tensor starts on a multiple of it."""


class WorkerLost(BaseException):
    """A worker of the group has died, and the others can go on without it.

    All others raise it in the same call, the first that the dead worker did not enter. Not an error, and no
    `except Exception` of the user's may take it for one.
    """


class GradientArea(ABC):
    """Gradient buffers of one optimizer's parameters, as one worker sees them.

    Attributes:
        mine: this worker's buffers, uint8 tensors of the whole area's length, 64-byte aligned.
        nodes: `nodes[w][j]` holds, after `collect`, this worker's run of the j-th node of worker w. uint8.
            The tensors stay the same from step to step.
    """

    mine: list[torch.Tensor]
    nodes: list[list[torch.Tensor]]

    @abstractmethod
    def collect(self) -> None:
        """Make `nodes` valid. Called by every worker, after all have published their nodes in an `exchange`."""


class Group(ABC):
    """All communication between workers.

    Attributes:
        worker: this worker. Another one after others have died or joined.
        shares_memory: what one worker writes, all can read after the next `exchange`.
        loses_workers: the others can go on without a worker that has died, see `WorkerLost`.
        slot: what stays of a worker when ranks change.
        exclusive: `with group.exclusive:` lets one worker in at a time, where memory is shared. What was written inside
            is seen by who comes in later.
    """

    worker: Worker
    shares_memory: bool
    loses_workers = False
    slot = 0
    exclusive: AbstractContextManager[object] = nullcontext()

    @abstractmethod
    def exchange(self, message: bytes) -> list[bytes]:
        """Give `message`, return the messages of all workers in rank order. A barrier.

        Raises:
            PeerError: another worker is gone.
        """

    def post(self, message: bytes, lengths: Sequence[int]) -> Callable[[], list[bytes]]:
        """Give `message` to all workers in the background, where the group can do that; here at once. Collective.

        Args:
            message: of this worker.
            lengths: of the messages of all workers, in rank order.

        Returns:
            A function that waits for the messages of all workers and returns them in rank order. Several posts may be
            under way, and be waited for in any order.

        Raises:
            PeerError: another worker is gone; here, or when the messages are waited for.
        """
        replies = self.exchange(message)
        return lambda: replies

    @abstractmethod
    def allocate(self, num_bytes: int, name: str = "") -> torch.Tensor:
        """Return `num_bytes` zero bytes on the worker's device (uint8, 64-byte aligned). Collective.

        Where `shares_memory` is true, every worker gets the same memory.

        Args:
            num_bytes: its length.
            name: where workers may come and go, memory of this name and length that is there already is returned as it
                is (not collective then); of another length, it is given up.
        """

    @abstractmethod
    def gradient_area(
        self,
        num_bytes: int,
        buffers_of: Sequence[int],
        nodes_of: Sequence[Sequence[int]],
        runs: Sequence[range],
        name: str = "",
    ) -> GradientArea:
        """Make the gradient area of one optimizer. Collective.

        Args:
            num_bytes: length of one buffer.
            buffers_of: number of buffers of each worker.
            nodes_of: for each worker, the buffers that hold its nodes once all its shards are folded.
            runs: for each worker, the bytes of a buffer that it owns. They are disjoint and in rank order.
            name: see `allocate`.
        """

    @abstractmethod
    def share(self, memory: torch.Tensor, runs: Sequence[range]) -> None:
        """Make the owners' runs of `memory` (bytes, disjoint) visible to every worker. Not a barrier."""

    def beside(self, at_close: Callable[[], None]) -> Group:
        """Return another group of the same workers, for one more thread of each. Collective.

        Calls of one cannot mix with calls of the other. It is closed with this one.

        Args:
            at_close: called when it has been closed, to see the thread end.

        Raises:
            UsageError: these workers share memory, where nothing needs to be sent beside.
        """
        raise UsageError("Workers that share memory have one group.")

    def protect(self, memory: torch.Tensor, read_only: bool) -> None:  # noqa: B027
        """Make `memory`, as allocated, read-only for this worker, or writable again.

        A write then kills the worker. Does nothing where other things may lie on the same pages.
        """

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Return once something in shared memory holds. No barrier: the others need not wait.

        Args:
            holds: looks at shared memory, as often as it is called; who makes it true calls `wake`.

        Raises:
            PeerError: another worker is gone.
        """
        if not holds():
            raise PeerError("This worker waits for another, and there is none.")

    def wake(self) -> None:  # noqa: B027
        """Let those who wait look again."""

    def lose(self, why: str) -> NoReturn:
        """Give up, since a worker is gone whom the others cannot do without.

        Raises:
            PeerError: with `why`, where this worker does not end at once.
        """
        raise PeerError(why)

    @contextmanager
    def mendable(self) -> Iterator[None]:
        """Let calls inside raise `WorkerLost`, where a group can go on without a worker that has died."""
        yield

    def close(self) -> None:  # noqa: B027
        """Give back what the group holds. The group cannot be used afterwards."""


class _VisibleArea(GradientArea):
    """Every worker sees every buffer, so collecting moves nothing."""

    def __init__(self, memory: torch.Tensor, num_bytes: int, rank: int, buffers_of, nodes_of, runs):
        stride = align(num_bytes)
        areas, first = [], 0
        for count in buffers_of:
            areas.append([memory[(first + b) * stride :][:num_bytes] for b in range(count)])
            first += count
        self.mine = areas[rank]
        run = runs[rank]
        self.nodes = [
            [area[b][run.start : run.stop] for b in nodes] for area, nodes in zip(areas, nodes_of, strict=True)
        ]

    def collect(self) -> None:
        pass


class SharedMemoryGroup(Group):
    """A group whose workers share memory: what one writes, all can read after the next `exchange`."""

    shares_memory = True

    def gradient_area(self, num_bytes, buffers_of, nodes_of, runs, name="") -> GradientArea:
        memory = self.allocate(align(num_bytes) * sum(buffers_of), name)
        return _VisibleArea(memory, num_bytes, self.worker.rank, buffers_of, nodes_of, runs)

    def share(self, memory: torch.Tensor, runs: Sequence[range]) -> None:
        pass


class Solo(SharedMemoryGroup):
    """A group of one worker."""

    def __init__(self, worker: Worker | None = None):
        self.worker = worker if worker is not None else Worker()

    def exchange(self, message: bytes) -> list[bytes]:
        return [message]

    def allocate(self, num_bytes: int, name: str = "") -> torch.Tensor:
        return aligned_zeros(num_bytes, self.worker.device)


def align(num_bytes: int) -> int:
    """Round `num_bytes` up to a multiple of `ALIGNMENT`."""
    return (num_bytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def aligned_zeros(num_bytes: int, device: str = "cpu") -> torch.Tensor:
    """Return `num_bytes` zero bytes whose address is a multiple of `ALIGNMENT`."""
    memory = torch.zeros(num_bytes + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + num_bytes]
