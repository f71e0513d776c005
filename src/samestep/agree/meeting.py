"""Where workers tell each other what their shards of an update came to, and check that it fits together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from samestep.agree.allowance import Allowance, Bad
from samestep.agree.nonfinite import Tolerance
from samestep.core.calls import Calls
from samestep.core.fold import Absent
from samestep.core.model import Trained
from samestep.core.optimizers import fingerprint, settings_of
from samestep.errors import MismatchError, UsageError

_ADVICE_ON_LOSSES = "Look at these samples, lower the learning rate, or clip with step.update(clip_norm=1.0)."
_ADVICE_ON_GRADIENTS = (
    "Look at these samples, or lower the learning rate; torch.autograd.set_detect_anomaly(True) names the operation."
)
_HASH_MASK = (1 << 64) - 1
Transform = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass
class Part:
    """What one worker brings to an update.

    Attributes:
        losses: (replica, loss, count) of each shard it ran; losses as given, means over `count` items.
        counted: whether `count=` was given; None if it ran no shard.
        samples: samples of each replica it played that had any.
        means: (replica, value) of each number named in `step.mean`.
        changed: replicas whose buffers changed.
        read: how many samples were read for this step, and the sum of their hashes (`data.proof.SampleCount`).
        bad: samples of its shards that could not be read, and were left out.
    """

    losses: list[tuple[int, float, float]] = field(default_factory=list)
    counted: bool | None = None
    samples: dict[int, int] = field(default_factory=dict)
    means: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    changed: list[int] = field(default_factory=list)
    read: tuple[int, int] = (0, 0)
    bad: Bad = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of `step.update`.

    Attributes:
        where: line of the script.
        optimizer: index of the optimizer to update.
        clip_norm: largest global norm, or None.
        scale: what losses were multiplied by (a GradScaler's), 1.0 without.
        scaled: whether a GradScaler is in use, so that an overflow skips the update.
        transform: applied to each whole gradient before clipping, or None.
        seeds: what randomness in a transform depends on: (seed, step, pass).
        num_samples: samples of the batch, bad ones included.
        data: number of the data set in the run.
        describe: (replica) -> words that name the shard, for messages.
    """

    where: str
    optimizer: int
    clip_norm: float | None
    scale: float
    scaled: bool
    transform: Transform | None
    seeds: tuple[int, int, int]
    num_samples: int
    data: int
    describe: Callable[[int], str]


@dataclass(frozen=True)
class Outcome:
    """What an update gives back, the same on every worker.

    Attributes:
        loss: weighted mean over the batch; NaN if every sample was left out.
        grad_norm: global norm before clipping; None if it was not asked for.
        means: weighted mean of each named number.
        skipped: whether the weights stayed: a scaled gradient overflowed, there was a problem, or nothing was read.
        problem: what was not finite, if the update was skipped for it; else empty.
        read: how many samples all workers read for it, and the sum of their hashes modulo 2**64.
        bad: samples that were left out, in the order of the batch.
        is_known: whether this is what became of an update at all: where updates are made later, the first ones of a
            run give nothing back yet, and those after them give what became of an earlier one.
    """

    loss: float
    grad_norm: float | None
    means: dict[str, float]
    skipped: bool
    problem: str = ""
    read: tuple[int, int] = (0, 0)
    bad: Bad = ()
    is_known: bool = True

    def to_values(self) -> list[Any]:
        """Return its fields in order, as values that the ledger takes."""
        bad = [list(one) for one in self.bad]
        return [
            *(self.loss, self.grad_norm, self.means, self.skipped, self.problem, list(self.read), bad, self.is_known),
        ]


@dataclass(frozen=True)
class Problem:
    """Why an update cannot be made.

    Attributes:
        words: one sentence: what is not finite, and where.
        advice: one sentence or more: what to do.
    """

    words: str
    advice: str


class Meeting:
    """What all workers told of one update; the same on every worker.

    Attributes:
        request: the update.
        own: what each worker told beside its part, in rank order.
        frames: further bytes of each.
        losses: (replica, loss, count), in replica order.
        samples: samples of each replica that had any.
        left_out: samples that could not be read: id, error.
        read: how many samples were read, and the sum of their hashes modulo 2**64.
        changed: replicas whose buffers changed.
        total: what the sum of weighted losses is divided by; 0 until `check`.
        counted: whether items were counted by the user.
    """

    def __init__(self, request: Request, met: Sequence[tuple[Any, bytes]]):
        """Take what `calls.meet` gave for the values of `told`."""
        values = [value for value, _ in met]
        self.request = request
        self.own = [v[0] for v in values]
        self.frames = [frame for _, frame in met]
        self.losses = sorted(tuple(entry) for v in values for entry in v[2])
        self.samples: dict[int, int] = {replica: count for v in values for replica, count in v[4]}
        self.left_out: Bad = [(sample, error) for v in values for sample, error in v[8]]
        self.read = sum(v[7][0] for v in values), sum(v[7][1] for v in values) & _HASH_MASK
        self.changed = {replica for v in values for replica in v[6]}
        self.total = 0.0
        self.counted = False
        self._terms = [v[1] for v in values]
        self._modes = {v[3] for v in values if v[3] is not None}
        self._means = [v[5] for v in values]

    @classmethod
    def hold(
        cls, calls: Calls, request: Request, part: Part, terms: Sequence[Any], own: Any = None, frame: bytes = b""
    ) -> Meeting:
        """Tell this worker's part, and hear those of all. Collective.

        Args:
            calls: where the workers meet.
            request: the update.
            part: this worker's.
            terms: of `terms_of`.
            own: what else it tells (JSON values).
            frame: further bytes.
        """
        return cls(request, calls.meet("step.update", request.where, cls.told(part, terms, own), frame))

    @staticmethod
    def told(part: Part, terms: Sequence[Any], own: Any = None) -> list[Any]:
        """Return what a worker tells of its part, as JSON values."""
        samples = list(part.samples.items())
        return [own, terms, part.losses, part.counted, samples, part.means, part.changed, part.read, part.bad]

    @property
    def is_empty(self) -> bool:
        """Whether every sample of the batch was left out."""
        return len(self.left_out) == self.request.num_samples

    def check(self, optimizer: torch.optim.Optimizer, tolerance: Tolerance, allowance: Allowance) -> None:
        """See that the parts fit together.

        Raises:
            MismatchError, UsageError: they do not.
            DataError: more samples were left out than are allowed.
        """
        self._check_terms(optimizer, tolerance, allowance)
        allowance.check(self.request.data, self.left_out)
        if not self.is_empty:
            self.total, self.counted = self._total()

    def outcome(self, grad_norm: float | None, skipped: bool, problem: str = "") -> Outcome:
        """Return what the update gives back."""
        if self.is_empty:
            return Outcome(math.nan, grad_norm, {}, skipped, problem, self.read, self.left_out)
        loss = math.nan
        if self.total:
            loss = math.fsum(loss * count for _, loss, count in self.losses) / self.total / self.request.scale
        weights = self.weights
        names = sorted({name for told in self._means for name in told})
        means = {name: _mean([tuple(e) for v in self._means for e in v.get(name, ())], weights) for name in names}
        return Outcome(loss, grad_norm, means, skipped, problem, self.read, self.left_out)

    @property
    def weights(self) -> dict[int, float]:
        """What each replica counts for: its samples, or the items that the user counted."""
        if not self.counted:
            return {replica: float(count) for replica, count in self.samples.items()}
        totals: dict[int, float] = {}
        for replica, _, count in self.losses:
            totals[replica] = totals.get(replica, 0.0) + count
        return totals

    def _check_terms(self, optimizer: torch.optim.Optimizer, tolerance: Tolerance, allowance: Allowance) -> None:
        request, terms = self.request, self._terms
        if all(theirs == terms[0] for theirs in terms):
            return
        names = (
            "optimizer",
            f"settings of {type(optimizer).__name__} (here {settings_of(optimizer)})",
            f"clip_norm (here {request.clip_norm})",
            f"scale of the losses (here {request.scale})",
            "transform",
            "step number",
            f"batch size (here {request.num_samples})",
            f"nonfinite (here {tolerance.rule!r})",
            f"on_bad_sample (here {allowance.rule!r})",
        )
        for rank, theirs in enumerate(terms):
            differing = [name for name, a, b in zip(names, terms[0], theirs, strict=True) if a != b]
            if differing:
                raise MismatchError(
                    f"At {request.where} worker {rank} updates with other {', '.join(differing)} than worker 0. "
                    f"These must be the same on every worker: decide them by step.loss, step.mean or run.mean."
                )

    def _total(self) -> tuple[float, bool]:
        request, losses, samples = self.request, self.losses, self.samples
        if len(self._modes) > 1:
            raise UsageError(
                f"At {request.where} some replicas gave count= to step.backward and others did not. "
                f"Give it in every call of a step, or in none."
            )
        missing = sorted(set(samples) - {replica for replica, _, _ in losses})
        if missing:
            raise UsageError(
                f"step.backward was not called for {request.describe(missing[0])}. Call it once or more for every "
                f"shard (with count=0 if the shard should not count)."
            )
        if True in self._modes:
            total = math.fsum(count for _, _, count in losses)
            if not total > 0:
                raise UsageError(f"At {request.where} count= adds up to {total} over the batch; it must be above 0.")
            return total, True
        return float(request.num_samples - len(self.left_out)), False


def terms_of(
    request: Request, optimizer: torch.optim.Optimizer, tolerance: Tolerance, allowance: Allowance, alone: bool
) -> list[Any]:
    """Return what must be the same on every worker; `alone`: there is no other."""
    terms: list[Any] = [request.optimizer, 0 if alone else fingerprint(optimizer), request.clip_norm, request.scale]
    terms += [request.transform is not None, request.seeds[1], request.num_samples]
    return [*terms, tolerance.rule, allowance.rule]


def unit_of(num_samples: int) -> float:
    """Return what counts are divided by before backward: a power of two, so that no bit changes.

    It keeps weighted losses small enough for half precision; the mean takes it out again.
    """
    return 2.0 ** math.ceil(math.log2(max(num_samples, 1)))


def _mean(values: list[tuple[int, float]], weights: dict[int, float]) -> float:
    total = math.fsum(weights[replica] for replica, _ in values)
    return math.fsum(value * weights[replica] for replica, value in sorted(values)) / total if total else math.nan


def problem_of(request: Request, trained: Trained, losses: Sequence, bad: Sequence[list[int]]) -> Problem | None:
    """Return the first loss or gradient that is not finite.

    Args:
        request: the update.
        trained: what is updated.
        losses: (replica, loss, count).
        bad: [replica, first parameter, last parameter, number of parameters].
    """
    for replica, loss, _ in losses:
        if not math.isfinite(loss):
            return Problem(f"The loss is {loss} for {request.describe(replica)}.", _ADVICE_ON_LOSSES)
    if not bad:
        return None
    replica, first, last, count = min(bad)
    names, where = trained.weights.names, request.describe(replica)
    if count == 1:
        what = f"The gradient of {names[first]!r} is"
    else:
        what = f"The gradients of {count} parameters, {names[first]!r} to {names[last]!r}, are"
    return Problem(f"{what} NaN or infinite in {where}.", _ADVICE_ON_GRADIENTS)


def absent_of(frames: Sequence[bytes], trained: Trained) -> Absent:
    """Return, for parameters that some nodes hold no sum of, those nodes (numbered in leaf order)."""
    absent: dict[int, tuple[int, ...]] = {}
    width, node = len(trained.weights.parameters), 0
    for count, frame in zip(trained.num_nodes, frames, strict=True):
        for _ in range(count):
            here, frame = frame[:width], frame[width:]
            for parameter, present in enumerate(here):
                if not present:
                    absent[parameter] = (*absent.get(parameter, ()), node)
            node += 1
    return absent
