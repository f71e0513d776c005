"""Random numbers that depend on the recipe alone: every generator is seeded from where the computation stands."""

from __future__ import annotations

import functools
import random

import numpy as np
import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def key(*parts: int) -> int:
    """Return a 64-bit key for a tuple of integers.

    Each part is absorbed by one round of the splitmix64 finaliser (Steele, Lea, Flood, OOPSLA 2014), so keys of
    neighbouring steps or replicas are unrelated.
    """
    # The first parts are the same for all steps of a run, and a replay seeds for thousands.
    return _absorb(_begun(len(parts), *parts[:2]), *parts[2:])


def _absorb(state: int, *parts: int) -> int:
    for part in parts:
        state = (state ^ (part & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 31) * 0x94D049BB133111EB & _MASK
        state = (state ^ state >> 29) + _GOLDEN & _MASK
    return state


@functools.lru_cache(maxsize=64)
def _begun(*parts: int) -> int:
    return _absorb(_GOLDEN, *parts)


def seed_everything(seed_key: int) -> None:
    """Seed the global generators of torch (CPU, and CUDA if in use), NumPy and Python from a 64-bit key."""
    torch.default_generator.manual_seed(seed_key)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed_key)
    np.random.seed(seed_key & 0xFFFFFFFF)
    random.seed(seed_key)


def seed_start(seed: int) -> None:
    """Seed for the code before the first step: model construction."""
    seed_everything(key(1, seed))


def seed_step(seed: int, step: int) -> None:
    """Seed for the code around a step's shards."""
    seed_everything(key(2, seed, step))


def seed_shard(seed: int, step: int, pass_: int, replica: int) -> None:
    """Seed for the forward and backward of one shard."""
    seed_everything(key(3, seed, step, pass_, replica))


def seed_sample(seed: int, epoch: int, sample: int) -> None:
    """Seed for fetching one sample (augmentation)."""
    seed_everything(key(4, seed, epoch, sample))


def seed_evaluation(seed: int, call: int, batch: int) -> None:
    """Seed for one batch of an evaluation."""
    seed_everything(key(5, seed, call, batch))


def seed_transform(seed: int, step: int, pass_: int, parameter: int) -> None:
    """Seed for a gradient transform of one parameter."""
    seed_everything(key(7, seed, step, pass_, parameter))
