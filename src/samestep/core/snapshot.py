"""Snapshots: the newest state of a run, in memory that no worker owns, so that it outlives all of them.

The supervisor makes it before it forks the workers, and holds it. The first worker writes: the same tensors and facts
as a checkpoint holds. Two memories are written in turn where there is room for both, so that a death while one is
written leaves the other. So does a bit that flips in one: each carries a fold of what was written, which is compared
when it is read. The newest can be lent to who takes it to the disk: it is not written over until it is taken back, and
meanwhile the other memory has the snapshots.

    control: [0] [1] serial number of what is in each memory, 0 while it is written | [2] calls recorded so far
             [3] [4] committed steps | [5] [6] bytes written | [7] [8] their fold (`integrity`)
             [9] number of the newest offer to workers that join; the two newest lie in turn behind the words
             [11] 1 + number of the memory that is lent, 0 for none | slot of the worker that lent it
    memory:  length of the head | head (`wire`) | tensors, each on 64 bytes
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from samestep.core.group import align
from samestep.core.integrity import fold
from samestep.core.memory import available_bytes
from samestep.storage import wire
from samestep.storage.checkpoint import Checkpoint

FROM_MEMORY = Path("memory")
"""The path of a checkpoint that was never in a file."""
_OFFER, _OFFER_TEXT = 9, 128
"""A control word, and the first byte of the room for offers."""
_CONTROL_BYTES = 16 * mmap.PAGESIZE
_OFFER_ROOM = (_CONTROL_BYTES - _OFFER_TEXT) // 2
"""Bytes for one offer."""
_LENT, _LENDER = 11, 12
"""Control words."""
_ROOMY = 8
"""Both memories are used where they take less than this part of what is free."""
_STEP, _LENGTH, _FOLD = 3, 5, 7
"""Where the control words of the first memory are; the second's follow."""
_LEAST_ROOM = 1 << 20
"""Bytes to grow by."""
_BLOCK_BYTES = 512
"""What the system counts the memory of a file in."""


class Offers:
    """Where workers that join are told that the newest snapshot is where they come in.

    Who makes an offer may die in the middle of it, and who reads one is not waited for. So an offer is written beside
    the one before, and counts from the instant that its number stands; who reads looks at the number before and after.
    """

    def __init__(self, control: mmap.mmap, words: memoryview[int]):
        self._control = control
        self._words = words

    def make(self, facts: dict[str, Any]) -> None:
        """Make an offer; `facts` are JSON values."""
        text = json.dumps(facts).encode()
        assert 8 + len(text) <= _OFFER_ROOM, "an offer that is too long"
        number = self._words[_OFFER] + 1
        start = self._start(number)
        self._control[start : start + 8 + len(text)] = len(text).to_bytes(8, "little") + text
        self._words[_OFFER] = number

    def newest(self) -> tuple[int, dict[str, Any]]:
        """Return the number of the newest offer (0: there was none), and what it says."""
        while True:
            number = self._words[_OFFER]
            if not number:
                return 0, {}
            start = self._start(number)
            length = int.from_bytes(self._control[start : start + 8], "little")
            text = self._control[start + 8 : start + 8 + min(length, _OFFER_ROOM)]
            # Else the one after the next may have been written there meanwhile.
            if self._words[_OFFER] == number:
                return number, json.loads(text)

    @staticmethod
    def _start(number: int) -> int:
        return _OFFER_TEXT + number % 2 * _OFFER_ROOM


class Snapshots:
    """Room for the newest snapshot of one launch call after the other.

    Attributes:
        offers: to workers that join.
        damaged: committed steps of the snapshots that `newest` passed over, because they are not as they were written.
    """

    def __init__(self) -> None:
        self.damaged: list[int] = []
        self._memories = [os.memfd_create(f"samestep-snapshot-{i}", os.MFD_CLOEXEC) for i in range(2)]
        self._control = mmap.mmap(-1, _CONTROL_BYTES)
        self._words = memoryview(self._control).cast("q")
        self._maps: dict[int, mmap.mmap] = {}
        self.offers = Offers(self._control, self._words)

    @property
    def num_calls(self) -> int:
        """Calls that the run has recorded, over all fleets: a new fleet says again what came before."""
        return self._words[2]

    @num_calls.setter
    def num_calls(self, count: int) -> None:
        self._words[2] = max(self._words[2], count)

    @property
    def num_bytes(self) -> int:
        """Memory that the snapshots take."""
        return sum(os.fstat(memory).st_blocks * _BLOCK_BYTES for memory in self._memories)

    def write(
        self, step: int, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], facts: dict[str, Any]
    ) -> int:
        """Keep a snapshot; the one before stays where there is room.

        Args:
            step: committed steps.
            weights: as in a checkpoint.
            state: as in a checkpoint.
            facts: plain values.

        Returns:
            Its bytes; 0 if it was not kept, because there is room for one only, and that is lent.
        """
        tensors: dict[tuple, tuple[int, torch.Tensor]] = {}
        places: list[list] = []
        end = 0
        named: dict[str, list] = {"weights": [], "state": []}
        for role, held in (("weights", weights), ("state", state)):
            for name, tensor in held.items():
                same = tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())
                if same not in tensors or not tensor.numel():
                    tensors[same] = len(places), tensor
                    places.append([wire.name_of(tensor.dtype), list(tensor.shape), end])
                    end += align(tensor.numel() * tensor.element_size())
                named[role].append([name, tensors[same][0]])
        head = wire.pack({"step": step, "facts": facts, "places": places, **named})
        start = align(8 + len(head))
        number = self._next(start + end)
        if number is None:
            return 0
        serial = max(self._words[0], self._words[1]) + 1
        self._words[number] = 0
        memory = self._map(number, start + end)
        memory[: 8 + len(head)] = len(head).to_bytes(8, "little") + head
        for index, tensor in tensors.values():
            _place(memory, start, places[index]).copy_(tensor.detach())
        self._words[_STEP + number] = step
        self._words[_LENGTH + number] = start + end
        self._words[_FOLD + number] = fold(memory, start + end)
        self._words[number] = serial
        return start + end

    def withdraw(self, step: int) -> None:
        """Forget what was kept after `step`: it may hold what is wrong. Any worker may say so."""
        for number in range(2):
            if self._words[_STEP + number] == step:
                self._words[number] = 0

    def newest(self) -> Checkpoint | None:
        """Return the newest whole snapshot that is as it was written, or None.

        Its tensors lie in the snapshot's memory: copy them out.
        """
        self.damaged = []
        for number in sorted(range(2), key=lambda n: -self._words[n]):
            if not self._words[number]:
                continue
            saved = self._read(number)
            if saved is not None:
                return saved
            self.damaged.append(self._words[_STEP + number])
        return None

    def lend(self, slot: int) -> None:
        """Lend the newest snapshot, as the worker in `slot`: it stays as it is until `take_back`."""
        self._words[_LENDER] = slot
        self._words[_LENT] = 1 + self._newest

    @property
    def lender(self) -> int | None:
        """The slot of the worker that lent a snapshot; None if none is lent."""
        return self._words[_LENDER] if self._words[_LENT] else None

    def lent(self) -> Checkpoint | None:
        """Return the snapshot that is lent; None if it is not as it was written, or was withdrawn.

        Its tensors lie in the snapshot's memory.
        """
        number = self._words[_LENT] - 1
        return self._read(number) if self._words[number] else None

    def take_back(self) -> None:
        """Let the memory that was lent be written over."""
        self._words[_LENT] = 0

    def close(self) -> None:
        """Give the memory back."""
        self._words.release()
        self._control.close()
        self._maps.clear()
        for memory in self._memories:
            os.close(memory)

    @property
    def _newest(self) -> int:
        return 0 if self._words[0] > self._words[1] else 1

    def _read(self, number: int) -> Checkpoint | None:
        """Return what a memory holds, if it is as it was written."""
        memory = mmap.mmap(self._memories[number], 0)
        length = self._words[_LENGTH + number]
        if not 0 < length <= len(memory) or fold(memory, length) != self._words[_FOLD + number]:
            return None
        size = int.from_bytes(memory[:8], "little")
        head = wire.unpack(memory[8 : 8 + size])
        start = align(8 + size)
        tensors = [_place(memory, start, place) for place in head["places"]]
        weights, state = ({name: tensors[i] for name, i in head[role]} for role in ("weights", "state"))
        return Checkpoint(
            path=FROM_MEMORY, step=head["step"], weights=weights, state=state, facts=head["facts"], weights_digest=""
        )

    def _next(self, num_bytes: int) -> int | None:
        """Return which memory to write to; None if there is none."""
        left = available_bytes()
        is_roomy = left is None or _ROOMY * num_bytes < left or os.fstat(self._memories[1]).st_size > 0
        lent = self._words[_LENT] - 1
        if lent >= 0:
            return 1 - lent if is_roomy or lent == 1 else None
        return 1 - self._newest if is_roomy else 0

    def _map(self, number: int, num_bytes: int) -> mmap.mmap:
        memory = self._maps.get(number)
        if memory is None or len(memory) < num_bytes:
            # The ledger grows with every step, and a new map costs a fault for each of its pages. What is not written
            # to takes no memory.
            size = num_bytes + max(num_bytes // 8, _LEAST_ROOM)
            os.ftruncate(self._memories[number], -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
            memory = self._maps[number] = mmap.mmap(self._memories[number], 0)
        return memory


def _place(memory: mmap.mmap, start: int, place: list) -> torch.Tensor:
    """Return the tensor at `place`: (dtype, shape, offset from `start`)."""
    name, shape, offset = place
    dtype = wire.dtype_named(name)
    count = 1
    for size in shape:
        count *= size
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start + offset).view(shape)
