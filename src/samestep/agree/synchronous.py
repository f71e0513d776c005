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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from samestep.agree.agreement import Agreement, Live
from samestep.agree.meeting import Meeting, Outcome, Part, Problem, Request, absent_of, problem_of, terms_of, unit_of
from samestep.core.fold import Absent
from samestep.core.layout import Piece
from samestep.core.model import Trained
from samestep.core.norms import block_squares
from samestep.core.randomness import seed_transform
from samestep.core.worker import Wish
from samestep.errors import UsageError
from samestep.storage import wire

_LARGEST_FACTOR = 1e15
"""What sums are multiplied by is below it, but for absurd counts; then they are looked at once more."""


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
class Synchronous(Agreement):
    """All replicas agree at every step. The default."""

    def bind(self, model, group, calls, clock, tolerance=None, allowance=None) -> LiveSynchronous:
        return LiveSynchronous(self, model, group, calls, clock, tolerance, allowance)


class LiveSynchronous(Live):
    """One worker's side of synchronous agreement."""

    def begin_pass(self) -> None:
        for trained in self.model.trained:
            trained.gradients.begin_pass()
        self.model.buffers.begin_pass()

    def begin_shard(self, index: int, replica: int) -> None:
        for trained in self.model.trained:
            trained.gradients.begin_shard(index)

    def end_shard(self, replica: int) -> None:
        for trained in self.model.trained:
            trained.gradients.end_shard()

    def share(self, weight: float, size: int, counted: bool) -> float:
        return weight / (unit_of(size) if counted else size)

    def update(self, request: Request, part: Part) -> Outcome:
        trained = self.model.trained[request.optimizer]
        presence = trained.gradients.presence()
        bad = [[trained.replicas[shard], *which] for shard, *which in trained.gradients.not_finite()]
        integrity = self.model.integrity
        folds = integrity.publish(request.optimizer)
        if self.group.worker.is_first and integrity.is_due:
            self.calls.ask(Wish.VERIFY)
        alone = self.group.worker.size == 1
        terms = terms_of(request, trained.optimizer, self.tolerance, self.allowance, alone)
        own = [bad, trained.gradients.finite.huge, folds]
        met = Meeting.hold(self.calls, request, part, terms, own, presence or b"")
        self.clock.to("update")
        when = f"before the update of step {request.seeds[1]}"
        folds_of = [folds for _, _, folds in met.own]
        if not integrity.verify(self.calls, "step.update (verify)", when, request.optimizer, folds_of):
            self.model.guard.check()
        met.check(trained.optimizer, self.tolerance, self.allowance)
        trained.reload_if_stale()
        if met.is_empty:
            self.model.buffers.restore()
            return met.outcome(None if request.clip_norm is None else math.nan, skipped=True)
        # Shards were scaled for the batch as it was planned; what was left out of it counts for nothing.
        unit = unit_of(request.num_samples) if met.counted else request.num_samples
        reduced = None
        bad = [one for found, _, _ in met.own for one in found]
        problem = None if request.scaled else problem_of(request, trained, met.losses, bad)
        if problem is None:
            if trained.area is not None:
                trained.area.collect()
            huge = any(huge for _, huge, _ in met.own)
            factor = unit / (met.total * request.scale) if met.counted else unit / met.total / request.scale
            reduced = self.reduce(trained, request, absent_of(met.frames, trained), factor, huge)
            problem = reduced.problem
        if problem is not None and not request.scaled:
            # All workers know it, and none will read what another folded: no further meeting is needed.
            self.tolerance.check(request.optimizer, problem.words, problem.advice)
            self.model.buffers.restore()
        else:
            self.model.buffers.merge(met.samples, met.changed)
            self._commit(request, trained, reduced if problem is None else None)
        # A snapshot at the end of this step is to hold what was looked at.
        integrity.updated(self.calls.heard(Wish.VERIFY) or self.calls.stands(Wish.SNAPSHOT))
        norm = None if request.clip_norm is None else reduced.norm if reduced is not None else math.nan
        words = problem.words if problem is not None and not request.scaled else ""
        return met.outcome(norm, problem is not None, words)

    def reduce(self, trained: Trained, request: Request, absent: Absent, factor: float, huge: bool) -> Reduced:
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
        chunks = trained.weights.layout.chunks[self.group.worker.rank]
        finished: Iterable[tuple[int, torch.Tensor | None]] = (
            (piece.parameter, flat)
            for index, chunk in enumerate(chunks)
            for piece, flat in zip(chunk, trained.sums.chunk(index, reduced.absent, reduced.factor), strict=True)
        )
        if reduced.ready is not None:
            finished = reduced.ready.items()
        bad = [i for i, g in finished if g is not None and not bool(torch.isfinite(g.to(parameters[i].dtype)).all())]
        met = self.calls.meet("step.update (finite)", "", min(bad, default=None))
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
            self.model.guard.open()
            if reduced.ready is not None:
                trained.update.apply_ready(reduced.ready)
            else:
                trained.update.apply(trained.sums, reduced.absent, reduced.factor)
            trained.weights.share(self.group)
            notice = trained.update.notice()
        frame = b"" if notice is None else wire.pack(notice)
        met = self.calls.meet("step.update (commit)", request.where, None, frame)
        self.clock.to("update")
        trained.update.settle([wire.unpack(f) if f else None for _, f in met])
        self.model.guard.accept_update()

    def _transformed(
        self, trained: Trained, request: Request, absent: Absent, factor: float
    ) -> dict[int, torch.Tensor]:
        """Return the finished gradient, flat, of every parameter that this worker owns wholly or in part.

        A tensor divided among owners is put together on each of them; each transforms it alike.
        """
        layout = trained.weights.layout
        mine: dict[int, list[torch.Tensor]] = {}
        for index, chunk in enumerate(layout.chunks[self.group.worker.rank]):
            for piece, total in zip(chunk, trained.sums.chunk(index, absent, factor), strict=True):
                if total is not None:
                    mine.setdefault(piece.parameter, []).append(total.clone())
        owners = [{piece.parameter for chunk in chunks for piece in chunk} for chunks in layout.chunks]
        divided = {i for i in mine if sum(i in owned for owned in owners) > 1}
        frame = wire.pack({i: torch.cat(parts) for i, parts in mine.items() if i in divided})
        for i in divided:
            mine[i] = []
        for _, theirs in self.calls.meet("step.update (transform)", request.where, None, frame):
            for i, part in wire.unpack(theirs).items():
                if i in divided:
                    mine[i].append(part)
        self.clock.to("update")
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
        rank = self.group.worker.rank
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
        met = self.calls.meet("step.update (norm)", "", None, frame)
        self.clock.to("update")
        per_tensor: dict[int, float] = {}
        for _, theirs in met:
            both = np.frombuffer(theirs, "<f8").reshape(2, -1)
            for value, owner in zip(both[0].tolist(), both[1].tolist(), strict=True):
                per_tensor[int(owner)] = per_tensor.get(int(owner), 0.0) + value
        total = 0.0
        for parameter in sorted(per_tensor):
            total += per_tensor[parameter]
        return math.sqrt(total) * (factor if ready is None else 1.0)


_ADVICE_ON_SUMS = "Each replica's gradients are finite: lower the learning rate, or scale the loss down."
_ADVICE_ON_TRANSFORMS = "Look at what transform does, and at gradients of zero."
