"""Codecs of whole numbers: each block of elements is divided by its scale and rounded.

    payload   | scale of each block (sum dtype) | one or half a byte per element |

The scale is the block's largest magnitude divided by the largest whole number, so nothing is cut off. Rounding is
*stochastic*: up with a probability of what is above the whole number below, so the mean over keys is the element, as
in QSGD (Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD: Communication-Efficient SGD via Gradient Quantization and
Encoding", NeurIPS 2017). Their scale is the norm of a block and their whole numbers have no fixed length; here the
scale is the maximum, as in the experiments of that paper, and the length is fixed.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from samestep.codecs.codec import Codec, Key, State, num_elements, sum_dtype
from samestep.codecs.noise import Noise, seed_of
from samestep.errors import SettingsError

CHUNK = 131_072
"""Elements that are encoded at once. With fewer, calls cost more than work; many more do not fit into the cache."""

_NOISE = 65_536
"""A random number decides between this many chances to round up."""


class _Blocks(Codec):
    """What whole numbers have in common: all but how they are laid into bytes."""

    block: int
    stochastic: bool

    def __post_init__(self) -> None:
        """Look at the arguments.

        Raises:
            SettingsError: block is not an even number from 2 up.
        """
        if not isinstance(self.block, int) or self.block < 2 or self.block % 2:
            raise SettingsError(
                f"You set {type(self).__name__}(block={self.block!r}), but a block is an even number of elements from "
                f"2 up. Use block=256, or leave it out."
            )

    @property
    def unbiased(self) -> bool:
        return self.stochastic

    @property
    @abstractmethod
    def _largest(self) -> int:
        """The largest whole number; the smallest is its negative."""

    @abstractmethod
    def _num_packed(self, count: int) -> int:
        """Return the bytes of so many whole numbers."""

    @abstractmethod
    def _lay(self, numbers: np.ndarray, place: np.ndarray) -> None:
        """Write whole numbers (int8, an even count) into their bytes."""

    @abstractmethod
    def _lift(self, packed: np.ndarray) -> np.ndarray:
        """Return the whole numbers of some bytes, int8; one more if an odd count of them was written."""

    def num_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        count = num_elements(shape)
        return -(-count // self.block) * sum_dtype(dtype).itemsize + self._num_packed(count)

    def _pack(self, values: torch.Tensor, key: Key, state: State) -> torch.Tensor:
        flat = values.reshape(-1).numpy()
        payload = torch.empty(self.num_bytes(values.shape, values.dtype), dtype=torch.uint8)
        scales, packed = self._parts(payload, len(flat), flat.dtype)
        noise = Noise(seed_of(key)) if self.stochastic else None
        num_whole = len(flat) // self.block
        step = _num_rows(self.block)
        for first in range(0, num_whole, step):
            last = min(first + step, num_whole)
            begin, end = first * self.block, last * self.block
            numbers = self._rounded(flat[begin:end].reshape(last - first, self.block), scales[first:last], noise)
            self._lay(numbers.reshape(-1), packed[self._num_packed(begin) : self._num_packed(end)])
        rest = flat[num_whole * self.block :]
        if len(rest):
            row = np.zeros((1, len(rest) + len(rest) % 2), flat.dtype)
            row[0, : len(rest)] = rest
            numbers = self._rounded(row, scales[num_whole:], noise).reshape(-1)
            place = np.empty(self._num_packed(len(numbers)), np.uint8)
            self._lay(numbers, place)
            packed[self._num_packed(num_whole * self.block) :] = place[: self._num_packed(len(rest))]
        return payload

    def _unpack(self, payload: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(shape.numel(), dtype=dtype)
        flat = out.numpy()
        scales, packed = self._parts(payload, len(flat), flat.dtype)
        num_whole = len(flat) // self.block
        step = _num_rows(self.block)
        with np.errstate(all="ignore"):
            for first in range(0, num_whole, step):
                last = min(first + step, num_whole)
                begin, end = first * self.block, last * self.block
                numbers = self._lift(packed[self._num_packed(begin) : self._num_packed(end)])
                rows = (last - first, self.block)
                np.multiply(numbers.reshape(rows), scales[first:last, None], out=flat[begin:end].reshape(rows))
            begin = num_whole * self.block
            if begin < len(flat):
                rest = self._lift(packed[self._num_packed(begin) :])[: len(flat) - begin]
                np.multiply(rest, scales[num_whole], out=flat[begin:])
        return out

    def _parts(self, payload: torch.Tensor, count: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Return the scales and the bytes of whole numbers, as views."""
        size = -(-count // self.block) * dtype.itemsize
        everything = payload.numpy()
        return everything[:size].view(dtype), everything[size:]

    def _rounded(self, rows: np.ndarray, scales: np.ndarray, noise: Noise | None) -> np.ndarray:
        """Return blocks as whole numbers, int8, and write their scales; one that is not finite gets the scale NaN."""
        with np.errstate(all="ignore"):
            most = np.maximum(rows.max(axis=1), -rows.min(axis=1))
            wrong = ~np.isfinite(most)
            scales[:] = self._scales(most)
            divisors = np.where(scales > 0, scales, scales.dtype.type(1))
            ratios = rows / divisors[:, None]
            if wrong.any():
                scales[wrong] = math.nan
                ratios[wrong] = 0
            np.clip(ratios, -self._largest, self._largest, out=ratios)
            if noise is None:
                return np.rint(ratios, out=ratios).astype(np.int8)
            # In steps of 1/65,536, so that adding the noise and cutting off is arithmetic of whole numbers.
            ratios *= _NOISE
            fine = np.rint(ratios, out=ratios).astype(np.int32)
            fine += noise.uint16(fine.size).reshape(fine.shape)
            fine >>= 16
            return fine.astype(np.int8)

    def _scales(self, most: np.ndarray) -> np.ndarray:
        """Return the scale of blocks with these largest magnitudes.

        Denormal ones are coarse, and one that is rounded down by a half would cut off a third of the block: it is
        rounded up. The product with the largest number must not overflow, or the largest elements become infinite.
        """
        dtype = most.dtype.type
        scales = most / dtype(self._largest)
        small = scales < 1e3 * np.finfo(dtype).tiny
        if small.any():
            short = small & (scales * dtype(self._largest) < most)
            scales[short] = np.nextafter(scales[short], dtype(math.inf))
        return np.minimum(scales, np.nextafter(np.finfo(dtype).max / dtype(self._largest), dtype(0)))


def _num_rows(block: int) -> int:
    """Return how many blocks are encoded at once: an even number, so that no random word is drawn for two chunks."""
    return max(2, CHUNK // block // 2 * 2)


@dataclass(frozen=True)
class Int8(_Blocks):
    """One byte per element, and one scale per block.

    Error: |error| <= scale, the block's largest magnitude / 127; half of it without `stochastic`. A block that holds a
    NaN or an infinity decodes to NaN.

    Attributes:
        block: elements that share a scale; even. 256 cost 1.6 % more bytes than one scale per tensor.
        stochastic: round at random, without bias; else to nearest, which wants `Feedback` or loses small elements.
    """

    block: int = 256
    stochastic: bool = True

    @property
    def _largest(self) -> int:
        return 127

    def _num_packed(self, count: int) -> int:
        return count

    def _lay(self, numbers: np.ndarray, place: np.ndarray) -> None:
        place[:] = numbers.view(np.uint8)

    def _lift(self, packed: np.ndarray) -> np.ndarray:
        return packed.view(np.int8)


@dataclass(frozen=True)
class Int4(_Blocks):
    """Half a byte per element, and one scale per block.

    Error: |error| <= scale, the block's largest magnitude / 7; half of it without `stochastic`. A block that holds a
    NaN or an infinity decodes to NaN.

    Attributes:
        block: elements that share a scale; even. A large element makes all others of its block coarse.
        stochastic: as in `Int8`.
    """

    block: int = 128
    stochastic: bool = True

    @property
    def _largest(self) -> int:
        return 7

    def _num_packed(self, count: int) -> int:
        return -(-count // 2)

    def _lay(self, numbers: np.ndarray, place: np.ndarray) -> None:
        pairs = (numbers + np.int8(8)).view("<u2")
        place[:] = pairs | pairs >> 4

    def _lift(self, packed: np.ndarray) -> np.ndarray:
        pairs = packed.astype("<u2")
        pairs |= pairs << 4
        pairs &= 0x0F0F
        return pairs.view(np.int8) - np.int8(8)
