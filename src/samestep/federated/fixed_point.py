"""Numbers as integers modulo a power of two, in which sums are exact and no order of adding matters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from samestep.core.randomness import key
from samestep.errors import NonFiniteError, SettingsError

_ROUNDING = 43
"""First part of the key of the draws that round."""

_CHUNK = 1 << 16
"""Elements encoded at once; the draws of one chunk have one key."""


@dataclass(frozen=True, kw_only=True)
class FixedPoint:
    """A value in -limit .. limit as one of 2 * levels + 1 integers, levels = 2**(bits-1) - 1.

    A word is a whole number modulo 2**modulus_bits, held in the bits of an int32 or int64 tensor.

    Args:
        limit: values beyond it, either way, are clipped to it. The result is off by at most `error` per client, and by
            what was clipped.
        bits: bits of one client's value, 2 to 32.
        modulus_bits: 32 or 64. What the words of all clients may add up to; also the bits sent per element.
        rounding: "stochastic" (unbiased: up or down by chance, drawn from the recipe) or "nearest".

    Raises:
        SettingsError: settings outside of these.
    """

    limit: float
    bits: int = 16
    modulus_bits: int = 32
    rounding: Literal["stochastic", "nearest"] = "stochastic"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise SettingsError(f"You set limit={self.limit}, beyond which values are clipped; it must be above 0.")
        if self.modulus_bits not in (32, 64):
            raise SettingsError(f"You set modulus_bits={self.modulus_bits}; words have 32 or 64 bits.")
        if not 2 <= self.bits <= 32:
            raise SettingsError(f"You set bits={self.bits} per value; 2 to 32 can be encoded.")
        if self.rounding not in ("stochastic", "nearest"):
            raise SettingsError(f'You set rounding={self.rounding!r}; it is "stochastic" or "nearest".')

    @property
    def levels(self) -> int:
        """The integer that `limit` becomes."""
        return (1 << (self.bits - 1)) - 1

    @property
    def step(self) -> float:
        """The distance of neighbouring values."""
        return self.limit / self.levels

    @property
    def error(self) -> float:
        """The largest error of one client's value within the limit: a step, or half of one."""
        return self.step if self.rounding == "stochastic" else self.step / 2

    @property
    def capacity(self) -> int:
        """The largest number of clients whose sum cannot wrap around."""
        return ((1 << (self.modulus_bits - 1)) - 1) // self.levels

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of words."""
        return torch.int32 if self.modulus_bits == 32 else torch.int64

    def check_capacity(self, num_clients: int) -> None:
        """Check that the sum over `num_clients` cannot wrap around.

        Raises:
            SettingsError: it can.
        """
        if num_clients > self.capacity:
            raise SettingsError(
                f"You set bits={self.bits} and modulus_bits={self.modulus_bits}, in which at most {self.capacity} "
                f"clients can be added, but a round has {num_clients}. Use fewer bits, or modulus_bits=64."
            )

    def encode(self, values: torch.Tensor, draws: tuple[int, ...] = ()) -> torch.Tensor:
        """Return the words of values.

        Args:
            values: flat, floating point.
            draws: what the draws of stochastic rounding depend on, such as (seed, round, client, parameter).

        Returns:
            Words, of the shape of `values`, on the CPU.

        Raises:
            NonFiniteError: a value is NaN or infinite, which no integer stands for.
        """
        words = torch.empty(len(values), dtype=self.dtype)
        for number, start in enumerate(range(0, len(values), _CHUNK)):
            part = values[start : start + _CHUNK].detach().to("cpu", torch.float64, copy=True)
            if not bool(torch.isfinite(part).all()):
                raise NonFiniteError("An update to be masked holds NaN or infinity. Leave its client out.")
            scaled = part.clamp_(-self.limit, self.limit).div_(self.limit).mul_(self.levels)
            if self.rounding == "nearest":
                scaled = scaled.round_()
            else:
                scaled = scaled.add_(_uniform(len(part), key(_ROUNDING, *draws, number))).floor_()
            words[start : start + len(part)] = scaled.clamp_(-self.levels, self.levels).to(self.dtype)
        return words

    def decode(self, total: torch.Tensor) -> torch.Tensor:
        """Return the values of a sum of words, float64: as many of the same shape."""
        return total.double().mul_(self.limit).div_(self.levels)

    def unsigned(self, words: torch.Tensor) -> np.ndarray:
        """Return the memory of a CPU tensor of words as unsigned integers, whose sums wrap around."""
        return words.numpy().view(np.uint32 if self.modulus_bits == 32 else np.uint64)

    def add(self, total: torch.Tensor, words: torch.Tensor) -> None:
        """Add words to a total in place, modulo 2**modulus_bits."""
        out = self.unsigned(total)
        np.add(out, self.unsigned(words), out=out)


def _uniform(length: int, draws_key: int) -> torch.Tensor:
    """Return float64 numbers in [0, 1), by a counter-based generator (Philox 4x64, Salmon et al. 2011)."""
    raw = np.random.Philox(key=draws_key).random_raw(length)
    return torch.from_numpy((raw >> np.uint64(11)) * 2.0**-53)
