"""Who masks with whom in a round: a ring of clients in random order, each tied to the nearest on both sides.

    degree 4        . a - b - c - d - e .        b: a, c, and e.g. the one before a, and d

A complete graph costs each client one mask per other client. Bell et al. (2020) show that a random regular graph of a
degree that grows like the logarithm of the number of clients is enough, so that a thousand clients cost some 40 masks
each. `degree_of` gives 4 * ceil(log2(clients)), or the complete graph where that is no larger.
"""

from __future__ import annotations

from collections.abc import Sequence

from samestep.core.randomness import key

_ORDER = 44
"""First part of the key of the ring's order."""


def degree_of(num_clients: int, wanted: int | None = None) -> int:
    """Return how many neighbours each of `num_clients` has: even, or all others.

    Args:
        num_clients: clients in the round.
        wanted: the least number asked for; 4 * ceil(log2(num_clients)) if None.
    """
    least = 4 * max(1, (num_clients - 1).bit_length()) if wanted is None else wanted
    even = least + least % 2
    return even if even < num_clients - 1 else num_clients - 1


def neighbours_of(clients: Sequence[int], degree: int, seed: int, round: int) -> dict[int, tuple[int, ...]]:
    """Return each client's neighbours, ascending. If a is one of b's, b is one of a's.

    Args:
        clients: the round's clients, all different.
        degree: from `degree_of`.
        seed: the run's seed.
        round: the round's number; each round has another ring.
    """
    num_clients = len(clients)
    if degree >= num_clients - 1:
        return {client: tuple(sorted(other for other in clients if other != client)) for client in clients}
    ring = sorted(clients, key=lambda client: (key(_ORDER, seed, round, client), client))
    reach = [offset for distance in range(1, degree // 2 + 1) for offset in (-distance, distance)]
    return {
        client: tuple(sorted(ring[(place + offset) % num_clients] for offset in reach))
        for place, client in enumerate(ring)
    }
