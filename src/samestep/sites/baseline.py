"""The weights that a site's next contribution is measured from, in memory that the workers of a host share.

anchor   weights that the meeting place gave last, in float32 at least
mark     the site's weights when it gave something, where it went on without an answer
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from samestep.core.group import Group, align
from samestep.core.model import Trained
from samestep.core.weights import placed, sum_dtype

_ROLES = ("anchor", "mark")


class Baseline:
    """Of one optimizer's parameters, as one worker sees it. Where memory is not shared, the first worker has it.

    Attributes:
        anchor, mark: one tensor per parameter.
    """

    def __init__(self, trained: Trained, number: int, group: Group):
        """Make room. Collective.

        Args:
            trained: the optimizer.
            number: of it in the model.
            group: the workers.
        """
        self._trained = trained
        self._name = f"site {number}"
        self._group = group
        self.anchor: list[torch.Tensor] = []
        self.mark: list[torch.Tensor] = []
        self.reseat()

    @property
    def num_bytes(self) -> int:
        """Of both, on a host."""
        views = self._trained.weights.views
        return len(_ROLES) * sum(align(v.numel() * sum_dtype(v.dtype).itemsize) for v in views)

    def reseat(self) -> None:
        """Find the memory, in the group as it is now. Collective."""
        group, views = self._group, self._trained.weights.views
        if not group.shares_memory and not group.worker.is_first:
            return
        memory, offset = group.allocate(self.num_bytes, self._name), 0
        for role in _ROLES:
            tensors = []
            for view in views:
                dtype = sum_dtype(view.dtype)
                tensors.append(placed(memory, offset, view, dtype))
                offset += align(view.numel() * dtype.itemsize)
            setattr(self, role, tensors)

    def difference(self) -> list[torch.Tensor]:
        """Return anchor - weights, one tensor per parameter, in memory of its own."""
        return [a - v.to(a.dtype) for a, v in zip(self.anchor, self._trained.weights.views, strict=True)]

    def leave_mark(self) -> None:
        """Remember the weights as they are."""
        for mark, view in zip(self.mark, self._trained.weights.views, strict=True):
            mark.copy_(view)

    def land(self, weights: Sequence[torch.Tensor], since_mark: bool) -> None:
        """Go on from new weights.

        Args:
            weights: one tensor per parameter.
            since_mark: what was learned since the mark is added to them.
        """
        views = self._trained.weights.views
        for view, anchor, mark, new in zip(views, self.anchor, self.mark, weights, strict=True):
            if since_mark:
                view.copy_(new.to(anchor.dtype) + (view.to(anchor.dtype) - mark))
            else:
                view.copy_(new)
            anchor.copy_(new)
