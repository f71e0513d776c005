"""A secret in shares: any `threshold` of them give it back, fewer tell nothing (Shamir 1979).

The secret is the value at 0 of a polynomial of degree threshold-1 over the integers modulo a prime; the share of a
holder is its value at the holder's place, 1 or more. The coefficients come from a stream of their own secret.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from samestep.errors import SettingsError
from samestep.federated.stream import SECRET_BYTES

PRIME = (1 << 521) - 1
"""A Mersenne prime above all secrets, so that reducing is cheap."""

_COEFFICIENT_BYTES = 80
"""Longer than the prime by more than 100 bits: a coefficient is uniform to within 2**-100."""


def share(secret: bytes, holders: Sequence[int], threshold: int, coins: bytes) -> dict[int, int]:
    """Return one share per holder.

    Args:
        secret: `SECRET_BYTES` bytes.
        holders: ids of those who hold a share, 0 or more, all different.
        threshold: how many shares give the secret back, 1 up to the number of holders.
        coins: random bytes for the coefficients, `num_coins(threshold)` of them.

    Raises:
        SettingsError: a threshold that cannot be met.
    """
    if not 1 <= threshold <= len(holders):
        raise SettingsError(
            f"A secret shared among {len(holders)} clients cannot take {threshold} of them to be given back; take "
            f"a threshold of 1 to {len(holders)}."
        )
    if len(secret) != SECRET_BYTES or len(coins) != num_coins(threshold):
        raise ValueError(f"{len(secret)} bytes of secret and {len(coins)} of coins, for a threshold of {threshold}.")
    chunks = range(0, len(coins), _COEFFICIENT_BYTES)
    coefficients = [int.from_bytes(coins[i : i + _COEFFICIENT_BYTES], "little") % PRIME for i in chunks]
    value = int.from_bytes(secret, "little")
    return {holder: _at(holder + 1, coefficients, value) for holder in holders}


def num_coins(threshold: int) -> int:
    """Return how many random bytes a polynomial for `threshold` takes."""
    return (threshold - 1) * _COEFFICIENT_BYTES


def recover(shares: Mapping[int, int], threshold: int) -> bytes:
    """Return the secret from shares by holder; the first `threshold` of them are used.

    Raises:
        ValueError: too few shares, or shares that were never of one secret.
    """
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares, but it takes {threshold}.")
    places = [holder + 1 for holder in list(shares)[:threshold]]
    total = 0
    for place, value in zip(places, shares.values(), strict=False):
        above, below = 1, 1
        for other in places:
            if other != place:
                above = above * other % PRIME
                below = below * (other - place) % PRIME
        total = (total + value * above * pow(below, -1, PRIME)) % PRIME
    if total >> (8 * SECRET_BYTES):
        raise ValueError("These shares are not of one secret.")
    return total.to_bytes(SECRET_BYTES, "little")


def _at(place: int, coefficients: Sequence[int], constant: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value + coefficient) * place % PRIME
    return (value + constant) % PRIME
