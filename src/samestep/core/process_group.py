"""The seam over `torch.distributed`: workers on many hosts, on GPUs, or started by torchrun.

Every transfer goes directly from the worker that has the bytes to the worker that needs them. Together this moves
what a ring moves, in one hop, and nothing is added up on the way: the owner adds, in tree order.

    exchange        one all-to-all of small slots, as large as the last small messages; longer ones send their rest in a
                    second round
    post            transfers that go on in the background, over connections of their own, until they are waited for
    gradient_area   each node's runs go to their owners (the reduce-scatter, without its sum)
    share           each owner's run goes to everybody (the all-gather), in place
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from samestep.core.device import backend_for, host_copy, host_room, is_cuda, make_current
from samestep.core.group import GradientArea, Group, aligned_zeros
from samestep.core.worker import Worker
from samestep.errors import PeerError, SettingsError, UsageError

_LEAST_SLOT, _MOST_SLOT, _SLOT_STEP = 256, 4096, 128
"""Bytes."""
_NUM_RECENT = 8
_LENGTH_BYTES = 8

_MEETING_PLACES = {"env": "env://", "tcp": "tcp://host:port", "file": "file:///path"}

_Transfer = tuple[torch.Tensor, int]
"""A contiguous tensor of bytes and the rank it goes to or comes from."""


class ProcessGroup(Group):
    """A group whose workers send to each other. Use `join`, or hand over an initialised `torch.distributed`."""

    shares_memory = False

    def __init__(self, worker: Worker, *, timeout_seconds: float | None = None, staged: bool = False):
        """Use the default process group of this process, which stays as it is. Collective.

        Args:
            worker: this worker.
            timeout_seconds: how long to wait for another worker before it counts as gone; by default as long as
                torch's own default.
            staged: let tensors cross through the host's memory; see `device.backend_for`.

        Raises:
            UsageError: there is no default process group.
            SettingsError: it has another rank or size than `worker`.
            PeerError: another worker is gone.
        """
        if not dist.is_initialized():
            raise UsageError(
                "torch.distributed is not initialised in this process. Use ProcessGroup.join(worker, ...)."
            )
        if (dist.get_rank(), dist.get_world_size()) != (worker.rank, worker.size):
            raise SettingsError(
                f"This worker is rank {worker.rank} of {worker.size}, but torch.distributed was initialised as rank "
                f"{dist.get_rank()} of {dist.get_world_size()}. Let both take them from the same launcher."
            )
        make_current(worker.device)
        self.worker = worker
        self._staged = staged
        self._beside: list[tuple[ProcessGroup, Callable[[], None]]] = []
        self._owns_default = False
        self._is_closed = False
        # Groups of our own: calls of the user's code on the default group cannot mix with ours.
        self._timeout = timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
        with self._peers("the start"):
            self._control = dist.new_group(backend="gloo", timeout=timeout)
            self._bulk = self._control
            if is_cuda(worker.device) and not staged:
                self._bulk = dist.new_group(backend="nccl", timeout=timeout)
        self._mail: dist.ProcessGroup | None = None
        self._recent: deque[int] = deque(maxlen=_NUM_RECENT)
        self._out = self._in = torch.zeros(worker.size, _LEAST_SLOT, dtype=torch.uint8)
        self._warm_up()

    @classmethod
    def join(
        cls, worker: Worker, *, init_method: str = "env://", timeout_seconds: float = 1800.0, staged: bool = False
    ) -> ProcessGroup:
        """Initialise `torch.distributed` for this worker and use it. Collective; `close` ends it again.

        Args:
            worker: this worker; its rank and size are told to torch.
            init_method: where the workers meet: "env://", "tcp://host:port" or "file:///path".
            timeout_seconds: how long to wait for another worker before it counts as gone.
            staged: let tensors cross through the host's memory; see `device.backend_for`.

        Raises:
            UsageError: torch.distributed is initialised already.
            SettingsError: the meeting place cannot be used.
            PeerError: not all workers came.
        """
        if dist.is_initialized():
            raise UsageError(
                "torch.distributed is initialised already in this process. Use ProcessGroup(worker), which shares it."
            )
        if init_method.partition("://")[0] not in _MEETING_PLACES:
            raise SettingsError(
                f"The workers cannot meet at {init_method!r}: it must be one of {', '.join(_MEETING_PLACES.values())}."
            )
        make_current(worker.device)
        try:
            dist.init_process_group(
                backend_for(worker.device, staged=staged),
                init_method=init_method,
                rank=worker.rank,
                world_size=worker.size,
                timeout=timedelta(seconds=timeout_seconds),
            )
        except ValueError as error:
            raise SettingsError(f"The workers cannot meet at {init_method!r}: {error}") from error
        except RuntimeError as error:
            raise PeerError(
                f"Worker {worker.rank} waited up to {timeout_seconds:g} s at {init_method!r} for all {worker.size} "
                f"workers; not all came: {error}"
            ) from error
        try:
            group = cls(worker, timeout_seconds=timeout_seconds, staged=staged)
        except BaseException:
            dist.destroy_process_group()
            raise
        group._owns_default = True
        return group

    def exchange(self, message: bytes) -> list[bytes]:
        rank, size = self.worker.rank, self.worker.size
        room = self._make_slots()
        head = len(message).to_bytes(_LENGTH_BYTES, "little") + message[:room]
        self._out[:, : len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        with self._peers("exchange"):
            dist.all_to_all_single(self._in, self._out, group=self._control)
        slots = self._in.numpy()
        lengths = [int.from_bytes(slot[:_LENGTH_BYTES].tobytes(), "little") for slot in slots]
        replies = [slot[_LENGTH_BYTES : _LENGTH_BYTES + n].tobytes() for slot, n in zip(slots, lengths, strict=True)]
        if max(lengths) <= _MOST_SLOT - _LENGTH_BYTES:
            # Longer ones need a second round whatever the slots are.
            self._recent.append(max(lengths))
        if max(lengths) <= room:
            return replies
        rests = {w: bytearray(lengths[w] - room) for w in range(size) if w != rank and lengths[w] > room}
        receives = [(torch.frombuffer(rest, dtype=torch.uint8), w) for w, rest in rests.items()]
        sends = []
        if len(message) > room:
            rest = torch.frombuffer(bytearray(message[room:]), dtype=torch.uint8)
            sends = [(rest, w) for w in range(size) if w != rank]
        with self._peers("exchange"):
            _transfer(self._control, sends, receives)
        replies = [replies[w] + rests.get(w, b"") for w in range(size)]
        replies[rank] = bytes(message)
        return replies

    def _make_slots(self) -> int:
        """Make slots for messages like the last ones, which all workers know; return what one holds of a message."""
        longest = max(self._recent, default=0) + _LENGTH_BYTES
        num_bytes = min(max(-(-longest // _SLOT_STEP) * _SLOT_STEP, _LEAST_SLOT), _MOST_SLOT)
        if self._out.shape[1] != num_bytes or self._out is self._in:
            self._out = torch.zeros(self.worker.size, num_bytes, dtype=torch.uint8)
            self._in = torch.zeros(self.worker.size, num_bytes, dtype=torch.uint8)
        return num_bytes - _LENGTH_BYTES

    def post(self, message: bytes, lengths: Sequence[int]) -> Callable[[], list[bytes]]:
        rank, size = self.worker.rank, self.worker.size
        others = [w for w in range(size) if w != rank]
        rooms = {w: bytearray(lengths[w]) for w in others if lengths[w]}
        receives = [(torch.frombuffer(room, dtype=torch.uint8), w) for w, room in rooms.items()]
        sends = [(torch.frombuffer(bytearray(message), dtype=torch.uint8), w) for w in others if message]
        with self._peers("post"):
            if self._mail is None:
                # Connections of their own: a small message of a step must not queue behind what takes many steps.
                self._mail = dist.new_group(backend="gloo", timeout=self._timeout)
            works = _start(self._mail, sends, receives)

        def wait() -> list[bytes]:
            with self._peers("post"):
                for work in works:
                    work.wait()
            return [message if w == rank else bytes(rooms.get(w, b"")) for w in range(size)]

        return wait

    def allocate(self, num_bytes: int, name: str = "") -> torch.Tensor:
        return aligned_zeros(num_bytes, self.worker.device)

    def gradient_area(
        self,
        num_bytes: int,
        buffers_of: Sequence[int],
        nodes_of: Sequence[Sequence[int]],
        runs: Sequence[range],
        name: str = "",
    ) -> GradientArea:
        return _SentArea(self, num_bytes, buffers_of, nodes_of, runs)

    def share(self, memory: torch.Tensor, runs: Sequence[range]) -> None:
        parts = [memory[run.start : run.stop] for run in runs]
        others = [w for w in range(self.worker.size) if w != self.worker.rank]
        self.transfer("share", [(parts[self.worker.rank], w) for w in others], [(parts[w], w) for w in others])

    def transfer(self, during: str, sends: Sequence[_Transfer], receives: Sequence[_Transfer]) -> None:
        """Send and receive tensors on the worker's device; done when the call returns (on a GPU: in stream order).

        Between two workers, tensors are received in the order in which they are sent. Both sides leave out the same
        empty ones.

        Raises:
            PeerError: another worker is gone.
        """
        sends = [(tensor, w) for tensor, w in sends if tensor.numel()]
        receives = [(tensor, w) for tensor, w in receives if tensor.numel()]
        with self._peers(during):
            if not self._staged:
                _transfer(self._bulk, sends, receives)
                return
            copies = {id(tensor): host_copy(tensor) for tensor, _ in sends}
            rooms = [(host_room(tensor), w) for tensor, w in receives]
            _transfer(self._control, [(copies[id(tensor)], w) for tensor, w in sends], rooms)
            for (tensor, _), (room, _) in zip(receives, rooms, strict=True):
                tensor.copy_(room)

    def beside(self, at_close: Callable[[], None]) -> ProcessGroup:
        seconds = None if self._timeout is None else self._timeout.total_seconds()
        group = ProcessGroup(self.worker, timeout_seconds=seconds, staged=self._staged)
        self._beside.append((group, at_close))
        return group

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        for group, _ in self._beside:
            group.close()
        if self._owns_default:
            dist.destroy_process_group()
        else:
            for group in {self._control, self._bulk, self._mail} - {None}:
                dist.destroy_process_group(group)
        # torch's groups keep their threads and sockets for as long as anybody refers to them.
        del self._control, self._bulk, self._mail
        for _, at_close in self._beside:
            at_close()

    def _warm_up(self) -> None:
        """Connect everybody with everybody now, so that a worker that cannot be reached is found at the start."""
        self.exchange(b"")
        if self._bulk is not self._control:
            # NCCL wants the first call on a communicator from all of its workers; later ones may leave some out.
            with self._peers("the start"):
                dist.all_reduce(torch.zeros(1, device=self.worker.device), group=self._bulk)

    @contextmanager
    def _peers(self, during: str) -> Iterator[None]:
        """Turn torch's errors into `PeerError`."""
        try:
            yield
        except RuntimeError as error:
            raise PeerError(
                f"Worker {self.worker.rank} of {self.worker.size} lost another worker during {during}: that one has "
                f"ended, cannot be reached, or did not come in time. Its own error says why. ({error})"
            ) from error


class _SentArea(GradientArea):
    """Every worker has its own buffers; collecting sends each run of them to its owner."""

    def __init__(
        self,
        group: ProcessGroup,
        num_bytes: int,
        buffers_of: Sequence[int],
        nodes_of: Sequence[Sequence[int]],
        runs: Sequence[range],
    ):
        rank, size, device = group.worker.rank, group.worker.size, group.worker.device
        self._group = group
        self.mine = [aligned_zeros(num_bytes, device) for _ in range(buffers_of[rank])]
        published = [self.mine[b] for b in nodes_of[rank]]
        others = [w for w in range(size) if w != rank]
        run = runs[rank]
        self.nodes = [
            [node[run.start : run.stop] for node in published]
            if w == rank
            else [aligned_zeros(len(run), device) for _ in nodes_of[w]]
            for w in range(size)
        ]
        self._sends = [(node[runs[w].start : runs[w].stop], w) for w in others for node in published]
        self._receives = [(node, w) for w in others for node in self.nodes[w]]

    def collect(self) -> None:
        self._group.transfer("collect", self._sends, self._receives)


def _transfer(group: dist.ProcessGroup, sends: Sequence[_Transfer], receives: Sequence[_Transfer]) -> None:
    """Start all transfers together, and wait for all."""
    for work in _start(group, sends, receives):
        work.wait()


def _start(group: dist.ProcessGroup, sends: Sequence[_Transfer], receives: Sequence[_Transfer]) -> list[dist.Work]:
    """Start all transfers together. Receives come first, so that no send finds nobody waiting."""
    operations = [dist.P2POp(dist.irecv, tensor, w, group) for tensor, w in receives]
    operations += [dist.P2POp(dist.isend, tensor, w, group) for tensor, w in sends]
    return dist.batch_isend_irecv(operations) if operations else []
