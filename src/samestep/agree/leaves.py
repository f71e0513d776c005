"""How the gradients of shards become leaves of the reduction tree: as they are, or as they come out of a codec.

With a codec each replica's gradient is encoded at the end of its shard, decoded, and added as it came out. Where memory
is not shared, what was encoded goes to every worker, and each makes the same update of everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from samestep.agree.coding import Coding
from samestep.agree.meeting import Request
from samestep.codecs import Codec
from samestep.core.calls import Calls
from samestep.core.group import Group
from samestep.core.model import Model


class Leaves:
    """Gradients as they are."""

    def __init__(self, model: Model):
        self._trained = model.trained

    def begin_pass(self) -> None:
        """Forget all gradients."""
        for trained in self._trained:
            trained.gradients.begin_pass()

    def begin_shard(self, index: int) -> None:
        """Begin the shard that is this worker's leaf number `index`."""
        for trained in self._trained:
            trained.gradients.begin_shard(index)

    def end_shard(self, replica: int) -> None:
        """Add the gradients of a replica's shard."""
        for trained in self._trained:
            trained.gradients.end_shard()

    def send(self, request: Request) -> None:
        """Let the workers that make the update have what they need. Collective."""

    def keep(self, request: Request) -> None:
        """Keep what the update leaves for later ones. Done before all meet at its commit: nobody goes on with half."""

    def made(self, request: Request) -> None:
        """Note that the update was made, or skipped."""

    def reseat(self) -> None:
        """Take the replicas that fall to this worker now. Collective."""

    def state(self) -> tuple[dict[str, torch.Tensor], Any]:
        """Return what is kept from step to step (see `Live.state`). Collective."""
        return {}, None

    def load(self, tensors: Mapping[str, torch.Tensor], values: Any) -> None:
        """Take what `state` gave. Collective."""

    def take_over(self, values: Any) -> None:
        """Take the plain values that `state` gave, in a worker that joins."""

    def num_bytes(self) -> int | None:
        """Return the bytes that one replica has encoded so far; None as gradients are."""
        return None


class CodedLeaves(Leaves):
    """Gradients as they come out of a codec."""

    def __init__(self, codec: Codec, model: Model, group: Group, calls: Calls):
        """Begin anew. Collective."""
        super().__init__(model)
        self._group = group
        self._calls = calls
        self._codings = [Coding(codec, model, number, group) for number in range(len(model.trained))]
        self._updates = [0] * len(model.trained)
        self._payloads: list[dict[int, list[torch.Tensor | None]]] = [{} for _ in model.trained]

    def begin_pass(self) -> None:
        super().begin_pass()
        for coding, payloads in zip(self._codings, self._payloads, strict=True):
            coding.drop()
            payloads.clear()

    def begin_shard(self, index: int) -> None:
        if self._group.shares_memory:
            super().begin_shard(index)

    def end_shard(self, replica: int) -> None:
        for number, (trained, coding) in enumerate(zip(self._trained, self._codings, strict=True)):
            step, payloads = self._updates[number], self._payloads[number].setdefault(replica, [])
            for index, parameter in enumerate(trained.weights.parameters):
                gradient, parameter.grad = parameter.grad, None
                if self._group.shares_memory:
                    if gradient is not None:
                        trained.gradients.give(index, coding.through(step, replica, index, gradient))
                else:
                    payloads.append(None if gradient is None else coding.encode(step, replica, index, gradient))
        if self._group.shares_memory:
            super().end_shard(replica)

    def send(self, request: Request) -> None:
        if self._group.shares_memory:
            return
        number = request.optimizer
        gradients, coding, step = self._trained[number].gradients, self._codings[number], self._updates[number]
        used = {r: [i for i, p in enumerate(of) if p is not None] for r, of in sorted(self._payloads[number].items())}
        sent = [p for r in used for p in self._payloads[number][r] if p is not None]
        frame = b"".join(bytes(payload.numpy().data) for payload in sent)
        gradients.begin_pass()
        for theirs, message in self._calls.meet("step.update (send)", request.where, list(used.items()), frame):
            start = 0
            for replica, indices in theirs:
                stop = start + coding.num_bytes(step, indices)
                self._fold(number, replica, indices, message[start:stop])
                start = stop

    def keep(self, request: Request) -> None:
        self._codings[request.optimizer].commit()

    def made(self, request: Request) -> None:
        self._codings[request.optimizer].drop()
        self._updates[request.optimizer] += 1

    def reseat(self) -> None:
        for coding in self._codings:
            coding.reseat()

    def state(self) -> tuple[dict[str, torch.Tensor], Any]:
        states = [coding.state() for coding in self._codings]
        tensors = {f"{number}.{name}": t for number, state in enumerate(states) for name, t in state.items()}
        return tensors, self._updates

    def load(self, tensors: Mapping[str, torch.Tensor], values: Any) -> None:
        if self._group.worker.is_first or not self._group.shares_memory:
            for number, coding in enumerate(self._codings):
                prefix = f"{number}."
                coding.load({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        self.take_over(values)
        self._group.exchange(b"")

    def take_over(self, values: Any) -> None:
        self._updates = list(values) if values is not None else [0] * len(self._updates)

    def num_bytes(self) -> int | None:
        return sum(
            coding.num_bytes(step, range(len(trained.weights.views)))
            for coding, updates, trained in zip(self._codings, self._updates, self._trained, strict=True)
            for step in range(updates)
        )

    def _fold(self, number: int, replica: int, indices: Sequence[int], message: bytes) -> None:
        """Add what a replica's payloads stand for, as its leaf."""
        gradients, coding = self._trained[number].gradients, self._codings[number]
        gradients.begin_shard(replica)
        decoded = coding.decoded(self._updates[number], message, [replica], indices)[replica]
        for index, gradient in zip(indices, decoded, strict=True):
            gradients.give(index, gradient)
        gradients.end_shard()
