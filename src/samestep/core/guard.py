"""Finds weights that were changed outside `update` and `run.edit()`.

Weights are shared by the workers of a host, so an edit by user code would happen once per worker. Each worker looks at
what PyTorch knows (identity, address, version counter); owners also compare a few elements of what they own, since
writes through `.data`, NumPy or DLPack leave no trace in the version. Under `samestep verify` the weights are read-only
between updates, so that a write anywhere kills the worker, and its line is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from samestep.core.group import Group
from samestep.core.weights import Weights
from samestep.errors import EditedWeightsError

_SAMPLES_PER_PIECE = 8


class Guard:
    """Watches the weights of one worker."""

    def __init__(
        self,
        modules: Sequence[torch.nn.Module],
        weights: Sequence[Weights],
        protector: Group | None = None,
    ):
        """Watch `weights`; the places in `modules` where a parameter hangs are watched too.

        Args:
            modules: the replicated modules.
            weights: all that was moved into the group's memory.
            protector: the group, where the weights shall be read-only while nobody may write to them.
        """
        self._memories = [w.memory for w in weights]
        self._protector = protector
        self._named = [(name, p) for w in weights for name, p in zip(w.names, w.parameters, strict=True)]
        self._parameters = [p for _, p in self._named]
        self._addresses = [p.data_ptr() for p in self._parameters]
        watched = {id(p): name for name, p in self._named}
        self._hooks = [
            (owner._parameters, key, p, watched[id(p)])
            for module in modules
            for owner in module.modules()
            for key, p in owner._parameters.items()
            if p is not None and id(p) in watched
        ]
        self._samples = [_Samples(w) for w in weights if w.memory.device.type == "cpu"]
        self.accept()

    def accept(self) -> None:
        """Take the weights as they are now."""
        self._versions = [p._version for p in self._parameters]
        for samples in self._samples:
            samples.take()
        self._protect(True)

    def follow(self) -> None:
        """Take it that the parameters were pointed elsewhere."""
        self._addresses = [p.data_ptr() for p in self._parameters]
        self._versions = [p._version for p in self._parameters]

    def open(self) -> None:
        """Let the weights be written, until they are accepted."""
        self._protect(False)

    def accept_update(self) -> None:
        """Take the weights after an update, and let autograd know that they changed."""
        torch.autograd.graph.increment_version(self._parameters)
        self.accept()

    def check(self) -> None:
        """Compare with what was last accepted.

        Raises:
            EditedWeightsError: a weight was replaced or edited; names it.
        """
        self.check_traces()
        self.check_samples()

    def check_traces(self) -> None:
        """Look for edits that PyTorch knows of: the same on every worker.

        Raises:
            EditedWeightsError: a weight was replaced or edited; names it.
        """
        for place, key, parameter, name in self._hooks:
            if place.get(key) is not parameter:
                raise EditedWeightsError(f"{name!r} was replaced by another object after run.replicate. {_ADVICE}")
        # Compared as lists first: this runs in every step, for every parameter.
        if [p.data_ptr() for p in self._parameters] != self._addresses:
            name = next(n for (n, p), a in zip(self._named, self._addresses, strict=True) if p.data_ptr() != a)
            raise EditedWeightsError(f"The memory of {name!r} was replaced after run.replicate. {_ADVICE}")
        if [p._version for p in self._parameters] != self._versions:
            name = next(n for (n, p), v in zip(self._named, self._versions, strict=True) if p._version != v)
            raise EditedWeightsError(f"{name!r} was edited in place outside update. {_ADVICE}")

    def check_samples(self) -> None:
        """Look at a few elements of what this worker owns.

        Raises:
            EditedWeightsError: one of them changed; names its parameter.
        """
        for samples in self._samples:
            samples.check()

    def _protect(self, read_only: bool) -> None:
        if self._protector is not None:
            for memory in self._memories:
                self._protector.protect(memory, read_only)


_ADVICE = (
    "Workers share one copy of the weights, so such an edit would happen once per worker. "
    "Put it into `with run.edit():`, where it happens once."
)


class _Samples:
    """A few elements of each tensor that this worker owns."""

    def __init__(self, weights: Weights):
        run = weights.layout.runs[weights.rank]
        self._words = weights.memory[run.start : run.stop].view(torch.int32)
        positions: list[int] = []
        self._names: list[str] = []
        for chunk in weights.layout.chunks[weights.rank]:
            for piece in chunk:
                item = weights.layout.shapes[piece.parameter].item_bytes
                start = weights.layout.offsets[piece.parameter] - run.start + piece.start * item
                num_words = max(1, (piece.stop - piece.start) * item // 4)
                count = min(_SAMPLES_PER_PIECE, num_words)
                positions += [start // 4 + i * num_words // count for i in range(count)]
                self._names += [weights.names[piece.parameter]] * count
        self._index = torch.tensor(positions, dtype=torch.int64)
        self._taken = torch.empty(0)

    def take(self) -> None:
        self._taken = self._words.index_select(0, self._index)

    def check(self) -> None:
        now = self._words.index_select(0, self._index)
        if not torch.equal(now, self._taken):
            name = self._names[int((now != self._taken).nonzero()[0])]
            raise EditedWeightsError(f"{name!r} was edited in place outside update (through .data or alike). {_ADVICE}")
