"""The codec that loses nothing: what compression is compared with, and what warms up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from samestep.codecs.codec import Codec, Key, State, num_elements, sum_dtype, typed


@dataclass(frozen=True)
class Exact(Codec):
    """The elements themselves: 4 bytes each, 8 of float64.

    Error: none. NaN and infinity are carried.
    """

    @property
    def unbiased(self) -> bool:
        return True

    def num_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        return num_elements(shape) * sum_dtype(dtype).itemsize

    def _pack(self, values: torch.Tensor, key: Key, state: State) -> torch.Tensor:
        return values.reshape(-1).clone().view(torch.uint8)

    def _unpack(self, payload: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return typed(payload.clone(), dtype)
