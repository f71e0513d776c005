"""A round: replicas that trained apart agree on new weights to go on from.

    [1] encode    each replica: weights that all started from - its own weights, compressed
    [2] send      where memory is not shared: what was encoded goes to every worker
    [3] decode    and add along the tree, each replica with its weight
    [4] apply     an outer optimizer takes the sum as a gradient

Where memory is shared, owners update their parts. Elsewhere every worker makes the same update of everything: what goes
over the wire is then only what was encoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from samestep.agree.agreement import Agreement, Live
from samestep.agree.apart import Apart
from samestep.agree.coding import Coding
from samestep.agree.meeting import Request, absent_of
from samestep.core.model import Trained
from samestep.errors import UsageError
from samestep.storage import wire


def reach(
    live: Live,
    apart: Apart,
    coding: Coding,
    step: int,
    parameters: Sequence[int],
    shares: Mapping[int, float],
    where: str,
) -> None:
    """Let replicas agree on some parameters. Collective.

    Args:
        live: where the workers meet.
        apart: the replicas.
        coding: what compresses.
        step: number of updates so far.
        parameters: numbers of the parameters.
        shares: what each replica that takes part weighs; adds up to 1.
        where: line of the script.
    """
    trained, group, division = apart.trained, live.group, live.model.division
    mine = [r for r in apart.mine if r in shares]
    differences: dict[int, list[torch.Tensor]] = {}
    if group.shares_memory:
        for r in mine:
            differences[r] = [coding.through(step, r, i, apart.owns[r].difference(i)) for i in parameters]
    else:
        payloads = [coding.encode(step, r, i, apart.owns[r].difference(i)) for r in mine for i in parameters]
        frame = b"".join(bytes(payload.numpy().data) for payload in payloads)
        for rank, (_, message) in enumerate(live.calls.meet("the round (send)", where, None, frame)):
            replicas = [r for r in division.of(rank) if r in shares]
            differences.update(coding.decoded(step, message, replicas, parameters))
    trained.gradients.begin_pass()
    leaves = apart.mine if group.shares_memory else range(division.num_replicas)
    for number, replica in enumerate(leaves):
        trained.gradients.begin_shard(number)
        for index, difference in zip(parameters, differences.get(replica, ()), strict=False):
            trained.gradients.give(index, difference.mul_(shares[replica]))
        trained.gradients.end_shard()
    # Who updates alone needs nobody: it finds by itself what is missing.
    frames = [trained.gradients.presence() or b""]
    if group.shares_memory:
        frames = [theirs for _, theirs in live.calls.meet("the round (reduce)", where, None, frames[0])]
    live.clock.to("update")
    if trained.area is not None:
        trained.area.collect()
    live.model.guard.open()
    trained.update.apply(trained.sums, absent_of(frames, trained), 1.0)
    notice = trained.update.notice()
    frames = [b"" if notice is None else wire.pack(notice)]
    if group.shares_memory:
        frames = [theirs for _, theirs in live.calls.meet("the round (commit)", where, None, frames[0])]
    live.clock.to("update")
    trained.update.settle([wire.unpack(frame) if frame else None for frame in frames])
    coding.commit()
    live.model.guard.accept_update()


def check_apart(recipe: Agreement, request: Request, trained: Trained) -> None:
    """Refuse what replicas that step by themselves cannot do.

    Raises:
        UsageError: a GradScaler is in use, or a state was loaded into the user's optimizer.
    """
    if request.scaled:
        raise UsageError(
            f"You gave step.update a GradScaler at {request.where} under agree={recipe!r}: replicas step by "
            f"themselves, and would each need a scale of their own. Use bfloat16 without a scaler, or Synchronous()."
        )
    if trained.stale:
        raise UsageError(
            f"A state was loaded into {type(trained.optimizer).__name__} after run.replicate, under agree={recipe!r}, "
            f"where each replica has an optimizer of its own. Load it before run.replicate."
        )


def mean_norm(told: Iterable[Sequence[Sequence[float]]], weights: Mapping[int, float]) -> float:
    """Return the mean of the norms that workers told, as (replica, norm), weighted as the losses are."""
    norms = {int(replica): norm for of_worker in told for replica, norm in of_worker}
    total = math.fsum(weights[replica] for replica in norms)
    return math.fsum(norms[r] * weights[r] for r in sorted(norms)) / total if total else math.nan
