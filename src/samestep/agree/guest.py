"""The one client that a worker plays now: weights of its own, and an optimizer that knows nothing of earlier ones.

While it is played, the user's parameters lie in its weights; else in those that all start from.
"""

from __future__ import annotations

import torch

from samestep.core.group import aligned_zeros
from samestep.core.model import Trained
from samestep.core.optimizers import bare_copy
from samestep.core.weights import placed, sum_dtype

Difference = list[torch.Tensor | None]
"""What a client did, one flat tensor per parameter; None where it does not train one."""


class Guest:
    """Weights and an optimizer, taken over by one client after another."""

    def __init__(self, trained: Trained, proximal: float):
        """Make room for one client.

        Args:
            trained: the user's optimizer, and the weights that all start from.
            proximal: how strongly a client is drawn back to where it started (mu of FedProx: Li et al. 2020).
        """
        self._trained = trained
        self._proximal = proximal
        weights = trained.weights
        self._memory = aligned_zeros(weights.layout.num_bytes, str(weights.memory.device))
        pairs = zip(weights.views, weights.layout.offsets, strict=True)
        self._views = [placed(self._memory, offset, view) for view, offset in pairs]
        self._parameters = [torch.nn.Parameter(view.detach(), requires_grad=False) for view in self._views]
        self._optimizer = trained.optimizer

    def enter(self) -> None:
        """Let a client begin, from the weights that all start from; the user's parameters are its own."""
        weights = self._trained.weights
        self._memory.copy_(weights.memory)
        own = {id(p): mine for p, mine in zip(weights.parameters, self._parameters, strict=True)}
        # Made anew, since an optimizer may keep counts on itself. Settings are as a scheduler has left them.
        self._optimizer = bare_copy(self._trained.optimizer)
        self._optimizer.param_groups = [
            {**group, "params": [own[id(p)] for p in group["params"]]} for group in self._trained.optimizer.param_groups
        ]
        for parameter, view in zip(weights.parameters, self._views, strict=True):
            parameter.data = view
            parameter.grad = None

    def leave(self) -> None:
        """Let the user's parameters be those that all start from."""
        for parameter, view in zip(self._trained.weights.parameters, self._trained.weights.views, strict=True):
            parameter.data = view
            parameter.grad = None

    def step(self) -> None:
        """Let the client make a step of its optimizer, with the gradients that have arrived."""
        weights = self._trained.weights
        for parameter, mine, start in zip(weights.parameters, self._parameters, weights.views, strict=True):
            mine.grad, parameter.grad = parameter.grad, None
            if self._proximal and mine.grad is not None:
                mine.grad = mine.grad.add(mine.data - start, alpha=self._proximal)
        with torch.no_grad():
            type(self._optimizer).step(self._optimizer)
        for mine in self._parameters:
            mine.grad = None

    def difference(self) -> Difference:
        """Return how far the weights that all start from are ahead of the client's, in the dtype of gradient sums."""
        found: Difference = []
        weights = self._trained.weights
        for parameter, start, own in zip(weights.parameters, weights.views, self._views, strict=True):
            if not parameter.requires_grad:
                found.append(None)
                continue
            dtype = sum_dtype(start.dtype)
            # In memory order: dense tensors of the same strides.
            found.append((start.to(dtype) - own.to(dtype)).as_strided((start.numel(),), (1,)))
        return found
