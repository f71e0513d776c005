"""Replicas that train apart, as one worker sees them: whose shard is played, what its gradient is, its own step.

While a replica's shard is played, the user's parameters lie in that replica's own weights; else in those that all start
from. Gradients are held until the update, so that a shard can be played again if a worker dies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from samestep.agree.meeting import Request
from samestep.agree.own import Own
from samestep.core.group import Group
from samestep.core.model import Model
from samestep.core.randomness import seed_transform
from samestep.storage import wire

Gradients = list[torch.Tensor | None]


class Apart:
    """The replicas' own of one optimizer.

    Attributes:
        trained: the optimizer, and the weights that all start from.
        owns: what each replica has of its own; where memory is not shared, of those played here.
    """

    def __init__(self, model: Model, number: int, group: Group, has_anchors: bool = False):
        """Start all from the weights as they are. Collective.

        Args:
            model: what was replicated.
            number: of the optimizer in it.
            group: the workers.
            has_anchors: whether rounds may be under way for some steps.
        """
        self.trained = model.trained[number]
        self._model = model
        self._group = group
        known = range(model.division.num_replicas) if group.shares_memory else self.mine
        player_of = model.division.player_of
        self.owns = {r: Own(self.trained, r, player_of(r), group, str(number), has_anchors) for r in known}
        self._held: dict[int, Gradients] = {}
        group.exchange(b"")

    @property
    def mine(self) -> range:
        """The replicas that this worker plays."""
        return self._model.division.of(self._group.worker.rank)

    def begin_pass(self) -> None:
        """Forget all gradients."""
        self.leave()
        self._held.clear()
        for parameter in self.trained.weights.parameters:
            parameter.grad = None

    def enter(self, replica: int) -> None:
        """Let the user's parameters be those of a replica."""
        for parameter, view in zip(self.trained.weights.parameters, self.owns[replica].views, strict=True):
            parameter.data = view

    def leave(self) -> None:
        """Let the user's parameters be those that all start from."""
        for parameter, view in zip(self.trained.weights.parameters, self.trained.weights.views, strict=True):
            parameter.data = view

    def hold(self, replica: int) -> None:
        """Keep the gradients that have arrived as those of a replica."""
        parameters = self.trained.weights.parameters
        self._held[replica] = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None

    def norm(self, replica: int) -> float:
        """Return the norm of what is held of a replica."""
        found = [g for g in self._held[replica] if g is not None]
        return float(torch.nn.utils.get_total_norm(found)) if found else 0.0

    def not_finite(self, norms: Mapping[int, float]) -> list[list[int]]:
        """Return what is not finite: [replica, first parameter, last parameter, number of parameters]."""
        found = []
        for replica, norm in norms.items():
            held = () if math.isfinite(norm) else self._held[replica]
            bad = [i for i, g in enumerate(held) if g is not None and not bool(torch.isfinite(g).all())]
            found += [[replica, bad[0], bad[-1], len(bad)]] if bad else []
        return found

    def step(self, request: Request, norms: Mapping[int, float]) -> bytes:
        """Let replicas step by themselves; return what the other workers must know.

        Args:
            request: how.
            norms: of the gradients of each replica that steps.
        """
        told = {}
        for replica, norm in norms.items():
            notice = self.owns[replica].step(self._ready(request, replica, norm))
            if notice is not None:
                told[replica] = notice
        self._held.clear()
        return wire.pack(told) if told else b""

    def settle(self, frames: Sequence[bytes]) -> None:
        """Act on what `step` gave: on each worker, in rank order, or here where memory is not shared. Collective."""
        heard = [wire.unpack(frame) if frame else {} for frame in frames]
        for replica in sorted({r for notices in heard for r in notices} & self.owns.keys()):
            told = [notices.get(replica) for notices in heard]
            self.owns[replica].update.settle(told)

    def begin(self, replicas: Iterable[int]) -> None:
        """Let replicas go on from the weights that all start from."""
        for replica in replicas:
            self.owns[replica].begin(range(len(self.trained.weights.views)))

    def reseat(self) -> None:
        """Take the replicas that fall to this worker now. Collective."""
        for replica, own in self.owns.items():
            own.reseat(self._model.division.player_of(replica))

    def state(self, anchored: Sequence[int] = ()) -> tuple[dict[str, torch.Tensor], list[Any]]:
        """Return tensors by name, and [replica, numbers], of all replicas. Collective.

        Args:
            anchored: the parameters whose anchors are wanted too.
        """
        all_of: dict[int, list[Any]] = {r: [own.tensors(anchored), own.numbers()] for r, own in self.owns.items()}
        if not self._group.shares_memory:
            for message in self._group.exchange(wire.pack(all_of)):
                all_of.update(wire.unpack(message))
        tensors = {f"{r}.{name}": tensor for r in sorted(all_of) for name, tensor in all_of[r][0].items()}
        return tensors, [[r, all_of[r][1]] for r in sorted(all_of)]

    def load(self, tensors: Mapping[str, torch.Tensor], numbers: Sequence[Sequence[Any]]) -> None:
        """Take what `state` gave. Collective."""
        writes = self._group.worker.is_first or not self._group.shares_memory
        of: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            number, _, rest = name.partition(".")
            of.setdefault(int(number), {})[rest] = tensor
        known: dict[int, Sequence[Any]] = {replica: one for replica, one in numbers}  # noqa: C416
        for replica, own in self.owns.items():
            own.load(of.get(replica, {}), known.get(replica, ()), writes)

    def take_over(self, numbers: Sequence[Sequence[Any]]) -> None:
        """Take the numbers that `state` gave, in a worker that joins."""
        for replica, one in numbers:
            self.owns[replica].take_over(one)

    def _ready(self, request: Request, replica: int, norm: float) -> Gradients:
        """Return a replica's gradients, transformed and clipped."""
        gradients = self._held[replica]
        if request.transform is not None:
            for i, gradient in enumerate(gradients):
                if gradient is not None:
                    seed_transform(*request.seeds, i * self._model.division.num_replicas + replica)
                    gradients[i] = request.transform(self.trained.weights.names[i], gradient)
            norm = self.norm(replica)
        if request.clip_norm is not None and norm > request.clip_norm:
            scale = request.clip_norm / (norm + 1e-6)
            gradients = [g if g is None else g * scale for g in gradients]
        return gradients
