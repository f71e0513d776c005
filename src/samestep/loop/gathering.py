"""Losses over the whole batch: rows of all shards, put together in replica order.

A contrastive loss compares every sample of the batch with every other. So the shards of a pass are played twice: first
without gradients, to learn the rows of all; then in earnest, where each shard sees the rows of the others as they are,
and its own with their graph. The loss is the same in every shard, and the sum of the shards' gradients is that of one
big batch (as in GradCache: Gao et al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from samestep.core.calls import Calls, line_of_user
from samestep.errors import UsageError
from samestep.storage import wire


class Gathering:
    """The rows of one pass, as one worker sees them.

    Attributes:
        is_first: whether shards are being played to learn their rows.
    """

    def __init__(self) -> None:
        self.is_first = False
        self._rows: dict[int, list[torch.Tensor]] = {}
        self._number = 0

    def begin(self) -> None:
        """Begin to learn rows."""
        self.is_first = True
        self._rows = {}

    def begin_shard(self) -> None:
        """Begin a shard."""
        self._number = 0

    def share(self, calls: Calls) -> None:
        """Let every worker know all rows. Collective."""
        self.is_first = False
        frame = wire.pack({replica: [t.cpu() for t in rows] for replica, rows in self._rows.items()})
        for _, message in calls.meet("step.gather", line_of_user(), None, frame):
            self._rows.update(wire.unpack(message))

    def rows(self, replica: int, own: torch.Tensor) -> torch.Tensor:
        """Return the rows of all shards; while they are being learned, those of this shard.

        Args:
            replica: whose shard is being played.
            own: the rows of its shard, (rows, ...).

        Raises:
            UsageError: shards gave rows of other shapes, or other numbers of times, than the first time.
        """
        if not isinstance(own, torch.Tensor) or not own.dim():
            raise UsageError("step.gather needs a tensor with one row per sample (or item) of the shard.")
        number, self._number = self._number, self._number + 1
        if self.is_first:
            self._rows.setdefault(replica, []).append(own.detach())
            return own
        parts = []
        for other in sorted(self._rows):
            if number >= len(self._rows[other]):
                raise UsageError(
                    f"step.gather was called more often for replica {replica} than for replica {other}, or than the "
                    f"first time. Call it for every shard alike."
                )
            parts.append(own if other == replica else self._rows[other][number].to(own.device))
        _check(parts, replica, self._rows[replica][number])
        return torch.cat(parts)


def _check(parts: Sequence[torch.Tensor], replica: int, before: torch.Tensor) -> None:
    own = next(p for p in parts if p.requires_grad or p.shape == before.shape)
    if any(p.shape[1:] != own.shape[1:] or p.dtype != own.dtype for p in parts):
        raise UsageError(
            f"step.gather was given rows of {[(tuple(p.shape), str(p.dtype)) for p in parts]}. All but the number of "
            f"rows must be the same in every shard, and when a shard is played again (replica {replica})."
        )
