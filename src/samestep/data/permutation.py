"""The order of an epoch's samples: a pseudo-random permutation that is computed, never stored.

Positions are permuted by a Feistel network on the smallest power-of-two domain that holds them; what lands outside
0 .. n-1 is sent through again until it lands inside ("cycle walking"), so fewer than two trips are needed on average.

    position = | high | low |      even rounds:  high ^= F(low)      odd rounds:  low ^= F(high)

Each round can be undone whatever F is, so the whole is a permutation for every key.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from samestep.data.mixing import GOLDEN, mix, mix_one

BLOCK = 16_384
"""Positions that are computed at once and kept: 128 KiB."""

_MAX_SAMPLES = 1 << 62


class Order(ABC):
    """The sample ids of one epoch, by position.

    Attributes:
        num_samples: number of samples, and of positions.
    """

    def __init__(self, num_samples: int):
        if not 0 <= num_samples <= _MAX_SAMPLES:
            raise ValueError(f"An order needs 0 .. 2**62 samples, not {num_samples}.")
        self.num_samples = int(num_samples)

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Return the sample ids at positions start .. stop-1, int64; the caller may write to it.

        Raises:
            IndexError: positions outside 0 .. num_samples.
        """
        if not 0 <= start <= stop <= self.num_samples:
            raise IndexError(f"Positions {start}:{stop} of an order of {self.num_samples} samples.")
        return self._ids(start, stop)

    @abstractmethod
    def _ids(self, start: int, stop: int) -> np.ndarray: ...


class Identity(Order):
    """Samples in the order of the data set."""

    def _ids(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop, dtype=np.int64)


class Permutation(Order):
    """A pseudo-random permutation of 0 .. num_samples-1, a pure function of (num_samples, key).

    Needs memory for one block of positions, whatever the number of samples.

    Args:
        num_samples: number of samples.
        key: any integer, of which the low 64 bits count.
    """

    def __init__(self, num_samples: int, key: int):
        super().__init__(num_samples)
        num_bits = max(2, (self.num_samples - 1).bit_length())
        self._low_bits = num_bits // 2
        self._high_bits = num_bits - self._low_bits
        # Halves of few bits carry little randomness per round, so small sets take more rounds.
        num_rounds = max(6, 24 // self._low_bits)
        self._round_keys = [np.uint64(mix_one(key + i * GOLDEN)) for i in range(1, num_rounds + 1)]
        self._block_number = -1
        self._block = np.empty(0, dtype=np.int64)

    def _ids(self, start: int, stop: int) -> np.ndarray:
        out = np.empty(stop - start, dtype=np.int64)
        position = start
        while position < stop:
            number = position // BLOCK
            first = number * BLOCK
            end = min(stop, first + BLOCK)
            out[position - start : end - start] = self._block_at(number)[position - first : end - first]
            position = end
        return out

    def _block_at(self, number: int) -> np.ndarray:
        if number != self._block_number:
            first = number * BLOCK
            self._block = self._permuted(first, min(first + BLOCK, self.num_samples))
            self._block_number = number
        return self._block

    def _permuted(self, start: int, stop: int) -> np.ndarray:
        values = np.arange(start, stop, dtype=np.uint64)
        self._encrypt(values)
        outside = np.flatnonzero(values >= np.uint64(self.num_samples))
        while outside.size:
            walking = values[outside]
            self._encrypt(walking)
            values[outside] = walking
            outside = outside[walking >= np.uint64(self.num_samples)]
        return values.view(np.int64)

    def _encrypt(self, values: np.ndarray) -> None:
        low_bits = np.uint64(self._low_bits)
        mask_of = [np.uint64((1 << bits) - 1) for bits in (self._high_bits, self._low_bits)]
        halves = [values >> low_bits, values & mask_of[1]]
        noise, scratch = np.empty_like(values), np.empty_like(values)
        for i, round_key in enumerate(self._round_keys):
            target = i % 2
            np.add(halves[1 - target], round_key, out=noise)
            mix(noise, scratch)
            np.bitwise_and(noise, mask_of[target], out=noise)
            np.bitwise_xor(halves[target], noise, out=halves[target])
        np.left_shift(halves[0], low_bits, out=values)
        np.bitwise_or(values, halves[1], out=values)
