"""What one replica has of its own where replicas train by themselves: weights, and an optimizer with its state.

It lies in memory that the workers of a host share, so that any of them can play the replica next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from samestep.core.group import Group, Solo
from samestep.core.layout import Layout, lay_out
from samestep.core.model import Trained
from samestep.core.optimizers import bare_copy, settings_of
from samestep.core.weights import placed, sum_dtype
from samestep.core.whole_update import WholeUpdate


class Own:
    """One replica's own, as one worker sees it.

    Attributes:
        parameters: its weights; one per parameter of the user's optimizer.
        views: other handles on the same memory.
        anchors: its weights as they were where a round began that is still under way.
        layout: where they lie; all are owned by the worker that plays the replica.
        update: its optimizer.
    """

    def __init__(self, trained: Trained, replica: int, player: int, group: Group, name: str, has_anchors: bool = False):
        """Start from the weights as they are now. Collective where memory is shared; else only its player does it.

        Args:
            trained: the user's optimizer and its parameters.
            replica: whose own it is.
            player: the worker that plays it.
            group: the workers.
            name: tells the memories of one optimizer from those of others.
            has_anchors: whether there is room for anchors.
        """
        self._trained = trained
        self._group = group if group.shares_memory else Solo(group.worker)
        self._name = f"{name} {replica}"
        self._shapes = trained.weights.layout.shapes
        self._optimizer = bare_copy(trained.optimizer)
        self.parameters = [torch.nn.Parameter(p.data, p.requires_grad) for p in trained.weights.parameters]
        number = {id(p): i for i, p in enumerate(trained.weights.parameters)}
        self._optimizer.param_groups = [
            {**group, "params": [self.parameters[number[id(p)]] for p in group["params"]]}
            for group in trained.optimizer.param_groups
        ]
        self._followed = settings_of(trained.optimizer)
        self.views: list[torch.Tensor] = []
        self.anchors: list[torch.Tensor] = []
        self._has_anchors = has_anchors
        self._memory = torch.empty(0)
        self.layout = self._layout(player)
        self._open()
        self.begin(range(len(self.parameters)))
        self.update = WholeUpdate(self._optimizer, self, self._group, f"own state {self._name}")
        state = trained.optimizer.state
        held = {i: dict(state[p]) for i, p in enumerate(trained.weights.parameters) if state.get(p)}
        if held:
            self.update.load(held)

    def reseat(self, player: int) -> None:
        """Let another worker play it. Collective."""
        self.layout = self._layout(player)
        self._open()
        self.update.reseat()

    def begin(self, indices: Sequence[int]) -> None:
        """Set some weights to those that all start from."""
        for index in indices:
            self.views[index].copy_(self._trained.weights.views[index])

    def anchor(self, indices: Sequence[int]) -> None:
        """Keep some weights as they are now."""
        for index in indices:
            self.anchors[index].copy_(self.views[index])

    def go_on(self, indices: Sequence[int]) -> None:
        """Set some weights to those that all start from, and what it did since `anchor` on top."""
        for index in indices:
            start, view = self._trained.weights.views[index], self.views[index]
            dtype = sum_dtype(start.dtype)
            view.copy_(start.to(dtype) + (view.to(dtype) - self.anchors[index].to(dtype)))

    def difference(self, index: int, anchored: bool = False) -> torch.Tensor:
        """Return how far the weights that all start from are ahead of its own, in the dtype of gradient sums.

        Args:
            index: of the parameter.
            anchored: of its own as they were at `anchor`, not as they are now.
        """
        start, own = self._trained.weights.views[index], (self.anchors if anchored else self.views)[index]
        dtype = sum_dtype(start.dtype)
        return start.to(dtype) - own.to(dtype)

    def step(self, gradients: Sequence[torch.Tensor | None]) -> Any:
        """Step its optimizer; return what the other workers must know (see `Update.notice`).

        Args:
            gradients: one per parameter, of its shape; None leaves it as it is.
        """
        self._follow()
        flat = {}
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                view = self.views[index]
                if gradient.stride() != view.stride():
                    gradient = torch.empty_strided(view.shape, view.stride(), dtype=gradient.dtype).copy_(gradient)
                flat[index] = gradient
        self.update.apply_ready(flat)
        return self.update.notice()

    def tensors(self, anchored: Sequence[int] = ()) -> dict[str, torch.Tensor]:
        """Return its weights and optimizer state by name; of the last only what this worker sees.

        Args:
            anchored: the parameters whose anchors are wanted too.
        """
        found = {f"weights.{i}": view for i, view in enumerate(self.views)}
        found |= {f"anchors.{i}": self.anchors[i] for i in anchored}
        for index, values in self.update.full_state().items():
            found |= {f"state.{index}.{k}": v for k, v in values.items() if isinstance(v, torch.Tensor)}
        return found

    def numbers(self) -> list[list[Any]]:
        """Return [parameter, key, number] for the numbers in its optimizer's state."""
        state = self._optimizer.state
        return [
            [index, key, value]
            for index, p in enumerate(self.parameters)
            for key, value in state.get(p, {}).items()
            if not isinstance(value, torch.Tensor)
        ]

    def load(self, tensors: Mapping[str, torch.Tensor], numbers: Sequence[Sequence[Any]], writes: bool) -> None:
        """Take what `tensors` and `numbers` gave. Collective where memory is shared; one worker `writes` there."""
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            index, _, key = rest.partition(".")
            if kind == "state":
                state.setdefault(int(index), {})[key] = tensor
            elif writes:
                (self.anchors if kind == "anchors" else self.views)[int(index)].copy_(tensor)
        for index, key, value in numbers:
            state.setdefault(index, {})[key] = value
        self.update.load(state)

    def take_over(self, numbers: Sequence[Sequence[Any]]) -> None:
        """Take the numbers in the optimizer's state, in a worker that joins."""
        for index, key, value in numbers:
            self._optimizer.state[self.parameters[index]][key] = value

    def _follow(self) -> None:
        """Take what has changed in the settings of the user's optimizer: a scheduler's work."""
        now = settings_of(self._trained.optimizer)
        for mine, group, new, old in zip(
            self._optimizer.param_groups, self._trained.optimizer.param_groups, now, self._followed, strict=True
        ):
            mine.update({k: group[k] for k in new if k not in old or new[k] != old[k]})
        self._followed = now

    def _layout(self, player: int) -> Layout:
        layout = lay_out(self._shapes, 1)
        size = self._group.worker.size
        owner = player if size > 1 else 0
        return replace(layout, chunks=tuple(layout.chunks[0] if w == owner else () for w in range(size)))

    def _open(self) -> None:
        """Find the memory, and point to it."""
        layout, weights = self.layout, self._trained.weights
        end = layout.num_bytes
        memory = self._group.allocate(end * (2 if self._has_anchors else 1), f"own weights {self._name}")
        if self._memory.data_ptr() == memory.data_ptr():
            return
        self._memory = memory
        self.views = [placed(memory, o, v) for v, o in zip(weights.views, layout.offsets, strict=True)]
        if self._has_anchors:
            self.anchors = [placed(memory, end + o, v) for v, o in zip(weights.views, layout.offsets, strict=True)]
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.data = view.detach()
