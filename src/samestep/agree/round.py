"""A round: replicas that trained apart agree on new weights to go on from.

    [1] encode    each replica: weights that all started from - its own weights, compressed
    [2] send      where memory is not shared: what was encoded goes to every worker
    [3] decode    and add along the tree, each replica with its weight
    [4] apply     an outer optimizer takes the sum as a gradient

Where memory is shared, owners update their parts. Elsewhere every worker makes the same update of everything: what goes
over the wire is then only what was encoded.

A round that is late is begun some updates before it is ended. It is about the weights that replicas have where it
begins, their anchors: [1] and [2] happen there, and go on in the background; [3] and [4] where it ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from samestep.agree.agreement import Agreement, Live
from samestep.agree.apart import Apart
from samestep.agree.coding import Coding
from samestep.agree.meeting import Request, absent_of
from samestep.core.model import Trained
from samestep.errors import UsageError
from samestep.storage import wire


@dataclass
class Round:
    """One round.

    Attributes:
        step: number of updates when it begins.
        fragment: what the replicas agree on, and
        parameters: the numbers of its parameters.
        items: samples of each replica since the last round, or what else the user counts.
        is_late: whether it is ended some updates after it begins.
        sent: waits for what each worker encoded, where it is late and memory is not shared.
    """

    step: int
    fragment: int
    parameters: Sequence[int]
    items: Mapping[int, float]
    is_late: bool
    sent: Callable[[], list[bytes]] | None = None

    @property
    def shares(self) -> dict[int, float]:
        """What each replica that takes part weighs; adds up to 1."""
        total = math.fsum(self.items.values())
        return {replica: count / total for replica, count in sorted(self.items.items()) if count}


def begin(live: Live, apart: Apart, coding: Coding, round_: Round) -> None:
    """Begin a late round; the arguments are those of `send`. Collective."""
    for replica in apart.mine:
        apart.owns[replica].anchor(round_.parameters)
    send(live, apart, coding, round_)


def send(live: Live, apart: Apart, coding: Coding, round_: Round) -> None:
    """Let what the replicas of a late round encode go to the workers that need it, while work goes on. Collective.

    Args:
        live: where the workers meet.
        apart: the replicas, with anchors.
        coding: what compresses.
        round_: the round.
    """
    if not live.group.shares_memory:
        shares, each = round_.shares, coding.num_bytes(round_.step, round_.parameters)
        lengths = [each * sum(r in shares for r in run) for run in live.model.division.runs]
        round_.sent = live.group.post(_encoded(apart, coding, round_), lengths)


def end(live: Live, apart: Apart, coding: Coding, round_: Round, where: str) -> None:
    """Let replicas agree, and go on from what they agreed on. Collective.

    Args:
        live: where the workers meet.
        apart: the replicas.
        coding: what compresses.
        round_: the round.
        where: line of the script.
    """
    _reach(live, apart, coding, round_, where)
    for replica in apart.mine:
        own = apart.owns[replica]
        if round_.is_late:
            own.go_on(round_.parameters)
        else:
            own.begin(round_.parameters)


def _reach(live: Live, apart: Apart, coding: Coding, round_: Round, where: str) -> None:
    trained, group, division = apart.trained, live.group, live.model.division
    step, parameters, shares = round_.step, round_.parameters, round_.shares
    differences: dict[int, list[torch.Tensor]] = {}
    if group.shares_memory:
        for r in (r for r in apart.mine if r in shares):
            own = apart.owns[r]
            differences[r] = [coding.through(step, r, i, own.difference(i, round_.is_late)) for i in parameters]
    else:
        for rank, message in enumerate(_messages(live, apart, coding, round_, where)):
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
    coding.commit(parameters)
    live.model.guard.accept_update()


def _messages(live: Live, apart: Apart, coding: Coding, round_: Round, where: str) -> list[bytes]:
    """Return what each worker encoded, in rank order. Collective."""
    if round_.sent is None:
        met = live.calls.meet("the round (send)", where, None, _encoded(apart, coding, round_))
        return [message for _, message in met]
    before = live.clock.to("wait")
    messages = round_.sent()
    live.clock.to(before)
    return messages


def _encoded(apart: Apart, coding: Coding, round_: Round) -> bytes:
    """Return what the replicas played here encode."""
    shares = round_.shares
    payloads = [
        coding.encode(round_.step, r, i, apart.owns[r].difference(i, round_.is_late))
        for r in apart.mine
        if r in shares
        for i in round_.parameters
    ]
    return b"".join(bytes(payload.numpy().data) for payload in payloads)


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
