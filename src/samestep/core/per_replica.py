"""State of each replica that a script keeps from step to step: recurrent state, environments, noise of its own.

It belongs to the replica, not to the worker that plays it: it lies in memory that the workers of a host share, is in
every checkpoint, and goes with the replica when that is played elsewhere. What a shard changes counts once the update
of its step is made; a shard that is played again starts from what there was before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from samestep.core.division import Division
from samestep.core.group import Group, align
from samestep.core.randomness import seed_evaluation
from samestep.core.weights import placed
from samestep.errors import MismatchError, UsageError
from samestep.storage import wire

Make = Callable[[int], Mapping[str, torch.Tensor]]


class PerReplica:
    """What `run.per_replica` returns. Inside a shard, `state["hidden"]` is that of the replica whose shard it is."""

    def __init__(self, make: Make, seeds: tuple[int, int], number: int, division: Division, group: Group):
        """Make the state of every replica. Collective.

        Args:
            make: replica -> tensors by name; of the same shapes and dtypes for every replica.
            seeds: what it draws depends on these, and the replica.
            number: tells it from others of the run.
            division: who plays which replica.
            group: the workers.

        Raises:
            UsageError: `make` returned something else.
        """
        self._number = number
        self._group = group
        self._division = division
        self._here: dict[str, torch.Tensor] | None = None
        self._pending: dict[int, dict[str, torch.Tensor]] = {}
        made = {}
        for replica in range(division.num_replicas):
            seed_evaluation(*seeds, replica)
            made[replica] = _checked(make(replica))
        self._like = made[0]
        for replica, tensors in made.items():
            if _shapes(tensors) != _shapes(self._like):
                raise UsageError(
                    f"The function given to run.per_replica made {_shapes(tensors)} for replica {replica}, and "
                    f"{_shapes(self._like)} for replica 0. Make the same names, shapes and dtypes for all."
                )
        self._kept: dict[int, dict[str, torch.Tensor]] = {}
        self.reseat(division)
        if group.worker.is_first or not group.shares_memory:
            self._set(made)
        group.exchange(b"")

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor of the replica whose shard is being played; write to it in place.

        Raises:
            UsageError: called outside of a shard. KeyError: there is none of this name.
        """
        return self._now()[name]

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        """Set a tensor of the replica whose shard is being played; it keeps a copy without gradients."""
        self._now()[name].copy_(value.detach())

    def begin_pass(self) -> None:
        """Forget what the shards of a pass have changed."""
        self._here = None
        self._pending.clear()

    def begin_shard(self, replica: int) -> None:
        """Let the state be that of a replica."""
        self._here = {name: tensor.clone() for name, tensor in self._kept[replica].items()}

    def end_shard(self, replica: int, counts: bool) -> None:
        """Note what the shard has changed, if it counts."""
        if self._here is not None and counts:
            self._pending[replica] = self._here
        self._here = None

    def commit(self) -> None:
        """Keep what the shards of a pass have changed. Collective where memory is shared."""
        self._set(self._pending)
        self._pending = {}
        if self._group.shares_memory:
            # After a death in the middle of it nobody may go on with half of it.
            self._group.exchange(b"")

    def reseat(self, division: Division) -> None:
        """Take the replicas that fall to this worker now. Collective."""
        self._division = division
        num_bytes = sum(align(t.numel() * t.element_size()) for t in self._like.values())
        shared = self._group.shares_memory
        for replica in range(division.num_replicas) if shared else division.of(self._group.worker.rank):
            memory = self._group.allocate(max(num_bytes, 1), f"per replica {self._number} {replica}")
            offset, tensors = 0, {}
            for name, like in self._like.items():
                tensors[name] = placed(memory, offset, like.contiguous())
                offset += align(like.numel() * like.element_size())
            self._kept[replica] = tensors

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the state of all replicas by name. Collective."""
        kept = dict(self._kept)
        if not self._group.shares_memory:
            for message in self._group.exchange(wire.pack(kept)):
                kept.update(wire.unpack(message))
        return {f"{self._number}.{r}.{name}": t for r in sorted(kept) for name, t in kept[r].items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what `tensors` gave for all of a run's states.

        Raises:
            MismatchError: it was of something else.
        """
        writes = self._group.worker.is_first or not self._group.shares_memory
        for replica, kept in self._kept.items():
            for name, mine in kept.items():
                theirs = tensors.get(f"{self._number}.{replica}.{name}")
                if theirs is None or (theirs.shape, theirs.dtype) != (mine.shape, mine.dtype):
                    raise MismatchError(
                        f"The checkpoint holds no state {name!r} of shape {tuple(mine.shape)}, {mine.dtype}, for "
                        f"replica {replica}. Let run.per_replica make what it made then, or start anew elsewhere."
                    )
                if writes:
                    mine.copy_(theirs)

    def _now(self) -> dict[str, torch.Tensor]:
        if self._here is None:
            raise UsageError(
                "State of a replica was asked for outside of `for batch in step`, where no replica is played."
            )
        return self._here

    def _set(self, values: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        for replica, tensors in values.items():
            for name, tensor in self._kept.get(replica, {}).items():
                tensor.copy_(tensors[name])


def _checked(made: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not isinstance(made, Mapping) or not all(isinstance(t, torch.Tensor) for t in made.values()):
        raise UsageError("The function given to run.per_replica must return a dict of tensors, by name.")
    return {str(name): tensor.detach() for name, tensor in made.items()}


def _shapes(tensors: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {tuple(t.shape)} {wire.name_of(t.dtype)}" for name, t in tensors.items())
