"""Synchronous agreement: one update from all replicas' gradients, as one big batch would make it.

The hops of a step, numbered as in `samestep.core`:

    [4] meet     every worker tells its losses, counts, used parameters and what is not finite; all gradients are
                 published
    [5] reduce   owners add the nodes of their units along the tree
    [6] clip     norms per tensor, added in parameter order; one factor for all (only if asked for)
    [7] update   owners run the optimizer in place
    [8] commit   all see the new weights
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from samestep.agree.allowance import Allowance, Bad
from samestep.agree.nonfinite import Tolerance
from samestep.core.calls import Calls
from samestep.core.clock import Clock
from samestep.core.fold import Absent
from samestep.core.group import Group
from samestep.core.layout import Piece
from samestep.core.model import Model, Trained
from samestep.core.norms import block_squares
from samestep.core.optimizers import fingerprint, settings_of
from samestep.core.randomness import seed_transform
from samestep.core.worker import Wish
from samestep.errors import MismatchError, UsageError
from samestep.storage import wire

_HASH_MASK = (1 << 64) - 1
Transform = Callable[[str, torch.Tensor], torch.Tensor]

_LARGEST_FACTOR = 1e15
"""What sums are multiplied by is below it, but for absurd counts; then they are looked at once more."""


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
    """

    loss: float
    grad_norm: float | None
    means: dict[str, float]
    skipped: bool
    problem: str = ""
    read: tuple[int, int] = (0, 0)
    bad: Bad = ()


@dataclass(frozen=True)
class Problem:
    """Why an update cannot be made.

    Attributes:
        words: one sentence: what is not finite, and where.
        advice: one sentence or more: what to do.
    """

    words: str
    advice: str


@dataclass
class Reduced:
    """Gradients as they will be applied.

    Attributes:
        absent: nodes that hold no sum.
        factor: what the nodes' sums are multiplied by.
        ready: transformed gradients, to be applied as they are; None without a transform.
        norm: global norm before clipping; NaN if it was not asked for.
        problem: why they cannot be applied.
    """

    absent: Absent
    factor: float
    ready: dict[int, torch.Tensor] | None
    norm: float
    problem: Problem | None = None


@dataclass(frozen=True)
class Synchronous:
    """All replicas agree at every step. The default."""

    def bind(
        self,
        model: Model,
        group: Group,
        calls: Calls,
        clock: Clock,
        tolerance: Tolerance | None = None,
        allowance: Allowance | None = None,
    ) -> LiveSynchronous:
        """Return the live form for one worker; it stops at what is not finite, and at bad samples, unless told."""
        tolerance = tolerance if tolerance is not None else Tolerance("stop")
        allowance = allowance if allowance is not None else Allowance("stop")
        return LiveSynchronous(model, group, calls, clock, tolerance, allowance)


class LiveSynchronous:
    """One worker's side of synchronous agreement.

    Attributes:
        tolerance: what becomes of updates that are not finite.
        allowance: what becomes of samples that cannot be read.
    """

    def __init__(
        self, model: Model, group: Group, calls: Calls, clock: Clock, tolerance: Tolerance, allowance: Allowance
    ):
        self._model = model
        self._group = group
        self._calls = calls
        self._clock = clock
        self.tolerance = tolerance
        self.allowance = allowance

    def update(self, request: Request, part: Part) -> Outcome:
        """Make one update, or skip it. Collective.

        Raises:
            EditedWeightsError: weights were changed outside of it.
            DataError: more samples were left out than are allowed.
            IntegrityError: memory changed by itself since the update before.
            NonFiniteError: a loss or gradient is NaN or infinite, and the update may not be skipped.
            UsageError, MismatchError: the workers' parts do not fit together.
        """
        trained = self._model.trained[request.optimizer]
        presence = trained.gradients.presence()
        alone = self._group.worker.size == 1
        optimizer = request.optimizer, 0 if alone else fingerprint(trained.optimizer)
        terms: list[Any] = [*optimizer, request.clip_norm, request.scale, request.transform is not None]
        terms += [request.seeds[1], request.num_samples, self.tolerance.rule, self.allowance.rule]
        bad = [[trained.replicas[shard], *which] for shard, *which in trained.gradients.not_finite()]
        seen = [bad, trained.gradients.finite.huge]
        integrity = self._model.integrity
        folds = integrity.publish(request.optimizer)
        if self._group.worker.is_first and integrity.is_due:
            self._calls.ask(Wish.VERIFY)
        value = [
            terms,
            part.losses,
            part.counted,
            list(part.samples.items()),
            part.means,
            part.changed,
            seen,
            part.read,
            part.bad,
            folds,
        ]
        met = self._calls.meet("step.update", request.where, value, presence or b"")
        self._clock.to("update")
        when = f"before the update of step {request.seeds[1]}"
        folds_of = [v[9] for v, _ in met]
        if not integrity.verify(self._calls, "step.update (verify)", when, request.optimizer, folds_of):
            self._model.guard.check()
        self._check_terms(request, [v[0] for v, _ in met])
        losses = sorted((entry for v, _ in met for entry in v[1]))
        samples = {replica: count for v, _ in met for replica, count in v[3]}
        left_out = [(sample, error) for v, _ in met for sample, error in v[8]]
        self.allowance.check(request.data, left_out)
        read = sum(v[7][0] for v, _ in met), sum(v[7][1] for v, _ in met) & _HASH_MASK
        trained.reload_if_stale()
        if len(left_out) == request.num_samples:
            self._model.buffers.restore()
            return Outcome(math.nan, None if request.clip_norm is None else math.nan, {}, True, "", read, left_out)
        total, counted = self._total(request, [v[2] for v, _ in met], losses, samples, len(left_out))
        # Shards were scaled for the batch as it was planned; what was left out of it counts for nothing.
        unit = unit_of(request.num_samples)
        factor = unit / (total * request.scale) if counted else request.num_samples / total / request.scale
        reduced = None
        problem = None if request.scaled else _problem(request, trained, losses, [b for v, _ in met for b in v[6][0]])
        if problem is None:
            if trained.area is not None:
                trained.area.collect()
            reduced = self._reduce(trained, request, _absent(met, trained), factor, any(v[6][1] for v, _ in met))
            problem = reduced.problem
        if problem is not None and not request.scaled:
            # All workers know it, and none will read what another folded: no further meeting is needed.
            self.tolerance.check(request.optimizer, problem.words, problem.advice)
            self._model.buffers.restore()
        else:
            self._model.buffers.merge(samples, {r for v, _ in met for r in v[5]})
            self._commit(request, trained, reduced if problem is None else None)
        # A snapshot at the end of this step is to hold what was looked at.
        integrity.updated(self._calls.heard(Wish.VERIFY) or self._calls.stands(Wish.SNAPSHOT))
        loss = math.fsum(loss * count for _, loss, count in losses) / total / request.scale if total else math.nan
        weights = samples if not counted else _summed(losses)
        means = {name: _mean(met, name, weights) for name in sorted({n for v, _ in met for n in v[4]})}
        norm = None if request.clip_norm is None else reduced.norm if reduced is not None else math.nan
        words = problem.words if problem is not None and not request.scaled else ""
        return Outcome(loss, norm, means, problem is not None, words, read, left_out)

    def _check_terms(self, request: Request, terms: Sequence[list]) -> None:
        if all(theirs == terms[0] for theirs in terms):
            return
        optimizer = self._model.trained[request.optimizer].optimizer
        names = (
            "optimizer",
            f"settings of {type(optimizer).__name__} (here {settings_of(optimizer)})",
            f"clip_norm (here {request.clip_norm})",
            f"scale of the losses (here {request.scale})",
            "transform",
            "step number",
            f"batch size (here {request.num_samples})",
            f"nonfinite (here {self.tolerance.rule!r})",
            f"on_bad_sample (here {self.allowance.rule!r})",
        )
        for rank, theirs in enumerate(terms):
            differing = [name for name, a, b in zip(names, terms[0], theirs, strict=True) if a != b]
            if differing:
                raise MismatchError(
                    f"At {request.where} worker {rank} updates with other {', '.join(differing)} than worker 0. "
                    f"These must be the same on every worker: decide them by step.loss, step.mean or run.mean."
                )

    def _total(
        self, request: Request, modes: Sequence, losses: Sequence, samples: dict[int, int], num_left_out: int
    ) -> tuple[float, bool]:
        """Return what the sum of weighted losses is divided by, and whether items were counted by the user."""
        given = {mode for mode in modes if mode is not None}
        if len(given) > 1:
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
        if True in given:
            total = math.fsum(count for _, _, count in losses)
            if not total > 0:
                raise UsageError(f"At {request.where} count= adds up to {total} over the batch; it must be above 0.")
            return total, True
        return float(request.num_samples - num_left_out), False

    def _reduce(self, trained: Trained, request: Request, absent: Absent, factor: float, huge: bool) -> Reduced:
        """Transform and measure the gradients, as far as asked for, and see that what comes of them is finite."""
        ready = None
        if request.transform is not None:
            ready = self._transformed(trained, request, absent, factor)
        norm = math.nan
        if request.clip_norm is not None or request.scaled:
            norm = self._norm(trained, absent, factor, ready)
            if not math.isfinite(norm):
                words = f"The norm of the gradients is {norm} in step {request.seeds[1]}, updated at {request.where}."
                return Reduced(absent, factor, ready, norm, Problem(words, _ADVICE_ON_SUMS))
        if request.clip_norm is not None and norm > request.clip_norm:
            # As in torch.nn.utils.clip_grad_norm_, a little below the bound rather than above it.
            scale = request.clip_norm / (norm + 1e-6)
            factor *= scale
            ready = ready and {i: g.mul_(scale) for i, g in ready.items()}
        reduced = Reduced(absent, factor, ready, norm)
        unseen = ready is not None and math.isnan(norm)
        if not request.scaled and (huge or unseen or factor > _LARGEST_FACTOR):
            reduced.problem = self._overflow(trained, request, reduced)
        return reduced

    def _overflow(self, trained: Trained, request: Request, reduced: Reduced) -> Problem | None:
        """Look at the finished gradients, in the precision in which they are used. Collective."""
        names, parameters = trained.weights.names, trained.weights.parameters
        chunks = trained.weights.layout.chunks[self._group.worker.rank]
        finished: Iterable[tuple[int, torch.Tensor | None]] = (
            (piece.parameter, flat)
            for index, chunk in enumerate(chunks)
            for piece, flat in zip(chunk, trained.sums.chunk(index, reduced.absent, reduced.factor), strict=True)
        )
        if reduced.ready is not None:
            finished = reduced.ready.items()
        bad = [i for i, g in finished if g is not None and not bool(torch.isfinite(g.to(parameters[i].dtype)).all())]
        met = self._calls.meet("step.update (finite)", "", min(bad, default=None))
        known = [first for first, _ in met if first is not None]
        if not known:
            return None
        what = "summed over the replicas" if request.transform is None else "after transform"
        words = f"The gradient of {names[min(known)]!r}, {what}, is NaN or infinite in step {request.seeds[1]}."
        return Problem(words, _ADVICE_ON_SUMS if request.transform is None else _ADVICE_ON_TRANSFORMS)

    def _commit(self, request: Request, trained: Trained, reduced: Reduced | None) -> None:
        """Update the weights, or leave them where `reduced` is None; meet when all are done."""
        notice = None
        if reduced is not None:
            self._model.guard.open()
            if reduced.ready is not None:
                trained.update.apply_ready(reduced.ready)
            else:
                trained.update.apply(trained.sums, reduced.absent, reduced.factor)
            trained.weights.share(self._group)
            notice = trained.update.notice()
        frame = b"" if notice is None else wire.pack(notice)
        met = self._calls.meet("step.update (commit)", request.where, None, frame)
        self._clock.to("update")
        trained.update.settle([wire.unpack(f) if f else None for _, f in met])
        self._model.guard.accept_update()

    def _transformed(
        self, trained: Trained, request: Request, absent: Absent, factor: float
    ) -> dict[int, torch.Tensor]:
        """Return the finished gradient, flat, of every parameter that this worker owns wholly or in part.

        A tensor divided among owners is put together on each of them; each transforms it alike.
        """
        layout = trained.weights.layout
        mine: dict[int, list[torch.Tensor]] = {}
        for index, chunk in enumerate(layout.chunks[self._group.worker.rank]):
            for piece, total in zip(chunk, trained.sums.chunk(index, absent, factor), strict=True):
                if total is not None:
                    mine.setdefault(piece.parameter, []).append(total.clone())
        owners = [{piece.parameter for chunk in chunks for piece in chunk} for chunks in layout.chunks]
        divided = {i for i in mine if sum(i in owned for owned in owners) > 1}
        frame = wire.pack({i: torch.cat(parts) for i, parts in mine.items() if i in divided})
        for i in divided:
            mine[i] = []
        for _, theirs in self._calls.meet("step.update (transform)", request.where, None, frame):
            for i, part in wire.unpack(theirs).items():
                if i in divided:
                    mine[i].append(part)
        self._clock.to("update")
        return {i: self._transform(trained, request, i, torch.cat(parts)) for i, parts in mine.items()}

    def _transform(self, trained: Trained, request: Request, index: int, flat: torch.Tensor) -> torch.Tensor:
        view, name = trained.weights.views[index], trained.weights.names[index]
        assert request.transform is not None
        # A transform may draw noise; what it draws must not depend on which tensors this worker owns.
        seed_transform(*request.seeds, index)
        with torch.no_grad():
            result = request.transform(name, flat.as_strided(view.shape, view.stride()))
        if not isinstance(result, torch.Tensor) or result.shape != view.shape:
            got = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, torch.Tensor) else repr(result)
            raise UsageError(f"transform returned {got} for {name!r}; return a gradient of shape {tuple(view.shape)}.")
        own = torch.empty_strided(view.shape, view.stride(), dtype=flat.dtype, device=flat.device).copy_(result)
        return own.as_strided((own.numel(),), (1,))

    def _norm(self, trained: Trained, absent: Absent, factor: float, ready: dict[int, torch.Tensor] | None) -> float:
        """Return the global norm: squares per tensor over fixed blocks, added in float64 in parameter order."""
        rank = self._group.worker.rank
        chunks = trained.weights.layout.chunks[rank]
        pieces: list[Piece] = []

        def read() -> Iterator[list[torch.Tensor]]:
            pieces.clear()
            # Backwards: the update goes forwards, and finds what was read last still in the cache.
            for index in reversed(range(len(chunks))):
                if ready is not None:
                    sums = [
                        ready[p.parameter][p.start : p.stop] if p.parameter in ready else None for p in chunks[index]
                    ]
                else:
                    sums = trained.sums.chunk(index, absent, 1.0)
                present = [(p, flat) for p, flat in zip(chunks[index], sums, strict=True) if flat is not None]
                pieces.extend(p for p, _ in present)
                yield [flat for _, flat in present]

        squares = block_squares(read)
        order = sorted(range(len(pieces)), key=lambda i: (pieces[i].parameter, pieces[i].start))
        values = np.concatenate([squares[i] for i in order]) if order else np.empty(0)
        owners = np.repeat([float(pieces[i].parameter) for i in order], [len(squares[i]) for i in order])
        frame = values.astype("<f8").tobytes() + owners.astype("<f8").tobytes()
        met = self._calls.meet("step.update (norm)", "", None, frame)
        self._clock.to("update")
        per_tensor: dict[int, float] = {}
        for _, theirs in met:
            both = np.frombuffer(theirs, "<f8").reshape(2, -1)
            for value, owner in zip(both[0].tolist(), both[1].tolist(), strict=True):
                per_tensor[int(owner)] = per_tensor.get(int(owner), 0.0) + value
        total = 0.0
        for parameter in sorted(per_tensor):
            total += per_tensor[parameter]
        return math.sqrt(total) * (factor if ready is None else 1.0)


_ADVICE_ON_LOSSES = "Look at these samples, lower the learning rate, or clip with step.update(clip_norm=1.0)."
_ADVICE_ON_GRADIENTS = (
    "Look at these samples, or lower the learning rate; torch.autograd.set_detect_anomaly(True) names the operation."
)
_ADVICE_ON_SUMS = "Each replica's gradients are finite: lower the learning rate, or scale the loss down."
_ADVICE_ON_TRANSFORMS = "Look at what transform does, and at gradients of zero."


def _problem(request: Request, trained: Trained, losses: Sequence, bad: Sequence[list[int]]) -> Problem | None:
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


def unit_of(num_samples: int) -> float:
    """Return what counts are divided by before backward: a power of two, so that no bit changes.

    It keeps weighted losses small enough for half precision; the mean takes it out again.
    """
    return 2.0 ** math.ceil(math.log2(max(num_samples, 1)))


def _absent(met: Sequence[tuple[Any, bytes]], trained: Trained) -> Absent:
    """Return, for parameters that some nodes hold no sum of, those nodes (numbered in leaf order)."""
    absent: dict[int, tuple[int, ...]] = {}
    width, node = len(trained.weights.parameters), 0
    for count, (_, frame) in zip(trained.num_nodes, met, strict=True):
        for _ in range(count):
            here, frame = frame[:width], frame[width:]
            for parameter, present in enumerate(here):
                if not present:
                    absent[parameter] = (*absent.get(parameter, ()), node)
            node += 1
    return absent


def _summed(losses: Sequence) -> dict[int, float]:
    totals: dict[int, float] = {}
    for replica, _, count in losses:
        totals[replica] = totals.get(replica, 0.0) + count
    return totals


def _mean(met: Sequence, name: str, weights: dict[int, float]) -> float:
    values = sorted((tuple(entry) for v, _ in met for entry in v[4].get(name, ())))
    total = math.fsum(weights[replica] for replica, _ in values)
    return math.fsum(value * weights[replica] for replica, value in values) / total if total else math.nan
