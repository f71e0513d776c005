"""Secure aggregation: a server learns the sum of its clients' words, and of no client its own.

One round, after Bonawitz et al. (2017), over the neighbours of Bell et al. (2020):

    [1] keys      each client makes a key pair and a seed of its own, and tells its public key
    [2] shares    it gives its neighbours (and itself) shares of its private key and of its seed
    [3] words     it sends  words + stream(own seed) + sum over neighbours of +-stream(pair secret), mod 2**32 or 2**64
                  The lower id of a pair adds, the higher one subtracts, so pairs cancel in the sum.
    [4] unmask    of each client that delivered, the others reveal shares of its seed; of each one that was lost, of
                  its private key, which gives the pair secrets that nobody cancelled. Never both of one client.

All in whole numbers, so the sum is exact and no order of adding matters: it does not depend on workers.

What is real: X25519 key agreement, HKDF, AES-256-CTR streams, Shamir shares, the sums, the refusal to reveal both.
What a run on one machine simulates: all parties are in one program; shares and public keys are passed by calls, not
encrypted and signed over a network; and where secrets come from the run's seed (`Party.simulated`), whoever knows the
seed knows them. So simulation shows the protocol's arithmetic and its cost, and hides nothing from whoever runs it. A
deployment draws secrets from the system (`Party.fresh`) and brings authenticated channels.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from samestep.errors import SettingsError, UnmaskingError, UsageError
from samestep.federated import sharing
from samestep.federated.extra import extra_module
from samestep.federated.fixed_point import FixedPoint
from samestep.federated.neighbours import degree_of, neighbours_of
from samestep.federated.stream import SECRET_BYTES, Stream, secret_of

_KEYS = "cryptography.hazmat.primitives.asymmetric.x25519"
_HASHES = "cryptography.hazmat.primitives.hashes"
_DERIVATION = "cryptography.hazmat.primitives.kdf.hkdf"
_PURPOSE = "Masking"

_CHUNK_BYTES = 1 << 19
"""Words masked at once, so that they stay in the cache while all streams are added."""

_SHARE_BYTES = 66


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Secure aggregation as a recipe.

    Args:
        numbers: how values become words.
        neighbours: with how many others each client masks, rounded up to an even number; None for
            4 * ceil(log2(clients)). All others where that is no fewer. Each costs a client one stream of the model's
            size.
        threshold: more than this share of a client's neighbours and itself must deliver, or the round cannot be
            unmasked; so many must also come together to open a client's masks. From 0.5, below which a server that
            tells two stories could have both of a client's secrets, to below 1.

    Raises:
        SettingsError: settings outside of these.
    """

    numbers: FixedPoint
    neighbours: int | None = None
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.neighbours is not None and self.neighbours < 2:
            raise SettingsError(
                f"You set Masking(neighbours={self.neighbours}); each client needs at least 2, or the one it has would "
                f"see through its mask. Leave it out for 4 * ceil(log2(clients))."
            )
        if not 0.5 <= self.threshold < 1:
            raise SettingsError(
                f"You set Masking(threshold={self.threshold}); more than this share of a client's neighbours open its "
                f"masks, from 0.5 (else two halves could be told two stories) to below 1."
            )

    def num_needed(self, num_holders: int) -> int:
        """Return how many of the holders of a client's shares open it."""
        return math.floor(self.threshold * num_holders) + 1

    def bytes_per_client(self, num_elements: int, num_clients: int) -> int:
        """Return what one client of a round sends: words, its public key, and two shares to each neighbour."""
        words = num_elements * self.numbers.modulus_bits // 8
        return words + SECRET_BYTES + 2 * _SHARE_BYTES * degree_of(num_clients, self.neighbours)

    def bind(self, clients: Sequence[int], seed: int, round: int) -> MaskedRound:
        """Return one round, simulated: all clients' secrets come from (seed, round, client).

        Args:
            clients: ids of the round's clients, 0 or more, all different: those who told a public key.
            seed: the run's seed.
            round: the round's number.

        Raises:
            SettingsError: clients that cannot mask together; or the extra that holds the ciphers is missing.
        """
        extra_module(_KEYS, _PURPOSE)
        return MaskedRound(self, clients, seed, round, lambda client: Party.simulated(client, seed, round))


class Party:
    """One client's secrets in one round; never used in another.

    Args:
        client: its id.
        private_key: 32 bytes of an X25519 key.
        own_seed: 32 bytes, of the stream that hides its words once the pairs' masks are gone.
        coins: 32 bytes, from which the shares' coefficients are drawn.
    """

    def __init__(self, client: int, private_key: bytes, own_seed: bytes, coins: bytes):
        self.client = client
        self.private_key = private_key
        self.own_seed = own_seed
        self._coins = Stream(coins)

    @classmethod
    def simulated(cls, client: int, seed: int, round: int) -> Party:
        """Return a client whose secrets are a function of the recipe: the same bits in every run."""
        purposes = ("private key", "own seed", "coins")
        return cls(client, *(secret_of(purpose, seed, round, client) for purpose in purposes))

    @classmethod
    def fresh(cls, client: int) -> Party:
        """Return a client with secrets from the operating system."""
        return cls(client, *(secrets.token_bytes(SECRET_BYTES) for _ in range(3)))

    @cached_property
    def public_key(self) -> bytes:
        """What this client tells all: 32 bytes."""
        raw = extra_module("cryptography.hazmat.primitives.serialization", _PURPOSE)
        return self._key.public_key().public_bytes(raw.Encoding.Raw, raw.PublicFormat.Raw)

    def pair_secret(self, public_key: bytes) -> bytes:
        """Return the secret shared with the client of that public key: the same, seen from either."""
        keys, hashes = extra_module(_KEYS, _PURPOSE), extra_module(_HASHES, _PURPOSE)
        shared = self._key.exchange(keys.X25519PublicKey.from_public_bytes(public_key))
        both = b"".join(sorted((self.public_key, public_key)))
        derivation = extra_module(_DERIVATION, _PURPOSE)
        return derivation.HKDF(hashes.SHA256(), SECRET_BYTES, None, b"samestep pair" + both).derive(shared)

    def shares_of_key(self, holders: Sequence[int], threshold: int) -> dict[int, int]:
        """Return a share of the private key for each holder."""
        return sharing.share(self.private_key, holders, threshold, self._polynomial(0, threshold))

    def shares_of_seed(self, holders: Sequence[int], threshold: int) -> dict[int, int]:
        """Return a share of the own seed for each holder."""
        return sharing.share(self.own_seed, holders, threshold, self._polynomial(1, threshold))

    def _polynomial(self, number: int, threshold: int) -> bytes:
        num_words = sharing.num_coins(threshold) // 4
        return self._coins.words(number * num_words, (number + 1) * num_words, np.dtype(np.uint32)).tobytes()

    @cached_property
    def _key(self):
        return extra_module(_KEYS, _PURPOSE).X25519PrivateKey.from_private_bytes(self.private_key)


class MaskedRound:
    """The clients of one round and what passes between them.

    Attributes:
        clients: their ids, ascending.
        neighbours: of each client, those it masks with.
        num_needed: how many of a client's holders (its neighbours and itself) must deliver.

    Raises:
        SettingsError: fewer than two clients, one twice, or more than the words can add up.
    """

    def __init__(
        self, masking: Masking, clients: Sequence[int], seed: int, round: int, make: Callable[[int], Party]
    ) -> None:
        if len(clients) < 2 or len(set(clients)) != len(clients) or min(clients) < 0:
            raise SettingsError(
                f"Masking needs two or more different clients in a round, as the sum over one hides nothing; round "
                f"{round} has {list(clients)[:8]}. Sample more clients, or leave masking out."
            )
        masking.numbers.check_capacity(len(clients))
        self.clients = sorted(clients)
        degree = degree_of(len(clients), masking.neighbours)
        self.neighbours = neighbours_of(self.clients, degree, seed, round)
        self.num_needed = masking.num_needed(degree + 1)
        self._numbers = masking.numbers
        self._unsigned = np.dtype(np.uint32 if masking.numbers.modulus_bits == 32 else np.uint64)
        self._number = round
        self._make = make
        self._parties: dict[int, Party] = {}
        self._pairs: dict[tuple[int, int], Stream] = {}
        self._survivors: set[int] | None = None
        self._left: list[tuple[Stream, int]] = []

    def mask(self, client: int, words: torch.Tensor, start: int = 0) -> None:
        """Mask a client's words, in place.

        Args:
            client: one of the round's.
            words: a run of its words: contiguous, int32 or int64 as `FixedPoint.dtype` says, on the CPU.
            start: the position of the first of them in the client's update.
        """
        own = Stream(self._party(client).own_seed)
        streams = [(own, 1), *((self._pair(client, other), _sign(client, other)) for other in self.neighbours[client])]
        self._add(words, start, streams)

    def unmask(self, total: torch.Tensor, survivors: Collection[int], start: int = 0) -> None:
        """Take all masks out of the sum of the survivors' masked words, in place.

        Args:
            total: a run of the sum, as in `mask`.
            survivors: those whose words are in the sum.
            start: the position of its first word.

        Raises:
            UnmaskingError: too few survivors to open someone's masks; nothing was revealed.
            UsageError: another set of survivors was unmasked before, so that some client's two secrets would both be
                revealed.
        """
        self.check(survivors)
        alive = set(survivors)
        if self._survivors is None:
            self._survivors, self._left = alive, list(self._left_over(alive))
        elif self._survivors != alive:
            raise UsageError(
                f"Round {self._number} was unmasked for {len(self._survivors)} survivors before, and now for others. A "
                f"client that is told of as delivered and then as lost would have both secrets revealed, and with them "
                f"its words. Unmask every part of a round for the same survivors."
            )
        self._add(total, start, self._left)

    def check(self, survivors: Collection[int]) -> None:
        """Check that a round with these survivors can be unmasked.

        Raises:
            UnmaskingError: it cannot.
            UsageError: a survivor is not of this round.
        """
        alive = set(survivors)
        if not alive <= set(self.clients):
            raise UsageError(f"Clients {sorted(alive - set(self.clients))[:8]} are not in round {self._number}.")
        for client in self.clients:
            present = [holder for holder in self._holders(client) if holder in alive]
            if len(present) < self.num_needed and (client in alive or present or not alive):
                raise UnmaskingError(
                    f"Round {self._number}: {len(alive)} of {len(self.clients)} clients delivered, too few to remove "
                    f"the masks. To open client {client}, {self.num_needed} of the {len(self._holders(client))} that "
                    f"hold its shares are needed, but {len(present)} are left. Leave this round out; if that happens "
                    f"often, sample more clients, wait longer for them, or give Masking more neighbours."
                )

    def _left_over(self, alive: set[int]) -> Iterator[tuple[Stream, int]]:
        """Yield the masks that stand in the sum over `alive`, each with the sign that takes it out.

        Each secret is put together from what its holders who are alive reveal: of one who delivered the seed, of one
        who was lost the private key.
        """
        for client in self.clients:
            party, holders = self._party(client), self._holders(client)
            if client in alive:
                yield Stream(self._opened(party.shares_of_seed(holders, self.num_needed), alive)), -1
                continue
            met = [other for other in self.neighbours[client] if other in alive]
            if met:
                # The server knows this key now, and nothing else of the client.
                key = self._opened(party.shares_of_key(holders, self.num_needed), alive)
                lost = Party(client, key, bytes(SECRET_BYTES), bytes(SECRET_BYTES))
                for other in met:
                    yield Stream(lost.pair_secret(self._party(other).public_key)), -_sign(other, client)

    def _opened(self, shares: dict[int, int], alive: set[int]) -> bytes:
        return sharing.recover({holder: value for holder, value in shares.items() if holder in alive}, self.num_needed)

    def _holders(self, client: int) -> tuple[int, ...]:
        return (client, *self.neighbours[client])

    def _party(self, client: int) -> Party:
        if client not in self._parties:
            self._parties[client] = self._make(client)
        return self._parties[client]

    def _pair(self, client: int, other: int) -> Stream:
        pair = (min(client, other), max(client, other))
        if pair not in self._pairs:
            self._pairs[pair] = Stream(self._party(client).pair_secret(self._party(other).public_key))
        return self._pairs[pair]

    def _add(self, words: torch.Tensor, start: int, streams: Sequence[tuple[Stream, int]]) -> None:
        out = self._numbers.unsigned(words)
        length = _CHUNK_BYTES // self._unsigned.itemsize
        for first in range(0, len(out), length):
            part = out[first : first + length]
            for stream, sign in streams:
                mask = stream.words(start + first, start + first + len(part), self._unsigned)
                (np.add if sign > 0 else np.subtract)(part, mask, out=part)


def _sign(client: int, other: int) -> int:
    """Return the sign with which `client` adds the mask that it shares with `other`."""
    return 1 if client < other else -1
