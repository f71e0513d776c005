"""A fingerprint of a data set's content: digests of a few samples, always the same ones for the same length.

It looks at the first and the last sample, two more, and, where reading runs no user code, up to 60 others together.
Another sample that changed is not seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from samestep.data.loader import Loader
from samestep.data.mixing import GOLDEN, MASK, mix_one
from samestep.data.shard import Request
from samestep.data.source import Columns, SeedSample, Source
from samestep.data.tensors import leaves_of
from samestep.errors import DataError

Digest = Callable[[Any], str]
"""Names a batch's exact content. Raises TypeError where it holds something other than plain values."""

_NUM_ALONE = 4
_NUM_SAMPLES = 64
_MAX_BYTES = 4 << 20
_PATIENCE = 1.0
"""Seconds that user code gets for its samples."""


def fingerprint(source: Source, digest: Digest, seed_sample: SeedSample) -> list[str]:
    """Return digests of some samples' content; compare with `agree`.

    Fewer of them, or none, where user code that reads samples fails, is slow, or gives what has no digest; none where
    it gives other content for the same sample and seed. No random generator of this process moves.

    Args:
        source: holds the samples.
        digest: digest of a batch.
        seed_sample: seeds the global generators for one sample.
    """
    pieces = chosen(source.num_samples)
    try:
        if type(source) is not Columns:
            return _of_user_code(source, pieces[:_NUM_ALONE], digest, seed_sample)
        batches = [source.fetch(ids, 0, 0, seed_sample) for ids in pieces[:_NUM_ALONE]]
        if rest := pieces[_NUM_ALONE:]:
            row_bytes = sum(leaf.nbytes for leaf in leaves_of(batches[0], torch.Tensor))
            if most := _MAX_BYTES // max(1, row_bytes):
                batches.append(source.fetch(rest[0][:most], 0, 0, seed_sample))
        return [digest(batch) for batch in batches]
    except TypeError:
        return []


def agree(first: Sequence[str], second: Sequence[str]) -> bool:
    """Return whether two fingerprints agree in all digests that both have."""
    return all(one == other for one, other in zip(first, second, strict=False))


def chosen(num_samples: int) -> list[np.ndarray]:
    """Return the ids of the samples to look at: a few alone, the others together. A function of the length alone."""
    found = dict.fromkeys([0, num_samples - 1] if num_samples else [])
    state = num_samples
    while len(found) < min(_NUM_SAMPLES, num_samples):
        state = (state + GOLDEN) & MASK
        found[mix_one(state) % num_samples] = None
    ids = list(found)
    pieces = [np.array([i], dtype=np.int64) for i in ids[:_NUM_ALONE]]
    return [*pieces, np.array(ids[_NUM_ALONE:], dtype=np.int64)] if len(ids) > _NUM_ALONE else pieces


def _of_user_code(source: Source, pieces: list[np.ndarray], digest: Digest, seed_sample: SeedSample) -> list[str]:
    """Fetch each sample twice, in a loader process.

    What user code leaves behind (open files, caches, positions of its own generators) must not be there when training
    begins, nor in the loaders that are forked then.
    """
    deadline = time.monotonic() + _PATIENCE
    found: list[str] = []
    try:
        loader = Loader(source, 0, seed_sample)
    except OSError:
        return found
    try:
        for ids in pieces:
            loader.ask(Request(0, (ids,)))
            loader.ask(Request(0, (ids,)))
        for _ in pieces:
            twice: list[str] = []
            while len(twice) < 2:
                if not loader.has_answer(deadline - time.monotonic()):
                    return found
                twice += [digest(shard.batch) for shard in loader.answer() if shard is not None]
            if twice[0] != twice[1]:
                return []
            found.append(twice[0])
    except DataError:
        # Training reports it when it comes to this sample.
        return found
    finally:
        loader.kill()
        loader.close()
    return found
