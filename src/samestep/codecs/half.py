"""Codecs of two bytes per element: the narrower floating dtypes, rounded to nearest, ties to even."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from samestep.codecs.codec import Codec, Key, State, num_elements, typed


class _Half(Codec):
    """What the two have in common: all but the dtype."""

    @property
    @abstractmethod
    def _dtype(self) -> torch.dtype:
        """What elements are rounded to."""

    def num_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        return 2 * num_elements(shape)

    def _pack(self, values: torch.Tensor, key: Key, state: State) -> torch.Tensor:
        return values.reshape(-1).to(self._dtype).view(torch.uint8)

    def _unpack(self, payload: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return typed(payload, self._dtype).to(dtype)


@dataclass(frozen=True)
class BFloat16(_Half):
    """bfloat16: the range of float32 with 8 bits of precision.

    Error: |error| <= |x| / 256, or 2**-134 where that is more. NaN and infinity are carried; what is above 3.39e38
    becomes infinite, and so is seen.
    """

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16


@dataclass(frozen=True)
class Float16(_Half):
    """float16: 11 bits of precision within a narrow range.

    Error: |error| <= |x| / 2048, or 2**-25 where that is more: gradients below 3e-8 become zero, which `Feedback`
    cures. NaN and infinity are carried; what is above 65,504 becomes infinite, and so is seen.
    """

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float16
