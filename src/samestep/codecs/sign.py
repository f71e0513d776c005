"""The codec of one bit per element: its sign, and the mean magnitude of its block.

1-bit SGD (Seide, Fu, Droppo, Li, Yu, Interspeech 2014) sends signs with two values per column, and what is lost is
added to the next gradient. Karimireddy, Rebjock, Stich and Jaggi, "Error Feedback Fixes SignSGD and other Gradient
Compression Schemes", ICML 2019, show that signs with the mean magnitude as scale, which is what is sent here, reach the
rate of SGD with error feedback, and may not converge without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from samestep.codecs.codec import Codec, Key, State, num_elements, sum_dtype
from samestep.errors import SettingsError

CHUNK = 131_072
"""Elements that are encoded at once. With fewer, calls cost more than work; many more do not fit into the cache."""


@dataclass(frozen=True)
class Sign(Codec):
    """One bit per element, and one scale per block. Wants `Feedback`; 1-bit SGD also warms up.

        payload   | scale of each block (sum dtype) | a bit per element, set if it is below zero |

    Error: |error| <= the larger of |x| and the scale, the block's mean magnitude; the squared error of a block is the
    sum of its squares less its elements * scale**2. A block that holds a NaN or an infinity decodes to NaN.

    Attributes:
        block: elements that share a scale, a multiple of 8; None for one scale per tensor.
    """

    block: int | None = None

    def __post_init__(self) -> None:
        """Look at the arguments.

        Raises:
            SettingsError: block is neither None nor a multiple of 8 from 8 up.
        """
        if self.block is not None and (not isinstance(self.block, int) or self.block < 8 or self.block % 8):
            raise SettingsError(
                f"You set Sign(block={self.block!r}), but a block is a multiple of 8 elements, from 8 up. Use "
                f"block=1024, or leave it out: then the tensor is one block."
            )

    def num_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        count = num_elements(shape)
        return self._num_blocks(count) * sum_dtype(dtype).itemsize + -(-count // 8)

    def _num_blocks(self, count: int) -> int:
        return -(-count // self.block) if self.block else min(count, 1)

    def _pack(self, values: torch.Tensor, key: Key, state: State) -> torch.Tensor:
        flat = values.reshape(-1).numpy()
        payload = torch.empty(self.num_bytes(values.shape, values.dtype), dtype=torch.uint8)
        scales, signs = self._parts(payload, len(flat), flat.dtype)
        signs[:] = np.packbits(flat < 0)
        block = self.block or max(1, len(flat))
        num_whole = len(flat) // block
        step = max(1, CHUNK // block)
        for first in range(0, num_whole, step):
            last = min(first + step, num_whole)
            scales[first:last] = _means(flat[first * block : last * block].reshape(last - first, block))
        if num_whole < len(scales):
            scales[num_whole:] = _means(flat[num_whole * block :].reshape(1, -1))
        return payload

    def _unpack(self, payload: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(shape.numel(), dtype=dtype)
        flat = out.numpy()
        scales, signs = self._parts(payload, len(flat), flat.dtype)
        block = self.block or max(1, len(flat))
        bits = np.unpackbits(signs, count=len(flat)).view(np.int8)
        bits *= -2
        bits += 1
        num_whole = len(flat) // block
        whole = flat[: num_whole * block].reshape(num_whole, block)
        np.multiply(bits[: num_whole * block].reshape(num_whole, block), scales[:num_whole, None], out=whole)
        np.multiply(bits[num_whole * block :], scales[num_whole:], out=flat[num_whole * block :])
        return out

    def _parts(self, payload: torch.Tensor, count: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Return the scales and the bytes of signs, as views."""
        size = self._num_blocks(count) * dtype.itemsize
        everything = payload.numpy()
        return everything[:size].view(dtype), everything[size:]


def _means(rows: np.ndarray) -> np.ndarray:
    """Return the mean magnitude of each row; NaN where one is not finite."""
    num_columns = rows.dtype.type(rows.shape[1])
    with np.errstate(all="ignore"):
        magnitudes = np.abs(rows)
        means = magnitudes.sum(axis=1) / num_columns
        over = np.isinf(means)
        if over.any():
            # The sum overflows: that of what the largest is multiplied by does not. Infinity divided by itself is NaN.
            most = magnitudes[over].max(axis=1)
            shares = (magnitudes[over] / most[:, None]).sum(axis=1) / num_columns
            means[over] = np.minimum(shares, 1) * most
        return means
