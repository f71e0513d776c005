"""The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014): 64 bits to 64 bits, one to one, well mixed."""

from __future__ import annotations

import numpy as np

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio, odd: its multiples visit all 64-bit numbers, far from one another."""

_SHIFTS = tuple(np.uint64(shift) for shift in (30, 27, 31))
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_FACTORS_64 = tuple(np.uint64(factor) for factor in _FACTORS)


def mix(values: np.ndarray, scratch: np.ndarray | None = None) -> np.ndarray:
    """Mix every element of a uint64 array in place, and return it.

    Args:
        values: uint64, any shape.
        scratch: uint64 of the same shape that may be overwritten; allocated if absent.
    """
    scratch = np.empty_like(values) if scratch is None else scratch
    # Positional arguments: a short array's time goes into the calls.
    np.right_shift(values, _SHIFTS[0], scratch)
    np.bitwise_xor(values, scratch, values)
    np.multiply(values, _FACTORS_64[0], values)
    np.right_shift(values, _SHIFTS[1], scratch)
    np.bitwise_xor(values, scratch, values)
    np.multiply(values, _FACTORS_64[1], values)
    np.right_shift(values, _SHIFTS[2], scratch)
    return np.bitwise_xor(values, scratch, values)


def mix_one(value: int) -> int:
    """Return `mix` of one integer, of which the low 64 bits count."""
    value &= MASK
    value = (value ^ value >> 30) * _FACTORS[0] & MASK
    value = (value ^ value >> 27) * _FACTORS[1] & MASK
    return value ^ value >> 31
