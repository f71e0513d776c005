"""Random numbers of a codec: Philox (Salmon, Moraes, Dror, Shaw, SC'11), a counter under a key, from NumPy.

NumPy keeps the raw stream of its bit generators for good (NEP 19), which it does not promise for distributions; so
only raw words are taken. No global generator is read or written.
"""

from __future__ import annotations

import numpy as np

from samestep.codecs.codec import Key
from samestep.core import randomness


def seed_of(key: Key) -> int:
    """Return the 64 bits that all random numbers under a key are drawn from."""
    return randomness.key(8, *key)


class Noise:
    """The stream of random numbers under one seed, from its start."""

    def __init__(self, seed: int):
        """Take 64 bits, such as `seed_of` gives."""
        self._words = np.random.Philox(key=seed)

    def uint16(self, count: int) -> np.ndarray:
        """Return the next `count` numbers from 0 to 65,535; but for the last time, `count` is a multiple of 4."""
        return self._drawn(-(-count // 4)).view("<u2")[:count]

    def uint32(self, count: int) -> np.ndarray:
        """Return the next `count` numbers from 0 to 2**32 - 1; but for the last time, `count` is a multiple of 2."""
        return self._drawn(-(-count // 2)).view("<u4")[:count]

    def below(self, bound: int) -> int:
        """Return the next number from 0 to `bound` - 1; `bound` is far below 2**64."""
        return int(self._drawn(1)[0]) % bound

    def normal(self, count: int) -> np.ndarray:
        """Return `count` numbers that are close to normal, float64: sums of 12 even ones."""
        return self.uint32(12 * count).reshape(count, 12).sum(axis=1) * 2.0**-32 - 6.0

    def _drawn(self, count: int) -> np.ndarray:
        return self._words.random_raw(count).astype("<u8", copy=False)
