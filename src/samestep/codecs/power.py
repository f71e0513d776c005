"""The codec of low rank: a matrix goes as the product of two thin ones, found by a power iteration.

    payload   | P (rows x rank) | Q (columns x rank) |  sum dtype; the matrix is about P @ Q.T

PowerSGD (Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization",
NeurIPS 2019) averages P over all workers before it is made orthonormal, and Q after: two rounds, and one approximation
of the mean matrix. Here a payload is a function of one replica's matrix: each replica has its own P and Q, and the
approximations are added. So any tree of additions will do, the sum may have a rank up to rank * replicas, and it takes
one round. As there, one step of the iteration is made per round, from the Q of the round before; and it wants
`Feedback`, with a warm-up: the first gradients are large and change fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from samestep.codecs.codec import Codec, Key, State, aligned, kept, num_elements, sum_dtype, typed
from samestep.codecs.exact import Exact
from samestep.codecs.noise import Noise, seed_of
from samestep.errors import SettingsError

_EXACT = Exact()
_LARGE = 1e12
"""Magnitudes between 1 / it and it can be multiplied with each other in float32 without overflow."""


@dataclass(frozen=True)
class PowerSGD(Codec):
    """A tensor as a matrix (first dimension, all others) of low rank. Wants `Feedback` with a warm-up.

    What has fewer than two dimensions goes as it is, and so does what the two factors would not make smaller. The rank
    is at most the smaller side of the matrix. The state is Q, as large as its part of the payload.

    Products and the QR decomposition are PyTorch's on the CPU: their bits depend on the intra-op threads, which belong
    to the recipe, and on nothing else.

    Error: the squared norm of the error is that of the matrix less that of Q, so it never is more than the matrix. A
    matrix of at most this rank is met to rounding, in the first round already. If a matrix is not finite, all of it
    decodes to NaN.

    Attributes:
        rank: columns of P and Q, from 1.
    """

    rank: int = 4

    def __post_init__(self) -> None:
        """Look at the arguments.

        Raises:
            SettingsError: rank is not a whole number from 1 up.
        """
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise SettingsError(
                f"You set PowerSGD(rank={self.rank!r}), but a rank is a whole number from 1 up. Use rank=4."
            )

    def fresh(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> State:
        rows, columns, rank = self._sizes(shape)
        if not rank:
            return {}
        normal = Noise(seed_of((rows, columns))).normal(columns * rank)
        return {"q": torch.from_numpy(normal).to(sum_dtype(dtype)).view(columns, rank)}

    def num_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        rows, columns, rank = self._sizes(shape)
        return (rows + columns) * rank * sum_dtype(dtype).itemsize if rank else _EXACT.num_bytes(shape, dtype)

    def _sizes(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return rows, columns and rank; rank 0 for what goes as it is."""
        count = num_elements(shape)
        if len(shape) < 2 or not count:
            return 0, 0, 0
        rows, columns = shape[0], count // shape[0]
        rank = min(self.rank, rows, columns)
        return rows, columns, rank if (rows + columns) * rank < count else 0

    def _pack(self, values: torch.Tensor, key: Key, state: State) -> torch.Tensor:
        rows, columns, rank = self._sizes(values.shape)
        if not rank:
            return _EXACT._pack(values, key, state)
        payload = torch.empty((rows + columns) * rank, dtype=values.dtype)
        matrix = aligned(values.view(rows, columns))
        low, high = (float(x) for x in torch.aminmax(matrix))
        most = max(-low, high)
        if not math.isfinite(most):
            return payload.fill_(math.nan).view(torch.uint8)
        exponent = 0
        if most and not 1 / _LARGE < most < _LARGE:
            exponent = math.frexp(most)[1]
            matrix = torch.ldexp(matrix, torch.tensor(-exponent))
        start = kept(state, "q", (columns, rank))
        if start is None:
            start = self.fresh(values.shape, values.dtype)["q"]
        left, _ = torch.linalg.qr(matrix @ start)
        right = matrix.T @ left
        # The next P is made orthonormal, so only the directions of Q count; its size must not grow from round to round.
        size = right.abs().max()
        state["q"] = right / size if size else right
        payload[: rows * rank].view(rows, rank).copy_(left)
        payload[rows * rank :].view(columns, rank).copy_(
            torch.ldexp(right, torch.tensor(exponent)) if exponent else right
        )
        return payload.view(torch.uint8)

    def _unpack(self, payload: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        rows, columns, rank = self._sizes(shape)
        if not rank:
            return _EXACT._unpack(payload, shape, dtype)
        factors = typed(payload, dtype)
        left = factors[: rows * rank].view(rows, rank)
        return left @ aligned(factors[rows * rank :].view(columns, rank)).T
