"""Who masks with whom in a round: a ring of clients in random order, each tied to the nearest on both sides.

    degree 4        ... a - b - c - d - e ...        c masks with a, b, d, e

A complete graph costs each client one mask per other client. Bell et al. (2020) show that a random regular graph of a
degree that grows like the logarithm of the number of clients is enough. `degree_of` gives 4 * ceil(log2(clients)), or
the complete graph where that is no larger: 40 masks each for a thousand clients.

What a degree gives, with shares that more than half open (bounds by the hypergeometric tail, over all clients): the
chance that a server in league with a tenth (a fifth) of the clients opens somebody; that a round fails because so many
at random are lost.

    clients  degree   in league 1/10, 1/5   lost 1/10, 1/5
    300      36       2**-33   2**-10       1e-10   8e-4
    300      100      none     2**-58       none    5e-18
    1,000    40       2**-28   2**-8        4e-9    3e-3
    1,000    100      2**-88   2**-32       4e-27   2e-10

So the default is for up to a tenth; take 100 neighbours, for some 3 times the cost, where a fifth may be in league.
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
