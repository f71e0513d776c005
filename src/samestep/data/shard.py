"""The shards of a step: asked for by ids, answered with the ids that were really fetched and their batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from samestep.data.source import SeedSample, Source


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
        batch: what the source made of them.
    """

    ids: np.ndarray
    batch: Any

    @property
    def size(self) -> int:
        """Number of samples."""
        return int(self.ids.size)


def shards_of(request: Request, source: Source, seed: int, seed_sample: SeedSample) -> list[Shard | None]:
    """Fetch the shards of a request, here and now; None stands for an empty one.

    Raises:
        DataError: a sample or the collate function failed.
    """
    return [
        Shard(ids, source.fetch(ids, seed, request.epoch, seed_sample)) if ids.size else None for ids in request.ids
    ]
