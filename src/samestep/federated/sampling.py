"""Which clients take part in a round, and which of them are lost: functions of the recipe alone.

Where privacy counts on sampling, who was drawn must stay unknown: keep the seed secret.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from samestep.core.randomness import key
from samestep.errors import SettingsError

_SAMPLE, _DROP, _PACE = 41, 42, 48
"""First parts of keys, so that draws for different ends are unrelated."""


def sample_of(round: int, share: float | int, num_clients: int, seed: int) -> list[int]:
    """Return the clients of a round: a uniform sample without replacement.

    Args:
        round: the round's number.
        share: how many clients, as a whole number, or as a share of all above 0 and up to 1.0 (a float; rounded, at
            least 1 client).
        num_clients: number of all clients.
        seed: the run's seed.

    Returns:
        Client ids in ascending order.

    Raises:
        SettingsError: a share or number that cannot be taken.
    """
    number = num_sampled(share, num_clients)
    order = sorted(range(num_clients), key=lambda client: (key(_SAMPLE, seed, round, client), client))
    return sorted(order[:number])


def num_sampled(share: float | int, num_clients: int) -> int:
    """Return how many clients `sample_of` takes.

    Raises:
        SettingsError: a share or number that cannot be taken.
    """
    if isinstance(share, int) and not isinstance(share, bool):
        if not 1 <= share <= num_clients:
            raise SettingsError(
                f"You set a sample of {share} clients per round, but there are {num_clients}. Take 1 to {num_clients}."
            )
        return share
    if isinstance(share, bool) or not 0 < share <= 1:
        raise SettingsError(
            f"You set a sample of {share!r} per round; give a share above 0 and up to 1.0, or a number of clients."
        )
    return max(1, math.floor(share * num_clients + 0.5))


def poisson_of(round: int, rate: float, num_clients: int, seed: int) -> list[int]:
    """Return the clients of a round where each takes part on its own with probability `rate`.

    This is the sampling that the bound of differential privacy is tight for. The number of clients varies, and may be
    0: divide by the expected number, `rate * num_clients`.

    Args:
        round: the round's number.
        rate: probability, above 0 and up to 1.
        num_clients: number of all clients.
        seed: the run's seed.

    Returns:
        Client ids in ascending order.

    Raises:
        SettingsError: `rate` is no probability above 0.
    """
    if not 0 < rate <= 1:
        raise SettingsError(f"You set a sampling rate of {rate!r}; it is a probability above 0 and up to 1.")
    return [client for client in range(num_clients) if _chance(_SAMPLE, seed, round, client) < rate]


def drops_of(round: int, rate: float, clients: Sequence[int], seed: int) -> list[int]:
    """Return which of a round's clients are lost, in a simulation: each on its own with probability `rate`.

    Args:
        round: the round's number.
        rate: probability, 0 up to 1.
        clients: the round's clients.
        seed: the run's seed.

    Returns:
        Client ids, in the order of `clients`.

    Raises:
        SettingsError: `rate` is no probability.
    """
    if not 0 <= rate <= 1:
        raise SettingsError(f"You set a rate of lost clients of {rate!r}; it is a probability, 0 up to 1.")
    return [client for client in clients if _chance(_DROP, seed, round, client) < rate]


def _chance(purpose: int, seed: int, round: int, client: int) -> float:
    """Return a number in [0, 1)."""
    return (key(purpose, seed, round, client) >> 11) * 2.0**-53


def pace_of(round: int, spread: float, client: int, seed: int) -> float:
    """Return how many times as long as usual a client takes in a round, in a simulation: 1 up to `spread`, uniform."""
    return 1.0 + (spread - 1.0) * _chance(_PACE, seed, round, client)
