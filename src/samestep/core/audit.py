"""Audits: now and then one shard is computed by a second worker too, and what comes of it is compared bit by bit.

A core that now and then computes wrong leaves no other trace. A draw that is the same on every worker says in which
pass, which replica, and who checks whom.

[Note: who is wrong]
Two results that differ do not say which is wrong. So where they do, every worker computes the shard once more. With
the first two there are then three results or more; a worker whose result is not that of most of them is wrong. Where
there is no such majority (two workers, each of which comes to its own result again) it stays open.
"""

from __future__ import annotations

import os
import platform
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from samestep.core.randomness import key
from samestep.storage.digest import pieces

_PLAIN = (torch.float32, torch.float64)
"""What NumPy knows too."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What is audited in one pass.

    Attributes:
        replica: whose shard.
        player: rank of the worker that plays it.
        auditor: rank of the one that computes it too; the same if there is only one.
    """

    replica: int
    player: int
    auditor: int


def is_due(share: float, seeds: tuple[int, int, int]) -> bool:
    """Return whether there is an audit in the pass of (seed, step, pass), as there is in a share of them, 0..1."""
    return share > 0 and key(8, *seeds) < share * 2.0**64


def draw(seeds: tuple[int, int, int], replicas: Sequence[int], runs: Sequence[range]) -> Draw:
    """Return what is audited in a pass.

    Args:
        seeds: (seed, step, pass).
        replicas: those that have samples, at least one.
        runs: the replicas that each worker plays.
    """
    replica = replicas[key(8, *seeds, 0) % len(replicas)]
    player = next(rank for rank, run in enumerate(runs) if replica in run)
    shift = 1 + key(8, *seeds, 1) % (len(runs) - 1) if len(runs) > 1 else 0
    return Draw(replica=replica, player=player, auditor=(player + shift) % len(runs))


def checksum(gradient: torch.Tensor) -> int:
    """Return the CRC-32 of a gradient's bytes in row-major order.

    A sum of words is ten times as fast, but two sign bits cancel in it; and this is the smaller part of an audit.
    """
    if gradient.is_cpu and gradient.dtype in _PLAIN and gradient.is_contiguous() and not gradient.is_neg():
        return zlib.crc32(gradient.numpy().data)
    crc = 0
    for piece in pieces(gradient):
        crc = zlib.crc32(piece, crc)
    return crc


@dataclass(frozen=True, kw_only=True)
class Account:
    """What came of playing a shard once. JSON values.

    Attributes:
        samples: digest of the ids of its samples: others, if one could be read by one worker only.
        data: digest of what was read of them; empty where there is none.
        losses: [loss, count] of each call of backward, in hexadecimal.
        gradients: for each optimizer, [number, checksum] of each parameter that has a gradient.
    """

    samples: str
    data: str
    losses: list[list[str]]
    gradients: list[list[list[int]]]

    def to_facts(self) -> dict[str, Any]:
        """Return plain facts, for a message."""
        return asdict(self)

    def differences(self, other: Account, names: Sequence[Sequence[str]]) -> str:
        """Return words for what is not the same in `other`; empty if all is.

        Args:
            other: of the same shard.
            names: of each optimizer's parameters.
        """
        found = []
        if self.data != other.data:
            found.append("the data")
        if self.losses != other.losses:
            found.append("the loss")
        differing = []
        for ours, theirs, known in zip(self.gradients, other.gradients, names, strict=True):
            mine, yours = ({one[0]: one[1] for one in pairs} for pairs in (ours, theirs))
            differing += [known[i] for i in sorted({*mine, *yours}) if mine.get(i) != yours.get(i)]
        if differing:
            total = sum(map(len, names))
            more = f" and {len(differing) - 1} more of {total} parameters" if len(differing) > 1 else ""
            found.append(f"the gradient of {differing[0]!r}{more}")
        return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


def odd_ones(results: Sequence[tuple[int, Account]]) -> Counter[int] | None:
    """Return how often each worker came to another result than most of all; None if no result has a majority.

    Args:
        results: (rank, what it came to). See [Note: who is wrong].
    """
    for _, candidate in results:
        others = [rank for rank, account in results if account != candidate]
        if 2 * len(others) < len(results):
            return Counter(others)
    return None


def place(rank: int, device: str) -> str:
    """Return words for who this worker is, and where."""
    return f"worker {rank} (host {platform.node()}, pid {os.getpid()}, {device})"


def verdict(where: str, places: Sequence[str], results: Sequence[tuple[int, Account]], what: str) -> str:
    """Return the message where two results differ, and all have been made once more.

    Args:
        where: names the shard.
        places: who each worker is.
        results: (rank, what it came to): the first two, then one of each worker.
        what: in what the first two differ.
    """
    (player, _), (auditor, _), *_ = results
    if player == auditor:
        who = f"{places[player]} came to different bits in two tries"
    else:
        who = f"{places[player]}, which plays it, and {places[auditor]}, which checked it, came to different bits"
    words = f"In {where}, {who}, in {what}. Then all workers computed it once more. "
    odd = odd_ones(results)
    if odd is None and len(places) < 3:
        words += "No result has a majority; with three workers or more it would be told who computes wrong. "
    elif odd is None:
        words += "No result has a majority. "
    else:
        counts = Counter(rank for rank, _ in results)
        times = [f"{places[rank]} in {count} of {counts[rank]} tries" for rank, count in sorted(odd.items())]
        words += f"Not the bits of the majority: {', '.join(times)}. The processor or memory there may be faulty. "
    return words + (
        "A script whose shards depend on more than their batch (generators of its own, clocks, run.worker, numbers "
        "kept from shard to shard) looks the same: `samestep verify` tells."
    )
