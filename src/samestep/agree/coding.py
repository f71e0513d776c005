"""A codec at work on one optimizer's parameters: what each replica encodes, and what the codec keeps of each.

What a codec keeps (a residual, PowerSGD's matrix) belongs to a replica and a parameter. It lies in memory that the
workers of a host share, so that any of them can play the replica next, and is changed only when the update or round
that it belongs to is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from samestep.codecs import Codec, Exact, Feedback, State
from samestep.core.group import Group, align
from samestep.core.model import Model
from samestep.core.weights import placed
from samestep.storage import wire


class Coding:
    """The codec of one optimizer's parameters, as one worker sees it.

    Attributes:
        codec: with error feedback, where it leaves something out.
    """

    def __init__(self, codec: Codec, model: Model, number: int, group: Group, lone: int | None = None):
        """Begin anew. Collective.

        Args:
            codec: the user's.
            model: what was replicated.
            number: of the optimizer in it.
            group: the workers.
            lone: encodes for one party of this number, by the first worker, instead of for the replicas.
        """
        self.codec = codec if codec.unbiased or isinstance(codec, Feedback) else Feedback(codec)
        self._key = model.seed, number
        self._number = number
        self._model = model
        self._group = group
        self._lone = lone
        self._tensors = model.trained[number].weights.views
        self._fresh = [self.codec.fresh(v.shape, v.dtype) for v in self._tensors]
        self._num_bytes = sum(align(t.numel() * t.element_size()) for s in self._fresh for t in s.values())
        self._memories: dict[int, torch.Tensor] = {}
        self._states: dict[int, list[State]] = {}
        self._pending: dict[tuple[int, int], State] = {}
        self._open()
        if group.worker.is_first or not group.shares_memory:
            self.begin()
        group.exchange(b"")

    @property
    def is_exact(self) -> bool:
        """Whether nothing is lost."""
        return isinstance(self.codec, Exact)

    def begin(self) -> None:
        """Forget what was kept."""
        for states in self._states.values():
            for state, fresh in zip(states, self._fresh, strict=True):
                for name, value in fresh.items():
                    state[name].copy_(value)

    def num_bytes(self, step: int, parameters: Sequence[int]) -> int:
        """Return the bytes that one replica's part of a step takes."""
        codec = self.codec.at(step)
        return sum(codec.num_bytes(self._tensors[i].shape, self._tensors[i].dtype) for i in parameters)

    def encode(self, step: int, replica: int, index: int, tensor: torch.Tensor) -> torch.Tensor:
        """Return the bytes (uint8) of one parameter's tensor; what is kept changes with `commit`."""
        state = dict(self._states[replica][index])
        payload = self.codec.at(step).encode(tensor, (*self._key, step, replica, index), state)
        if state:
            self._pending[replica, index] = state
        return payload

    def decode(self, step: int, index: int, payload: torch.Tensor) -> torch.Tensor:
        """Return what the bytes of one parameter's tensor stand for."""
        like = self._tensors[index]
        return self.codec.at(step).decode(payload, like.shape, like.dtype)

    def through(self, step: int, replica: int, index: int, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor as others will see it."""
        return tensor if self.is_exact else self.decode(step, index, self.encode(step, replica, index, tensor))

    def commit(self, parameters: Sequence[int] | None = None) -> None:
        """Keep what came of all that was encoded since the last time; of some parameters, or of all."""
        chosen = None if parameters is None else set(parameters)
        for replica, index in list(self._pending):
            if chosen is None or index in chosen:
                kept = self._states[replica][index]
                for name, value in self._pending.pop((replica, index)).items():
                    kept[name].copy_(value)

    def drop(self) -> None:
        """Forget what was encoded since the last `commit`."""
        self._pending.clear()

    def decoded(self, step: int, message: bytes, replicas: Sequence[int], parameters: Sequence[int]) -> dict[int, list]:
        """Return, for each of a worker's replicas, what the payloads in its message stand for."""
        codec, tensors = self.codec.at(step), [self._tensors[index] for index in parameters]
        flat = torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else torch.empty(0, dtype=torch.uint8)
        each = self.num_bytes(step, parameters)
        return {
            replica: codec.decode_all(flat[number * each : (number + 1) * each], tensors)
            for number, replica in enumerate(replicas)
        }

    def reseat(self) -> None:
        """Take the replicas that fall to this worker now. Collective."""
        self._open()

    def state(self) -> dict[str, torch.Tensor]:
        """Return what is kept of all replicas, by name. Collective."""
        mine = {
            f"{replica}.{index}.{name}": tensor
            for replica, states in self._states.items()
            for index, state in enumerate(states)
            for name, tensor in state.items()
        }
        if self._num_bytes and not self._group.shares_memory:
            for message in self._group.exchange(wire.pack(mine)):
                mine.update(wire.unpack(message))
        return {name: mine[name] for name in sorted(mine)}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what `state` gave; without it, begin anew. Where memory is shared, one worker does it."""
        if not tensors:
            self.begin()
        for name, tensor in tensors.items():
            replica, index, key = name.split(".", 2)
            if int(replica) in self._states:
                self._states[int(replica)][int(index)][key].copy_(tensor)

    def _known(self) -> Sequence[int]:
        """Return the replicas of which this worker sees what is kept."""
        division, group = self._model.division, self._group
        if self._lone is not None:
            return [self._lone] if group.shares_memory or group.worker.is_first else []
        return range(division.num_replicas) if group.shares_memory else division.of(group.worker.rank)

    def _open(self) -> None:
        """Find the memory of what is kept."""
        for replica in self._known():
            states: list[State] = [{} for _ in self._fresh]
            if self._num_bytes:
                memory = self._group.allocate(self._num_bytes, f"codec {self._number} {replica}")
                offset = 0
                for state, fresh in zip(states, self._fresh, strict=True):
                    for name, like in fresh.items():
                        state[name] = placed(memory, offset, like.contiguous())
                        offset += align(like.numel() * like.element_size())
            self._states[replica] = states
