"""Gradients of one optimizer's parameters, folded leaf by leaf while backward runs.

A hook on each parameter takes its gradient as soon as autograd has it, while it is still in cache, and adds it to
this worker's buffers in the order of the tree (`tree.Script`). The gradient itself is freed at once.

A leaf is the sum of all that arrives in its shard. A hook may fire more than once per shard, so the first shard in
which a parameter is seen counts arrivals and folds at the end of the shard. Parameters that arrive once are folded in
the hook from then on; the others always at the end.

Each leaf is looked at before it is added: a NaN in a sum could not be traced to its replica.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.hooks import RemovableHandle

from samestep.core.audit import checksum
from samestep.core.finite import Finite, Found, chunks_of
from samestep.core.group import ALIGNMENT, GradientArea
from samestep.core.tree import Leaf, Script
from samestep.core.weights import Weights, placed, sum_dtype
from samestep.errors import UsageError

_COUNTING, _ONCE, _MANY = range(3)


class _Sums:
    """Buffers of one parameter: a partial sum each, or nothing."""

    __slots__ = (
        "arrivals",
        "chunks",
        "dtype",
        "full",
        "given",
        "gradients",
        "hook",
        "index",
        "mode",
        "name",
        "parameter",
        "places",
        "stride",
    )

    def __init__(self, gradients: Gradients, index: int, parameter: torch.nn.Parameter, places: dict, many: bool):
        self.gradients = gradients
        self.index = index
        self.name = gradients.names[index]
        self.parameter = parameter
        self.dtype = sum_dtype(parameter.dtype)
        self.places = places
        self.chunks = {number: chunks for number, place in places.items() if (chunks := chunks_of(place)) is not None}
        self.stride = parameter.stride()
        self.full: list[torch.Tensor | None] = [None] * gradients.script.num_buffers
        self.hook: RemovableHandle | None = None
        self.arrivals = 0
        self.given: torch.Tensor | None = None
        self.mode = _MANY if many else _COUNTING

    def arrive(self, parameter: torch.Tensor) -> None:
        """Autograd's hook: the gradient of this parameter is complete for one backward call."""
        self.arrivals += 1
        if self.mode != _ONCE:
            return
        if self.arrivals > 1:
            raise UsageError(
                f"The gradient of {self.name!r} arrived twice in one shard, but once in its first shard, so it was "
                f"folded already. Call run.replicate(..., arrivals='many') (folds at the end of each shard)."
            )
        self.fold(self.gradients.leaf)

    def fold(self, leaf: Leaf | None) -> None:
        """Add the parameter's gradient as the current leaf, and complete the sums that it ends; None: drop it."""
        gradient = self.parameter.grad if self.given is None else self.given
        if gradient is not None:
            self.parameter.grad = self.given = None
            if gradient.requires_grad:
                gradient = gradient.detach()
            if gradient.layout != torch.strided:
                raise UsageError(
                    f"The gradient of {self.name!r} is sparse, which cannot be added in the order of the tree. "
                    f"Use sparse=False in its Embedding."
                )
            if self.gradients.seen is not None:
                self.gradients.seen[self.index] = checksum(gradient)
            if leaf is not None:
                self.add_leaf(leaf.buffer, gradient)
                self.gradients.num_folded += 1
        if leaf is None:
            return
        for target, source in leaf.merges:
            done = self.full[source]
            if done is not None:
                self.add(target, done)
                self.full[source] = None

    def add_leaf(self, buffer: int, gradient: torch.Tensor) -> None:
        """Look at the gradient of the current leaf, and add it."""
        gradients = self.gradients
        chunks = self.chunks.get(buffer)
        if chunks is not None and self.full[buffer] is None and self._is_plain(gradient):
            gradients.finite.copy(gradients.shard, self.index, gradient, chunks)
            self.full[buffer] = self.places[buffer]
            return
        if gradients.hooked:
            gradients.finite.look(gradients.shard, self.index, gradient)
        self.add(buffer, gradient)

    def add(self, buffer: int, gradient: torch.Tensor) -> None:
        held = self.full[buffer]
        if held is not None:
            held.add_(gradient)
        elif buffer in self.places:
            self.full[buffer] = self.places[buffer].copy_(gradient)
        else:
            self.full[buffer] = self._own(gradient)

    def _is_plain(self, gradient: torch.Tensor) -> bool:
        """Return whether the gradient's memory is as it seems, so that NumPy can copy it."""
        alike = type(gradient) is torch.Tensor and gradient.dtype == self.dtype
        return alike and gradient.is_contiguous() and not gradient.is_neg()

    def _own(self, gradient: torch.Tensor) -> torch.Tensor:
        """Keep autograd's own tensor where its memory order is the parameter's: no copy."""
        if gradient.dtype != self.dtype:
            gradient = gradient.to(self.dtype)
        # Parameters are dense, so a gradient of the same strides is, too.
        if gradient.stride() == self.stride and gradient.data_ptr() % ALIGNMENT == 0:
            return gradient
        own = torch.empty_strided(
            self.parameter.shape, self.parameter.stride(), dtype=self.dtype, device=gradient.device
        )
        return own.copy_(gradient)


class Gradients:
    """One worker's part of one optimizer's gradients.

    Attributes:
        script: how this worker folds its leaves.
        names: one per parameter.
        shard: number of the current shard among this worker's.
        leaf: the leaf that the current shard is; None if its gradients count for nothing.
        seen: takes the checksum of each parameter's gradient in this shard, where that is asked for.
        num_folded: gradients folded in this pass.
        finite: what was seen in the gradients of this pass.
        hooked: whether gradients are folded while backward runs. A lone worker with one replica has nothing to add:
            its gradients can wait for the end of the shard, and are looked at together.
        is_many: whether every parameter is treated as one whose gradient arrives several times per shard.
    """

    def __init__(self, weights: Weights, script: Script, area: GradientArea | None, many: bool = False):
        """Hook the parameters.

        Args:
            weights: the parameters.
            script: the folding order of this worker's leaves.
            area: where nodes are kept, one buffer each; None for a lone worker. Other sums stay in autograd's own
                tensors, which saves a copy.
            many: treat every parameter as one whose gradient arrives several times per shard.
        """
        self.script = script
        self.names = weights.names
        self.shard = 0
        self.leaf: Leaf | None = script.leaves[0] if script.leaves else Leaf(0, ())
        self.seen: dict[int, int] | None = None
        self.num_folded = 0
        self.finite = Finite(weights.parameters)
        self.hooked = area is not None or len(script.leaves) > 1
        self.is_many = many
        self._sums: list[_Sums] = []
        for index, (parameter, offset) in enumerate(zip(weights.parameters, weights.layout.sum_offsets, strict=True)):
            places = {}
            if area is not None:
                dtype = sum_dtype(parameter.dtype)
                buffers = zip(script.node_buffers, area.mine, strict=True)
                places = {number: placed(memory, offset, parameter.data, dtype) for number, memory in buffers}
            self._sums.append(_Sums(self, index, parameter, places, many))
        self._num_trainable = 0
        self._before = 0

    def begin_pass(self) -> None:
        """Forget all sums."""
        self.finite.begin_pass()
        self.num_folded = self._num_trainable = 0
        self.seen = None
        empty = [None] * self.script.num_buffers
        for sums in self._sums:
            sums.full[:] = empty
            sums.arrivals = 0
            sums.parameter.grad = sums.given = None
            if sums.parameter.requires_grad:
                self._num_trainable += 1
                if sums.hook is None and self.hooked:
                    sums.hook = sums.parameter.register_post_accumulate_grad_hook(sums.arrive)

    def begin_shard(self, index: int) -> None:
        """Start the shard that is this worker's leaf number `index`."""
        self.shard = index
        self.leaf = self.script.leaves[index]
        self._before = self.num_folded

    def give(self, index: int, gradient: torch.Tensor) -> None:
        """Take `gradient` as that of parameter `index` in this shard, whatever arrives in backward.

        Only where parameters are treated as arriving many times.
        """
        self._sums[index].given = gradient

    def begin_aside(self) -> None:
        """Start a shard whose gradients count for nothing."""
        self.leaf = None
        self._before = self.num_folded

    def end_shard(self) -> None:
        """Fold what the hooks left, and complete the sums of parameters that this shard did not use."""
        if self.num_folded - self._before == self._num_trainable:
            for sums in self._sums:
                sums.arrivals = 0
            self.finite.end_shard()
            return
        for sums in self._sums:
            if sums.mode != _ONCE or not sums.arrivals:
                sums.fold(self.leaf)
                # What a shard of another worker does says nothing about this one's.
                if sums.mode == _COUNTING and sums.arrivals and self.leaf is not None:
                    sums.mode = _ONCE if sums.arrivals == 1 else _MANY
            sums.arrivals = 0
        self.finite.end_shard()

    def presence(self) -> bytes | None:
        """Return, for each node and parameter, 1 if any leaf of the node used the parameter; None if all did."""
        if self.num_folded == len(self._sums) * len(self.script.leaves):
            return None
        return bytes(s.full[buffer] is not None for buffer in self.script.node_buffers for s in self._sums)

    def missing(self, buffer: int) -> list[int]:
        """Return the parameters of which a buffer holds no sum."""
        return [s.index for s in self._sums if s.full[buffer] is None]

    def not_finite(self) -> Found:
        """Return this worker's shards in which a gradient is NaN or infinite, and which parameters'."""
        if not self.hooked:
            self.finite.look_at_all(self.held())
        return self.finite.found()

    def held(self) -> Sequence[torch.Tensor | None]:
        """Return the sums of a lone worker, one per parameter (None where no replica used it)."""
        buffer = self.script.node_buffers[0]
        return [s.full[buffer] for s in self._sums]

    def close(self) -> None:
        """Take the hooks off, and let the buffers go."""
        for sums in self._sums:
            if sums.hook is not None:
                sums.hook.remove()
        self._sums.clear()
