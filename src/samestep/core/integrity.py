"""Finds bits that flipped in the memory that workers share: weights, optimizer state, gradient sums.

Between two updates weights and optimizer state must not change. After an update every worker folds its part of these
memories to one number per tensor; at the start of the next one, after all have met and before anything is written, it
folds the same part again. A worker's gradient sums must not change from the meeting of an update to its commit: it
folds them before it goes there and tells the numbers, and the owners compare before they add.

    update n       ... commit | fold                        (if update n + 1 is to be verified)
    update n + 1   fold gradients | meet | fold, compare | meet | reduce, apply, commit | fold ...

Only what is in CPU memory and lies in the group's memory is looked at.

[Note: one wrong number]
The fold is the sum of 64-bit words, which wraps around. A flipped bit changes it by plus or minus a power of two; what
else changes it so is rare. So one such difference, and no other, counts as a flipped bit. Several, or others, come from
a write: of the script's, if the guard sees it too, or of native code.
"""

from __future__ import annotations

import operator
import statistics
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np
import torch

from samestep.core.calls import Calls
from samestep.core.group import GradientArea, Group, align
from samestep.core.guard import Guard
from samestep.core.places import Slot
from samestep.core.tree import Node
from samestep.core.weights import Weights
from samestep.core.worker import run_of
from samestep.errors import EditedWeightsError, IntegrityError

_SHARE = 100
"""Verifying takes at most about one part in so many of the time."""
_WORD = 8
"""Bytes of a word of the fold. Every tensor in the group's memory starts on a multiple of it."""

Finding = list
"""[what changed, whether by a power of two], as JSON: what one worker found."""


def fold(memory: Any, num_bytes: int | None = None) -> int:
    """Return the wrapping sum of 64-bit words: every single flipped bit changes it.

    Args:
        memory: a buffer.
        num_bytes: how many of its first bytes, a multiple of 8; all by default.
    """
    count = -1 if num_bytes is None else num_bytes // _WORD
    return int(np.add.reduce(np.frombuffer(memory, np.int64, count)))


class Updated(Protocol):
    """One optimizer, as far as its memory matters here (`Trained`)."""

    weights: Weights
    area: GradientArea | None
    nodes: list[tuple[Node, ...]]

    @property
    def places(self) -> Mapping[Slot, torch.Tensor]:
        """Optimizer state in the group's memory."""


class Integrity:
    """One worker's part of watching the memory.

    Attributes:
        is_watching: whether folds were taken, so that the next update is verified; the same on every worker.
        insists: whether they shall be taken after every update, whatever it costs; to be set alike on every worker.
        num_updates: updates made.
        num_verified: of these, before how many the memory was found unchanged.
        seconds: time spent, of this worker's thread.
    """

    def __init__(
        self, weights: Sequence[Weights], updated: Sequence[Updated], guard: Guard, group: Group, is_on: bool = True
    ):
        self._weights = [w for w in weights if w.memory.device.type == "cpu"]
        self._updated = updated
        self._guard = guard
        self._group = group
        self._is_on = is_on and bool(self._weights)
        self._places: list[torch.Tensor] = []
        self._memories: list[_Memory] = []
        self._withdrawn: list[Callable[[], None]] = []
        self._due = 0.0
        self._spent = 0.0
        self._costs: deque[float] = deque(maxlen=9)
        self.is_watching = False
        self.insists = False
        self.num_updates = 0
        self.num_verified = 0
        self.seconds = 0.0

    @property
    def is_due(self) -> bool:
        """Whether, by this worker's clock, the update after the next may be verified."""
        # One that is on its way is not charged yet.
        due = self._due + (self._price() if self.is_watching else 0.0)
        return self._is_on and time.perf_counter() >= due

    def publish(self, index: int) -> list[list[int]] | None:
        """Return the folds of this worker's gradient sums: for each node, one per owner; None if nobody will compare.

        Args:
            index: the optimizer whose gradients they are.
        """
        area = self._updated[index].area
        if not self.is_watching or area is None or not self._group.shares_memory:
            return None
        begin = time.thread_time()
        runs = self._updated[index].weights.layout.sum_runs
        count = len(self._updated[index].nodes[self._group.worker.rank])
        folds = [[_fold(node[run.start : run.stop]) for run in runs] for node in area.mine[:count]]
        self._spend(begin)
        return folds

    def verify(self, calls: Calls, kind: str, when: str, index: int = 0, published: Sequence[Any] = ()) -> bool:
        """Compare the memory with the folds that were taken, if any. Collective; nobody may write to it meanwhile.

        Args:
            calls: where the workers meet.
            kind: names the meeting.
            when: for messages, as "before the update of step 3".
            index: the optimizer to which `published` belongs.
            published: what `publish` gave on each worker.

        Returns:
            Whether there were folds, and the memory is as it was.

        Raises:
            IntegrityError: memory changed; the same on every worker, and again at every later call.
            EditedWeightsError: it was the script that changed it.
        """
        if not self.is_watching:
            return False
        begin = time.thread_time()
        self._guard.check_traces()
        edited = ""
        try:
            self._guard.check_samples()
        except EditedWeightsError as error:
            edited = str(error)
        found = [f for memory in self._memories for f in memory.changes()] + self._changed_gradients(index, published)
        met = [value for value, _ in calls.meet(kind, "", [found, edited])]
        self._spend(begin)
        changed = [(rank, *finding) for rank, (findings, _) in enumerate(met) for finding in findings]
        edits = [words for _, words in met if words]
        if edits and not (len(changed) == 1 and changed[0][2]):
            raise EditedWeightsError(edits[0])
        if changed:
            self._fail(calls, when, changed)
        return True

    def updated(self, wanted: bool) -> None:
        """Note that an update was made, and fold the memory as it is now, if that is `wanted` (on every worker alike).

        Called when all have made their part of it; the next may write only after all have met again.
        """
        self.num_updates += 1
        self.num_verified += self.is_watching
        if self.is_watching:
            self._charge()
        self.watch(wanted or self.insists)

    def watch(self, wanted: bool = True) -> None:
        """Fold the memory as it is now, or, unless `wanted`, let it be."""
        self._withdrawn.clear()
        self.is_watching = wanted and self._is_on
        if not self.is_watching:
            return
        begin = time.thread_time()
        places = [place for updated in self._updated for place in updated.places.values()]
        known = len(places) == len(self._places) and all(map(operator.is_, places, self._places))
        if not known or not self._memories:
            self._places, self._memories = places, self._find_memories()
        for memory in self._memories:
            memory.take()
        self._spend(begin)

    def reseat(self, guard: Guard) -> None:
        """Take another part of the memory, as the group is now. `watch` again before the next update."""
        self._guard = guard
        self._places, self._memories = [], []

    def withdraw_if_damaged(self, withdraw: Callable[[], None]) -> None:
        """Have something done on this worker if memory turns out to have changed since it was folded last.

        A state that was kept meanwhile may hold what is wrong.
        """
        if self.is_watching:
            self._withdrawn.append(withdraw)

    def facts(self) -> dict[str, Any]:
        """Return how many updates were verified, of how many, and what that took."""
        return {"updates": self.num_updates, "updates_verified": self.num_verified, "verify_seconds": self.seconds}

    def _fail(self, calls: Calls, when: str, changed: list[tuple[int, str, bool]]) -> NoReturn:
        for withdraw in self._withdrawn:
            withdraw()
        rank, what, is_bit = changed[0]
        if len(changed) == 1 and is_bit:
            words = f"A bit of {what} flipped in memory; worker {rank} found it {when}."
            advice = "If that comes again, test this machine's memory."
        else:
            others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            words = (
                f"Memory was overwritten: {what}{others} changed outside of an update; worker {rank} found it {when}."
            )
            advice = (
                "Look for native code that writes where it must not, or for a write to weights or to optimizer state "
                "through .data or NumPy; weights can be changed in `with run.edit():`."
            )
        # Should the script swallow it, it comes again: nothing that is built on such memory may be kept.
        calls.halt(IntegrityError(f"{words} {advice}"))

    def _changed_gradients(self, index: int, published: Sequence[Any]) -> list[Finding]:
        """Compare the part of the gradient sums that this worker owns with what their makers told of them."""
        area, found = self._updated[index].area, []
        for rank, told in enumerate(published):
            assert area is not None or told is None
            for number, folds in enumerate(told or ()):
                now = _fold(area.nodes[rank][number]) if area is not None else 0
                difference = now - folds[self._group.worker.rank]
                if difference:
                    lo, hi = self._updated[index].nodes[rank][number]
                    replicas = f"replica {lo}" if hi - lo == 1 else f"replicas {lo} to {hi - 1}"
                    found.append([f"the gradient sum of {replicas} (worker {rank})", _is_bit(difference)])
        return found

    def _find_memories(self) -> list[_Memory]:
        """Return this worker's part of everything to be watched."""
        worker = self._group.worker
        rank, size = (worker.rank, worker.size) if self._group.shares_memory else (0, 1)
        memories = []
        for weights in self._weights:
            starts = {
                offset: f"the parameter {name!r}"
                for offset, shape, name in zip(
                    weights.layout.offsets, weights.layout.shapes, weights.names, strict=True
                )
                if shape.num_elements
            }
            memories.append(_Memory(weights.memory, starts, rank, size))
        by_storage: dict[int, list[tuple[torch.Tensor, str]]] = {}
        for updated in self._updated:
            for (parameter, key), place in updated.places.items():
                if place.numel() and place.device.type == "cpu":
                    name = f"the optimizer state {key!r} of {updated.weights.names[parameter]!r}"
                    by_storage.setdefault(place.untyped_storage().data_ptr(), []).append((place, name))
        for held in by_storage.values():
            begins = [int(place.storage_offset()) * place.element_size() for place, _ in held]
            first = min(begins)
            stop = max(b + align(p.numel() * p.element_size()) for b, (p, _) in zip(begins, held, strict=True))
            storage = held[0][0].untyped_storage()
            memory = torch.empty(0, dtype=torch.uint8).set_(storage)[first:stop]
            starts = {begin - first: name for begin, (_, name) in zip(begins, held, strict=True)}
            memories.append(_Memory(memory, starts, rank, size, held[0][0]))
        return memories

    def _spend(self, begin: float) -> None:
        # Not the time asleep in a meeting: on a busy machine that is somebody else's.
        self._spent += time.thread_time() - begin

    def _charge(self) -> None:
        """Set when the next update may be verified, by what one has cost of late."""
        self.seconds += self._spent
        self._costs.append(self._spent)
        self._spent = 0.0
        # What was not used for long is not saved up.
        self._due = max(self._due, time.perf_counter() - self._price()) + self._price()

    def _price(self) -> float:
        """Return the seconds that are to lie between two updates that are verified; 0 while it is not known."""
        return _SHARE * statistics.fmean(self._costs) if self._costs else 0.0


class _Memory:
    """One worker's part of one memory, cut where a tensor begins."""

    def __init__(
        self,
        memory: torch.Tensor,
        names: Mapping[int, str],
        rank: int,
        size: int,
        versioned: torch.Tensor | None = None,
    ):
        """Look at part `rank` of `size` of a memory.

        Args:
            memory: uint8, of whole words.
            names: byte where a tensor begins -> what it is.
            rank, size: which part.
            versioned: shares its version with all views on the memory. An edit that torch knows of is no damage.
        """
        run = run_of(rank, size, memory.numel() // _WORD)
        starts = sorted(names)
        words = [start // _WORD for start in starts]
        cuts = [run.start, *(w for w in words if run.start < w < run.stop)] if run else []
        self._words = memory.numpy().view(np.int64)[run.start : run.stop]
        self._cuts = np.array([cut - run.start for cut in cuts], dtype=np.int64)
        self._names = [names[starts[max(0, bisect_right(words, cut) - 1)]] for cut in cuts]
        self._versioned = versioned
        self._taken, self._version = np.zeros(0, np.int64), 0

    def take(self) -> None:
        """Fold it as it is."""
        self._taken, self._version = self._fold(), self._version_now()

    def changes(self) -> list[Finding]:
        """Return what is not as it was when it was folded last."""
        differences = self._fold() - self._taken
        if not differences.any() or self._version_now() != self._version:
            return []
        return [[self._names[i], _is_bit(int(differences[i]))] for i in differences.nonzero()[0]]

    def _fold(self) -> np.ndarray:
        return np.add.reduceat(self._words, self._cuts) if len(self._cuts) else np.zeros(0, np.int64)

    def _version_now(self) -> int:
        return self._versioned._version if self._versioned is not None else 0


def _fold(memory: torch.Tensor) -> int:
    """Return the fold of a uint8 tensor of whole words."""
    return int(np.add.reduce(memory.numpy().view(np.int64)))


def _is_bit(difference: int) -> bool:
    """Return whether two folds differ as they do after one flipped bit."""
    word = difference % (1 << 64)
    return word.bit_count() == 1 or (-word % (1 << 64)).bit_count() == 1
