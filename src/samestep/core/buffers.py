"""Buffers of modules (BatchNorm's statistics and alike): each shard starts from the step's, then they are merged.

After a pass, floating buffers are the mean over the replicas that had samples, weighted by samples, added in replica
order in float64; integer ones are those of the first such replica. Elements on which all replicas agree are kept to
the bit.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

from samestep.core.division import Division
from samestep.core.group import Group, align, aligned_zeros
from samestep.errors import SettingsError

Rule = Literal["mean", "first"]
Segment = tuple[slice, torch.dtype | None]
"""Bytes of buffers, and the dtype of the mean that they become; None: those of the first count."""


class Buffers:
    """The buffers of all replicated modules, as one worker sees them.

    Attributes:
        num_bytes: of one replica's.
        segments: which of their bytes are merged in which way.
        own: what all replicas have kept, uint8; empty unless they are apart. Where memory is not shared, what this
            worker's have.
    """

    def __init__(
        self,
        modules: Sequence[tuple[str, torch.nn.Module]],
        group: Group,
        num_replicas: int,
        rule: Rule | Mapping[str, Rule] = "mean",
        apart: bool = False,
    ):
        """Move the buffers into one memory of this worker. Collective.

        Args:
            modules: (prefix of names, module).
            group: for the place where replicas' buffers meet.
            num_replicas: number of replicas.
            rule: "mean" or "first", or rules by name pattern ("*.weight_u": "first"); names without a rule: "mean".
            apart: every replica keeps its own from step to step (`keep`), until they are merged.
        """
        self._rules = {"*": rule} if isinstance(rule, str) else dict(rule)
        for wanted in self._rules.values():
            if wanted not in ("mean", "first"):
                raise SettingsError(
                    f"You set buffers={rule!r}; a rule is 'mean' or 'first', or a dict of them by name."
                )
        self._slots: list[tuple[dict, str, torch.Tensor]] = []
        entries = _find(modules, self._rules)
        self.segments: list[Segment] = []
        offsets, end = [], 0
        for dtype, _, _, _, buffer in entries:
            offsets.append(end)
            stop = end + align(buffer.numel() * buffer.element_size())
            self.segments.append((slice(end, stop), dtype))
            end = stop
        self.segments = _joined(self.segments)
        self.num_bytes = end
        self.own = torch.empty(0, dtype=torch.uint8)
        self._group = group
        if not end:
            return
        device = group.worker.device
        self._memory, self._start = aligned_zeros(end, device), aligned_zeros(end, device)
        self._placed = []
        for (_, _, home, key, buffer), offset in zip(entries, offsets, strict=True):
            flat = self._memory[offset : offset + buffer.numel() * buffer.element_size()]
            # Through .data each has a version counter of its own: else writing one buffer would make autograd believe
            # that all others, which a layer before may have saved for backward, had changed.
            view = flat.view(buffer.dtype).view(buffer.shape).data
            view.copy_(buffer)
            home[key] = view
            self._placed.append((home, key, view))
        self._apart = apart
        self._dirty = False
        self.reseat(Division.even(group.worker.size, num_replicas))

    def reseat(self, division: Division) -> None:
        """Let replicas' buffers meet in the group as it is now, each put there by who plays the replica. Collective."""
        end = self.num_bytes
        if end:
            self._meeting = self._group.allocate(end * division.num_replicas, "buffers")
            if self._apart:
                self.own = self._group.allocate(end * division.num_replicas, "own buffers")
            self._runs = [range(run.start * end, run.stop * end) for run in division.runs]

    def begin_pass(self) -> None:
        """Remember the buffers that every shard of this pass starts from."""
        if self.num_bytes:
            self._reattach()
            self._start.copy_(self._memory)
            self._dirty = False

    def begin_shard(self, replica: int) -> None:
        """Give the next shard the buffers that it starts from."""
        if self.num_bytes and self._apart:
            self._memory.copy_(self._of(self.own, replica))
            self._dirty = True
        elif self.num_bytes and self._dirty:
            self._memory.copy_(self._start)
            self._dirty = False

    def end_shard(self, replica: int) -> bool:
        """Publish the replica's buffers if they changed; return whether they did."""
        if not self.num_bytes:
            return False
        self._reattach()
        if torch.equal(self._memory, self._of(self.own, replica) if self._apart else self._start):
            return False
        self._dirty = True
        self._of(self._meeting, replica).copy_(self._memory)
        return True

    @property
    def now(self) -> torch.Tensor:
        """The buffers as they are in the modules, uint8."""
        self._reattach()
        return self._memory

    def join(self, ends: Sequence[torch.Tensor], weights: Sequence[float], into: torch.Tensor) -> None:
        """Merge the buffers of some replicas into `into`.

        Args:
            ends: of each replica, in order; uint8.
            weights: of each; they add up to 1.
            into: uint8.
        """
        join(self.segments, ends, weights, into)

    def keep(self, replicas: Iterable[int]) -> None:
        """Let some replicas that this worker plays keep what they published, and go back to the pass's start."""
        for replica in replicas:
            self._of(self.own, replica).copy_(self._of(self._meeting, replica))
        self.restore()

    def publish(self, replicas: Iterable[int]) -> None:
        """Publish what replicas that this worker plays have kept."""
        for replica in replicas if self.num_bytes else ():
            self._of(self._meeting, replica).copy_(self._of(self.own, replica))

    def spread(self, replicas: Iterable[int]) -> None:
        """Let replicas that this worker plays go on from the buffers as they are now."""
        for replica in replicas if self.num_bytes else ():
            self._of(self.own, replica).copy_(self._memory)

    def gather_own(self) -> None:
        """Let every worker see what all replicas have kept. Collective where memory is not shared."""
        if self.own.numel():
            self._group.share(self.own, self._runs)

    def _of(self, memory: torch.Tensor, replica: int) -> torch.Tensor:
        return memory[replica * self.num_bytes :][: self.num_bytes]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let a shard be played that counts for nothing: afterwards the buffers are as they are now."""
        if not self.num_bytes:
            yield
            return
        self._reattach()
        held, dirty = self._memory.clone(), self._dirty
        self._dirty = True
        try:
            yield
        finally:
            self._reattach()
            self._memory.copy_(held)
            self._dirty = dirty

    def merge(self, counts: Mapping[int, float], changed: set[int]) -> None:
        """Set the buffers to the merged ones. Collective where memory is not shared.

        Args:
            counts: samples of each replica that had any.
            changed: the replicas whose buffers differ from the pass's start.
        """
        if not self.num_bytes or not changed:
            return
        self._group.share(self._meeting, self._runs)
        ends = [self._of(self._meeting, r) if r in changed else self._start for r in sorted(counts)]
        total = sum(counts.values())
        weights = [counts[r] / total for r in sorted(counts)]
        self.join(ends, weights, self._memory)
        self._dirty = False

    def restore(self, start: torch.Tensor | None = None) -> None:
        """Give the buffers the values of the pass's start, as if it had not been.

        Args:
            start: uint8: is that start from now on.
        """
        if self.num_bytes:
            self._reattach()
            if start is not None:
                self._start.copy_(start)
            self._memory.copy_(self._start)
            self._dirty = False

    def _reattach(self) -> None:
        """Take over the values of buffers that the module replaced by new tensors."""
        for home, key, view in self._placed:
            now = home.get(key)
            if now is not view and now is not None:
                view.copy_(now)
                home[key] = view


def join(
    segments: Sequence[Segment], ends: Sequence[torch.Tensor], weights: Sequence[float], into: torch.Tensor
) -> None:
    """Merge buffers.

    Args:
        segments: which bytes are merged in which way.
        ends, weights, into: see `Buffers.join`.
    """
    for where, dtype in segments:
        if dtype is None or len(ends) == 1:
            into[where] = ends[0][where]
        else:
            into[where].view(dtype).copy_(_mean([e[where].view(dtype) for e in ends], list(weights)))


def _find(modules: Sequence[tuple[str, torch.nn.Module]], rules: Mapping[str, Rule]) -> list[tuple]:
    """Return (dtype of the mean or None, name, home, key, buffer), those merged alike next to each other."""
    entries, seen = [], set()
    for prefix, module in modules:
        for path, owner in module.named_modules():
            for key, buffer in owner._buffers.items():
                if buffer is None or not buffer.numel() or (id(owner), key) in seen:
                    continue
                seen.add((id(owner), key))
                name = f"{prefix}{path}.{key}" if path else f"{prefix}{key}"
                mean = buffer.dtype.is_floating_point and _rule_of(rules, name) == "mean"
                entries.append((buffer.dtype if mean else None, name, owner._buffers, key, buffer))
    return sorted(entries, key=lambda e: (str(e[0]), e[1]))


def _rule_of(rules: Mapping[str, Rule], name: str) -> str:
    matches = [rule for pattern, rule in rules.items() if fnmatch.fnmatchcase(name, pattern)]
    return matches[0] if matches else "mean"


def _mean(values: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    first = values[0]
    total = first.double() * weights[0]
    same = torch.ones_like(first, dtype=torch.bool)
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total.add_(value.double(), alpha=weight)
        same &= value == first
    return torch.where(same, first, total.to(first.dtype))


def _joined(segments: list[Segment]) -> list[Segment]:
    joined: list[Segment] = []
    for where, dtype in segments:
        if joined and joined[-1][1] == dtype:
            joined[-1] = (slice(joined[-1][0].start, where.stop), dtype)
        else:
            joined.append((where, dtype))
    return joined
