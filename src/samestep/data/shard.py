"""The shards of a step: asked for by ids, answered with the ids that were really fetched and their batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from samestep.data.source import BadSample, SeedSample, Source


@dataclass(frozen=True, slots=True)
class Request:
    """What one step reads on this worker.

    Attributes:
        epoch: the epoch's number.
        ids: sample ids of each replica played here, in replica order; int64, may be empty.
    """

    epoch: int
    ids: tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """What one replica reads in one step.

    Attributes:
        ids: the sample ids that were fetched, int64. They come from where the data was read, not from the request.
        batch: what the source made of them; None if there are none.
        bad: samples that were asked for and left out, in the order in which they were asked for.
    """

    ids: np.ndarray
    batch: Any
    bad: tuple[BadSample, ...] = ()

    @property
    def size(self) -> int:
        """Number of samples."""
        return int(self.ids.size)


def shards_of(
    request: Request, source: Source, seed: int, seed_sample: SeedSample, skip_bad: bool = False
) -> list[Shard | None]:
    """Fetch the shards of a request, here and now; None stands for one of which no sample was asked for.

    Args:
        request: what to read.
        source: where samples come from.
        seed: the run's seed.
        seed_sample: seeds the global generators for one sample.
        skip_bad: leave out samples that cannot be read.

    Raises:
        DataError: a sample or the collate function failed.
    """
    return [
        _shard_of(ids, request.epoch, source, seed, seed_sample, skip_bad) if ids.size else None for ids in request.ids
    ]


def _shard_of(ids: np.ndarray, epoch: int, source: Source, seed: int, seed_sample: SeedSample, skip_bad: bool) -> Shard:
    try:
        return Shard(ids, source.fetch(ids, seed, epoch, seed_sample))
    except Exception:
        if not skip_bad:
            raise
    bad = source.bad_among(ids, seed, epoch, seed_sample)
    good = ids[~np.isin(ids, [one.sample for one in bad])]
    # Where none is bad, the error has passed, or is one of the collate function, and is raised by this second try.
    return Shard(good, source.fetch(good, seed, epoch, seed_sample) if good.size else None, tuple(bad))
